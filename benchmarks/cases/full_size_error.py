"""How far full-size FLUX.1-dev with the bokeh adapter strays from its float32 result in bfloat16.

Ours, eager (the arm that reproduces the published rounding), beside the published formulation on diffusers:
one velocity each on the same random weights and inputs, unbounded and as a pair, at two noise levels; both
against ours in float32 with the written-out reference attention. Nothing is timed: `step` does that, and
checks every arm.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import torch

from benchmarks import networks
from benchmarks.arms import best_stock_attention
from benchmarks.cases.step import LEVELS
from benchmarks.registry import Benchmark, Session
from benchmarks.timing import Row

SIGMAS = (0.9, 0.3)
"""Exact in bfloat16, times 1000 too: the arms get what the reference gets."""
KINDS = ("one row", "pair")
MAX_RATIO = {False: 1.05, True: 2.0}
"""Largest passing ratio of our error to the published one's, at full size and on toys."""


def cases(tiny: bool) -> dict[str, tuple[str, int, float]]:
    """(key of `LEVELS`, side in pixels, sigma)."""
    return {
        f"{kind}, {side} px, sigma {sigma}": (kind, side, sigma)
        for side in networks.setting(tiny).sides_px
        for sigma in SIGMAS
        for kind in KINDS
    }


@torch.inference_mode()
def compare(tiny: bool, wanted: Iterable[str], device: torch.device, seed: int = 0) -> list[Row]:
    """A row a case."""
    from tests.oracle import rivals  # needs diffusers

    setting = networks.setting(tiny)
    with torch.inference_mode(False):
        mmdit = networks.build_mmdit(setting, device, seed)
        wide, published = networks.widened(mmdit), rivals.published_model(mmdit, compile=False)
    rows: list[Row] = []
    for name in wanted:
        kind, side, sigma = cases(tiny)[name]
        batch = networks.draw_batch(setting, side, LEVELS[kind], device, seed)
        batch = dataclasses.replace(batch, sigma=sigma)
        exact = networks.exact(wide, batch)
        error = networks.relative_error(networks.our_step(mmdit, batch)(), batch, exact)
        other = networks.relative_error(rivals.published_step(published, batch)(), batch, exact)
        verdict = "ok" if error <= MAX_RATIO[tiny] * other else "wrong"  # wrong for NaN
        row = {"case": name, "error": error, "published": other, "ratio": error / other, "verdict": verdict}
        rows.append(row)
    return rows


def measure(session: Session) -> Iterator[list[Row]]:
    with best_stock_attention():
        if rows := compare(session.tiny, session.until_spent(session.cases), session.device):
            yield rows


BENCHMARK = Benchmark(
    question="error of full-size bf16 against float32, ours and published; nothing is timed",
    checked="our error is at most 1.05 times the published one; twice on toys",
    cases=cases,
    columns="case error published ratio verdict",
    measure=measure,
)
