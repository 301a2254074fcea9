"""nano's model card: its tables and its plot come from files, and fit what they describe."""

from __future__ import annotations

import dataclasses
import json
import re
import runpy
from pathlib import Path

import pytest

from benchmarks import nano_card
from bokehflux.nano.recipe import NANO, RESUMED

ROOT = Path(__file__).resolve().parents[2]


def log(stage: object, **changes: object) -> dict:
    notes = {"recipe": dataclasses.asdict(stage) | changes, "steps": 12, "seconds": 3.6, "device": "a GPU"}  # type: ignore[call-overload]
    points = [{"step": 10 * i, "seconds": i, "loss": 1 / i, "kl": 2.0} for i in (1, 2, 3)]
    return {"notes": notes, "points": [*points, {"step": 10, "seconds": 4, "loss": 9.0}]}


def test_a_command_repeats_what_the_log_says() -> None:
    by_the_clock = log(dataclasses.replace(NANO.autoencoder, steps=9000), minutes=6.5)
    by_the_clock["notes"]["steps"] = NANO.autoencoder.steps
    lines = nano_card.stages({"autoencoder": by_the_clock, "base-resumed": log(RESUMED, scenes=7)})
    assert f"| autoencoder | 1 | 20480 | {NANO.autoencoder.steps} | 4 | a GPU |" in lines
    assert "    python scripts/train_nano.py vae --out weights/nano" in lines
    (resumed,) = (line for line in lines if "--resume" in line)
    assert resumed.strip().startswith("python scripts/train_nano.py base --resume --out weights/nano --set ")
    override = runpy.run_path(str(ROOT / "scripts" / "train_nano.py"))["override"]
    changed = override(RESUMED, resumed.split(" --set ")[1].split())
    assert changed == dataclasses.replace(RESUMED, scenes=7, steps=12)


def test_figures_say_what_is_missed() -> None:
    rows = [
        {"figure": "a", "of": "x", "value": 1.234, "target": [1.0, None], "passed": True},
        {"figure": "b", "of": "y", "value": 0.5, "target": [-0.2, 0.2], "passed": False},
        {"figure": "c", "of": "z", "value": 9.0, "target": None, "passed": None},
    ]
    record = {"rows": rows, "captions": 4, "steps": 20, "seconds": 7.0, "command": "run", "device": "a GPU"}
    lines = nano_card.figures(record | {"torch": "2", "commit": "c" * 40})
    assert lines[2:5] == [
        "| a | x | 1.23 | at least 1 | yes |",
        "| b | y | 0.50 | -0.2 to 0.2 | NO |",
        "| c | z | 9.00 |  |  |",
    ]
    assert lines[-1] == "4 captions, 20 steps, 7 s: `run` on a GPU, torch 2, commit `cccccccccccc`."


def test_a_panel_a_stage_without_what_is_counted_anew() -> None:
    both = {"base": log(NANO.base), "adapter": log(NANO.adapter)}
    picture = nano_card.curves(both)
    assert picture.width == 2 * nano_card.curves({"base": both["base"]}).width
    assert nano_card.points(both["base"], "loss") == [(10, 1.0), (20, 0.5), (30, 1 / 3)]
    assert len(picture.getcolors(100_000)) > 4, "nothing is drawn"


@pytest.mark.skipif(not nano_card.FOLDER.is_dir(), reason="the bundled model is not in this checkout")
def test_the_card_lists_every_log_and_the_model_stays_small() -> None:
    card = (nano_card.FOLDER / "README.md").read_text(encoding="utf-8")
    for markers in (nano_card.TRAINING, nano_card.FIGURES):
        assert [card.count(marker) for marker in markers] == [1, 1]
    for path in (nano_card.FOLDER / "training").glob("*.json"):
        seconds = round(json.loads(path.read_text())["notes"]["seconds"])
        assert re.search(rf"^\| {path.stem} \|.* {seconds} \|", card, re.MULTILINE), (
            "run benchmarks.nano_card"
        )
    size = sum(path.stat().st_size for path in nano_card.FOLDER.rglob("*") if path.is_file())
    assert size <= 48_000_000
