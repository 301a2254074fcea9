"""The figures this project set out to reach, beside what the results say: read from their files, never typed.

    python -m benchmarks.summary [--results benchmarks/results] [--write]

`--write` puts the table between the markers in README.md and benchmarks/README.md, and what `bench_memory`
found between those for memory. A figure whose files are not there has no line; without any figure, nothing
is written.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS, Row
from benchmarks.report import table as text_table

BEGIN, END = "<!-- figures: written by benchmarks.summary -->", "<!-- end of figures -->"
MEMORY = ("<!-- memory: written by benchmarks.summary -->", "<!-- end of memory -->")
DOCUMENTS = (Path("README.md"), Path("benchmarks/README.md"))
SMALL, LARGE = "512 px", "1024 px"
COLUMNS = {
    "what": "s", "against": "s", "at_least": "s", "aim": "s", "measured": "s", "reached": "s", "how": "s",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One figure, measured."""

    what: str
    against: str
    value: float
    must: float
    aim: float | None = None
    form: str
    """Of all three, as `format` takes it; then their unit."""
    unit: str
    at_most: bool = False
    how: str
    """The arms that were compared."""
    environment: Mapping[str, str]

    @property
    def reached(self) -> str:
        def holds(limit: float) -> bool:
            return self.value <= limit if self.at_most else self.value >= limit

        if self.aim is not None and holds(self.aim):
            return "aim"
        return "yes" if holds(self.must) else "NO"

    def row(self) -> Row:
        def text(value: float | None) -> str:
            return "" if value is None else format(value, self.form) + self.unit

        return {
            "what": self.what,
            "against": self.against,
            "at_least": ("at most " if self.at_most else "") + text(self.must),
            "aim": text(self.aim),
            "measured": text(self.value),
            "reached": self.reached,
            "how": self.how,
        }


class Results:
    """Rows of the files of one folder."""

    def __init__(self, folder: Path) -> None:
        self.files: dict[str, Any] = {
            path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))
        }

    def rows(self, name: str, **equal: Any) -> list[Row]:
        """Rows of NAME.json that passed their check and have these values."""
        return [row for row in self.all_rows(name, **equal) if str(row.get("verdict", "ok")).startswith("ok")]

    def all_rows(self, name: str, **equal: Any) -> list[Row]:
        """Those that did not pass, too."""
        return [row for row in self.files.get(name, {}).get("rows", []) if equal.items() <= row.items()]

    def environment(self, name: str) -> Mapping[str, str]:
        return self.files[name]["environment"]


@dataclass(frozen=True, kw_only=True)
class Race:
    """A goal: how many times our best arm's time fits in the best one's of some others, in one run."""

    what: str
    file: str
    where: Mapping[str, str]
    """Values of the rows that are compared."""
    rivals: tuple[str, ...]
    must: float
    aim: float | None = None
    is_fp8: bool = False

    def measured(self, results: Results) -> Iterator[Finding]:
        key, unit = ("total_s", "s") if self.file in GENERATE.values() else ("ms", "ms")
        rows = [row for row in results.rows(self.file, **self.where) if row.get(key) is not None]
        ours = [row for row in rows if is_ours(row) and ("fp8" in row["arm"]) == self.is_fp8]
        others = [row for row in rows if row["arm"] in self.rivals]
        if ours and others:
            mine, best = (min(some, key=lambda row: row[key]) for some in (ours, others))
            yield Finding(
                what=self.what, against=best["arm"], value=best[key] / mine[key], must=self.must,
                aim=self.aim, form=".2f", unit="x",
                how=f"{mine['arm']}: {mine[key]:.4g} against {best[key]:.4g} {unit}",
                environment=results.environment(self.file),
            )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Memory:
    """A goal: what one memory mode may take, in one job, or in the one that takes most."""

    what: str
    mode: str
    storage: str
    key: str
    must: float
    unit: str
    job: str | None = None

    def measured(self, results: Results) -> Iterator[Finding]:
        wanted = {"mode": self.mode, "storage": self.storage} | ({"job": self.job} if self.job else {})
        # A job over its cap is measured without one, and counts.
        rows = [row for row in results.all_rows("memory", **wanted) if row.get(self.key) is not None]
        if rows:
            row = max(rows, key=lambda row: row[self.key])
            yield Finding(
                what=self.what, against="", value=row[self.key], must=self.must, form=".2f",
                unit=self.unit, at_most=True,
                how=f"{self.mode}; {'' if self.job else 'most: '}{row['job']}; {row['verdict']}",
                environment=results.environment("memory"),
            )  # fmt: skip


