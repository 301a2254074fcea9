"""Sets of pairs on toy folders: every layout, what does not belong together, the rows of the table."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from bokehflux.evaluation import __main__ as evaluation
from bokehflux.evaluation.figures import pixels
from bokehflux.evaluation.pairs import AS_IT_IS, OF_PAIR, evaluate, find_pairs
from bokehflux.metrics import psnr
from bokehflux.rendering.photo import blur_photo
from tests.tiny import tiny_pipeline


def picture(path: Path, blur_px: float = 0.0, seed: int = 0, size: tuple[int, int] = (64, 48)) -> None:
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, size[1] // 4, size[0] // 4, generator=draw)
    pixels = torch.nn.functional.interpolate(coarse, size[::-1])[0]
    pixels = blur_photo(pixels, torch.full(size[::-1], -blur_px))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((pixels.movedim(0, -1) * 255).round().byte().numpy()).save(path)


def real_bokeh(folder: Path, **changed: object) -> None:
    for name, blur in (("in/7_f22.jpg", 0.0), ("gt/7_f4.jpg", 2.0), ("gt/7_f2.jpg", 4.0)):
        picture(folder / name, blur)
    scene = {"id": 7, "source_image": "in/7_f22.jpg", "target_images": ["gt/7_f4.jpg", "gt/7_f2.jpg"]}
    (folder / "metadata").mkdir()
    (folder / "metadata" / "7.json").write_text(json.dumps(scene | {"target_avs": [4.0, 2.0]} | changed))


@pytest.mark.parametrize(
    "names", [("original", "bokeh"), ("in", "gt"), ("target", "source"), ("sharp", "blurred")]
)
def test_folders_of_equal_names(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in ("10", "2"):
        picture(tmp_path / names[0] / f"{name}.png")
        picture(tmp_path / names[1] / f"{name}.jpg", 3.0)
    (tmp_path / names[0] / "notes.txt").write_text("no picture")
    pairs = find_pairs(tmp_path)
    assert [pair.name for pair in pairs] == ["2", "10"]
    assert (
        pairs[0].sharp == tmp_path / names[0] / "2.png" and pairs[0].blurred == tmp_path / names[1] / "2.jpg"
    )


def test_real_bokeh_tells_its_apertures(tmp_path: Path) -> None:
    real_bokeh(tmp_path)
    pairs = find_pairs(tmp_path)
    assert [(pair.blurred.name, pair.f_number) for pair in pairs] == [("7_f4.jpg", 4.0), ("7_f2.jpg", 2.0)]
    assert {pair.sharp.name for pair in pairs} == {"7_f22.jpg"}


@pytest.mark.parametrize(("changed", "says"), [
    ({"source_image": 3}, "expected an object with source_image"),
    ({"target_avs": [2.0]}, "as many target_images as target_avs"),
    ({"target_avs": ["wide", 2.0]}, "expected numbers"),
    ({"target_images": ["gt/8.jpg", "gt/7_f2.jpg"]}, "which is not there"),
])  # fmt: skip
def test_metadata_that_cannot_be(tmp_path: Path, changed: dict[str, object], says: str) -> None:
    real_bokeh(tmp_path, **changed)
    with pytest.raises(ValueError, match=says):
        find_pairs(tmp_path)


def test_what_does_not_belong_together(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no set of pairs.*found none"):
        find_pairs(tmp_path / "nowhere")
    picture(tmp_path / "train" / "sharp" / "1.png")
    with pytest.raises(ValueError, match="found train; give the folder of one split"):
        find_pairs(tmp_path)
    (tmp_path / "train" / "blurred").mkdir()
    with pytest.raises(ValueError, match="have no partner: blurred lacks 1"):
        find_pairs(tmp_path / "train")
    picture(tmp_path / "train" / "blurred" / "1.png", size=(48, 48))
    with pytest.raises(ValueError, match="64 x 48.*48 x 48: expected one size"):
        evaluate(find_pairs(tmp_path / "train"), None)
    picture(tmp_path / "train" / "blurred" / "1.webp")
    with pytest.raises(ValueError, match="two pictures of the name 1"):
        find_pairs(tmp_path / "train")
    (tmp_path / "sharp").mkdir()
    (tmp_path / "blurred").mkdir()
    with pytest.raises(ValueError, match="no picture in them"):
        find_pairs(tmp_path)
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata" / "1.json").write_text("{")
    with pytest.raises(ValueError, match="cannot read"):
        find_pairs(tmp_path)


def test_the_command_compares_with_the_photograph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for i in range(2):
        picture(tmp_path / "set" / "sharp" / f"{i}.png", seed=i)
        picture(tmp_path / "set" / "blurred" / f"{i}.png", 2.0, seed=i)
    pipe = tiny_pipeline()
    defaults = dataclasses.replace(pipe.defaults, height_px=32, width_px=32)
    monkeypatch.setattr("bokehflux.load", lambda *_, **__: dataclasses.replace(pipe, defaults=defaults))
    words = [
        "pairs",
        "set",
        "--model",
        "nano",
        "--methods",
        "render",
        "inversion",
        "--levels",
        "5",
        "20",
        "28",
    ]
    assert evaluation.main([*words, "--results", "out"]) == 0
    record = json.loads(Path("out/pairs.json").read_text())
    rows = {row["way"]: row for row in record["rows"]}
    assert list(rows)[:2] == [AS_IT_IS, OF_PAIR] and len(rows) == 6
    sharp, blurred = (
        torch.stack([pixels(Image.open(f"set/{kind}/{i}.png")) for i in range(2)])
        for kind in ("sharp", "blurred")
    )
    assert rows[AS_IT_IS]["psnr"] == pytest.approx(float(psnr(sharp, blurred).mean()), abs=1e-4)
    assert rows[OF_PAIR]["psnr"] > rows[AS_IT_IS]["psnr"] + 6, "a lens explains these pairs"
    for method in ("render", "inversion"):
        one, each = (row for way, row in rows.items() if way.startswith(f"{method}, "))
        assert each["psnr"] >= one["psnr"] and "5 to 28 in 3" in one["way"] and "on the truth" in each["way"]
    assert (tmp_path / "out" / "pairs.jpg").is_file()
    said = capsys.readouterr().out
    assert "left as it is" in said and "2 pairs of set" in said


def test_a_wrong_folder_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        evaluation.main(["pairs", str(tmp_path), "--results", str(tmp_path / "out")])
    assert "holds no set of pairs" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--methods", "render"], "name one with --model"), (["--count", "0"], "at least one")],
)
def test_what_would_be_ignored_is_refused(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind in ("sharp", "blurred"):
        picture(tmp_path / kind / "0.png")
    with pytest.raises(SystemExit):
        evaluation.main(["pairs", str(tmp_path), *words, "--results", str(tmp_path / "out")])
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()
