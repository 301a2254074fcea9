"""The sweep page as text: self-contained, safe, with the right numbers. tests/browser opens it."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from bokehflux.metrics import sharpness
from bokehflux.pictures import files as output
from bokehflux.pictures import metadata
from bokehflux.pictures.page import (
    MAX_EMBEDDED_PIXELS,
    curve_svg,
    measured_sharpness,
    page,
    scenes_of,
    write_page,
)
from bokehflux.pictures.series import BlurMap, Scene, Shot
from bokehflux.record import Provenance, Record
from bokehflux.settings import GenerateSettings

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))


def scene(prompt: str = "a cup", levels: tuple[float, ...] = (0.0, 12.0), pivot: float | None = 6.0) -> Scene:
    asked = GenerateSettings(
        prompt=prompt,
        seed=1,
        num_inference_steps=4,
        num_grounding_steps=2,
        bokeh_targets=(0.0,),
        bokeh_pivot=6.0,
    )
    record = Record(settings=asked, provenance=Provenance(model="nano"))
    shots = [Shot(level=level, image=NOISE.filter(ImageFilter.GaussianBlur(level / 4))) for level in levels]
    anchor = None if pivot is None else Shot(level=pivot, image=NOISE, is_pivot=True)
    return Scene(record=record, targets=tuple(shots), pivot=anchor)


def data(text: str) -> list[dict[str, Any]]:
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])


def decoded(uri: str) -> io.BytesIO:
    return io.BytesIO(base64.b64decode(uri.removeprefix("data:image/webp;base64,")))


def test_pictures_are_embedded_without_loss_and_with_their_recipes(tmp_path: Path) -> None:
    (each,) = data(page([scene()]))
    for shown, shot in zip([*each["shots"], each["pivot"]], scene().shots, strict=True):
        with Image.open(decoded(shown["src"])) as image:
            assert image.convert("RGB").tobytes() == shot.image.tobytes()
        saved = tmp_path / shown["file"]
        saved.write_bytes(decoded(shown["src"]).getvalue())
        recipe = metadata.read_recipe(saved)
        assert (recipe["bokeh_level"], recipe["prompt"]) == (shot.level, "a cup")
        assert b"trainedAlgorithmicMedia" in saved.read_bytes()
    assert len(list(tmp_path.iterdir())) == 3, "all under names of their own"


def policy(text: str) -> dict[str, str]:
    (found,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    return dict(part.split(" ", 1) for part in found.split("; "))


def test_nothing_is_loaded_from_anywhere() -> None:
    text = page([scene()])
    markup = text.replace(json.dumps(data(text)), "")
    assert not re.findall(
        r"""(?:src|href|action)\s*=\s*["'][^"']|@import|url\(|<link|fetch\(|https?://(?!cv\.iptc)""", markup
    )
    assert policy(text) | {"style-src": "", "script-src": ""} == {
        "default-src": "'none'", "img-src": "data:", "style-src": "", "script-src": "", "base-uri": "'none'",
        "form-action": "'none'",
    }  # fmt: skip


def test_only_its_own_script_and_style_run() -> None:
    text = page([scene()])
    for kind, tag in (("script-src", "script"), ("style-src", "style")):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy(text)[kind] == f"'sha256-{digest}'"
    assert not re.findall(r"""\son\w+\s*=|\sstyle\s*=\s*["']""", text.split("<script>")[0])


