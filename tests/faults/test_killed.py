"""Killed at any moment, or two at once: what has a name is whole, and what was finished stays."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from bokehflux.pictures.metadata import read_recipe
from bokehflux.weights.files.checkpoint import CheckpointError, open_checkpoint
from bokehflux.weights.files.write import save, save_sharded, write_json
from tests.faults.child import finish, forked, needs_linux, start
from tests.faults.runs import sweep

pytestmark = needs_linux


def files(folder: Path) -> dict[str, bytes]:
    """Visible files: hidden ones are what a killed process leaves."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and not p.name.startswith(".")
    }


def die_at(names: list[str], calls: int) -> Callable[[], None]:
    """Patch functions of `os`, so that the process is killed at the start of their call number `calls`."""
    count = [0]

    def patch() -> None:
        for name in names:
            real = getattr(os, name)

            def counted(*args, real=real, **kwargs):
                count[0] += 1
                if count[0] == calls:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            setattr(os, name, counted)

    return patch


@pytest.mark.parametrize("calls", range(1, 30, 3))
def test_a_sweep_that_is_killed_keeps_what_was_finished_and_is_continued(tmp_path, calls):
    """At every third point at which a file gets its contents or its name."""

    def killed() -> object:
        die_at(["fsync", "replace", "link"], calls)()
        return sweep(tmp_path, "out", seeds=2)

    code, said = forked(killed)
    assert code == -signal.SIGKILL, said
    kept = files(tmp_path)
    for name in kept:
        if name.endswith("png"):
            assert read_recipe(tmp_path / name)
            Image.open(tmp_path / name).load()
    pictures = {name: data for name, data in kept.items() if "bokeh-" in name}
    assert sweep(tmp_path, "out", seeds=2)[0] == 0
    after = files(tmp_path)
    assert all(after[name] == data for name, data in pictures.items())
    # Nothing was made twice: two scenes of two levels and a pivot.
    assert len([name for name in after if "bokeh-" in name]) == 6


@pytest.mark.parametrize("delay_ms", [1, 4, 9, 16, 25])
def test_a_checkpoint_that_is_killed_while_written(tmp_path, delay_ms):
    """By the clock, in the middle of megabytes."""
    path = tmp_path / "x.safetensors"
    save(path, {"a": torch.ones(10)})
    large = {"a": torch.zeros(3_000_000)}

    def forever() -> None:
        while True:
            save(path, large)

    child, receive = start(forever)
    time.sleep(delay_ms / 1000)
    os.kill(child, signal.SIGKILL)
    assert finish(child, receive)[0] == -signal.SIGKILL
    a = open_checkpoint(path).read("a")
    assert (len(a), float(a[0])) in ((10, 1.0), (3_000_000, 0.0))
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["x.safetensors"]
    assert open_checkpoint(tmp_path).path == path


@pytest.mark.parametrize("calls", range(1, 4))
def test_a_first_save_in_shards_that_is_killed_is_no_checkpoint(tmp_path, calls):
    def killed() -> None:
        die_at(["replace"], calls)()
        save_sharded(tmp_path, {n: torch.ones(4) for n in "abc"}, "model", max_shard_bytes=16)

    assert forked(killed)[0] == -signal.SIGKILL
    with pytest.raises(CheckpointError, match="incomplete|holds no"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("calls", range(2, 4))
def test_a_second_save_in_shards_that_is_killed_mixes_nothing(tmp_path, calls):
    """The old checkpoint or the new one, or an error: never some weights of each."""
    save_sharded(tmp_path, {n: torch.zeros(4) for n in "abc"}, "model", max_shard_bytes=16)

    def killed() -> None:
        die_at(["replace"], calls)()
        save_sharded(tmp_path, {n: torch.ones(4) for n in "abc"}, "model", max_shard_bytes=16)

    assert forked(killed)[0] == -signal.SIGKILL
    try:
        checkpoint = open_checkpoint(tmp_path)
    except CheckpointError:
        return
    assert len({float(checkpoint.read(n)[0]) for n in "abc"}) == 1


def test_two_sweeps_in_one_folder(tmp_path):
    """The same command twice at once: every scene is there once more at most, and every file is whole."""
    running = [start(lambda: sweep(tmp_path, "out", seeds=2)) for _ in range(2)]
    for child in running:
        code, said = finish(*child)
        assert code == 0 and said.startswith("(0, "), said
    found = files(tmp_path)
    for name in found:
        if name.endswith((".png", ".webp", ".gif")):
            assert read_recipe(tmp_path / name)
            Image.open(tmp_path / name).load()
    assert not [p for p in tmp_path.rglob(".*")]
    assert 6 <= len([name for name in found if "bokeh-" in name]) <= 12
    assert found["out/index.html"].rstrip().endswith(b"</html>")


def test_two_processes_that_save_one_checkpoint(tmp_path):
    """The last one wins, whole; no reader sees anything else meanwhile."""
    path = tmp_path / "x.safetensors"
    save(path, {"a": torch.zeros(100_000)})

    def writer(value: int) -> Callable[[], None]:
        def write() -> None:
            for _ in range(25):
                save(path, {"a": torch.full((100_000 + value,), float(value))})
                write_json(tmp_path / "config.json", {"value": [value] * 999})

        return write

    running = [start(writer(value)) for value in (1, 2)]
    for _ in range(40):
        try:
            a = open_checkpoint(path).read("a")
        except CheckpointError as error:  # replaced between its header and its data
            assert "changed since it was opened" in str(error)
        else:
            assert len(a) == 100_000 + int(a[0]) and a.eq(a[0]).all()
    for child in running:
        code, said = finish(*child)
        assert code == 0, said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "x.safetensors"]
    assert len(set(open_checkpoint(path).config()["value"])) == 1  # type: ignore[index]
