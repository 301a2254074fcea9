"""A picture of layers through a thin lens: each blurred as its depth asks, laid over the ones behind it.

Light is linear. A layer's coverage is blurred with its colours, so that what lies behind shows through a
defocused rim as it does through a lens: near blur spreads over sharp things, far blur ends at them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bokehflux.aperture import CENTRE, DISC, Aperture, Field

from .blur import Blur, zones

STOPS = (0.25, 0.5, 1.0)
"""Shares of a slanted layer's radius for which it is blurred; what lies between is mixed of two."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One surface of B pictures."""

    light: Tensor
    """[B, 3, H, W] of what covers everything, or [B, 4, H, W]: multiplied by its coverage, the fourth."""
    radius_px: Tensor | None = None
    """[B] of its blur, above 0 if it is nearer than the focus; None: it is in focus."""
    share: Tensor | None = None
    """For a slanted layer, [B, H, W] or what broadcasts: the share of `radius_px` at each place, 0 ... 1."""


def composite(
    layers: Sequence[Layer], aperture: Aperture = DISC, softness: float = 0.0, margin_px: int = 0
) -> Tensor:
    """Light [B, 3, H, W] of layers from the farthest, which covers everything, to the nearest.

    Exact but for what shows through a defocused rim and is defocused itself: from there the lens sees less of
    the one where it sees more of the other, and their blurs do not multiply. softness: of discs' rims, see
    `aperture_spectrum`. margin_px: layers go on mirrored for at least so many pixels beyond their edges; with
    0 their blur wraps around. Raises ValueError for a farthest layer that does not cover, and for a margin
    that is not smaller than the picture.
    """
    return _composites(layers, aperture, [aperture], softness, margin_px)[0]


def composite_by_quarters(
    layers: Sequence[Layer], aperture: Aperture = DISC, softness: float = 0.0, margin_px: int = 0
) -> Tensor:
    """`composite`, for each quarter of the aperture by itself: what is not exact shrinks to a third."""
    if not layers:
        raise ValueError("layers: expected at least one")
    shares: dict[Quarter, Tensor] = {}
    for at, here in zones(aperture, layers[0].light):
        for share, part in quarters(aperture, at):
            shares[part] = shares.get(part, 0.0) + share * here
    seen = _composites(layers, aperture, list(shares), softness, margin_px)
    return torch.stack([share * light for share, light in zip(shares.values(), seen, strict=True)]).sum(0)


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


def _composites(
    layers: Sequence[Layer], aperture: Aperture, parts: Sequence[Aperture], softness: float, margin_px: int
) -> list[Tensor]:
    """What each part of the aperture sees by itself."""
    if not layers or layers[0].light.shape[1] != 3:
        raise ValueError("layers: expected the farthest to have 3 channels, as it covers everything")
    if not 0 <= margin_px < min(layers[0].light.shape[-2:]):
        size = list(layers[0].light.shape[-2:])
        raise ValueError(f"margin_px: expected 0 or more and less than the picture's {size}, got {margin_px}")
    farthest, *nearer = layers
    seen = _defocused(farthest, aperture, parts, softness, margin_px)
    for layer in nearer:
        lights = _defocused(layer, aperture, parts, softness, margin_px)
        seen = [light[:, :3] + out * (1 - light[:, 3:]) for light, out in zip(lights, seen, strict=True)]
    return seen


def _defocused(
    layer: Layer, aperture: Aperture, parts: Sequence[Aperture], softness: float, margin_px: int
) -> list[Tensor]:
    if layer.radius_px is None:
        return [layer.light] * len(parts)
    height, width = layer.light.shape[-2:]
    top, bottom = _margins(height, margin_px)
    left, right = _margins(width, margin_px)
    wide = F.pad(layer.light, (left, right, top, bottom), mode="reflect") if margin_px else layer.light
    blur = Blur(wide, aperture, softness, (height, width))

    def blurred(radius_px: Tensor, part: Aperture) -> Tensor:
        return blur.by(radius_px, part)[..., top : top + height, left : left + width]

    if layer.share is None:
        return [blurred(layer.radius_px, part) for part in parts]
    outs, nearer = [layer.light] * len(parts), 0.0
    for stop in STOPS:
        weight = ((layer.share[:, None] - nearer) / (stop - nearer)).clamp(0, 1)
        seen = [blurred(layer.radius_px * stop, part) for part in parts]
        outs, nearer = [out + (one - out) * weight for one, out in zip(seen, outs, strict=True)], stop
    return outs


def _margins(size: int, margin_px: int) -> tuple[int, int]:
    """Before and after; no less than asked for where there is any, and as much more as makes an FFT fast."""
    if margin_px == 0:
        return 0, 0
    total, most = size + 2 * margin_px, size + 2 * (size - 1)
    while not _is_fast(total) and total < most:
        total += 1
    before = (total - size) // 2
    return before, total - size - before


def _is_fast(size: int) -> bool:
    """Whether it has no prime factor above 5."""
    for prime in (2, 3, 5):
        while size % prime == 0:
            size //= prime
    return size == 1
