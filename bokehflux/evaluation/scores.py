"""Figures of one scene at several levels, and how far they fall short of the truth's own.

docs/metrics.md says what each figure means and how it can mislead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from bokehflux.metrics import (
    blur_matched,
    blur_radius,
    lvcorr,
    lvcorr_to,
    monotonicity,
    psnr,
    sharpness,
    sharpness_kept,
    ssim,
)

RIM_PX = 3
"""Pixels at a subject's outline that count neither as subject nor as what lies behind it."""


@dataclass(frozen=True)
class Metric:
    """A column of the table."""

    heading: str
    best: Literal["most", "least", "capped", "truth"]
    """What scores best: "most" and "least" are best where the truth is; "capped": more is better up to the
    truth's own value, and no better beyond; "truth": the truth's own value."""
    about: str

    def shortfall(self, value: float, own: float) -> float:
        """How much worse a value is than the truth's own; 0 is as good, below 0 would be better."""
        if self.best == "truth":
            return abs(value - own)
        lost = value - own if self.best == "least" else own - value
        return max(lost, 0.0) if self.best == "capped" else lost


METRICS = {
    "lvcorr_reference": Metric(
        "LVCorr ref", "most",
        "+Pearson of the Laplacian's variance with that of a rendered reference; 1 is best (Bokeh Diffusion)",
    ),
    "lvcorr_reference_without_0": Metric("ref, >0", "most", "the same without level 0"),
    "lvcorr_level": Metric(
        "LVCorr lvl", "truth",
        "-Pearson of that variance with the level; the truth's own is best (Generative Refocusing)",
    ),
    "lvcorr_level_without_0": Metric("lvl, >0", "truth", "the same without level 0"),
    "monotonicity": Metric("falls", "most", "share of neighbouring levels between which sharpness falls"),
    "blur_px_per_level": Metric(
        "px/level", "truth", "radius of the blur behind the subject, in pixels a level, beyond the lowest's"
    ),
    "subject_blur_px": Metric("subj. px", "least", "mean radius of the subject's blur; 0 is best"),
    "subject_kept": Metric("subj. kept", "most", "share of the subject's sharpness that is kept; 1 is best"),
    "scene_psnr_db": Metric(
        "scene dB", "capped", "PSNR to the pivot, both strongly blurred; no better beyond the truth's own"
    ),
    "scene_ssim": Metric("scene SSIM", "capped", "SSIM to the pivot, blurred and capped as well"),
    "truth_psnr_db": Metric("truth dB", "most", "PSNR to the true picture of the level"),
    "truth_ssim": Metric("truth SSIM", "most", "SSIM to the true picture of the level"),
    "lpips": Metric("LPIPS", "least", "LPIPS (AlexNet) to the true picture of the level"),
    "dists": Metric("DISTS", "least", "DISTS to the true picture of the level"),
    "lpips_pivot": Metric("LPIPS piv.", "truth", "LPIPS (AlexNet) to the pivot; the truth's own is best"),
    "dists_pivot": Metric("DISTS piv.", "truth", "DISTS to the pivot; the truth's own is best"),
}  # fmt: skip
"""Name in JSON -> column, in the order of the table."""


class Perceptual(Protocol):
    """Networks that compare pictures as people do."""

    def __call__(self, a: Tensor, b: Tensor) -> Mapping[str, float]:
        """Mean distances of two [K, 3, H, W] in 0 ... 1, by name ("lpips", "dists")."""


