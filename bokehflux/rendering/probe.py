"""A map of blur from two pictures of one scene: a sharp one, and one that a lens, or a network, has blurred.

The sharp picture is blurred by discs of many radii. At every place the radius is wanted whose disc explains
the blurred picture best within a window, where a part of it may have stayed sharp: networks leave some. What
is in front of a place hardly counts for it: it has no share in what is blurred behind. Windows choose
jointly, by semi-global matching (Hirschmüller, 2008), so that places without detail take the radius of their
neighbours. The photograph itself then says where the map's edges lie (guided filter, He et al., 2013).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bokehflux.aperture import DISC

from .blur import Blur
from .photo import GAMMA

CELL_PX = 4
"""The map has one number for a square of this side, before edges are put right, at `FIT_SIDE_PX`."""


class _Trust(NamedTuple):
    window_cells: int
    """A window reaches so many cells to each side."""
    doubt: float
    """Weight of a cell's own window beside its neighbours' choices."""


EXACT, LOOSE = _Trust(1, 0.15), _Trust(2, 0.1)
"""For pictures that differ by blur alone, and for a network's that lost or moved detail as well."""
FIT_SIDE_PX = 256
"""Pictures whose shorter side is larger are fitted at this size."""
BLURRED_LEAST = 0.5
"""The least share of a place that is blurred; the rest has stayed sharp."""
NOISE = 5e-4
"""Squared error, of display values, below which radii are not told apart."""
SHARP, SHARP_PX = 0.1, 2.0
"""What is sharp is so much likelier, as a logarithm, than what has so many pixels of blur or more."""
MOST = 3.0
"""By how much, as a logarithm, a cell can object to a radius."""
STEP, JUMP = 0.2, 2.0
"""What it costs when neighbours lie one radius apart, or more."""
EDGE = 0.1
"""A difference of display values between cells that makes a jump between them cheap."""
IN_FRONT = 0.05
"""What is in front of a place counts so little for it. By nothing, no radius would be wrong where all is."""
REACH_PX, FLATNESS = 6, 1e-3
"""The guided filter's window and regulariser, at `FIT_SIDE_PX`."""


class Fit(NamedTuple):
    radius_px: Tensor
    """[H, W] in pixels of the sharp picture's size."""
    residual: float
    """Root mean square, in display values, of what the discs leave unexplained."""


def fit_radius(sharp: Tensor, blurred: Tensor, largest: float, loose: bool = False) -> Fit:
    """The blur radii that lead from sharp [3, H, W] to blurred [3, h, w], both display values 0 to 1.

    largest: the largest radius that is looked for, as a share of the shorter side. The blurred picture may be
    smaller. loose: it is a network's, which lost or moved detail besides. Raises ValueError for pictures of
    other shapes, or too small to compare.
    """
    if sharp.dim() != 3 or blurred.dim() != 3 or not len(sharp) == len(blurred) == 3:
        raise ValueError(f"expected [3, H, W] twice, got {list(sharp.shape)} and {list(blurred.shape)}")
    scale = min(1.0, FIT_SIDE_PX / min(blurred.shape[-2:]))
    high, wide = (max(1, round(scale * side / CELL_PX)) * CELL_PX for side in blurred.shape[-2:])
    if min(high, wide) < 4 * CELL_PX:
        raise ValueError(f"pictures of {list(blurred.shape[-2:])} are too small to find their blur in")
    small, target = (
        F.interpolate(one[None].float(), (high, wide), mode="bilinear", antialias=True).clamp(0, 1)
        for one in (sharp, blurred)
    )
    radii = _candidates(largest * min(high, wide))
    cells, trust = _cells(small, 0)[0], LOOSE if loose else EXACT
    shown = small
    everything = small.new_ones(1, 1, high, wide)
    rarer = SHARP * (small.new_tensor(radii) / SHARP_PX).clamp(max=1).view(-1, 1, 1)
    discs = _blurred(small, radii, [everything] * len(radii))
    for last in (False, True):
        cost = _cost(small, target, discs, trust.window_cells)
        doubt = (cost + NOISE).log() + rarer
        chosen = _matched(trust.doubt * (doubt - doubt.amin(0)).clamp(max=MOST), cells)
        coarse = _between(chosen, radii)
        radius = _guided(coarse, small, shown if not last else sharp[None].float()).clamp(0, radii[-1])
        if not last:
            behind = [(radius >= r / 2).float().clamp(min=IN_FRONT) if r > 1 else everything for r in radii]
            discs = _blurred(small, radii, behind)
    found = cost.gather(0, chosen.argmin(0, keepdim=True))
    return Fit(radius[0, 0] * (min(sharp.shape[-2:]) / min(high, wide)), float(found.mean().sqrt()))


def _candidates(largest_px: float) -> list[float]:
    radii = [0.0]
    while radii[-1] < largest_px or len(radii) < 3:  # a parabola needs three
        radii.append(radii[-1] + max(0.5, radii[-1] / 8))
    return radii


