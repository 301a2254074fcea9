"""A whole job, text to pictures: six targets on one pivot, 30 steps of which 24 are grounded.

Ours: `Pipeline.generate` on the networks of `arms.OURS`. The published way: six runs of two rows, each
encoding the prompt and the negative prompt and decoding two pictures. Text encoders, VAE and colour
transfer are ours in both: the difference is the way, not the parts. The six published runs are equal; as many
as `--repeats` says are timed and count for all (`measured_runs`). Random weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import networks
from benchmarks.arms import (
    OURS,
    RIVALS,
    StepArm,
    allow_recompiling,
    best_stock_attention,
    build_arms,
)
from benchmarks.cases.step import rules_of
from benchmarks.networks import PIVOT_LEVEL, TARGET_LEVELS
from benchmarks.registry import Benchmark, Session
from benchmarks.timing import Row, Times, race
from bokehflux.conditioning import Conditioning
from bokehflux.lens import MAX_LEVEL
from bokehflux.models.vae import to_uint8
from bokehflux.pipeline.color import match_lab_means
from bokehflux.pipeline.memory import Phase, Placement
from bokehflux.pipeline.pipeline import Pipeline
from bokehflux.record import NEGATIVE_PROMPT
from bokehflux.sampling.denoise import model_sigma
from bokehflux.sampling.latents import LatentGrid, noise, pack, position_ids, unpack
from bokehflux.sampling.samplers import euler
from bokehflux.sampling.schedule import sigmas

PROMPT = "a red ball on a wooden table, city lights at night"
GUIDANCE = 3.0
SEED = 65578
PHASES: tuple[Phase, ...] = ("text", "denoise", "decode")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is made."""

    side_px: int
    num_steps: int
    num_grounded: int
    targets: tuple[float, ...] = TARGET_LEVELS
    backend: str = "auto"
    """Attention of our arms."""

    @property
    def grid(self) -> LatentGrid:
        return LatentGrid(height_px=self.side_px, width_px=self.side_px)


@dataclass(frozen=True, kw_only=True)
class Timed(Placement):
    """Everything resident, each phase of a run on a clock, the device's work included."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        self._wait()
        begin = time.perf_counter()
        yield
        self._wait()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - begin

    def _wait(self) -> None:
        if self.device is not None and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def run_ours(pipeline: Pipeline, network: nn.Module, job: Job, clock: Timed) -> list[np.ndarray]:
    """Pictures of the targets, by the product itself."""
    timed = dataclasses.replace(pipeline, transformer=network, memory=clock)
    result = timed.generate(
        PROMPT, job.targets, bokeh_pivot=PIVOT_LEVEL, num_inference_steps=job.num_steps,
        num_grounding_steps=job.num_grounded, guidance_scale=GUIDANCE, height=job.side_px,
        width=job.side_px, seed=SEED, backend=job.backend,
    )  # fmt: skip
    return [np.asarray(image) for image in result.images]


def run_published(pipeline: Pipeline, network: nn.Module, job: Job, clock: Timed) -> list[np.ndarray]:
    """One of the published runs: the first target and the pivot, the pivot last while it runs."""
    device, dtype = pipeline.device, pipeline.dtype
    text = pipeline.defaults.txt_length
    ids = position_ids(job.grid, text, device)
    levels = torch.tensor([job.targets[0], PIVOT_LEVEL], dtype=torch.float64) / MAX_LEVEL
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


def timed(pipeline: Pipeline, job: Job, arm: StepArm, session: Session) -> Row:
    """Times and peak memory of one arm, after a short job: the plain steps are not compiled yet.

    total_s is wall-clock time, colour transfer included; the phases leave that and little else out.
    """
    device = session.device
    run, runs = (run_ours, 1) if arm.is_ours else (run_published, len(TARGET_LEVELS))
    run(pipeline, arm.network, dataclasses.replace(job, num_steps=2, num_grounded=1), Timed(device=device))
    clock, times, begin = Timed(device=device), 0, time.perf_counter()
    on_gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(min(runs, session.repeats)):
        run(pipeline, arm.network, job, clock)
        times += 1
        if session.budget.spent:
            break
    scale = runs / times
    row: Row = {f"{phase}_s": scale * clock.seconds[phase] for phase in PHASES}
    if on_gpu:
        others = sum(networks.num_bytes(network) for network in (*pipeline.text.networks, pipeline.vae))
        peak = torch.cuda.max_memory_allocated(device) - before + arm.weight_bytes + others
        row["peak_gb"] = peak / 1e9
    seconds = scale * (time.perf_counter() - begin)
    return row | {"total_s": seconds, "ms": 1000 * seconds, "measured_runs": times}


@dataclass(frozen=True, kw_only=True)
class OneByOne:
    """The clock of a race between whole jobs, which are too long to take turns."""

    pipeline: Pipeline
    job: Job
    arms: Sequence[StepArm]
    session: Session

    @property
    def device(self) -> torch.device:
        return self.session.device

    def times(self, calls: Mapping[str, Callable[[int], Any]]) -> Times:
        right = [arm for arm in self.arms if arm.name in calls]
        return {
            arm.name: timed(self.pipeline, self.job, arm, self.session)
            for arm in self.session.until_spent(right)
        }, None


@torch.inference_mode()
def measure_side(clock: OneByOne, batch: networks.Batch, exact: Tensor) -> list[Row]:
    """A row an arm, which is checked on the first step."""
    torch._dynamo.reset()
    rows = race([arm.on(batch, exact) for arm in clock.arms], rules_of(clock.arms), clock)
    return [{"side": f"{clock.job.side_px} px", **row} for row in rows]


def measure(session: Session) -> Iterator[list[Row]]:
    allow_recompiling()
    setting, device = networks.setting(session.tiny), session.device
    with best_stock_attention():
        pipeline = networks.build_pipeline(setting, device)
        # Before any arm takes its memory: written-out attention needs up to 25 GB.
        wide = networks.widened(pipeline.transformer)
        levels = (PIVOT_LEVEL, *TARGET_LEVELS)
        batches = {
            side: networks.draw_batch(setting, side, levels, device) for side in session.cases.values()
        }
        exact = {side: networks.exact(wide, batch) for side, batch in batches.items()}
        if device.type == "cuda":
            torch.cuda.empty_cache()
        arms = build_arms(
            pipeline.transformer, with_levels=True, wants=session.wants, backend=session.backend, graphs=False
        )
        # The comparison arms first: should time run out, without them nothing of ours is known to be fast.
        arms.sort(key=lambda arm: arm.is_ours)
        num_steps = 3 if session.tiny else 30
        for side in session.until_spent(batches):
            job = Job(
                side_px=side,
                num_steps=num_steps,
                num_grounded=round(0.8 * num_steps),
                backend=session.backend,
            )
            clock = OneByOne(pipeline=pipeline, job=job, arms=arms, session=session)
            yield measure_side(clock, batches[side], exact[side])


BENCHMARK = Benchmark(
    question="a whole job, text to pictures: six targets on one pivot, 30 steps, by phase",
    checked="as in step, on the first step",
    cases=lambda tiny: {f"{side} px": side for side in networks.setting(tiny).sides_px},
    arms=(
        *(name for name, way in OURS.items() if not way.graph),
        *(name for name in RIVALS if name.startswith("published")),
    ),
    repeats=1,
    repeated="of the published way's six equal runs",
    columns="side arm total_s text_s denoise_s decode_s speedup error peak_gb measured_runs verdict",
    bars=("side", "arm", "total_s"),
    measure=measure,
    takes_backend=True,
)
