"""The one training loop: a loss for each step, and everything that every run does around it.

What is trained on, and towards what, is the loss's business: `nano` has four of them. Which numbers a
run needs to go on after it was killed is `state.py`'s, what it must not do is `guard.py`'s.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from bokehflux.training.batches import Draws
from bokehflux.training.distributed import averaged, rank_and_world
from bokehflux.training.guard import Rows, Told, postponed, sample_numbers, wait_for_all
from bokehflux.training.log import Log
from bokehflux.training.optim import Optimizer, trapezoid
from bokehflux.training.state import Ema, Saves, State

logger = logging.getLogger(__name__)


class Step(NamedTuple):
    """A step of a run, as its loss sees it."""

    number: int
    """Counted from 0."""
    done: float
    """Share of the run that is over, 0-1."""
    draws: Draws
    """Randomness of the samples that this process takes."""


Loss = Callable[[Step], tuple[Tensor, dict[str, Tensor]]]
"""The mean loss of a step's samples, a scalar, and the scalars to log for it."""


class Look(Protocol):
    """A look at the run from outside, every so many steps and after the last."""

    @property
    def every(self) -> int: ...

    def __call__(self, state: State) -> dict[str, float]:
        """Figures for the log, the same on every process. Changes nothing that a step depends on."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """What a run takes in, how long it lasts, and how it moves on the way."""

    seed: int
    batch: int
    """Samples of a step, over all processes."""
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

    def from_step(self, first: int) -> Iterator[tuple[int, float]]:
        """Number of each step from `first` on, and the share of the run that is over."""
        if not self.minutes:
            yield from ((step, step / self.steps) for step in range(first, self.steps))
            return
        start, step, done = time.perf_counter(), 0, 0.0
        while done < 1:
            yield step, done
            step, done = step + 1, (time.perf_counter() - start) / (60 * self.minutes)


def train(
    loss: Loss,
    optimizer: Optimizer,
    course: Course,
    log: Log,
    saves: Saves | None = None,
    looks: Sequence[Look] = (),
    rows: Rows = sample_numbers,
) -> int:
    """Train the optimiser's parameters in place until they are their moving average. Returns the steps taken.

    On a GPU the loss is computed under bfloat16 autocast; gradients and updates keep the parameters' type.
    Where torch.distributed is initialised, every process calls this alike: samples are shared out, gradients
    and figures averaged, and the first process saves. A step whose loss or gradient is not finite changes
    nothing but the log, which names its `rows`.

    saves: where the run keeps its state, and whether it goes on from there; CheckpointError when it cannot,
    or when there is no room. With it, Ctrl-C and SIGTERM wait for the end of a step, whose state is saved,
    and raise KeyboardInterrupt then; several processes agree on it up to a step later. Raises ArithmeticError
    when too many steps are not finite, which is heard of up to a step later, too, OSError when a state cannot
    be written, and ValueError for a run paced by the clock that is to be saved or shared: no two clocks
    agree.
    """
    rank, world = rank_and_world()
    if course.minutes and (saves is not None or world > 1):
        raise ValueError(
            "a run paced by minutes can be neither resumed nor shared: give it a number of steps"
        )
    parameters = [parameter for _, parameter in optimizer.named]
    state = State(optimizer=optimizer, ema=Ema(parameters, course.ema_rate), log=log)
    run = _Run(state, course, rows)
    if saves is not None and saves.resume:
        saves.restore(state)
    if saves is not None:
        if rank == 0:
            saves.clear()
        saves.check_room(state.num_bytes)
    log.begin(state.step, None if course.minutes else course.steps)
    device, objective = parameters[0].device, averaged(loss, parameters)
    with contextlib.ExitStack() as around:
        if rank == 0:
            around.callback(log.update)  # of what ended the run, too
        writer = around.enter_context(saves.writer()) if saves is not None and rank == 0 else None
        came = around.enter_context(postponed()) if saves is not None else []
        for number, done in course.from_step(state.step):
            draws = Draws.of_step(course.seed, number, course.batch, device, rank, world)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                value, figures = objective(Step(number, done, draws))
            value.backward()
            norm = nn.utils.clip_grad_norm_(parameters, course.clip)
            told = Told(value, norm, bool(came))
            # The device is in this step by now, so that the host hears of the one before without waiting.
            stop = run.settle() or (world == 1 and bool(came))
            optimizer.step(course.schedule(done), told.refused)
            run.begun = number, {name: figure.detach() for name, figure in figures.items()}, told
            del value, figures  # with all that autograd keeps of this step
            state.step = number + 1
            last = state.step == course.steps
            due = [look for look in looks if last or state.step % look.every == 0]
            save = last or (saves is not None and state.step % saves.every == 0)
            if due or save or stop:
                stop |= run.settle()
            for look in due:
                if found := look(state):
                    log.add(state.step, found)
            if rank == 0:
                log.update()
            if writer is not None and (save or stop):
                writer.save(state)
            if stop:
                if writer is not None:
                    writer.wait()
                wait_for_all()
                raise KeyboardInterrupt(f" after step {state.step}, whose state is saved")
        run.settle()
    state.ema.copy_to_parameters()
    return state.step


class _Run:
    """A run whose last step's update is under way, but whose average and log do not know of it yet."""

    def __init__(self, state: State, course: Course, rows: Rows) -> None:
        self.state, self.course, self.rows = state, course, rows
        self.begun: tuple[int, dict[str, Tensor], Told] | None = None
        """Number of that step, its figures, and what became of it."""

    def settle(self) -> bool:
        """Average and log the step that has begun, or write down why it was refused: before the parameters
        move again. Returns whether a process was asked to end. Raises ArithmeticError for too many."""
        if self.begun is None:
            return False
        (number, figures, told), self.begun, state = self.begun, None, self.state
        losses, norms, stop = told.read()
        if all(map(math.isfinite, (*losses, *norms))):
            state.ema.update()
            state.log.step(number, **figures)
            return stop
        whole = Draws.of_step(self.course.seed, number, self.course.batch, torch.device("cpu"))
        logger.warning(state.refused.add(number, losses, norms[0], self.rows, whole))
        state.log.change("refused", state.refused.entries)
        state.refused.check(number)
        return stop
