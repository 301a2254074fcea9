"""What a run is kept from: updates that are not finite, an end within a step, an end for want of room."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed

from bokehflux.training.batches import Draws
from bokehflux.training.distributed import rank_and_world

MOST, STEPS = 3, 100
"""More refused steps than this, of the last so many, end a run."""
AGAIN_SECONDS = 2.0
"""A launcher passes on the Ctrl-C that its processes heard themselves; later than this it is a second one."""
Rows = Callable[[int, Draws], Sequence[str]]
"""Number of a step and its draws -> what a person calls its rows."""


def sample_numbers(_: int, draws: Draws) -> list[str]:
    """Rows of data that have no names."""
    return [f"sample {number}" for number in draws.samples]


def of_all_processes(*scalars: Tensor) -> list[list[float]]:
    """The scalars of every process, by rank: afterwards all know the same. Waits for the device."""
    mine = torch.stack([scalar.detach().float() for scalar in scalars])
    world = rank_and_world()[1]
    if world == 1:
        return [mine.tolist()]
    every = [torch.empty_like(mine) for _ in range(world)]
    distributed.all_gather(every, mine)
    return torch.stack(every).tolist()


def wait_for_all() -> None:
    """Go on when every process has come here."""
    if rank_and_world()[1] > 1:
        distributed.barrier()


@dataclass(kw_only=True)
class Refusals:
    """Steps whose loss or gradient was not finite: their updates are left out, their rows written down."""

    entries: list[dict[str, Any]] = field(default_factory=list)
    """Number of the step from 0, losses by process, norm of the gradients, and rows, as JSON holds them."""

    def add(self, step: int, losses: Sequence[float], norm: float, rows: Rows, draws: Draws) -> str:
        """Write a step down; returns it in words. draws: of all its samples."""
        share = len(draws) // len(losses)
        bad = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)] or range(len(losses))
        parts = [draws.samples[rank * share : (rank + 1) * share] for rank in bad]
        found = [name for part in parts for name in rows(step, dataclasses.replace(draws, samples=part))]
        shown = [f"{loss:g}" for loss in losses]
        self.entries.append({"step": step, "losses": shown, "norm": f"{norm:g}", "rows": found})
        return (
            f"step {step} refused: loss {', '.join(shown)}, norm of the gradients {norm:g}; "
            f"its rows: {'; '.join(found)}"
        )

    def check(self, step: int) -> None:
        """Raise ArithmeticError when too many were refused, this step the last of them."""
        recent = [entry["step"] for entry in self.entries if entry["step"] > step - STEPS]
        if len(recent) > MOST:
            raise ArithmeticError(
                f"steps {', '.join(map(str, recent))} were refused: losses or gradients that are not finite "
                f"in more than {MOST} of {STEPS} steps"
            )


@contextlib.contextmanager
def postponed() -> Iterator[list[int]]:
    """Inside, Ctrl-C and SIGTERM are put on a list, which it yields; a second one is not."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only that one hears of them
        yield came
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: handler for number in numbers if (handler := signal.getsignal(number)) is not None}
    first = 0.0

    def note(number: int, _: object) -> None:
        nonlocal first
        if came and time.monotonic() - first > AGAIN_SECONDS:
            restore()
            signal.raise_signal(number)
        elif not came:
            came.append(number)
            first = time.monotonic()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, note)
    try:
        yield came
    finally:
        restore()


def is_full(error: OSError) -> bool:
    """Whether a disk or a quota is. The library that writes tensors says it in words."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return error.errno in full or any(f"os error {number}" in str(error) for number in full)
