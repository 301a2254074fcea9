"""GGUF files: our unpacking gives the bits of ggml's, weights stay packed, and bad files say why."""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from bokehflux.models.linear import Linear
from bokehflux.weights import load
from bokehflux.weights.files.checkpoint import CheckpointError, Shelf, open_checkpoint
from bokehflux.weights.files.gguf import TYPES
from bokehflux.weights.files.unpack import FORMATS, Packed, unpack
from bokehflux.weights.find.layouts import scan
from bokehflux.weights.mapping import to_official
from bokehflux.weights.tables import t5
from tests import model_files as files

STATES = files.states()


def write_gguf(path: Path, state: dict[str, Tensor], kind: Kind) -> dict[str, Tensor]:
    """As converters do: matrices in blocks where they fit, the rest plain. Returns what the file means."""
    writer = gguf.GGUFWriter(path, "flux")
    meaning = {}
    for name, tensor in state.items():
        array = tensor.numpy()
        block, _ = gguf.GGML_QUANT_SIZES[kind]
        chosen = kind if array.ndim == 2 and array.shape[1] % block == 0 else Kind.F32
        packed = gguf.quants.quantize(array, chosen)
        writer.add_tensor(name, packed, raw_dtype=chosen)
        meaning[name] = torch.from_numpy(np.array(gguf.quants.dequantize(packed, chosen)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meaning


def write_raw(path: Path, tensors: dict[str, tuple[np.ndarray, Kind]]) -> None:
    writer = gguf.GGUFWriter(path, "flux")
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def dense(network: torch.nn.Module) -> dict[str, Tensor]:
    state = dict(network.state_dict())
    for name, module in network.named_modules():
        if isinstance(module, Linear):
            state[f"{name}.weight"] = module.dense(torch.float32)
    return state


def problems(call, *args, **kwargs) -> str:
    with pytest.raises(CheckpointError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


@pytest.mark.parametrize("packing", FORMATS)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_unpacking_gives_the_bits_of_ggml(packing):
    """All bytes at random: every field of every block, NaN and infinite scales included."""
    block_bytes, _ = FORMATS[packing]
    assert gguf.GGML_QUANT_SIZES[Kind[packing]][1] == block_bytes
    raw = np.random.default_rng(0).integers(0, 256, (40, 3 * block_bytes), dtype=np.uint8)
    expected = gguf.quants.dequantize(raw, Kind[packing])
    ours = unpack(torch.from_numpy(raw), packing).numpy()
    assert ours.dtype == np.float32 and np.array_equal(ours, expected, equal_nan=True)
    assert np.isfinite(expected).mean() > 0.8
    dtype = torch.bfloat16
    assert Packed(packing=packing)(torch.from_numpy(raw), dtype).dtype == dtype


@pytest.mark.parametrize(
    "kind", [Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.F16, Kind.BF16, Kind.F32]
)
def test_transformers_stay_packed(tmp_path, kind):
    meaning = write_gguf(tmp_path / "flux.gguf", STATES["transformer"], kind)
    network = load.load_transformer(tmp_path / "flux.gguf", dtype=torch.float32)
    assert network.config == files.MMDIT
    for name, tensor in dense(network).items():
        assert torch.equal(tensor, meaning[name]), name
    packed = kind.name in FORMATS
    qkv = network.double_blocks[0].img_attn.qkv
    assert qkv.weight.dtype == (torch.uint8 if packed else torch.float32)
    assert qkv.is_dense != packed
    if packed:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        assert qkv.weight.nbytes == 3 * 128 * 128 // block * size
    x = torch.randn(1, 3, 128)
    weight, bias = (meaning[f"double_blocks.0.img_attn.qkv.{kind}"] for kind in ("weight", "bias"))
    assert torch.equal(qkv(x), torch.nn.functional.linear(x, weight, bias))


def test_t5_in_the_names_of_llama_cpp(tmp_path):
    state = to_official(t5.GGUF, STATES["t5"])
    assert "enc.blk.1.ffn_gate.weight" in state and "token_embd.weight" in state
    meaning = write_gguf(tmp_path / "t5.gguf", state, Kind.Q8_0)
    network = files.load_t5(tmp_path / "t5.gguf", dtype=torch.float32)
    assert network.config == files.T5
    assert torch.equal(network.shared.weight, meaning["token_embd.weight"])
    ours = to_official(t5.GGUF, dense(network))
    assert all(torch.equal(ours[name], tensor) for name, tensor in meaning.items())
    assert network(torch.arange(5)[None]).isfinite().all()


@pytest.mark.parametrize("kind", [Kind.Q4_K, Kind.IQ4_NL])
def test_formats_that_only_the_package_decodes_are_widened(tmp_path, kind):
    """K-quants stay packed; the rarer formats are decoded at load."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(1)
    raw = rng.integers(0, 256, (512, 512 // block, size), dtype=np.uint8)
    raw[:, :, :4] = np.array([0, 40, 0, 36], dtype=np.uint8)  # scales far from infinity
    raw = raw.reshape(512, -1)
    layer = {"wo.weight": (raw, kind)}
    write_raw(tmp_path / "a.gguf", layer)
    checkpoint = open_checkpoint(tmp_path / "a.gguf")
    info = checkpoint.tensors["wo.weight"]
    assert (info.shape, info.packing) == ((512, 512), kind.name)
    from bokehflux.weights.mapping import Entry
    from bokehflux.weights.precision import store

    entry = Entry("wo.weight", ("wo.weight",))
    stored = store(entry, checkpoint, {}, torch.device("cpu"), torch.float32, keep=True)
    expected = torch.from_numpy(gguf.quants.dequantize(raw, kind))
    assert (stored.dequantize is None) == (kind == Kind.IQ4_NL)
    wide = stored.tensor if stored.dequantize is None else stored.dequantize(stored.tensor, torch.float32)
    assert torch.equal(wide, expected)


def test_our_table_of_types_is_the_packages():
    ours = {Kind[name]: (block, size) for name, block, size in TYPES.values()}
    assert ours == {kind: gguf.GGML_QUANT_SIZES[kind] for kind in ours}
    assert all(Kind[name] == number for number, (name, _, _) in TYPES.items())
    assert {(name, size) for name, _, size in TYPES.values() if name in FORMATS} == {
        (name, size) for name, (size, _) in FORMATS.items()
    }


def test_any_metadata_is_skipped(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "flux")
    writer.add_string("note", "\u00e9" * 99)
    writer.add_array("tokens", ["a", "", "ccc"] * 50)
    writer.add_array("scores", [0.5] * 100)
    writer.add_bool("flag", True)
    writer.add_custom_alignment(64)
    tensors = {f"t.{i}": np.random.default_rng(i).random((i + 1, 32), dtype=np.float32) for i in range(5)}
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = open_checkpoint(tmp_path / "a.gguf")
    for name, array in tensors.items():
        assert np.array_equal(checkpoint.read(name).numpy(), array)


def test_gguf_is_found_in_folders(tmp_path):
    (tmp_path / "unet").mkdir()
    write_gguf(tmp_path / "unet" / "flux.gguf", STATES["transformer"], Kind.Q8_0)
    assert [c.path.name for c in scan(tmp_path, Shelf()).parts["transformer"]] == ["flux.gguf"]


def test_gguf_is_covered_both_ways(tmp_path):
    state = dict(STATES["transformer"])
    del state["txt_in.bias"]
    write_gguf(tmp_path / "a.gguf", state | {"extra": torch.ones(4)}, Kind.Q8_0)
    message = problems(load.load_transformer, tmp_path / "a.gguf")
    assert "missing: txt_in.bias [128]" in message and "unexpected: extra [4]" in message


def test_without_the_package_one_line_says_so(tmp_path, monkeypatch):
    """Only the rarer formats need it."""
    write_gguf(tmp_path / "a.gguf", STATES["transformer"], Kind.Q8_0)
    state = {n: (t.numpy(), Kind.F32) for n, t in STATES["transformer"].items()}
    state["img_in.weight"] = (np.zeros((128, 2 * 18), dtype=np.uint8), Kind.IQ4_NL)
    write_raw(tmp_path / "b.gguf", state)
    monkeypatch.setitem(sys.modules, "gguf", None)
    load.load_transformer(tmp_path / "a.gguf")
    message = problems(load.load_transformer, tmp_path / "b.gguf")
    assert "type IQ4_NL need the package `gguf`: pip install gguf" in message


def test_bad_files_say_why(tmp_path):
    write_gguf(tmp_path / "a.gguf", STATES["t5"], Kind.Q8_0)
    whole = (tmp_path / "a.gguf").read_bytes()
    for bad in (b"", b"GGUF", whole[:100], whole[: len(whole) // 2], b"GGUF" + b"\xff" * 200, b"<html>" * 9):
        (tmp_path / "b.gguf").write_bytes(bad)
        assert "download it again" in problems(open_checkpoint, tmp_path / "b.gguf"), bad[:20]
    (tmp_path / "c.safetensors").write_bytes(whole)
    assert "give it a name that ends in .gguf" in problems(open_checkpoint, tmp_path / "c.safetensors")
    assert "no such file" in problems(open_checkpoint, tmp_path / "absent.gguf")


def test_damaged_headers_never_crash(tmp_path):
    """Any byte of the header at random: an error, or a file that can be read."""
    write_gguf(tmp_path / "a.gguf", {"a": torch.ones(2, 32), "b": torch.ones(3)}, Kind.Q8_0)
    whole = (tmp_path / "a.gguf").read_bytes()
    rng = np.random.default_rng(2)
    refused = 0
    for _ in range(500):
        damaged = bytearray(whole)
        damaged[rng.integers(0, 150)] = rng.integers(0, 256)
        (tmp_path / "b.gguf").write_bytes(damaged)
        try:
            checkpoint = open_checkpoint(tmp_path / "b.gguf")
        except CheckpointError:
            refused += 1
        else:
            for name in checkpoint.tensors:
                checkpoint.read(name)
    assert refused > 100


def test_lengths_beyond_the_file_are_refused_at_once(tmp_path):
    huge = (1 << 60).to_bytes(8, "little")
    start = b"GGUF" + (3).to_bytes(4, "little")
    key = (1).to_bytes(8, "little") + b"k"
    strings = (9).to_bytes(4, "little") + (8).to_bytes(4, "little") + huge
    numbers = (9).to_bytes(4, "little") + (0).to_bytes(4, "little") + huge
    one, none = (1).to_bytes(8, "little"), (0).to_bytes(8, "little")
    for body in (huge + none, none + huge, none + one + huge, none + one + key + strings,
                 none + one + key + numbers, one + none + huge):  # fmt: skip
        (tmp_path / "b.gguf").write_bytes(start + body + b"\0" * 100)
        assert "download it again" in problems(open_checkpoint, tmp_path / "b.gguf")


def test_two_tensors_of_one_name_are_refused(tmp_path):
    path = tmp_path / "a.gguf"
    write_raw(path, {f"tensor.{i}": (np.full((2, 32), i, np.float32), Kind.F32) for i in range(2)})
    path.write_bytes(path.read_bytes().replace(b"tensor.1", b"tensor.0"))
    assert "two tensors of one name" in problems(open_checkpoint, path)


@pytest.mark.parametrize("alignment", [0, 4, 24, 96])
def test_an_alignment_that_no_file_has(tmp_path, alignment):
    writer = gguf.GGUFWriter(path := tmp_path / "a.gguf", "flux")
    writer.add_custom_alignment(64)
    writer.add_tensor("a", np.zeros((2, 32), np.float32), raw_dtype=Kind.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    told = b"general.alignment" + (4).to_bytes(4, "little")
    data = path.read_bytes()
    assert data.count(told + (64).to_bytes(4, "little")) == 1
    path.write_bytes(data.replace(told + (64).to_bytes(4, "little"), told + alignment.to_bytes(4, "little")))
    assert f"damaged: alignment {alignment}" in problems(open_checkpoint, path)
