"""One denoising step: ours beside diffusers and the published formulation, each eager and compiled.

    python -m benchmarks.bench_step [--seconds 500] [--cases "pair, 1024" "base"] [--arms compiled]
    python -m benchmarks.bench_step --tiny

Random weights in the official layout, bfloat16. An arm whose velocity strays from float32 by more than it may
(`arms.OURS`) is named and not timed. Prints a table; writes step.json and step.png, again after every case.
"Compiled" is block by block, for all. `--tiny` runs toys anywhere: its times mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import networks
from benchmarks.arms import Arm, allow_recompiling, best_stock_attention, build_arms
from benchmarks.networks import FULL, PIVOT_LEVEL, TARGET_LEVELS, TINY, Batch, Setting
from benchmarks.report import (
    RESULTS,
    Budget,
    Row,
    bars,
    chosen_device,
    first_line,
    pick,
    save,
    table,
    turns,
    workspace_bytes,
)
from benchmarks.timing import environment, gemm_burst

SANE_ERROR = 0.5
"""No error above this passes, whatever the comparison arm's: that one may be wrong itself."""
CASE_SECONDS = 25.0
"""Timing of a case ends after this, three rounds at the least."""
PRODUCTS = "products"
"""Large matrix products, by this name among the arms that take turns."""
LEVELS: dict[str, tuple[float, ...] | None] = {
    "pair": (PIVOT_LEVEL, TARGET_LEVELS[1]),
    "base": None,
    "pivot + 6": (PIVOT_LEVEL, *TARGET_LEVELS),
    "one row": (PIVOT_LEVEL,),
}
"""Rows of a case by its name, most important first; the base model is what diffusers runs, with one row."""
COLUMNS = {
    "case": "s", "arm": "s", "ms": ".2f", "speedup": ".2f", "tflops": ".0f",
    "share": ".0%", "error": ".2e", "peak_gb": ".1f", "verdict": "s",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Case:
    """A batch and its name."""

    name: str
    batch: Batch

    @property
    def with_levels(self) -> bool:
        return self.batch.levels is not None


def cases(setting: Setting, device: torch.device, wanted: Sequence[str] = ("",)) -> list[Case]:
    """Those `pick`ed, else all, the most important first."""
    every = [
        Case(name=f"{kind}, {side} px", batch=networks.draw_batch(setting, side, levels, device))
        for kind, levels in LEVELS.items()
        for side in setting.sides_px
    ]
    return pick({case.name: case for case in every}, wanted)


def tera_flop(setting: Setting, is_ours: bool, batch: Batch) -> float:
    """Work of an arm, 1e12 operations: matrix products of blocks and attention; adapter not counted."""
    n, config, length = batch.num_targets, setting.mmdit, batch.length
    if not n:
        flop = networks.gemm_flop(config, length, 1) + networks.attention_flop(config, length, 2)
    elif is_ours:
        flop = networks.gemm_flop(config, length, n + 1, n)
        flop += networks.attention_flop(config, length, 3 * n + 1)
    else:
        flop = networks.gemm_flop(config, length, 2 * n) + networks.attention_flop(config, length, 8 * n)
    return flop / 1e12


def check(arms: Mapping[str, Callable[[], Tensor]], batch: Batch, exact: Tensor) -> dict[str, float | str]:
    """Each arm's error, or why it failed. Compiles what is compiled."""
    found: dict[str, float | str] = {}
    for name, run in arms.items():
        try:
            found[name] = networks.relative_error(run(), batch, exact)
        except Exception as error:  # of compilers too: one arm must not take the others with it
            found[name] = f"failed: {first_line(error)}"
    return found


def limit_of(errors: Mapping[str, float | str], yardsticks: Sequence[str], ratio: float = 2.0) -> float:
    """Largest passing error: NaN, which nothing passes, where no yardstick could run."""
    known = [e for name in yardsticks if isinstance(e := errors[name], float) and e == e]
    return min(ratio * min(known), SANE_ERROR) if known else float("nan")


@torch.inference_mode()
def measure(
    setting: Setting,
    case: Case,
    arms: Sequence[Arm],
    exact: Tensor,
    repeats: int,
    budget: Budget,
) -> list[Row]:
    """A row an arm; wrong ones say so in `verdict`. `share`: of large products that take turns with them."""
    torch._dynamo.reset()  # each case compiles for its own shapes and has the limit to itself
    batch, device = case.batch, case.batch.img.device
    calls = {arm.name: arm.prepare(batch) for arm in arms}
    errors = check(calls, batch, exact)
    stock = [arm.name for arm in arms if not arm.is_ours]
    yardsticks = stock or [arms[-1].name]
    limits = {arm.name: limit_of(errors, yardsticks, arm.max_error_ratio) for arm in arms}
    right = [arm for arm in arms if isinstance(e := errors[arm.name], float) and e <= limits[arm.name]]
    extra = {}
    for arm in right:
        extra[arm.name] = workspace_bytes(calls[arm.name], device)  # graphs are captured in this call
    slice_ = Budget(min(CASE_SECONDS, budget.left))
    burst, tera_flop_of_burst = gemm_burst(device)
    burst()
    taking_turns = {arm.name: calls[arm.name] for arm in right} | {PRODUCTS: burst}
    timings = turns(taking_turns, device, repeats, slice_, at_least=3)
    ceiling = 1000 * tera_flop_of_burst / timings[PRODUCTS].median
    best = min((timings[name].median for name in stock if name in timings), default=None)
    rows: list[Row] = []
    for arm in arms:
        error = errors[arm.name]
        row: Row = {"case": case.name, "arm": arm.name, "error": error if isinstance(error, float) else None}
        rows.append(row)
        if arm not in right:
            row["verdict"] = (
                error if isinstance(error, str) else f"wrong: {error:.2e}, over {limits[arm.name]:.2e}"
            )
            continue
        timing, room = timings[arm.name], extra[arm.name]
        tflops = 1000 * tera_flop(setting, arm.is_ours, batch) / timing.median
        row |= {
            "ms": timing.median, "p20": timing.p20, "p80": timing.p80, "verdict": "ok", "tflops": tflops,
            "share": tflops / ceiling, "ceiling_tflops": ceiling,
            "speedup": None if best is None else best / timing.median,
            "peak_gb": None if room is None else (arm.weight_bytes + room) / 1e9,
        }  # fmt: skip
    return rows


def run(
    setting: Setting,
    some: Sequence[Case],
    device: torch.device,
    *,
    arms: Sequence[str],
    backend: str,
    repeats: int,
    budget: Budget,
) -> Iterator[list[Row]]:
    """All rows so far, after every case."""
    mmdit = networks.build_mmdit(setting, device)
    # Before any arm takes its memory: written-out attention needs up to 25 GB.
    wide = networks.widened(mmdit)
    exact = {case.name: networks.exact(wide, case.batch) for case in some}
    print(f"float32 velocities of {len(some)} cases; {budget.left:.0f} s left", flush=True)
    built: list[Arm] = []
    rows: list[Row] = []
    for case, before in zip(some, [None, *some], strict=False):
        if budget.spent:
            print(f"out of time before {case.name}")
            break
        if before is None or before.with_levels != case.with_levels:
            built.clear()  # two sets of copies would not fit in 80 GB
            torch._dynamo.reset()
            gc.collect()
            built += build_arms(mmdit, with_levels=case.with_levels, backend=backend, wanted=arms)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        found = measure(setting, case, built, exact[case.name], repeats, budget)
        print(table(found, COLUMNS) + f"\n{budget.left:.0f} s left", flush=True)
        rows += found
        yield rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=[""], help="parts of cases' names, in the order wanted")
    parser.add_argument("--arms", nargs="+", default=[""], help="only arms whose name contains one of these")
    parser.add_argument("--backend", default="auto", help="attention of our arms, by name")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=500, help="begin no case after this")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--tiny", action="store_true", help="toys, on any machine")
    args = parser.parse_args(argv)
    budget = Budget(args.seconds)
    device = chosen_device(parser, tiny=args.tiny)
    allow_recompiling()
    found = environment(device)
    print(", ".join(f"{key} {value}" for key, value in found.items()))
    name, rows = "step_tiny" if args.tiny else "step", []
    setting = TINY if args.tiny else FULL
    try:
        some = cases(setting, device, args.cases)
    except ValueError as error:
        parser.error(str(error))
    with best_stock_attention():
        for rows in run(
            setting, some, device, arms=args.arms, backend=args.backend, repeats=args.repeats, budget=budget
        ):
            plot = bars(f"One step, {found['device']}, bf16: milliseconds", rows, "case", "arm", "ms", "ms")
            save(args.out, name, found, rows, plot, backend=args.backend)
    ours = [row for row in rows if row["arm"].startswith("ours")]
    return 0 if ours and all(row["verdict"] == "ok" for row in ours) else 1


if __name__ == "__main__":
    sys.exit(main())
