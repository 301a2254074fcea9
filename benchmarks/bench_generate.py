"""A whole job, text to pictures: six targets on one pivot, 30 steps of which 24 are grounded.

    python -m benchmarks.bench_generate [--seconds 500] [--sides 1024] [--arms compiled] [--published-runs 6]
    python -m benchmarks.bench_generate --tiny

Ours: `Pipeline.generate` on the networks of `arms.OURS`. The published way: six runs of two rows, each
encoding the prompt and the negative prompt and decoding two pictures. Text encoders, VAE and colour
transfer are ours in both: the difference is the way, not the parts. By default one of the six published
runs is timed and counted six times (`measured_runs`). Random weights; every arm's first step is compared
with float32 before it is timed. Writes generate.json and generate.png.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import networks
from benchmarks.arms import Arm, allow_recompiling, best_stock_attention, build_arms
from benchmarks.bench_step import check, limit_of
from benchmarks.networks import FULL, PIVOT_LEVEL, TARGET_LEVELS, TINY, Setting
from benchmarks.report import RESULTS, Budget, Row, bars, chosen_device, save, table
from benchmarks.timing import environment
from bokehflux.conditioning import Conditioning
from bokehflux.models.vae import to_uint8
from bokehflux.pipeline.color import match_lab_means
from bokehflux.pipeline.generate import NEGATIVE_PROMPT, Pipeline
from bokehflux.pipeline.memory import Phase, Placement
from bokehflux.sampling.denoise import model_sigma
from bokehflux.sampling.latents import LatentGrid, noise, pack, position_ids, unpack
from bokehflux.sampling.samplers import euler
from bokehflux.sampling.schedule import sigmas

PROMPT = "a red ball on a wooden table, city lights at night"
GUIDANCE = 3.0
SEED = 65578
PHASES: tuple[Phase, ...] = ("text", "denoise", "decode")
COLUMNS = {
    "side": "s", "arm": "s", "total_s": ".2f", "text_s": ".2f", "denoise_s": ".2f", "decode_s": ".2f",
    "speedup": ".2f", "error": ".2e", "peak_gb": ".1f", "measured_runs": "d", "verdict": "s",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is made."""

    side_px: int
    num_steps: int
    num_grounded: int
    targets: tuple[float, ...] = TARGET_LEVELS

    @property
    def grid(self) -> LatentGrid:
        return LatentGrid(height_px=self.side_px, width_px=self.side_px)


