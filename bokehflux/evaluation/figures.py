"""Figures of a model whose pictures follow a bokeh level: pure functions of pictures, and their targets.

Pictures of one scene at several levels are compared: does the blur follow the level, does the scene stay?
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bokehflux.lens import MAX_LEVEL
from bokehflux.metrics import blur_matched_psnr, pearson, spearman

CURVE = tuple(torch.linspace(0, MAX_LEVEL, 8).tolist())
"""Levels of a sharpness curve."""
MEASURED = (*CURVE, 28.0)
"""Levels of a series that figures use."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """Pictures of N captions at K levels from one source, as a viewer gets them."""

    images: Tensor
    """uint8 [N, K, H, W, 3] at MEASURED, or 8 seeds in place of CURVE; further ones are not measured."""
    pivots: Tensor
    """uint8 [N, H, W, 3]: what every picture of the caption must show the scene of."""

    def measure(self, figure: Callable[[Tensor], Tensor]) -> Tensor:
        """`figure` ([K, 3, H, W] in 0 ... 1 -> [K]) of the measured pictures of every caption: [N, K]."""
        return torch.stack([figure(floats(images[: len(MEASURED)])) for images in self.images])


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One line of a report."""

    figure: str
    of: str
    value: float
    target: tuple[float, float | None] | None = None
    """Least and most; None: the line is there to compare with."""

    @property
    def passed(self) -> bool | None:
        """None without a target; NaN fails."""
        if self.target is None:
            return None
        low, high = self.target
        return low <= self.value and (high is None or self.value <= high)

    @property
    def wanted(self) -> str:
        if self.target is None:
            return ""
        low, high = self.target
        return f"at least {low:g}" if high is None else f"{low:g} to {high:g}"

    def __str__(self) -> str:
        line = f"{self.figure:<44} {self.of:<30} {self.value:>8.3f}"
        if self.target is None:
            return line
        return f"{line}  {self.wanted:<14} {'pass' if self.passed else 'FAIL'}"


def floats(images: Tensor) -> Tensor:
    """uint8 [..., H, W, 3] -> float [..., 3, H, W] in 0 ... 1."""
    return images.movedim(-1, -3).float() / 255


def pixels(image: Image.Image) -> Tensor:
    """RGB -> float [3, H, W] in 0 ... 1."""
    return floats(torch.from_numpy(np.array(image)))


def rank_correlation(curves: Tensor) -> float:
    """Mean Spearman correlation of -sharpness [N, 8] with the level."""
    return float(spearman(-curves, torch.tensor(CURVE, device=curves.device).expand_as(curves)).mean())


def curve_match(curves: Tensor, reference: Tensor) -> float:
    """Mean Pearson correlation of sharpness curves [N, 8] with the mean of the curves `reference` [M, 8]."""
    return float(pearson(curves, reference.mean(0).expand_as(curves)).mean())


def fall(values: Tensor) -> Tensor:
    """Mean of [N, 9] at level 0 less its mean at level 28."""
    return (values[:, 0] - values[:, MEASURED.index(28.0)]).mean()


def scene_psnr(series: Series) -> float:
    """Mean PSNR in dB of every picture with its caption's pivot, both strongly blurred first."""
    pairs = zip(series.images[:, : len(MEASURED)], series.pivots, strict=True)
    values = [blur_matched_psnr(floats(shown), floats(pivot.expand_as(shown))) for shown, pivot in pairs]
    return float(torch.stack(values).mean())
