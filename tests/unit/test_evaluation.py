"""The figures that judge nano, fed with the renderer's own pictures and with pictures that cannot pass.

Then the reports and the card that are made of them.
"""

from __future__ import annotations

import dataclasses
import json
import re
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from bokehflux.evaluation import __main__ as evaluation
from bokehflux.evaluation import card, nano, refocus, report, shortcuts
from bokehflux.evaluation.figures import CURVE, MEASURED, Figure, Series
from bokehflux.models.vae import to_uint8
from bokehflux.nano.captions import held_out
from bokehflux.nano.recipe import NANO, RESUMED
from bokehflux.pictures.sheet import Tile, contact_sheet
from bokehflux.pipeline.pipeline import Pipeline
from bokehflux.pipeline.run import Result
from tests.tiny import tiny_pipeline

ROOT = Path(__file__).resolve().parents[2]
SPEC, _ = held_out(8)


def renders(seed: int) -> Series:
    images = torch.stack([to_uint8(x * 2 - 1) for x in nano.rendered(SPEC, 96, seed, torch.device("cpu"))])
    return Series(images=images, pivots=images[:, -1])


@pytest.fixture(scope="module")
def perfect() -> dict[str, Series]:
    """A model that paints as the renderer does; unbounded pictures show another scene than their pivots."""
    one, other = renders(1), renders(2)
    mixed = dataclasses.replace(other, pivots=one.pivots)
    level_blind = Series(images=one.images[:, [3] * 8], pivots=one.pivots)
    return {
        "renderer": one,
        "renderer through VAE": one,
        "renderer, another scene": mixed,
        "unbounded": mixed,
        "grounded": one,
        "base without adapter": level_blind,
    }


def verdicts(series: dict[str, Series]) -> dict[tuple[str, str], bool | None]:
    return {(row.figure, row.of): row.passed for row in nano.judge(series, SPEC.color)}


def test_renders_meet_the_targets(perfect: dict[str, Series]) -> None:
    rows = {(row.figure, row.of): row for row in nano.judge(perfect, SPEC.color)}
    expected = {key for key in nano.TARGETS if key[0] != nano.DECODED}
    # True renders of one scene differ by occlusion and highlights: about 36 dB, no matter how good the model.
    expected.remove((nano.SCENE, "grounded"))
    assert [str(rows[key]) for key in expected if not rows[key].passed] == []
    assert rows[nano.RANKS, "renderer"].value > 0.99
    assert rows[nano.SCENE, "renderer"].value > rows[nano.SCENE, "renderer, another scene"].value + 10


def test_constant_pictures_fail(perfect: dict[str, Series]) -> None:
    grey = Series(images=torch.full_like(perfect["renderer"].images, 128), pivots=perfect["renderer"].pivots)
    found = verdicts(perfect | {"grounded": grey, "unbounded": grey})
    for figure in (nano.RANKS, nano.SHAPE, nano.DROP, nano.SCENE, nano.COLOR):
        assert found[figure, "grounded"] is False, figure
    assert found[nano.SCENE, "grounded less unbounded"] is False


def test_a_base_model_that_follows_the_seed_order_fails(perfect: dict[str, Series]) -> None:
    found = verdicts(perfect | {"base without adapter": perfect["renderer"]})
    assert found[nano.RANKS, "base without adapter"] is False
    assert found[nano.SHAPE, "base without adapter"] is False


def test_blur_of_half_the_strength_loses_too_little_sharpness(perfect: dict[str, Series]) -> None:
    weak = MEASURED.index(28.0)
    images = perfect["renderer"].images.clone()
    images[:, weak] = images[:, 2]
    found = verdicts(perfect | {"grounded": dataclasses.replace(perfect["grounded"], images=images)})
    assert found[nano.DROP, "grounded"] is False


def test_nan_fails_and_a_line_without_target_has_no_verdict() -> None:
    assert nano.figure(nano.DROP, "grounded", float("nan")).passed is False
    assert nano.figure(nano.DROP, "renderer", 1.0).passed is None


def test_levels_of_the_sheet_and_the_curve_are_all_generated() -> None:
    assert set(nano.SHEET) | set(CURVE) <= set(nano.LEVELS)
    assert nano.LEVELS[: len(MEASURED)] == MEASURED
    assert len(set(nano.LEVELS)) == len(nano.LEVELS)


# Reports.


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_pipeline()
    defaults = dataclasses.replace(pipe.defaults, height_px=64, width_px=64)
    pipe = dataclasses.replace(pipe, defaults=defaults)
    monkeypatch.setattr("bokehflux.load", lambda *_, **__: pipe)


