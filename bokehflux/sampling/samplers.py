"""Samplers: plain functions that integrate dx/dsigma = velocity(x, sigma) from noise to data.

A sampler takes (velocity, x, sigmas, on_step): velocity(x, sigma, step) is called with a float noise level
and the number of the step it serves; on_step is called after every step. A new sampler is a function here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Velocity = Callable[[Tensor, Tensor, int], Tensor]


@dataclass(frozen=True, kw_only=True)
class StepInfo:
    """What is known after a step."""

    step: int
    """Number of the step just taken, from 0."""
    num_steps: int
    sigma: float
    """Noise level reached: 0 after the last step."""
    latents: Tensor
    """[B, N, 64] packed latents at that level."""


OnStep = Callable[[StepInfo], None]


def euler(velocity: Velocity, x: Tensor, sigmas: Tensor, on_step: OnStep | None = None) -> Tensor:
    """First-order steps, one velocity each (the published sampler).

    x [B, N, C]; sigmas [n + 1] float32 on the CPU. The product with the step length is rounded to the
    velocity's dtype, the sum is float32, and x is rounded back after every step.
    """
    for i in range(len(sigmas) - 1):
        v = velocity(x, sigmas[i], i)
        x = (x.float() + (sigmas[i + 1] - sigmas[i]) * v).to(v.dtype)
        _report(on_step, i, sigmas, x)
    return x


def heun(velocity: Velocity, x: Tensor, sigmas: Tensor, on_step: OnStep | None = None) -> Tensor:
    """Second-order steps: the mean of the velocities at both ends; two evaluations each, one in the last."""
    for i in range(len(sigmas) - 1):
        length = sigmas[i + 1] - sigmas[i]
        v = velocity(x, sigmas[i], i)
        if sigmas[i + 1] > 0:
            ahead = (x.float() + length * v).to(v.dtype)
            v = (v + velocity(ahead, sigmas[i + 1], i)) / 2
        x = (x.float() + length * v).to(v.dtype)
        _report(on_step, i, sigmas, x)
    return x


def _report(on_step: OnStep | None, step: int, sigmas: Tensor, x: Tensor) -> None:
    if on_step is not None:
        on_step(StepInfo(step=step, num_steps=len(sigmas) - 1, sigma=float(sigmas[step + 1]), latents=x))
