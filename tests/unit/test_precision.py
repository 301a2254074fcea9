"""Weights stored narrow: kept so, exact at use, through every name rule; what cannot be used is refused."""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bokehflux.configs import BokehConfig
from bokehflux.models.adapter import BokehAdapter
from bokehflux.models.linear import Linear
from bokehflux.models.mmdit import MMDiT
from bokehflux.models.t5 import T5Encoder
from bokehflux.weights import load
from bokehflux.weights.files import write
from bokehflux.weights.files.checkpoint import Checkpoint, CheckpointError
from bokehflux.weights.mapping import to_official
from bokehflux.weights.precision import RowScaled, TensorScaled
from bokehflux.weights.tables import flux
from tests import model_files as files

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
STATES = files.states()
STYLES = {"old": ("scale_weight", "scale_input"), "new": ("weight_scale", "input_scale")}


def linear_weights(network: torch.nn.Module) -> set[str]:
    return {f"{name}.weight" for name, module in network.named_modules() if isinstance(module, Linear)}


def dense(network: torch.nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every parameter as it takes part in the arithmetic."""
    state = dict(network.state_dict())
    for name, module in network.named_modules():
        if isinstance(module, Linear):
            state[f"{name}.weight"] = module.dense(dtype)
    return state


def names_of(state: Mapping[str, Tensor]) -> list[str]:
    """Weights that tools quantise: all matrices but embeddings."""
    return [n for n, t in state.items() if t.ndim == 2 and "embed" not in n and "shared" not in n
            and "relative" not in n]  # fmt: skip


def scaled(
    state: Mapping[str, Tensor], style: str, scale_of=lambda i: 0.01 * (i + 1)
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A file in scaled fp8, and what its weights mean in float32."""
    scale_name, input_name = STYLES[style]
    tensors, meaning = dict(state), dict(state)
    for i, name in enumerate(names_of(state)):
        scale = torch.as_tensor(scale_of(i), dtype=torch.float32)
        narrow = (state[name] / scale.reshape(-1, *[1] * (state[name].ndim - 1))).to(E4M3)
        base = name.removesuffix("weight")
        tensors[name] = narrow
        tensors[base + scale_name] = scale
        tensors[base + input_name] = torch.tensor(1.0)
        meaning[name] = narrow.float() * scale.reshape(-1, 1)
        if style == "new":
            blob = json.dumps({"format": "float8_e4m3fn"}).encode()
            tensors[base + "comfy_quant"] = torch.tensor(list(blob), dtype=torch.uint8)
    if style == "old":
        tensors["scaled_fp8"] = torch.zeros(0, dtype=E4M3)
    return tensors, meaning


def problems(call, *args, **kwargs) -> str:
    with pytest.raises(CheckpointError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


# --- raw


@pytest.mark.parametrize("stored", [E4M3, E5M2, torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("part", ["transformer", "t5", "clip", "vae"])
def test_storage_types(tmp_path, part, stored):
    """fp8 stays in linear layers alone; everything else is in the compute dtype; values are the file's."""
    state = {name: t.to(stored) for name, t in STATES[part].items()}
    write.save(tmp_path / "a.safetensors", state)
    network = files.LOADERS[part](tmp_path / "a.safetensors", dtype=torch.bfloat16)
    narrow = linear_weights(network) if stored in (E4M3, E5M2) else set()
    assert bool(narrow) == (stored in (E4M3, E5M2) and part != "vae")
    for name, tensor in network.state_dict().items():
        assert tensor.dtype == (stored if name in narrow else torch.bfloat16), name
    for name, tensor in dense(network, torch.bfloat16).items():
        assert torch.equal(tensor, state[name].to(torch.bfloat16)), name
    assert not any(p.requires_grad for p in network.parameters())


def test_fp8_memory_is_that_of_the_file(tmp_path):
    write.save(tmp_path / "a.safetensors", {n: t.to(E4M3) for n, t in STATES["transformer"].items()})
    network = load.load_transformer(tmp_path / "a.safetensors", dtype=torch.bfloat16)
    for name, p in network.named_parameters():
        assert p.untyped_storage().nbytes() == p.nbytes, name
    assert sum(p.nbytes for n, p in network.named_parameters() if n in linear_weights(network)) == sum(
        t.numel() for n, t in STATES["transformer"].items() if n in linear_weights(network)
    )


def test_networks_compute_with_narrow_weights(tmp_path):
    """The same bits as a network that holds the cast weights."""
    narrow = {n: t.to(E4M3) for n, t in STATES["t5"].items()}
    write.save(tmp_path / "a.safetensors", narrow)
    write.save(tmp_path / "b.safetensors", {n: t.to(torch.bfloat16) for n, t in narrow.items()})
    ids = torch.arange(7)[None]
    a, b = (files.load_t5(tmp_path / f"{x}.safetensors", dtype=torch.bfloat16)(ids) for x in "ab")
    assert a.dtype == torch.bfloat16 and torch.equal(a, b)


def test_the_adapter_is_never_narrow(tmp_path):
    config = BokehConfig(blocks=(0, 1), rank=2, hidden_dim=3, context_dim=5)
    state = files.random_state(BokehAdapter(config, files.MMDIT))
    write.save(tmp_path / "t.safetensors", {n: t.to(E4M3) for n, t in STATES["transformer"].items()})
    write.save(tmp_path / "a.safetensors", {n: t.to(E4M3) for n, t in state.items()})
    network = load.load_transformer(tmp_path / "t.safetensors", adapter=tmp_path / "a.safetensors")
    assert network.bokeh is not None
    assert {p.dtype for p in network.bokeh.parameters()} == {torch.bfloat16}
    assert network.img_in.weight.dtype == E4M3


def test_fused_parts_of_different_types_become_dense(tmp_path):
    tensors = to_official(flux.DIFFUSERS, STATES["transformer"])
    tensors = {n: t.to(E4M3) if n.endswith("to_q.weight") else t for n, t in tensors.items()}
    write.save(tmp_path / "a.safetensors", tensors)
    network = load.load_transformer(tmp_path / "a.safetensors", files.MMDIT, dtype=torch.float32)
    qkv = network.double_blocks[0].img_attn.qkv
    expected = STATES["transformer"]["double_blocks.0.img_attn.qkv.weight"].clone()
    expected[:128] = expected[:128].to(E4M3).float()
    assert qkv.is_dense and torch.equal(qkv.weight, expected)


# --- scaled


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("part", ["transformer", "t5", "clip"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scaled_fp8(tmp_path, part, style, dtype):
    tensors, meaning = scaled(STATES[part], style)
    write.save(tmp_path / "a.safetensors", tensors)
    network = files.LOADERS[part](tmp_path / "a.safetensors", dtype=dtype)
    scaled_layers = 0
    for name, tensor in dense(network, dtype).items():
        assert tensor.dtype == dtype
        # The float32 product, rounded once.
        assert torch.equal(tensor, meaning[name].to(dtype)), name
    for name in linear_weights(network):
        layer = network.get_submodule(name.removesuffix(".weight"))
        scaled_layers += isinstance(layer.dequantize, TensorScaled)
        assert layer.weight.dtype == E4M3
    assert scaled_layers == len(names_of(STATES[part]))


@pytest.mark.parametrize("style", STYLES)
def test_fused_parts_with_scales_of_their_own_stay_exact(tmp_path, style):
    """q, k, v and MLP rows keep their scales; (scale, shift) of the last layer are swapped with theirs."""
    official = to_official(flux.DIFFUSERS, STATES["transformer"])

    def scale_of(i: int):
        rows = official[names_of(official)[i]].shape[0]
        return 0.01 * (i + 1) if i % 2 else torch.linspace(0.01, 0.05, rows)

    tensors, meaning = scaled(official, style, scale_of)
    write.save(tmp_path / "a.safetensors", tensors)
    network = load.load_transformer(tmp_path / "a.safetensors", files.MMDIT, dtype=torch.bfloat16)
    write.save(tmp_path / "b.safetensors", meaning)
    exact = load.load_transformer(tmp_path / "b.safetensors", files.MMDIT, dtype=torch.float32)
    for name, tensor in dense(network, torch.bfloat16).items():
        assert torch.equal(tensor, exact.state_dict()[name].to(torch.bfloat16)), name
    assert network.double_blocks[0].img_attn.qkv.weight.dtype == E4M3
    assert isinstance(network.double_blocks[0].img_attn.qkv.dequantize, RowScaled)
    # Scales, too, are copies: nothing keeps the file mapped.
    if (maps := Path("/proc/self/maps")).exists():
        assert str(tmp_path) not in maps.read_text()
    assert isinstance(network.final_layer.adaLN_modulation[1].dequantize, TensorScaled | RowScaled)
    columns = network.double_blocks[0].img_attn.qkv.columns(torch.ones(1, 1, 128).bfloat16(), 100, 200)
    expected = F.linear(
        torch.ones(1, 1, 128).bfloat16(),
        exact.double_blocks[0].img_attn.qkv.weight[100:200].bfloat16(),
        exact.double_blocks[0].img_attn.qkv.bias[100:200].bfloat16(),
    )
    assert torch.equal(columns, expected)


def test_equal_scales_of_fused_parts_are_one(tmp_path):
    official = to_official(flux.DIFFUSERS, STATES["transformer"])
    tensors, _ = scaled(official, "new", lambda i: 0.02)
    write.save(tmp_path / "a.safetensors", tensors)
    network = load.load_transformer(tmp_path / "a.safetensors", files.MMDIT)
    assert network.double_blocks[0].img_attn.qkv.dequantize == TensorScaled(scale=torch.tensor(0.02).item())


def test_scaled_fp8_below_the_prefixes_of_an_all_in_one(tmp_path):
    parts, meanings = {}, {}
    for name, style in (("transformer", "old"), ("t5", "new"), ("clip", "old")):
        parts[name], meanings[name] = scaled(STATES[name], style)
    write.save(tmp_path / "a.safetensors", files.all_in_one(parts | {"vae": STATES["vae"]}))
    for name in meanings:
        network = files.LOADERS[name](tmp_path / "a.safetensors", dtype=torch.float32)
        for key, tensor in dense(network, torch.float32).items():
            assert torch.equal(tensor, meanings[name][key]), key


def test_a_scale_beside_a_wide_weight_is_applied(tmp_path):
    state = dict(STATES["transformer"]) | {"img_in.scale_weight": torch.tensor([0.5])}
    write.save(tmp_path / "a.safetensors", state)
    network = load.load_transformer(tmp_path / "a.safetensors", dtype=torch.float32)
    assert torch.equal(network.img_in.weight, 0.5 * state["img_in.weight"]) and network.img_in.is_dense


def test_metadata_declares_formats(tmp_path):
    tensors, meaning = scaled(STATES["t5"], "new")
    tensors = {n: t for n, t in tensors.items() if not n.endswith("comfy_quant")}
    layers = {n.removesuffix(".weight"): {"format": "float8_e4m3fn"} for n in names_of(STATES["t5"])}
    write.save(
        tmp_path / "a.safetensors", tensors, {"_quantization_metadata": json.dumps({"layers": layers})}
    )
    network = files.load_t5(tmp_path / "a.safetensors", dtype=torch.float32)
    assert all(torch.equal(t, meaning[n]) for n, t in dense(network, torch.float32).items())
    layers = {n: {"format": "nvfp4"} for n in layers}
    write.save(
        tmp_path / "a.safetensors", tensors, {"_quantization_metadata": json.dumps({"layers": layers})}
    )
    message = problems(files.load_t5, tmp_path / "a.safetensors")
    assert f"{len(layers)} layers such as encoder" in message and "stored as nvfp4" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lost.scale_weight": torch.ones(())}, "lost.scale_weight has no weight beside it"),
        ({"img_in.scale_weight": torch.ones(3)}, "expected one number, or one per row of img_in.weight"),
        ({"img_in.scale_weight": torch.ones((), dtype=torch.int64)}, "img_in.scale_weight is torch.int64"),
        ({"img_in.weight_scale": torch.ones(())}, "scale the same weight"),
        ({"txt_in.weight": torch.ones(())}, "'txt_in.weight' has the shape []"),
        ({"img_in.scale_weight": torch.tensor(torch.nan)}, "img_in.scale_weight is not finite"),
        ({"img_in.comfy_quant": torch.tensor(list(b"{not"), dtype=torch.uint8)}, "stored as None"),
        (
            {"img_in.comfy_quant": torch.tensor(list(b'{"format": "mxfp8"}'), dtype=torch.uint8)},
            "img_in.comfy_quant are stored as mxfp8",
        ),
        (
            {
                "img_in.comfy_quant": torch.tensor(
                    list(b'{"format": "float8_e4m3fn", "convrot": true}'), dtype=torch.uint8
                )
            },
            "rotated",
        ),
        ({"img_in.weight.absmax": torch.ones(9)}, "bitsandbytes"),
        ({"txt_in.weight": torch.ones(128, 32).to(torch.int8)}, "txt_in.weight is stored as int8"),
        ({"img_in.comfy_quant": torch.ones(9)}, "a few bytes of JSON were expected"),
        ({"img_in.comfy_quant": torch.zeros(5000, dtype=torch.uint8)}, "a few bytes of JSON were expected"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path, change, message):
    tensors, _ = scaled(STATES["transformer"], "old")
    write.save(tmp_path / "a.safetensors", tensors | change)
    assert message in problems(load.load_transformer, tmp_path / "a.safetensors")


@pytest.mark.parametrize("metadata", ["{", "[]", '{"layers": 3}', '{"layers": {"a": 1}}', "null"])
def test_odd_metadata_is_no_crash(tmp_path, metadata):
    write.save(tmp_path / "a.safetensors", dict(STATES["t5"]), {"_quantization_metadata": metadata})
    with pytest.raises(CheckpointError):
        files.load_t5(tmp_path / "a.safetensors")


def test_scaled_files_are_covered_both_ways(tmp_path):
    tensors, _ = scaled(STATES["transformer"], "old")
    del tensors["txt_in.bias"]
    write.save(tmp_path / "a.safetensors", tensors | {"img_in.other": torch.ones(1)})
    message = problems(load.load_transformer, tmp_path / "a.safetensors")
    assert "missing: txt_in.bias" in message and "unexpected: img_in.other" in message
    assert "scale_weight" not in message and "2 problems" in message


# --- at use


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scaling_rounds_once(dtype):
    weight = torch.arange(256, dtype=torch.uint8).view(E4M3).reshape(16, 16)
    weight = torch.where(weight.float().isnan(), torch.zeros(()), weight.float()).to(E4M3)
    scale = torch.tensor(0.0123456789)
    expected = (weight.float() * scale).to(dtype)
    assert torch.equal(TensorScaled(scale=scale.item())(weight, dtype), expected)
    assert torch.equal(RowScaled(scale=scale.expand(16, 1))(weight, dtype), expected)
    assert weight.dtype == E4M3  # and not scaled in place


# --- loading


def test_loading_holds_one_parameter_beside_the_network(tmp_path, monkeypatch):
    official = to_official(flux.DIFFUSERS, STATES["transformer"])
    write.save(tmp_path / "a.safetensors", official)
    alive: list[weakref.ref] = []
    most = 0
    read = Checkpoint.read

    def counted(self: Checkpoint, name: str) -> Tensor:
        nonlocal most
        tensor = read(self, name)
        alive[:] = [ref for ref in alive if ref() is not None]
        alive.append(weakref.ref(tensor))
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(Checkpoint, "read", counted)
    load.load_transformer(tmp_path / "a.safetensors", files.MMDIT, dtype=torch.bfloat16)
    assert most <= 4  # the parts of a fused projection


def test_metal_gets_dense_weights(tmp_path, monkeypatch, caplog):
    """MPS has no fp8: what is read from the file is widened before it gets there, and that is said."""
    tensors, _ = scaled(STATES["t5"], "old")
    write.save(tmp_path / "a.safetensors", tensors)
    kept: list[bool] = []
    store = load.store

    def watched(entry, checkpoint, scales, device, dtype, *, keep):
        assert device.type == "mps"
        kept.append(keep)
        return store(entry, checkpoint, scales, torch.device("cpu"), dtype, keep=keep)

    monkeypatch.setattr(load, "store", watched)
    network = files.load_t5(tmp_path / "a.safetensors", device="mps", dtype=torch.float32)
    assert kept and not any(kept)
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert [line.split(": ", 1)[1] for line in caplog.messages] == [
        "MPS has no fp8, weights become torch.float32 and need more memory"
    ]


def test_every_matrix_of_the_networks_is_a_linear_that_can_be_narrow() -> None:
    """What the loader keeps narrow is decided by class: nothing big may be left out."""
    with torch.device("meta"):
        networks = [MMDiT(files.MMDIT), T5Encoder(files.T5)]
    for network in networks:
        missed = {n for n, p in network.named_parameters() if p.ndim == 2} - linear_weights(network)
        assert all("shared" in n or "relative" in n for n in missed)


def test_paths_are_accepted_as_strings(tmp_path: Path) -> None:
    write.save(tmp_path / "a.safetensors", {n: t.to(E4M3) for n, t in STATES["clip"].items()})
    assert files.load_clip(str(tmp_path / "a.safetensors")).config == files.CLIP
