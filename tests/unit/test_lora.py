"""LoRA: one set of random changes written in every key family must change the networks alike, and exactly."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bokehflux
from bokehflux.attention import Grounded
from bokehflux.configs import FLUX_DEV, CLIPConfig, T5Config
from bokehflux.models.adapter import BokehCondition
from bokehflux.models.clip import CLIPTextEncoder
from bokehflux.models.embeddings import rope_table
from bokehflux.models.fold import fold_adapter
from bokehflux.models.linear import Linear
from bokehflux.models.mmdit import MMDiT
from bokehflux.models.t5 import T5Encoder
from bokehflux.sampling.latents import LatentGrid, position_ids
from bokehflux.weights.files.checkpoint import CheckpointError
from bokehflux.weights.files.write import save
from bokehflux.weights.load import load_components
from bokehflux.weights.lora import apply as lora_apply
from bokehflux.weights.lora.apply import attach, detach, merge
from bokehflux.weights.lora.read import PREFIXES, Lora, places_of, read_lora
from bokehflux.weights.tables import lora as names
from tests.helpers import assert_within_2x, needs_shared, shared
from tests.tiny import MMDIT, tiny_mmdit

CLIP = CLIPConfig(vocab_size=11, width=8, mlp_size=6, num_layers=2, num_heads=2, max_length=9)
T5 = T5Config(vocab_size=11, width=8, head_dim=4, mlp_size=6, num_layers=2, num_heads=2, num_buckets=8)
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "lora.md"
E = MMDIT.hidden_size
RANK, ALPHA = 3, 1.5

# The diffusers name of each of our layers, written down here a second time, by hand.
TOP = {
    "img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}  # fmt: skip
DOUBLE = {
    "img_mod.lin": ["norm1.linear"], "txt_mod.lin": ["norm1_context.linear"],
    "img_attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "txt_attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    "img_attn.proj": ["attn.to_out.0"], "txt_attn.proj": ["attn.to_add_out"],
    "img_mlp.0": ["ff.net.0.proj"], "img_mlp.2": ["ff.net.2"],
    "txt_mlp.0": ["ff_context.net.0.proj"], "txt_mlp.2": ["ff_context.net.2"],
}  # fmt: skip
SINGLE = {
    "modulation.lin": ["norm.linear"], "linear2": ["proj_out"],
    "linear1": ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
}  # fmt: skip
XLABS = {
    "img_attn.qkv": "processor.qkv_lora1", "txt_attn.qkv": "processor.qkv_lora2",
    "img_attn.proj": "processor.proj_lora1", "txt_attn.proj": "processor.proj_lora2",
    "linear1": "processor.qkv_lora", "linear2": "processor.proj_lora",
}  # fmt: skip


class Change(NamedTuple):
    """down [rank, in] and up [out, rank] of one of our layers, scale ALPHA / RANK left out."""

    down: Tensor
    up: Tensor

    @property
    def delta(self) -> Tensor:
        return self.up @ self.down


Changes = dict[str, Change]


def random_changes(network: nn.Module) -> Changes:
    """A change of every linear layer, about as large as its weight."""
    generator = torch.Generator().manual_seed(5)
    changes = {}
    for name, layer in network.named_modules():
        if isinstance(layer, Linear):
            down = torch.randn(RANK, layer.in_features, generator=generator) / layer.in_features**0.5
            changes[name] = Change(down, torch.randn(layer.out_features, RANK, generator=generator) * 0.3)
    return changes


def diffusers_parts(module: str, up: Tensor) -> list[tuple[str, Tensor]]:
    """(diffusers name, its rows of `up`)."""
    if module in TOP:
        shift, scale = up.chunk(2)
        return [(TOP[module], torch.cat([scale, shift]) if "adaLN" in module else up)]
    kind, i, layer = module.split(".", 2)
    theirs = (DOUBLE if kind == "double_blocks" else SINGLE)[layer]
    folder = "transformer_blocks" if kind == "double_blocks" else "single_transformer_blocks"
    widths = [up.shape[0]] if len(theirs) == 1 else [E, E, E, 4 * E][: len(theirs)]
    return [(f"{folder}.{i}.{n}", rows) for n, rows in zip(theirs, up.split(widths), strict=True)]


def flat(name: str) -> str:
    return name.replace(".", "_")


def peft(name: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    """Without alphas: the scale is in the up matrix."""
    return {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up * ALPHA / RANK}


def kohya(name: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    return {**tensors, f"{name}.alpha": torch.tensor(ALPHA)}


def diffusers_file(changes: Changes, style: Callable[[str], str], pair=kohya) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for module, change in changes.items():
        for name, rows in diffusers_parts(module, change.up):
            tensors |= pair(style(name), change.down, rows)
    return tensors


def own_file(changes: Changes, style: Callable[[str], str], pair=kohya) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for module, change in changes.items():
        tensors |= pair(style(module), change.down, change.up)
    return tensors


def numbered_file(changes: Changes) -> dict[str, Tensor]:
    """OneTrainer's newer names: ours, with the parts of a fused layer numbered."""
    tensors: dict[str, Tensor] = {}
    for module, change in changes.items():
        rows = [rows for _, rows in diffusers_parts(module, change.up)]
        for n, up in enumerate(rows if len(rows) > 1 else [change.up]):
            tensors |= kohya(
                f"transformer.{module}.{n}" if len(rows) > 1 else f"transformer.{module}", change.down, up
            )
    return tensors


