"""Pictures of nano, the bundled model, on this machine: seconds each, any device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

import bokehflux
from benchmarks.registry import Benchmark, Session, by_case
from benchmarks.timing import Arm, Row, Rules, race
from bokehflux.pipeline.pipeline import Pipeline

PROMPT = "a red ball on a wooden table, city lights at night"
PIVOT = 15.0
CASES: dict[str, Sequence[float] | None] = {"one picture": None, "three levels": (0, 8, 28)}
"""Levels by name of a case; None: without the adapter."""
ARMS = ("together", "one at a time")


def run(pipe: Pipeline, levels: Sequence[float] | None, num_steps: int | None) -> np.ndarray:
    """Pictures [N, H, W, 3] of one run. Several levels are grounded on a pivot."""
    pivot = None if levels is None else PIVOT
    result = pipe.generate(PROMPT, levels, bokeh_pivot=pivot, num_inference_steps=num_steps)
    return np.stack([np.asarray(image) for image in result.images])


def measure_levels(session: Session, levels: Sequence[float] | None) -> list[Row]:
    pipe, num_steps = bokehflux.load("nano", device=session.device), 2 if session.tiny else None
    ways = {ARMS[0]: [levels]} if levels is None else {ARMS[0]: [levels], ARMS[1]: [[x] for x in levels]}
    seen: list[np.ndarray] = []

    def error(made: np.ndarray) -> float:
        """Mean difference from the first arm's pictures, which range over 0-1."""
        seen.append(made / 255)
        return float(np.abs(seen[-1] - seen[0]).mean())

    arms = [
        Arm(
            name=name,
            call=lambda _, runs=runs: np.concatenate([run(pipe, some, num_steps) for some in runs]),
            error=error,
            is_ours=True,
        )
        for name, runs in ways.items()
        if session.wants(name)
    ]
    rows = race(arms, Rules(error_of=None, max_error=0.005, speed_of=[ARMS[-1]]), session.sustained())
    for row in rows:
        if "ms" in row:
            row |= {"seconds": row["ms"] / 1000, "a_picture": row["ms"] / 1000 / len(levels or [0])}
    return rows


BENCHMARK = Benchmark(
    question="seconds that nano, the bundled model, needs for a picture on this machine",
    checked="pictures of both ways agree",
    cases=lambda tiny: CASES,
    arms=ARMS,
    repeats=1,
    columns="case arm seconds a_picture speedup verdict",
    bars=("case", "arm", "seconds", "s"),
    measure=by_case(measure_levels),
    needs_gpu=False,
)
