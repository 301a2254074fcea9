"""A photograph, blurred through a lens: from display values to light, through layers, and back."""

from __future__ import annotations

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


def blur_photo(
    image: Tensor,
    radius_px: Tensor,
    aperture: Aperture = DISC,
    matte: Tensor | None = None,
    highlights: float | None = 1.0,
) -> Tensor:
    """image [3, H, W], 0 ... 1, blurred by radius_px [H, W], above 0 for what is nearer than the focus.

    matte [H, W]: see `cut`. highlights: how bright a clipped light really was, 1 as the picture has it (see
    `raised`); None: as its glow says (`lights.restored`). Where nothing is blurred the picture stays as it
    is. Raises ValueError for other shapes and numbers.
    """
    if not (0 <= image.min() and image.max() <= 1):
        low, high = float(image.min()), float(image.max())
        raise ValueError(f"image: expected display values of 0 ... 1, got {low:g} ... {high:g}")
    light = image[None] ** GAMMA
    check(light, radius_px[None], None if matte is None else matte[None])
    light = restored(light) if highlights is None else raised(light, highlights, radius_px)
    layers = cut(light, radius_px[None], None if matte is None else matte[None])
    margin = min(int(radius_px.abs().max()) + 2, *(side - 1 for side in radius_px.shape))
    return composite_by_quarters(layers, aperture, margin_px=margin)[0].clamp(0, 1) ** (1 / GAMMA)


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
