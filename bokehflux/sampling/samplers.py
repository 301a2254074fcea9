"""Samplers: plain functions that integrate dx/dsigma = velocity(x, sigma) from noise to data.

A sampler takes (velocity, x, sigmas, on_step). It calls velocity(x, sigma, step) with a noise level (a 0-dim
float32 tensor on the CPU) and the number of the step, and on_step after every step. A new sampler is a
function here; docs/research.md has an example.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Velocity = Callable[[Tensor, Tensor, int], Tensor]
"""(x [B, N, C], noise level, step) -> dx/dsigma [B, N, C]."""


@dataclass(frozen=True, kw_only=True)
class StepInfo:
    """The state of a run after a step."""

    step: int
    """The step just taken, counted from 0."""
    num_steps: int
    sigma: float
    """The noise level reached: 0 after the last step."""
    latents: Tensor
    """Packed latents at that noise level, [B, N, C]."""


OnStep = Callable[[StepInfo], None]


def euler(velocity: Velocity, x: Tensor, sigmas: Tensor, on_step: OnStep | None = None) -> Tensor:
    """First-order steps, one velocity each (the published sampler).

    x [B, N, C]; sigmas [n + 1] float32 on the CPU. The product with the step length is rounded to the
    velocity's dtype, the sum is float32, and x is rounded back after every step.
    """
    num_steps = len(sigmas) - 1
    for i in range(num_steps):
        v = velocity(x, sigmas[i], i)  # [B, N, C]
        # A 0-dim float32 tensor does not widen v: the product keeps v's dtype, as published.
        x = (x.float() + (sigmas[i + 1] - sigmas[i]) * v).to(v.dtype)
        if on_step is not None:
            on_step(StepInfo(step=i, num_steps=num_steps, sigma=float(sigmas[i + 1]), latents=x))
    return x
