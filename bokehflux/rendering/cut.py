"""A flat picture and its blur radii, cut into layers: what each surface shows, and what its rim hides.

Planes of constant blur lie through the scene, where its surfaces lie. A surface that runs across planes is
shared between neighbours, so that its blur changes without a step. Under what is nearer, a plane goes on as
far as blur can reach, in colours that its own visible parts suggest; a plane of which nothing is to be seen
nearby does not. Pixels of a rim, which show two surfaces, are parted.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .fill import fill
from .layers import Layer
from .rims import Rims, rims_of_depth, rims_of_matte, share_by_color, unmixed

STEP_PX, STEP_SHARE = 1.0, 0.125
"""Two planes lie so far apart in radius: pixels, or a share of the radius where that is more."""
FLAT_PX = 0.1
"""Radii this close to each other are of one flat surface."""
DOUBT = 0.01
"""Weight of a rim's own colours beside those of pixels that show one surface alone."""


class _Plane(NamedTuple):
    radius: float
    below: float
    """Radius of the next plane behind, -inf for the farthest."""
    above: float
    """Radius of the next plane before, inf for the nearest."""

    def shows(self, radius: Tensor) -> Tensor:
        """Where it has a share of what is of such a radius: bool."""
        return (radius > self.below) & (radius < self.above)

    def covers(self, radius: Tensor) -> Tensor:
        """How much of what is of such a radius lies on it or nearer, 0 ... 1."""
        return ((radius - self.below) / (self.radius - self.below)).clamp(0, 1)


def cut(light: Tensor, radius_px: Tensor, matte: Tensor | None = None) -> list[Layer]:
    """Layers, the farthest first, of one picture: light [1, 3, H, W], linear, blurred by radius_px [1, H, W].

    matte [1, H, W], 0 ... 1: how much of a pixel the subject covers. None: rims lie where radii jump, and
    their colours tell the shares. Raises ValueError for other shapes and numbers.
    """
    check(light, radius_px, matte)
    radius = radius_px[:, None]
    rims = rims_of_depth(radius) if matte is None else rims_of_matte(radius, matte[:, None])
    planes = _planes(rims)
    trust = torch.where(rims.there, DOUBT, 1.0)
    colors = torch.stack([fill(light, plane.shows(radius) * trust) for plane in planes])  # [P, 1, 3, H, W]
    colors, share = _parted(light, colors, planes, rims)

    layers: list[Layer] = []
    for i, plane in enumerate(planes):
        surface = colors[i]
        if i:
            # Its own blur brings light from so far, and what is nearer uncovers so much.
            reach = int(abs(plane.radius) + max(abs(other.radius) for other in planes[i:])) + 2
            cover = torch.maximum(plane.covers(rims.back), share * plane.covers(rims.front))
            cover = cover * _near(plane.shows(rims.back) | plane.shows(rims.front), reach)
            surface = torch.cat([surface * cover, cover], 1)
        blur = None if plane.radius == 0 else radius.new_full((1,), plane.radius)
        layers.append(Layer(light=surface, radius_px=blur))
    return layers


def plane_radii(radius: Tensor) -> list[float]:
    """Radii of planes for a picture's radii, rising, with 0 among them.

    A plane moves to where most of the pixels next to it lie, so that a flat surface has a plane of its own.
    """
    marks, limit = [0.0], float(radius.abs().max())
    while marks[-1] < limit:
        marks.append(marks[-1] + max(STEP_PX, STEP_SHARE * marks[-1]))
    marks = [-mark for mark in reversed(marks[1:])] + marks
    between = [(a + b) / 2 for a, b in itertools.pairwise(marks)]
    which = torch.bucketize(radius.contiguous(), torch.tensor(between, device=radius.device))
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


def _planes(rims: Rims) -> list[_Plane]:
    """Those on which something lies, the farthest first."""
    both = torch.cat([rims.front, rims.back])
    radii = plane_radii(both)
    ends = zip(radii, [-torch.inf, *radii[:-1]], [*radii[1:], torch.inf], strict=True)
    return [plane for plane in (_Plane(*end) for end in ends) if bool(plane.shows(both).any())]


def _parted(light: Tensor, colors: Tensor, planes: list[_Plane], rims: Rims) -> tuple[Tensor, Tensor]:
    """Planes' colours, with those of the rims' pixels, and the nearer surfaces' shares: 1 beside the rims."""
    radii = torch.tensor([plane.radius for plane in planes], device=light.device).view(-1, 1, 1, 1, 1)

    def surface(radius: Tensor) -> tuple[Tensor, Tensor]:
        """Which plane is a pixel's, [1, 1, 1, H, W], and its colours there, [1, 3, H, W]."""
        which = (radii - radius).abs().argmin(0, keepdim=True)
        return which, colors.gather(0, which.expand(1, *light.shape))[0]

    (front_is, front), (back_is, back) = surface(rims.front), surface(rims.back)
    share = torch.where(rims.share.isnan(), share_by_color(light, front, back), rims.share)
    number = torch.arange(len(planes), device=light.device).view(-1, 1, 1, 1, 1)
    mostly_front = share >= 0.5
    colors = torch.where(
        rims.there & mostly_front & (number == front_is), unmixed(light, share, back), colors
    )
    colors = torch.where(
        rims.there & ~mostly_front & (number == back_is), unmixed(light, 1 - share, front), colors
    )
    return colors, torch.where(rims.there, share, 1.0)


def _near(there: Tensor, reach_px: int) -> Tensor:
    """1 within reach_px of what is there, and a little farther: by squares of that side. [1, 1, H, W]."""
    height, width = there.shape[-2:]
    squares = F.max_pool2d(there.float(), reach_px, ceil_mode=True)
    squares = F.max_pool2d(squares, 3, 1, 1)
    return squares.repeat_interleave(reach_px, 2).repeat_interleave(reach_px, 3)[..., :height, :width]


def check(light: Tensor, radius_px: Tensor, matte: Tensor | None) -> None:
    """Raise ValueError for what `cut` cannot take."""
    if light.dim() != 4 or light.shape[:2] != (1, 3) or radius_px.shape != (1, *light.shape[2:]):
        raise ValueError(
            "expected light [1, 3, H, W] and radius_px [1, H, W], "
            f"got {list(light.shape)} and {list(radius_px.shape)}"
        )
    if not (light.isfinite().all() and radius_px.isfinite().all()):
        raise ValueError("light and radius_px: expected finite numbers, found nan or infinity")
    if matte is not None and (matte.shape != radius_px.shape or not (0 <= matte.min() and matte.max() <= 1)):
        raise ValueError(f"matte: expected {list(radius_px.shape)} within 0 ... 1, got {list(matte.shape)}")
