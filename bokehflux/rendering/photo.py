"""A photograph, blurred through a lens: from display values to light, through layers, and back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bokehflux.aperture import DISC, Aperture

from .cut import check, cut
from .layers import composite_by_quarters
from .lights import restored

GAMMA = 2.2
"""Light = display value ^ GAMMA."""
BLURRED_PX = 2.0
"""From this radius on, a light that was clipped shows as a disc."""
CLIPPED = 0.9
"""A display value from here on may hide any light."""
SMALL_PX = 256
"""Shorter side at which discs are compared."""
SEEN, WHITE = 0.02, 0.95
"""Light of discs that tells how bright they are: what is added at least, and what is not white."""


def blur_photo(
    image: Tensor,
    radius_px: Tensor,
    aperture: Aperture = DISC,
    matte: Tensor | None = None,
    highlights: float | None = 1.0,
    glow: float = 1.0,
) -> Tensor:
    """image [3, H, W], 0 ... 1, blurred by radius_px [H, W], above 0 for what is nearer than the focus.

    matte [H, W]: see `cut`. highlights: how bright a clipped light really was, 1 as the picture has it (see
    `raised`); None: as its glow says (`lights.restored`), of which a share `glow` is added. Where nothing is
    blurred the picture stays as it is. Raises ValueError for other shapes and numbers.
    """
    if not (0 <= image.min() and image.max() <= 1):
        low, high = float(image.min()), float(image.max())
        raise ValueError(f"image: expected display values of 0 ... 1, got {low:g} ... {high:g}")
    light = image[None] ** GAMMA
    check(light, radius_px[None], None if matte is None else matte[None])
    light = (
        torch.lerp(light, restored(light), glow)
        if highlights is None
        else raised(light, highlights, radius_px)
    )
    return blur_light(light, radius_px, aperture, matte)[0].clamp(0, 1) ** (1 / GAMMA)


def blur_light(
    light: Tensor, radius_px: Tensor, aperture: Aperture = DISC, matte: Tensor | None = None
) -> Tensor:
    """As `blur_photo`, of light [1, 3, H, W], linear and from 0 to any brightness."""
    layers = cut(light, radius_px[None], None if matte is None else matte[None])
    margin = min(int(radius_px.abs().max()) + 2, *(side - 1 for side in radius_px.shape))
    return composite_by_quarters(layers, aperture, margin_px=margin)


def glow_shown(sharp: Tensor, radius_px: Tensor, blurred: Tensor) -> float:
    """The share, 0 ... 1, of the light that lights' glow tells which their discs in a blurred picture show.

    sharp [3, H, W], blurred by radius_px [H, W] to blurred [3, h, w]; display values. 1 where none is shown.
    """
    light = sharp[None] ** GAMMA
    more = restored(light) - light
    if not more.any():
        return 1.0
    scale = min(1.0, SMALL_PX / min(radius_px.shape))
    size = [max(1, round(scale * side)) for side in radius_px.shape]
    both = (light, more, blurred[None] ** GAMMA)
    light, more, shown = (F.interpolate(one, size, mode="bilinear", antialias=True) for one in both)
    radius = scale * F.interpolate(radius_px[None, None], size, mode="bilinear", antialias=True)[0, 0]
    without, discs = blur_light(light, radius), blur_light(light + more, radius)
    added = discs - without
    there = (added > SEEN) & (shown < WHITE)
    return float(((shown - without)[there].sum() / added[there].sum()).clamp(0, 1)) if there.any() else 1.0


def raised(light: Tensor, highlights: float, radius_px: Tensor) -> Tensor:
    """light [B, 3, H, W], 0 ... 1, made brighter where a channel comes near 1: up to `highlights` times at 1.

    A sensor cannot tell a lamp from white paper. Blurred as it is, a clipped lamp becomes a dim disc. Colours
    keep their hue, and what is sharp by radius_px, [H, W] or what broadcasts, stays as it is. Raises
    ValueError below 1.
    """
    if not highlights >= 1:
        raise ValueError(f"highlights: expected at least 1, got {highlights:g}")
    start = CLIPPED**GAMMA
    near = ((light.amax(1, keepdim=True) - start) / (1 - start)).clamp(0, 1)
    blurred = (radius_px.abs() / BLURRED_PX).clamp(max=1)
    return light * (1 + (highlights - 1) * near**2 * blurred)
