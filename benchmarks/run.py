"""Run benchmarks by name.

    python -m benchmarks.run --list
    python -m benchmarks.run step --cases base "pair, 1024" --arms 'ours$' published --repeats 9
    python -m benchmarks.run attention step generate --seconds 1500

Prints a table and writes NAME.json and NAME.png, again whenever there are new rows. Several names run one
after another, each in a process of its own. The last line printed is one JSON document: for every name
whether all that is ours passed its check, where the rows were written, and the table's columns. `--tiny` runs
toys on any machine, with Triton's kernels in its interpreter: its times mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import shlex
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks import registry
from benchmarks.registry import Benchmark, Session
from benchmarks.timing import Budget, Row, first_line
from bokehflux.evaluation.report import commit
from bokehflux.pictures import plot
from bokehflux.pipeline.provenance import provenance_here
from bokehflux.weights.files.write import replacing, write_json

RESULTS = Path("benchmarks/results")


def make_parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="benchmarks.run", description=__doc__, formatter_class=formatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(registry.NAMES)}")
    parser.add_argument("--list", action="store_true", help="what each asks, its cases and arms")
    parser.add_argument(
        "--cases", nargs="+", help="parts of names, in the order wanted; NAME$ is that one alone"
    )
    parser.add_argument("--arms", nargs="+", help="parts of names; NAME$ is that one alone")
    parser.add_argument("--repeats", type=int, help="see --list")
    parser.add_argument("--backend", help="attention of our arms; default: auto")
    parser.add_argument("--seconds", type=float, default=3600, help="begin nothing after this")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"folder; default: {RESULTS}")
    parser.add_argument("--as", dest="file", metavar="FILE", help="name of the files; default: NAME")
    parser.add_argument("--tiny", action="store_true", help="toys, on any machine")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.list:
        print("\n\n".join(described(name) for name in args.names or registry.NAMES))
        return 0
    if not args.names:
        parser.error("expected the name of a benchmark; --list shows them")
    if int(os.environ.get("RANK", 0)):  # under torchrun the first process prints and writes for all
        args.out = Path(tempfile.mkdtemp())
        sys.stdout = open(os.devnull, "w")
    budget = Budget(args.seconds)
    try:
        if len(args.names) > 1:
            documents = run_each(args, budget)
        else:
            documents = {name: run(name, args, budget) for name in args.names}
    except ValueError as error:
        parser.error(str(error))
    print(json.dumps(documents))
    return 0 if all(document["passed"] for document in documents.values()) else 1


def described(name: str) -> str:
    benchmark = registry.find(name)
    every = benchmark.cases(False)
    cases = registry.pick(every, benchmark.usual_cases)
    others = [case for case in every if case not in cases]
    lines = {
        "": benchmark.question,
        "cases": "; ".join(cases) + (f"; not by default: {'; '.join(others)}" if others else ""),
        "arms": "; ".join(benchmark.arms),
        "checked": benchmark.checked,
        "repeats": f"{benchmark.repeats} {benchmark.repeated}" if benchmark.repeats else "",
    }
    return name + "".join(f"\n    {key:9}{line}" for key, line in lines.items() if line)


def session_of(name: str, benchmark: Benchmark, args: argparse.Namespace, budget: Budget) -> Session:
    """Raises ValueError for what the benchmark cannot do, or not on this machine."""
    for option, given, taken in (
        ("--arms", args.arms, benchmark.arms),
        ("--repeats", args.repeats, benchmark.repeats),
        ("--backend", args.backend, benchmark.takes_backend),
    ):
        if given is not None and not taken:
            raise ValueError(f"{name} takes no {option}")
    if args.repeats is not None and args.repeats < benchmark.least_repeats:
        raise ValueError(f"--repeats must be at least {benchmark.least_repeats}, got {args.repeats}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        if benchmark.needs_gpu and not args.tiny:
            raise ValueError(f"{name} needs a GPU, and there is none; --tiny tries it on toys")
        os.environ.setdefault("TRITON_INTERPRET", "1")
    torch.set_float32_matmul_precision("highest")
    cases, usual = benchmark.cases(args.tiny), ("",) if args.tiny else benchmark.usual_cases
    if args.arms is not None:
        registry.pick(benchmark.arms, args.arms)
    return Session(
        device=device,
        tiny=args.tiny,
        cases={name: cases[name] for name in registry.pick(cases, args.cases or usual)},
        arms=args.arms or benchmark.usual_arms,
        repeats=args.repeats or benchmark.repeats,
        backend=args.backend or "auto",
        budget=budget,
    )


def run(name: str, args: argparse.Namespace, budget: Budget) -> dict[str, Any]:
    """Measure, print and write; returns what the last line says of it. Raises ValueError as `session_of`."""
    benchmark = registry.find(name)
    session = session_of(name, benchmark, args, budget)
    found = environment(session.device)
    print(", ".join(f"{key} {value}" for key, value in found.items()), flush=True)
    file = (args.file or name) + ("_tiny" if session.tiny else "")
    path = args.out / f"{file}.json"
    rows: list[Row] = []
    for new in by_arm(benchmark, session) if benchmark.isolated else benchmark.measure(session):
        print(f"{table(new, benchmark.columns.split())}\n{session.budget.left:.0f} s left", flush=True)
        rows += new
        if benchmark.finish is not None:
            rows = benchmark.finish(rows)
        args.out.mkdir(parents=True, exist_ok=True)
        write_json(path, {"environment": found, "rows": rows})
        if benchmark.bars is not None:
            group, label, value, unit = benchmark.bars
            title = f"{file}: {value}; {found['device']}"
            image = plot.bars(rows, title=title, group=group, label=label, value=value, unit=unit)
            with replacing(path.with_suffix(".png")) as temporary:
                image.save(temporary, format="PNG")
    if benchmark.finish is not None:  # what compares one row with another was not known before
        print(table(rows, benchmark.columns.split()), flush=True)
    kept = ["ours", *benchmark.columns.split()]
    return {
        "passed": passed(rows),
        "file": str(path),
        "environment": found,
        "rows": [{key: row[key] for key in kept if key in row} for row in rows],
    }


def passed(rows: Sequence[Row]) -> bool:
    """Whether there is something of ours, and all of it is right. Rows that do not say whose are ours."""
    ours = [row for row in rows if row.get("ours", True)]
    return bool(ours) and all(row.get("verdict", "ok").startswith("ok") for row in ours)


# Processes.


def run_each(args: argparse.Namespace, budget: Budget) -> dict[str, Any]:
    """The documents of several benchmarks, in a process each."""
    for option in ("cases", "arms", "repeats", "backend", "file"):
        if getattr(args, option) is not None:
            raise ValueError(f"--{'as' if option == 'file' else option} is for one benchmark at a time")
    for name in args.names:
        registry.find(name)
    documents: dict[str, Any] = {}
    for name in args.names:
        documents[name] = {"passed": False, "problem": "out of time"}
        if not budget.spent:
            print(f"== {name}", flush=True)
            document, why = apart(run, name, args, budget)
            documents[name] = document or {"passed": False, "problem": why}
    return documents


def by_arm(benchmark: Benchmark, session: Session) -> Iterator[list[Row]]:
    """Rows of every arm, each measured in a process of its own."""
    for arm in session.until_spent(registry.pick(benchmark.arms, session.arms)):
        rows, why = apart(measured, benchmark.measure, dataclasses.replace(session, arms=[f"{arm}$"]))
        yield [{"arm": arm, "verdict": f"failed: {why}"}] if why else rows


def measured(measure: Callable[[Session], Iterator[list[Row]]], session: Session) -> list[Row]:
    return [row for rows in measure(session) for row in rows]


def apart(function: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
    """What a call gives in a process of its own, or why it failed."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        done = pool.submit(function, *arguments)
    if (error := done.exception()) is None:
        return done.result(), ""
    traceback.print_exception(error)
    return None, first_line(error)


# What is printed and written.


def table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Rows as lines under a heading; "-" for what a row does not know. Text to the left, numbers right."""
    cells = [list(columns), *([shown(row.get(key)) for key in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    signs = ["<" if any(isinstance(row.get(key), str) for row in rows) else ">" for key in columns]
    lines = [
        "  ".join(f"{cell:{sign}{width}}" for cell, sign, width in zip(line, signs, widths, strict=True))
        for line in cells
    ]
    return "\n".join(line.rstrip() for line in lines)


def shown(value: object) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def environment(device: torch.device) -> dict[str, str]:
    """What a figure depends on besides the code: GPU, driver, versions, commit, command."""
    here = provenance_here(device)
    return {
        "device": here.device_name + (f", {here.threads} threads" if here.threads else ""),
        "driver": driver() if device.type == "cuda" else "none",
        "torch": here.torch,
        "triton": here.triton or "none",
        "commit": commit(),
        "command": f"python -m benchmarks.run {shlex.join(sys.argv[1:])}",
    }


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
