"""Scatter, and the reach of what is near: each in Triton or in plain PyTorch, by one rule.

Triton runs on float32 CUDA tensors of GPUs from sm_80 on, where no gradient is needed and nothing is being
compiled. Everything else takes the reference. Both read the largest radius first, which waits for the GPU.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import dispatch
from . import reference
from .reference import DISC, Iris


def scatter(light: Tensor, radius_px: Tensor, iris: Iris = DISC) -> tuple[Tensor, Tensor]:
    """Every pixel spreads its light over an iris of its own radius: see `reference` for the formula.

    light [B, 3, H, W], linear; radius_px [B, H, W], whose sign says nothing here. Returns the mean light [B,
    3, H, W] that reaches each pixel, and the sum of weights [B, H, W]. Nothing hides anything, there is no
    order of depth. Radius 0 is not quite the identity: each of four neighbours weighs 6.7e-4. Raises
    ValueError for other shapes, and for radii that are not finite.
    """
    if light.dim() != 4 or light.shape[1] != 3 or radius_px.shape != (len(light), *light.shape[2:]):
        raise ValueError(
            "scatter: expected light [B, 3, H, W] and radius_px [B, H, W], "
            f"got {list(light.shape)} and {list(radius_px.shape)}"
        )
    reach = _reach(radius_px)
    if takes(light, radius_px):
        from . import ops

        return ops.scatter(light, radius_px, iris, reach)
    return reference.scatter(light, radius_px, iris, reach)


def dilate(radius_px: Tensor) -> Tensor:
    """The largest signed radius among the pixels whose disc holds a pixel, itself included: [B, H, W].

    With positive radii for what is nearer than the focus, it marks how far near blur spreads; far blur, which
    is negative, marks no sharper neighbour. Raises ValueError as `scatter` does.
    """
    if radius_px.dim() != 3:
        raise ValueError(f"dilate: expected radius_px [B, H, W], got {list(radius_px.shape)}")
    reach = _reach(radius_px)
    if takes(radius_px):
        from . import ops

        return ops.dilate(radius_px, reach)
    return reference.dilate(radius_px, reach)


def takes(*tensors: Tensor) -> bool:
    """Whether the Triton form runs on these."""
    return dispatch.takes(*tensors, dtypes=(torch.float32,)) and not dispatch.needs_gradients(*tensors)


def _reach(radius_px: Tensor) -> int:
    """How many pixels away the light of the largest radius still falls."""
    largest = radius_px.detach().abs().max().item() if radius_px.numel() else 0.0
    if not math.isfinite(largest):
        raise ValueError("radius_px: expected finite numbers, found nan or infinity")
    return int(largest) + 1
