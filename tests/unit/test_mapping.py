"""Name tables: exact cover of every official file, and the value of every transform, in both directions."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bokehflux.configs import (
    CLIP_L,
    FLUX_BOKEH,
    FLUX_DEV,
    FLUX_SCHNELL,
    FLUX_VAE,
    T5_XXL,
    BokehConfig,
    MMDiTConfig,
    VAEConfig,
)
from bokehflux.models.adapter import BokehAdapter
from bokehflux.models.clip import CLIPTextEncoder
from bokehflux.models.mmdit import MMDiT
from bokehflux.models.t5 import T5Encoder
from bokehflux.models.vae import AutoencoderKL
from bokehflux.weights import manifests
from bokehflux.weights.files.checkpoint import CheckpointError
from bokehflux.weights.mapping import (
    LINEAR_TO_CONV,
    SAME,
    SWAP_HALVES,
    Rule,
    Table,
    concat,
    plan,
    recognise,
    resolve,
    to_official,
)
from bokehflux.weights.tables import adapter, clip, flux, t5, vae
from tests.helpers import needs_shared, shared

SINGLE_38 = BokehConfig(blocks=tuple(range(19, 57)), rank=128)
OFFICIAL = {
    "flux1-dev.bfl": (flux.BFL, lambda: MMDiT(FLUX_DEV)),
    "flux1-dev.diffusers": (flux.DIFFUSERS, lambda: MMDiT(FLUX_DEV)),
    "flux1-schnell.bfl": (flux.BFL, lambda: MMDiT(FLUX_SCHNELL)),
    "flux1-schnell.diffusers": (flux.DIFFUSERS, lambda: MMDiT(FLUX_SCHNELL)),
    "ae.bfl": (vae.BFL, lambda: AutoencoderKL(FLUX_VAE)),
    "vae.diffusers": (vae.DIFFUSERS, lambda: AutoencoderKL(FLUX_VAE)),
    "t5xxl.hf": (t5.HF, lambda: T5Encoder(T5_XXL)),
    "clip_l.hf": (clip.HF, lambda: CLIPTextEncoder(CLIP_L)),
    "bokeh_adapter.all57-qk": (adapter.PUBLISHED, lambda: BokehAdapter(FLUX_BOKEH, FLUX_DEV)),
    "bokeh_adapter.single38-qk": (adapter.PUBLISHED, lambda: BokehAdapter(SINGLE_38, FLUX_DEV)),
}
every_file = pytest.mark.parametrize("name", OFFICIAL)


def meta(build) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return build().state_dict()


def shapes(tensors) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in tensors.items()}


def numbered(shapes) -> dict[str, torch.Tensor]:
    """Tensors in which no value occurs twice."""
    tensors, start = {}, 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel()
        tensors[name] = torch.arange(start, start + size).view(shape)
        start += size
    return tensors


def convert(table, ours, theirs) -> dict[str, torch.Tensor]:
    entries = plan(table, ours, shapes(theirs), "file")
    return {entry.dst: entry.transform.join([theirs[name] for name in entry.src]) for entry in entries}


def problems_of(table, ours, theirs) -> list[str]:
    with pytest.raises(CheckpointError) as caught:
        plan(table, ours, theirs, "some.safetensors")
    assert str(caught.value).startswith("some.safetensors")
    return list(caught.value.problems)


@every_file
def test_every_official_file_is_covered_exactly(name):
    table, build = OFFICIAL[name]
    ours, theirs = shapes(meta(build)), manifests.shapes(name)
    entries = plan(table, ours, theirs, name)
    assert sorted(entry.dst for entry in entries) == sorted(ours)
    assert sorted(n for entry in entries for n in (*entry.src, *entry.tied)) == sorted(theirs)


@every_file
def test_every_official_file_can_be_written(name):
    table, build = OFFICIAL[name]
    expected = manifests.shapes(name)
    expected.pop("encoder.embed_tokens.weight", None)  # the tied copy is written once
    assert shapes(to_official(table, meta(build))) == expected


@every_file
def test_each_layout_is_recognised_and_no_other(name):
    table, _ = OFFICIAL[name]
    tables = (*flux.TABLES, *vae.TABLES, t5.HF, clip.HF, adapter.PUBLISHED)
    assert recognise(tables, manifests.shapes(name), name) is table


@needs_shared
@every_file
def test_manifests_equal_the_shared_ones(name):
    tensors = json.loads(shared(f"manifests/{name}.json").read_text())["tensors"]
    assert manifests.shapes(name) == {n: tuple(t["shape"]) for n, t in tensors.items()}


@st.composite
def mmdits(draw) -> MMDiTConfig:
    heads, half = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return MMDiTConfig(
        in_channels=draw(st.integers(1, 5)), txt_dim=draw(st.integers(1, 5)), pooled_dim=2,
        hidden_size=heads * 6 * half, num_heads=heads, num_double=draw(st.integers(0, 2)),
        num_single=draw(st.integers(0, 2)), axes_dim=(2 * half,) * 3, guidance_embed=draw(st.booleans()),
    )  # fmt: skip


@st.composite
def vaes(draw) -> VAEConfig:
    return VAEConfig(
        channels=tuple(draw(st.lists(st.sampled_from([2, 4]), min_size=1, max_size=4))),
        layers_per_block=draw(st.integers(1, 3)), latent_channels=draw(st.integers(1, 3)), norm_groups=2,
        scale=1.0, shift=0.0,
    )  # fmt: skip


def check_round_trip(table, build) -> None:
    ours = shapes(meta(build))
    official = numbered(shapes(to_official(table, meta(build))))
    mine = convert(table, ours, official)
    assert shapes(mine) == ours
    back = to_official(table, mine)
    assert back.keys() == official.keys()
    assert all(torch.equal(back[name], official[name]) for name in back)
    # Nothing is lost or doubled on the way.
    values = torch.cat([t.flatten() for t in mine.values()])
    assert torch.equal(values.sort().values, torch.arange(len(values)))


@settings(max_examples=15)
@given(mmdits())
def test_any_mmdit_survives_a_round_trip(config):
    check_round_trip(flux.DIFFUSERS, lambda: MMDiT(config))


@settings(max_examples=15)
@given(vaes())
def test_any_vae_survives_a_round_trip(config):
    check_round_trip(vae.DIFFUSERS, lambda: AutoencoderKL(config))


def test_mmdit_values():
    config = MMDiTConfig(
        in_channels=4, txt_dim=3, pooled_dim=2, hidden_size=6, num_heads=1, num_double=11, num_single=2,
        axes_dim=(2, 2, 2), guidance_embed=True,
    )  # fmt: skip
    build = lambda: MMDiT(config)  # noqa: E731
    official = numbered(shapes(to_official(flux.DIFFUSERS, meta(build))))
    mine = convert(flux.DIFFUSERS, shapes(meta(build)), official)

    def stacked(block: str, *names: str) -> torch.Tensor:
        return torch.cat([official[f"{block}.{name}"] for name in names])

    for kind in ("weight", "bias"):
        q, k, v = (f"attn.to_{x}.{kind}" for x in "qkv")
        added = [f"attn.add_{x}_proj.{kind}" for x in "qkv"]
        block = "transformer_blocks.10"
        assert torch.equal(mine[f"double_blocks.10.img_attn.qkv.{kind}"], stacked(block, q, k, v))
        assert torch.equal(mine[f"double_blocks.10.txt_attn.qkv.{kind}"], stacked(block, *added))
        block = "single_transformer_blocks.1"
        assert torch.equal(
            mine[f"single_blocks.1.linear1.{kind}"], stacked(block, q, k, v, f"proj_mlp.{kind}")
        )
        # diffusers: scale, shift = emb.chunk(2); BFL: shift, scale = ...chunk(2)
        scale, shift = official[f"norm_out.linear.{kind}"].chunk(2)
        assert torch.equal(mine[f"final_layer.adaLN_modulation.1.{kind}"], torch.cat([shift, scale]))

    pairs = {  # equal shapes that only their values tell apart
        "double_blocks.1.img_attn.norm.query_norm.scale": "transformer_blocks.1.attn.norm_q.weight",
        "double_blocks.1.img_attn.norm.key_norm.scale": "transformer_blocks.1.attn.norm_k.weight",
        "double_blocks.1.txt_attn.norm.query_norm.scale": "transformer_blocks.1.attn.norm_added_q.weight",
        "double_blocks.1.txt_attn.norm.key_norm.scale": "transformer_blocks.1.attn.norm_added_k.weight",
        "double_blocks.1.img_attn.proj.weight": "transformer_blocks.1.attn.to_out.0.weight",
        "double_blocks.1.txt_attn.proj.weight": "transformer_blocks.1.attn.to_add_out.weight",
        "double_blocks.1.img_mod.lin.weight": "transformer_blocks.1.norm1.linear.weight",
        "double_blocks.1.txt_mod.lin.weight": "transformer_blocks.1.norm1_context.linear.weight",
        "double_blocks.1.img_mlp.0.weight": "transformer_blocks.1.ff.net.0.proj.weight",
        "double_blocks.1.txt_mlp.2.weight": "transformer_blocks.1.ff_context.net.2.weight",
        "single_blocks.0.norm.query_norm.scale": "single_transformer_blocks.0.attn.norm_q.weight",
        "single_blocks.0.norm.key_norm.scale": "single_transformer_blocks.0.attn.norm_k.weight",
        "time_in.in_layer.weight": "time_text_embed.timestep_embedder.linear_1.weight",
        "guidance_in.in_layer.weight": "time_text_embed.guidance_embedder.linear_1.weight",
    }
    for ours, theirs in pairs.items():
        assert torch.equal(mine[ours], official[theirs]), ours


def test_vae_values():
    config = VAEConfig(
        channels=(2, 4, 4), layers_per_block=1, latent_channels=2, norm_groups=2, scale=1, shift=0
    )
    build = lambda: AutoencoderKL(config)  # noqa: E731
    official = numbered(shapes(to_official(vae.DIFFUSERS, meta(build))))
    mine = convert(vae.DIFFUSERS, shapes(meta(build)), official)
    pairs = {
        "decoder.up.0.block.1.conv1.weight": "decoder.up_blocks.2.resnets.1.conv1.weight",
        "decoder.up.0.block.0.nin_shortcut.weight": "decoder.up_blocks.2.resnets.0.conv_shortcut.weight",
        "decoder.up.2.block.0.norm2.bias": "decoder.up_blocks.0.resnets.0.norm2.bias",
        "decoder.up.2.upsample.conv.bias": "decoder.up_blocks.0.upsamplers.0.conv.bias",
        "decoder.up.1.upsample.conv.bias": "decoder.up_blocks.1.upsamplers.0.conv.bias",
        "encoder.down.0.downsample.conv.bias": "encoder.down_blocks.0.downsamplers.0.conv.bias",
        "encoder.mid.block_2.conv2.weight": "encoder.mid_block.resnets.1.conv2.weight",
        "decoder.mid.attn_1.k.bias": "decoder.mid_block.attentions.0.to_k.bias",
        "decoder.mid.attn_1.norm.weight": "decoder.mid_block.attentions.0.group_norm.weight",
        "decoder.norm_out.bias": "decoder.conv_norm_out.bias",
    }
    for ours, theirs in pairs.items():
        assert torch.equal(mine[ours], official[theirs]), ours
    for ours, theirs in {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}.items():
        weight = official[f"encoder.mid_block.attentions.0.{theirs}.weight"]
        assert torch.equal(mine[f"encoder.mid.attn_1.{ours}.weight"], weight[:, :, None, None])


@pytest.mark.parametrize(
    ("transform", "shape"),
    [(SAME, (4, 3)), (concat(1, 1, 1), (6, 2)), (concat(1, 1, 1, 4), (14,)), (SWAP_HALVES, (6, 2)),
     (LINEAR_TO_CONV, (3, 3, 1, 1))],
)  # fmt: skip
def test_split_undoes_join(transform, shape):
    ours = torch.arange(torch.Size(shape).numel()).view(shape)
    theirs = transform.split(ours)
    assert torch.equal(transform.join(theirs), ours)
    assert all(
        torch.equal(a, b) for a, b in zip(transform.split(transform.join(theirs)), theirs, strict=True)
    )


def test_swap_halves_does_swap():
    assert SWAP_HALVES.join([torch.arange(4)]).tolist() == [2, 3, 0, 1]


T5_OURS = {"shared.weight": (5, 2), "encoder.x": (2,)}


@pytest.mark.parametrize("names", [["shared.weight"], ["encoder.embed_tokens.weight"]])
def test_either_tied_tensor_will_do(names):
    entries = plan(t5.HF, T5_OURS, {"encoder.x": (2,)} | dict.fromkeys(names, (5, 2)), "f")
    assert entries[0].src == tuple(names) and entries[0].tied == ()


def test_both_tied_tensors_are_used_and_checked():
    both = {"encoder.x": (2,), "shared.weight": (5, 2), "encoder.embed_tokens.weight": (5, 2)}
    entries = plan(t5.HF, T5_OURS, both, "f")
    assert entries[0].src == ("shared.weight",) and entries[0].tied == ("encoder.embed_tokens.weight",)
    wrong = both | {"encoder.embed_tokens.weight": (6, 2)}
    assert problems_of(t5.HF, T5_OURS, wrong) == [
        "wrong shape: encoder.embed_tokens.weight is [6, 2], expected [5, 2]"
    ]
    assert problems_of(t5.HF, T5_OURS, {"encoder.x": (2,)}) == ["missing: shared.weight [5, 2]"]


def test_position_ids_of_older_clip_files_are_ignored():
    theirs = manifests.shapes("clip_l.hf") | {"text_model.embeddings.position_ids": (1, 77)}
    plan(clip.HF, shapes(meta(lambda: CLIPTextEncoder(CLIP_L))), theirs, "f")


def test_all_problems_are_listed_in_the_files_own_names():
    ours, theirs = shapes(meta(lambda: MMDiT(FLUX_DEV))), manifests.shapes("flux1-dev.diffusers")
    del theirs["proj_out.bias"]
    for i in range(38):
        del theirs[f"single_transformer_blocks.{i}.proj_mlp.bias"]
    theirs["lora.weight"] = (1, 2)
    theirs["transformer_blocks.3.attn.to_q.weight"] = (3072, 3071)
    assert problems_of(flux.DIFFUSERS, ours, theirs) == [
        "missing: proj_out.bias [64]",
        "missing: single_transformer_blocks.{0-37}.proj_mlp.bias [12288]",
        "unexpected: lora.weight [1, 2]",
        "wrong shape: transformer_blocks.3.attn.to_q.weight is [3072, 3071], expected [3072, 3072]",
    ]


@every_file
def test_one_changed_tensor_is_always_noticed(name):
    table, build = OFFICIAL[name]
    ours, theirs = shapes(meta(build)), manifests.shapes(name)
    tied = {"shared.weight", "encoder.embed_tokens.weight"}
    for victim in list(theirs)[:: max(1, len(theirs) // 7)]:
        without = {n: s for n, s in theirs.items() if n != victim}
        if victim not in tied:
            assert problems_of(table, ours, without) == [f"missing: {victim} {list(theirs[victim])}"]
        problem = problems_of(table, ours, theirs | {victim: (*theirs[victim], 1)})[0]
        assert problem.startswith("wrong shape: " + victim)
    assert problems_of(table, ours, theirs | {"zzz.weight": (1,)}) == ["unexpected: zzz.weight [1]"]


def test_unknown_layout_says_what_was_looked_for():
    with pytest.raises(
        CheckpointError, match="'norm_out.linear.weight' .FLUX transformer, diffusers layout."
    ):
        recognise(flux.TABLES, {"conv_in.weight": ()}, "f")
    prefixed = {"model.diffusion_model." + name: () for name in manifests.shapes("flux1-dev.bfl")}
    with pytest.raises(CheckpointError, match="prefix 'model.diffusion_model.'"):
        recognise(flux.TABLES, prefixed, "f")


def test_faulty_tables_are_refused():
    two = Table("two", "m", rules=(Rule("a.{i}", "b.{i}"), Rule("a.{j}", "c.{j}")))
    with pytest.raises(ValueError, match="'a.0' matches"):
        resolve(two, {"a.0": (1,)})
    one = Table("one", "m", rules=(Rule("a.{i}", "b"),))
    with pytest.raises(ValueError, match=r"uses \['b'\] more than once"):
        resolve(one, {"a.0": (1,), "a.1": (1,)})


def test_what_diffusers_cannot_express_is_refused():
    config = MMDiTConfig(
        in_channels=4, txt_dim=4, pooled_dim=4, hidden_size=6, num_heads=1, num_double=0, num_single=1,
        axes_dim=(2, 2, 2), guidance_embed=False, mlp_ratio=3,
    )  # fmt: skip
    with pytest.raises(ValueError, match="36 rows cannot be divided as 1:1:1:4"):
        to_official(flux.DIFFUSERS, meta(lambda: MMDiT(config)))
    with pytest.raises(ValueError, match="single_blocks.0.linear1.weight .* does not exist in this layout"):
        plan(flux.DIFFUSERS, shapes(meta(lambda: MMDiT(config))), {}, "f")
