"""Apertures as values: the shape that a point of light becomes when it is out of focus.

Shapes are given in the unit circle, as a photographer sees a light behind the focus: x to the right, y down.
In front of the focus the same shape appears turned by half a turn. `spread` draws one on pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

Field = tuple[float, float]
"""Where in the picture, from its centre: x and y, 1 at a corner's distance."""
CENTRE: Field = (0.0, 0.0)


class Aperture(Protocol):
    @property
    def zones(self) -> int:
        """1 for a shape that is the same all over the picture, else how many zones a side it is split
        into."""

    def spread(self, x: Tensor, y: Tensor, radius_px: Tensor, edge_px: Tensor, at: Field = CENTRE) -> Tensor:
        """How much of pixel (x, y), in pixels from the light, a shape of `radius_px` covers: 0 ... 1.

        All tensors broadcast. edge_px: width of the soft rim. at: the light's place in the picture.
        """


def _soft(depth_px: Tensor, edge_px: Tensor) -> Tensor:
    """Coverage from the distance to the rim, positive inside."""
    return (depth_px / edge_px + 0.5).clamp(0, 1)


@dataclass(frozen=True)
class Disc:
    """A lens wide open."""

    zones = 1

    def spread(self, x: Tensor, y: Tensor, radius_px: Tensor, edge_px: Tensor, at: Field = CENTRE) -> Tensor:
        return _soft(radius_px - (x**2 + y**2).sqrt(), edge_px)


DISC = Disc()


@dataclass(frozen=True)
class Polygon:
    """A stopped-down iris: a regular polygon, its corners on the circle of the radius."""

    blades: int = 6
    """3 or more."""
    rotation_deg: float = 0.0
    """Clockwise; 0 has a corner at the top."""
    zones = 1

    def __post_init__(self) -> None:
        if self.blades < 3:
            raise ValueError(f"blades: expected 3 or more, got {self.blades}")

    def spread(self, x: Tensor, y: Tensor, radius_px: Tensor, edge_px: Tensor, at: Field = CENTRE) -> Tensor:
        half = math.pi / self.blades
        first = math.radians(self.rotation_deg - 90) + half
        normals = [first + 2 * half * i for i in range(self.blades)]
        beyond = torch.stack([x * math.cos(a) + y * math.sin(a) for a in normals]).amax(0)
        # The circle bounds the soft rim at the corners.
        inside = torch.minimum(radius_px * math.cos(half) - beyond, radius_px - (x**2 + y**2).sqrt())
        return _soft(inside, edge_px)


@dataclass(frozen=True)
class Donut:
    """A mirror lens: a disc whose middle is in the shadow of the second mirror."""

    hole: float = 0.5
    """Radius of the hole as a share of the disc's, above 0 and below 1."""
    zones = 1

    def __post_init__(self) -> None:
        if not 0 < self.hole < 1:
            raise ValueError(f"hole: expected between 0 and 1, got {self.hole:g}")

    def spread(self, x: Tensor, y: Tensor, radius_px: Tensor, edge_px: Tensor, at: Field = CENTRE) -> Tensor:
        distance = (x**2 + y**2).sqrt()
        return _soft(torch.minimum(radius_px - distance, distance - self.hole * radius_px), edge_px)


@dataclass(frozen=True)
class Anamorphic:
    """A lens for wide screens: an upright ellipse, as high as the disc of the same radius."""

    squeeze: float = 2.0
    """Height by width; below 1 the ellipse lies on its side, as wide as the disc."""
    zones = 1

    def __post_init__(self) -> None:
        if not self.squeeze > 0:
            raise ValueError(f"squeeze: expected above 0, got {self.squeeze:g}")

    def spread(self, x: Tensor, y: Tensor, radius_px: Tensor, edge_px: Tensor, at: Field = CENTRE) -> Tensor:
        across, along = max(self.squeeze, 1.0), max(1 / self.squeeze, 1.0)
        stretched = ((across * x) ** 2 + (along * y) ** 2).sqrt()
        # To first order the distance to an implicit curve is its value by its slope.
        slope = ((across**2 * x) ** 2 + (along**2 * y) ** 2).sqrt() / stretched.clamp(min=1e-6)
        return _soft((radius_px - stretched) / slope.clamp(min=1.0), edge_px)


