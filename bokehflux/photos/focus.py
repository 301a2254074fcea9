"""Where a photograph is in focus: from its depth, and from the subject's mask or where it is sharp, or both.

Cameras rarely write the focus distance. Published work takes the median depth inside a mask of the subject,
but a mask is made by a network that does not know what the photographer focused on. Where the photograph is
sharpest is a second witness. Distances are compared as disparities, because blur is linear in them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bokehflux.lens import MAX_LEVEL

FocusSource = Literal["mask", "mask+sharpest", "sharpest"]
"""Whom to believe: the mask alone (as published), the mask where the sharpest region agrees, or only that."""
SHARPEST = 0.05
"""The share of a picture that counts as its sharpest region."""
WINDOW = 1 / 64
"""Side of the window for local energy, in short sides of the picture."""
MIN_SHARE = 0.001
"""A mask, or the sharp part of one, below this share of the picture is empty."""
MIN_ENERGY = 1e-6
"""Below this mean squared Laplacian (luma 0 to 1) there is nothing to judge sharpness by."""
SAME_RATIO = 1.25
SAME_PX = 1.0
"""Two distances agree within this ratio, or when level 30, focused on one, blurs the other by this much."""
MIN_DEPTH_M = 1e-6


class Refused(ValueError):
    """The focus of this photograph, or its depth, cannot be told; says why."""


@dataclass(frozen=True, kw_only=True)
class Focus:
    """The plane of focus."""

    distance_m: float
    refined: bool
    """Whether only the sharp part of the mask was used."""
    mask: NDArray[np.bool_]
    """[H, W], what is taken to be in focus: the mask, what is left of it, or the sharpest region."""


def find_focus(
    image: Image.Image,
    depth_m: NDArray[np.floating],
    mask: NDArray[np.floating] | None,
    source: FocusSource,
) -> Focus:
    """The focus of an upright photograph.

    depth_m: [H, W] metres, infinite far away, NaN or 0 where unknown. mask: [H, W], 0 to 1, of the subject;
    None is an empty one. The image may have another size. Raises Refused for a photograph whose focus cannot
    be told this way, ValueError for shapes that do not fit and another source.
    """
    if source not in get_args(FocusSource):
        raise ValueError(f"focus_source must be one of {', '.join(get_args(FocusSource))}, got {source!r}")
    if mask is not None and mask.shape != depth_m.shape:
        raise ValueError(f"the mask has {mask.shape} points and the depth map {depth_m.shape}")
    disparity, valid = disparity_per_m(depth_m)
    if not valid.any():
        raise Refused("the depth map has no usable value")
    inside = valid & (mask > 0.5) if mask is not None else np.zeros_like(valid)
    if source == "sharpest":
        sharp = _sharpest(image, valid)
        return _focus(disparity, sharp, refined=False)
    if inside.mean() < MIN_SHARE:
        raise Refused("the mask is empty")
    by_mask = _focus(disparity, inside, refined=False)
    if source == "mask":
        return by_mask
    sharp = _sharpest(image, valid)
    by_sharp = _focus(disparity, sharp, refined=False)
    if _agree(1 / by_mask.distance_m, 1 / by_sharp.distance_m):
        return by_mask
    common = inside & sharp
    if common.mean() >= MIN_SHARE:
        focus_per_m = float(np.median(disparity[common]))
        if _agree(focus_per_m, 1 / by_sharp.distance_m):
            return _focus(disparity, inside & _near(disparity, focus_per_m), refined=True)
    raise Refused("the mask is not where the photograph is sharp")


def disparity_per_m(depth_m: NDArray[np.floating]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """1 / depth, 0 where it is unknown, and where it is known. Infinitely far is known: 0."""
    valid = np.asarray(depth_m > MIN_DEPTH_M)
    disparity = np.zeros(depth_m.shape, np.float32)
    np.divide(1, depth_m, out=disparity, where=valid, casting="same_kind")
    return disparity, valid


def laplacian_energy(image: Image.Image, size: tuple[int, int]) -> NDArray[np.float32]:
    """Mean squared Laplacian around every point: [H, W] for size (W, H), to which the image is brought first.

    Of BT.601 luma between 0 and 1, with four neighbours.
    """
    luma = np.asarray(image.convert("L").resize(size, Image.Resampling.BOX), np.float32) / 255
    padded = np.pad(luma, 1, mode="edge")
    sides = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
    energy = ((sides - 4 * luma) ** 2).astype(np.float32)
    return _window_mean(energy, max(1, round(WINDOW * min(size) / 2)))


def _sharpest(image: Image.Image, valid: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The points of highest energy. Raises Refused for a picture without detail."""
    energy = np.where(valid, laplacian_energy(image, valid.shape[::-1]), 0)
    least = max(float(np.quantile(energy, 1 - SHARPEST)), MIN_ENERGY)
    sharp = energy >= least
    if sharp.mean() < MIN_SHARE:
        raise Refused("the photograph has too little detail to see where it is sharp")
    return sharp


def _focus(disparity: NDArray[np.float32], where: NDArray[np.bool_], refined: bool) -> Focus:
    per_m = float(np.median(disparity[where]))
    return Focus(distance_m=1 / per_m if per_m else np.inf, refined=refined, mask=where)


def _agree(one_per_m: float, other_per_m: float) -> bool:
    return bool(_near(np.asarray(one_per_m), other_per_m))


def _near(disparity: NDArray[np.floating], per_m: float) -> NDArray[np.bool_]:
    ratio = np.maximum(disparity, per_m) <= SAME_RATIO * np.minimum(disparity, per_m)
    return ratio | (MAX_LEVEL * np.abs(disparity - per_m) <= SAME_PX)


def _window_mean(values: NDArray[np.float32], radius: int) -> NDArray[np.float32]:
    """Mean over a square of 2 radius + 1 points, edges repeated."""
    for axis in (0, 1):
        pad = [(0, 0), (0, 0)]
        pad[axis] = (radius + 1, radius)
        sums = np.cumsum(np.pad(values, pad, mode="edge"), axis=axis, dtype=np.float64)
        n, width = values.shape[axis], 2 * radius + 1
        high, low = (np.take(sums, range(start, start + n), axis=axis) for start in (width, 0))
        values = ((high - low) / width).astype(np.float32)
    return values
