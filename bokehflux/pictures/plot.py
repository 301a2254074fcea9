"""Plots drawn with nothing but PIL: horizontal bars in groups, and lines over one axis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from PIL import Image, ImageDraw, ImageFont

INKS = ("#1f6fb4", "#d62728", "#2a9d3a", "#888888", "#b8860b", "#6a3d9a", "#7fb2dd", "#c77cbf")
_PAPER, _INK, _GRID = "white", "black", "#dddddd"


def bars(
    rows: Sequence[Mapping[str, Any]], *, title: str, group: str, label: str, value: str, unit: str
) -> Image.Image:
    """A bar for each row that has a number under `value`.

    Rows with equal row[group] stand together; the ink is that of row[label]. `unit` follows each number.
    """
    known = [row for row in rows if row.get(value) is not None]
    labels = list(dict.fromkeys(row[label] for row in known))
    groups = list(dict.fromkeys(row[group] for row in known))
    font, bar, left, top = ImageFont.load_default(13), 16, 210, 44 + 20 * len(labels)
    image = Image.new("RGB", (960, top + bar * len(known) + 14 * len(groups) + 10), _PAPER)
    pen = ImageDraw.Draw(image)
    pen.text((10, 10), title, _INK, font)
    for i, name in enumerate(labels):
        pen.rectangle((10, 36 + 20 * i, 24, 48 + 20 * i), INKS[i % len(INKS)])
        pen.text((32, 34 + 20 * i), name, _INK, font)
    scale = 640 / (max((row[value] for row in known), default=0.0) or 1.0)
    y = top
    for name in groups:
        pen.text((10, y), str(name), _INK, font)
        for row in (row for row in known if row[group] == name):
            end = left + scale * row[value]
            pen.rectangle((left, y + 2, end, y + bar - 2), INKS[labels.index(row[label]) % len(INKS)])
            pen.text((end + 4, y), f"{row[value]:.3g} {unit}", _INK, font)
            y += bar
        y += 14
    return image


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str,
    x: str,
    logarithmic: bool = False,
    size: tuple[int, int] = (740, 510),
    span: tuple[float, float] | None = None,
) -> Image.Image:
    """A line of (x, y) points for each name. x: what the horizontal axis shows, span: from where to where, as
    far as the points go if None.

    logarithmic: the vertical axis; every y must then be positive. Below it each name stands in its line's
    ink, with the line's last value.
    """
    image = Image.new("RGB", size, _PAPER)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    left, top, right, bottom = 60, 34, size[0] - 14, size[1] - 50 - 18 * len(series)
    points = [point for line in series.values() for point in line]
    first, last = span or (min(px for px, _ in points), max(px for px, _ in points))
    low, high = min(py for _, py in points), max(py for _, py in points)
    scaled = math.log10 if logarithmic else float

    def at(px: float, py: float) -> tuple[float, float]:
        across = (px - first) / ((last - first) or 1)
        up = (scaled(py) - scaled(low)) / ((scaled(high) - scaled(low)) or 1)
        return left + across * (right - left), bottom - 6 - up * (bottom - top - 12)

    pen.text((left, 10), title, _INK, font)
    for tick in _decades(low, high) if logarithmic else _ticks(low, high):
        y = at(first, tick)[1]
        pen.line([(left, y), (right, y)], _GRID)
        pen.text((left - 6, y), f"{tick:.3g}", _INK, font, anchor="rm")
    for tick in _ticks(first, last):
        pen.text((at(tick, low)[0], bottom + 6), f"{tick:g}", _INK, font, anchor="mt")
    pen.text(((left + right) / 2, bottom + 24), x, _INK, font, anchor="mt")
    pen.rectangle((left, top, right, bottom), outline=INKS[3])
    for i, (name, line) in enumerate(series.items()):
        ink = INKS[i % len(INKS)]
        pen.line([at(*point) for point in line], ink, 2)
        text = f"{name}  {line[-1][1]:.3g}"
        pen.text((left, bottom + 44 + 18 * i), text, ink, font)
    return image


def _ticks(low: float, high: float, count: int = 6) -> list[float]:
    """About `count` round numbers from low to high."""
    if not high > low:
        return [low]
    step = 10.0 ** math.floor(math.log10((high - low) / count))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= count)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _decades(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten from low to high; both ends where fewer than two lie between."""
    powers = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    found = [value for n in powers for value in (10.0**n, 2 * 10.0**n, 5 * 10.0**n) if low <= value <= high]
    return found if len(found) > 1 else [low, high]


def joined(images: Sequence[Image.Image], direction: Literal["right", "down"]) -> Image.Image:
    """The images on one canvas, each to the right of the one before it or below it."""
    axis = 0 if direction == "right" else 1
    size = [max(image.size[i] for image in images) for i in (0, 1)]
    size[axis] = sum(image.size[axis] for image in images)
    whole, place = Image.new("RGB", (size[0], size[1]), _PAPER), [0, 0]
    for image in images:
        whole.paste(image, (place[0], place[1]))
        place[axis] += image.size[axis]
    return whole
