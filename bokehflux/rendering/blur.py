"""The blur of one layer: its light spread by an aperture's shape, by FFT. Edges wrap."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bokehflux.aperture import CENTRE, Aperture, Field


def aperture_spectrum(
    aperture: Aperture, radius_px: Tensor, height: int, width: int, softness: float = 0.0, at: Field = CENTRE
) -> Tensor:
    """Transfer function [B, height, width // 2 + 1] of a shape of unit sum and radius |radius_px|, [B].

    Radius 0 is the identity and the blur grows continuously from there: the shape's rim lies at
    sqrt(r^2 + 1/4), the disc that a pixel grows into. The rim is 1 + softness * r pixels wide. Above 0 lies
    what is nearer than the focus, and there the shape is turned by half a turn.
    """
    r = radius_px.view(-1, 1, 1)
    upright = torch.where(r > 0, -1.0, 1.0)
    rim_px, edge_px = (r**2 + 0.25).sqrt(), 1 + softness * r.abs()
    reach = int((rim_px + edge_px).max()) + 1  # beyond which a shape is 0
    y, x = (_around_zero(side, reach, r) for side in (height, width))
    shape = aperture.spread(x * upright, y[:, None] * upright, rim_px, edge_px, at)
    kernel = shape.new_zeros(len(r), height, width)
    kernel[:, y.long()[:, None], x.long()] = shape  # a negative index counts from the end
    return torch.fft.rfft2(kernel / kernel.sum((1, 2), keepdim=True))


def _around_zero(size: int, reach: int, like: Tensor) -> Tensor:
    """Whole numbers from -reach to reach, or as many as `size` has room for."""
    return torch.arange(max(-reach, -(size // 2)), min(reach + 1, (size + 1) // 2), device=like.device).to(
        like
    )


class Blur:
    """Light [B, C, H, W] in front of one aperture, ready to be blurred by any radius.

    An aperture whose shape changes over the picture splits it into zones that overlap: light between the
    centres of two zones takes both their shapes, in proportion.
    """

    def __init__(
        self,
        light: Tensor,
        aperture: Aperture,
        softness: float = 0.0,
        picture_px: tuple[int, int] | None = None,
    ) -> None:
        """softness: of the rim, see `aperture_spectrum`.

        picture_px: height and width of the picture in the middle, to which zones refer; None: H x W.
        """
        self.aperture, self.softness = aperture, softness
        self.height, self.width = light.shape[-2:]
        self.parts = [
            (torch.fft.rfft2(light * share), at) for at, share in zones(aperture, light, picture_px)
        ]

    def by(self, radius_px: Tensor, part: Aperture | None = None) -> Tensor:
        """The light blurred by radius_px [B], above 0 for what is nearer than the focus.

        part: of the aperture, in place of the whole.
        """
        shape, size = part or self.aperture, (self.height, self.width)
        blurred = [
            spectrum * aperture_spectrum(shape, radius_px, *size, self.softness, at)[:, None]
            for spectrum, at in self.parts
        ]
        total = blurred[0] if len(blurred) == 1 else torch.stack(blurred).sum(0)
        return torch.fft.irfft2(total, s=size)


def zones(
    aperture: Aperture, light: Tensor, picture_px: tuple[int, int] | None = None
) -> list[tuple[Field, Tensor]]:
    """Places whose shapes light [B, C, H, W] takes, and each one's share [H, W] of it; sum 1.

    A shape that is the same all over the picture has one, of share 1. picture_px: as for `Blur`.
    """
    if aperture.zones == 1:
        return [(CENTRE, light.new_ones(()))]
    height, width = picture_px or light.shape[-2:]
    to_corner = math.hypot(height, width)
    return [
        ((x * width / to_corner, y * height / to_corner), row[:, None] * column)
        for y, row in _zones(aperture.zones, light.shape[-2], height, light)
        for x, column in _zones(aperture.zones, light.shape[-1], width, light)
    ]


def _zones(count: int, size: int, picture: int, like: Tensor) -> list[tuple[float, Tensor]]:
    """Centres of zones, -1 ... 1 over the picture, and their shares [size], whose sum is 1 everywhere."""
    place = (torch.arange(size, device=like.device, dtype=like.dtype) + 0.5 - size / 2) * 2 / picture
    place, width = place.clamp(-1, 1), 2 / (count - 1)
    centres = [width * i - 1 for i in range(count)]
    return [(centre, (1 - (place - centre).abs() / width).clamp(min=0)) for centre in centres]
