"""A flat picture and its blur radii, cut into layers: what each surface shows, and what its rim hides.

Planes of constant blur lie through the scene. A surface that runs across planes is shared between neighbours, so
that its blur changes without a step. Under what is nearer, a plane goes on as far as blur can reach, in colours that
its own visible parts suggest; a plane of which nothing is to be seen nearby does not.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .layers import Layer

STEP_PX, STEP_SHARE = 1.0, 0.125
"""Two planes lie so far apart in radius: pixels, or a share of the radius where that is more."""
SURE = 0.02
"""A matte this close to 0 or 1 says that a pixel shows one surface alone."""


def cut(light: Tensor, radius_px: Tensor, matte: Tensor | None = None) -> list[Layer]:
    """Layers, the farthest first, of one picture: light [1, 3, H, W], linear, and radius_px [1, H, W] of its blur.

    matte [1, H, W], 0 ... 1: how much of a pixel the subject covers; it parts subject and background even where one
    pixel shows both. None: surfaces part where radii jump. Raises ValueError for other shapes and numbers.
    """
    if light.dim() != 4 or light.shape[:2] != (1, 3) or radius_px.shape != (1, *light.shape[2:]):
        raise ValueError(
            f"expected light [1, 3, H, W] and radius_px [1, H, W], got {list(light.shape)} and {list(radius_px.shape)}"
        )
    if not (light.isfinite().all() and radius_px.isfinite().all()):
        raise ValueError("light and radius_px: expected finite numbers, found nan or infinity")
    radius = radius_px[:, None]
    if matte is None:
        return [layer for _, layer in _planes(light, radius, None)]
    if matte.shape != radius_px.shape or not (0 <= matte.min() and matte.max() <= 1):
        raise ValueError(f"matte: expected {list(radius_px.shape)} within 0 ... 1, got {list(matte.shape)}")
    subject = matte[:, None]
    both = torch.cat([light, radius], 1)
    behind, front = fill(both, (subject < SURE).to(light)), fill(both, (subject > 1 - SURE).to(light))
    farthest, *planes = _planes(behind[:, :3], behind[:, 3:], None)
    planes += _planes(front[:, :3], front[:, 3:], subject)
    return [layer for _, layer in (farthest, *sorted(planes, key=lambda plane: plane[0]))]


def fill(light: Tensor, known: Tensor) -> Tensor:
    """light [B, C, H, W] where known [B, 1, H, W] is 1, else means of what is known around, ever wider.

    Pull and push (Gortler et al., 1996): means of 2 x 2 pixels until all is known, then back to full size.
    """
    height, width = light.shape[-2:]
    if height == width == 1 or bool((known == 1).all()):
        return light
    share = F.avg_pool2d(known, 2, ceil_mode=True)
    coarse = F.avg_pool2d(light * known, 2, ceil_mode=True) / share.clamp(min=1e-6)
    coarse = fill(coarse, (4 * share).clamp(max=1))
    wide = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
    return light * known + wide * (1 - known)


def plane_radii(low: float, high: float) -> list[float]:
    """Radii of planes from at most `low` to at least `high`, rising, 0 among them."""

    def side(limit: float) -> list[float]:
        radii = [0.0]
        while radii[-1] < limit:
            radii.append(radii[-1] + max(STEP_PX, STEP_SHARE * radii[-1]))
        return radii

    return [-r for r in reversed(side(-low))][:-1] + side(high)


def _planes(light: Tensor, radius: Tensor, matte: Tensor | None) -> list[tuple[float, Layer]]:
    """The layers of one surface or many, with their radii. matte None: the farthest covers the whole picture."""
    radii = plane_radii(float(radius.min()), float(radius.max()))
    reach = int(2 * max(-radii[0], radii[-1])) + 2
    planes: list[tuple[float, Layer]] = []
    for below, plane, above in zip([radii[0] - 1, *radii], radii, [*radii[1:], radii[-1] + 1], strict=False):
        visible = (radius > below) & (radius < above)
        if not visible.any():
            continue
        colors = fill(light, visible.to(light))
        if planes:
            cover = ((radius - below) / (plane - below)).clamp(0, 1) * _near(visible, reach)
        else:
            cover = torch.ones_like(radius)
        if matte is not None:
            cover = cover * matte
        if planes or matte is not None:
            colors = torch.cat([colors * cover, cover], 1)
        planes.append((plane, Layer(light=colors, radius_px=None if plane == 0 else radius.new_full((1,), plane))))
    return planes


def _near(there: Tensor, reach_px: int) -> Tensor:
    """1 within a square of reach_px around what is there, else 0: [B, 1, H, W]."""
    wide = F.max_pool2d(there.float(), (1, 2 * reach_px + 1), 1, (0, reach_px))
    return F.max_pool2d(wide, (2 * reach_px + 1, 1), 1, (reach_px, 0))
