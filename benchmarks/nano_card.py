"""The figures and the plot of nano's model card, from its logs and from what `bench_nano` found.

    python -m benchmarks.nano_card [--results benchmarks/results]

Writes weights/nano/README.md, between its markers, and weights/nano/training.png.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from benchmarks import summary
from benchmarks.report import INKS, RESULTS
from bokehflux.nano.recipe import NANO, RESUMED
from bokehflux.weights.files.write import replacing

FOLDER = Path(__file__).resolve().parents[1] / "weights" / "nano"
TRAINING = ("<!-- training: written by benchmarks.nano_card -->", "<!-- end of training -->")
FIGURES = ("<!-- figures: written by benchmarks.nano_card -->", "<!-- end of figures -->")
AXES = ("step", "seconds")
STAGES = {"autoencoder": "vae", "base": "base", "base-resumed": "base --resume", "adapter": "adapter"}
"""Name of a log -> its stage in scripts/train_nano.py, in their order."""


def figures(record: Mapping[str, Any]) -> list[str]:
    """The table of `bench_nano`, and under it the run it comes from."""
    lines = ["| figure | of | measured | target | reached |", "|---|---|---|---|---|"]
    for row in record["rows"]:
        target, reached = "", {None: "", True: "yes", False: "NO"}[row["passed"]]
        if row["target"] is not None:
            low, high = row["target"]
            target = f"at least {low:g}" if high is None else f"{low:g} to {high:g}"
        lines.append(f"| {row['figure']} | {row['of']} | {row['value']:.2f} | {target} | {reached} |")
    where = f"{record['device']}, torch {record['torch']}, commit `{record['commit'][:12]}`"
    run = f"`{record['command']}` on {where}"
    return [
        *lines,
        "",
        f"{record['captions']} captions, {record['steps']} steps, {record['seconds']:.0f} s: {run}.",
    ]


def stages(logs: Mapping[str, Mapping[str, Any]]) -> list[str]:
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
    return [*lines, "", *commands]


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
    width, height, left = 360, 250, 46
    image = Image.new("RGB", (width * len(logs), height), "white")
    for number, (name, log) in enumerate(logs.items()):
        panel = Image.new("RGB", (width, height), "white")
        lines = {key: line for key in log["points"][0] if (line := points(log, key)) and key not in AXES}
        draw_lines(panel, name, lines, (left, 30, width - 12, height - 30))
        image.paste(panel, (number * width, 0))
    return image


def points(log: Mapping[str, Any], key: str) -> list[tuple[float, float]]:
    """(step, value) of a loss, up to where steps are counted anew."""
    found = [(point["step"], point[key]) for point in log["points"] if key in point]
    rising = next((i for i, (a, b) in enumerate(itertools.pairwise(found), 1) if b[0] <= a[0]), len(found))
    return found[:rising]


def draw_lines(
    image: Image.Image, title: str, lines: Mapping[str, list[tuple[float, float]]], box: tuple[int, ...]
) -> None:
    """Lines of (step, value) in a box, values on one logarithmic scale."""
    left, top, right, bottom = box
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    last = max(step for line in lines.values() for step, _ in line)
    values = [value for line in lines.values() for _, value in line]
    low, high = math.log(min(values)), math.log(max(values))
    draw.rectangle(box, outline="#888888")
    draw.text((left, top - 20), title, "black", font)
    for value, y in ((high, top + 6), (low, bottom - 6)):
        draw.text((left - 4, y), f"{math.exp(value):.2g}", "black", font, anchor="rm")
    draw.text((left, bottom + 8), "step 0", "black", font)
    draw.text((right, bottom + 8), f"{last:g}", "black", font, anchor="rt")
    label = right
    for i, (name, line) in enumerate(reversed(lines.items())):
        ink = INKS[2 * i % len(INKS)]
        draw.line(
            [
                (left + step / last * (right - left),
                 bottom - 6 - (math.log(value) - low) / max(high - low, 1e-9) * (bottom - top - 12))
                for step, value in line
            ],
            ink, 2,
        )  # fmt: skip
        text = f"{name} {line[-1][1]:.3g}"
        draw.text((label, top - 20), text, ink, font, anchor="rt")
        label -= font.getlength(text) + 12


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    record = json.loads((args.results / "nano.json").read_text(encoding="utf-8"))
    paths = {name: FOLDER / "training" / f"{name}.json" for name in STAGES}
    logs = {name: json.loads(path.read_text()) for name, path in paths.items() if path.is_file()}
    card = FOLDER / "README.md"
    summary.write(card, "\n".join(figures(record)), FIGURES)
    summary.write(card, "\n".join(stages(logs)), TRAINING)
    with replacing(FOLDER / "training.png") as temporary:
        curves(logs).quantize(32).save(temporary, "PNG", optimize=True)
    print(f"written: {card}, {FOLDER / 'training.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