def xlabs_changes(changes: Changes) -> Changes:
    """What the format can say: attention projections only."""
    kept = {}
    for module, change in changes.items():
        layer = module.split(".", 2)[-1]
        if module not in TOP and layer in XLABS:
            rows = torch.arange(len(change.up)) < (3 * E if layer == "linear1" else len(change.up))
            kept[module] = Change(change.down, change.up * rows[:, None])
    return kept


def xlabs_file(changes: Changes) -> dict[str, Tensor]:
    tensors = {}
    for module, change in changes.items():
        kind, i, layer = module.split(".", 2)
        name = f"{kind}.{i}.{XLABS[layer]}"
        up = change.up[: 3 * E] if layer == "linear1" else change.up
        tensors[f"{name}.down.weight"], tensors[f"{name}.up.weight"] = change.down, up * ALPHA / RANK
    return tensors


FAMILIES: dict[str, Callable[[Changes], dict[str, Tensor]]] = {
    "diffusers": lambda c: diffusers_file(c, "transformer.{}".format, peft),
    "peft": lambda c: diffusers_file(c, "base_model.model.{}".format, peft),
    "kohya": lambda c: own_file(c, lambda n: f"lora_unet_{flat(n)}"),
    "bfl": lambda c: own_file(c, "diffusion_model.{}".format, peft),
    "bare": lambda c: own_file(c, str, peft),
    "lycoris": lambda c: diffusers_file(c, lambda n: f"lycoris_{flat(n)}"),
    "onetrainer": lambda c: diffusers_file(c, lambda n: f"lora_transformer_{flat(n)}"),
    "onetrainer, numbered": numbered_file,
    "xlabs": lambda c: xlabs_file(xlabs_changes(c)),
}


@pytest.fixture(scope="module")
def network() -> MMDiT:
    return tiny_mmdit()


@pytest.fixture(scope="module")
def changes(network) -> Changes:
    return random_changes(network)


def predict(network: MMDiT, grounded: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    grid = LatentGrid(height_px=48, width_px=32)
    ids = rope_table(position_ids(grid, 5), MMDIT.axes_dim, MMDIT.theta)
    shapes = ((2, grid.num_tokens, MMDIT.in_channels), (2, 5, MMDIT.txt_dim), (2, MMDIT.pooled_dim))
    img, txt, pooled = (torch.randn(s, generator=generator).to(network.dtype) for s in shapes)
    spec = Grounded(pivot_of=(0, 0)) if grounded else None
    sigma, guidance = torch.tensor([0.5, 0.75]), torch.tensor([3.0, 2.0])
    return network(img, txt, pooled, sigma, guidance, ids, spec, BokehCondition.of([4.0, 20.0])).float()


def with_deltas(network: nn.Module, changes: Changes, strength: float = 1.0) -> nn.Module:
    changed = copy.deepcopy(network)
    for name, change in changes.items():
        changed.get_submodule(name).weight.data += strength * ALPHA / RANK * change.delta
    return changed


def written(folder: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save(folder / "lora.safetensors", tensors, metadata)
    return folder / "lora.safetensors"


def read(path: Path) -> Lora:
    return read_lora(path, {"transformer": MMDIT, "clip": CLIP, "t5": T5})


def assert_close(x: Tensor, y: Tensor, tolerance: float = 1e-5) -> None:
    error = ((x - y).norm() / y.norm()).item()
    assert x.shape == y.shape and error < tolerance, f"relative error {error:.2e}"


def assert_same_bits(x: nn.Module, y: nn.Module) -> None:
    theirs = y.state_dict()
    for name, tensor in x.state_dict().items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)), name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_the_dense_change(network, changes, family, tmp_path):
    lora = read(written(tmp_path, FAMILIES[family](changes)))
    expected = with_deltas(network, xlabs_changes(changes) if family == "xlabs" else changes, 0.7)
    ours = copy.deepcopy(network)
    attach({"transformer": ours}, lora, 0.7)
    for grounded in (False, True):  # grounding computes columns of the fused layers apart
        assert_close(predict(ours, grounded), predict(expected, grounded))
    effect = (predict(network) - predict(expected)).norm() / predict(network).norm()
    assert effect > 0.05, "far above the tolerance, or nothing was tested"
    detach({"transformer": ours})
    assert torch.equal(predict(ours), predict(network))
    merged = merge({"transformer": ours}, lora, 0.7)
    assert_close(predict(ours), predict(expected))
    merged.unmerge()
    assert_same_bits(ours, network)


