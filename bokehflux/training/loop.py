"""The one training loop: a loss for each step, and everything that every run does around it.

What is trained on, and towards what, is the loss's business: `nano` has four of them. Which numbers a
run needs to go on after it was killed is `state.py`'s.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bokehflux.training.log import Log
from bokehflux.training.optim import Optimizer, trapezoid
from bokehflux.training.state import Ema, Saves, State


class Step(NamedTuple):
    """Where in its run a step lies."""

    number: int
    """Counted from 0."""
    done: float
    """Share of the run that is over, 0-1."""


Loss = Callable[[Step], tuple[Tensor, dict[str, Tensor]]]
"""The loss of a step, a scalar, and the scalars to log for it."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """How long a run lasts, and how it moves on the way."""

    steps: int
    minutes: float = 0.0
    """Above 0: train this long instead of `steps`, to find out how many a machine affords. Repeat it with
    that number for equal weights."""
    schedule: Callable[[float], float] = trapezoid
    """Share of the run that is over -> factor of the learning rate."""
    ema_rate: float
    """Share of its weights that a step adds to their moving average."""
    clip: float = 1.0
    """Largest norm of all gradients together."""

    def from_step(self, first: int) -> Iterator[Step]:
        """The steps of the run from number `first` on."""
        if not self.minutes:
            yield from (Step(number, number / self.steps) for number in range(first, self.steps))
            return
        start, step = time.perf_counter(), Step(0, 0.0)
        while step.done < 1:
            yield step
            step = Step(step.number + 1, (time.perf_counter() - start) / (60 * self.minutes))


def train(loss: Loss, optimizer: Optimizer, course: Course, log: Log, saves: Saves | None = None) -> int:
    """Train the optimiser's parameters in place until they are their moving average. Returns the steps taken.

    On a GPU the loss is computed under bfloat16 autocast; gradients and updates keep the parameters' type.
    saves: where the run keeps its state, and whether it goes on from there. Raises CheckpointError when it
    cannot, and ValueError for a run paced by the clock, which no two runs share.
    """
    if saves is not None and course.minutes:
        raise ValueError("a run paced by minutes cannot be saved and resumed: give it a number of steps")
    parameters = [parameter for _, parameter in optimizer.named]
    state = State(optimizer=optimizer, ema=Ema(parameters, course.ema_rate), log=log)
    if saves is not None and saves.resume:
        saves.restore(state)
    device = parameters[0].device
    for step in course.from_step(state.step):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            value, figures = loss(step)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, course.clip)
        optimizer.step(course.schedule(step.done))
        state.ema.update()
        log.step(step.number, **figures)
        state.step = step.number + 1
        if saves is not None and (state.step % saves.every == 0 or state.step == course.steps):
            saves.save(state)
    state.ema.copy_to_parameters()
    return state.step
