"""BokehMe (Peng et al., CVPR 2022), exactly: a scatter, two networks, a map of where to trust which.

What it makes are the synthetic pictures of the published model's training data. Pictures are
display-referred, 0 ... 1; a defocus map is signed, in units of 10 px, above 0 for what is nearer than the
focus. The scatter works on picture^gamma; the networks see the picture as it is, and gamma beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bokehflux.aperture import Aperture, Disc, Polygon
from bokehflux.kernels.scatter.interface import dilate, scatter
from bokehflux.kernels.scatter.reference import DISC, Iris

from .bokehme_networks import Networks, resize

PX_PER_UNIT = 10.0
"""How many pixels of defocus the networks call 1."""
GAMMA_RANGE = (1.0, 5.0)
"""That the networks know."""
BRIGHTEST = 1e5
"""Pictures between networks are clamped to 0 and this."""


class Rendered(NamedTuple):
    """All [B, 3, H, W] and clamped to 0 ... 1, but for the last."""

    result: Tensor
    classical: Tensor
    neural: Tensor
    error_map: Tensor
    """[B, 1, H, W], the share of `neural` in the result."""


def iris_of(aperture: Aperture) -> Iris:
    """The scatter's form of an aperture. Raises ValueError for shapes that BokehMe lacks."""
    match aperture:
        case Disc():
            return DISC
        case Polygon():
            return Iris(aperture.blades, math.pi / 2 - math.radians(aperture.rotation_deg))
        case _:
            raise ValueError(f"aperture: BokehMe knows Disc and Polygon, got {type(aperture).__name__}")


def classical(image: Tensor, defocus: Tensor, gamma: float, iris: Iris = DISC) -> Tensor:
    """The scatter alone, of image [B, 3, H, W] and defocus [B, H, W]. ValueError for other input."""
    _check(image, defocus, gamma)
    return scatter(image**gamma, _finite(defocus) * PX_PER_UNIT, iris)[0] ** (1 / gamma)


@torch.no_grad()
def render(
    image: Tensor,
    defocus: Tensor,
    gamma: float,
    networks: Networks,
    iris: Iris = DISC,
    rounding: Callable[[float], int] = round,
) -> Rendered:
    """The whole of BokehMe: as `classical`, corrected at depth edges by `networks`, on the same device.

    rounding: of the first network's picture size. `round` is that of BokehDepth, whose port made training
    data; the original has `math.floor`, which gives other pictures.
    """
    blurred = classical(image, defocus, gamma, iris)
    defocus = _finite(defocus)
    reach = dilate(defocus * PX_PER_UNIT).trunc() / PX_PER_UNIT
    each = zip(image.split(1), defocus[:, None].split(1), reach[:, None].split(1), strict=True)
    pictures = [_neural(*picture, gamma, networks, rounding) for picture in each]
    neural, error_map = (torch.cat(parts) for parts in zip(*pictures, strict=True))
    result = blurred * (1 - error_map) + neural * error_map
    return Rendered(result.clamp(0, 1), blurred.clamp(0, 1), neural.clamp(0, 1), error_map)


def _neural(
    image: Tensor,
    defocus: Tensor,
    reach: Tensor,
    gamma: float,
    networks: Networks,
    rounding: Callable[[float], int],
) -> tuple[Tensor, Tensor]:
    """One picture through the networks, from the size at which its largest radius is 10 px to its own."""
    height, width = image.shape[-2:]
    low, high = GAMMA_RANGE
    gamma = (gamma - low) / (high - low)
    scale = min(max(float(defocus.abs().max()), 1.0), float(max(height, width)))
    size = max(1, rounding(height / scale)), max(1, rounding(width / scale))
    out, error_map = networks.arnet(resize(image, size), resize(defocus, size) / scale, gamma)
    out, error_map = out.clamp(0, BRIGHTEST), resize(error_map, (height, width))

    ratios = [2 ** (i + 1) / scale for i in range(int(math.log2(scale)))]
    for ratio in [*ratios, 1.0]:
        size = int(ratio * height), int(ratio * width)
        small = resize(image, size)
        finer = networks.iunet(small, (ratio * resize(defocus, size)).clamp(-1, 1), out, gamma)
        share = sharp_share(ratio * resize(reach, size))
        out = (finer.clamp(0, BRIGHTEST) * share + resize(out, size) * (1 - share)).clamp(0, BRIGHTEST)
    return out, error_map


def sharp_share(reach: Tensor) -> Tensor:
    """Where the finer picture counts, 0 ... 1, softly: within one unit of blur, by reach [B, 1, h, w].

    Pixels at exactly 1 are in or out by the float32 rounding of ratio * reach, in this order.
    """
    share = ((reach > -1) & (reach < 1)).to(reach.dtype)
    radius = round(0.005 * sum(reach.shape[-2:]))
    if radius == 0:
        return share
    sigma = 0.3 * (radius - 1) + 0.8
    along = torch.arange(-radius, radius + 1, device=reach.device, dtype=reach.dtype)
    weights = torch.exp(-(along**2) / (2 * sigma**2))
    weights = weights / weights.sum()
    share = F.pad(share, (radius, radius, radius, radius), mode="replicate")
    return F.conv2d(F.conv2d(share, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))


def _finite(defocus: Tensor) -> Tensor:
    return torch.where(defocus.isfinite(), defocus, 0.0)


def _check(image: Tensor, defocus: Tensor, gamma: float) -> None:
    if image.dim() != 4 or image.shape[1] != 3 or defocus.shape != (len(image), *image.shape[2:]):
        raise ValueError(
            "expected image [B, 3, H, W] and defocus [B, H, W], "
            f"got {list(image.shape)} and {list(defocus.shape)}"
        )
    if not GAMMA_RANGE[0] <= gamma <= GAMMA_RANGE[1]:
        raise ValueError(f"gamma: expected {GAMMA_RANGE[0]:g} ... {GAMMA_RANGE[1]:g}, got {gamma:g}")
