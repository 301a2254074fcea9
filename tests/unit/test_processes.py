"""Commands in several processes, as they are started: their files are those of one process, and a process
that is killed ends the run or is replaced."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from bokehflux.app import cli
from bokehflux.pictures.metadata import read_recipe
from tests.faults.child import needs_linux

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--prompt", "a red mug", "--device", "cpu", "--num-inference-steps", "2", "--pivot", "15"]
SHORT = ["generate", *SMALL, "--levels", "0"]
SWEEP = ["sweep", *SMALL, "--levels", "0", "20", "--seeds", "1", "2", "3"]
pytestmark = [
    needs_linux,
    pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed"),
]


def begun(folder: Path, *words: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "bokehflux", *words]
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


def run_python(script: str, folder: Path) -> str:
    """What a script prints in a Python of its own."""
    command = [sys.executable, "-c", textwrap.dedent(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=folder, env=environment, check=True, capture_output=True, text=True
    ).stdout


def process(parent: int, rank: int) -> int | None:
    """Its number, once it is there."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            environment = path.read_bytes().split(b"\0")
            status = path.with_name("status").read_text()
        except OSError:
            continue
        if f"PPid:\t{parent}\n" in status and f"RANK={rank}".encode() in environment:
            return int(path.parent.name)
    return None


def killed(run: subprocess.Popen[str], rank: int, folder: Path, seen: str) -> str:
    """What is said after a process was killed by SIGKILL, as soon as a file was there."""
    end = time.monotonic() + 200
    while not list(folder.glob(seen)):
        assert time.monotonic() < end and run.poll() is None, run.communicate()[1]
        time.sleep(0.02)
    child = process(run.pid, rank)
    assert child is not None
    os.kill(child, signal.SIGKILL)
    return run.communicate(timeout=200)[1]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a sweep in one process."""
    folder = tmp_path_factory.mktemp("one")
    assert cli.main([*SWEEP, "--output", str(folder)]) == 0
    return files(folder)


def test_scenes_of_a_killed_process_are_made_by_the_other(tmp_path: Path, one: dict[str, bytes]) -> None:
    """The files of both together are those of one process: pages, grids and views, too."""
    run = begun(tmp_path, *SWEEP, "--gpus", "2", "--output", "two")
    said = killed(run, 1, tmp_path, "two/*/bokeh-*.png")
    assert "process 1 of 2 was killed (SIGKILL)" in said and "go to the other 1" in said
    assert run.returncode == 0
    # A killed process cannot take away what it was writing.
    found = {name: data for name, data in files(tmp_path / "two").items() if "/.bokehflux-" not in name}
    assert found == one


def test_rows_in_two_processes_leave_the_files_of_one(tmp_path: Path) -> None:
    """... which takes as many at once, as the recipe says."""
    words = ["generate", *SMALL, "--levels", "0", "10", "20"]
    run = begun(tmp_path, *words, "--gpus", "2", "--output", "two")
    assert (run.communicate(timeout=300)[1], run.returncode) == ("", 0)
    assert cli.main([*words, "--max-rows", "2", "--output", str(tmp_path / "one")]) == 0
    assert files(tmp_path / "two") == files(tmp_path / "one")
    assert read_recipe(tmp_path / "two" / "bokeh-00.0.png")["max_rows"] == 2


def test_no_thread_of_a_group_is_left(tmp_path: Path) -> None:
    """Whatever is imported in it, and what refers to itself: one that was left could abort Python's end."""
    script = """
        from pathlib import Path
        from torch import distributed, ones
        from bokehflux.app.processes import group
        def threads():
            names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
            return [name for name in names if "gloo" in name]
        with group("gloo", store=distributed.HashStore(), rank=0, world_size=1):
            import torch.distributed.nn
            held = [distributed.group.WORLD]
            held.append(held)
            distributed.all_reduce(ones(3))
            del held
            print(len(threads()) > 0)
        print(threads())
        """
    assert run_python(script, tmp_path) == "True\n[]\n"


def test_a_killed_process_ends_the_run(tmp_path: Path) -> None:
    words = ["generate", *SMALL, "--num-inference-steps", "1000", "--levels", "0", "--preview", "seen.png"]
    run = begun(tmp_path, *words, "--gpus", "2", "--split", "tokens")
    said = killed(run, 1, tmp_path, "seen.png")
    assert (
        said == "bokehflux: error: process 1 of 2 was killed (SIGKILL), and the others were ended with it\n"
    )
    assert run.returncode == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([*SHORT, "--gpus", "0"], "--gpus must be at least 1, got 0"),
        ([*SHORT, "--gpus", "2", "--split", "scenes"], "--split scenes is for sweeps"),
        (["generate", "--prompt", "a", "--gpus", "99", "--device", "cuda"], "--gpus 99: this machine shows"),
        (["generate", "--prompt", "a", "--gpus", "2", "--device", "cuda:1"], "--gpus takes --device cuda"),
        ([*SWEEP, "--gpus", "2", "--preview", "x.png"], "--preview shows one scene"),
    ],
)  # fmt: skip
def test_what_cannot_be_shared_is_refused(
    tmp_path: Path, words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*words, "--output", str(tmp_path)]) == 2
    assert says in capsys.readouterr().err


def test_a_preview_of_several_scenes_is_refused_under_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where nobody says --gpus."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("bokehflux.app.processes._joined", None)
    assert cli.main([*SWEEP, "--preview", "x.png", "--output", str(tmp_path)]) == 2
    assert "--preview shows one scene" in capsys.readouterr().err
