"""The level of a photograph: worked values, the recorded table of the published formula, invariances."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bokehflux.lens import Camera, radius_px
from tests.helpers import needs_shared, shared

STOPS = (1.4, 2, 2.8, 4, 5.6, 8, 16)


@pytest.mark.parametrize(
    ("focal_mm", "focal_35mm", "levels"),
    [
        (24, 24, (4.4, 3.1, 2.2, 1.6, 1.1, 0.8, 0.4)),
        (50, 50, (19.5, 13.7, 9.8, 6.8, 4.9, 3.4, 1.7)),
        (85, 85, (57.5, 40.2, 28.7, 20.1, 14.4, 10.1, 5.0)),
        (6.8, 24, (1.2, 0.9, 0.6, 0.4, 0.3, 0.2, 0.1)),
    ],
)
def test_worked_values(focal_mm: float, focal_35mm: float, levels: tuple[float, ...]) -> None:
    """The table of docs/levels.md: subject at 2 m, 1536 x 1024 pixels, on a short side of 512."""
    for stop, level in zip(STOPS, levels, strict=True):
        camera = Camera(
            focal_mm=focal_mm, f_number=stop, focal_35mm=focal_35mm, width_px=1536, height_px=1024
        )
        assert camera.k_px_m(focus_m=2, short_side_px=512) == pytest.approx(level, abs=0.051)


def test_values_of_the_published_formula() -> None:
    """Spec 1.3: 50 mm at f/1.8 focused at 2.5 m, 1024 x 683; 55 mm on APS-C at f/4.5."""
    full = Camera(focal_mm=50, f_number=1.8, focal_35mm=50, width_px=1024, height_px=683)
    crop = Camera(focal_mm=55, f_number=4.5, focal_35mm=82, width_px=1024, height_px=683)
    assert full.k_px_m(2.5) == pytest.approx(20.16, abs=0.005)
    assert crop.k_px_m(2.714) == pytest.approx(14.55, abs=0.005)


@needs_shared
def test_recorded_table() -> None:
    rows = json.loads(shared("golden/exif/table.json").read_text())["rows"]
    tried = 0
    for row in rows:
        if row.get("K_px_m") is None:
            continue
        camera = Camera(
            focal_mm=row["focal_length_mm"],
            f_number=row["f_number"],
            focal_35mm=row["focal_length_35_mm"],
            width_px=row["upright_size"][0],
            height_px=row["upright_size"][1],
        )
        assert camera.k_px_m(row["focus_distance_m"]) == pytest.approx(row["K_px_m"], rel=1e-4)
        tried += 1
    assert tried > 10


lengths = st.floats(1, 800)


@given(lengths, st.floats(0.9, 32), st.floats(0.3, 6), st.integers(16, 9000), st.integers(16, 9000))
def test_orientation_and_scale(f_mm: float, stop: float, crop: float, width: int, height: int) -> None:
    """Turning a picture changes nothing; half the picture has half the level, as half the blur."""

    def level(width: int, height: int, side: int | None = None) -> float:
        camera = Camera(
            focal_mm=f_mm, f_number=stop, focal_35mm=f_mm * crop, width_px=width, height_px=height
        )
        return camera.k_px_m(f_mm / 500, side)

    assert level(width, height) == pytest.approx(level(height, width))
    assert level(2 * width, 2 * height) == pytest.approx(2 * level(width, height))
    assert level(width, height, 256) == pytest.approx(level(width, height, 512) / 2)


def test_blur_grows_from_the_plane_of_focus() -> None:
    assert radius_px(20, 2.5, 2.5) == 0
    assert radius_px(20, math.inf, 2.5) == pytest.approx(8)
    assert radius_px(20, 1.25, 2.5) == pytest.approx(8)


def test_impossible_cameras_are_refused() -> None:
    good = {"focal_mm": 50.0, "f_number": 2.0, "focal_35mm": 50.0, "width_px": 64, "height_px": 64}
    for name, value in (("f_number", 0.0), ("focal_mm", math.nan), ("focal_35mm", -1.0), ("width_px", 0)):
        with pytest.raises(ValueError, match=name):
            Camera(**{**good, name: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="beyond the focal length"):
        Camera(**good).k_px_m(0.05)  # type: ignore[arg-type]


def test_focus_at_infinity_is_the_limit() -> None:
    camera = Camera(focal_mm=50, f_number=2, focal_35mm=50, width_px=1536, height_px=1024)
    assert camera.k_px_m(math.inf) == pytest.approx(camera.k_px_m(1e9))
