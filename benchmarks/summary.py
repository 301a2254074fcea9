"""The figures this project set out to reach, beside what the results say: read from their files, never typed.

    python -m benchmarks.summary [--results benchmarks/results] [--write]

`--write` puts the table between the markers in README.md and benchmarks/README.md. A figure whose files are
not there has no line, and without any figure nothing is written.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS, Row
from benchmarks.report import table as text_table

BEGIN, END = "<!-- figures: written by benchmarks.summary -->", "<!-- end of figures -->"
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
    aim: float | None
    form: str
    """Of all three, as `format` takes it; then their unit."""
    unit: str
    at_most: bool
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
        return [
            row
            for row in self.files.get(name, {}).get("rows", [])
            if str(row.get("verdict", "ok")).startswith("ok") and equal.items() <= row.items()
        ]

    def environment(self, name: str) -> Mapping[str, str]:
        return self.files[name]["environment"]


def fastest(rows: Sequence[Row], key: str, accept: Callable[[str], bool]) -> Row | None:
    """The row with the smallest row[key] among arms that are accepted by name."""
    known = [row for row in rows if row.get(key) is not None and accept(row["arm"])]
    return min(known, key=lambda row: row[key], default=None)


def _is_ours(arm: str) -> bool:
    return arm.startswith("ours") and "fp8" not in arm


def _is_fp8(arm: str) -> bool:
    return arm.startswith("ours") and "fp8" in arm


def ratio(
    results: Results, name: str, rows: Sequence[Row], key: str, what: str, rivals: Sequence[str],
    must: float, aim: float | None = None, *, ours: Callable[[str], bool] | None = None,
) -> Iterator[Finding]:
    """How many times our best arm's time fits in the best one's of `rivals`."""
    mine = fastest(rows, key, ours or _is_ours)
    best = fastest(rows, key, lambda arm: arm in rivals)
    if mine is None or best is None:
        return
    yield Finding(
        what=what, against=best["arm"], value=best[key] / mine[key], must=must, aim=aim, form=".2f", unit="x",
        at_most=False, how=f"{mine['arm']}: {mine[key]:.4g} against {best[key]:.4g} {_unit(key)}",
        environment=results.environment(name),
    )  # fmt: skip


def _unit(key: str) -> str:
    return "ms" if key == "ms" else "s"


def attention(results: Results) -> Iterator[Finding]:
    names = {row["arm"] for row in results.rows("attention", ours=True)}
    for length in (1536, 4608):
        def compare(shape: str, what: str, rivals: Sequence[str], must: float, aim: float | None = None):  # type: ignore
            rows = results.rows("attention", shape=f"{shape}-{length}")
            return ratio(
                results, "attention", rows, "ms", f"{what}, S {length}", rivals, must, aim,
                ours=lambda arm: arm in names,
            )

        yield from compare("plain-1", "plain attention", ("cuDNN", "FA2", "flex"), 1.0)
        yield from compare("plain-1", "plain attention", ("FA3",), 1.0)
        stock = ("published, cuDNN", "published, FA2")
        yield from compare("grounded-1", "grounded attention, N = 1", stock, 1.9, 2.2)
        yield from compare("grounded-6", "grounded attention, N = 6", stock, 2.4, 3.0)


def steps(results: Results) -> Iterator[Finding]:
    def compare(case: str, what: str, rival: str, must: float, aim: float | None = None) -> Iterator[Finding]:
        return ratio(results, "step", results.rows("step", case=case), "ms", what, (rival,), must, aim)

    large, small = f"base, {LARGE}", f"base, {SMALL}"
    yield from compare(large, "step 1024², one row", "diffusers, compiled", 1.15, 1.2)
    yield from compare(small, "step 512², one row", "diffusers, compiled", 1.15, 1.3)
    yield from compare(small, "step 512², one row", "diffusers, eager", 2.5)
    yield from compare(f"pair, {LARGE}", "grounded pair 1024²", "published, eager", 2.0, 2.2)
    yield from compare(f"pair, {LARGE}", "grounded pair 1024²", "published, compiled", 1.35, 1.5)
    best = fastest(results.rows("step", case=large), "ms", _is_ours)
    if best is not None:
        yield Finding(
            what="compute efficiency of the 1024² step", against="bf16 product 8192³ in the same run",
            value=best["share"], must=0.85, aim=0.92, form=".0%", unit="", at_most=False,
            how=f"{best['arm']}: {best['tflops']:.0f} TFLOP/s", environment=results.environment("step"),
        )  # fmt: skip


def errors(results: Results) -> Iterator[Finding]:
    """The largest ratio of an arm's error to that of the published formulation, eager, in the same case."""
    found: list[tuple[float, str]] = []
    for row in results.rows("step"):
        if _is_ours(row["arm"]):
            stock = results.rows("step", case=row["case"], arm="published, eager")
            found += [(row["error"] / other["error"], f"{row['arm']}; {row['case']}") for other in stock]
    if found:
        value, how = max(found)
        yield Finding(
            what="error of each bf16 arm against fp32", against="published, eager", value=value, must=1.1,
            aim=None, form=".2f", unit="x", at_most=True, how=f"largest: {how}",
            environment=results.environment("step"),
        )  # fmt: skip


