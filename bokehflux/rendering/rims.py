"""Where one pixel shows two surfaces: a rim, its two blur radii, and what of it the nearer surface covers."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .fill import fill

JUMP_PX = 2.0
"""Neighbours whose radii differ by more lie on two surfaces, and each may show a bit of both."""
NEAR_PX = 2
"""So close to the soft rim of a matte, it tells all there is to tell."""
SURE = 0.02
"""A matte this close to 0 or 1 says that a pixel shows one surface alone."""


class Rims(NamedTuple):
    """All [1, 1, H, W]; beside the rims both radii are the pixel's own."""

    there: Tensor
    """bool."""
    front: Tensor
    """Radius of the nearer surface."""
    back: Tensor
    """Radius of the farther one."""
    share: Tensor
    """What of a pixel the nearer surface covers, 0 ... 1; NaN: colours must tell."""


def rims_of_depth(radius: Tensor) -> Rims:
    """Where radii jump, one pixel to each side."""
    front, back = F.max_pool2d(radius, 3, 1, 1), -F.max_pool2d(-radius, 3, 1, 1)
    there = front - back > JUMP_PX
    unknown = torch.full_like(radius, torch.nan)
    return Rims(there, torch.where(there, front, radius), torch.where(there, back, radius), unknown)


def rims_of_matte(radius: Tensor, matte: Tensor) -> Rims:
    """Where a matte is soft: in front lies what goes on from where it is 1, behind what goes on from 0.

    Elsewhere, where radii jump: a matte knows the rim of the subject alone.
    """
    there = (matte > SURE) & (matte < 1 - SURE)
    in_front = matte >= matte.max().clamp(max=1 - SURE)  # the surest there is, where none is sure
    behind = matte <= matte.min().clamp(min=SURE)
    front, back = fill(radius, in_front.to(radius)), fill(radius, behind.to(radius))
    others = rims_of_depth(radius)
    near = F.max_pool2d(there.to(radius), 2 * NEAR_PX + 1, 1, NEAR_PX) > 0
    front, back = torch.where(there, front, others.front), torch.where(there, back, others.back)
    beside = near & ~there
    return Rims(
        there | (others.there & ~near),
        torch.where(beside, radius, front),
        torch.where(beside, radius, back),
        torch.where(near, matte, torch.nan),
    )


def share_by_color(light: Tensor, front: Tensor, back: Tensor) -> Tensor:
    """The share [1, 1, H, W] of `front` that, mixed with `back`, comes closest to light, all [1, 3, H, W]."""
    along = front - back
    length = along.square().sum(1, keepdim=True).clamp(min=1e-6)
    return (((light - back) * along).sum(1, keepdim=True) / length).clamp(0, 1)


def unmixed(light: Tensor, share: Tensor, other: Tensor) -> Tensor:
    """The colour of which a share, at least a half, and the rest of another colour make up the light."""
    return ((light - (1 - share) * other) / share.clamp(min=0.5)).clamp(min=0)
