"""What is to be in focus, as values and as text.

`120,80` is a point of the picture, `near`, `far` and `0.5` lie at a share of the way from its nearest to its
farthest place, `0-0.5` is all between two of them, `mask` the subject's mask, `2.5m` a distance, `2m-4m` a
range of distances that stays sharp, and `10,20/200,30/60,180` the plane through what three points show.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

DISTANCE = r"(inf|\d*\.?\d+(?:e-?\d+)?)"
SHARES = {"near": 0.0, "far": 1.0}


@dataclass(frozen=True)
class Point:
    """What pixel (x, y) of the upright picture shows."""

    x: int
    y: int

    def __post_init__(self) -> None:
        if self.x < 0 or self.y < 0:
            raise ValueError(f"focus point: expected pixels from 0 on, got {self}")

    def __str__(self) -> str:
        return f"{self.x},{self.y}"


@dataclass(frozen=True)
class Subject:
    """What a mask covers: its median distance, or the middle share of its depth (1: all of it)."""

    share: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share of the mask in focus: expected 0 to 1, got {self.share:g}")

    def __str__(self) -> str:
        return f"mask:{_plain(self.share)}" if self.share else "mask"


@dataclass(frozen=True)
class Slab:
    """All from near_m to far_m metres away, infinity included; one distance twice is a plane."""

    near_m: float
    far_m: float

    def __post_init__(self) -> None:
        if not 0 < self.near_m <= self.far_m:
            raise ValueError(f"focus: expected 0 < near <= far in metres, got {self}")

    def __str__(self) -> str:
        near, far = (_plain(m) + "m" if math.isfinite(m) else "inf" for m in (self.near_m, self.far_m))
        return near if self.near_m == self.far_m else f"{near}-{far}"


@dataclass(frozen=True)
class Depth:
    """From one share of the picture's depth to another: 0 is its nearest place, 1 its farthest, and disparity
    (one over distance) falls evenly between them. One share twice is a plane."""

    near: float
    far: float

    def __post_init__(self) -> None:
        if not 0 <= self.near <= self.far <= 1:
            raise ValueError(f"focus: expected 0 (nearest) <= near <= far <= 1 (farthest), got {self}")

    def __str__(self) -> str:
        if self.near != self.far:
            return f"{_plain(self.near)}-{_plain(self.far)}"
        return {share: name for name, share in SHARES.items()}.get(self.near, _plain(self.near))


@dataclass(frozen=True)
class Plane:
    """The plane in space through what three pixels show, as a tilted lens has it."""

    points: tuple[Point, Point, Point]

    def __post_init__(self) -> None:
        (ax, ay), (bx, by), (cx, cy) = ((point.x, point.y) for point in self.points)
        if (bx - ax) * (cy - ay) == (by - ay) * (cx - ax):
            raise ValueError(f"tilted focus: expected three pixels that are not in a line, got {self}")

    def __str__(self) -> str:
        return "/".join(map(str, self.points))


Focus = Point | Subject | Slab | Depth | Plane


def parse_focus(text: str) -> Focus:
    """The focus of which `str` gives this text. Raises ValueError for other words."""
    text = text.strip().lower()
    if found := re.fullmatch(r"mask(?::(\d*\.?\d+))?", text):
        return Subject(float(found[1] or 0))
    if text in SHARES:
        return Depth(SHARES[text], SHARES[text])
    if found := re.fullmatch(rf"{DISTANCE}m?(?:-{DISTANCE}m?)?", text):
        ends = float(found[1]), float(found[2] or found[1])
        if "m" in text or "inf" in text:
            return Slab(*ends)
        if max(ends) <= 1:
            return Depth(*ends)
    points = [re.fullmatch(r"(\d{1,6}),(\d{1,6})", part) for part in text.split("/")]
    pixels = [Point(int(found[1]), int(found[2])) for found in points if found is not None]
    if len(pixels) == len(points) == 3:
        return Plane((pixels[0], pixels[1], pixels[2]))
    if len(pixels) == len(points) == 1:
        return pixels[0]
    raise ValueError(
        "focus: expected a point X,Y in pixels, near, far, a share between them such as 0.5, mask, a "
        "distance such as 2.5m, a range such as 2m-4m, or a plane through three points X,Y/X,Y/X,Y, got "
        f"{text!r:.80}"
    )


def _plain(number: float) -> str:
    return repr(number).removesuffix(".0")