def _blurred(sharp: Tensor, radii: Sequence[float], counts: Sequence[Tensor]) -> Tensor:
    """[J, 3, H, W]: sharp [1, 3, H, W], blurred by each radius; pixels count so much [1, 1, H, W] for it."""
    height, width = sharp.shape[-2:]
    margin = min(int(radii[-1]) + 2, height - 1, width - 1)
    light = sharp**GAMMA
    found = []
    for radius, counted in zip(radii, counts, strict=True):
        wide = F.pad(torch.cat([light * counted, counted], 1), [margin] * 4, mode="reflect")
        spread = Blur(wide, DISC).by(wide.new_tensor([radius]))
        spread = spread[..., margin : margin + height, margin : margin + width]
        found.append(spread[:, :3] / spread[:, 3:])
    return torch.cat(found).clamp(0, 1) ** (1 / GAMMA)


def _cells(values: Tensor, reach: int) -> Tensor:
    """Means over cells [N, C, H / 4, W / 4], and over so many cells around each."""
    cells = F.avg_pool2d(values, CELL_PX)
    return _mean(cells, reach) if reach else cells


def _mean(values: Tensor, reach: int) -> Tensor:
    """Over a square that reaches so many pixels to each side, less what lies outside."""
    return F.avg_pool2d(values, 2 * reach + 1, 1, reach, count_include_pad=False)


def _cost(sharp: Tensor, blurred: Tensor, discs: Tensor, reach: int) -> Tensor:
    """Mean squared error [J, h, w] of every radius in the window of every cell."""
    asked, offered = blurred - sharp, discs - sharp
    power = _cells(asked.square().sum(1, keepdim=True), reach)[:, 0]
    common = _cells((offered * asked).sum(1, keepdim=True), reach)[:, 0]
    size = _cells(offered.square().sum(1, keepdim=True), reach)[:, 0]
    share = (common / size.clamp(min=1e-8)).clamp(BLURRED_LEAST, 1)
    return (power - 2 * share * common + share**2 * size).clamp(min=0) / 3


def _matched(cost: Tensor, guide: Tensor) -> Tensor:
    """Costs [J, h, w] that take neighbours' choices in, from four sides."""
    down = _from_two_sides(cost, guide)
    return down + _from_two_sides(cost.mT.contiguous(), guide.mT).mT


def _from_two_sides(cost: Tensor, guide: Tensor) -> Tensor:
    there = _passed(cost, guide)
    return there + _passed(cost.flip(1), guide.flip(1)).flip(1)


def _passed(cost: Tensor, guide: Tensor) -> Tensor:
    """Along dimension 1: each row adds the least that a choice of the row before makes it cost."""
    edges = (guide[:, 1:] - guide[:, :-1]).abs().amax(0)
    jumps = STEP + (JUMP - STEP) * (-edges / EDGE).exp()
    wall = cost.new_full((1, cost.shape[2]), torch.inf)
    before, rows = cost[:, 0], [cost[:, 0]]
    for row in range(1, cost.shape[1]):
        least = before.amin(0)
        stepped = torch.minimum(torch.cat([before[1:], wall]), torch.cat([wall, before[:-1]])) + STEP
        best = torch.minimum(torch.minimum(before, stepped), least + jumps[row - 1])
        before = cost[:, row] + best - least
        rows.append(before)
    return torch.stack(rows, 1)


def _between(cost: Tensor, radii: Sequence[float]) -> Tensor:
    """[1, 1, h, w]: the cheapest radius, between candidates by the parabola through three."""
    count, best = len(cost), cost.argmin(0)
    inner = best.clamp(1, count - 2)
    left, middle, right = (cost.gather(0, (inner + by)[None])[0] for by in (-1, 0, 1))
    shift = ((left - right) / (2 * (left - 2 * middle + right)).clamp(min=1e-9)).clamp(-0.5, 0.5)
    place = torch.where(best == inner, inner + shift, best.to(cost))
    lower = place.floor().long().clamp(0, count - 2)
    table, part = cost.new_tensor(radii), place - lower
    return (table[lower] * (1 - part) + table[lower + 1] * part)[None, None]


def _guided(coarse: Tensor, guide: Tensor, shown: Tensor) -> Tensor:
    """coarse [1, 1, h, w] as a local affine function of the colours of guide [1, 3, H, W], applied to `shown`
    [1, 3, ., .], which may be larger."""
    values = F.interpolate(coarse, guide.shape[-2:], mode="bilinear")
    colors, value = _mean(guide, REACH_PX), _mean(values, REACH_PX)
    pairs = guide[:, :, None] * guide[:, None]  # [1, 3, 3, H, W]
    spread = _mean(pairs.flatten(1, 2), REACH_PX).view_as(pairs) - colors[:, :, None] * colors[:, None]
    common = _mean(guide * values, REACH_PX) - colors * value
    matrix = spread.permute(0, 3, 4, 1, 2) + FLATNESS * torch.eye(3, device=guide.device)
    slope = torch.linalg.solve(matrix, common.permute(0, 2, 3, 1)[..., None])[..., 0].permute(0, 3, 1, 2)
    line = torch.cat([slope, value - (slope * colors).sum(1, keepdim=True)], 1)
    line = F.interpolate(_mean(line, REACH_PX), shown.shape[-2:], mode="bilinear")
    return (line[:, :3] * shown).sum(1, keepdim=True) + line[:, 3:]
