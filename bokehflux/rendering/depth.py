"""Depth as disparity, one over distance, in which blur is linear."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

NEAREST_M = 1e-6
"""Depth at most this is unknown."""


def known_depth(depth_m: Tensor) -> Tensor:
    """bool [H, W]: depth is above 0; it may be infinite. Raises ValueError where it nowhere is."""
    if depth_m.dim() != 2:
        raise ValueError(f"depth_m: expected [H, W], got {list(depth_m.shape)}")
    known = depth_m > NEAREST_M
    if not known.any():
        raise ValueError("depth_m: expected metres, found no pixel that is above 0")
    return known


def disparity_of(depth_m: Tensor) -> Tensor:
    """1 / depth [H, W], the median where depth is unknown. Raises ValueError where all of it is."""
    known = known_depth(depth_m)
    disparity = 1 / torch.where(known, depth_m, 1.0)
    return torch.where(known, disparity, quantile(disparity[known], 0.5))


def normalised(disparity: Tensor) -> Tensor:
    """0 ... 1 over the picture, as for synthetic training pictures."""
    low, high = disparity.min(), disparity.max()
    return (disparity - low) / (high - low + 1e-8)


def quantile(values: Tensor, share: float) -> Tensor:
    """NumPy's: torch.quantile takes 16 million numbers at most, which is less than a photograph has."""
    found = np.quantile(values.double().cpu().numpy(), share)
    return torch.tensor(found, dtype=values.dtype, device=values.device)