def test_many_large_pictures_stay_in_their_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty scenes of eight pictures of 1024 px."""
    large = Image.effect_noise((1024, 1024), 90).convert("RGB")
    monkeypatch.setattr("bokehflux.pictures.page.measured_sharpness", lambda _: 5.0)
    one = dataclasses.replace(scene(), targets=tuple(Shot(level=4.0 * i, image=large) for i in range(7)))
    files = [f"a cup-#1/{picture.stem}.jpg" for picture in one.pictures()]
    names = [f"a-cup-{i}" for i in range(20)]
    text = page([one.saved_at(files)] * 20, names)
    assert len(text) < 1 << 20
    assert policy(text)["img-src"] == "'self' data:"
    shown = [*data(text)[19]["shots"], data(text)[19]["pivot"]]
    assert shown[2]["src"] == "a%20cup-%231/bokeh-08.0.jpg"
    assert (shown[2]["file"], shown[7]["file"]) == (
        "a-cup-19-bokeh-08.0.jpg",
        "a-cup-19-pivot-bokeh-06.0.jpg",
    )


def test_the_largest_page_without_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grain as heavy as at ISO 25600; the pictures of all scenes together are counted."""
    noise = Image.fromarray((128 + 20 * np.random.default_rng(0).normal(size=(512, 512, 3))).astype(np.uint8))
    per_pixel = len(page([dataclasses.replace(scene(), targets=(Shot(level=1.0, image=noise),), pivot=None)]))
    per_pixel /= 512 * 512
    assert per_pixel * MAX_EMBEDDED_PIXELS < 40e6 and 20 * 8 * 256 * 256 <= MAX_EMBEDDED_PIXELS
    shot = Shot(level=1.0, image=noise, file="f/a.png")
    for limit, linked in ((2 * 512 * 512, False), (2 * 512 * 512 - 1, True)):
        monkeypatch.setattr("bokehflux.pictures.page.MAX_EMBEDDED_PIXELS", limit)
        text = page([dataclasses.replace(scene(), targets=(shot,), pivot=None)] * 2)
        assert (data(text)[1]["shots"][0]["src"] == "f/a.png") == linked


@pytest.mark.parametrize(
    "prompt", ["</script><script>alert(1)</script>", "@@DATA@@ @@TITLE@@", "<b>&\"'", "\\1 \\g<0>"]
)
def test_prompts_stay_text(prompt: str) -> None:
    text = page([scene(prompt)])
    assert data(text)[0]["prompt"] == prompt
    assert text.count("<script") == page([scene()]).count("<script") == 2