@dataclass(kw_only=True)
class Clock:
    """Seconds by phase, the device's work included."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def phase(self, phase: str) -> Iterator[None]:
        self._wait()
        begin = time.perf_counter()
        yield
        self._wait()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - begin

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True, kw_only=True)
class Timed(Placement):
    """Everything resident, each phase of a run on a clock."""

    clock: Clock

    @contextlib.contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        with self.clock.phase(phase):
            yield


def run_ours(pipeline: Pipeline, network: nn.Module, job: Job, clock: Clock) -> list[np.ndarray]:
    """Pictures of the targets, by the product itself."""
    timed = dataclasses.replace(pipeline, mmdit=network, memory=Timed(clock=clock))
    result = timed.generate(
        PROMPT, job.targets, bokeh_pivot=PIVOT_LEVEL, num_inference_steps=job.num_steps,
        num_grounding_steps=job.num_grounded, guidance_scale=GUIDANCE, height=job.side_px,
        width=job.side_px, seed=SEED,
    )  # fmt: skip
    return [np.asarray(image) for image in result.images]


def run_published(pipeline: Pipeline, network: nn.Module, job: Job, clock: Clock) -> list[np.ndarray]:
    """One of the published runs: the first target and the pivot, the pivot last while it runs."""
    device, dtype = pipeline.device, pipeline.dtype
    text = pipeline.defaults.txt_length
    ids = position_ids(job.grid, text, device)
    levels = torch.tensor([job.targets[0], PIVOT_LEVEL], dtype=torch.float64) / 30
    annotation = levels[:, None].to(device, dtype)
    guidance = torch.full((2,), GUIDANCE, device=device)

    def velocity(x: Tensor, sigma: Tensor, step: int) -> Tensor:
        sigma = model_sigma(sigma, dtype).to(device).expand(2)
        pivots = [1, 1] if step < job.num_grounded else None
        return network(x, txt, pooled, sigma, guidance, ids[:text], ids[text:], annotation, pivots)

    with clock.phase("text"):
        pipeline.text.encode([NEGATIVE_PROMPT])  # made whether used or not
        conditioning: Conditioning = pipeline.text.encode([PROMPT])
    with clock.phase("denoise"):
        txt, pooled = conditioning.txt.repeat(2, 1, 1), conditioning.pooled.repeat(2, 1)
        steps = sigmas(pipeline.schedule, job.num_steps, job.grid.num_tokens)
        latents = euler(velocity, pack(noise(job.grid, SEED, dtype)).to(device).repeat(2, 1, 1), steps)
    with clock.phase("decode"):
        target, pivot = (to_uint8(pipeline.vae.decode(unpack(row[None], job.grid)))[0] for row in latents)
        picture = match_lab_means(target, pivot).cpu().numpy()
    return [picture]


Run = Callable[[Pipeline, nn.Module, Job, Clock], list[np.ndarray]]


def run_of(arm: Arm) -> tuple[Run, int]:
    """How an arm makes a job, and how often that takes."""
    return (run_ours, 1) if arm.is_ours else (run_published, len(TARGET_LEVELS))


@torch.inference_mode()
def measure(
    pipeline: Pipeline,
    job: Job,
    arms: Sequence[Arm],
    batch: networks.Batch,
    exact: Tensor,
    published_runs: int,
    budget: Budget,
) -> Iterator[list[Row]]:
    """All rows so far, after every arm; arms left out for want of time say so.

    total_s is wall-clock time, colour transfer included; the phases leave that and little else out.
    """
    torch._dynamo.reset()
    device = batch.img.device
    rows: list[Row] = []
    errors: dict[str, float | str] = {}
    # The comparison arms first: without them nothing of ours is known to be right, or fast.
    for arm in sorted(arms, key=lambda arm: arm.is_ours):
        row: Row = {"side": f"{job.side_px} px", "arm": arm.name, "error": None, "verdict": "ok"}
        rows.append(row)
        if budget.spent:
            row["verdict"] = "out of time"
            continue
        error = errors[arm.name] = check({arm.name: arm.prepare(batch)}, batch, exact)[arm.name]
        if isinstance(error, str):
            row["verdict"] = error
            continue
        stock = [other.name for other in arms if not other.is_ours and other.name in errors]
        limit = limit_of(errors, stock or [arm.name], arm.max_error_ratio)
        row["error"] = error
        if not error <= limit:
            row["verdict"] = f"wrong: {error:.2e}, over {limit:.2e}"
            continue
        row |= timed(pipeline, job, arm, published_runs, budget, device)
        yield with_speedups(rows)
    yield rows


def timed(
    pipeline: Pipeline, job: Job, arm: Arm, published_runs: int, budget: Budget, device: torch.device
) -> Row:
    """Times and peak memory of one arm, after a short job: the plain steps are not compiled yet."""
    run, runs = run_of(arm)
    run(pipeline, arm.network, dataclasses.replace(job, num_steps=2, num_grounded=1), Clock(device=device))
    clock, times, begin = Clock(device=device), 0, time.perf_counter()
    on_gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(min(runs, published_runs)):
        run(pipeline, arm.network, job, clock)
        times += 1
        if budget.spent:
            break
    scale = runs / times
    row: Row = {f"{phase}_s": scale * clock.seconds[phase] for phase in PHASES}
    if on_gpu:
        others = sum(networks.num_bytes(network) for network in (*pipeline.text.networks, pipeline.vae))
        peak = torch.cuda.max_memory_allocated(device) - before + arm.weight_bytes + others
        row["peak_gb"] = peak / 1e9
    return row | {"total_s": scale * (time.perf_counter() - begin), "measured_runs": times}


def with_speedups(rows: list[Row]) -> list[Row]:
    """speedup: the fastest comparison arm's time over a row's own."""
    known = [row["total_s"] for row in rows if "total_s" in row and not row["arm"].startswith("ours")]
    for row in rows:
        if known and "total_s" in row:
            row["speedup"] = min(known) / row["total_s"]
    return rows


def run(
    setting: Setting,
    device: torch.device,
    *,
    sides: Sequence[int],
    num_steps: int,
    arms: Sequence[str],
    published_runs: int,
    budget: Budget,
    backend: str = "auto",
) -> Iterator[list[Row]]:
    """All rows so far, after every arm of every size. backend: attention of our arms."""
    pipeline = dataclasses.replace(networks.build_pipeline(setting, device), backend=backend)
    # Before any arm takes its memory: written-out attention needs up to 25 GB.
    wide = networks.widened(pipeline.mmdit)
    batches = {
        side: networks.draw_batch(setting, side, (PIVOT_LEVEL, *TARGET_LEVELS), device) for side in sides
    }
    exact = {side: networks.exact(wide, batch) for side, batch in batches.items()}
    if device.type == "cuda":
        torch.cuda.empty_cache()
    built = build_arms(pipeline.mmdit, with_levels=True, backend=backend, wanted=arms, graphs=False)
    done: list[Row] = []
    for side, batch in batches.items():
        if budget.spent:
            print(f"out of time before {side} px")
            break
        job = Job(side_px=side, num_steps=num_steps, num_grounded=round(0.8 * num_steps))
        found: list[Row] = []
        for found in measure(pipeline, job, built, batch, exact[side], published_runs, budget):
            yield done + found
        print(table(found, COLUMNS) + f"\n{budget.left:.0f} s left", flush=True)
        done += found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sides", type=int, nargs="+", default=None, help="pixels; default 1024 512")
    parser.add_argument("--arms", nargs="+", default=[""], help="only arms whose name contains one of these")
    parser.add_argument("--backend", default="auto", help="attention of our arms, by name")
    parser.add_argument("--steps", type=int, default=None, help="default 30; 80 %% of them are grounded")
    parser.add_argument("--published-runs", type=int, default=1, help="how many of the six to measure")
    parser.add_argument("--seconds", type=float, default=500, help="begin no arm after this")
    parser.add_argument("--name", default="generate", help="of the files")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--tiny", action="store_true", help="toys, on any machine")
    args = parser.parse_args(argv)
    if args.published_runs < 1:
        parser.error("--published-runs must be at least 1")
    budget = Budget(args.seconds)
    device = chosen_device(parser, tiny=args.tiny)
    allow_recompiling()
    setting = TINY if args.tiny else FULL
    found = environment(device)
    print(", ".join(f"{key} {value}" for key, value in found.items()))
    name, rows = f"{args.name}_tiny" if args.tiny else args.name, []
    with best_stock_attention():
        for rows in run(
            setting, device, sides=args.sides or setting.sides_px, arms=args.arms,
            num_steps=args.steps or (3 if args.tiny else 30), published_runs=args.published_runs,
            budget=budget, backend=args.backend,
        ):  # fmt: skip
            plot = bars(f"Six targets, {found['device']}: seconds", rows, "side", "arm", "total_s", "s")
            save(args.out, name, found, rows, plot, backend=args.backend)
    ours = [row for row in rows if row["arm"].startswith("ours")]
    return 0 if ours and all(row["verdict"] == "ok" for row in ours) else 1


if __name__ == "__main__":
    sys.exit(main())
