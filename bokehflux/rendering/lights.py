"""How bright a clipped light really was: from the glow around it, as saturated stars are measured.

A lens and a sensor spread a point of light into a small spot whose outer part is not clipped. All points of
a picture have spots of one shape, here a Gaussian; its width is the one that fits all their glows best, and
the height of each then follows from its own glow. Clipped areas larger than a spot stay as they are, as do
those whose surroundings do not look like a glow.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .fill import fill

CLIPPED = 0.975
"""Light from here on is clipped: display values of 252 of 255 and more."""
GLOW = 0.6
"""Light from here on is bent by a camera's curve: it tells less of the glow."""
LARGEST_PX = 3
"""Half the side of the largest spot's clipped part, at `SIZE_PX`."""
SIZE_PX = 512
"""Shorter side of a picture up to which spots are so large; in a larger one they grow with it."""
WIDTHS = (0.5, 3.0, 51)
"""Standard deviations in pixels that are tried: least, most, how many."""
UNLIKE = 0.15
"""Share of a spot's energy that a Gaussian may leave unexplained."""
BRIGHTEST = 20.0
"""No light is taken for brighter than this, in units of white."""


class _Spots(NamedTuple):
    """The P pixels of n spots. Number 0 is what belongs to none."""

    at: Tensor
    """[P] int64: where in the picture, row by row."""
    number: Tensor
    """[P] int64."""
    from_centre: Tensor
    """[P] squared distance in pixels."""
    entries: int

    def sums(self, values: Tensor) -> Tensor:
        """[3, P] -> [3, n + 1]."""
        return values.new_zeros(len(values), self.entries).index_add(1, self.number, values)


def restored(light: Tensor) -> Tensor:
    """light [1, 3, H, W], 0 ... 1, with clipped points of light as bright as their glow says, up to 20."""
    clipped = light >= CLIPPED
    reach = LARGEST_PX * max(1.0, min(light.shape[-2:]) / SIZE_PX)
    spots, around = _spots(light, clipped, max(1, round(reach)))
    if spots.entries == 1:
        return light
    shown, below = (values[0].flatten(1)[:, spots.at] for values in (light, around))  # [3, P]
    over, hidden = shown - below, shown >= CLIPPED
    seen = shown < GLOW
    energy = spots.sums((seen | hidden) * over.square()).clamp(min=1e-9)
    has = spots.sums(hidden.float()) > 0

    def fitted(width_px: Tensor) -> tuple[Tensor, Tensor]:
        """The spots [3, P] of that width, and the share of energy they leave unexplained [3, n + 1]."""
        shape = (-spots.from_centre / (2 * width_px**2)).exp()
        height = spots.sums(seen * shape * over) / spots.sums((seen * shape**2).float()).clamp(min=1e-9)
        spot = height.clamp(min=0)[:, spots.number] * shape
        missing = (1 - below - spot).clamp(min=0)  # what is clipped was at least white
        error = spots.sums(seen * (over - spot).square() + hidden * missing.square())
        return spot, torch.where(has, error / energy, 0.0)

    least, most, tries = WIDTHS
    widths = torch.linspace(least, most, tries, device=light.device)
    unexplained = torch.stack([fitted(width)[1][:, 1:].clamp(max=2 * UNLIKE).sum() for width in widths])
    spot, error = fitted(widths[unexplained.argmin()])
    is_spot = error.sum(0) / has.sum(0).clamp(min=1) < UNLIKE
    raised = torch.maximum(shown, below + spot).clamp(max=BRIGHTEST)
    out = light.clone(memory_format=torch.contiguous_format)
    out[0].flatten(1)[:, spots.at] = torch.where(hidden & is_spot[spots.number], raised, shown)
    return out


def _spots(light: Tensor, clipped: Tensor, reach: int) -> tuple[_Spots, Tensor]:
    """Clipped points with the glow around them, and the light [1, 3, H, W] that would be there without."""
    height, width = light.shape[-2:]
    there = clipped.any(1, keepdim=True)
    core = ~_grown(~there, reach)
    points = there & ~_grown(core, reach + 1)
    number = torch.arange(1.0, height * width + 1, device=light.device, dtype=torch.float64)
    number = number.view(1, 1, height, width) * points
    for _ in range(4 * reach):  # the largest number of a point goes to all its pixels
        number = F.max_pool2d(number, 3, 1, 1) * points
    glow = 2 * max(1, reach // LARGEST_PX)
    number = F.max_pool2d(number, 2 * glow + 1, 1, glow) * ~(there & ~points)
    at = number.flatten().nonzero()[:, 0]
    found, index = number.flatten()[at].unique(return_inverse=True)
    around = fill(light, (~_grown(there, glow + 1)).float())
    y, x = (at // width).to(light), (at % width).to(light)
    spots = _Spots(at, index + 1, torch.zeros_like(x), len(found) + 1)
    weight = (light - around).clamp(min=0).sum((0, 1)).flatten()[at]
    mass, across, down = spots.sums(torch.stack([weight, weight * x, weight * y]))
    mass = mass.clamp(min=1e-9)
    from_centre = (x - (across / mass)[spots.number]) ** 2 + (y - (down / mass)[spots.number]) ** 2
    return spots._replace(from_centre=from_centre), around


def _grown(there: Tensor, by_px: int) -> Tensor:
    return F.max_pool2d(there.float(), 2 * by_px + 1, 1, by_px) > 0
