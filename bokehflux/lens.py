"""The bokeh level: its range, what a network is told, and the optics that give a photograph its level.

A level is the slope K of blur against disparity: r_px = K |1/z - 1/s| for a point z metres away and focus at
s metres, r_px the blur's radius in pixels of a picture of the training size (arXiv 2503.08434, section 3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

MAX_LEVEL = 30.0
"""The strongest defocus; the training data was clipped here. 0 is sharp everywhere."""
FULL_FRAME_DIAGONAL_MM = 43.27
"""The diagonal of a 36 x 24 mm frame, to which the "35 mm equivalent" focal length refers."""
Number = TypeVar("Number")
"""A float, or a tensor of them."""


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
    def pixels_per_mm(self) -> float:
        """Pixels per mm of sensor, by its diagonal, so that turning the picture changes nothing."""
        diagonal_mm = FULL_FRAME_DIAGONAL_MM * self.focal_mm / self.focal_35mm
        return math.hypot(self.width_px, self.height_px) / diagonal_mm

    def level(self, focus_m: float, short_side_px: int | None = None) -> float:
        """K = f² s / (2 N (s - f)) x pixels per mm, focus at s metres; not clipped at 30.

        short_side_px: the picture scaled to this size, whose blur in pixels scales with it; None: as it was
        taken. Raises ValueError for a focus within the focal length.
        """
        focal_m = self.focal_mm / 1000
        if not focus_m > focal_m:
            raise ValueError(f"focus_m must lie beyond the focal length of {focal_m:g} m, got {focus_m:g}")
        level = focal_m**2 * focus_m / (2 * self.f_number * (focus_m - focal_m)) * 1000 * self.pixels_per_mm
        return level if short_side_px is None else level * short_side_px / min(self.width_px, self.height_px)


def radius_px(level: float, distance_m: float, focus_m: float) -> float:
    """Radius of the blur of a point `distance_m` away (or infinity), in pixels of that size."""
    return level * abs(1 / distance_m - 1 / focus_m)