@given(prompt=st.text(max_size=80).filter(str.strip))
@settings(max_examples=40, deadline=None)
def test_any_prompt_is_kept(prompt: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("page") / "index.html"
    write_page([scene(prompt, levels=(3.0,), pivot=None)], path, ["folder"])
    text = path.read_text(encoding="utf-8")
    assert data(text)[0]["prompt"] == prompt and text.count("<script") == 2
    assert scenes_of(path) == {"folder"}


def test_levels_ascend_and_repeated_ones_are_told_apart() -> None:
    (each,) = data(page([scene(levels=(8.0, 0.0, 8.0), pivot=None)]))
    assert [shot["level"] for shot in each["shots"]] == [0, 8, 8] and each["pivot"] is None
    for key in ("label", "file"):
        assert len({shot[key] for shot in each["shots"]}) == 3
    (dots,) = re.findall(r'data-index="(\d)".*data-index="(\d)".*data-index="(\d)"', each["curve"])
    assert dots == ("0", "1", "2")
    assert len(data(page([scene(levels=(8.0,), pivot=None)]))[0]["shots"]) == 1
    many = tuple(i / 4 for i in range(121))
    assert [shot["level"] for shot in data(page([scene(levels=many)]))[0]["shots"]] == list(many)


def test_pages_of_earlier_versions_are_known(tmp_path: Path) -> None:
    path = tmp_path / "index.html"
    path.write_text(
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="bokehflux-scenes" content="a-cup-seed1-215f1513 a-cup-seed2-53d9d3c7">\n<title>'
    )
    assert scenes_of(path) == {"a-cup-seed1-215f1513", "a-cup-seed2-53d9d3c7"}
    path.write_text("<title>somebody's own</title>")
    assert scenes_of(path) is None


def test_the_mark_of_the_machine() -> None:
    text = page([scene()])
    assert "trainedAlgorithmicMedia" in text and "AI" in text
    assert data(text)[0]["recipe"]["seed"] == 1, "the whole recipe is there to be read"


def test_sharpness_is_that_of_the_metrics() -> None:
    exact = sharpness(torch.from_numpy(np.array(NOISE)).movedim(-1, 0)[None].float() / 255)
    assert measured_sharpness(NOISE) == pytest.approx(exact.item())
    (each,) = data(page([scene()]))
    values = [shot["sharpness"] for shot in each["shots"]]
    assert values[0] == pytest.approx(exact.item(), abs=1e-3) and values[1] < 7
    assert each["pivot"]["sharpness"] == pytest.approx(exact.item(), abs=1e-3)
    points = [(shot["level"], shot["sharpness"]) for shot in each["shots"]]
    assert each["curve"] == curve_svg(points, (6.0, each["pivot"]["sharpness"])), (
        "what is drawn is what is said"
    )


@pytest.mark.parametrize("points", [
    [(0.0, 5.0)], [(0.0, 5.0), (30.0, 5.0)], [(0.0, 9.0), (4.2, 7.5), (30.0, -18.4)], [(30.0, 1.0)],
])  # fmt: skip
@pytest.mark.parametrize("pivot", [None, (15.0, 6.0)])
def test_a_curve_is_inside_its_frame(
    points: list[tuple[float, float]], pivot: tuple[float, float] | None
) -> None:
    root = ElementTree.fromstring(curve_svg(points, pivot))
    dots = [element for element in root.iter() if element.get("class") == "dot"]
    assert [dot.get("data-index") for dot in dots] == [str(i) for i in range(len(points))]
    places = [(float(dot.get("cx", "nan")), float(dot.get("cy", "nan"))) for dot in dots]
    assert all(36 <= x <= 360 and 8 <= y <= 164 for x, y in places)
    for (a, b), (x, y) in zip(
        zip(points, points[1:], strict=False), zip(places, places[1:], strict=False), strict=True
    ):
        assert x[0] < y[0] and (a[1] > b[1]) == (x[1] < y[1])
    marks = [element for element in root.iter() if element.get("class") == "pivot"]
    assert len(marks) == (pivot is not None)
    if pivot is not None:  # where a target of its level and sharpness would lie
        place = [float(marks[0].get(at, "nan")) + float(marks[0].get(of, "nan")) / 2
                 for at, of in (("x", "width"), ("y", "height"))]  # fmt: skip
        among = ElementTree.fromstring(curve_svg([*points, pivot], None))
        dot = [element for element in among.iter() if element.get("class") == "dot"][-1]
        assert place == pytest.approx([float(dot.get("cx", "nan")), float(dot.get("cy", "nan"))])


def test_a_page_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "index.html"
    write_page([scene("old")], path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(output.os, "replace", full)
        with pytest.raises(OSError, match="No space"):
            write_page([scene("new")], path)
    assert [p.name for p in tmp_path.iterdir()] == ["index.html"] and path.read_bytes() == before
    write_page([scene("new", pivot=None)], path)
    assert data(path.read_text())[0]["pivot"] is None


def test_the_axis_of_the_curve_ends_where_it_says() -> None:
    """A value equal to a label of the axis is drawn at that label's height."""
    svg = curve_svg([(0.0, 2.96), (28.0, 2.93)], None)
    top, bottom = (int(label) for label in re.findall(r'text-anchor="end">(\d+)</text>', svg))
    drawn = [float(y) for y in re.findall(r'<circle[^>]* cy="([\d.]+)"', svg)]
    base = float(re.search(r"M\d+ 8V(\d+)H", svg)[1])  # type: ignore[index]
    expected = base - (2.96 - bottom) / (top - bottom) * (base - 12)
    assert bottom < 2.93 < 2.96 < top and abs(drawn[0] - expected) < 0.1


def test_a_model_without_a_name_leaves_no_gap_in_the_footer() -> None:
    nameless = dataclasses.replace(scene().record, provenance=Provenance(model=None))
    assert dataclasses.replace(scene(), record=nameless).footer() == nameless.settings.summary


@pytest.mark.parametrize("most", [0, 1 << 20])
def test_a_lens_brings_the_pixels_it_needs(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where other pictures stay in their files, which a page may not read."""
    monkeypatch.setattr("bokehflux.pictures.page.MAX_EMBEDDED_PIXELS", most)
    made = scene("a ball")
    lens = dataclasses.replace(made.record.settings, bokeh_pivot=0.0, aperture="cats-eye:0.5")
    made = dataclasses.replace(made, record=dataclasses.replace(made.record, settings=lens))
    assert made.pivot is not None
    ramp = Image.linear_gradient("L").resize(made.pivot.image.size)
    drawn = dataclasses.replace(made, blur_map=BlurMap(image=ramp, ends=(-0.3, 0.0)))
    files = [f"a/{i}.png" for i in range(len(made.shots) + 1)]
    (shown,) = (each["lens"] for each in data(page([drawn.saved_at(files)])))
    assert all(
        uri.startswith("data:image/") for uri in (shown["sharp"], shown["map"], *shown["shapes"].values())
    )
    assert list(shown["shapes"]) == ["disc", "polygon:6", "polygon:5", "donut:0.5", "anamorphic:2"]
    with Image.open(io.BytesIO(base64.b64decode(shown["map"].partition(",")[2]))) as image:
        assert np.array_equal(np.asarray(image), np.asarray(ramp))
    assert data(page([made]))[0]["lens"] is None
