"""One denoising step: ours beside diffusers and the published formulation, each eager and compiled.

Random weights in the official layout, bfloat16. "Compiled" is block by block, for all.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from benchmarks import networks
from benchmarks.arms import OURS, RIVALS, StepArm, allow_recompiling, best_stock_attention, build_arms
from benchmarks.networks import PIVOT_LEVEL, TARGET_LEVELS, Batch
from benchmarks.registry import Benchmark, Session
from benchmarks.timing import Row, Rules, race

SANE_ERROR = 0.5
"""No error above this passes, whatever the comparison arms': they may be wrong themselves."""
LEVELS: dict[str, tuple[float, ...] | None] = {
    "pair": (PIVOT_LEVEL, TARGET_LEVELS[1]),
    "base": None,
    "pivot + 6": (PIVOT_LEVEL, *TARGET_LEVELS),
    "one row": (PIVOT_LEVEL,),
}
"""Rows of a case by its name, most important first; the base model is what diffusers runs, with one row."""
SIGMA, LATE_SIGMA = 0.9, 0.3
"""Exact in bfloat16, times 1000 too: arms get what the reference gets."""


def cases(tiny: bool) -> dict[str, tuple[str, int, float]]:
    """(key of `LEVELS`, side in pixels, noise level)."""
    sides = networks.setting(tiny).sides_px
    late = {f"{kind} at sigma {LATE_SIGMA}": (kind, LATE_SIGMA) for kind in ("pair", "one row")}
    kinds = {kind: (kind, SIGMA) for kind in LEVELS} | late
    return {f"{name}, {side} px": (kind, side, x) for name, (kind, x) in kinds.items() for side in sides}


def each_case(session: Session, checked: bool) -> Iterator[tuple[str, Batch, Tensor | None, list[StepArm]]]:
    """Each case with its batch, its exact result and its arms, which are built anew where levels come or go.

    checked: whether there are exact results.
    """
    allow_recompiling()
    setting, on_gpu = networks.setting(session.tiny), session.device.type == "cuda"
    batches = [
        networks.draw_batch(setting, side, LEVELS[kind], session.device, sigma)
        for kind, side, sigma in session.cases.values()
    ]
    mmdit = networks.build_mmdit(setting, session.device)
    names = [name for name in (*OURS, *RIVALS) if session.wants(name)]
    built: list[StepArm] = []
    had_levels = None
    with best_stock_attention():
        exact = networks.exact_of(mmdit, batches) if checked else [None] * len(batches)
        for name, batch, true in session.until_spent(zip(session.cases, batches, exact, strict=True)):
            has_levels = batch.levels is not None
            if has_levels is not had_levels:
                built.clear()  # two sets of copies would not fit in 80 GB
                torch._dynamo.reset()
                gc.collect()
                built += build_arms(mmdit, names, with_levels=has_levels, backend=session.backend)
                had_levels = has_levels
            if on_gpu:
                torch.cuda.empty_cache()
            yield name, batch, true, built


@torch.inference_mode()
def measure_batch(session: Session, batch: Batch, arms: Sequence[StepArm], exact: Tensor) -> list[Row]:
    """A row an arm. `share`: of large products that take turns with them."""
    torch._dynamo.reset()  # each case compiles for its own shapes and has the limit to itself
    config = networks.setting(session.tiny).mmdit
    racing = [arm.on(batch, exact, sum(networks.tera_flop(config, batch, arm.is_ours))) for arm in arms]
    rows = race(racing, Rules.of(racing, SANE_ERROR), session.sustained())
    for arm, row in zip(arms, rows, strict=True):
        if (room := row.pop("workspace_mb", None)) is not None:
            row["peak_gb"] = arm.weight_bytes / 1e9 + room / 1e3
    return rows


def measure(session: Session) -> Iterator[list[Row]]:
    for name, batch, exact, arms in each_case(session, checked=True):
        yield [{"case": name, **row} for row in measure_batch(session, batch, arms, exact)]


BENCHMARK = Benchmark(
    question="one denoising step, ours beside diffusers and the published formulation",
    checked="velocities of the pivot, the first and the last target against float32: at most twice the best "
    "comparison arm's error, ten times in fp8",
    cases=cases,
    usual_cases=[f"{kind}, " for kind in LEVELS],
    arms=(*OURS, *RIVALS),
    repeats=15,
    columns="case arm ms launch_ms speedup tflops share error peak_gb verdict",
    bars=("case", "arm", "ms", "ms"),
    measure=measure,
    takes_backend=True,
)
