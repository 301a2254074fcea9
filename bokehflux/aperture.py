"""Apertures as values, and as text: the shape that a point of light becomes when it is out of focus.

Shapes are given in the unit circle, as a photographer sees a light behind the focus: x to the right, y down.
In front of the focus the same shape appears turned by half a turn. `spread` draws one on pixels.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

# torch only where numbers are drawn: settings know apertures, and are read before it is loaded.
if TYPE_CHECKING:
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
    """3 to 100."""
    rotation_deg: float = 0.0
    """Clockwise; 0 has a corner at the top."""
    zones = 1

    def __post_init__(self) -> None:
        if not (3 <= self.blades <= 100 and self.blades == int(self.blades)):
            raise ValueError(f"blades: expected a whole number from 3 to 100, got {self.blades}")

    def spread(self, x: Tensor, y: Tensor, radius_px: Tensor, edge_px: Tensor, at: Field = CENTRE) -> Tensor:
        half = math.pi / self.blades
        first = math.radians(self.rotation_deg - 90) + half
        normals = [first + 2 * half * i for i in range(self.blades)]
        sides = [radius_px * math.cos(half) - (x * math.cos(a) + y * math.sin(a)) for a in normals]
        # The circle bounds the soft rim at the corners.
        circle = radius_px - (x**2 + y**2).sqrt()
        return _soft(functools.reduce(lambda a, b: a.minimum(b), sides, circle), edge_px)


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
        return _soft((radius_px - distance).minimum(distance - self.hole * radius_px), edge_px)


@dataclass(frozen=True)
class Anamorphic:
    """A lens for wide screens: an upright ellipse, as high as the disc of the same radius."""

    squeeze: float = 2.0
    """Height by width; below 1 the ellipse lies on its side, as wide as the disc."""
    zones = 1

    def __post_init__(self) -> None:
        if not 0.05 <= self.squeeze <= 20:
            raise ValueError(f"squeeze: expected 0.05 to 20, got {self.squeeze:g}")

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
        return _soft(inner.minimum(outer), edge_px)


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
        import torch
        import torch.nn.functional as F

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


NAMED: dict[str, type[Aperture]] = {
    "disc": Disc, "polygon": Polygon, "donut": Donut, "anamorphic": Anamorphic, "cats-eye": CatsEye
}  # fmt: skip
WORDS = re.compile(r"([a-z-]+)(?::(NUMBER))?(?:@(NUMBER))?".replace("NUMBER", r"-?\d*\.?\d+(?:e-?\d+)?"))
PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def parse_aperture(text: str) -> Aperture | Path:
    """`polygon:6@15` -> Polygon(6, 15), and the path of a picture of an aperture. Numbers may be left out.

    Raises ValueError for other words, and for numbers that the shape cannot have.
    """
    if text.lower().endswith(PICTURES):
        return Path(text)
    found = WORDS.fullmatch(text.strip().lower())
    kind = None if found is None else NAMED.get(found[1])
    numbers = () if found is None else found.groups()[1:]
    names = [] if kind is None else [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    if kind is None or any(numbers[len(names) :]):
        raise ValueError(
            "aperture: expected disc, polygon:BLADES, polygon:BLADES@DEGREES, donut:HOLE, anamorphic:SQUEEZE,"
            f" cats-eye:CUT or the name of a picture ({', '.join(PICTURES)}), got {text!r:.80}"
        )
    given = {name: float(number) for name, number in zip(names, numbers[: len(names)], strict=True) if number}
    return kind(**{name: int(number) if number.is_integer() else number for name, number in given.items()})


def aperture_text(aperture: Aperture | Path) -> str:
    """What `parse_aperture` reads as the same. Raises ValueError for a shape without a name."""
    if isinstance(aperture, Path):
        return str(aperture)
    name = next((name for name, kind in NAMED.items() if isinstance(aperture, kind)), None)
    if name is None:
        raise ValueError(f"aperture: {type(aperture).__name__} cannot be written as text")
    numbers = [repr(value).removesuffix(".0") for value in vars(aperture).values()]
    return name + "".join(mark + number for mark, number in zip(":@"[: len(numbers)], numbers, strict=True))
