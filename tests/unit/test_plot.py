"""Plots show what they are given, and nothing where there is nothing."""

from __future__ import annotations

import pytest
from PIL import Image

from bokehflux.pictures import plot

WORDS = {"title": "t", "group": "case", "label": "arm", "value": "ms", "unit": "ms"}


def test_bars_leave_out_rows_without_a_value() -> None:
    rows = [{"case": "x", "arm": "a", "ms": 2.0}, {"case": "x", "arm": "b"}]
    tall = plot.bars([*rows, {"case": "x", "arm": "c", "ms": 1.0}], **WORDS)
    assert plot.bars(rows, **WORDS).height < tall.height
    assert plot.bars([], **WORDS).width == tall.width
    assert plot.bars([{"case": "x", "arm": "a", "ms": 0.0}], **WORDS).width == tall.width


def ink_rows(image: Image.Image, ink: str) -> list[int]:
    """Heights at which an ink is seen, left of the names."""
    wanted = tuple(int(ink[i : i + 2], 16) for i in (1, 3, 5))
    return [
        y for y in range(image.height - 90) if any(image.getpixel((x, y)) == wanted for x in range(62, 300))
    ]


@pytest.mark.parametrize("logarithmic", [False, True])
def test_higher_values_are_drawn_higher(logarithmic: bool) -> None:
    series = {"low": [(0, 1.0), (30, 1.0)], "high": [(0, 90.0), (30, 100.0)]}
    image = plot.lines(series, title="t", x="level", logarithmic=logarithmic)
    low, high = (ink_rows(image, ink) for ink in plot.INKS[:2])
    assert high and low and max(high) < min(low)


def test_one_point_and_equal_values_can_be_drawn() -> None:
    for logarithmic in (False, True):
        plot.lines({"a": [(1, 2.0)]}, title="t", x="step", logarithmic=logarithmic)


def test_joined_images_lie_beside_or_below_each_other() -> None:
    images = [Image.new("RGB", (3, 5), "red"), Image.new("RGB", (4, 2), "blue")]
    across, down = plot.joined(images, "right"), plot.joined(images, "down")
    assert (across.size, down.size) == ((7, 5), (4, 7))
    assert across.getpixel((3, 0)) == down.getpixel((0, 5)) == (0, 0, 255)
