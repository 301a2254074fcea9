"""A whole job, text to pictures: six targets on one pivot, 30 steps of which 24 are grounded.

    python -m benchmarks.bench_generate [--seconds 500] [--sides 1024] [--published-runs 6]
    python -m benchmarks.bench_generate --tiny

Ours: the prompt once, one batch of seven rows with blocks compiled and the adapter folded, seven decodings.
The published way: six runs of two rows, each encoding the prompt and the negative prompt and decoding two
pictures. Text encoders, VAE and colour transfer are ours in both: the difference is the way, not the parts.
By default one of the six published runs is timed and counted six times (`measured_runs`). Random weights;
every arm's first step is compared with float32 before it is timed. Writes generate.json and generate.png.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks import networks
from benchmarks.bench_step import allow_recompiling, check, limit_of
from benchmarks.networks import FULL, PIVOT_LEVEL, TARGET_LEVELS, TINY, Setting
from benchmarks.report import RESULTS, Budget, Row, bars, first_line, save, table
from benchmarks.timing import environment
from bokehflux.attention import AttentionSpec, Grounded, Plain
from bokehflux.color import match_lab_means
from bokehflux.generate import NEGATIVE_PROMPT, Pipeline
from bokehflux.models.bokeh import BokehCondition
from bokehflux.models.mmdit import MMDiT
from bokehflux.models.vae import to_uint8
from bokehflux.sampling.denoise import denoiser, model_sigma
from bokehflux.sampling.latents import LatentGrid, noise, pack, position_ids, unpack
from bokehflux.sampling.samplers import euler
from bokehflux.sampling.schedule import sigmas
from bokehflux.types import Conditioning

PROMPT = "a red ball on a wooden table, city lights at night"
GUIDANCE = 3.0
SEED = 65578
COLUMNS = {
    "side": "s", "arm": "s", "total_s": ".2f", "text_s": ".2f", "denoise_s": ".2f", "decode_s": ".2f",
    "speedup": ".2f", "error": ".2e", "measured_runs": "d", "verdict": "s",
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

    def time(self, phase: str, call: Callable[[], Tensor | Conditioning | list[np.ndarray]]) -> object:
        self._wait()
        begin = time.perf_counter()
        result = call()
        self._wait()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - begin
        return result

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def run_ours(pipeline: Pipeline, mmdit: MMDiT, job: Job, backend: str, clock: Clock) -> list[np.ndarray]:
    """Pictures of the targets. `Pipeline.generate`, its stages timed apart; the pivot is row 0."""
    rows = 1 + len(job.targets)
    grounded: AttentionSpec = Grounded(pivot_of=(0,) * rows, backend=backend)

    def attention(_rows: int, step: int) -> AttentionSpec:
        return grounded if step < job.num_grounded else Plain(backend=backend)

    def denoise() -> Tensor:
        steps = sigmas(pipeline.schedule, job.num_steps, job.grid.num_tokens)
        velocity = denoiser(
            mmdit,
            conditioning,  # type: ignore[arg-type]
            job.grid,
            guidance=GUIDANCE,
            bokeh=BokehCondition.of((PIVOT_LEVEL, *job.targets)),
            attention=attention,
            sigmas=steps,
        )
        start = pack(noise(job.grid, SEED, mmdit.dtype)).to(mmdit.device)
        return euler(velocity, start.expand(rows, -1, -1), steps)

    conditioning = clock.time("text", lambda: pipeline.text.encode([PROMPT]))
    latents = clock.time("denoise", denoise)
    return clock.time("decode", lambda: decode(pipeline, latents, job))  # type: ignore


def run_published(pipeline: Pipeline, model: torch.nn.Module, job: Job, clock: Clock) -> list[np.ndarray]:
    """One of the published runs: the first target and the pivot, the pivot last while it runs."""
    device, dtype = pipeline.device, pipeline.dtype
    text = pipeline.defaults.txt_length
    ids = position_ids(job.grid, text, device)
    levels = torch.tensor([job.targets[0], PIVOT_LEVEL], dtype=torch.float64) / 30
    annotation = levels[:, None].to(device, dtype)
    guidance = torch.full((2,), GUIDANCE, device=device)

    def encode() -> Conditioning:
        pipeline.text.encode([NEGATIVE_PROMPT])  # made whether used or not
        return pipeline.text.encode([PROMPT])

    def velocity(x: Tensor, sigma: Tensor, step: int) -> Tensor:
        sigma = model_sigma(sigma, dtype).to(device).expand(2)
        pivots = [1, 1] if step < job.num_grounded else None
        return model(x, txt, pooled, sigma, guidance, ids[:text], ids[text:], annotation, pivots)

    def denoise() -> Tensor:
        steps = sigmas(pipeline.schedule, job.num_steps, job.grid.num_tokens)
        start = pack(noise(job.grid, SEED, dtype)).to(device)
        return euler(velocity, start.repeat(2, 1, 1), steps)

    conditioning = clock.time("text", encode)
    txt, pooled = conditioning.txt.repeat(2, 1, 1), conditioning.pooled.repeat(2, 1)  # type: ignore[attr-defined]
    latents = clock.time("denoise", denoise)
    return clock.time("decode", lambda: decode(pipeline, latents.flip(0), job))  # type: ignore


def decode(pipeline: Pipeline, latents: Tensor, job: Job) -> list[np.ndarray]:
    """[pivot, targets ...] packed -> pictures of the targets in the pivot's colours, as both ways do."""
    pivot, *others = (
        to_uint8(pipeline.vae.decode(unpack(row[None], job.grid))).cpu().numpy()[0] for row in latents
    )
    return [match_lab_means(image, pivot) for image in others]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to do the job."""

    name: str
    prepare: Callable[[networks.Batch], Callable[[], Tensor]]
    """One grounded step, to be checked."""
    run: Callable[[Job, Clock], list[np.ndarray]]
    runs: int = 1
    """How often a job takes it."""


@torch.no_grad()
def build_arms(pipeline: Pipeline, backend: str) -> list[Arm]:
    fast = networks.folded(pipeline.mmdit)
    arms = [
        Arm(
            name="ours",
            prepare=lambda batch: networks.our_step(fast, batch, backend),
            run=lambda job, clock: run_ours(pipeline, fast, job, backend, clock),
        )
    ]
    try:
        from benchmarks import rivals
    except ImportError as error:
        print(f"no comparison arms: {first_line(error)}")
        return arms
    for compile in (True, False):
        model = rivals.published_model(pipeline.mmdit, compile=compile)
        arms.append(
            Arm(
                name=f"published, {'compiled' if compile else 'eager'}",
                prepare=lambda batch, model=model: rivals.published_step(model, batch),
                run=lambda job, clock, model=model: run_published(pipeline, model, job, clock),
                runs=len(TARGET_LEVELS),
            )
        )
    return arms


@torch.inference_mode()
def measure(
    job: Job, arms: Sequence[Arm], batch: networks.Batch, exact: Tensor, published_runs: int, budget: Budget
) -> list[Row]:
    """A row an arm, ours first; arms left out for want of time say so."""
    torch._dynamo.reset()
    errors = check({arm.name: arm.prepare(batch) for arm in arms}, batch, exact)
    limit = limit_of(errors, [arm.name for arm in arms[1:] or arms])
    rows: list[Row] = []
    for arm in arms:
        error = errors[arm.name]
        row: Row = {"side": f"{job.side_px} px", "arm": arm.name, "error": None, "verdict": "ok"}
        rows.append(row)
        if isinstance(error, str):
            row["verdict"] = error
            continue
        row["error"] = error
        if not error <= limit:
            row["verdict"] = f"wrong: more than {limit:.2e}"
            continue
        if budget.spent:
            row["verdict"] = "out of time"
            continue
        # Both kinds of step once: the plain one is not compiled yet.
        warm = Job(side_px=job.side_px, num_steps=2, num_grounded=1, targets=job.targets)
        arm.run(warm, Clock(device=batch.img.device))
        clock, times = Clock(device=batch.img.device), 0
        for _ in range(min(arm.runs, published_runs)):
            arm.run(job, clock)
            times += 1
            if budget.spent:
                break
        scale = arm.runs / times
        row |= {f"{phase}_s": scale * seconds for phase, seconds in clock.seconds.items()}
        row |= {"total_s": scale * sum(clock.seconds.values()), "measured_runs": times}
    return with_speedups(rows)


def with_speedups(rows: list[Row]) -> list[Row]:
    """speedup of an arm: how often our time fits in its; ours has that of the fastest other arm."""
    ours, *others = rows
    timed = [row for row in others if row.get("total_s") is not None]
    if ours.get("total_s") is not None:
        for row in timed:
            row["speedup"] = row["total_s"] / ours["total_s"]
        ours["speedup"] = min((row["speedup"] for row in timed), default=None)
    return rows


def run(
    setting: Setting,
    device: torch.device,
    *,
    sides: Sequence[int],
    num_steps: int,
    backend: str,
    published_runs: int,
    budget: Budget,
) -> Iterator[list[Row]]:
    """All rows so far, after every size."""
    pipeline = networks.build_pipeline(setting, device)
    batches = {
        side: networks.draw_batch(setting, side, (PIVOT_LEVEL, *TARGET_LEVELS), device) for side in sides
    }
    with torch.no_grad():
        wide = networks.on_same_weights(pipeline.mmdit).float()
        exact = {side: networks.exact(wide, batch) for side, batch in batches.items()}
        del wide
    if device.type == "cuda":
        torch.cuda.empty_cache()
    arms = build_arms(pipeline, backend)
    rows: list[Row] = []
    for side, batch in batches.items():
        if budget.spent:
            print(f"out of time before {side} px")
            break
        job = Job(side_px=side, num_steps=num_steps, num_grounded=round(0.8 * num_steps))
        found = measure(job, arms, batch, exact[side], published_runs, budget)
        print(table(found, COLUMNS), flush=True)
        rows += found
        yield rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sides", type=int, nargs="+", default=None, help="pixels; default 1024 512")
    parser.add_argument("--steps", type=int, default=None, help="default 30; 80 %% of them are grounded")
    parser.add_argument("--published-runs", type=int, default=1, help="how many of the six to measure")
    parser.add_argument("--backend", default="auto", help="attention of our arm: auto, sdpa, triton")
    parser.add_argument("--seconds", type=float, default=500, help="begin no arm after this")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--tiny", action="store_true", help="toys, on any machine")
    args = parser.parse_args(argv)
    if args.published_runs < 1:
        parser.error("--published-runs must be at least 1")
    budget = Budget(args.seconds)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.tiny:
        parser.error("there is no GPU; --tiny tries everything on toys")
    torch.set_float32_matmul_precision("highest")
    allow_recompiling()
    setting = TINY if args.tiny else FULL
    found = environment(device)
    print(", ".join(f"{key} {value}" for key, value in found.items()))
    name, rows = "generate_tiny" if args.tiny else "generate", []
    for rows in run(
        setting,
        device,
        sides=args.sides or setting.sides_px,
        num_steps=args.steps or (3 if args.tiny else 30),
        backend=args.backend,
        published_runs=args.published_runs,
        budget=budget,
    ):
        plot = bars(f"Six targets, {found['device']}: seconds", rows, "side", "arm", "total_s", "s")
        save(args.out, name, found, rows, plot, backend=args.backend)
    ours = [row for row in rows if row["arm"] == "ours"]
    return 0 if ours and all(row["verdict"] == "ok" for row in ours) else 1


if __name__ == "__main__":
    sys.exit(main())
