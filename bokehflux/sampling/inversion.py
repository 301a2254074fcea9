"""From a picture back to the noise that the network would make it from, and along that path again.

Integrating dx/dsigma = velocity from data to noise retraces what a sampler does: started from the noise that
is found, the same network returns to the picture. For rectified flows: Rout et al., arXiv 2410.10792, without
their controller.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bokehflux.sampling.samplers import OnStep, StepInfo, Velocity

ITERATIONS = 2
"""Evaluations per step: a step of `euler` is implicit from its other end, and each comes closer to it."""


def invert(
    velocity: Velocity,
    x: Tensor,
    sigmas: Tensor,
    on_step: OnStep | None = None,
    iterations: int = ITERATIONS,
) -> list[Tensor]:
    """The states [n + 1] of [B, N, C], from noise to x, through which `euler` would come to x.

    x [B, N, C]: latents of pictures; sigmas [n + 1] float32 on the CPU, falling, as for the samplers. on_step
    counts from the data's end and tells the state reached. Raises ValueError for less than one iteration.
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    states, num_steps = [x], len(sigmas) - 1
    for i in reversed(range(num_steps)):
        length, before = sigmas[i + 1] - sigmas[i], states[-1]
        for _ in range(iterations):  # before = x + length * velocity(x), solved for x
            before = (states[-1].float() - length * velocity(before, sigmas[i], i)).to(x.dtype)
        states.append(before)
        if on_step is not None:
            done = num_steps - 1 - i
            on_step(StepInfo(step=done, num_steps=num_steps, sigma=float(sigmas[i]), latents=before))
    return states[::-1]


def followed(velocity: Velocity, states: Sequence[Tensor], sigmas: Tensor) -> Velocity:
    """`velocity` of a batch whose first row goes through states of [1, N, C], whatever is predicted."""

    def follow(x: Tensor, sigma: Tensor, step: int) -> Tensor:
        v = velocity(torch.cat([states[step], x[1:]]), sigma, step)
        along = (states[step + 1].float() - states[step].float()) / (sigmas[step + 1] - sigmas[step])
        return torch.cat([along.to(v.dtype), v[1:]])

    return follow
