"""The sweep page as text: self-contained, safe, with the right numbers. tests/browser opens it."""

from __future__ import annotations

import base64
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from bokehflux.metrics import sharpness
from bokehflux.pictures import files as output
from bokehflux.pictures.page import curve_svg, measured_sharpness, page, write_page
from bokehflux.pictures.series import Scene, Shot
from bokehflux.record import GenerateSettings, Provenance, Record

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))


def scene(prompt: str = "a cup", levels: tuple[float, ...] = (0.0, 12.0), pivot: float | None = 6.0) -> Scene:
    settings = GenerateSettings(
        prompt=prompt,
        seed=1,
        num_inference_steps=4,
        num_grounding_steps=2,
        bokeh_targets=(0.0,),
        bokeh_pivot=6.0,
    )
    record = Record(settings=settings, provenance=Provenance(model="nano"))
    shots = [Shot(level=level, image=NOISE.filter(ImageFilter.GaussianBlur(level / 4))) for level in levels]
    anchor = None if pivot is None else Shot(level=pivot, image=NOISE, is_pivot=True)
    return Scene(record=record, targets=tuple(shots), pivot=anchor)


def data(text: str) -> list[dict[str, Any]]:
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])


def test_pictures_are_embedded_without_loss() -> None:
    (each,) = data(page([scene()]))
    for uri, shot in zip(each["images"], scene().targets, strict=True):
        content = base64.b64decode(uri.removeprefix("data:image/webp;base64,"))
        with Image.open(io.BytesIO(content)) as image:
            assert image.convert("RGB").tobytes() == shot.image.tobytes()


def test_nothing_is_loaded_from_anywhere() -> None:
    text = page([scene()])
    markup = text.replace(json.dumps(data(text)), "")
    assert not re.findall(
        r"""(?:src|href|action)\s*=\s*["'][^"']|@import|url\(|<link|fetch\(|https?://(?!cv\.iptc)""", markup
    )
    assert "default-src 'none'" in markup


@pytest.mark.parametrize(
    "prompt", ["</script><script>alert(1)</script>", "@@DATA@@ @@TITLE@@", "<b>&\"'", "\\1 \\g<0>"]
)
def test_prompts_stay_text(prompt: str) -> None:
    text = page([scene(prompt)])
    assert data(text)[0]["prompt"] == prompt
    assert text.count("<script") == page([scene()]).count("<script") == 2


def test_the_mark_of_the_machine() -> None:
    text = page([scene()])
    assert "trainedAlgorithmicMedia" in text and "AI" in text
    assert data(text)[0]["recipe"]["seed"] == 1, "the whole recipe is there to be read"


def test_sharpness_is_that_of_the_metrics() -> None:
    exact = sharpness(torch.from_numpy(np.array(NOISE)).movedim(-1, 0)[None].float() / 255)
    assert measured_sharpness(NOISE) == pytest.approx(exact.item())
    (each,) = data(page([scene()]))
    assert each["sharpness"][0] == pytest.approx(exact.item(), abs=1e-3) and each["sharpness"][1] < 7


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
    assert sum(element.get("class") == "pivot" for element in root.iter()) == (pivot is not None)


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
