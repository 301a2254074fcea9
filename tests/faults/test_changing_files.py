"""Checkpoints that change while they are open: replaced, truncated, incomplete."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from bokehflux.weights.files.checkpoint import CheckpointError, open_checkpoint
from bokehflux.weights.files.write import save, save_sharded
from bokehflux.weights.networks import CLIP
from bokehflux.weights.save import save_network
from tests import model_files
from tests.faults.child import forked, needs_linux

LARGE = {"a": torch.ones(50_000), "b": torch.full((50_000,), 2.0)}


def test_a_file_that_is_replaced_is_read_as_it_was(tmp_path):
    """A download of a new version renames over the old one: what is mapped stays what it was."""
    path = tmp_path / "x.safetensors"
    save(path, LARGE)
    checkpoint = open_checkpoint(path)
    a = checkpoint.read("a")
    save(path, {"a": torch.zeros(50_000), "b": torch.zeros(50_000)})
    assert a.eq(1).all() and checkpoint.read("b").eq(2).all()
    path.unlink()
    assert checkpoint.read("b").eq(2).all()


@pytest.mark.parametrize("size", [0, 7, 40, 1000, -4, -1])
def test_a_file_that_was_cut_before_it_is_read(tmp_path, size):
    path = tmp_path / "x.safetensors"
    save(path, LARGE)
    checkpoint = open_checkpoint(path)
    os.truncate(path, size % path.stat().st_size)
    with pytest.raises(CheckpointError, match="changed since it was opened|cannot be read any more"):
        checkpoint.read("b")


@needs_linux
def test_a_file_that_is_cut_while_it_is_mapped(tmp_path):
    """Copied over in place: reading past the new end kills the process, so the end is looked at first."""
    path = tmp_path / "x.safetensors"
    save(path, LARGE)

    def read_after_cut() -> str:
        checkpoint = open_checkpoint(path)
        checkpoint.read("a")
        os.truncate(path, 1000)
        try:
            return str(float(checkpoint.read("b").sum()))
        except CheckpointError as error:
            return str(error)

    code, said = forked(read_after_cut)
    assert code == 0 and "changed since it was opened" in said


@pytest.mark.parametrize("cut", [1, 50, 400, -1])
def test_a_model_with_a_truncated_shard_is_refused_before_it_is_read(tmp_path, monkeypatch, cut):
    torch.manual_seed(0)
    state = model_files.random_state(model_files.CLIPTextEncoder(model_files.CLIP))
    save_network(CLIP, tmp_path, model_files.CLIP, state)
    (tmp_path / "model.safetensors").unlink()
    save_sharded(tmp_path, state, "model", max_shard_bytes=200_000)
    model_files.load_clip(tmp_path)
    shards = sorted(tmp_path.glob("*-of-*"))
    assert len(shards) > 1
    os.truncate(shards[-1], cut % shards[-1].stat().st_size)
    monkeypatch.setattr("bokehflux.weights.files.checkpoint.Checkpoint.read", lambda *_: pytest.fail("read"))
    with pytest.raises(CheckpointError, match=rf"shard {shards[-1].name}: (truncated|not a)") as caught:
        model_files.load_clip(tmp_path)
    assert len(caught.value.problems) == 1


@needs_linux
def test_memory_that_a_network_took_does_not_follow_its_file(tmp_path):
    """Once loaded, nothing can reach it: the file may be cut, overwritten or removed."""
    state = model_files.random_state(model_files.CLIPTextEncoder(model_files.CLIP))
    save_network(CLIP, tmp_path, model_files.CLIP, state)

    def load_and_cut() -> int:
        network = model_files.load_clip(tmp_path, dtype=torch.float32)
        os.truncate(tmp_path / "model.safetensors", 0)
        return sum(int(t.equal(state[name])) for name, t in network.state_dict().items()) - len(state)

    assert forked(load_and_cut) == (0, "0")


def test_a_folder_on_which_a_file_is_swapped_for_a_folder(tmp_path: Path):
    save(tmp_path / "x.safetensors", LARGE)
    checkpoint = open_checkpoint(tmp_path)
    (tmp_path / "x.safetensors").unlink()
    (tmp_path / "x.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="cannot be read any more"):
        checkpoint.read("a")
