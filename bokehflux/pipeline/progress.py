"""One line on a terminal that says what is going on and how long it will take."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from bokehflux.pipeline.model import Model
    from bokehflux.sampling.samplers import StepInfo


class Progress:
    """Draws phases ("loading", "encoding", "step", "decoding") on a stream; does nothing without one."""

    def __init__(self, stream: TextIO | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._drawn = False
        self._phase = ""
        self._since = clock()
        self._batch = ""
        self._first_batch = self._since
        self._batches_made = 0

    @classmethod
    def for_people(cls) -> Progress:
        """On stderr when that is a terminal, else silent."""
        return cls(sys.stderr if sys.stderr is not None and sys.stderr.isatty() else None)

    def batch(self, number: int, total: int) -> None:
        """Batch `number` (from 1) of `total` begins: later lines name it, and the time left for all."""
        left = ""
        if self._batches_made:
            left = (
                f", {_clock_face(self._left(self._first_batch, self._batches_made, total - number + 1))} left"
            )
        else:
            self._first_batch = self._clock()
        self._batches_made += 1
        self._batch = f"[{number}/{total}{left}] " if total > 1 else ""

    def show(self, phase: str, done: int = 0, total: int = 0, note: str = "") -> None:
        """`done` of `total` parts of a phase are behind us; without a total only the phase is named."""
        if phase != self._phase:
            self._phase, self._since = phase, self._clock()
        parts = [phase if not total else f"{phase} {done}/{total}", *([note] if note else [])]
        if total and done:
            parts.append(f"{_clock_face(self._left(self._since, done, total - done))} left")
        self._draw(self._batch + "  ".join(parts))

    def loading(self, done_bytes: int, total_bytes: int) -> None:
        """`on_progress` of `bokehflux.load`."""
        self.show("loading", done_bytes // 10**6, -(-total_bytes // 10**6), "MB")

    def blurring(self, done: int, total: int) -> None:
        """`on_picture` of `run.Options`."""
        self.show("blurring", done, total)

    def end(self) -> None:
        """The line is finished; whatever is printed next begins below it."""
        if self._drawn and self._stream is not None:
            print(file=self._stream, flush=True)
        self._drawn, self._phase = False, ""

    @contextmanager
    def watching(self, model: Model, rows: int, prompts: int = 1) -> Iterator[Callable[[StepInfo], None]]:
        """Follow one `generate` of `rows` pictures, the pivot included; yields its `on_step`.

        prompts: how many are encoded. Blocks of T5, which is nearly all of that work, are counted.
        """
        blocks = [block for network in model.text.networks for block in network.units().blocks]
        encoded = decoded = 0

        def on_block(*_: object) -> None:
            nonlocal encoded
            encoded += 1
            self.show("encoding", encoded, len(blocks) * prompts)
            if encoded == len(blocks) * prompts:
                encoded = 0  # out of memory, it may all begin again
                self._begin("step")

        def on_decode(*_: object) -> None:
            nonlocal decoded
            self.show("decoding", min(decoded, rows), rows)
            decoded += 1

        def on_step(info: StepInfo) -> None:
            nonlocal decoded
            decoded = 0
            self.show("step", info.step + 1, info.num_steps, f"noise {info.sigma:.2f}")

        self.show("encoding")
        if not blocks:
            self._begin("step")
        hooks = [block.register_forward_hook(on_block) for block in blocks]
        # Called once a picture, in one piece or in bands.
        hooks.append(model.vae.decoder.conv_in.register_forward_pre_hook(on_decode))
        try:
            yield on_step
        finally:
            for hook in hooks:
                hook.remove()
            self.end()

    def _begin(self, phase: str) -> None:
        """Timed from here, before it is shown: the first step's own time is part of the estimate."""
        self._phase, self._since = phase, self._clock()

    def _left(self, since: float, done: int, remaining: int) -> float:
        return (self._clock() - since) / done * remaining

    def _draw(self, line: str) -> None:
        if self._stream is not None:
            try:
                print(f"\r{line:<70}", end="", file=self._stream, flush=True)
                self._drawn = True
            except (OSError, ValueError):  # the terminal is gone, the work is not
                self._stream, self._drawn = None, False


def _clock_face(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes:02}:{seconds:02}"
