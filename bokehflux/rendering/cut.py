"""A flat picture and its blur radii, cut into layers: what each surface shows, and what its rim hides.

Planes of constant blur lie through the scene, where its surfaces lie. A surface that runs across planes is
shared between neighbours, so that its blur changes without a step. Under what is nearer, a plane goes on as
far as blur can reach, in colours that its own visible parts suggest; a plane of which nothing is to be seen
nearby does not.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .layers import Layer

STEP_PX, STEP_SHARE = 1.0, 0.125
"""Two planes lie so far apart in radius: pixels, or a share of the radius where that is more."""
FLAT_PX = 0.1
"""Radii this close to each other are of one flat surface."""
SURE = 0.02
"""A matte this close to 0 or 1 says that a pixel shows one surface alone."""


def cut(light: Tensor, radius_px: Tensor, matte: Tensor | None = None) -> list[Layer]:
    """Layers, the farthest first, of one picture: light [1, 3, H, W], linear, blurred by radius_px [1, H, W].

    matte [1, H, W], 0 ... 1: how much of a pixel the subject covers; it parts subject and background even
    where one pixel shows both. None: surfaces part where radii jump. Raises ValueError for other shapes and
    numbers.
    """
    if light.dim() != 4 or light.shape[:2] != (1, 3) or radius_px.shape != (1, *light.shape[2:]):
        raise ValueError(
            "expected light [1, 3, H, W] and radius_px [1, H, W], "
            f"got {list(light.shape)} and {list(radius_px.shape)}"
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
    behind = fill(both, (subject < SURE).to(light))
    # A pixel shows both in the matte's proportion: solved for the subject where it is the larger part.
    alone = (light - (1 - subject) * behind[:, :3]) / subject.clamp(min=0.5)
    front = torch.cat(
        [fill(alone.clamp(min=0), (subject >= 0.5).to(light)), fill(radius, (subject > 1 - SURE).to(light))],
        1,
    )
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


def plane_radii(radius: Tensor) -> list[float]:
    """Radii of planes for a picture's radii, rising, with 0 among them.

    A plane moves to where most of the pixels next to it lie, so that a flat surface has a plane of its own.
    """
    marks, limit = [0.0], float(radius.abs().max())
    while marks[-1] < limit:
        marks.append(marks[-1] + max(STEP_PX, STEP_SHARE * marks[-1]))
    marks = [-mark for mark in reversed(marks[1:])] + marks
    between = torch.tensor(
        [(a + b) / 2 for a, b in zip(marks, marks[1:], strict=False)], device=radius.device
    )
    which = torch.bucketize(radius.contiguous(), between)
    found: list[float] = []
    for i, mark in enumerate(marks):
        here = radius[which == i]
        plane = mark
        if mark and len(here):
            middle = here.median()
            flat = (here - middle).abs() < FLAT_PX
            plane = float(middle) if flat.float().mean() > 0.5 else mark
        if found and plane - found[-1] < STEP_PX / 2:
            found.pop()
        found.append(plane)
    return found


def _planes(light: Tensor, radius: Tensor, matte: Tensor | None) -> list[tuple[float, Layer]]:
    """Layers and their radii, of what covers as much as the matte says; None: the farthest covers it all."""
    radii = plane_radii(radius)
    planes: list[tuple[float, Layer]] = []
    for below, plane, above in zip([-torch.inf, *radii], radii, [*radii[1:], torch.inf], strict=False):
        visible = (radius > below) & (radius < above)
        if not visible.any():
            continue
        # Its own blur brings light from so far, and what is nearer uncovers so much.
        reach = int(abs(plane) + max(abs(other) for other in radii if other >= plane)) + 2
        colors = fill(light, visible.to(light))
        cover = torch.ones_like(radius)
        if planes:
            cover = ((radius - below) / (plane - below)).clamp(0, 1) * _near(visible, reach)
        if matte is not None:
            cover = cover * matte
        if planes or matte is not None:
            colors = torch.cat([colors * cover, cover], 1)
        planes.append(
            (plane, Layer(light=colors, radius_px=None if plane == 0 else radius.new_full((1,), plane)))
        )
    return planes


def _near(there: Tensor, reach_px: int) -> Tensor:
    """1 within reach_px of what is there, and a little farther: by squares of that side. [B, 1, H, W]."""
    height, width = there.shape[-2:]
    squares = F.max_pool2d(there.float(), reach_px, ceil_mode=True)
    squares = F.max_pool2d(squares, 3, 1, 1)
    return squares.repeat_interleave(reach_px, 2).repeat_interleave(reach_px, 3)[..., :height, :width]