def test_every_layer_has_its_place(network, changes, tmp_path):
    whole = read(written(tmp_path, FAMILIES["kohya"](changes))).terms["transformer"]
    assert set(whole) == {name for name, m in network.named_modules() if isinstance(m, Linear)}
    parts = read(written(tmp_path, FAMILIES["diffusers"](changes))).terms["transformer"]
    spans = sorted((t.first, t.first + len(t.up)) for t in parts["single_blocks.2.linear1"])
    assert spans == [(0, E), (E, 2 * E), (2 * E, 3 * E), (3 * E, 7 * E)]
    assert {len(terms) for terms in whole.values()} == {1}


@pytest.mark.parametrize("config", [MMDIT, FLUX_DEV], ids=["tiny", "dev"])
def test_names_with_underscores_are_unambiguous(config):
    places = places_of("transformer", config)
    dotted = [name for name in places if "." in name]
    assert len(dotted) > 100
    assert all(places[name] == places[flat(name)] for name in dotted)
    assert len({flat(name) for name in dotted}) == len(dotted)


CLIP_STYLES = {
    "kohya": lambda n: f"lora_te1_{flat(n)}",
    "kohya, SD 1": lambda n: f"lora_te_{flat(n)}",
    "diffusers": "text_encoder.{}".format,
    "ComfyUI": "text_encoders.clip_l.transformer.{}".format,
}
T5_STYLES = {
    "OneTrainer": lambda n: f"lora_te2_{flat(n)}",
    "kohya": lambda n: f"lora_te3_{flat(n)}",
    "diffusers": "text_encoder_2.{}".format,
    "ComfyUI": "text_encoders.t5xxl.transformer.{}".format,
}


@pytest.mark.parametrize(
    "part, style", [*(("clip", s) for s in CLIP_STYLES), *(("t5", s) for s in T5_STYLES)]
)
def test_text_encoders(part, style, tmp_path):
    encoder = (CLIPTextEncoder(CLIP) if part == "clip" else T5Encoder(T5)).eval().requires_grad_(False)
    for p in encoder.parameters():
        p.normal_(std=0.5)
    changes = random_changes(encoder)
    assert len(changes) == (12 if part == "clip" else 14)
    spelled = (CLIP_STYLES if part == "clip" else T5_STYLES)[style]
    lora = read(written(tmp_path, own_file(changes, spelled, peft if style == "diffusers" else kohya)))
    assert set(lora.terms) == {part}
    expected, ids = with_deltas(encoder, changes), torch.tensor([[3, 9, 4, 10, 0]])
    before = encoder(ids)
    networks = {"transformer": nn.Identity(), "clip": nn.Identity(), part: encoder}
    attach(networks, lora)
    assert_close(encoder(ids), expected(ids))
    assert (encoder(ids) - before).norm() > 0.05 * before.norm()
    with pytest.raises(ValueError, match=f"changes {part}, but only transformer were given"):
        attach({"transformer": nn.Identity()}, lora)


def test_diffusers_name_of_the_text_encoder_matrices(tmp_path):
    name = "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer"
    tensors = {f"{name}.down.weight": torch.ones(2, 8), f"{name}.up.weight": torch.ones(6, 2)}
    assert list(read(written(tmp_path, tensors)).terms["clip"]) == ["text_model.encoder.layers.0.mlp.fc1"]


