"""Checkpoints from strangers: refused in words, never a crash, never more memory than they fill."""

from __future__ import annotations

import json
import resource
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bokehflux.weights.describe import describe
from bokehflux.weights.files.checkpoint import CheckpointError, open_checkpoint
from bokehflux.weights.files.gguf import GgufFile
from bokehflux.weights.files.write import save, save_sharded
from tests import model_files
from tests.faults.child import forked
from tests.fuzz.hostile import HUGE, JSON, raw

NAMES = ["a", "b.weight", "é\0", "__metadata__", "../x", "\x1b[2J"]
NUMBERS = st.sampled_from([0, 1, 2, 4, 8, 12, 16, -1, 2**32, *HUGE]) | st.integers(-4, 70)
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "BOOL", "U64", "f32", "", "F6_E2M3", "C64"])
        | JSON,
        "shape": st.lists(NUMBERS, max_size=4) | JSON,
        "data_offsets": st.lists(NUMBERS, max_size=3) | JSON,
        "extra": JSON,
    },
)
VALID = {"a": torch.arange(6.0).view(2, 3), "b.weight": torch.ones(4).bfloat16(), "c": torch.tensor(7)}


def read_all(path: Path) -> None:
    """Open and read whatever a file claims to hold."""
    try:
        checkpoint = open_checkpoint(path)
        for name, info in checkpoint.tensors.items():
            tensor = checkpoint.read(name)
            assert info.packing is not None or tuple(tensor.shape) == info.shape
            assert tensor.nbytes <= path.stat().st_size
    except CheckpointError as error:
        assert error.problems and all(problem.strip() for problem in error.problems)


@settings(max_examples=150)
@given(st.dictionaries(st.sampled_from(NAMES), ENTRIES, max_size=4), st.integers(0, 64))
def test_any_header_is_read_or_refused(tmp_path_factory, header, size):
    path = tmp_path_factory.mktemp("header") / "a.safetensors"
    path.write_bytes(raw(header, bytes(size)))
    read_all(path)


@settings(max_examples=150)
@given(st.data())
def test_a_damaged_file_is_read_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damaged") / "a.safetensors"
    save(path, VALID)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    read_all(path)


@pytest.mark.parametrize(
    "spans",
    [
        [(0, 8), (0, 8)],
        [(0, 8), (4, 12)],
        [(8, 0)],
        [(4, 12)],
        [(0, 8), (8, 8)],
        [(-8, 0)],
        [(0, 2**63), (8, 16)],
    ],
    ids=str,
)
def test_tensors_may_not_overlap_leave_gaps_or_lie_outside(tmp_path, spans):
    header = {
        str(i): {"dtype": "F32", "shape": [2], "data_offsets": [start, end]}
        for i, (start, end) in enumerate(spans)
    }
    (tmp_path / "a.safetensors").write_bytes(raw(header, bytes(16)))
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / "a.safetensors")


BOMBS: dict[str, bytes] = {
    "header of an exabyte": raw(b"{}", length=1 << 60),
    "header of 99 MB that is not there": raw(b"{}", length=99_000_000),
    "negative length": raw(b"{}", length=(1 << 64) - 1),
    "tensor of an exabyte": raw({"a": {"dtype": "F32", "shape": [1 << 58], "data_offsets": [0, 1 << 60]}}),
    "shape that overflows": raw(
        {"a": {"dtype": "F32", "shape": [1 << 62] * 9, "data_offsets": [0, 8]}}, bytes(8)
    ),
    "empty of huge shape": raw({"a": {"dtype": "F32", "shape": [0, 1 << 62], "data_offsets": [0, 0]}}),
    "deep": raw(b'{"a":' * 300_000),
    "a million dimensions": raw(
        {"a": {"dtype": "F32", "shape": [1] * 100_000, "data_offsets": [0, 4]}}, bytes(4)
    ),
}
GGUF_BOMBS = {
    f"gguf {what}": b"GGUF" + struct.pack("<IQQ", 3, tensors, values) + rest
    for what, tensors, values, rest in (
        ("of 2^60 tensors", 1 << 60, 0, b""),
        ("of 2^60 values", 0, 1 << 60, b""),
        ("name of 2^60 bytes", 1, 0, struct.pack("<Q", 1 << 60)),
        ("array of 2^60 texts", 0, 1, struct.pack("<Q1sIIQ", 1, b"k", 9, 8, 1 << 60)),
        ("tensor of 2^62 numbers", 1, 0, struct.pack("<Q1sIQIQ", 1, b"t", 1, 1 << 62, 0, 0)),
        ("shape that overflows", 1, 0, struct.pack("<Q1sIQQQQIQ", 1, b"t", 4, *[1 << 62] * 4, 0, 0)),
    )
}


