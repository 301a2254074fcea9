"""A small training log: progress on the terminal, every averaged point in one JSON file."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path

import torch
from torch import Tensor

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

    def note(self, key: str, value: object) -> None:
        """A fact of the run (a size, a figure), kept beside the curve."""
        self.notes[key] = value
        logger.info("[%6.1f s] %s: %s", time.perf_counter() - self.start, key, value)

    def step(self, step: int, **scalars: Tensor) -> None:
        for key, value in scalars.items():
            self._sums.setdefault(key, []).append(value.detach())
        if (step + 1) % self.every == 0:
            means = {key: float(torch.stack(values).float().mean()) for key, values in self._sums.items()}
            seconds = time.perf_counter() - self.start
            self.points.append({"step": step + 1, "seconds": round(seconds, 1), **means})
            logger.info(
                "[%6.1f s] %6d  %s", seconds, step + 1, "  ".join(f"{k} {v:.4f}" for k, v in means.items())
            )
            self._sums.clear()

    def save(self) -> None:
        self.note("seconds", round(time.perf_counter() - self.start, 1))
        text = json.dumps({"notes": self.notes, "points": self.points}, indent=1)
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text(text + "\n")
        os.replace(temporary, self.path)
