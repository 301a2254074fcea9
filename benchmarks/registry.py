"""What a benchmark is, and the list of them: each is a module of `benchmarks/cases`."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from benchmarks import timing
from benchmarks.timing import Budget, Clock, Row

NAMES = (
    "attention", "step", "generate", "memory", "train_attention", "train_step", "pointwise", "scatter",
    "profile_step", "tiles", "nano_seconds", "ranks",
)  # fmt: skip
Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Session:
    """What one run of a benchmark was asked for."""

    device: torch.device
    tiny: bool
    """Toys in place of full sizes: to try the code, not to measure."""
    cases: Mapping[str, Any]
    """By name, in the order wanted."""
    arms: Sequence[str]
    """Parts of the names of arms; see `matches`."""
    repeats: int
    backend: str
    """Attention of our arms, by name."""
    budget: Budget

    @property
    def half(self) -> torch.dtype:
        """What kernels are measured in. Triton's interpreter knows no bfloat16."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float16

    def wants(self, arm: str) -> bool:
        return any(matches(arm, part) for part in self.arms)

    def replayed(self, sets: int) -> Clock:
        """The clock of kernels, which take turns with so many sets of inputs."""
        return functools.partial(timing.replayed, self.device, sets, self.repeats)

    def sustained(self) -> Clock:
        """The clock of whole calls."""
        return functools.partial(timing.sustained, self.device, self.repeats, self.budget)

    def until_spent(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items until the budget is spent, which a line says."""
        for item in items:
            if self.budget.spent:
                print("out of time: the rest is left out", flush=True)
                return
            yield item


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A question and how it is answered."""

    question: str
    checked: str
    """What must hold before an arm is timed."""
    cases: Callable[[bool], Mapping[str, Any]]
    """(toys) -> what is measured, by name, most important first."""
    usual_cases: Sequence[str] = ("",)
    """Parts of the names of full-size cases that run unless others are asked for."""
    arms: Sequence[str] = ()
    """Names, as far as this machine can tell. Without names there is no choice of arms."""
    usual_arms: Sequence[str] = ("",)
    repeats: int = 0
    """What `--repeats` is by default; 0: there is nothing to repeat."""
    least_repeats: int = 1
    repeated: str = "measurements of an arm"
    columns: str
    """Keys of a row that the table shows."""
    bars: tuple[str, str, str, str] | None = None
    """Keys of a row: bars are grouped by the first and coloured by the second; the third is their length, in
    units of the fourth."""
    measure: Callable[[Session], Iterator[list[Row]]]
    """Yields new rows as they are found."""
    finish: Callable[[list[Row]], list[Row]] | None = None
    """Adds to all rows the columns that compare one with another."""
    takes_backend: bool = False
    needs_gpu: bool = True
    isolated: bool = False
    """Every arm runs in a process of its own."""


def by_case(
    measure: Callable[[Session, Any], Iterable[Row]], label: str = "case"
) -> Callable[[Session], Iterator[list[Row]]]:
    """What measures a benchmark whose cases share nothing: the rows of one after another, with its name."""

    def measure_all(session: Session) -> Iterator[list[Row]]:
        torch.manual_seed(0)
        for name, case in session.until_spent(session.cases.items()):
            yield [{label: name, **row} for row in measure(session, case)]

    return measure_all


def find(name: str) -> Benchmark:
    """Raises ValueError for a name that is not in `NAMES`."""
    if name not in NAMES:
        raise ValueError(f"no benchmark is called {name!r}: there are {', '.join(NAMES)}")
    return importlib.import_module(f"benchmarks.cases.{name}").BENCHMARK


def matches(name: str, part: str) -> bool:
    """Whether a name contains a part, or equals what stands before a `$`."""
    return name == part[:-1] if part.endswith("$") else part in name


def pick(names: Iterable[str], parts: Sequence[str]) -> list[str]:
    """Names that match, in the order of the parts. Raises ValueError for a part that matches none."""
    found: dict[str, None] = {}
    for part in parts:
        these = [name for name in names if matches(name, part)]
        if not these:
            raise ValueError(f"no name contains {part!r}: there are {'; '.join(names)}")
        found |= dict.fromkeys(these)
    return list(found)
