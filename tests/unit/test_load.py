"""Networks from files: configs, every layout, exports that load back, folders, and what goes wrong."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import bokehflux
from bokehflux.app import cli
from bokehflux.configs import (
    CLIP_L,
    FLUX_BOKEH,
    FLUX_DEV,
    FLUX_SCHEDULE,
    FLUX_SCHNELL,
    FLUX_VAE,
    SCHNELL_SCHEDULE,
    T5_XXL,
    BokehConfig,
    CLIPConfig,
    Defaults,
    MMDiTConfig,
    ScheduleConfig,
    T5Config,
    VAEConfig,
)
from bokehflux.models.adapter import BokehAdapter
from bokehflux.models.clip import CLIPTextEncoder
from bokehflux.models.mmdit import MMDiT
from bokehflux.models.t5 import T5Encoder
from bokehflux.models.vae import AutoencoderKL
from bokehflux.weights import load, manifests, networks
from bokehflux.weights import save as export
from bokehflux.weights.codec import Shapes
from bokehflux.weights.files import checkpoint, write
from bokehflux.weights.files.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from bokehflux.weights.find import resolve
from bokehflux.weights.find.snapshot import CARD, default_card, open_snapshot
from bokehflux.weights.mapping import to_official
from bokehflux.weights.tables import adapter as adapter_table
from bokehflux.weights.tables import clip, flux, scheduler, t5, vae
from tests import model_files as files
from tests.helpers import needs_shared, shared

MMDIT = MMDiTConfig(
    in_channels=64, txt_dim=8, pooled_dim=4, hidden_size=12, num_heads=2, num_double=2, num_single=2,
    axes_dim=(2, 2, 2), guidance_embed=True,
)  # fmt: skip
BOKEH = BokehConfig(
    blocks=(1, 3),
    rank=2,
    hidden_dim=3,
    context_dim=5,
    alpha=4.0,
    adapt_k=False,
    lora_scale=0.5,
    bokeh_scale=1.2,
)
VAE = VAEConfig(
    channels=(32, 64), layers_per_block=1, latent_channels=16, norm_groups=32, scale=0.3611, shift=0.1159
)
T5 = T5Config(vocab_size=11, width=8, head_dim=4, mlp_size=6, num_layers=2, num_heads=2, num_buckets=8)
CLIP = CLIPConfig(vocab_size=11, width=4, mlp_size=6, num_layers=2, num_heads=2, max_length=9)
F32 = {"dtype": torch.float32}


def random_state(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: torch.randn(t.shape) for name, t in network.state_dict().items()}


def write_snapshot(root: Path, mmdit: MMDiTConfig = MMDIT, card: Defaults | None = None) -> dict[str, dict]:
    """A whole model folder in the official layout; returns the state of each part."""
    states = {
        "transformer": random_state(MMDiT(mmdit)),
        "vae": random_state(AutoencoderKL(VAE)),
        "text_encoder": random_state(CLIPTextEncoder(CLIP)),
        "text_encoder_2": random_state(T5Encoder(T5)),
        "adapter": random_state(BokehAdapter(BOKEH, mmdit)),
    }
    export.save_network(networks.TRANSFORMER, root / "transformer", mmdit, states["transformer"])
    export.save_network(networks.VAE, root / "vae", VAE, states["vae"])
    export.save_network(networks.CLIP, root / "text_encoder", CLIP, states["text_encoder"])
    export.save_network(networks.T5, root / "text_encoder_2", T5, states["text_encoder_2"])
    export.save_network(networks.adapter_for(mmdit), root / "adapter", BOKEH, states["adapter"])
    export.save_schedule(root / "scheduler", FLUX_SCHEDULE)
    for name in ("tokenizer", "tokenizer_2"):
        (root / name).mkdir()
    export.save_index(root, card or default_card(mmdit.guidance_embed), "adapter")
    return states


def check_loaded(network: torch.nn.Module, expected: dict[str, torch.Tensor]) -> None:
    state = network.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor.to(state[name].dtype)), name
    assert not network.training
    assert not any(p.requires_grad or p.is_meta for p in network.parameters())


def problems(call, *args, **kwargs) -> str:
    with pytest.raises(CheckpointError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


# --- configs


@pytest.mark.parametrize(
    ("read", "write_back", "config"),
    [
        (flux.CONFIG.from_json, flux.CONFIG.to_json, FLUX_DEV),
        (flux.CONFIG.from_json, flux.CONFIG.to_json, FLUX_SCHNELL),
        (flux.CONFIG.from_json, flux.CONFIG.to_json, MMDIT),
        (vae.CONFIG.from_json, vae.CONFIG.to_json, FLUX_VAE),
        (vae.CONFIG.from_json, vae.CONFIG.to_json, VAE),
        (t5.CONFIG.from_json, t5.CONFIG.to_json, T5_XXL),
        (t5.CONFIG.from_json, t5.CONFIG.to_json, T5),
        (clip.CONFIG.from_json, clip.CONFIG.to_json, CLIP_L),
        (clip.CONFIG.from_json, clip.CONFIG.to_json, dataclasses.replace(CLIP, eos_token_id=7)),
        (scheduler.CONFIG.from_json, scheduler.CONFIG.to_json, FLUX_SCHEDULE),
        (scheduler.CONFIG.from_json, scheduler.CONFIG.to_json, SCHNELL_SCHEDULE),
    ],
)
def test_configs_survive_a_round_trip(read, write_back, config):
    assert read(json.loads(json.dumps(write_back(config)))) == config


# What the makers' files say, written out by hand: a name of ours would survive every round trip.
NAMED = [
    (
        flux.CONFIG.from_json,
        {
            "in_channels": 32, "joint_attention_dim": 8, "pooled_projection_dim": 4, "attention_head_dim": 6,
            "num_attention_heads": 2, "num_layers": 3, "num_single_layers": 5, "axes_dims_rope": [2, 2, 2],
            "guidance_embeds": True,
        },
        MMDiTConfig(
            in_channels=32, txt_dim=8, pooled_dim=4, hidden_size=12, num_heads=2, num_double=3, num_single=5,
            axes_dim=(2, 2, 2), guidance_embed=True,
        ),
    ),
    (
        vae.CONFIG.from_json,
        {
            "_class_name": "AutoencoderKL", "block_out_channels": [16, 24], "layers_per_block": 3,
            "latent_channels": 12, "norm_num_groups": 8, "scaling_factor": 0.7, "shift_factor": -0.2,
            "use_quant_conv": False, "use_post_quant_conv": False,
        },
        VAEConfig(
            channels=(16, 24), layers_per_block=3, latent_channels=12, norm_groups=8, scale=0.7, shift=-0.2
        ),
    ),
    (
        t5.CONFIG.from_json,
        {
            "vocab_size": 11, "d_model": 8, "d_kv": 3, "d_ff": 6, "num_layers": 5, "num_heads": 2,
            "relative_attention_num_buckets": 16, "relative_attention_max_distance": 60,
            "layer_norm_epsilon": 1e-4, "feed_forward_proj": "gated-gelu",
        },
        T5Config(
            vocab_size=11, width=8, head_dim=3, mlp_size=6, num_layers=5, num_heads=2, num_buckets=16,
            max_distance=60, eps=1e-4,
        ),
    ),
    (
        clip.CONFIG.from_json,
        {
            "vocab_size": 11, "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 5,
            "num_attention_heads": 2, "max_position_embeddings": 9, "eos_token_id": 7, "layer_norm_eps": 1e-4,
        },
        CLIPConfig(
            vocab_size=11, width=4, mlp_size=6, num_layers=5, num_heads=2, max_length=9, eos_token_id=7,
            eps=1e-4,
        ),
    ),
    (
        scheduler.CONFIG.from_json,
        {
            "use_dynamic_shifting": True, "shift": 2.0, "base_image_seq_len": 100, "max_image_seq_len": 900,
            "base_shift": 0.3, "max_shift": 1.4,
        },
        ScheduleConfig(
            dynamic=True, shift=2.0, base_tokens=100, max_tokens=900, base_shift=0.3, max_shift=1.4
        ),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("read", "named", "config"), NAMED, ids=[type(c).__name__ for *_, c in NAMED])
def test_every_field_by_its_makers_name(read, named, config):
    assert read(named) == config
    plain = {f.name: f.default for f in dataclasses.fields(config) if f.default is not dataclasses.MISSING}
    unnamed = {"mlp_ratio", "theta"}  # in every file
    assert {name for name, default in plain.items() if getattr(config, name) == default} <= unnamed


@needs_shared
def test_official_config_files_give_the_presets():
    root = shared("flux1-dev-snapshot")

    def read(path: str) -> dict:
        return json.loads((root / path).read_text())

    assert flux.CONFIG.from_json(read("transformer/config.json")) == FLUX_DEV
    assert vae.CONFIG.from_json(read("vae/config.json")) == FLUX_VAE
    assert t5.CONFIG.from_json(read("text_encoder_2/config.json")) == T5_XXL
    assert clip.CONFIG.from_json(read("text_encoder/config.json")) == CLIP_L
    assert scheduler.CONFIG.from_json(read("scheduler/scheduler_config.json")) == FLUX_SCHEDULE


def test_axes_default_to_flux():
    config = flux.CONFIG.to_json(FLUX_DEV)
    del config["axes_dims_rope"]
    assert flux.CONFIG.from_json(config) == FLUX_DEV


@pytest.mark.parametrize(
    ("read", "config", "change", "message"),
    [
        (flux.CONFIG.from_json, flux.CONFIG.to_json(MMDIT), {"patch_size": 2}, "patch_size = 2"),
        (flux.CONFIG.from_json, flux.CONFIG.to_json(MMDIT), {"out_channels": 3}, "out_channels = 3"),
        (flux.CONFIG.from_json, flux.CONFIG.to_json(MMDIT), {"num_layers": "19"}, "num_layers = '19'"),
        (
            flux.CONFIG.from_json,
            flux.CONFIG.to_json(MMDIT),
            {"_class_name": "SD3"},
            "_class_name = 'SD3'",
        ),
        (
            vae.CONFIG.from_json,
            vae.CONFIG.to_json(VAE),
            {"use_quant_conv": True},
            "use_quant_conv = True",
        ),
        (vae.CONFIG.from_json, vae.CONFIG.to_json(VAE), {"act_fn": "relu"}, "act_fn = 'relu'"),
        (
            vae.CONFIG.from_json,
            vae.CONFIG.to_json(VAE),
            {"up_block_types": ["X"]},
            "expected ['UpDecoderBlock2D', 'UpDecoderBlock2D']",
        ),
        (vae.CONFIG.from_json, vae.CONFIG.to_json(VAE), {"shift_factor": None}, "shift_factor = None"),
        (t5.CONFIG.from_json, t5.CONFIG.to_json(T5), {"feed_forward_proj": "relu"}, "feed_forward_proj"),
        (t5.CONFIG.from_json, t5.CONFIG.to_json(T5), {"is_gated_act": False}, "is_gated_act = False"),
        (
            clip.CONFIG.from_json,
            clip.CONFIG.to_json(CLIP),
            {"hidden_act": "gelu"},
            "hidden_act = 'gelu'",
        ),
        (scheduler.CONFIG.from_json, {}, {"use_karras_sigmas": True}, "use_karras_sigmas = True"),
        (scheduler.CONFIG.from_json, {}, {"shift_terminal": 0.1}, "shift_terminal = 0.1"),
    ],
)
def test_what_we_cannot_honour_is_refused(read, config, change, message):
    assert message in problems(read, config | change, "here/config.json")


def test_all_missing_keys_are_listed():
    message = problems(t5.CONFIG.from_json, {"d_ff": 3, "is_gated_act": True}, "text_encoder_2/config.json")
    assert message.startswith("text_encoder_2/config.json: 5 problems")
    for key in ("vocab_size", "d_model", "d_kv", "num_layers", "num_heads"):
        assert f"'{key}' is missing" in message


def test_schnell_and_dev_cards():
    assert default_card(True) == Defaults(num_inference_steps=30, height_px=512, width_px=512, txt_length=512)
    assert default_card(False) == Defaults(num_inference_steps=4, height_px=512, width_px=512, txt_length=256)


def test_diffusers_cannot_hold_another_mlp():
    with pytest.raises(ValueError, match="mlp_ratio 3"):
        flux.CONFIG.to_json(dataclasses.replace(MMDIT, mlp_ratio=3))


# --- adapter config


def adapter_shapes(config: BokehConfig = BOKEH, mmdit: MMDiTConfig = MMDIT) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {n: tuple(t.shape) for n, t in BokehAdapter(config, mmdit).state_dict().items()}


def adapter_config(config: dict | None, shapes: dict[str, tuple[int, ...]], host: MMDiTConfig) -> BokehConfig:
    codec = adapter_table.codec(host)
    return codec.from_both(config or {}, Shapes(shapes, codec.what, "adapter.safetensors"))


def test_published_adapter_files_give_their_configs():
    assert adapter_config(None, manifests.shapes("bokeh_adapter.all57-qk"), FLUX_DEV) == FLUX_BOKEH
    single = adapter_config(None, manifests.shapes("bokeh_adapter.single38-qk"), FLUX_DEV)
    assert single == BokehConfig(blocks=tuple(range(19, 57)), rank=128)


def test_adapter_config_round_trip():
    config = adapter_table.codec(MMDIT).to_json(BOKEH)
    assert adapter_config(config, adapter_shapes(), MMDIT) == BOKEH
    assert config["blocks"] == ["transformer_blocks.1", "single_transformer_blocks.1"]
    alone = adapter_config(None, adapter_shapes(), MMDIT)
    assert alone == dataclasses.replace(BOKEH, alpha=None, lora_scale=1.0, bokeh_scale=1.0)
    strengths = {"lora_alpha": 3.0, "lora_scale": 0.7, "bokeh_scale": 1.3}
    asked = adapter_config(strengths, adapter_shapes(), MMDIT)
    assert asked == dataclasses.replace(BOKEH, alpha=3.0, lora_scale=0.7, bokeh_scale=1.3)


def test_adapter_config_must_agree_with_its_tensors():
    config = adapter_table.codec(MMDIT).to_json(BOKEH) | {
        "lora_rank": 3, "unfreeze_k": True, "attn_hidden_dim": 99, "blocks": ["transformer_blocks.0"],
    }  # fmt: skip
    message = problems(adapter_config, config, adapter_shapes(), MMDIT)
    assert message.startswith("adapter.safetensors: 4 problems")
    assert "lora_rank = 3, the tensors say 2" in message
    assert "unfreeze_k = True, the tensors say False" in message
    assert "attn_hidden_dim = 99 is not supported, expected 12" in message
    # Of lists, what only one of the two has.
    assert "blocks = [0], the tensors say [1, 3]" in message


@pytest.mark.parametrize("name", ["transformer_blocks.2", "single_transformer_blocks.2", "blocks.1", "3"])
def test_adapter_blocks_must_exist(name):
    config = adapter_table.codec(MMDIT).to_json(BOKEH) | {"blocks": [name]}
    assert repr(name) in problems(adapter_config, config, adapter_shapes(), MMDIT)


def test_adapter_of_another_model():
    small = dataclasses.replace(MMDIT, num_single=1, hidden_size=6, num_heads=1)
    message = problems(adapter_config, None, adapter_shapes(), small)
    assert "adapts block 3 of 3" in message and "made for width 12, this model's is 6" in message
    far = {n.replace("modules.", "modules.1234567890"): shape for n, shape in adapter_shapes().items()}
    assert "names no block" in problems(adapter_config, None, far, MMDIT)


# --- networks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_network_loads_what_was_exported(tmp_path, dtype):
    states = write_snapshot(tmp_path)
    check_loaded(load.load_transformer(tmp_path / "transformer", dtype=dtype), states["transformer"])
    check_loaded(files.load_vae(tmp_path / "vae", dtype=dtype), states["vae"])
    check_loaded(files.load_clip(tmp_path / "text_encoder", dtype=dtype), states["text_encoder"])
    check_loaded(files.load_t5(tmp_path / "text_encoder_2", dtype=dtype), states["text_encoder_2"])
    adapter = load.load_network(networks.adapter_for(MMDIT), tmp_path / "adapter", dtype=dtype)
    check_loaded(adapter, states["adapter"])
    assert adapter.config == BOKEH
    assert {p.dtype for p in adapter.parameters()} == {dtype}


def test_adapter_is_built_into_the_transformer(tmp_path):
    states = write_snapshot(tmp_path)
    network = load.load_transformer(tmp_path / "transformer", adapter=tmp_path / "adapter", **F32)
    base, adapter = export.split_adapter(network.state_dict())
    assert all(torch.equal(base[n], t) for n, t in states["transformer"].items())
    assert adapter.keys() == states["adapter"].keys()
    assert all(torch.equal(adapter[n], t) for n, t in states["adapter"].items())


def test_bfl_single_files_need_no_config(tmp_path):
    config = dataclasses.replace(
        MMDIT, hidden_size=128, num_heads=1, num_double=1, num_single=1, axes_dim=(16, 56, 56), mlp_ratio=0.25
    )
    for guidance_embed in (True, False):
        config = dataclasses.replace(config, guidance_embed=guidance_embed)
        state = random_state(MMDiT(config))
        write.save(tmp_path / "any-name.sft", state)
        network = load.load_transformer(tmp_path / "any-name.sft", **F32)
        assert network.config == config
        check_loaded(network, state)
    state = random_state(AutoencoderKL(VAE))
    write.save(tmp_path / "other.safetensors", state)
    network = files.load_vae(tmp_path / "other.safetensors", **F32)
    assert network.config == VAE
    check_loaded(network, state)


def test_full_size_bfl_shapes_give_the_presets():
    for name, config in (("flux1-dev.bfl", FLUX_DEV), ("flux1-schnell.bfl", FLUX_SCHNELL)):
        assert files.told(flux.CONFIG, manifests.shapes(name)) == config
    assert files.told(vae.CONFIG, manifests.shapes("ae.bfl")) == FLUX_VAE
    for num_double in (0, 2):
        some = dataclasses.replace(FLUX_DEV, num_double=num_double, num_single=1, mlp_ratio=2.5)
        with torch.device("meta"):
            shapes = {name: tuple(t.shape) for name, t in MMDiT(some).state_dict().items()}
        assert files.told(flux.CONFIG, shapes) == some


def test_other_head_dims_ask_for_a_config(tmp_path):
    path = tmp_path / "bfl.safetensors"
    state = random_state(MMDiT(MMDIT))
    write.save(path, state)
    assert "head dim 6 does not imply rotary axes" in problems(load.load_transformer, path)
    check_loaded(load.load_transformer(path, MMDIT, **F32), state)
    write.write_json(tmp_path / "config.json", flux.CONFIG.to_json(MMDIT))
    check_loaded(load.load_transformer(path, **F32), state)


def test_other_latents_ask_for_a_config(tmp_path):
    config = dataclasses.replace(VAE, latent_channels=4, scale=0.5)
    state = random_state(AutoencoderKL(config))
    export.save_network(networks.VAE, tmp_path, config, state)
    check_loaded(files.load_vae(tmp_path, **F32), state)
    (tmp_path / "config.json").unlink()
    message = problems(files.load_vae, tmp_path)
    assert "4 latent channels do not imply a scale (16 do): pass a config" in message


def test_incomplete_bfl_files_say_what_lacks(tmp_path):
    state = random_state(MMDiT(MMDIT))
    del state["txt_in.weight"]
    write.save(tmp_path / "a.safetensors", state)
    assert "'txt_in.weight'" in problems(load.load_transformer, tmp_path / "a.safetensors")
    state = random_state(AutoencoderKL(VAE))
    del state["decoder.conv_in.weight"]
    write.save(tmp_path / "b.safetensors", state)
    assert "'decoder.conv_in.weight'" in problems(files.load_vae, tmp_path / "b.safetensors")


def test_parameters_own_their_memory(tmp_path):
    write_snapshot(tmp_path)
    networks = (
        load.load_transformer(tmp_path / "transformer", **F32),
        files.load_vae(tmp_path / "vae", **F32),
        files.load_clip(tmp_path / "text_encoder", **F32),
    )
    for network in networks:
        for name, p in network.named_parameters():
            assert p.untyped_storage().nbytes() == p.nbytes, name


def test_wrong_files_are_refused_before_anything_is_read(tmp_path, monkeypatch):
    states = write_snapshot(tmp_path)
    tensors = to_official(flux.DIFFUSERS, states["transformer"])
    del tensors["x_embedder.bias"]
    tensors["extra"] = torch.ones(2)
    tensors["proj_out.bias"] = torch.ones(5)
    write.save_sharded(tmp_path / "transformer", tensors, "diffusion_pytorch_model", 5000)
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("read a tensor"))
    message = problems(load.load_transformer, tmp_path / "transformer", adapter=tmp_path / "adapter")
    assert str(tmp_path / "transformer") in message
    for line in (
        "missing: x_embedder.bias [12]",
        "unexpected: extra [2]",
        "wrong shape: proj_out.bias is [5], expected [64]",
    ):
        assert line in message
    for loader in (load.load_transformer, files.load_vae):
        assert "layout not recognised" in problems(loader, tmp_path / "text_encoder")
    assert "(T5 encoder)" in problems(files.load_t5, tmp_path / "text_encoder")
    assert "layout not recognised" in problems(files.load_t5, tmp_path / "text_encoder", T5)
    message = problems(load.load_network, networks.adapter_for(MMDIT), tmp_path / "vae")
    assert "a bokeh adapter has 'adapter_modules.*.to_v_bokeh.down.weight'" in message


def test_a_faulty_adapter_is_refused_before_the_transformer_is_read(tmp_path, monkeypatch):
    states = write_snapshot(tmp_path)
    name = "adapter_modules.1.to_v_bokeh.up.weight"
    write.save(tmp_path / "adapter" / "model.safetensors", states["adapter"] | {name: torch.ones(3, 2)})
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("read a tensor"))
    message = problems(load.load_transformer, tmp_path / "transformer", adapter=tmp_path / "adapter")
    assert f"wrong shape: {name} is [3, 2], expected [12, 2]" in message


def test_no_config_no_guess(tmp_path):
    write_snapshot(tmp_path)
    for folder, loader in (
        ("transformer", load.load_transformer),
        ("text_encoder", files.load_clip),
    ):
        (tmp_path / folder / "config.json").unlink()
        assert "no config.json beside it" in problems(loader, tmp_path / folder)


def test_tied_t5_copies_must_be_equal(tmp_path):
    state = random_state(T5Encoder(T5))
    copy = state["shared.weight"].clone()
    write.save(tmp_path / "a.safetensors", state | {"encoder.embed_tokens.weight": copy})
    check_loaded(files.load_t5(tmp_path / "a.safetensors", T5, **F32), state)
    copy[0, 0] += 1
    write.save(tmp_path / "a.safetensors", state | {"encoder.embed_tokens.weight": copy})
    assert "must be the same tensor" in problems(files.load_t5, tmp_path / "a.safetensors", T5)
    only = {n.replace("shared", "encoder.embed_tokens"): t for n, t in state.items()}
    write.save(tmp_path / "a.safetensors", only)
    check_loaded(files.load_t5(tmp_path / "a.safetensors", T5, **F32), state)


def test_incomplete_exports_are_never_written(tmp_path):
    state = random_state(MMDiT(MMDIT, BOKEH))
    message = problems(export.save_network, networks.TRANSFORMER, tmp_path / "t", MMDIT, state)
    assert "unexpected: bokeh.adapter_modules" in message
    base, _ = export.split_adapter(state)
    del base["img_in.bias"]
    message = problems(export.save_network, networks.TRANSFORMER, tmp_path / "t", MMDIT, base)
    assert "missing: x_embedder.bias" in message
    assert not (tmp_path / "t").exists()


# --- folders


def test_snapshot_reads_the_card(tmp_path):
    card = Defaults(num_inference_steps=7, height_px=64, width_px=32, txt_length=16)
    write_snapshot(tmp_path, card=card)
    snapshot = open_snapshot(tmp_path)
    assert (snapshot.config, snapshot.schedule, snapshot.defaults) == (MMDIT, FLUX_SCHEDULE, card)
    assert snapshot.adapter == tmp_path / "adapter"
    (tmp_path / CARD).unlink()
    snapshot = open_snapshot(tmp_path)
    assert snapshot.adapter is None and snapshot.defaults == default_card(True)
    (tmp_path / CARD).write_text('{"height": 96}')
    assert open_snapshot(tmp_path).defaults == dataclasses.replace(default_card(True), height_px=96)


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ('{"steps": 3}', "unknown key 'steps'"),
        ('{"height": 0}', "height = 0 is not a positive whole number"),
        ('{"width": "64"}', "width = '64' is not a positive whole number"),
        ('{"adapter": "absent"}', "not found:"),
        ('{"adapter": 5}', "adapter must name a folder, got 5"),
        ("[]", "a JSON object was expected"),
    ],
)
def test_bad_cards(tmp_path, card, message):
    write_snapshot(tmp_path)
    (tmp_path / CARD).write_text(card)
    assert message in problems(open_snapshot, tmp_path)


def test_a_folder_that_is_no_model_names_all_that_lacks(tmp_path):
    message = problems(open_snapshot, tmp_path)
    for part in (
        "transformer/",
        "vae/",
        "text_encoder/",
        "text_encoder_2/",
        "tokenizer/",
        "tokenizer_2/",
        "sched",
    ):
        assert f"not found: {part}" in message
    assert "does not exist" in problems(open_snapshot, tmp_path / "absent")
    (tmp_path / "file").touch()
    assert "is a file" in problems(open_snapshot, tmp_path / "file")


def test_bfl_files_stand_in_for_folders(tmp_path):
    config = dataclasses.replace(
        MMDIT,
        hidden_size=128,
        num_heads=1,
        axes_dim=(16, 56, 56),
        guidance_embed=False,
    )
    states = write_snapshot(tmp_path, config)
    (tmp_path / CARD).unlink()
    for folder in ("transformer", "vae"):
        for path in (tmp_path / folder).glob("*.safetensors"):
            path.unlink()
    assert "or a BFL" in problems(open_snapshot, tmp_path)
    write.save(tmp_path / "flux1-schnell.safetensors", states["transformer"])
    write.save(tmp_path / "ae.safetensors", states["vae"])
    (tmp_path / "scheduler" / "scheduler_config.json").unlink()
    snapshot = open_snapshot(tmp_path)
    assert snapshot.config == config
    assert (snapshot.schedule, snapshot.defaults) == (SCHNELL_SCHEDULE, default_card(False))
    check_loaded(load.load_transformer(snapshot.paths["transformer"], **F32), states["transformer"])
    check_loaded(files.load_vae(snapshot.paths["vae"], **F32), states["vae"])
    write.save(tmp_path / "flux1-dev.safetensors", states["transformer"])
    assert re.search(
        "several .* files .flux1-dev.safetensors, flux1-schnell", problems(open_snapshot, tmp_path)
    )


def test_the_transformer_folder_wins_over_a_bfl_file(tmp_path):
    states = write_snapshot(tmp_path)
    write.save(tmp_path / "flux1-dev.safetensors", states["transformer"])
    assert open_snapshot(tmp_path).paths["transformer"] == tmp_path / "transformer"


@needs_shared
def test_the_golden_snapshot_loads_whole():
    parts = load.load_components(shared("golden/snapshot"), shared("golden/adapter"), **F32)
    assert parts.transformer.config.num_single == 3 and parts.transformer.bokeh is not None
    assert parts.transformer.bokeh.config.blocks == (1, 2, 4)
    assert parts.text.encode(["a cat"]).txt.shape == (1, 512, 32)
    assert parts.snapshot.schedule == FLUX_SCHEDULE


@needs_shared
def test_progress_reaches_the_bytes_of_all_files():
    heard: list[tuple[int, int]] = []
    load.load_components(
        shared("golden/snapshot"), shared("golden/adapter"), on_progress=lambda *at: heard.append(at), **F32
    )
    done, totals = [at for at, _ in heard], {total for _, total in heard}
    folders = [shared("golden/adapter"), *shared("golden/snapshot").iterdir()]
    sizes = [path.stat().st_size for f in folders if f.is_dir() for path in f.glob("*.safetensors")]
    assert done[0] == 0 and done == sorted(set(done)) and totals == {done[-1]}
    # All but the headers.
    assert 0.95 * sum(sizes) < done[-1] < sum(sizes)


def test_tied_and_fused_tensors_are_counted_too(tmp_path):
    states = write_snapshot(tmp_path)
    network, seen = states["transformer"], []
    load.load_transformer(tmp_path / "transformer", on_read=seen.append, **F32)
    assert sum(seen) == sum(t.nbytes for t in network.values()) and len(seen) == len(network)
    seen.clear()
    files.load_t5(tmp_path / "text_encoder_2", on_read=seen.append, **F32)
    file = next((tmp_path / "text_encoder_2").glob("*.safetensors"))
    assert sum(seen) == sum(i.num_bytes for i in open_checkpoint(file).tensors.values())


@needs_shared
def test_components_of_different_models_are_refused(tmp_path):
    for path in shared("golden/snapshot").iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "text_encoder").unlink()
    export.save_network(networks.CLIP, tmp_path / "text_encoder", CLIP, random_state(CLIPTextEncoder(CLIP)))
    message = problems(load.load_components, tmp_path)
    assert "CLIP vectors have 4 channels, the transformer expects 32" in message


@pytest.fixture
def headers(monkeypatch):
    """How often the header of each file was read."""
    count: Counter[Path] = Counter()
    read = checkpoint.read_header

    def counted(path):
        count[path.resolve()] += 1
        return read(path)

    monkeypatch.setattr(checkpoint, "read_header", counted)
    return count


def test_one_command_reads_each_header_once(tmp_path, headers):
    """Progress, loading and the hashes in the recipe all use what was opened to find the model."""
    down, up = torch.zeros(2, 64), torch.zeros(256, 2)
    pair = {"transformer.x_embedder.lora_A.weight": down, "transformer.x_embedder.lora_B.weight": up}
    write.save(tmp_path / "lora.safetensors", pair)
    size = ["--height", "32", "--width", "32", "--num-inference-steps", "1"]
    argv = ["generate", "--prompt", "a red mug", "--lora", str(tmp_path / "lora.safetensors"), *size]
    assert cli.main([*argv, "--output", str(tmp_path / "out")]) == 0
    files_of_nano = resolve.BUNDLED["nano"].rglob("*.safetensors")
    expected = {path.resolve() for path in (*files_of_nano, tmp_path / "lora.safetensors")}
    assert headers == dict.fromkeys(expected, 1)


@pytest.mark.parametrize(
    "model", ["all.safetensors", "flat", "flat/flux1-dev.safetensors", "official/transformer"]
)
def test_whichever_way_a_model_is_found_each_header_is_read_once(tmp_path, monkeypatch, headers, model):
    states = files.states()
    files.write_flat(tmp_path / "flat", states)
    files.write_official(tmp_path / "official", states)
    write.save(tmp_path / "all.safetensors", files.all_in_one(states))
    for folder in ("", "flat", "official"):
        files.write_tokenizers(tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    load.load_components(model, on_progress=lambda *_: None, env={"HOME": str(tmp_path)}, **F32)
    assert headers and set(headers.values()) == {1}


def test_no_file_stays_mapped_after_loading(tmp_path):
    files.write_official(tmp_path, files.states())
    files.write_tokenizers(tmp_path)
    parts = load.load_components(tmp_path, **F32)
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(tmp_path) not in maps.read_text()
    # What was opened can be read again.
    part = parts.snapshot.parts["clip"]
    name = next(iter(part.checkpoint.tensors))
    assert torch.equal(part.checkpoint.read(name), files.states()["clip"][name])


def test_an_absent_bundle_is_an_ordinary_error(tmp_path, monkeypatch):
    monkeypatch.setitem(resolve.BUNDLED, "absent", tmp_path / "absent")
    assert str(tmp_path / "absent") in problems(load.load_components, "absent")


@pytest.mark.parametrize("loras", ["a.safetensors", ["a.safetensors"], [("a", float("nan"))], [("a", "1")],
                                   [("a", None)], [("a",)], ["ab"], 3, [("a", True)]])  # fmt: skip
def test_loras_that_are_no_pairs_are_refused_before_anything_is_looked_for(loras: object) -> None:
    with pytest.raises(ValueError, match="loras must be pairs of a file and a finite strength, got"):
        bokehflux.load("nano", loras=loras)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [{"model": ""}, {"adapter": ""}, {"loras": [("", 1.0)]}])
def test_an_empty_path_is_not_the_folder_one_is_in(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a path of the model is empty"):
        bokehflux.load(**{"model": "nano", **given})


def test_a_name_that_no_file_can_have_is_not_found() -> None:
    with pytest.raises(CheckpointError, match="no complete model x+ found"):
        bokehflux.load("x" * 5000)


def test_progress_reaches_the_bytes_of_nano_and_its_adapters() -> None:
    heard: list[tuple[int, int]] = []
    parts = load.load_components("nano", on_progress=lambda *at: heard.append(at), **F32)
    assert parts.reference is not None and parts.transformer.bokeh is not None
    assert heard[-1][0] == heard[-1][1] and [at for at, _ in heard] == sorted(at for at, _ in heard)


def test_only_small_text_encoders_compute_with_more_care(tmp_path, monkeypatch):
    files.write_official(tmp_path, files.states())
    files.write_tokenizers(tmp_path)
    size = {part: sum(t.nbytes for t in files.states()[part].values()) for part in ("clip", "t5")}
    small, large = sorted(size, key=size.__getitem__)
    monkeypatch.setattr(load, "MAX_CAREFUL_BYTES", size[small])
    parts = load.load_components(tmp_path, dtype=torch.bfloat16, text_dtype=torch.float32)
    kinds = {part: next(parts.networks[part].parameters()).dtype for part in size}
    assert kinds == {small: torch.float32, large: torch.bfloat16}
    assert parts.transformer.dtype == torch.bfloat16
