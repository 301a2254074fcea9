"""The generated parts of nano's model card: figures from a report, stages and curves from training logs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from PIL import Image

from bokehflux.evaluation.figures import Figure
from bokehflux.nano.recipe import NANO, RESUMED
from bokehflux.pictures import plot

AXES = ("step", "seconds")
STAGES = {
    "autoencoder": "vae", "base": "base", "base-resumed": "base --resume", "adapter": "adapter",
    "reference": "reference", "controls": "controls",
}  # fmt: skip
"""Name of a log -> its stage in scripts/train_nano.py, in their order."""


def figures(record: Mapping[str, Any], judge: str = "nano") -> str:
    """A report's table, and under it the run it comes from. record: what `evaluation` writes for `judge`."""
    lines = ["| figure | of | measured | target | reached |", "|---|---|---|---|---|"]
    for row in record["rows"]:
        found = Figure(**{key: row[key] for key in ("figure", "of", "value", "target")})
        reached = {None: "", True: "yes", False: "NO"}[found.passed]
        lines.append(f"| {found.figure} | {found.of} | {found.value:.2f} | {found.wanted} | {reached} |")
    command = (
        f"python -m bokehflux.evaluation {judge} --captions {record['captions']} --steps {record['steps']}"
    )
    where = f"{record['device']}, torch {record['torch']}, commit `{record['commit'][:12]}`"
    return "\n".join([*lines, "", f"{record['seconds']:.0f} s: `{command}` on {where}."])


def stages(logs: Mapping[str, Mapping[str, Any]]) -> str:
    """How every part was trained: a table, and under it the commands, indented: no test runs them."""
    lines = ["| stage | seed | scenes | steps | seconds | GPU |", "|---|---|---|---|---|---|"]
    for name, log in logs.items():
        note, recipe = log["notes"], log["notes"]["recipe"]
        steps = str(note["steps"])
        if "distill steps" in note:
            steps += f" + {note['distill steps']} of guidance distillation"
        cells = (name, recipe["seed"], recipe["scenes"], steps, round(note["seconds"]), note["device"])
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    commands = [f"    {command(name, log['notes'])}" for name, log in logs.items()]
    return "\n".join([*lines, "", *commands])


def command(name: str, notes: Mapping[str, Any]) -> str:
    """The command that repeats a stage: with what its log says that the recipe of today does not."""
    stage = RESUMED if name.endswith("-resumed") else getattr(NANO, name)
    # What was paced by the clock is repeated by its steps; `saved_scale` is calibrated after training.
    made = dict(notes["recipe"]) | {"steps": notes["steps"], "minutes": 0.0}
    if "distill steps" in notes:
        made |= {"distill_steps": notes["distill steps"], "distill_minutes": 0.0}
    made.pop("saved_scale", None)
    changed = [f"{key}={value}" for key, value in made.items() if getattr(stage, key, None) != value]
    words = ["python scripts/train_nano.py", STAGES[name], "--out weights/nano"]
    return " ".join([*words, "--set", *changed] if changed else words)


def curves(logs: Mapping[str, Mapping[str, Any]]) -> Image.Image:
    """A panel for every stage, side by side: its losses over the steps."""
    return plot.joined(
        [
            plot.lines(
                {key: line for key in log["points"][0] if key not in AXES and (line := points(log, key))},
                title=name,
                x="step",
                logarithmic=True,
                size=(380, 320),
            )
            for name, log in logs.items()
        ],
        "right",
    )


def points(log: Mapping[str, Any], key: str) -> list[tuple[float, float]]:
    """(step, value) of a loss, up to where steps are counted anew."""
    found = [(point["step"], point[key]) for point in log["points"] if key in point]
    rising = next((i for i, (a, b) in enumerate(itertools.pairwise(found), 1) if b[0] <= a[0]), len(found))
    return found[:rising]
