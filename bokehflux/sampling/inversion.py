"""Paths between a picture and noise, and targets that are sampled beside a picture on its path.

A path is the network's own, integrated backwards from data to noise, or a straight line to any noise. Targets
add what the network's prediction for the picture lacks to follow its path: so even on a straight path a
target at the picture's own level comes back as the picture. Sources: Rout et al., arXiv 2410.10792 (inverting
rectified flows); Uni-Inv (the previous velocity as a predictor); FlowEdit and FlowAlign (no inversion).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bokehflux.sampling.samplers import OnStep, StepInfo, Velocity


def invert(velocity: Velocity, x: Tensor, sigmas: Tensor, on_step: OnStep | None = None) -> list[Tensor]:
    """The n + 1 states, each [B, N, C], through which `euler` would come from noise to x; noise first.

    x [B, N, C]: latents of pictures. sigmas [n + 1]: float32 on the CPU, falling, as for the samplers.
    on_step: called after every step, counted from the picture's end, with the state reached.

    Seen from its end, a step of `euler` is an implicit equation for its start. The guess is the start that
    the previous step's velocity would lead to, and one evaluation there is the answer: more iterations
    diverge near the noise.
    """
    states, num_steps = [x], len(sigmas) - 1
    v: Tensor | None = None
    for i in reversed(range(num_steps)):
        length, after = sigmas[i + 1] - sigmas[i], states[-1].float()
        guess = after if v is None else after - length * v
        v = velocity(guess.to(x.dtype), sigmas[i], i)  # [B, N, C]
        states.append((after - length * v).to(x.dtype))
        if on_step is not None:
            done = num_steps - 1 - i
            on_step(StepInfo(step=done, num_steps=num_steps, sigma=float(sigmas[i]), latents=states[-1]))
    return states[::-1]


def straight(x: Tensor, noise: Tensor, sigmas: Tensor) -> list[Tensor]:
    """The n + 1 states on the line from noise to x, all [B, N, C]; noise first. sigmas [n + 1], 1 to 0."""
    return [torch.lerp(x, noise, float(sigma)) for sigma in sigmas]


def followed(velocity: Velocity, states: Sequence[Tensor], sigmas: Tensor) -> Velocity:
    """A velocity whose first row is forced along `states`; the others get what its prediction lacks for that.

    states: n + 1 of [1, N, C], as `invert` and `straight` return them; sigmas [n + 1].
    """
    along = path(states, sigmas)

    def follow(x: Tensor, sigma: Tensor, step: int) -> Tensor:
        # The state itself, not x[:1]: rounding along the way must not add up in the row that others read.
        v = velocity(torch.cat([states[step], x[1:]]), sigma, step)  # [B, N, C]
        forced = along(x, sigma, step)
        return torch.cat([forced, v[1:] + (forced - v[:1])])

    return follow


def path(states: Sequence[Tensor], sigmas: Tensor) -> Velocity:
    """The velocity [1, N, C] along `states`, whatever x is. Arguments are those of `followed`."""

    def along(_: Tensor, __: Tensor, step: int) -> Tensor:
        length = sigmas[step + 1] - sigmas[step]
        return ((states[step + 1].float() - states[step].float()) / length).to(states[step].dtype)

    return along
