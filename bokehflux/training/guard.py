"""What a run is kept from: updates that are not finite, an end within a step, an end for want of room."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, distributed

from bokehflux.training.batches import Draws
from bokehflux.training.distributed import rank_and_world

logger = logging.getLogger(__name__)

MOST, STEPS = 3, 100
"""More refused steps than this, of the last so many, end a run."""
AGAIN_SECONDS = 2.0
"""A launcher passes on the Ctrl-C that its processes heard themselves; later than this it is a second one."""
RETRY_SECONDS = 20.0
"""How often a full disk is tried again."""
OnFull = Literal["wait", "stop"]
"""What to do where the disk has no room."""
Rows = Callable[[int, Draws], Sequence[str]]
"""Number of a step and its draws -> what a person calls its rows."""


def sample_numbers(_: int, draws: Draws) -> list[str]:
    """Rows of data that have no names."""
    return [f"sample {number}" for number in draws.samples]


class Told:
    """What every process has to say of a step, by rank: afterwards all know the same."""

    def __init__(self, loss: Tensor, norm: Tensor, stop: bool) -> None:
        """Scalars of this process. stop: whether it was asked to end."""
        mine = torch.stack([loss.detach().float(), norm.float(), torch.full_like(norm, stop).float()])
        every = [torch.empty_like(mine) for _ in range(rank_and_world()[1])]
        if len(every) > 1:
            distributed.all_gather(every, mine)
        else:
            every = [mine]
        together = torch.stack(every)
        self.refused = 1 - together.isfinite().all().float()
        """Scalar on the device: 1 where a loss or a gradient of any process is not finite, else 0."""
        self._host, self._there = together.to("cpu", non_blocking=together.is_cuda), None
        if together.is_cuda:
            self._there = torch.cuda.Event()
            self._there.record()

    def read(self) -> tuple[list[float], list[float], bool]:
        """Losses, norms, and whether any process was asked to end. Waits until the device has come so far."""
        if self._there is not None:
            self._there.synchronize()
        losses, norms, stops = self._host.T.tolist()
        return losses, norms, any(stops)


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


def with_room(
    write: Callable[[], object], what: str, on_full: OnFull, ended: threading.Event | None = None
) -> None:
    """Write, and where the disk is full say so and try again until there is room. what: that is written.

    Raises OSError for anything else, with "stop", and once `ended` is set.
    """
    ended, said = ended or threading.Event(), False
    while True:
        try:
            write()
            return
        except OSError as error:
            if not is_full(error) or on_full == "stop" or ended.is_set():
                raise
            if not said:
                logger.warning("the disk is full: %s waits for room (%s)", what, error)
            said = True
        ended.wait(RETRY_SECONDS)
