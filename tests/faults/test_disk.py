"""Disks that are full or locked, for real: one line, the old files whole, nothing half-written."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from ast import literal_eval
from pathlib import Path

import pytest
import torch
from PIL import Image

from bokehflux.pictures.metadata import read_recipe
from bokehflux.weights.files.checkpoint import open_checkpoint
from bokehflux.weights.files.write import save, save_sharded
from tests.faults.child import forked, needs_linux
from tests.faults.runs import generate, sweep

pytestmark = needs_linux
NOBODY = 65534


def limit_files(size: int) -> None:
    """No file may grow beyond this: what a full disk is to one file."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def whole(folder: Path) -> list[str]:
    """Names of the files of a folder, after reading every one; hidden ones too."""
    for path in folder.rglob("*"):
        if path.suffix in (".png", ".webp", ".gif"):
            assert read_recipe(path)
            with Image.open(path) as image:
                image.load()
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_a_file_system_without_room(tmp_path):
    """A real one, of 800 KB, in a namespace of its own: filled with sweeps until one fails."""
    if os.geteuid():
        pytest.skip("only root may mount")
    script = """
        mount -t tmpfs -o size=800k full "$1" || exit 77
        "$2" -m tests.faults.runs "$1" && cp -r "$1" "$3"
    """
    (tmp_path / "mnt").mkdir()
    root = Path(__file__).resolve().parents[2]
    command = [
        "unshare",
        "-m",
        "sh",
        "-c",
        script,
        "sh",
        str(tmp_path / "mnt"),
        sys.executable,
        str(tmp_path / "copy"),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=100)
    except FileNotFoundError:
        pytest.skip("no unshare")
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"cannot mount here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    code, finished, err = literal_eval(done.stdout.splitlines()[-1])
    assert code == 1 and finished >= 1
    assert err.startswith("bokehflux: error: [Errno 28] No space left on device") and "out" in err
    names = whole(tmp_path / "copy")
    assert names and not any(".tmp" in name for name in names)


@pytest.mark.parametrize("room", [100, 2_000, 20_000])
def test_pictures_that_do_not_fit_leave_those_of_before(tmp_path, room):
    assert generate(tmp_path, "out")[0] == 0
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def again() -> object:
        limit_files(room)
        return generate(tmp_path, "out", side=512)

    code, said = forked(again)
    assert code == 0 and "File too large" in said and said.startswith("(1, "), said
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_checkpoints_that_do_not_fit_leave_the_old_one(tmp_path):
    save(tmp_path / "a.safetensors", {"a": torch.ones(3)})
    index = save_sharded(tmp_path / "many", {n: torch.ones(99) for n in "abc"}, "model", max_shard_bytes=400)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def again() -> str:
        limit_files(10_000)
        large = {n: torch.zeros(9 if n == "a" else 10_000) for n in "abc"}
        for write in (
            lambda: save(tmp_path / "a.safetensors", large),
            lambda: save_sharded(tmp_path / "many", large, "model", max_shard_bytes=400),
        ):
            try:
                write()
            except Exception as error:
                assert "too large" in str(error).lower(), error
            else:
                raise AssertionError("it fitted")
        return ""

    assert forked(again) == (0, "")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert open_checkpoint(index).read("c").tolist() == [1] * 99


def as_nobody(folder: Path) -> None:
    """Give up root's rights, which folders cannot keep out. Paths of tests are private: enter first."""
    os.chdir(folder)
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


@pytest.mark.parametrize("command", [generate, sweep])
@pytest.mark.parametrize("where", ["locked", "locked/below", "file", "file/below"])
def test_a_folder_that_may_not_be_written(tmp_path, command, where):
    tmp_path.chmod(0o755)
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked" / "old.png").write_bytes(b"old")
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "locked").chmod(0o555)

    def locked_out() -> object:
        as_nobody(tmp_path)
        return command(None, where)

    code, said = forked(locked_out)
    assert code == 0, said
    result, _, err = literal_eval(said)
    assert result == 2 and err.startswith(f"bokehflux: error: cannot write to output folder {where}: ")
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == [
        "file",
        "locked",
        "locked/old.png",
    ]


def test_a_folder_that_is_locked_halfway(tmp_path):
    """Found to be writable, then locked while the pictures were made."""
    tmp_path.chmod(0o777)

    def locked_out() -> object:
        as_nobody(tmp_path)
        os.mkdir("out")
        return generate(None, "out", during=lambda: os.chmod("out", 0o555))

    code, said = forked(locked_out)
    assert code == 0, said
    result, out, err = literal_eval(said)
    assert (result, out) == (1, "") and "Permission denied" in err and err.count("\n") == 1
    assert list((tmp_path / "out").iterdir()) == []
