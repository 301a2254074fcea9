"""The state of a run: all that its next step depends on. Saved whole or not at all, restored bit by bit."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bokehflux.training.log import Log
from bokehflux.training.optim import Optimizer
from bokehflux.weights.files.checkpoint import Checkpoint, CheckpointError, NotFoundError, open_checkpoint
from bokehflux.weights.files.write import save

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


@dataclass(kw_only=True)
class State:
    """A run between two steps. Samples are functions of their number, so `step` is the place in the data."""

    optimizer: Optimizer
    ema: Ema
    log: Log
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
        return {"step": self.step, "averaged": self.ema.steps, "log": self.log.state()}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Become what `tensors` and `facts` were taken from."""
        for (name, parameter), average in zip(self.optimizer.named, self.ema.average, strict=True):
            parameter.copy_(tensors[f"parameter.{name}"])
            average.copy_(tensors[f"average.{name}"])
        self.optimizer.restore(tensors)
        self.step, self.ema.steps = facts["step"], facts["averaged"]
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

    def save(self, state: State) -> None:
        facts = {**state.facts(), "settings": self.settings}
        save(self.path, state.tensors(), {FACTS: json.dumps(facts)})

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
        expected = {name: tuple(t.shape) for name, t in state.tensors().items()}
        expected |= state.optimizer.moment_shapes()
        problems = [
            f"{name}: expected {expected.get(name)}, found {file.shapes.get(name)}"
            for name in {**expected, **file.shapes}
            if expected.get(name) != file.shapes.get(name)
        ]
        if problems:
            raise CheckpointError(self.path, *problems)
        state.restore({name: file.read(name) for name in expected}, facts)
        file.close()
