"""A training log: progress on the terminal, points in a JSON file, and if asked a table and curves of them.

Points are part of a run's state, and files are written from all of them: a run that was killed and went on
has the table of one that was not. Seconds are in the JSON file only.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bokehflux.pictures import plot
from bokehflux.training.guard import is_full
from bokehflux.weights.files.write import replacing

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)

UNITS = ("[dB]", "LVCorr")
"""Endings of names of other figures than losses: each kind is drawn over an axis of its own."""


class Log:
    """Averages scalars over `every` steps without waiting for the device in between.

    live: write the file at every point, with a table `<name>.csv` and curves `<name>.png` beside it.
    board: a folder for TensorBoard. Raises ValueError where that is not installed.
    """

    def __init__(
        self, path: Path, every: int = 100, *, live: bool = False, board: Path | None = None
    ) -> None:
        self.path = path
        self.every = every
        self.live = live
        self.board = None if board is None else Board(board)
        self.steps: int | None = None
        """How many the whole run has, if known."""
        self.start = time.perf_counter()
        self.notes: dict[str, object] = {}
        self.points: list[dict[str, float]] = []
        self._sums: dict[str, list[Tensor]] = {}
        self._last = (0, self.start)
        self._behind = False  # whether there is something that no file has

    @property
    def seconds(self) -> float:
        """Since the run began, without the time between a stop and its resume."""
        return time.perf_counter() - self.start

    def change(self, key: str, value: object) -> None:
        """A fact of the run, kept beside the curve."""
        self.notes[key], self._behind = value, True

    def note(self, key: str, value: object) -> None:
        """The same, which is shown, too: a size, a figure."""
        self.change(key, value)
        logger.info("[%6.1f s] %s: %s", self.seconds, key, value)

    def begin(self, step: int, steps: int | None) -> None:
        """The first step of this process, and how many the run has if that is known."""
        self.steps, self._last = steps, (step, time.perf_counter())

    def step(self, step: int, **scalars: Tensor) -> None:
        """What a step found. step: counted from 0."""
        for key, value in scalars.items():
            self._sums.setdefault(key, []).append(value.detach())
        if (step + 1) % self.every == 0 and self._sums:
            means = {key: float(_together(values).mean()) for key, values in self._sums.items()}
            self._sums.clear()
            self.add(step + 1, means)

    def add(self, step: int, figures: dict[str, float]) -> None:
        """A point after so many steps, or further figures of the one that is there."""
        if not self.points or self.points[-1]["step"] != step:
            self.points.append({"step": step, "seconds": round(self.seconds, 1)})
        self.points[-1] |= figures
        self._behind = True
        shown = "  ".join(f"{k} {v:.4f}" for k, v in figures.items())
        logger.info("[%6.1f s] %6d  %s%s", self.seconds, step, shown, self._left(step))
        if self.board is not None:
            self.board.add(step, figures)

    def _left(self, step: int) -> str:
        """How long the rest will take, as fast as the steps since the last point."""
        (before, then), now = self._last, time.perf_counter()
        self._last = (step, now)
        if self.steps is None or step <= before:
            return ""
        each = (now - then) / (step - before)
        left = timedelta(seconds=round(each * (self.steps - step)))
        return f"  {each:.3g} s a step, {left} left of {self.steps} steps"

    def state(self) -> dict[str, Any]:
        """All of it as JSON, the scalars of the point that has begun included."""
        begun = {key: _together(values).tolist() for key, values in self._sums.items()}
        return {"seconds": self.seconds, "notes": self.notes, "points": self.points, "begun": begun}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self.start = time.perf_counter() - state["seconds"]
        self.notes, self.points = state["notes"] | self.notes, state["points"]
        self._sums = {key: list(torch.tensor(values)) for key, values in state["begun"].items()}

    def update(self) -> None:
        """Write what is new, if live. On a full disk say so and go on: the next time writes every point."""
        behind, self._behind = self._behind, False
        try:
            if self.live and behind:
                self.write()
        except OSError as error:
            if not is_full(error):
                raise
            logger.warning("the disk is full: %s and the curve are behind (%s)", self.path, error)

    def write(self) -> None:
        """Bring the files up to date. Figures that are not finite are in the table, not in the curves."""
        self._replace(".json", json.dumps({"notes": self.notes, "points": self.points}, indent=1) + "\n")
        names = list(dict.fromkeys(key for point in self.points for key in point if key != "seconds"))
        if not self.live or not names:
            return
        with replacing(self.path.with_suffix(".csv")) as temporary, temporary.open("w", newline="") as file:
            table = csv.DictWriter(file, names, extrasaction="ignore")
            table.writeheader()
            table.writerows(self.points)
        panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
        for name in names[1:]:
            unit = next((unit for unit in UNITS if name.endswith(unit)), "loss")
            known = (point for point in self.points if math.isfinite(point.get(name, math.nan)))
            if line := [(point["step"], point[name]) for point in known]:
                panels.setdefault(unit, {})[name] = line
        if not panels:
            return
        span, run = (self.points[0]["step"], self.points[-1]["step"]), self.path.parent.name
        with replacing(self.path.with_suffix(".png")) as temporary:
            images = [
                plot.lines(
                    series,
                    title=f"{run}: {unit.strip('[]')}",
                    x="steps",
                    size=(900, 300 + 18 * len(series)),
                    span=span,
                )
                for unit, series in panels.items()
            ]
            plot.joined(images, "down").save(temporary, "png")

    def save(self) -> None:
        """At the end of a run."""
        self.note("seconds", round(self.seconds, 1))
        self.write()

    def _replace(self, suffix: str, text: str) -> None:
        with replacing(self.path.with_suffix(suffix)) as temporary:
            temporary.write_text(text)


def summary_writer() -> type[SummaryWriter]:
    """TensorBoard's. Raises ValueError where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(
            "tensorboard = true needs the package tensorboard: pip install 'bokehflux[train]'"
        ) from None
    return SummaryWriter


class Board:
    """Points for TensorBoard. What an earlier process wrote after the step it goes on from is left out."""

    def __init__(self, folder: Path) -> None:
        self._open = summary_writer()
        self._writer: SummaryWriter | None = None
        self.folder = folder

    def add(self, step: int, figures: dict[str, float]) -> None:
        try:
            if self._writer is None:
                self._writer = self._open(str(self.folder), purge_step=step)
            for name, value in figures.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()
        except OSError as error:
            if not is_full(error):
                raise
            self._writer = None  # its thread has ended
            logger.warning("the disk is full: TensorBoard misses step %d (%s)", step, error)


def _together(values: list[Tensor]) -> Tensor:
    """[n], where the last of them is: what was restored comes from a file."""
    return torch.stack([value.to(values[-1].device, torch.float32) for value in values])