@dataclass(frozen=True, kw_only=True)
class Shots:
    """Pictures of one scene, float [.., 3, H, W] in 0 ... 1."""

    levels: tuple[float, ...]
    """Ascending, at least two."""
    images: Tensor
    """[K, 3, H, W]."""
    pivot: Tensor | None = None
    """[3, H, W] what every picture must show the scene of."""
    subject: Tensor | None = None
    """Bool [H, W]: what is in focus."""
    behind: Tensor | None = None
    """Bool [H, W] where blur is measured; None: all but the subject."""
    reference: Tensor | None = None
    """[K, 3, H, W] rendered at the same levels."""
    is_truth: bool = False
    """Whether the reference shows this very scene, pixel by pixel."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What was found on one scene."""

    figures: dict[str, float]
    """By the names of METRICS; what could not be measured is left out."""
    curves: dict[str, list[float]] = field(default_factory=dict)
    """"sharpness", "radius_px" and "scene_psnr_db" at each level, NaN where there is none."""


def score(shots: Shots, perceptual: Perceptual | None = None) -> Scores:
    """Every figure that these pictures allow. Raises ValueError for fewer than two levels or other shapes."""
    levels, images = torch.tensor(shots.levels), shots.images
    if len(levels) < 2 or len(images) != len(levels) or (levels.diff() <= 0).any():
        raise ValueError(
            f"expected pictures at two or more ascending levels, got {len(images)}: {shots.levels}"
        )
    found: dict[str, float | Tensor] = {}
    curves = {"sharpness": sharpness(images)}
    above = levels > 0
    for grid, end in ((levels >= 0, ""), (above, "_without_0")):
        if grid.sum() >= 2 and (end == "" or not above.all()):
            found["lvcorr_level" + end] = lvcorr(levels[grid], images[grid])
            if shots.reference is not None:
                found["lvcorr_reference" + end] = lvcorr_to(shots.reference[grid], images[grid])
    found["monotonicity"] = monotonicity(images)
    subject, behind = _regions(shots)
    radius = blur_radius(images[1:], images[0], behind)
    curves["radius_px"] = torch.cat([radius.new_zeros(1), radius])
    more = (levels[1:] - levels[0]).to(radius)
    if (known := ~radius.isnan()).any():  # least squares through 0
        found["blur_px_per_level"] = (radius * more)[known].sum() / more[known].square().sum()
    if subject is not None:
        found["subject_blur_px"] = blur_radius(images[1:], images[0], subject).mean()
        found["subject_kept"] = sharpness_kept(images[1:], images[0], subject).mean()
    if shots.pivot is not None:
        pivot = shots.pivot.expand_as(images)
        matched = blur_matched(images, pivot)
        curves["scene_psnr_db"] = psnr(*matched)
        found["scene_psnr_db"], found["scene_ssim"] = curves["scene_psnr_db"].mean(), ssim(*matched).mean()
    if shots.is_truth and shots.reference is not None:
        found["truth_psnr_db"] = psnr(images, shots.reference).mean()
        found["truth_ssim"] = ssim(images, shots.reference).mean()
    if perceptual is not None:
        if shots.is_truth and shots.reference is not None:
            found |= perceptual(images, shots.reference)
        elif shots.pivot is not None:
            distances = perceptual(images, shots.pivot.expand_as(images))
            found |= {f"{name}_pivot": value for name, value in distances.items()}
    figures = {name: float(found[name]) for name in METRICS if name in found}
    return Scores(
        figures={name: value for name, value in figures.items() if not math.isnan(value)},
        curves={name: values.tolist() for name, values in curves.items()},
    )


def mean(scores: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each figure over the scenes that have it."""
    columns = {name: [each[name] for each in scores if name in each] for name in METRICS}
    return {name: sum(values) / len(values) for name, values in columns.items() if values}


def _regions(shots: Shots) -> tuple[Tensor | None, Tensor | None]:
    """The subject without its rim, and what lies behind beyond it."""
    if shots.subject is None:
        return None, shots.behind
    mask = shots.subject.float()[None, None]
    size = 2 * RIM_PX + 1
    wide = F.max_pool2d(mask, size, 1, RIM_PX)[0, 0] > 0
    narrow = F.max_pool2d(1 - mask, size, 1, RIM_PX)[0, 0] == 0
    return narrow, ~wide if shots.behind is None else shots.behind
