"""A small training log: progress on the terminal, every averaged point in one JSON file."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bokehflux.weights.files.write import replacing

logger = logging.getLogger(__name__)


class Log:
    """Averages scalars over `every` steps without waiting for the device in between."""

    def __init__(self, path: Path, every: int = 100) -> None:
        self.path = path
        self.every = every
        self.start = time.perf_counter()
        self.notes: dict[str, object] = {}
        self.points: list[dict[str, float]] = []
        self._sums: dict[str, list[Tensor]] = {}

    @property
    def seconds(self) -> float:
        """Since the run began, without the time between a stop and its resume."""
        return time.perf_counter() - self.start

    def note(self, key: str, value: object) -> None:
        """A fact of the run (a size, a figure), kept beside the curve."""
        self.notes[key] = value
        logger.info("[%6.1f s] %s: %s", self.seconds, key, value)

    def step(self, step: int, **scalars: Tensor) -> None:
        for key, value in scalars.items():
            self._sums.setdefault(key, []).append(value.detach())
        if (step + 1) % self.every == 0:
            means = {key: float(_together(values).mean()) for key, values in self._sums.items()}
            self.points.append({"step": step + 1, "seconds": round(self.seconds, 1), **means})
            shown = "  ".join(f"{k} {v:.4f}" for k, v in means.items())
            logger.info("[%6.1f s] %6d  %s", self.seconds, step + 1, shown)
            self._sums.clear()

    def state(self) -> dict[str, Any]:
        """All of it as JSON, the scalars of the point that has begun included."""
        begun = {key: _together(values).tolist() for key, values in self._sums.items()}
        return {"seconds": self.seconds, "notes": self.notes, "points": self.points, "begun": begun}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self.start = time.perf_counter() - state["seconds"]
        self.notes, self.points = state["notes"], state["points"]
        self._sums = {key: list(torch.tensor(values)) for key, values in state["begun"].items()}

    def save(self) -> None:
        self.note("seconds", round(self.seconds, 1))
        text = json.dumps({"notes": self.notes, "points": self.points}, indent=1)
        with replacing(self.path) as temporary:
            temporary.write_text(text + "\n")


def _together(values: list[Tensor]) -> Tensor:
    """[n], where the last of them is: what was restored comes from a file."""
    return torch.stack([value.to(values[-1].device, torch.float32) for value in values])