# Scale


PAIR = {
    "transformer.x_embedder.lora_A.weight": torch.ones(4, 64),
    "transformer.x_embedder.lora_B.weight": torch.ones(E, 4),
}
KOHYA_PAIR = {
    "lora_unet_img_in.lora_down.weight": torch.ones(4, 64),
    "lora_unet_img_in.lora_up.weight": torch.ones(E, 4),
}


def declared(**settings: object) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in settings.items()})}


@pytest.mark.parametrize(
    "tensors, metadata, scale",
    [
        (PAIR, {}, 1.0),
        (PAIR, declared(r=4, lora_alpha=2), 0.5),
        (PAIR, declared(lora_alpha=2, use_rslora=True), 1.0),
        (PAIR, declared(lora_alpha=2, alpha_pattern={"x_embedder": 12}), 3.0),
        (PAIR, declared(lora_alpha=2, alpha_pattern={"x_embedder": 12}, use_rslora=True), 6.0),
        (PAIR, {"lora_adapter_metadata": json.dumps({"text_encoder.lora_alpha": 2})}, 1.0),
        (KOHYA_PAIR, {"ss_network_alpha": "8.0"}, 2.0),
        (KOHYA_PAIR, {"ss_network_alpha": "None"}, 1.0),
        (KOHYA_PAIR | {"lora_unet_img_in.alpha": torch.tensor(1.0)}, {"ss_network_alpha": "8"}, 0.25),
        (KOHYA_PAIR | {"lora_unet_img_in.alpha": torch.tensor([3], dtype=torch.int64)}, {}, 0.75),
        (PAIR | {"transformer.x_embedder.alpha": torch.tensor(6.0)}, declared(lora_alpha=2), 1.5),
    ],
)
def test_alpha(tensors, metadata, scale, tmp_path):
    (term,) = read(written(tmp_path, tensors, metadata)).terms["transformer"]["img_in"]
    assert term.strength == scale


