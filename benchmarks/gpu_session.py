"""Several benchmarks in one lease: named jobs in turn, within a total of seconds, everything in one file.

    python -m benchmarks.gpu_session --out "$OUT" --seconds 520 --commit HASH --jobs tests attention step
    python -m benchmarks.gpu_session --out "$OUT" --jobs "step --cases pair --backend triton" generate

A job is a name of `JOBS`, options of its own program after it; one replaces the default of its name. Each job
runs in a process of its own, which is ended at its limit; the GPU is the one of CUDA_VISIBLE_DEVICES.
OUT/session.tar.gz holds results (JSON and plots) and logs, renewed after every job; unpack it into
benchmarks/results and run `benchmarks.summary`. The last lines printed are those that matter: the figures,
then how each job ended.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import summary
from benchmarks.report import Budget
from benchmarks.timing import COMMIT_VARIABLE

PRINTED_CHARACTERS = 11_000
"""Of the end of the output, where only so much of it is seen."""
RESERVE_SECONDS = 10.0
"""Kept for the last job's end, packing and printing."""
SHORTEST_SECONDS = 15.0
"""With less left no job is begun."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One program. `{out}` in an argument is the results' folder, `{seconds}` when to begin nothing more."""

    arguments: tuple[str, ...]
    limit_s: float
    """It is ended after this."""


def _bench(name: str, limit_s: float, *options: str) -> Job:
    return Job(arguments=("-m", f"benchmarks.{name}", "--out", "{out}", *options), limit_s=limit_s)


