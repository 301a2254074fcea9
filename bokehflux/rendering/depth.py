"""Depth as disparity, one over distance, in which blur is linear."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
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


def filled_disparity(depth_m: Tensor) -> Tensor:
    """1 / depth [H, W]. Where depth is unknown, the farthest thing around: mostly a nearer one hid it.

    Around is the smallest square, of twice the side each time, of which more than half is known: from the rim
    of a hole it reaches to the other side. Raises ValueError where all depth is unknown.
    """
    known = known_depth(depth_m)
    found = torch.where(known, 1 / depth_m, torch.inf)
    sums = F.pad(known.long().cumsum(0).cumsum(1), (1, 0, 1, 0))
    least, half, missing = found.clone(), 1, (~known).nonzero()
    while len(missing):
        least = _least_around(least, max(half // 2, 1))  # the square before had half the size
        here = _mostly_known(sums, missing, half) | (half >= max(depth_m.shape))
        rows, columns = missing[here].unbind(1)
        found[rows, columns] = least[rows, columns]
        missing, half = missing[~here], 2 * half
    return found


def _least_around(values: Tensor, step: int) -> Tensor:
    """[H, W]: the least of nine places, so many pixels apart."""
    wide = F.pad(values, (step, step), value=torch.inf)
    values = torch.minimum(torch.minimum(values, wide[:, 2 * step :]), wide[:, : -2 * step])
    tall = F.pad(values, (0, 0, step, step), value=torch.inf)
    return torch.minimum(torch.minimum(values, tall[2 * step :]), tall[: -2 * step])


def _mostly_known(sums: Tensor, places: Tensor, half: int) -> Tensor:
    """bool [N]: whether more than half is known of the squares, `half` pixels to each side, around places.

    sums [H + 1, W + 1]: how many pixels are known above and to the left. places [N, 2]: row, column.
    """
    low = (places - half).clamp(min=0)
    high = torch.minimum(places + half, places.new_tensor(sums.shape) - 2) + 1
    (top, left), (bottom, right) = low.unbind(1), high.unbind(1)
    inside = sums[bottom, right] - sums[bottom, left] - sums[top, right] + sums[top, left]
    return 2 * inside > (high - low).prod(1)


def normalised(disparity: Tensor) -> Tensor:
    """0 ... 1 over the picture, as for synthetic training pictures."""
    low, high = disparity.min(), disparity.max()
    return (disparity - low) / (high - low + 1e-8)


def quantile(values: Tensor, share: float) -> Tensor:
    """NumPy's: torch.quantile takes 16 million numbers at most, which is less than a photograph has."""
    found = np.quantile(values.double().cpu().numpy(), share)
    return torch.tensor(found, dtype=values.dtype, device=values.device)