def is_ours(row: Row) -> bool:
    return row.get("ours", row["arm"].startswith("ours"))


PLAIN, FA3 = ("cuDNN", "FA2", "flex"), ("FA3",)
PUBLISHED = ("published, cuDNN", "published, FA2")
EAGER, COMPILED = ("published, eager",), ("published, compiled",)
GENERATE = {SMALL: "generate-512", LARGE: "generate"}
"""A file each: the sizes are measured in runs of their own."""
ONE, SIX = f"1 at {SMALL}", f"6 at {LARGE}"
GOALS: tuple[Race | Memory, ...] = (
    *(
        Race(
            what=f"{what}, S {length}", file="attention", where={"shape": f"{shape}-{length}"}, rivals=rivals,
            must=must, aim=aim,
        )
        for what, shape, rivals, must, aim in (
            ("plain attention", "plain-1", PLAIN, 1.0, None),
            ("plain attention", "plain-1", FA3, 1.0, None),
            ("grounded attention, N = 1", "grounded-1", PUBLISHED, 1.9, 2.2),
            ("grounded attention, N = 6", "grounded-6", PUBLISHED, 2.4, 3.0),
        )
        for length in (1536, 4608)
    ),
    *(
        Race(what=what, file="step", where={"case": case}, rivals=rivals, must=must, aim=aim)
        for what, case, rivals, must, aim in (
            ("step 1024², one row", f"base, {LARGE}", ("diffusers, compiled",), 1.15, 1.2),
            ("step 512², one row", f"base, {SMALL}", ("diffusers, compiled",), 1.15, 1.3),
            ("step 512², one row", f"base, {SMALL}", ("diffusers, eager",), 2.5, None),
            ("grounded pair 1024²", f"pair, {LARGE}", EAGER, 2.0, 2.2),
            ("grounded pair 1024²", f"pair, {LARGE}", COMPILED, 1.35, 1.5),
        )
    ),
    *(
        Race(
            what=f"six targets, 30 steps, {side.removesuffix(' px')}²{', fp8' if is_fp8 else ''}",
            file=GENERATE[side], where={"side": side}, rivals=rivals, must=must, aim=aim, is_fp8=is_fp8,
        )
        for side in (SMALL, LARGE)
        for rivals, must, aim, is_fp8 in (
            (EAGER, 3.0, 3.8, False), (COMPILED, 2.1, 2.6, False), (EAGER, 4.5, 5.5, True),
        )
    ),
    *(
        Memory(what=what, mode=mode, storage=storage, key=key, must=must, unit=unit, job=job)
        for what, mode, storage, key, must, unit, job in (
            ("peak GPU memory, exact bf16", "offload", "bf16", "gpu_gb", 18.5, " GB", None),
            ("peak GPU memory, fp8", "offload", "fp8", "gpu_gb", 10.0, " GB", None),
            ("peak GPU memory, streamed", "stream", "bf16", "gpu_gb", 3.0, " GB", None),
            ("time of a streamed step", "stream", "bf16", "vs_resident", 1.15, "x", SIX),
        )
    ),
)  # fmt: skip


def efficiency(results: Results) -> Iterator[Finding]:
    rows = results.rows("step", case=f"base, {LARGE}")
    ours = [row for row in rows if is_ours(row) and "fp8" not in row["arm"]]
    if ours:
        best = min(ours, key=lambda row: row["ms"])
        yield Finding(
            what="compute efficiency of the 1024² step", against="bf16 product 8192³ in the same run",
            value=best["share"], must=0.85, aim=0.92, form=".0%", unit="",
            how=f"{best['arm']}: {best['tflops']:.0f} TFLOP/s", environment=results.environment("step"),
        )  # fmt: skip


def peak(results: Results) -> Iterator[Finding]:
    mine = results.all_rows("memory", job=ONE, storage="bf16", mode="offload")
    published = results.rows(GENERATE[SMALL], side=SMALL, arm=EAGER[0])
    if mine and published and mine[0].get("gpu_gb") and published[0].get("peak_gb"):
        yield Finding(
            what="peak memory, exact bf16, 512²", against="published, everything resident",
            value=mine[0]["gpu_gb"] / published[0]["peak_gb"], must=0.56, form=".2f", unit="x", at_most=True,
            how=f"offload: {mine[0]['gpu_gb']:.1f} of {published[0]['peak_gb']:.1f} GB",
            environment=results.environment("memory"),
        )  # fmt: skip