def test_a_report_on_nano_is_written_whole(tiny: None, tmp_path: Path) -> None:
    options = ["--captions", "1", "--steps", "1", "--results", str(tmp_path)]
    assert evaluation.main(["nano", *options, "--check"]) == 1, "random weights miss targets"
    assert {path.name for path in tmp_path.iterdir()} == {
        "nano.json", "nano-curves.png", "nano-grounded.jpg", "nano-unbounded.jpg",
    }  # fmt: skip
    record = json.loads((tmp_path / "nano.json").read_text())
    assert {(row["figure"], row["of"]) for row in record["rows"]} >= set(nano.TARGETS)
    assert set(record["curves"]) >= {"level", *nano.PLOTTED}
    assert card.figures(record).count("| NO |") == sum(row["passed"] is False for row in record["rows"])


def test_a_report_on_refocusing_knows_the_photograph(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strips: list[Sequence[Tile]] = []

    def drawn(tiles: Sequence[Tile], title: str, footer: str) -> Image.Image:
        strips.append(tiles)
        return contact_sheet(tiles, title, footer)

    monkeypatch.setattr(refocus, "contact_sheet", drawn)
    options = ["--captions", "2", "--steps", "2", "--results", str(tmp_path)]
    assert evaluation.main(["refocus", *options]) == 0
    record = json.loads((tmp_path / "refocus.json").read_text())
    assert [row["level"] for row in record["rows"]] == [0, 8, 15, 28]
    assert record["rows"][0]["photo"] > 55 > record["rows"][1]["photo"], "the photograph is at level 0"
    assert all(0 < row["decoded"] < 100 for row in record["rows"]), "the truth through the autoencoder"
    assert (tmp_path / "refocus.jpg").is_file()
    assert len(strips) == 4, "refocused and rendered, of two scenes"
    for tiles in strips:
        assert [tile.label for tile in tiles] == ["photo 0", "bokeh 0", "bokeh 8", "bokeh 15", "bokeh 28"]
        assert [tile.is_pivot for tile in tiles] == [True, *[False] * 4]
    for refocused, rendered in zip(strips[::2], strips[1::2], strict=True):
        assert refocused[0].image.tobytes() == rendered[0].image.tobytes() == rendered[1].image.tobytes()


def test_the_light_of_discs_is_measured_against_the_true_ones() -> None:
    without = torch.full((3, 8, 8), 0.2)
    true, half = without.clone(), without.clone()
    true[:, 2:4, 2:4] = 1.0
    half[:, 2:4, 2:4] = ((1 + 0.2**2.2) / 2) ** (1 / 2.2)
    half[:, 6, 6] = 0.9  # no light of the true picture's
    ours, expected = refocus.added(half, true, without)
    assert expected == pytest.approx(12 * (1 - 0.2**2.2), rel=1e-5)
    assert ours == pytest.approx(expected / 2, rel=1e-5)


def test_a_report_on_shortcuts(tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--captions", "2", "--steps", "8", "--results", str(tmp_path), "--check"]
    seeds: dict[str, set[int]] = {}

    def generate(pipe: Pipeline, prompt: str, *args: object, **asked: Any) -> Result:
        seeds.setdefault(prompt, set()).add(asked["seed"])
        return made(pipe, prompt, *args, **asked)

    made = Pipeline.generate
    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "generate", generate)
        assert evaluation.main(["shortcuts", *options]) == 1, "random weights miss targets"
    assert [len(own) for own in seeds.values()] == [1, 1] and len(set.union(*seeds.values())) == 2, seeds
    record = json.loads((tmp_path / "shortcuts.json").read_text())
    rows = {row["way"]: row for row in record["rows"]}
    assert [round(row["rows_saved"] * 8 * 7) for row in rows.values()] == [6, 6, 6, 0, 4 * 7]
    assert rows["reuse 3"]["psnr"] > rows["half of the steps"]["psnr"]
    assert rows["reuse 3"]["pivot"] > 60 > rows["half of the steps"]["pivot"]
    good = {"psnr": 45.0, "worst": 40.0, "lvcorr": -0.004, "scene": 0.2}
    assert not shortcuts.missed([shortcuts.Score(**rows["reuse 3"] | good)])
    # Missing a target is an error for those alone who ask.
    monkeypatch.setattr(shortcuts, "evaluate", lambda *_, **__: [shortcuts.Score(**rows["reuse 3"])])
    assert evaluation.main(["shortcuts", *options[:-1]]) == 0
    worse = shortcuts.Score(**rows["reuse 3"] | good | {"worst": 30.0, "scene": float("nan")})
    assert [line.split()[2] for line in shortcuts.missed([worse])] == ["worst", "scene"]


def test_a_wrong_number_of_captions_is_a_usage_error(tiny: None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        evaluation.main(["nano", "--captions", "33"])
    assert "32" in capsys.readouterr().err


def test_a_document_changes_between_its_markers_alone(tmp_path: Path) -> None:
    document, markers = tmp_path / "card.md", ("<!-- a -->", "<!-- b -->")
    document.write_text("head\n<!-- a -->\nold\n<!-- b -->\ntail\n")
    for _ in range(2):
        report.replace_between(document, markers, "new")
        assert document.read_text() == "head\n<!-- a -->\nnew\n<!-- b -->\ntail\n"
    document.write_text("<!-- b -->\n<!-- a -->\n")
    with pytest.raises(ValueError, match=r"card\.md"):
        report.replace_between(document, markers, "new")


# The card.


def log(stage: object, **changes: object) -> dict:
    notes = {"recipe": dataclasses.asdict(stage) | changes, "steps": 12, "seconds": 3.6, "device": "a GPU"}  # type: ignore[call-overload]
    points = [{"step": 10 * i, "seconds": i, "loss": 1 / i, "kl": 2.0} for i in (1, 2, 3)]
    return {"notes": notes, "points": [*points, {"step": 10, "seconds": 4, "loss": 9.0}]}


def test_a_command_repeats_what_the_log_says() -> None:
    by_the_clock = log(dataclasses.replace(NANO.autoencoder, steps=9000), minutes=6.5)
    by_the_clock["notes"]["steps"] = NANO.autoencoder.steps
    distilled = log(NANO.base)
    distilled["notes"]["distill steps"] = 5
    (row, *_), (said,) = (
        card.stages({"base": distilled}).splitlines()[at] for at in (slice(2, 3), slice(-1, None))
    )
    assert "| 12 + 5 of guidance distillation |" in row and " distill_steps=5" in said
    lines = card.stages({"autoencoder": by_the_clock, "base-resumed": log(RESUMED, scenes=7)}).splitlines()
    assert f"| autoencoder | 1 | 20480 | {NANO.autoencoder.steps} | 4 | a GPU |" in lines
    assert "    python scripts/train_nano.py vae --out weights/nano" in lines
    (resumed,) = (line for line in lines if "--resume" in line)
    assert resumed.strip().startswith("python scripts/train_nano.py base --resume --out weights/nano --set ")
    override = runpy.run_path(str(ROOT / "scripts" / "train_nano.py"))["override"]
    changed = override(RESUMED, resumed.split(" --set ")[1].split())
    assert changed == dataclasses.replace(RESUMED, scenes=7, steps=12)


def test_figures_say_what_is_missed() -> None:
    rows = [
        Figure(figure="a", of="x", value=1.234, target=(1.0, None)),
        Figure(figure="b", of="y", value=0.5, target=(-0.2, 0.2)),
        Figure(figure="c", of="z", value=9.0),
    ]
    record = {"rows": [dataclasses.asdict(row) for row in rows], "captions": 4, "steps": 20, "seconds": 7.0}
    lines = card.figures(record | {"device": "a GPU", "torch": "2", "commit": "c" * 40}).splitlines()
    assert lines[2:5] == [
        "| a | x | 1.23 | at least 1 | yes |",
        "| b | y | 0.50 | -0.2 to 0.2 | NO |",
        "| c | z | 9.00 |  |  |",
    ]
    assert "evaluation nano --captions 4 --steps 20` on a GPU, torch 2, commit `cccccccccccc`" in lines[-1]


def test_a_panel_a_stage_without_what_is_counted_anew() -> None:
    both = {"base": log(NANO.base), "adapter": log(NANO.adapter)}
    picture = card.curves(both)
    assert picture.width == 2 * card.curves({"base": both["base"]}).width
    assert card.points(both["base"], "loss") == [(10, 1.0), (20, 0.5), (30, 1 / 3)]
    assert len(picture.getcolors(100_000)) > 4, "nothing is drawn"


@pytest.mark.skipif(not (ROOT / evaluation.CARD).is_dir(), reason="the bundled model is not in this checkout")
def test_the_card_lists_every_log_and_the_model_stays_small() -> None:
    folder = ROOT / evaluation.CARD
    text = (folder / "README.md").read_text(encoding="utf-8")
    for markers in (evaluation.TRAINING, evaluation.FIGURES):
        assert [text.count(marker) for marker in markers] == [1, 1]
    for path in (folder / "training").glob("*.json"):
        seconds = round(json.loads(path.read_text())["notes"]["seconds"])
        assert re.search(rf"^\| {path.stem} \|.* {seconds} \|", text, re.MULTILINE), (
            "run python -m bokehflux.evaluation card"
        )
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert size <= 55_000_000  # adapters that look at photographs and that take controls among it
