"""The bokeh level: its range, what a network is told, and the optics that give a photograph its level.

A level is a slope K of blur against disparity: r_px = K |1/z - 1/s| for a point z metres away and focus at
s metres, r_px the blur's radius in pixels (arXiv 2503.08434, section 3). K has the unit px m, and counts
pixels of the training size. Synthetic blur in training reads the same number otherwise: `Blur` tells how.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

MAX_LEVEL = 30.0
"""The strongest defocus; the training data was clipped here. 0 is sharp everywhere."""
TRAINING_SIDE_PX = 512
"""Shorter side of the published adapter's training pictures, which levels mean: blur grows with it."""
FULL_FRAME_DIAGONAL_MM = 43.27
"""The diagonal of a 36 x 24 mm frame, to which the "35 mm equivalent" focal length refers."""
Number = TypeVar("Number")
"""A float, or a tensor of them."""
Unify = Literal["raw", "range"]
"""Which meaning of the number a trainer sees, as in `Blur.level`."""


def unit_level(level: Number) -> Number:
    """Level 0-30 -> 0-1, which is what networks are told. The only place that divides by 30."""
    return level / MAX_LEVEL  # type: ignore[operator, return-value]


def check_level(level: float, name: str = "a bokeh level") -> None:
    """Raise ValueError unless the level lies in 0-30. name: what the message calls it."""
    if not 0 <= level <= MAX_LEVEL:
        raise ValueError(f"{name} must be between 0 (all sharp) and {MAX_LEVEL:g}, got {level:g}")


@dataclass(frozen=True, kw_only=True)
class Camera:
    """A lens and a sensor, as the EXIF data of a photograph tell them."""

    focal_mm: float
    f_number: float
    focal_35mm: float
    """The "35 mm equivalent" focal length in mm; its ratio to `focal_mm` tells how large the sensor is."""
    width_px: int
    height_px: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive number, got {value!r}")

    @property
    def px_per_mm(self) -> float:
        """Pixels per mm of sensor, by its diagonal, so that turning the picture changes nothing."""
        diagonal_mm = FULL_FRAME_DIAGONAL_MM * self.focal_mm / self.focal_35mm
        return math.hypot(self.width_px, self.height_px) / diagonal_mm

    def k_px_m(self, focus_m: float, short_side_px: int | None = None) -> float:
        """K = f² s / (2 N (s - f)) x pixels per mm: px of radius per 1/m, focus at s metres (or infinity).

        short_side_px: the picture scaled to this shorter side, whose blur in pixels scales with it; cropping
        it then changes nothing. None: as it was taken. Raises ValueError for a focus within the focal length.
        """
        focal_m = self.focal_mm / 1000
        if not focus_m > focal_m:
            raise ValueError(f"focus_m must lie beyond the focal length of {focal_m:g} m, got {focus_m:g}")
        k_px_m = self.focal_mm * self.px_per_mm * focal_m / (2 * self.f_number * (1 - focal_m / focus_m))
        return (
            k_px_m if short_side_px is None else k_px_m * short_side_px / min(self.width_px, self.height_px)
        )


def radius_px(k_px_m: float, distance_m: float, focus_m: float) -> float:
    """Radius of the blur of a point `distance_m` away (or infinity), in pixels of that size."""
    return k_px_m * abs(1 / distance_m - 1 / focus_m)


@dataclass(frozen=True, kw_only=True)
class Blur:
    """The blur of a picture whose depth is known, under both meanings of the number.

    K of a photograph multiplies disparity in 1/m. K of synthetic blur multiplies disparity scaled to 0-1 over
    the picture, so it is the radius across the picture's whole depth. `range_px` is that number for a
    photograph: the same radius for every point, and the same meaning as in synthetic pictures.
    """

    k_px_m: float
    focus_m: float
    nearest_m: float
    """The nearest point of the picture."""
    farthest_m: float
    """Its farthest point; may be infinite."""

    @property
    def range_px(self) -> float:
        """Radius of a point at one end of the picture's depth with focus at the other."""
        return radius_px(self.k_px_m, self.nearest_m, self.farthest_m)

    @property
    def largest_radius_px(self) -> float:
        """Radius of the most blurred point, with the focus where it is."""
        ends_m = (self.nearest_m, self.farthest_m)
        return max(radius_px(self.k_px_m, end_m, self.focus_m) for end_m in ends_m)

    def level(self, unify: Unify) -> float:
        """The level that a trainer sees, clipped at 30. "raw": K in 1/m, as published. "range": as synthetic
        blur counts it. Raises ValueError for another word."""
        if unify not in get_args(Unify):
            raise ValueError(f"unify must be one of {', '.join(get_args(Unify))}, got {unify!r}")
        return min(self.k_px_m if unify == "raw" else self.range_px, MAX_LEVEL)