def errors(results: Results) -> Iterator[Finding]:
    """The largest ratio of an arm's error to that of the published formulation, eager, in the same case."""
    found: list[tuple[float, str]] = []
    for row in results.rows("step"):
        if is_ours(row) and "fp8" not in row["arm"]:
            stock = results.rows("step", case=row["case"], arm=EAGER[0])
            found += [(row["error"] / other["error"], f"{row['arm']}; {row['case']}") for other in stock]
    if found:
        value, how = max(found)
        yield Finding(
            what="error of each bf16 arm against fp32", against=EAGER[0], value=value, must=1.1, form=".2f",
            unit="x", at_most=True, how=f"largest: {how}", environment=results.environment("step"),
        )  # fmt: skip


def findings(folder: Path) -> list[Finding]:
    """Every figure that the files of a folder give, in the order of the goals."""
    results = Results(folder)
    parts = [goal.measured for goal in GOALS] + [efficiency, peak, errors]
    return [finding for part in parts for finding in part(results)]


def table(found: Sequence[Finding]) -> str:
    return text_table([finding.row() for finding in found], COLUMNS) if found else "no figures yet"


def markdown(found: Sequence[Finding]) -> str:
    """The table, and under it where each of its lines comes from."""
    runs: dict[str, int] = {}
    lines = ["| what | against | at least | aim | measured | reached | with | run |", "|" + "---|" * 8]
    for finding in found:
        row, run = finding.row(), run_of(finding.environment)
        number = runs.setdefault(run, len(runs) + 1)
        cells = [row[key] for key in COLUMNS if key != "how"] + [row["how"], str(number)]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(f"{number}. {run}" for run, number in runs.items())]
    return "\n".join(lines)


def run_of(environment: Mapping[str, str]) -> str:
    """The command of a run, and where it ran."""
    command = re.sub(r" --(out|seconds) \S+", "", environment.get("command", "unknown"))
    return (
        f"`{command}` on {environment['device']}, torch {environment['torch']}, "
        f"triton {environment['triton']}, commit `{environment['commit'][:12]}`"
    )


def memory_markdown(results: Results) -> str:
    """What each memory mode takes, and the run it comes from; empty without results."""
    rows = [row for row in results.all_rows("memory") if row.get("gpu_gb") is not None]
    if not rows:
        return ""
    lines = ["| targets | mode | weights | capped at | peak | host | a grounded step | |", "|" + "---|" * 8]
    for row in rows:
        cap = "" if row.get("cap_gb") is None else f"{row['cap_gb']:.1f} GB"
        step = "" if row.get("step_ms") is None else f"{row['step_ms']:.0f} ms"
        how = str(row.get("verdict", "ok")).removeprefix("ok").removeprefix(", ")
        host = "" if row.get("host_gb") is None else f"{row['host_gb']:.0f} GB"
        cells = (row["job"], row["mode"], row["storage"], cap, f"{row['gpu_gb']:.1f} GB", host, step, how)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"{run_of(results.environment('memory'))}."])


def write(document: Path, text: str, markers: tuple[str, str] = (BEGIN, END)) -> None:
    """Replace what lies between the markers. Raises ValueError where a document has not one pair of them."""
    begin, end = markers
    old = document.read_text(encoding="utf-8")
    if old.count(begin) != 1 or old.count(end) != 1 or old.index(begin) > old.index(end):
        raise ValueError(f"{document}: expected one line {begin!r} and after it one line {end!r}")
    before, after = old[: old.index(begin)], old[old.index(end) :]
    document.write_text(f"{before}{begin}\n{text}\n{after}", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--write", action="store_true", help="into README.md and benchmarks/README.md")
    args = parser.parse_args(argv)
    found = findings(args.results)
    print(table(found))
    if args.write and found:
        memory = memory_markdown(Results(args.results))
        for document in DOCUMENTS:
            write(document, markdown(found))
            if memory and MEMORY[0] in document.read_text(encoding="utf-8"):
                write(document, memory, MEMORY)
    return 0


if __name__ == "__main__":
    sys.exit(main())
