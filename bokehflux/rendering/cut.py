"""A flat picture and its defocus, cut into layers: what each surface shows, and what its rim hides.

Planes of constant blur lie through the scene. A surface that runs across planes is shared between neighbours, so
that its blur changes without a step. Under what is nearer, a plane goes on as far as blur can reach, in colours
that its own visible parts suggest.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .layers import Layer


def fill(light: Tensor, known: Tensor) -> Tensor:
    """light [B, C, H, W] where known [B, 1, H, W] is 1, else colours of what is known nearby, ever coarser.

    Pull and push (Gortler et al., 1996): means of 2 x 2 pixels until all is known, then back to full size.
    """
    height, width = light.shape[-2:]
    if height == width == 1 or bool((known == 1).all()):
        return light
    share = F.avg_pool2d(known, 2, ceil_mode=True)
    coarse = F.avg_pool2d(light * known, 2, ceil_mode=True) / share.clamp(min=1e-6)
    coarse = fill(coarse, (4 * share).clamp(max=1))
    up = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
    return light * known + up * (1 - known)


def plane_radii(low: float, high: float, step_px: float = 1.0, ratio: float = 0.125) -> list[float]:
    """Radii of planes that hold low ... high, one of them 0; distance: step_px, or a share of the radius."""

    def side(limit: float) -> list[float]:
        radii = [0.0]
        while radii[-1] < limit:
            radii.append(radii[-1] + max(step_px, ratio * radii[-1]))
        return radii

    return [-r for r in reversed(side(max(-low, 0)))][:-1] + side(max(high, 0))


def cut(light: Tensor, radius_px: Tensor, spread_px: float = 1.5) -> list[Layer]:
    """Layers, the farthest first, of light [1, 3, H, W], linear, whose pixels have blur radius_px [1, H, W]."""
    radius = radius_px[:, None]
    planes = plane_radii(float(radius.min()), float(radius.max()))
    largest = max(abs(planes[0]), abs(planes[-1]))
    reach = int(2 * largest) + 2
    layers = []
    for i, plane in enumerate(planes):
        below = planes[i - 1] if i else plane - 1
        above = planes[i + 1] if i + 1 < len(planes) else plane + 1
        here = (radius > below) & (radius < above)
        if not here.any():
            continue
        at_or_nearer = ((radius - below) / (plane - below)).clamp(0, 1)
        if layers:
            near = F.max_pool2d(here.float(), 2 * reach + 1, 1, reach)
            cover = at_or_nearer * near
        else:
            cover = torch.ones_like(radius)
        known = ((radius > below) & (radius < above + spread_px)).float()
        colors = fill(light, known)
        whole = colors if not layers else torch.cat([colors * cover, cover], 1)
        layers.append(Layer(light=whole, radius_px=None if plane == 0 else torch.full((len(light),), plane)))
    return layers
