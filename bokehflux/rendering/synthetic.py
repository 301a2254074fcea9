"""The blur of synthetic training pictures: a photograph, its depth and its subject's mask, through BokehMe.

The rule is that of `add_bokeh` in BokehDepth, a later relative of Bokeh Diffusion by the same group, with one
fault mended: it normalises the disparity of a flat subject by the subject's own extremes, and the
background's by the picture's, so that a background of 17 px is blurred by 1.6 px. A level here is the radius
that the whole range of the picture's disparity would cause.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bokehme import PX_PER_UNIT, classical, render
from .bokehme_networks import Networks
from .depth import disparity_of, known_depth, normalised, quantile
from .photo import GAMMA

FLAT_M = 10.0
"""A subject no deeper than this is sharp as a whole."""
INLIERS = 0.96
"""Share of the mask's pixels, the nearest ones, that are the subject."""


def subject_defocus(depth_m: Tensor, mask: Tensor, level: float) -> Tensor:
    """Signed defocus [H, W] in BokehMe's units, focus on the subject, or without one on the median.

    depth_m [H, W], unknown where it is not finite or not above 0: the median is taken there. mask [H, W]
    bool. Raises ValueError for other shapes, and where no pixel's depth is known.
    """
    if depth_m.shape != mask.shape:
        raise ValueError(
            f"expected depth_m and mask of one size, got {list(depth_m.shape)} and {list(mask.shape)}"
        )
    depth_m = torch.where(depth_m.isfinite(), depth_m, torch.nan)
    metric = disparity_of(depth_m)
    disparity = normalised(metric)
    subject = mask & known_depth(depth_m)
    if not subject.any():
        return level * (disparity - quantile(disparity, 0.5)) / PX_PER_UNIT
    farthest = quantile(depth_m[subject], INLIERS)
    subject &= depth_m <= farthest
    inside = disparity[subject]
    if depth_m[subject].max() - depth_m[subject].min() <= FLAT_M:
        low, high = metric.min(), metric.max()
        focus = ((1 / farthest - low) / (high - low + 1e-8)).clamp(0, 1)
        disparity = torch.where(subject, focus, disparity)
    else:
        focus = quantile(inside[inside > quantile(inside, 0.5)], 0.5)
    return level * (disparity - focus) / PX_PER_UNIT


def add_bokeh(
    image: Tensor, depth_m: Tensor, mask: Tensor, level: float, networks: Networks | None
) -> Tensor:
    """image [3, H, W], 0 ... 1, blurred around its subject; without networks by the scatter alone."""
    defocus = subject_defocus(depth_m, mask, level)[None]
    if networks is None:
        return classical(image[None], defocus, GAMMA)[0].clamp(0, 1)
    return render(image[None], defocus, GAMMA, networks).result[0]