@pytest.mark.parametrize("what", [*BOMBS, *GGUF_BOMBS])
def test_no_number_in_a_header_makes_us_allocate(tmp_path, what):
    path = tmp_path / ("a.gguf" if what in GGUF_BOMBS else "a.safetensors")
    path.write_bytes((BOMBS | GGUF_BOMBS)[what])

    def peak() -> str:
        tracemalloc.start()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        read_all(path)
        # Python's own memory, and that of the libraries: kilobytes on Linux.
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        return f"{tracemalloc.get_traced_memory()[1]} {grown}"

    code, said = forked(peak)
    assert code == 0, said
    traced, grown_kb = map(int, said.split())
    assert traced < 20 * path.stat().st_size + 4_000_000 and grown_kb < 120_000


def test_a_gguf_bomb_is_refused_and_not_only_skipped(tmp_path):
    for name, content in GGUF_BOMBS.items():
        (tmp_path / "a.gguf").write_bytes(content)
        with pytest.raises(ValueError, match="truncated|damaged"):
            GgufFile(tmp_path / "a.gguf")
            raise AssertionError(name)


FILES = st.sampled_from(
    [
        "../x.safetensors",
        "/etc/passwd",
        "..",
        ".",
        "",
        "a/b.safetensors",
        "./s.safetensors",
        "\\x",
        "C:x",
        "\0",
        "s.safetensors\0",
        "~",
        "no.safetensors",
        "s.safetensors",
        "s.bin",
        "model.safetensors.index.json",
    ]
)


@settings(max_examples=80)
@given(st.dictionaries(st.text(max_size=3), FILES | JSON, max_size=4) | JSON, JSON)
def test_a_shard_index_names_files_beside_it_or_is_refused(tmp_path_factory, weight_map, metadata):
    folder = tmp_path_factory.mktemp("index") / "inner"
    folder.mkdir()
    for path in (folder / "s.safetensors", folder.parent / "x.safetensors"):
        save(path, {"": torch.ones(1)})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map, "metadata": metadata}))
    try:
        checkpoint = open_checkpoint(index)
    except CheckpointError as error:
        assert error.problems
    else:
        assert {info.file for info in checkpoint.tensors.values()} == {folder / "s.safetensors"}


def test_a_shard_whose_name_no_file_can_have(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "x" * 5000}}))
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / "model.safetensors.index.json")


@pytest.mark.parametrize(
    "target", ["/etc/passwd", "/dev/zero", "../secret.txt", "model.safetensors.index.json", "."]
)
def test_a_shard_that_is_a_link_to_something_else_is_refused_without_its_contents(tmp_path, target):
    """Links are followed, as in the Hugging Face cache; a file that is not a checkpoint stays unseen."""
    (tmp_path / "secret.txt").write_text("root:hunter2:password\n" * 9)
    folder = tmp_path / "model"
    index = save_sharded(folder, {"a": torch.ones(4), "b": torch.ones(4)}, "model", max_shard_bytes=16)
    shard = folder / "model-00001-of-00002.safetensors"
    shard.unlink()
    shard.symlink_to(target)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(index)
    assert "root:" not in str(caught.value)


def test_shards_of_the_hugging_face_cache_are_links_and_are_read(tmp_path):
    index = save_sharded(
        tmp_path / "blobs", {"a": torch.ones(4), "b": torch.ones(4)}, "model", max_shard_bytes=16
    )
    snapshot = tmp_path / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    for file in index.parent.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert open_checkpoint(snapshot).read("b").tolist() == [1] * 4


PARTS = {name: load for name, load in model_files.LOADERS.items() if name != "transformer"}
STATES = model_files.states()


@settings(max_examples=60)
@given(st.sampled_from(sorted(PARTS)), st.data())
def test_networks_of_any_shapes_load_or_are_refused(tmp_path_factory, part, data):
    """Bare files are configured by their shapes: every one of them may be wrong."""
    path = tmp_path_factory.mktemp("shapes") / "a.safetensors"
    tensors: dict[str, Any] = dict(STATES[part])
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(tensors)))
        shape = data.draw(st.none() | st.lists(st.sampled_from([0, 1, 2, 3, 64, 4096]), max_size=3))
        if shape is None:
            del tensors[name]
        elif torch.Size(shape).numel() <= 1 << 20:
            tensors[name] = torch.zeros(shape, dtype=data.draw(st.sampled_from([torch.float32, torch.int8])))
    save(path, tensors)
    assert describe(path)
    try:
        PARTS[part](path, dtype=torch.float32)
    except ValueError as error:
        assert str(error)