def test_alpha_of_a_peft_folder(tmp_path):
    pair = {k.replace("transformer.", "base_model.model."): t for k, t in PAIR.items()}
    save(tmp_path / "adapter_model.safetensors", pair)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 32}))
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        assert read(path).terms["transformer"]["img_in"][0].strength == 8.0


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({"lora_adapter_metadata": "{"}, "lora_adapter_metadata is not JSON"),
        ({"lora_adapter_metadata": "[" * 99999}, "lora_adapter_metadata is not JSON"),
        ({"lora_adapter_metadata": "[]"}, "not a JSON object"),
        (declared(lora_alpha="much"), "lora_alpha is 'much', a finite number was expected"),
        (declared(lora_alpha=None), "lora_alpha is None"),
        (declared(lora_alpha=10**400), "a finite number was expected"),
        (declared(alpha_pattern=[1]), "alpha_pattern is not a JSON object"),
        (
            declared(alpha_pattern={"proj_out": 2}),
            "alpha_pattern names layers that the file does not have: .'proj_out'.",
        ),
        (declared(use_dora=True, lora_alpha=4), "settings declare DoRA"),
        ({"ss_network_alpha": "Dynamic"}, "ss_network_alpha is 'Dynamic'"),
    ],
)
def test_bad_alpha(metadata, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        read(written(tmp_path, PAIR, metadata))


# What is refused


@pytest.mark.parametrize(
    "name, kind",
    [
        ("lycoris_transformer_blocks_0_attn_to_q.lokr_w1", "LoKr"),
        ("lycoris_transformer_blocks_0_attn_to_q.lokr_w2_a", "LoKr"),
        ("lora_unet_img_in.hada_w1_a", "LoHa"),
        ("lora_unet_img_in.dora_scale", "DoRA"),
        ("transformer.x_embedder.lora_magnitude_vector.weight", "DoRA"),
        ("transformer.x_embedder.oft_R.default.weight", "OFT"),
        ("lora_unet_img_in.a1.weight", "GLoRA"),
        ("lora_unet_img_in.lora_mid.weight", "middle matrix"),
        ("img_in.lora_B.bias", "biases"),
        ("diffusion_model.img_in.diff", "full difference"),
        ("diffusion_model.img_in.diff_b", "full difference"),
    ],
)
def test_other_kinds_are_named(name, kind, tmp_path):
    with pytest.raises(CheckpointError, match=f"{kind} .1 tensors such as {re.escape(name)}") as caught:
        read(written(tmp_path, PAIR | {name: torch.ones(2, 2)}))
    assert len(caught.value.problems) == 1


def test_every_unmatched_name_is_listed(changes, tmp_path):
    tensors = FAMILIES["kohya"](changes) | kohya(
        "lora_unet_down_blocks_1_attn", torch.ones(2, 4), torch.ones(4, 2)
    )
    tensors |= peft("transformer.transformer_blocks.2.attn.to_q", torch.ones(2, E), torch.ones(E, 2))
    tensors |= peft("transformer.transformer_blocks.3.attn.to_q", torch.ones(2, E), torch.ones(E, 2))
    with pytest.raises(CheckpointError) as caught:
        read(written(tmp_path, tensors))
    assert caught.value.problems == (
        "no such layer in this model: lora_unet_down_blocks_1_attn",
        "no such layer in this model: transformer.transformer_blocks.{2-3}.attn.to_q",
    )


A, B = "transformer.x_embedder.lora_A.weight", "transformer.x_embedder.lora_B.weight"


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({A: PAIR[A]}, "x_embedder: lacks its up matrix"),
        ({"lora_unet_img_in.alpha": torch.ones(())}, "img_in: lacks its down and up matrix"),
        (PAIR | {A: torch.ones(3, 64)}, r"down \[3, 64\] and up \[32, 4\] are not \[rank, in\]"),
        (PAIR | {A: torch.ones(4, 65)}, r"changes a layer of \[32, 65\], the model's is \[32, 64\]"),
        (PAIR | {B: torch.ones(E + 1, 4)}, r"changes a layer of \[33, 64\]"),
        ({A: torch.ones(0, 64), B: torch.ones(E, 0)}, "are no"),
        (PAIR | {A: torch.ones(4, 64, 1, 1)}, "are no"),
        (PAIR | {A: torch.ones(4, 64, dtype=torch.int8)}, "int8.*floating point was expected"),
        (PAIR | {"transformer.x_embedder.alpha": torch.ones(2)}, r"alpha has the shape \[2\]"),
        (PAIR | {"transformer.x_embedder.alpha": torch.tensor(torch.nan)}, "alpha is nan"),
        (PAIR | {A: PAIR[A] * torch.inf}, "x_embedder: holds values that are not finite"),
        (PAIR | KOHYA_PAIR, "changes the same rows as"),
        (PAIR | {"transformer.x_embedder.lora_down.weight": PAIR[A]}, "are the same matrix of one layer"),
        (PAIR | {"transformer.x_embedder.magic": PAIR[A]}, "neither a down nor an up .*x_embedder.magic"),
        ({"a": torch.ones(1)}, "is not a LoRA: expected names such as .* found a"),
        ({}, "is not a LoRA"),
        (PAIR | {"embedding_layer.0.weight": torch.ones(1)}, "a bokeh adapter: pass it as the adapter"),
        ({"final_layer.adaLN_modulation.1.weight": torch.ones(1)}, "whole transformer: pass it as the model"),
        ({".lora_A.weight": PAIR[A], ".lora_B.weight": PAIR[B]}, "is not a LoRA"),
    ],
)
def test_what_does_not_fit(tensors, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        read(written(tmp_path, tensors))


def test_fused_and_split_rows_may_not_overlap(tmp_path):
    tensors = peft("double_blocks.0.img_attn.qkv", torch.ones(2, E), torch.ones(3 * E, 2))
    tensors |= peft("transformer.transformer_blocks.0.attn.to_k", torch.ones(2, E), torch.ones(E, 2))
    with pytest.raises(CheckpointError, match="changes the same rows as"):
        read(written(tmp_path, tensors))


# Attached and merged


@pytest.fixture(scope="module")
def two(changes, tmp_path_factory) -> tuple[Lora, Lora]:
    """The whole network, and the attention layers."""
    folder = tmp_path_factory.mktemp("two")
    first = read(written(folder, FAMILIES["kohya"](changes)))
    return first, read(written(folder, FAMILIES["xlabs"](changes)))


def test_several_add_up(network, changes, two):
    expected = with_deltas(with_deltas(network, changes, 0.6), xlabs_changes(changes), -0.3)
    attached, merged = copy.deepcopy(network), copy.deepcopy(network)
    for lora, strength in zip(two, (0.6, -0.3), strict=True):
        attach({"transformer": attached}, lora, strength)
        merge({"transformer": merged}, lora, strength)
    assert_close(predict(attached), predict(expected))
    assert_close(predict(merged), predict(expected))


def test_strength_zero_changes_no_bit(network, two):
    ours = copy.deepcopy(network)
    ours.img_in.weight[0, 0] = -0.0
    before = copy.deepcopy(ours)
    attach({"transformer": ours}, two[0], 0.0)
    assert not any(m.terms for m in ours.modules() if isinstance(m, Linear))
    merged = merge({"transformer": ours}, two[0], 0)
    assert_same_bits(ours, before)
    assert merged.num_bytes == 0
    merged.unmerge()


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
@pytest.mark.parametrize("apply", [attach, merge])
def test_strength_is_finite(network, two, apply, strength):
    with pytest.raises(ValueError, match="must be a finite number, got"):
        apply({"transformer": network}, two[0], strength)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_merge_rounds_once_and_unmerge_is_exact(network, changes, two, dtype):
    original = copy.deepcopy(network).to(dtype)
    ours = copy.deepcopy(original)
    addresses = {name: p.data_ptr() for name, p in ours.named_parameters()}
    merged = merge({"transformer": ours}, two[0], 0.9)
    assert merged.num_bytes == sum(ours.get_submodule(name).weight.nbytes for name in changes)
    wide = torch.promote_types(dtype, torch.float32)
    for name, change in changes.items():
        delta = 0.9 * (ALPHA / RANK) * (change.up.to(wide) @ change.down.to(wide))
        exact = (original.get_submodule(name).weight.to(wide) + delta).to(dtype)
        assert torch.equal(ours.get_submodule(name).weight, exact), name
    merged.unmerge()
    assert_same_bits(ours, original)
    assert addresses == {name: p.data_ptr() for name, p in ours.named_parameters()}
    with pytest.raises(ValueError, match="was unmerged already"):
        merged.unmerge()


def test_low_precision_is_as_good_as_dense_weights(network, changes, two):
    expected = with_deltas(network, changes)
    exact, dense = predict(expected), predict(copy.deepcopy(expected).to(torch.bfloat16))
    attached, merged = (copy.deepcopy(network).to(torch.bfloat16) for _ in range(2))
    attach({"transformer": attached}, two[0])
    merge({"transformer": merged}, two[0])
    assert_within_2x(predict(attached), dense, exact)
    assert_within_2x(predict(merged), dense, exact)


def test_the_last_merge_is_undone_first(network, two):
    ours = copy.deepcopy(network)
    first = merge({"transformer": ours}, two[0])
    between = copy.deepcopy(ours)
    second = merge({"transformer": ours}, two[1])
    both = copy.deepcopy(ours)
    with pytest.raises(
        ValueError, match=r"\d+ weights such as transformer .* changed after this LoRA was merged"
    ):
        first.unmerge()
    assert_same_bits(ours, both)
    second.unmerge()
    assert_same_bits(ours, between)
    first.unmerge()
    assert_same_bits(ours, network)


def test_unmerge_notices_another_dtype(network, two):
    ours = copy.deepcopy(network)
    merged = merge({"transformer": ours}, two[0])
    ours.to(torch.bfloat16)
    with pytest.raises(ValueError, match="another dtype"):
        merged.unmerge()


def narrowed(network: MMDiT) -> tuple[MMDiT, MMDiT]:
    """Linear weights of the blocks in fp8, and the same values dense."""
    narrow, dense = copy.deepcopy(network), copy.deepcopy(network)
    for name, layer in network.named_modules():
        if isinstance(layer, Linear) and "blocks" in name:
            narrow.get_submodule(name).weight.data = layer.weight.to(torch.float8_e4m3fn)
            dense.get_submodule(name).weight.data = layer.weight.to(torch.float8_e4m3fn).float()
    return narrow, dense


def test_quantised_weights_take_it_attached_only(network, changes, two):
    narrow, dense = narrowed(network)
    before = copy.deepcopy(narrow)
    with pytest.raises(
        ValueError, match=r"32 of the 42 weights .* are stored quantised .* attach it instead"
    ):
        merge({"transformer": narrow}, two[0])
    assert_same_bits(narrow, before)
    attach({"transformer": narrow}, two[0], 0.8)
    assert_close(predict(narrow), predict(with_deltas(dense, changes, 0.8)))


def test_an_interrupted_merge_leaves_nothing(network, two, monkeypatch):
    ours, calls = copy.deepcopy(network), []
    monkeypatch.setattr(lora_apply, "_fingerprint", lambda w: calls.append(w) if len(calls) < 9 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        merge({"transformer": ours}, two[0])
    assert len(calls) == 9
    assert_same_bits(ours, network)


def test_a_lora_for_another_model_changes_nothing(network, two):
    other = MMDiT(dataclasses.replace(MMDIT, num_single=1))
    before = copy.deepcopy(other)
    for apply in (attach, merge):
        with pytest.raises(ValueError, match="read for another model: transformer single_blocks.1"):
            apply({"transformer": other}, two[0])
    assert_same_bits(other, before)
    assert not any(m.terms for m in other.modules() if isinstance(m, Linear))


@pytest.mark.parametrize("apply", [attach, merge])
def test_folded_weights_are_refused(network, two, apply):
    """The adapter multiplies what the LoRA adds, so the order matters; the other way round it works."""
    ours = copy.deepcopy(network)
    folded = fold_adapter(ours)
    before = copy.deepcopy(ours)
    with pytest.raises(ValueError, match="the bokeh adapter is folded into these weights; undo that first"):
        apply({"transformer": ours}, two[0])
    assert_same_bits(ours, before)
    folded.undo()
    merged = merge({"transformer": ours}, two[0])
    expected = predict(ours)
    folded = fold_adapter(ours)
    assert_close(predict(ours), expected, 1e-4)
    with pytest.raises(ValueError, match="changed after this LoRA was merged"):
        merged.unmerge()
    folded.undo()
    merged.unmerge()
    assert_same_bits(ours, network)


def test_the_file_may_vanish(network, two, changes, tmp_path):
    path = written(tmp_path, FAMILIES["bfl"](changes))
    lora = read(path)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    ours = copy.deepcopy(network)
    attach({"transformer": ours}, lora)
    assert_close(predict(ours), predict(with_deltas(network, changes)))


# Anything at all


@st.composite
def part_files(draw: st.DrawFn) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, str]]:
    """Any parts of any layers, each of its own rank and alpha: (tensors, dense changes, metadata)."""
    network = tiny_mmdit(None)
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    linears = {n: m for n, m in network.named_modules() if isinstance(m, Linear)}
    chosen = draw(st.lists(st.sampled_from(sorted(linears)), min_size=1, max_size=6, unique=True))
    style = draw(st.sampled_from(["transformer.{}", "lora_transformer_{}", "lycoris_{}", "lora_unet_{}"]))
    declared_alpha = draw(st.sampled_from([None, 0.5, 16]))
    tensors: dict[str, Tensor] = {}
    deltas: dict[str, Tensor] = {}
    for module in chosen:
        layer = linears[module]
        rows_of = diffusers_parts(module, torch.arange(layer.out_features)[:, None])
        picked = draw(st.lists(st.sampled_from(rows_of), min_size=1, unique_by=lambda part: part[0]))
        deltas[module] = torch.zeros(layer.out_features, layer.in_features)
        for name, rows in picked:
            rank = draw(st.integers(1, 5))
            alpha = draw(st.sampled_from([None, 0.0, 0.25, 1.0, 8.0]))
            down = torch.randn(rank, layer.in_features, generator=generator)
            up = torch.randn(len(rows), rank, generator=generator)
            stem = style.format(name if style.endswith(".{}") else flat(name))
            tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
            if alpha is not None:
                tensors[f"{stem}.alpha"] = torch.tensor(alpha)
            else:
                alpha = rank if declared_alpha is None else declared_alpha
            deltas[module][rows[:, 0]] += alpha / rank * (up @ down)
    return tensors, deltas, {} if declared_alpha is None else {"ss_network_alpha": str(declared_alpha)}


