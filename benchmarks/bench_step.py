"""One denoising step: ours beside diffusers and the published formulation, each eager and compiled.

    python -m benchmarks.bench_step [--seconds 500] [--cases grounded] [--backend triton]
    python -m benchmarks.bench_step --tiny

Random weights in the official layout, bfloat16. An arm whose velocity strays from float32 by more than twice
the comparison arm's error is named and not timed. Prints a table; writes step.json and step.png, again after
every case. "Compiled" is block by block, for all. `--tiny` runs toys anywhere: its times mean nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import networks
from benchmarks.networks import FULL, PIVOT_LEVEL, TARGET_LEVELS, TINY, Batch, Setting
from benchmarks.report import RESULTS, Budget, Row, bars, first_line, save, table, turns, workspace_bytes
from benchmarks.timing import environment, gemm_ceiling
from bokehflux.models.mmdit import MMDiT

MAX_ERROR_RATIO = 2.0
"""Largest error that passes, as a multiple of the best comparison arm's (without one: our eager arm's)."""
SANE_ERROR = 0.5
"""No error above this passes, whatever the comparison arm's: that one may be wrong itself."""
WARM_UP = 2
LEVELS: dict[str, tuple[float, ...] | None] = {
    "pivot + 6": (PIVOT_LEVEL, *TARGET_LEVELS),
    "pair": (PIVOT_LEVEL, TARGET_LEVELS[1]),
    "one row": (PIVOT_LEVEL,),
    "one row, base": None,
}
"""Rows of a case by its name, most important first; the base model is what diffusers runs."""
COLUMNS = {
    "case": "s", "arm": "s", "ms": ".2f", "p20": ".2f", "p80": ".2f", "speedup": ".2f", "tflops": ".0f",
    "share": ".0%", "error": ".2e", "peak_gb": ".1f", "verdict": "s",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Case:
    """A batch and its name."""

    name: str
    batch: Batch


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to compute a step."""

    name: str
    prepare: Callable[[Batch], Callable[[], Tensor]]
    weight_bytes: int
    takes_levels: bool | None = None
    """True: cases with levels only; False: without only; None: both."""
    is_ours: bool = True


def cases(setting: Setting, device: torch.device, wanted: str) -> list[Case]:
    """Most important first: grounded before plain, six targets before one, both sizes of each in turn."""
    found = []
    for kind, levels in LEVELS.items():
        for side in setting.sides_px:
            name = f"{kind}, {side} px"
            if wanted in name:
                found.append(Case(name=name, batch=networks.draw_batch(setting, side, levels, device)))
    return found


@torch.no_grad()
def references(mmdit: MMDiT, some: Sequence[Case]) -> dict[str, Tensor]:
    """Float32 velocities. Takes 48 GB more at full size while it runs."""
    wide = networks.on_same_weights(mmdit).float()
    return {case.name: networks.exact(wide, case.batch) for case in some}


@torch.no_grad()
def build_arms(mmdit: MMDiT, backend: str) -> list[Arm]:
    def ours(name: str, network: MMDiT, takes_levels: bool | None = None) -> Arm:
        return Arm(
            name=name,
            prepare=lambda batch: networks.our_step(network, batch, backend),
            weight_bytes=networks.num_bytes(network),
            takes_levels=takes_levels,
        )

    arms = [
        ours("ours, folded, compiled", networks.folded(mmdit), True),
        ours("ours, compiled", networks.compiled(mmdit)),
        ours("ours, eager", mmdit),
    ]
    try:
        from benchmarks import rivals
    except ImportError as error:
        print(f"no comparison arms: {first_line(error)}")
        return arms
    adapter = networks.num_bytes(mmdit.bokeh) if mmdit.bokeh is not None else 0
    for compile in (True, False):
        suffix = "compiled" if compile else "eager"
        plain = rivals.diffusers_model(mmdit, compile=compile)
        published = rivals.published_model(mmdit, compile=compile)
        arms.append(
            Arm(
                name=f"published, {suffix}",
                prepare=lambda batch, model=published: rivals.published_step(model, batch),
                weight_bytes=networks.num_bytes(mmdit),
                takes_levels=True,
                is_ours=False,
            )
        )
        arms.append(
            Arm(
                name=f"diffusers, {suffix}",
                prepare=lambda batch, model=plain: rivals.diffusers_step(model, batch),
                weight_bytes=networks.num_bytes(mmdit) - adapter,
                takes_levels=False,
                is_ours=False,
            )
        )
    return arms


def tera_flop(setting: Setting, arm: Arm, batch: Batch) -> float:
    """Work of an arm, 1e12 operations: matrix products of blocks and attention; adapter not counted."""
    n, config, length = batch.num_targets, setting.mmdit, batch.length
    if not n:
        flop = networks.gemm_flop(config, length, 1) + networks.attention_flop(config, length, 2)
    elif arm.is_ours:
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


def limit_of(errors: Mapping[str, float | str], yardsticks: Sequence[str]) -> float:
    """Largest passing error: NaN, which nothing passes, where no yardstick could run."""
    known = [e for name in yardsticks if isinstance(e := errors[name], float) and e == e]
    return min(MAX_ERROR_RATIO * min(known), SANE_ERROR) if known else float("nan")


@torch.inference_mode()
def measure(
    setting: Setting,
    case: Case,
    arms: Sequence[Arm],
    exact: Tensor,
    ceiling: float,
    repeats: int,
    budget: Budget,
) -> list[Row]:
    """A row an arm; those over time or wrong say so in `verdict`."""
    torch._dynamo.reset()  # each case compiles for its own shapes and has the limit to itself
    batch, device = case.batch, case.batch.img.device
    here = [arm for arm in arms if arm.takes_levels in (None, batch.levels is not None)]
    calls = {arm.name: arm.prepare(batch) for arm in here}
    errors = check(calls, batch, exact)
    stock = [arm.name for arm in here if not arm.is_ours]
    limit = limit_of(errors, stock or ["ours, eager"])
    right = [arm for arm in here if isinstance(e := errors[arm.name], float) and e <= limit]
    extra = {}
    for arm in right:
        for _ in range(WARM_UP):
            calls[arm.name]()
        extra[arm.name] = workspace_bytes(calls[arm.name], device)
    timings = turns({arm.name: calls[arm.name] for arm in right}, device, repeats, budget)
    best = min((timings[name].median for name in stock if name in timings), default=None)
    rows: list[Row] = []
    for arm in here:
        error = errors[arm.name]
        row: Row = {"case": case.name, "arm": arm.name, "error": error if isinstance(error, float) else None}
        if arm not in right:
            row["verdict"] = error if isinstance(error, str) else f"wrong: more than {limit:.2e}"
            rows.append(row)
            continue
        timing, room = timings[arm.name], extra[arm.name]
        tflops = 1000 * tera_flop(setting, arm, batch) / timing.median
        row |= {
            "ms": timing.median, "p20": timing.p20, "p80": timing.p80, "verdict": "ok", "tflops": tflops,
            "share": tflops / ceiling, "speedup": None if best is None else best / timing.median,
            "peak_gb": None if room is None else (arm.weight_bytes + room) / 1e9,
        }  # fmt: skip
        rows.append(row)
    return rows


def run(
    setting: Setting, device: torch.device, *, wanted: str, backend: str, repeats: int, budget: Budget
) -> Iterator[tuple[list[Row], float]]:
    """All rows so far and the matrix product's TFLOP/s, after every case."""
    ceiling = gemm_ceiling(device)
    print(f"bf16 matrix product: {ceiling:.0f} TFLOP/s", flush=True)
    mmdit = networks.build_mmdit(setting, device)
    some = cases(setting, device, wanted)
    if not some:
        raise ValueError(f"no case's name contains {wanted!r}")
    exact = references(mmdit, some)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    print(f"float32 velocities of {len(some)} cases; {budget.left:.0f} s left", flush=True)
    arms = build_arms(mmdit, backend)
    rows: list[Row] = []
    for case in some:
        if budget.spent:
            print(f"out of time before {case.name}")
            break
        found = measure(setting, case, arms, exact[case.name], ceiling, repeats, budget)
        print(table(found, COLUMNS), flush=True)
        rows += found
        yield rows, ceiling


def allow_recompiling() -> None:
    """57 blocks of two kinds, each with its own weights: more variants than dynamo's default allows.

    Running into the limit would time eager code under the name of compiled code, so it is an error.
    """
    config = torch._dynamo.config
    for name in ("recompile_limit", "cache_size_limit"):
        if hasattr(config, name):
            setattr(config, name, 128)
    if hasattr(config, "fail_on_recompile_limit_hit"):
        config.fail_on_recompile_limit_hit = True


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    parser.add_argument("--backend", default="auto", help="attention of our arms: auto, sdpa, triton")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=500, help="begin no case after this")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--tiny", action="store_true", help="toys, on any machine")
    args = parser.parse_args(argv)
    budget = Budget(args.seconds)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.tiny:
        parser.error("there is no GPU; --tiny tries everything on toys")
    torch.set_float32_matmul_precision("highest")  # float32 is the reference
    allow_recompiling()
    found = environment(device)
    print(", ".join(f"{key} {value}" for key, value in found.items()))
    name, rows = "step_tiny" if args.tiny else "step", []
    setting = TINY if args.tiny else FULL
    for rows, ceiling in run(
        setting, device, wanted=args.cases, backend=args.backend, repeats=args.repeats, budget=budget
    ):
        plot = bars(f"One step, {found['device']}, bf16: milliseconds", rows, "case", "arm", "ms", "ms")
        save(args.out, name, found, rows, plot, ceiling_tflops=ceiling, backend=args.backend)
    ours = [row for row in rows if row["arm"].startswith("ours")]
    return 0 if ours and all(row["verdict"] == "ok" for row in ours) else 1


if __name__ == "__main__":
    sys.exit(main())
