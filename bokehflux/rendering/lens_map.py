"""How strongly a lens blurs each place of a picture, what it is focused on, and the picture at any level.

A place has a number: the blur radius that one level brings, but for a constant that the focus takes away. It
is disparity (one over distance) in another unit, so nearer places have more. What is in focus is a range of
these numbers, here and there or all over the picture: a plane has no range, a slab has one, a tilted plane
has another at every pixel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from bokehflux.aperture import DISC, Aperture
from bokehflux.focus import Depth, Focus, Plane, Point, Slab, Subject
from bokehflux.lens import TRAINING_SIDE_PX, Unify, check_level

from .depth import filled_disparity, quantile
from .photo import blur_photo
from .probe import fit_radius

POINT_PX = 5
"""Side of the square around a point whose median is the point's blur."""
TRACE = 0.01
"""So much of a picture is too little to be its nearest or farthest place."""
LARGEST_PX = 1.3
"""The largest radius by level that two pictures are searched for, at a shorter side of 512."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LensMap:
    """Numbers from `far` to `near` are in focus. With the defaults everything is: see `focused_at`."""

    blur: Tensor
    """[H, W]: radius in pixels of this size by level, more for what is nearer, 0 at any one distance."""
    far: Tensor | float = -math.inf
    """A number or [H, W]."""
    near: Tensor | float = math.inf
    """A number or [H, W]."""
    px_m: float | None = None
    """What 1/m more of disparity adds to `blur`; None where the picture's distances are not known."""
    at_infinity: float = 0.0
    """`blur` of the horizon, where distances are known."""
    residual: float = 0.0
    """What a fit could not explain: root mean square of display values."""
    glow: float = 1.0
    """How bright lights are, as a share of what their glow tells (`photo.glow_shown`)."""

    def __post_init__(self) -> None:
        if self.blur.dim() != 2 or not self.blur.isfinite().all():
            raise ValueError(f"blur: expected finite numbers [H, W], got {list(self.blur.shape)}")
        if bool((torch.as_tensor(self.far) > torch.as_tensor(self.near)).any()):
            raise ValueError("focus: expected a far end of no more blur than the near one")

    @classmethod
    def from_depth(cls, depth_m: Tensor, unify: Unify = "raw") -> Self:
        """From metres [H, W]: infinity is far away, and unknown depth (0, NaN) is as far as what is around.

        unify: what a level multiplies. "raw": disparity in 1/m, as levels from EXIF data do. "range": the
        picture's disparity from 0 to 1, as in synthetic training pictures. Raises ValueError for depth that
        is nowhere known, and with "range" for depth that is the same everywhere.
        """
        disparity, scale = filled_disparity(depth_m), min(depth_m.shape) / TRAINING_SIDE_PX
        if unify == "raw":
            return cls(blur=scale * disparity, px_m=scale)
        if unify != "range":
            raise ValueError(f"unify: expected raw or range, got {unify!r}")
        low, high = disparity.aminmax()
        if not low < high:
            raise ValueError('unify "range" needs depth that differs from place to place')
        px_m = scale / float(high - low)
        return cls(blur=(disparity - low) * px_m, px_m=px_m, at_infinity=-float(low) * px_m)

    @classmethod
    def from_pictures(
        cls, sharp: Tensor, blurred: Tensor, level: float, own_level: float = 0.0, *, loose: bool = False
    ) -> Self:
        """From a picture [3, H, W] and the same one at a level [3, h, w], both display values 0 to 1.

        Needs no depth. In focus is what is sharp in both, and all else is taken to lie behind it: blur alone
        does not tell near from far. own_level: that of `sharp`; blurs add up as squares do. loose: `blurred`
        is a network's, and shows the same scene with other detail. Radii up to 1.3 pixels a level, in a
        picture of 512, are looked for: those of the horizon behind a subject at 0.77 m.
        Raises ValueError for a level that is not above own_level, and what `fit_radius` raises.
        """
        check_level(level)
        if not 0 <= own_level < level:
            raise ValueError(f"own_level: expected from 0 to below {level:g}, got {own_level:g}")
        added = math.sqrt(level**2 - own_level**2)
        fit = fit_radius(sharp, blurred, LARGEST_PX * added / TRAINING_SIDE_PX, loose)
        return cls(blur=-fit.radius_px / added, far=0.0, residual=fit.residual)

    def focused_at(self, focus: Focus, mask: Tensor | None = None) -> Self:
        """The same lens with another focus. mask: bool [H, W], for `Subject`.

        Raises ValueError for pixels outside the picture, a mask that lacks, is empty or of another size, and
        for distances where the map knows none.
        """
        match focus:
            case Point():
                far = near = self._at(focus)
            case Subject(share):
                inside = self.blur[self._checked(mask)]
                far, near = (float(quantile(inside, 0.5 + side * share / 2)) for side in (-1, 1))
            case Slab(near_m, far_m):
                if self.px_m is None:
                    raise ValueError(f"focus {focus}: this picture's distances are not known, give a point")
                far, near = (self.at_infinity + self.px_m / distance_m for distance_m in (far_m, near_m))
            case Depth(near_share, far_share):
                ends = [float(quantile(self.blur, share)) for share in (1 - TRACE, TRACE)]
                far, near = (ends[0] + share * (ends[1] - ends[0]) for share in (far_share, near_share))
            case Plane(points):
                return replace(self, far=(plane := self._through(points)), near=plane)
        return replace(self, far=far, near=near)

    def radius_px(self, level: Tensor | float) -> Tensor:
        """Blur radii [H, W], above 0 for what is nearer than the focus, at a level or at levels [H, W].

        Raises ValueError for levels outside 0 to 30, and for a map of another size.
        """
        levels = torch.as_tensor(level, dtype=self.blur.dtype, device=self.blur.device)
        if levels.dim() and levels.shape != self.blur.shape:
            raise ValueError(f"a map of levels must be {list(self.blur.shape)}, got {list(levels.shape)}")
        check_level(float(levels.min()))
        check_level(float(levels.max()))
        far, near = (
            torch.as_tensor(end, dtype=self.blur.dtype, device=self.blur.device)
            for end in (self.far, self.near)
        )
        return levels * (self.blur - self.blur.clamp(far, near))

    def render(
        self,
        picture: Tensor,
        level: Tensor | float,
        aperture: Aperture = DISC,
        highlights: float | None = 1.0,
        matte: Tensor | None = None,
    ) -> Tensor:
        """picture [3, H, W], display values 0 to 1, at a level; the rest as for `blur_photo`, errors, too."""
        return blur_photo(picture, self.radius_px(level), aperture, matte, highlights, self.glow)

    def resized(self, height: int, width: int) -> Self:
        """For the same picture at another size. Raises ValueError for another shape than the map's."""
        high, wide = self.blur.shape
        if abs(width * high - height * wide) > max(width, height, wide, high):
            raise ValueError(f"a map of {wide} x {high} does not lie over a picture of {width} x {height}")
        scale = min(height, width) / min(high, wide)

        def brought(values: Tensor | float) -> Tensor | float:
            if not isinstance(values, Tensor):
                return scale * values
            size = (height, width)
            return scale * F.interpolate(values[None, None], size, mode="bilinear", antialias=True)[0, 0]

        px_m = None if self.px_m is None else scale * self.px_m
        blur, far, near = brought(self.blur), brought(self.far), brought(self.near)
        assert isinstance(blur, Tensor)
        return replace(self, blur=blur, far=far, near=near, px_m=px_m, at_infinity=scale * self.at_infinity)

    def _at(self, point: Point) -> float:
        height, width = self.blur.shape
        if not (point.x < width and point.y < height):
            raise ValueError(f"focus point: expected a pixel of {width} x {height}, got {point}")
        half = POINT_PX // 2
        rows, cols = (slice(max(at - half, 0), at + half + 1) for at in (point.y, point.x))
        return float(self.blur[rows, cols].median())

    def _checked(self, mask: Tensor | None) -> Tensor:
        if mask is None:
            raise ValueError("focus mask: expected a mask, got none")
        if mask.shape != self.blur.shape or mask.dtype != torch.bool:
            raise ValueError(
                f"focus mask: expected bool {list(self.blur.shape)}, got {mask.dtype} {list(mask.shape)}"
            )
        if not mask.any():
            raise ValueError("focus mask: it is empty, and something must be in focus")
        return mask

    def _through(self, points: tuple[Point, Point, Point]) -> Tensor:
        """[H, W]: a plane in space is a plane of disparity over the picture."""
        corners = torch.tensor([[1.0, point.x, point.y] for point in points], dtype=torch.float64)
        found = torch.tensor([self._at(point) for point in points], dtype=torch.float64)
        base, across, down = torch.linalg.solve(corners, found).tolist()
        height, width = self.blur.shape
        y = torch.arange(height, device=self.blur.device, dtype=self.blur.dtype)[:, None]
        x = torch.arange(width, device=self.blur.device, dtype=self.blur.dtype)
        return base + across * x + down * y
