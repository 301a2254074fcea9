"""The flow-matching objective, and the guided target that teaches a model its guidance input."""

from __future__ import annotations

import torch
from torch import Tensor

from bokehflux.training.batches import Draws


def mix(x0: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
    """x_sigma = (1 - sigma) x0 + sigma eps. x0, eps [B, N, C]; sigma [B] in 0-1."""
    sigma = sigma[:, None, None]
    return (1 - sigma) * x0 + sigma * eps


def velocity_target(x0: Tensor, eps: Tensor) -> Tensor:
    """d x_sigma / d sigma."""
    return eps - x0


def guided(target: Tensor, unconditional: Tensor, guidance: Tensor) -> Tensor:
    """unconditional + guidance (target - unconditional): what a guidance-distilled model should predict.

    `target` may be a teacher's conditional prediction or the data's own velocity: both have the same mean.
    guidance [B], at 1 the plain target.
    """
    return unconditional + guidance[:, None, None] * (target - unconditional)


def logit_normal(draws: Draws, mean: float, std: float) -> Tensor:
    """[B] noise levels in 0-1, concentrated around sigmoid(mean)."""
    return torch.sigmoid(draws.normal("sigma") * std + mean)


def draw_guidance(draws: Draws, highest: float) -> Tensor:
    """[B] guidance between 1 and `highest`, denser near 1; a seventh of the rows exactly 1."""
    plain, above = draws.uniform("guidance", 2).unbind(1)
    return torch.where(plain < 0.15, 1.0, 1 + (highest - 1) * above**1.3)
