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
FURTHEST = 0.75
"""How far extrapolation goes at most, as a share of what lies between the two steps: a row that went astray
differs from its pivot by that, too, and a longer line would lead it on."""


def reused(velocity: Velocity, pivot: Velocity, every: int, sigmas: Tensor, grounded_steps: int) -> Velocity:
    """A velocity that is computed in every `every`-th step between the first and the last ones.

    In the steps between, `pivot` gives row 0 alone ([1, N, C] of x [B, N, C]). To it is added by how much
    each row differed from it, extrapolated over the noise levels of the two newest computed steps. The next
    computed step knows better: it adds by how much the straight line to it would have led elsewhere. Where
    grounding ends differences jump, and nothing from before is used. sigmas: [steps + 1], the run's.
    """
    num_steps, lengths = len(sigmas) - 1, sigmas.diff().tolist()
    seen: deque[tuple[Tensor, Tensor]] = deque(maxlen=2)  # noise level, and difference [B, N, C]
    guesses: list[tuple[int, Tensor]] = []  # steps since, and the differences that they took

    def line(sigma: Tensor) -> Tensor:
        (sigma_0, before), (sigma_1, newest) = seen
        along = min(float((sigma - sigma_1) / (sigma_1 - sigma_0)), FURTHEST)
        return newest + along * (newest - before)

    def follow(x: Tensor, sigma: Tensor, step: int) -> Tensor:
        if step == grounded_steps:
            seen.clear()
            guesses.clear()
        if not is_computed(step, every, num_steps, grounded_steps):
            v = pivot(x, sigma, step)  # [1, N, C]
            guesses.append((step, line(sigma) if len(seen) == 2 else seen[-1][1]))
            return (v.float() + guesses[-1][1]).to(v.dtype)
        v = velocity(x, sigma, step)  # [B, N, C]
        seen.append((sigma, v.float() - v[:1].float()))
        if not guesses:
            return v
        owed = sum(lengths[n] / lengths[step] * (line(sigmas[n]) - guess) for n, guess in guesses)
        guesses.clear()
        return (v.float() + owed).to(v.dtype)

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


def is_computed(step: int, every: int, num_steps: int, grounded_steps: int) -> bool:
    """Whether targets are computed in a step of a run, or only their pivot.

    Every `every`-th is, counted from the first ones on and anew where grounding ends, but none right before
    another that is computed anyway.
    """
    last = num_steps - LAST
    if not FIRST <= step < last:
        return True
    grounded = step < grounded_steps
    start, end = (FIRST, min(grounded_steps, last)) if grounded else (max(FIRST, grounded_steps), last)
    return step == start or (step - start) % every == 0 and step + 1 < end