TIMED = ("--seconds", "{seconds}")
STEP_CASES = ("base", "pair, 1024", "pivot + 6, 1024", "pair, 512")
JOBS: dict[str, Job] = {
    "imports": Job(
        arguments=("-c", "import benchmarks.rivals; import fa3_fwd_interface; print('all there')"), limit_s=60
    ),
    # Most of the time of these is compiling, which several processes share.
    "tests": Job(arguments=("-m", "pytest", "tests/gpu", "-m", "gpu", "-q", "-n", "8"), limit_s=240),
    "attention": _bench("bench_attention", 170, "--repeats", "20", *TIMED),
    "step": _bench("bench_step", 290, "--repeats", "9", "--cases", *STEP_CASES, *TIMED),
    "profile": _bench("profile_step", 70),
    "profile_base": _bench("profile_step", 70, "--case", "base, 1024", "--name", "profile_base"),
    "generate": _bench("bench_generate", 300, "--sides", "1024", *TIMED),
    "generate_512": _bench("bench_generate", 200, "--sides", "512", "--name", "generate-512", *TIMED),
    "memory": _bench("bench_memory", 340, "--modes", "stream", "resident", "offload", *TIMED),
    "train_attention": _bench("bench_train_attention", 110, "--repeats", "10", *TIMED),
    "error": _bench("full_size_error", 90),
    "tiles": _bench("sweep_tiles", 200, *TIMED),
    "smoke": _bench("bench_step", 90, "--tiny", "--repeats", "1", "--cases", "pair, 32", "base, 32"),
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a job ended."""

    name: str
    status: int | None
    """Exit status; None: it was ended at its limit, or never began."""
    seconds: float
    log: Path | None
    """None: there was no time to begin it."""

    def line(self) -> str:
        how = "not begun" if self.log is None else "ENDED AT ITS LIMIT"
        if self.status is not None:
            how = "ok" if self.status == 0 else f"EXIT STATUS {self.status}"
        return f"{self.name}: {how}, {self.seconds:.0f} s"


def with_options(arguments: Sequence[str], options: Sequence[str]) -> list[str]:
    """A job's arguments, of which two name its program, and `options` in place of those of the same name."""
    given, kept, drops = {_option(word) for word in options}, list(arguments[:2]), False
    for word in arguments[2:]:
        if (name := _option(word)) is not None:  # up to the next one, words are its values
            drops = name in given
        kept += [] if drops else [word]
    return [*kept, *options]


def _option(word: str) -> str | None:
    """`--name` of "--name" or "--name=value", `-n` of "-n"; None for a value, also a negative number."""
    found = re.match(r"--?[A-Za-z][\w-]*", word)
    return found[0] if found else None


def run(name: str, options: Sequence[str], folder: Path, budget: Budget) -> Outcome:
    """Run one job; its log and results go below `folder`."""
    job = JOBS[name]
    limit = min(job.limit_s, budget.left - RESERVE_SECONDS)
    if limit < SHORTEST_SECONDS:
        return Outcome(name=name, status=None, seconds=0.0, log=None)
    log = _unused(folder / "logs" / f"{name}.log")
    filled = {"{out}": str(folder / "results"), "{seconds}": f"{0.75 * limit:.0f}"}
    arguments = [filled.get(word, word) for word in with_options(job.arguments, options)]
    begin, status = time.monotonic(), None
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # so that its own children end with it
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Outcome(name=name, status=status, seconds=time.monotonic() - begin, log=log)


def _unused(path: Path) -> Path:
    """path, or with a number where a job runs again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    number = 2
    found = path
    while found.exists():
        found = path.with_stem(f"{path.stem}-{number}")
        number += 1
    return found


def pack(folder: Path, out: Path) -> None:
    """Everything below `folder` as OUT/session.tar.gz, whole or as before."""
    out.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f"{folder.name}.tar.gz"
    with tarfile.open(temporary, "w:gz") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.add(path, arcname=path.relative_to(folder))
    target = out / "session.tar.gz"
    target.with_suffix(".new").write_bytes(temporary.read_bytes())
    os.replace(target.with_suffix(".new"), target)
    temporary.unlink()


def digest(outcomes: Sequence[Outcome], results: Path, size: int = PRINTED_CHARACTERS) -> str:
    """The end of every log, then the figures, then how each job ended; at most `size` characters."""
    ends = "\n".join(outcome.line() for outcome in outcomes)
    figures = summary.table(summary.findings(results))
    texts = {}
    for i, outcome in enumerate(outcomes):
        if outcome.log is not None:
            text = outcome.log.read_text(encoding="utf-8", errors="replace").rstrip()
            texts[i] = f"== {outcome.name}\n{text}"
    room = size - len(ends) - len(figures) - 40 - len(texts)
    shortest_first = sorted(texts, key=lambda i: len(texts[i]))  # they leave room to the others
    for number, i in enumerate(shortest_first):
        share = max(0, room) // (len(texts) - number)
        if len(texts[i]) > share:
            head = f"== {outcomes[i].name} ...\n"
            texts[i] = (head + texts[i][len(texts[i]) - max(0, share - len(head)) :])[:share]
        room -= len(texts[i])
    return "\n".join([*texts.values(), "== figures", figures, "== jobs", ends])[-size:]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", nargs="+", required=True, help=f"in this order, of: {', '.join(JOBS)}")
    parser.add_argument("--out", type=Path, required=True, help="folder for session.tar.gz")
    parser.add_argument("--seconds", type=float, default=520, help="for everything together")
    parser.add_argument("--commit", help="what the code is, where git cannot say")
    args = parser.parse_args(argv)
    budget = Budget(args.seconds)
    wanted = [shlex.split(job) for job in args.jobs]
    for words in wanted:
        if not words or words[0] not in JOBS:
            parser.error(f"no job is called {' '.join(words)!r}: there are {', '.join(JOBS)}")
    if args.commit:
        os.environ[COMMIT_VARIABLE] = args.commit
    outcomes = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "session"
        for name, *options in wanted:
            outcomes.append(run(name, options, folder, budget))
            print(f"{outcomes[-1].line()}; {budget.left:.0f} s left", flush=True)
            pack(folder, args.out)
        print(digest(outcomes, folder / "results"), flush=True)
    return 0 if all(outcome.status == 0 for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
