"""Where the focus lies, and how far every pixel is from it: from depth to a signed map of blur radii.

What is in focus is a range of disparity (one over distance), here and there or all over the picture: a plane
has no range, a slab has one, a tilted plane has another at every pixel. Disparity may be metric, in 1/m, or
normalised over the picture; a level means another blur in each (docs/levels.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bokehflux.lens import TRAINING_SIDE_PX, check_level

NEAREST_M = 1e-6
"""Depth at most this is unknown."""
POINT_PX = 5
"""Side of the square around a point whose median is the point's disparity."""


@dataclass(frozen=True)
class Focus:
    """Disparities from `far` to `near` are sharp, each a number or [H, W]."""

    far: Tensor | float
    near: Tensor | float

    def __post_init__(self) -> None:
        if bool((torch.as_tensor(self.far) > torch.as_tensor(self.near)).any()):
            raise ValueError("focus: expected a far end of no more disparity than the near one")


def known_depth(depth_m: Tensor) -> Tensor:
    """bool [H, W]: depth is finite and positive. Raises ValueError where it nowhere is."""
    if depth_m.dim() != 2:
        raise ValueError(f"depth_m: expected [H, W], got {list(depth_m.shape)}")
    known = depth_m.isfinite() & (depth_m > NEAREST_M)
    if not known.any():
        raise ValueError("depth_m: expected metres, found no pixel that is finite and above 0")
    return known


def disparity_of(depth_m: Tensor) -> Tensor:
    """1 / depth [H, W], the median where depth is unknown. Raises ValueError where all of it is."""
    known = known_depth(depth_m)
    disparity = 1 / torch.where(known, depth_m, 1.0)
    return torch.where(known, disparity, quantile(disparity[known], 0.5))


def normalised(disparity: Tensor) -> Tensor:
    """0 ... 1 over the picture, as for synthetic training pictures."""
    low, high = disparity.min(), disparity.max()
    return (disparity - low) / (high - low + 1e-8)


def at_point(disparity: Tensor, x: int, y: int) -> Focus:
    """On what pixel (x, y) shows; ValueError outside the picture."""
    height, width = disparity.shape
    if not (0 <= x < width and 0 <= y < height):
        raise ValueError(f"focus point: expected a pixel of {width} x {height}, got ({x}, {y})")
    r = POINT_PX // 2
    around = disparity[max(y - r, 0) : y + r + 1, max(x - r, 0) : x + r + 1]
    return Focus(*[float(around.median())] * 2)


def on_mask(disparity: Tensor, mask: Tensor, share: float = 0.0) -> Focus:
    """On what a mask, bool [H, W], covers: its median, or the middle share of its range (1: all of it)."""
    if mask.shape != disparity.shape or mask.dtype != torch.bool or not mask.any():
        raise ValueError(
            f"focus mask: expected bool {list(disparity.shape)} with a pixel set, "
            f"got {mask.dtype} {list(mask.shape)} with {int(mask.count_nonzero())}"
        )
    if not 0 <= share <= 1:
        raise ValueError(f"share of the mask in focus: expected 0 ... 1, got {share:g}")
    inside = disparity[mask]
    return Focus(*(float(quantile(inside, 0.5 + side * share / 2)) for side in (-1, 1)))


def at_distance(distance_m: float) -> Focus:
    """On a plane so far away, infinity included; the map must be metric."""
    return between(distance_m, distance_m)


def between(near_m: float, far_m: float) -> Focus:
    """On a slab: all from near_m to far_m metres is sharp; the map must be metric."""
    if not 0 < near_m <= far_m:
        raise ValueError(f"focus: expected 0 < near <= far in metres, got {near_m:g} and {far_m:g}")
    return Focus(1 / far_m, 1 / near_m)


def tilted(disparity: Tensor, points: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]) -> Focus:
    """On the plane through what three pixels (x, y) show.

    A plane in space is a plane of disparity over the picture. Raises ValueError for pixels in a line.
    """
    corners = torch.tensor([[1.0, x, y] for x, y in points], dtype=torch.float64)
    if corners.det().abs() < 0.5:
        raise ValueError(f"tilted focus: expected three pixels that are not in a line, got {points}")
    found = torch.tensor([at_point(disparity, x, y).near for x, y in points], dtype=torch.float64)
    base, across, down = torch.linalg.solve(corners, found).tolist()
    height, width = disparity.shape
    y = torch.arange(height, device=disparity.device, dtype=disparity.dtype)[:, None]
    x = torch.arange(width, device=disparity.device, dtype=disparity.dtype)
    plane = base + across * x + down * y
    return Focus(plane, plane)


def radius_map(disparity: Tensor, focus: Focus, level: Tensor | float) -> Tensor:
    """Blur radii [H, W] in pixels, above 0 for what is nearer than the focus, at a level, or levels [H, W].

    Raises ValueError for levels outside 0 ... 30, a map of another size, and disparity that is not finite.
    """
    if disparity.dim() != 2 or not disparity.isfinite().all():
        raise ValueError(f"disparity: expected finite numbers [H, W], got {list(disparity.shape)}")
    levels = torch.as_tensor(level, dtype=disparity.dtype, device=disparity.device)
    if levels.dim() and levels.shape != disparity.shape:
        raise ValueError(
            f"a map of levels must be {list(disparity.shape)} as disparity, got {list(levels.shape)}"
        )
    check_level(float(levels.min()))
    check_level(float(levels.max()))
    far, near = (
        torch.as_tensor(end, dtype=disparity.dtype, device=disparity.device)
        for end in (focus.far, focus.near)
    )
    beyond = disparity - disparity.clamp(far, near)
    return levels * beyond * (min(disparity.shape) / TRAINING_SIDE_PX)


def quantile(values: Tensor, share: float) -> Tensor:
    """NumPy's: torch.quantile takes 16 million numbers at most, which is less than a photograph has."""
    found = np.quantile(values.double().cpu().numpy(), share)
    return torch.tensor(found, dtype=values.dtype, device=values.device)
