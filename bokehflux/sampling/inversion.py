"""Follow a picture back to the noise that the network would make it from, and forward along that path again.

Integrating dx/dsigma = velocity from data to noise retraces a sampler's steps: started from the noise found
here, the same network returns to the picture. Source: Rout et al., arXiv 2410.10792 (rectified flows),
without their controller.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bokehflux.sampling.samplers import OnStep, StepInfo, Velocity

ITERATIONS = 2
"""Velocity evaluations per step. Seen from its end, a step of `euler` is an implicit equation for its start;
each evaluation is one fixed-point iteration of it."""


def invert(
    velocity: Velocity,
    x: Tensor,
    sigmas: Tensor,
    on_step: OnStep | None = None,
    iterations: int = ITERATIONS,
) -> list[Tensor]:
    """The n + 1 states, each [B, N, C], through which `euler` would come from noise to x; noise first.

    x [B, N, C]: latents of pictures. sigmas [n + 1]: float32 on the CPU, falling, as for the samplers.
    on_step: called after every step, counted from the picture's end, with the state reached. iterations:
    velocity evaluations per step. Raises ValueError for less than one iteration.
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    states, num_steps = [x], len(sigmas) - 1
    for i in reversed(range(num_steps)):
        length, before = sigmas[i + 1] - sigmas[i], states[-1]
        # Solve after = before + length * velocity(before) for `before` by fixed-point iteration.
        for _ in range(iterations):
            before = (states[-1].float() - length * velocity(before, sigmas[i], i)).to(x.dtype)  # [B, N, C]
        states.append(before)
        if on_step is not None:
            done = num_steps - 1 - i
            on_step(StepInfo(step=done, num_steps=num_steps, sigma=float(sigmas[i]), latents=before))
    return states[::-1]


def followed(velocity: Velocity, states: Sequence[Tensor], sigmas: Tensor) -> Velocity:
    """A velocity whose first row is forced along `states`, ignoring the prediction; other rows are unchanged.

    states: n + 1 of [1, N, C], as `invert` returns them; sigmas [n + 1].
    """

    along = path(states, sigmas)

    def follow(x: Tensor, sigma: Tensor, step: int) -> Tensor:
        # The state itself, not x[:1]: rounding along the way must not add up in the row that others read.
        v = velocity(torch.cat([states[step], x[1:]]), sigma, step)  # [B, N, C]
        return torch.cat([along(x, sigma, step), v[1:]])

    return follow


def path(states: Sequence[Tensor], sigmas: Tensor) -> Velocity:
    """The velocity [1, N, C] along `states`, whatever x is. Arguments are those of `followed`."""

    def along(_: Tensor, __: Tensor, step: int) -> Tensor:
        length = sigmas[step + 1] - sigmas[step]
        return ((states[step + 1].float() - states[step].float()) / length).to(states[step].dtype)

    return along
