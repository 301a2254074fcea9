"""Shortcuts of a grounded run: velocities whose target rows are not all computed.

The pivot is in row 0. It takes every step as without a shortcut, to rounding.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from bokehflux.sampling.samplers import Velocity

FIRST, LAST = 4, 2
"""Steps at the beginning and at the end whose targets are always computed."""


def reused(velocity: Velocity, pivot: Velocity, every: int, num_steps: int) -> Velocity:
    """A velocity that is computed in every `every`-th step between the first and the last ones.

    In the steps between, `pivot` gives row 0 alone ([1, N, C] of x [B, N, C]). To it is added by how much
    each row differed from it, extrapolated linearly over the noise levels of the two newest computed steps.
    """
    seen: deque[tuple[Tensor, Tensor]] = deque(maxlen=2)  # noise level, and difference [B, N, C]

    def follow(x: Tensor, sigma: Tensor, step: int) -> Tensor:
        if is_computed(step, every, num_steps):
            v = velocity(x, sigma, step)  # [B, N, C]
            seen.append((sigma, v.float() - v[:1].float()))
            return v
        (sigma_0, before), (sigma_1, newest) = seen
        along = float((sigma - sigma_1) / (sigma_1 - sigma_0))
        v = pivot(x, sigma, step)  # [1, N, C]
        return (v.float() + newest + along * (newest - before)).to(v.dtype)

    return follow


def without_pivot(velocity: Velocity, targets: Velocity, num_steps: int) -> Velocity:
    """A velocity that computes row 0 in the first `num_steps` only; then `targets` ([N, L, C]) alone.

    Row 0 then keeps its last velocity, so that it ends as what the network held it for: near enough to tell
    the scene's colours by, not a picture.
    """
    kept: list[Tensor] = []

    def follow(x: Tensor, sigma: Tensor, step: int) -> Tensor:
        if step >= num_steps:
            return torch.cat([kept[0], targets(x[1:], sigma, step)])
        v = velocity(x, sigma, step)
        kept[:] = [v[:1]]
        return v

    return follow


def is_computed(step: int, every: int, num_steps: int) -> bool:
    """Whether targets are computed in a step of a run, or only their pivot."""
    return not FIRST <= step < num_steps - LAST or (step - FIRST) % every == 0
