"""Scatter in plain PyTorch: the definition, and what runs without a GPU. Arguments as in `interface`.

The mathematics is that of BokehMe's classical renderer (Peng et al., CVPR 2022). A pixel p of radius r gives
light to every pixel q within |q - p|_inf <= floor(r) + 1, with `edge` <= r where the iris ends in the
direction of q:

    w(p -> q) = (1/2 + 1/2 tanh(4 (edge - |q - p|))) / (r^2 + 0.2)
    mean(q)   = sum_p w(p -> q) light(p) / sum_p w(p -> q)

Sums are taken in one fixed order: equal inputs give equal bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 64
"""Rows that spread at a time: what they touch stays in a core's cache."""
FADED_PX = 2.3
"""So far from an edge 1/2 + 1/2 tanh is 0 or 1 in float32."""


class Iris(NamedTuple):
    """The shape that a pixel spreads over."""

    sides: int = 0
    """A polygon whose corners lie on the circle; 0: the disc."""
    first_angle: float = math.pi / 2
    """Radians from the x axis back to a corner, y down: pi / 2 has a corner at the top."""
    donut: float = 0.0
    """How much the middle is darkened: 0 not at all, 0.5 to black; beyond that its weights turn negative."""


DISC = Iris()


def offset_table(reach: int, iris: Iris) -> Tensor:
    """What a weight asks of q - p = (dy, dx) besides the radius of p: [3, 2 reach + 1, 2 reach + 1] float32.

    |q - p|, |q - p|_inf, and where the iris ends in that direction, as a share of the radius.
    """
    along = torch.arange(-reach, reach + 1, dtype=torch.float32)
    dy, dx = torch.meshgrid(along, along, indexing="ij")
    share = torch.ones_like(dy)
    if iris.sides:
        sector, corner = 2 * math.pi / iris.sides, math.pi / 2 - math.pi / iris.sides
        angle = torch.atan2(dy, dx) + iris.first_angle
        share = math.sin(corner) / torch.sin(angle.abs().fmod(sector) + corner)
    return torch.stack([(dy**2 + dx**2).sqrt(), torch.maximum(dy.abs(), dx.abs()), share])


def scatter(light: Tensor, radius_px: Tensor, iris: Iris, reach: int) -> tuple[Tensor, Tensor]:
    """reach: floor(largest radius) + 1."""
    radius, offsets = radius_px.abs(), _alike(reach, iris)
    given = torch.cat([light, torch.ones_like(light[:, :1])], 1) / (radius**2 + 0.2)[:, None]
    sums = _Padded(given, reach, 0.0)
    for row, top in _bands(radius):
        r, gives = radius[row, top : top + ROWS], given[row, :, top : top + ROWS]
        least, most = r.min().item(), r.max().item()
        for (distance, ring, share), places in offsets:
            if ring > most + 1 or distance > share * most + FADED_PX:
                continue
            part = gives
            if iris.donut or ring > least + 1 or distance > share * least - FADED_PX:
                part = gives * _weight(r, distance, ring, share, iris.donut)
            for place in places:
                sums.at(row, top, place, part).add_(part)
    total = sums.cropped()
    return total[:, :-1] / total[:, -1:], total[:, -1]


def dilate(radius_px: Tensor, reach: int) -> Tensor:
    nearest, offsets = _Padded(radius_px[:, None], reach, -math.inf), _alike(reach, DISC)
    for row, top in _bands(radius_px):
        signed = radius_px[row, None, top : top + ROWS]
        radius = signed.abs()
        most = radius.max().item()
        for (distance, _, _), places in offsets:
            if distance > most:
                continue
            covering = signed.masked_fill(radius < distance, -math.inf)
            for place in places:
                here = nearest.at(row, top, place, covering)
                torch.maximum(here, covering, out=here)
    return nearest.cropped()[:, 0]


def _weight(radius: Tensor, distance: float, ring: float, share: float, donut: float) -> Tensor:
    """w of pixels of such radii [rows, W], but for the denominator."""
    edge = radius * share
    weight = 0.5 + 0.5 * torch.tanh(4 * (edge - distance))
    if donut:
        weight = weight * (1 - donut + donut * torch.tanh(0.2 * (1 + distance - edge)))
    return weight * (radius >= ring - 1)


def _alike(reach: int, iris: Iris) -> list[tuple[tuple[float, float, float], list[tuple[int, int]]]]:
    """Rows of the table, each with all (dy, dx) that it holds for."""
    found: dict[tuple[float, float, float], list[tuple[int, int]]] = {}
    for i, row in enumerate(offset_table(reach, iris).flatten(1).T.tolist()):
        dy, dx = divmod(i, 2 * reach + 1)
        found.setdefault(tuple(row), []).append((dy - reach, dx - reach))
    return list(found.items())


def _bands(radius: Tensor) -> Iterator[tuple[int, int]]:
    """Picture and first row of every ROWS rows."""
    return ((row, top) for row in range(len(radius)) for top in range(0, radius.shape[1], ROWS))


class _Padded:
    """A result [B, C, H, W] with room for what falls beyond its borders."""

    def __init__(self, like: Tensor, reach: int, empty: float) -> None:
        batch, channels, self.height, self.width = like.shape
        self.reach = reach
        size = batch, channels, self.height + 2 * reach, self.width + 2 * reach
        self.values = like.new_full(size, empty)

    def at(self, row: int, top: int, place: tuple[int, int], band: Tensor) -> Tensor:
        """Where a band that starts at row `top` falls, moved by (dy, dx)."""
        y, x = self.reach + top + place[0], self.reach + place[1]
        return self.values[row, :, y : y + band.shape[-2], x : x + self.width]

    def cropped(self) -> Tensor:
        m = self.reach
        return self.values[:, :, m : m + self.height, m : m + self.width]