def jobs(results: Results) -> Iterator[Finding]:
    for side in (SMALL, LARGE):
        rows = results.rows("generate", side=side)
        what = f"six targets, 30 steps, {side.removesuffix(' px')}²"
        yield from ratio(results, "generate", rows, "total_s", what, ("published, eager",), 3.0, 3.8)
        yield from ratio(results, "generate", rows, "total_s", what, ("published, compiled",), 2.1, 2.6)
        yield from ratio(
            results, "generate", rows, "total_s", f"{what}, fp8", ("published, eager",), 4.5, 5.5, ours=_is_fp8
        )


def memory(results: Results) -> Iterator[Finding]:
    def least(what: str, job: str, modes: Sequence[str], storage: str, key: str, must: float, unit: str) -> Iterator[Finding]:
        rows = [row for row in results.rows("memory", job=job, storage=storage) if row["mode"] in modes]
        rows = [row for row in rows if row.get(key) is not None]
        if rows:
            best = min(rows, key=lambda row: row[key])
            yield Finding(
                what=what, against="", value=best[key], must=must, aim=None, form=".2f", unit=unit,
                at_most=True, how=f"{best['mode']}; {job}; {best['verdict']}",
                environment=results.environment("memory"),
            )  # fmt: skip

    one, six = f"1 at {SMALL}", f"6 at {LARGE}"
    yield from least("peak GPU memory, exact bf16, not streamed", one, ("offload",), "bf16", "gpu_gb", 18.5, " GB")
    yield from least("peak GPU memory, fp8, not streamed", one, ("offload",), "fp8", "gpu_gb", 10.0, " GB")
    yield from least("peak GPU memory, streamed", one, ("stream",), "bf16", "gpu_gb", 3.0, " GB")
    yield from least("time of a streamed step over a resident one", six, ("stream",), "bf16", "vs_resident", 1.15, "x")
    mine = results.rows("memory", job=one, storage="bf16", mode="offload")
    published = results.rows("generate", side=SMALL, arm="published, eager")
    if mine and published and mine[0].get("gpu_gb") and published[0].get("peak_gb"):
        yield Finding(
            what="peak memory, exact bf16, 512²", against="published, everything resident",
            value=mine[0]["gpu_gb"] / published[0]["peak_gb"], must=0.56, aim=None, form=".2f", unit="x",
            at_most=True, how=f"offload: {mine[0]['gpu_gb']:.1f} of {published[0]['peak_gb']:.1f} GB",
            environment=results.environment("memory"),
        )  # fmt: skip


def findings(folder: Path) -> list[Finding]:
    """Every figure that the files of a folder give, in the order of the goals."""
    results = Results(folder)
    parts = (attention, steps, jobs, memory, errors)
    return [finding for part in parts for finding in part(results)]


def table(found: Sequence[Finding]) -> str:
    return text_table([finding.row() for finding in found], COLUMNS) if found else "no figures yet"


def markdown(found: Sequence[Finding]) -> str:
    """The table, and under it where each of its lines comes from."""
    runs: dict[str, int] = {}
    lines = ["| what | against | at least | aim | measured | reached | with | run |", "|" + "---|" * 8]
    for finding in found:
        row, where = finding.row(), finding.environment
        command = re.sub(r" --(out|seconds) \S+", "", where.get("command", "unknown"))
        run = f"`{command}` on {where['device']}, torch {where['torch']}, triton {where['triton']}, commit `{where['commit'][:12]}`"
        number = runs.setdefault(run, len(runs) + 1)
        cells = [row[key] for key in COLUMNS if key != "how"] + [row["how"], str(number)]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(f"{number}. {run}" for run, number in runs.items())]
    return "\n".join(lines)


def write(document: Path, text: str) -> None:
    """Replace what lies between the markers. Raises ValueError where a document has not one pair of them."""
    old = document.read_text(encoding="utf-8")
    if old.count(BEGIN) != 1 or old.count(END) != 1 or old.index(BEGIN) > old.index(END):
        raise ValueError(f"{document}: expected one line {BEGIN!r} and after it one line {END!r}")
    before, after = old[: old.index(BEGIN)], old[old.index(END) :]
    document.write_text(f"{before}{BEGIN}\n{text}\n{after}", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--write", action="store_true", help="into README.md and benchmarks/README.md")
    args = parser.parse_args(argv)
    found = findings(args.results)
    print(table(found))
    if args.write and found:
        for document in DOCUMENTS:
            write(document, markdown(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
