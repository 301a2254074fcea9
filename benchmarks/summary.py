"""The goals of `goals.json` beside what the files of a folder of results say.

    python -m benchmarks.summary [--results benchmarks/results] [--write]

`--write` puts all goals between the markers in benchmarks/README.md, the five that README.md shows there, and
what `memory` found into docs/memory.md. A goal whose files are not there has no line.

A goal compares rows of one file with these values (`where`); ours are told apart by the numbers that they
compute in (`ours`: bf16 or fp8). With `over`, the figure is how many times our smallest value fits in the
smallest of those arms. Otherwise it is the largest value, with `part_of` as a share of another row's.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.run import RESULTS, table
from benchmarks.timing import Row
from bokehflux.evaluation.report import replace_between

GOALS = Path(__file__).with_name("goals.json")
FIGURES = ("<!-- figures: written by benchmarks.summary -->", "<!-- end of figures -->")
MEMORY = ("<!-- memory: written by benchmarks.summary -->", "<!-- end of memory -->")
RUNNER = "python -m benchmarks.run "
COUNTED = ("ok", "over the cap")
"""How verdicts of rows that count begin: a job over its memory cap is measured without one."""
COLUMNS = ("what", "against", "goal", "aim", "measured", "reached", "with")
SHOWN = ("what", "against", "measured", "with")
"""Columns of the table in README.md."""
Goal = Mapping[str, Any]


class Finding(NamedTuple):
    """One goal, measured."""

    goal: Goal
    against: str
    value: float
    how: str
    """The rows that were compared."""

    @property
    def reached(self) -> str:
        """Whether the goal is met: aim, yes or NO; empty where there is none."""
        least, most = self.goal.get("at_least", -math.inf), self.goal.get("at_most", math.inf)
        if (least, most) == (-math.inf, math.inf):
            return ""
        if self.value >= self.goal.get("aim", math.inf):
            return "aim"
        return "yes" if least <= self.value <= most else "NO"

    def row(self) -> Row:
        goal, unit = self.goal, self.goal.get("unit", "x")

        def text(value: float) -> str:
            return f"{value:.0%}" if unit == "%" else f"{value:.2f}{unit}"

        bounds = [f"{key} {text(goal[key])}" for key in ("at_least", "at_most") if key in goal]
        goal_text, aim = "".join(bounds).replace("_", " "), text(goal["aim"]) if "aim" in goal else ""
        values = goal["what"], self.against, goal_text, aim, text(self.value), self.reached, self.how
        return dict(zip(COLUMNS, values, strict=True))


class Results:
    """The files of one folder."""

    def __init__(self, folder: Path) -> None:
        self.files: dict[str, Any] = {
            path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))
        }

    def rows(self, name: str, where: Mapping[str, str], key: str) -> list[Row]:
        """Rows of NAME.json with these values and a number under `key` that counts."""
        return [
            row
            for row in self.files.get(name, {}).get("rows", [])
            if where.items() <= row.items()
            and row.get(key) is not None
            and row.get("verdict", "ok").startswith(COUNTED)
        ]

    def run(self, name: str) -> str:
        """The command that makes a file, and where this one comes from."""
        found = self.files[name]["environment"]
        command = re.sub(r" --(out|seconds) \S+", "", found["command"])
        if not command.startswith(RUNNER):  # it was recorded by an earlier runner: today's command
            command = read_goals()["commands"][name]
        where = "{device}, torch {torch}, triton {triton}, commit `{commit:.12}`".format(**found)
        return f"`{command}` on {where}"


def read_goals() -> Any:
    return json.loads(GOALS.read_text(encoding="utf-8"))


def is_ours(row: Row, numbers: str | None) -> bool:
    """numbers: what it computes in, bf16 or fp8, without a shortcut; None: any row will do."""
    if numbers is None or row.get("shortcut"):
        return numbers is None
    return row.get("ours", row["arm"].startswith("ours")) and ("fp8" in row["arm"]) == (numbers == "fp8")


def label(row: Row) -> str:
    """What a row is about, in words."""
    words = [row.get("mode", row.get("arm")), row.get("case", row.get("job")), row.get("verdict", "ok")]
    return "; ".join(word for word in words if word and word != "ok")


def measured(goal: Goal, results: Results) -> Finding | None:
    """None where there is nothing to compare."""
    key = goal["key"]
    rows = results.rows(goal["file"], goal["where"], key)
    ours = [row for row in rows if is_ours(row, goal.get("ours"))]
    if "over" in goal:
        others = [row for row in rows if row["arm"] in goal["over"]]
        if not ours or not others:
            return None
        mine, best = (min(some, key=lambda row: row[key]) for some in (ours, others))
        how = f"{mine['arm']}: {mine[key]:.4g} against {best[key]:.4g} {key.split('_')[-1]}"
        return Finding(goal, best["arm"], best[key] / mine[key], how)
    found = [(row[key], label(row)) for row in ours]
    if whole := goal.get("part_of"):  # of the row that has the same value of the column `same`
        same = whole.get("same")
        found = [
            (row[key] / other[whole["key"]], f"{label(row)}: {row[key]:.3g} of {other[whole['key']]:.3g}")
            for other in results.rows(whole["file"], whole["where"], whole["key"])
            for row in ours
            if same is None or row[same] == other[same]
        ]
    return Finding(goal, goal.get("against", ""), *max(found)) if found else None


def findings(results: Results) -> list[Finding]:
    """Every goal for which there are files."""
    return [found for goal in read_goals()["goals"] if (found := measured(goal, results)) is not None]


# Documents.


def figures(found: Sequence[Finding], results: Results, few: bool = False) -> str:
    """A table, and under it where each of its lines comes from. few: those of README.md, in its words."""
    columns, runs, cells = SHOWN if few else COLUMNS, dict[str, int](), []
    for finding in found:
        row, goal = finding.row(), finding.goal
        if few and "in_readme" not in goal:
            continue
        number = runs.setdefault(results.run(goal["file"]), len(runs) + 1)
        row |= {"what": goal["in_readme"] if few else goal["what"], "run": str(number)}
        cells.append([row[column] for column in (*columns, "run")])
    return "\n".join([*markdown([*columns, "run"], cells), "", *(f"{n}. {run}" for run, n in runs.items())])


def memory(results: Results) -> str:
    """What each memory mode takes, and the run it comes from."""
    numbers = {"cap_gb": "{:.1f} GB", "gpu_gb": "{:.1f} GB", "host_gb": "{:.0f} GB", "step_ms": "{:.0f} ms"}
    cells = [
        [row["job"], row["mode"], row["storage"]]
        + ["" if row.get(key) is None else form.format(row[key]) for key, form in numbers.items()]
        + [row["verdict"].removeprefix("ok").removeprefix(", ")]
        for row in results.rows("memory", {}, "gpu_gb")
    ]
    heading = ["targets", "mode", "weights", "capped at", "peak", "host", "a grounded step", ""]
    return "\n".join([*markdown(heading, cells), "", f"{results.run('memory')}."])


def markdown(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    head, *lines = ["| " + " | ".join(cells) + " |" for cells in (heading, *rows)]
    return [head, "|" + "---|" * len(heading), *lines]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--write", action="store_true", help="into the documents of this folder")
    args = parser.parse_args(argv)
    results = Results(args.results)
    found = findings(results)
    print(table([finding.row() for finding in found], COLUMNS) if found else "no figures yet")
    if args.write and found:
        replace_between(Path("benchmarks/README.md"), FIGURES, figures(found, results))
        replace_between(Path("README.md"), FIGURES, figures(found, results, few=True))
        if results.rows("memory", {}, "gpu_gb"):
            replace_between(Path("docs/memory.md"), MEMORY, memory(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