@settings(max_examples=60)
@given(part_files())
def test_any_parts_ranks_and_alphas(tmp_path_factory, file):
    tensors, deltas, metadata = file
    lora = read(written(tmp_path_factory.mktemp("parts"), tensors, metadata))
    assert set(lora.terms["transformer"]) == set(deltas)
    for module, expected in deltas.items():
        ours = torch.zeros_like(expected)
        for t in lora.terms["transformer"][module]:
            ours[t.first : t.first + len(t.up)] += t.strength * (t.up @ t.down)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


WORDS = [
    *(prefix for prefix, _ in PREFIXES), *(end for end, _ in names.ROLES),
    ".", "_", "0", "99999999999999999999", "weight", "lokr_w1", "é\u0000", "{i}",
    "double_blocks", "img_attn.qkv", "attn.to_q", "transformer_blocks_0_attn_to_q", "single_blocks.1.linear1",
    "processor.qkv_lora1", "x_embedder", "text_model.encoder.layers.0.mlp.fc1",
]  # fmt: skip


@settings(max_examples=150)
@given(
    st.lists(
        st.tuples(st.lists(st.sampled_from(WORDS), max_size=6).map("".join) | st.text(max_size=8),
                  st.lists(st.integers(0, 3), max_size=3)),
        max_size=6,
    ),
    st.dictionaries(
        st.sampled_from(["ss_network_alpha", "lora_adapter_metadata"]),
        st.text(max_size=6) | st.recursive(
            st.none() | st.booleans() | st.floats() | st.text(max_size=3),
            lambda inner: st.dictionaries(
                st.sampled_from(["transformer." + k for k in ("lora_alpha", "alpha_pattern", "use_dora")]),
                inner, max_size=3,
            ), max_leaves=4,
        ).map(json.dumps),
    ),
)  # fmt: skip
def test_any_names_load_or_are_refused_in_words(tmp_path_factory, entries, metadata):
    tensors = {name: torch.ones(shape) for name, shape in entries if name != "__metadata__"}
    path = written(tmp_path_factory.mktemp("fuzz"), tensors, metadata)
    try:
        lora = read(path)
    except CheckpointError as error:
        assert error.problems and all(problem.strip() for problem in error.problems)
    else:
        assert sum(len(terms) for modules in lora.terms.values() for terms in modules.values())


