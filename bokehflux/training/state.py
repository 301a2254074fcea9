"""The state of a run: all that its next step depends on. Saved whole or not at all, restored bit by bit."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bokehflux.training.guard import OnFull, Refusals, with_room
from bokehflux.training.log import Log
from bokehflux.training.optim import Optimizer
from bokehflux.weights.files.checkpoint import Checkpoint, CheckpointError, NotFoundError, open_checkpoint
from bokehflux.weights.files.write import save, unfinished

FACTS = "state"
"""The file's metadata under this name: what is not a tensor, as JSON."""


class Ema:
    """Exponential moving average of parameters; short at first, so it never remembers the initial weights."""

    def __init__(self, parameters: Iterable[nn.Parameter], rate: float) -> None:
        self.parameters: list[Tensor] = list(parameters)
        self.rate = rate
        self.average = [p.detach().clone() for p in self.parameters]
        self.steps = 0

    @torch.no_grad()
    def update(self) -> None:
        rate = max(self.rate, 1 / (1 + 0.25 * self.steps))
        torch._foreach_lerp_(self.average, self.parameters, rate)
        self.steps += 1

    @torch.no_grad()
    def copy_to_parameters(self) -> None:
        torch._foreach_copy_(self.parameters, self.average)

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Inside, parameters are their averages."""
        kept = [p.detach().clone() for p in self.parameters]
        self.copy_to_parameters()
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, kept)


@dataclass(kw_only=True)
class State:
    """A run between two steps. Samples are functions of their number, so `step` is the place in the data."""

    optimizer: Optimizer
    ema: Ema
    log: Log
    refused: Refusals = field(default_factory=Refusals)
    step: int = 0
    """The next one."""

    def tensors(self) -> dict[str, Tensor]:
        """Parameters, their averages and their moments, by name."""
        names = [name for name, _ in self.optimizer.named]
        return {
            **{f"parameter.{name}": p for name, p in self.optimizer.named},
            **{f"average.{name}": a for name, a in zip(names, self.ema.average, strict=True)},
            **self.optimizer.moments(),
        }

    def facts(self) -> dict[str, Any]:
        """What is not a tensor."""
        return {
            "step": self.step,
            "averaged": self.ema.steps,
            "refused": self.refused.entries,
            "log": self.log.state(),
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Those that `tensors` has after a step."""
        return {n: tuple(t.shape) for n, t in self.tensors().items()} | self.optimizer.moment_shapes()

    @property
    def num_bytes(self) -> int:
        """What `tensors` take on the disk after a step."""
        return sum(4 * math.prod(shape) for shape in self.shapes().values())

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Become what `tensors` and `facts` were taken from."""
        for (name, parameter), average in zip(self.optimizer.named, self.ema.average, strict=True):
            parameter.copy_(tensors[f"parameter.{name}"])
            average.copy_(tensors[f"average.{name}"])
        self.optimizer.restore(tensors)
        self.step, self.ema.steps = facts["step"], facts["averaged"]
        self.refused.entries = list(facts["refused"])
        self.log.restore(facts["log"])


@dataclass(frozen=True, kw_only=True)
class Saves:
    """Where a run keeps its state: one .safetensors file, replaced as a whole."""

    path: Path
    every: int
    """Steps from one save to the next; the last step is always saved."""
    settings: Mapping[str, Any]
    """Everything that decides the run, as JSON can hold it: a run resumes under the same settings only."""
    resume: bool = False
    """Go on from the file, which must be there."""
    on_full: OnFull = "wait"
    """Where the disk has no room for a state. The one before it is kept in any case."""

    def clear(self) -> None:
        """Remove what processes that were killed left unfinished in the file's folder and below."""
        for path in unfinished(self.path.parent):
            path.unlink(missing_ok=True)

    def check_room(self, size: int) -> int:
        """Bytes that are free. Raises CheckpointError unless they are enough for a state of `size` bytes
        beside the one that it replaces."""
        needed = size if self.path.is_file() else 2 * size
        free = shutil.disk_usage(next(folder for folder in self.path.parents if folder.exists())).free
        free += sum(unfinished(self.path.parent).values())  # `clear` makes that room
        if free < needed:
            raise CheckpointError(
                self.path,
                f"a state takes {size / 1e9:.3g} GB, and one is written before the last is removed: "
                f"{needed / 1e9:.3g} GB are needed, {free / 1e9:.3g} GB are free",
            )
        return free

    @contextlib.contextmanager
    def writer(self) -> Iterator[Writer]:
        """Inside, states are written. At its end the last one is on the disk."""
        writer = Writer(self)
        try:
            yield writer
            writer.wait()
        finally:
            writer.close()

    def open(self) -> tuple[Checkpoint, dict[str, Any]]:
        """The file, and what it holds beside tensors: what can be judged before a model is loaded.

        Raises CheckpointError when there is no saved run, or it is one of other settings.
        """
        if not self.path.is_file():
            raise NotFoundError(f"{self.path}: no saved run to resume", "start it from the beginning instead")
        file = open_checkpoint(self.path)
        if FACTS not in file.metadata:
            raise CheckpointError(self.path, "not the saved state of a run")
        facts = json.loads(file.metadata[FACTS])
        then, now = facts["settings"], json.loads(json.dumps(self.settings))
        problems = [
            f"{name} was {then.get(name)!r} when the run was saved and is {now.get(name)!r} now"
            for name in {**then, **now}
            if then.get(name) != now.get(name)
        ]
        if problems:
            raise CheckpointError(self.path, *problems)
        return file, facts

    def restore(self, state: State) -> None:
        """Raises CheckpointError as `open` does, and for a run of other weights."""
        file, facts = self.open()
        expected = state.shapes()
        problems = [
            f"{name}: expected {expected.get(name)}, found {file.shapes.get(name)}"
            for name in {**expected, **file.shapes}
            if expected.get(name) != file.shapes.get(name)
        ]
        if problems:
            raise CheckpointError(self.path, *problems)
        state.restore({name: file.read(name) for name in expected}, facts)
        file.close()


class Writer:
    """Writes states while the run goes on: it stops for copies only. The next one waits for the last."""

    def __init__(self, saves: Saves) -> None:
        self.saves = saves
        self._thread = ThreadPoolExecutor(1)
        self._written: Future[None] | None = None
        self._ended = threading.Event()

    def save(self, state: State) -> None:
        """Copy the state to the host and have it written. Raises what the last one failed with."""
        self.wait()
        tensors = {name: t.detach().to("cpu", copy=True) for name, t in state.tensors().items()}
        facts = json.dumps({**state.facts(), "settings": self.saves.settings})
        what = f"the state of step {state.step} (the one before is kept, the run waits at its next save)"
        write = functools.partial(save, self.saves.path, tensors, {FACTS: facts})
        self._written = self._thread.submit(with_room, write, what, self.saves.on_full, self._ended)

    def wait(self) -> None:
        """Until the last state is on the disk. Raises OSError where it cannot be written."""
        if self._written is not None:
            self._written.result()

    def close(self) -> None:
        """Wait for what is being written, but for no room on the disk."""
        self._ended.set()
        self._thread.shutdown()
