"""Reading and writing .safetensors: what comes back is what was written, and every bad file says why."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from bokehflux.configs import CLIPConfig
from bokehflux.models.clip import CLIPTextEncoder
from bokehflux.weights.files.checkpoint import CheckpointError, fold, open_checkpoint, read_json
from bokehflux.weights.files.write import replacing, save, save_sharded, unfinished, write_json
from bokehflux.weights.networks import CLIP
from bokehflux.weights.save import save_network
from tests.model_files import load_clip, write_sparse

DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.bool,
)  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), inner, max_size=3)
    ),
    max_leaves=6,
)


def example() -> dict[str, torch.Tensor]:
    return {f"t.{i}": (torch.randn(i, 3) * 9).to(dtype) for i, dtype in enumerate(DTYPES)} | {
        "scalar": torch.tensor(3.0),
        "strided": torch.arange(12.0).view(3, 4).T,
    }


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and a.contiguous().flatten().view(torch.uint8).equal(b.contiguous().flatten().view(torch.uint8))
    )


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def f32(*shape: int, at: int = 0) -> dict[str, object]:
    count = 4
    for n in shape:
        count *= n
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + count]}


def error_of(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_written_files_are_read_by_the_official_library(tmp_path):
    tensors = example()
    save(tmp_path / "a.safetensors", tensors, {"note": "hi"})
    official = load_file(tmp_path / "a.safetensors")
    assert official.keys() == tensors.keys()
    assert all(same(official[name], tensors[name]) for name in tensors)
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    assert checkpoint.metadata == {"format": "pt", "note": "hi"}


def test_official_files_are_read_back(tmp_path):
    tensors = {name: t.contiguous() for name, t in example().items()}
    save_file(tensors, tmp_path / "a.safetensors")
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    assert checkpoint.shapes == {name: tuple(t.shape) for name, t in tensors.items()}
    assert all(same(checkpoint.read(name), tensors[name]) for name in tensors)


def test_misaligned_data_is_read(tmp_path):
    header = json.dumps({"a": f32(2)}).encode()
    header += b" " * (-len(header) % 4 + 1)
    (tmp_path / "a.safetensors").write_bytes(raw(header, struct.pack("<2f", 1.5, -2)))
    assert open_checkpoint(tmp_path / "a.safetensors").read("a").tolist() == [1.5, -2]


def test_writing_to_a_read_tensor_leaves_the_file_alone(tmp_path):
    save(tmp_path / "a.safetensors", {"a": torch.ones(3)})
    open_checkpoint(tmp_path / "a.safetensors").read("a").zero_()
    assert open_checkpoint(tmp_path / "a.safetensors").read("a").tolist() == [1, 1, 1]


@given(st.integers(1, 400), st.lists(st.integers(0, 40), min_size=1, max_size=8))
def test_sharding_keeps_every_tensor(tmp_path_factory, limit, sizes):
    folder = tmp_path_factory.mktemp("shards")
    tensors = {f"w.{i}": torch.full((n,), float(i)) for i, n in enumerate(sizes)}
    path = save_sharded(folder, tensors, "model", max_shard_bytes=limit)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.path == path
    assert checkpoint.shapes.keys() == tensors.keys()
    assert all(same(checkpoint.read(name), tensors[name]) for name in tensors)
    largest = max(4 * n for n in sizes)
    for file in folder.iterdir():
        held = sum(checkpoint.read(n).nbytes for n, info in checkpoint.tensors.items() if info.file == file)
        assert held <= max(limit, largest)


def test_tensors_that_share_memory_are_written_apart(tmp_path):
    fused = torch.arange(12.0).view(4, 3)
    q, k = fused.split(2)
    tensors = {
        "fused": fused,
        "tied": fused,
        "q": q,
        "k": k,
        "column": fused[:, 1],
        "parameter": nn.Parameter(q),
    }
    save(tmp_path / "a.safetensors", tensors)
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    assert all(same(checkpoint.read(name), tensors[name]) for name in tensors)


@pytest.mark.skipif(os.name == "nt", reason="rights are those of POSIX")
def test_a_new_file_has_the_rights_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    save(tmp_path / "a.safetensors", {"a": torch.ones(1)})
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_loaded_network_does_not_depend_on_its_file(tmp_path):
    config = CLIPConfig(vocab_size=11, width=4, mlp_size=6, num_layers=2, num_heads=2, max_length=9)
    save_network(CLIP, tmp_path, config, CLIPTextEncoder(config).state_dict())
    network = load_clip(tmp_path, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    (file,) = tmp_path.glob("*.safetensors")
    with file.open("r+b") as writer:
        writer.write(bytes(file.stat().st_size))
    assert all(tensor.equal(before[name]) for name, tensor in network.state_dict().items())


def test_index_follows_the_official_style(tmp_path):
    tensors = {"b": torch.ones(4), "a": torch.ones(4)}
    path = save_sharded(tmp_path, tensors, "diffusion_pytorch_model", max_shard_bytes=16)
    assert path.name == "diffusion_pytorch_model.safetensors.index.json"
    assert json.loads(path.read_text()) == {
        "metadata": {"total_size": 32},
        "weight_map": {
            "a": "diffusion_pytorch_model-00001-of-00002.safetensors",
            "b": "diffusion_pytorch_model-00002-of-00002.safetensors",
        },
    }


def test_saving_again_leaves_no_stale_shards(tmp_path):
    (tmp_path / "other.safetensors.txt").write_text("kept")
    tensors = {name: torch.ones(4) for name in "abc"}
    for limit, count in ((16, 4), (32, 3), (99, 1), (16, 4)):
        save_sharded(tmp_path, tensors, "model", max_shard_bytes=limit)
        assert len(list(tmp_path.glob("model*"))) == count
        assert open_checkpoint(tmp_path).shapes.keys() == tensors.keys()
    assert (tmp_path / "other.safetensors.txt").exists()


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.safetensors"
    save(path, {"a": torch.ones(2)})
    with pytest.raises(ValueError, match="'bad' of torch.complex64"):
        save(path, {"a": torch.zeros(2), "bad": torch.zeros(1, dtype=torch.complex64)})
    with pytest.raises(ValueError, match="'hollow' of torch.float32 on meta"):
        save_sharded(tmp_path, {"a": torch.zeros(2), "hollow": torch.empty(1, device="meta")}, "a", 8)
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    assert open_checkpoint(path).read("a").tolist() == [1, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"\x10\0\0", "holds 3 bytes"),
        (b"<!DOCTYPE html><html>Please log in</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        (b"PK\x03\x04\x00\x00\x08\x08\x00\x00", "pickles are never read"),
        (b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20", "pickles are never read"),
        (b"GGUF\x03\0\0\0\1\0\0\0", "GGUF"),
        (b'{"weight_map": {}}', "JSON file"),
        (b"some other binary", "not a .safetensors file: Error while deserializing header: header too large"),
        (raw(b"{}", length=1 << 60), "header too large"),
        (raw(b"{}", length=1000), "truncated: the header alone needs 1008 bytes, the file holds 10"),
        (raw(b'{"a": '), "damaged, download it again: Error while deserializing header: invalid JSON"),
        (raw(b'{"\xff": 1}'), "invalid UTF-8"),
        (raw(b'{"a":' * 100_000), "recursion limit"),
        (raw([1]), "invalid type: sequence"),
        (raw({"a": 3}), "invalid type: integer `3`"),
        (raw({"a": {"dtype": "F32", "shape": [1]}}), "data_offsets"),
        (raw({"a": f32(2) | {"dtype": "Q4"}}, bytes(8)), "Q4"),
        (raw({"a": f32(2) | {"shape": [-1, -2]}}, bytes(8)), "integer `-1`"),
        (raw({"a": f32(2) | {"shape": [3]}}, bytes(8)), "invalid shape, data type, or offset for tensor"),
        (raw({"a": f32(1 << 40)}, bytes(8)), "truncated"),
        (raw({"a": f32(2)}, bytes(7)), "1 of 1 tensors are incomplete"),
        (raw({"a": f32(2), "b": f32(1, at=8)}, bytes(8)), "1 of 2 tensors are incomplete"),
        (raw({"a": f32(2)}, bytes(9)), "file not fully covered"),
        (raw({"a": f32(2), "b": f32(1, at=4)}, bytes(8)), "invalid offset for tensor `b`"),
        (raw({"a": f32(2), "b": f32(1, at=9)}, bytes(13)), "invalid offset for tensor `b`"),
        (raw({"__metadata__": {"x": 1}}), "expected a string"),
        (raw({"a": f32(2) | {"data_offsets": ["0", None]}}, bytes(8)), "damaged"),
    ],
)  # fmt: skip
def test_bad_files_say_what_they_are(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert message in error_of(path)


@given(st.binary(max_size=200))
def test_no_bytes_crash_the_reader(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("fuzz") / "a.safetensors"
    path.write_bytes(content)
    try:
        open_checkpoint(path)
    except CheckpointError:
        pass


@given(st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), JSON, max_size=3))
def test_no_header_crashes_the_reader(tmp_path_factory, header):
    path = tmp_path_factory.mktemp("fuzz") / "a.safetensors"
    path.write_bytes(raw(header, bytes(16)))
    with pytest.raises(CheckpointError):
        open_checkpoint(path)


def test_types_that_no_weight_has_are_refused_by_name(tmp_path):
    bad = {"a": torch.zeros(1, dtype=torch.complex64), "b": torch.zeros(2).to(torch.float8_e8m0fnu)}
    save_file(bad | {"c": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "a.safetensors")
    assert sorted(caught.value.problems) == [
        "tensor 'a' of type C64 is not supported",
        "tensor 'b' of type F8_E8M0 is not supported",
    ]


def test_tensors_come_in_file_order(tmp_path):
    save(tmp_path / "a.safetensors", {name: torch.full((2,), i) for i, name in enumerate("cab")})
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    places = [checkpoint.read(name).data_ptr() for name in sorted("abc", key=checkpoint.position)]
    assert places == sorted(places) and len(set(places)) == 3


def test_folder_prefers_the_plain_name_and_refuses_a_guess(tmp_path):
    assert "holds no .safetensors file" in error_of(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "pytorch_model.bin cannot be used" in error_of(tmp_path)
    save(tmp_path / "model.fp16.safetensors", {"a": torch.ones(1)})
    assert open_checkpoint(tmp_path).path.name == "model.fp16.safetensors"
    save(tmp_path / "model.safetensors", {"a": torch.ones(1)})
    assert open_checkpoint(tmp_path).path.name == "model.safetensors"
    save(tmp_path / "ema.safetensors", {"a": torch.ones(1)})
    several = "several checkpoints (ema.safetensors, model.fp16.safetensors, model.safetensors)"
    assert several in error_of(tmp_path)
    assert "no such file or folder" in error_of(tmp_path / "absent.safetensors")


def test_every_problem_of_every_shard_is_listed(tmp_path):
    index = save_sharded(tmp_path, {f"w.{i}": torch.ones(4) for i in range(5)}, "model", max_shard_bytes=16)
    names = [f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)]
    (tmp_path / names[0]).unlink()
    (tmp_path / names[1]).write_bytes((tmp_path / names[1]).read_bytes()[:-1])
    (tmp_path / names[2]).write_bytes(b"<html></html>")
    save(tmp_path / names[3], {"other": torch.ones(1)})
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    problems = "\n".join(caught.value.problems)
    assert str(index) in str(caught.value)
    assert len(caught.value.problems) == 5
    expected = (
        f"{names[0]} is missing (1 tensors)",
        f"{names[1]}: truncated",
        f"{names[2]}: not a .safetensors",
        f"{names[3]} lacks w.3",
        f"{names[3]} also holds other",
    )
    for part in expected:
        assert part in problems
    index.unlink()
    assert "shards but no *.safetensors.index.json" in error_of(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("[]", "a JSON object was expected"),
        ("{", "not JSON"),
        ("{}", "not a shard index"),
        ('{"weight_map": {}}', "not a shard index"),
        ('{"weight_map": {"a": 1}}', "not a shard index"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "not a plain file name"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "not a plain file name"),
        ('{"weight_map": {"a": ".."}}', "not a plain file name"),
    ],
)
def test_bad_indexes(tmp_path, index, message):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(index)
    assert message in error_of(path)


def test_json_round_trip(tmp_path):
    write_json(tmp_path / "a.json", {"b": [1], "a": None})
    assert read_json(tmp_path / "a.json") == {"a": None, "b": [1]}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_fold_shortens_runs():
    names = [f"x.{i}.w" for i in (0, 1, 2, 5)] + ["x.7.b", "y"]
    assert fold((n, "[3]") for n in names) == ["x.7.b [3]", "x.{0-2,5}.w [3]", "y [3]"]
    assert fold([]) == []


def test_long_reports_are_cut_but_complete_in_problems():
    error = CheckpointError("f", *[f"p{i}" for i in range(100)])
    assert len(error.problems) == 100
    assert "100 problems" in str(error) and "... and 60 more" in str(error)


def test_tensors_of_unaligned_files_are_read(tmp_path):
    """Writers before safetensors 0.3 did not pad the header."""
    data = torch.arange(6, dtype=torch.float32)
    header = {"a": f32(2, 3), "b": f32(0, at=24)}
    text = json.dumps(header).encode()
    text += b" " * (1 - len(text) % 4)
    assert (8 + len(text)) % 4
    (tmp_path / "a.safetensors").write_bytes(raw(text, data.numpy().tobytes()))
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    assert torch.equal(checkpoint.read("a"), data.reshape(2, 3)) and checkpoint.read("b").shape == (0,)


@pytest.mark.parametrize("other", [{"b": torch.ones(3)}, {"a": torch.ones(4)}, {"a": torch.ones(3).half()}])
def test_a_file_that_was_replaced_is_not_read(tmp_path, other):
    save(tmp_path / "a.safetensors", {"a": torch.ones(3)})
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    save(tmp_path / "a.safetensors", other)
    with pytest.raises(CheckpointError, match="changed since it was opened"):
        checkpoint.read("a")
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read any more"):
        checkpoint.read(next(iter(other)))


def test_parts_and_what_is_out_of_sight(tmp_path):
    save(tmp_path / "a.safetensors", {"x.a": torch.ones(1), "x.b": torch.zeros(1), "y": torch.ones(2)})
    part = open_checkpoint(tmp_path / "a.safetensors").under("x.")
    assert part.shapes == {"a": (1,), "b": (1,)} and part.read("b") == 0
    bare = part.without({"b"})
    assert set(bare.tensors) == {"a"} and bare.read("b") == 0 and bare.read("a") == 1
    with pytest.raises(KeyError):
        bare.read("y")


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="Linux: elsewhere holes may take space")
def test_files_larger_than_memory_are_read(tmp_path):
    """A mapping reserves no memory: 256 GB, of which one row is touched."""
    rows = 1 << 26
    write_sparse(tmp_path / "a.safetensors", {"big": (rows, 1024), "small": (3,)}, "F32", 4)
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    assert checkpoint.read("big")[rows - 1].sum() == 0 and checkpoint.read("small").shape == (3,)


def test_a_config_of_a_strange_size_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": 12}')
    assert read_json(tmp_path / "config.json") == {"hidden_size": 12}
    monkeypatch.setattr("bokehflux.weights.files.checkpoint.MAX_HEADER_BYTES", 17)
    with pytest.raises(CheckpointError, match="larger than 17 bytes: not a config or an index"):
        read_json(tmp_path / "config.json")


def test_what_is_being_written_is_known_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.tmp", ".a.tmp", ".a.x.tmp", "a.json.1.tmp", ".a.json.1.tmp.old"):
        (tmp_path / name).touch()
    with replacing(tmp_path / "b.json") as temporary:
        temporary.write_text("{}")
        assert unfinished(tmp_path) == {temporary: 2}
        found = [temporary, tmp_path / ".c.json.7.tmp"]  # finished by another process meanwhile
        monkeypatch.setattr(Path, "rglob", lambda *_: iter(found))
        assert unfinished(tmp_path) == {temporary: 2}
        monkeypatch.undo()
    assert not unfinished(tmp_path) and (tmp_path / "b.json").read_text() == "{}"