# Through the loaders


def golden_lora(folder: Path) -> Path:
    """A LoRA for the golden model, on one layer of each network."""
    parts = load_components(shared("golden/snapshot"), dtype=torch.float32)
    clip, t5 = "text_model.encoder.layers.0.mlp.fc1", "encoder.block.0.layer.0.SelfAttention.q"
    layers = {
        "transformer.proj_out": parts.transformer.final_layer.linear,
        f"text_encoder.{clip}": parts.text.clip.get_submodule(clip),
        f"text_encoder_2.{t5}": parts.text.t5.get_submodule(t5),
    }
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors |= peft(name, torch.randn(2, layer.in_features), torch.randn(layer.out_features, 2))
    return written(folder, tensors)


@needs_shared
def test_load_attaches_to_all_networks(tmp_path):
    path = golden_lora(tmp_path)
    parts = load_components(shared("golden/snapshot"), loras=[(path, 0.5), (path, 0.25)], dtype=torch.float32)
    for network in (parts.transformer, parts.text.clip, parts.text.t5):
        terms = [m.terms for m in network.modules() if isinstance(m, Linear) and m.terms]
        assert [[t.strength for t in layer] for layer in terms] == [[0.5, 0.25]]


@needs_shared
def test_a_wrong_lora_is_refused_before_the_transformer_is_read(tmp_path, monkeypatch):
    from bokehflux.weights import load

    monkeypatch.setattr(load, "load_transformer", lambda *a, **k: pytest.fail("read"))
    with pytest.raises(CheckpointError, match="no such layer"):
        bokehflux.load(
            shared("golden/snapshot"),
            loras=[(written(tmp_path, peft("transformer.x", torch.ones(1, 1), torch.ones(1, 1))), 1.0)],
        )


@needs_shared
def test_the_document(tmp_path, monkeypatch):
    """Its programs, on the golden model."""
    golden_lora(tmp_path).rename(tmp_path / "style.safetensors")
    golden_lora(tmp_path).rename(tmp_path / "detail.safetensors")
    (tmp_path / "FLUX.1-dev").symlink_to(shared("golden/snapshot"))
    monkeypatch.chdir(tmp_path)
    programs = re.findall(
        r"^```python\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    assert len(programs) == 2
    namespace: dict = {"__name__": "__main__"}
    for program in programs:
        exec(compile(program, DOCUMENT.name, "exec", dont_inherit=True), namespace)
    assert namespace["with_style"] != namespace["plain"] == namespace["again"]
    assert (tmp_path / "styled.png").is_file()