@dataclass(frozen=True)
class CatsEye:
    """Discs cut by the lens barrel on their way out: round in the centre, lemons around it at the corners."""

    cut: float = 0.5
    """Share of the radius that each side loses at a corner; 0 to below 1."""
    zones = 5

    def __post_init__(self) -> None:
        if not 0 <= self.cut < 1:
            raise ValueError(f"cut: expected from 0 to below 1, got {self.cut:g}")

    def spread(self, x: Tensor, y: Tensor, radius_px: Tensor, edge_px: Tensor, at: Field = CENTRE) -> Tensor:
        cut_x, cut_y = at[0] * self.cut * radius_px, at[1] * self.cut * radius_px
        inner = radius_px - ((x - cut_x) ** 2 + (y - cut_y) ** 2).sqrt()
        outer = radius_px - ((x + cut_x) ** 2 + (y + cut_y) ** 2).sqrt()
        return _soft(torch.minimum(inner, outer), edge_px)


@dataclass(frozen=True, eq=False)
class Picture:
    """Any shape: a picture of the aperture, bright where light passes, in the square around the circle."""

    light: Tensor
    """[n, n], at least 0, not 0 everywhere."""
    zones = 1

    def __post_init__(self) -> None:
        light = self.light
        if light.dim() != 2 or light.shape[0] != light.shape[1]:
            raise ValueError(f"an aperture's picture: expected a square [n, n], got {list(light.shape)}")
        if not (light.isfinite().all() and light.min() >= 0 and light.max() > 0):
            raise ValueError("an aperture's picture: expected numbers of at least 0, and one above 0")

    def spread(self, x: Tensor, y: Tensor, radius_px: Tensor, edge_px: Tensor, at: Field = CENTRE) -> Tensor:
        """The shape's mean over a box of `edge_px`."""
        u, v, radius, edge = (t.double() for t in torch.broadcast_tensors(x, y, radius_px, edge_px))
        # Sums over all that lies above and to the left turn the sum over any box into four look-ups.
        light = self.light.to(u) / self.light.max()
        sums = F.pad(light.cumsum(0).cumsum(1), (1, 0, 1, 0))[None, None]

        def before(u: Tensor, v: Tensor) -> Tensor:
            at = (torch.stack([u, v], -1) / radius[..., None]).view(1, -1, 1, 2)
            return F.grid_sample(sums, at, align_corners=True, padding_mode="border").view(u.shape)

        left, right, top, bottom = u - edge / 2, u + edge / 2, v - edge / 2, v + edge / 2
        box = before(right, bottom) - before(left, bottom) - before(right, top) + before(left, top)
        cells = edge * len(light) / (2 * radius)
        return (box / cells**2).to(x.dtype)


@dataclass(frozen=True)
class Quarter:
    """A quarter of an aperture: what passes to the right or left of its middle, and below or above it."""

    whole: Aperture
    right: int
    """1 or -1."""
    below: int
    """1 or -1."""

    @property
    def zones(self) -> int:
        return self.whole.zones

    def spread(self, x: Tensor, y: Tensor, radius_px: Tensor, edge_px: Tensor, at: Field = CENTRE) -> Tensor:
        across, along = (x * self.right + 0.5).clamp(0, 1), (y * self.below + 0.5).clamp(0, 1)
        return self.whole.spread(x, y, radius_px, edge_px, at) * across * along


def quarters(aperture: Aperture, at: Field = CENTRE) -> list[tuple[float, Quarter]]:
    """The parts of an aperture that let more than a trace of light through, and their shares of it; sum 1.

    at: the light's place in the picture, on which shares depend where shapes do.
    """
    side = torch.arange(-66.0, 67.0)
    x, y, rim, edge = side, side[:, None], torch.tensor(64.0), torch.tensor(1.0)
    parts = [Quarter(aperture, right, below) for below in (-1, 1) for right in (-1, 1)]
    light = [float(part.spread(x, y, rim, edge, at).sum()) for part in parts]
    bright = [(amount, part) for amount, part in zip(light, parts, strict=True) if amount > 0.02 * sum(light)]
    return [(amount / sum(amount for amount, _ in bright), part) for amount, part in bright]
