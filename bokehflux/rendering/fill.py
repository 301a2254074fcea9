"""Colours for what a picture does not show, from what it shows nearby."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def fill(values: Tensor, known: Tensor) -> Tensor:
    """values [B, C, H, W] where known [B, 1, H, W] is 1, else means of what is known around, ever wider.

    Pull and push (Gortler et al., 1996): means of 2 x 2 pixels until all is known, then back to full size.
    What is known in part counts in part. Where nothing is known at all, 0.
    """
    height, width = values.shape[-2:]
    if height == width == 1 or bool((known == 1).all()):
        return values
    share = F.avg_pool2d(known, 2, ceil_mode=True)
    coarse = F.avg_pool2d(values * known, 2, ceil_mode=True) / share.clamp(min=1e-6)
    coarse = fill(coarse, (4 * share).clamp(max=1))
    wide = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
    return values * known + wide * (1 - known)
