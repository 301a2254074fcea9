"""A whole job, text to pictures: six targets on one pivot, 30 steps of which 24 are grounded.

Ours: `Pipeline.generate` on the networks of `arms.OURS`. The published way: six runs of two rows, each
encoding the prompt and the negative prompt and decoding two pictures. Text encoders, VAE and colour
transfer are ours in both: the difference is the way, not the parts. The six published runs are equal: one is
timed and counts for all. Random weights.

`SHORTCUTS` make other pictures in less time. With random weights their times have a meaning, their pictures
none: `python -m bokehflux.evaluation shortcuts` compares those of nano.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks import networks
from benchmarks.arms import OURS, RIVALS, StepArm, allow_recompiling, best_stock_attention, build_arms
from benchmarks.cases.step import SANE_ERROR
from benchmarks.networks import PIVOT_LEVEL, TARGET_LEVELS, Batch
from benchmarks.registry import Benchmark, Session
from benchmarks.timing import Arm, Row, Rules, Times, race
from bokehflux.pipeline.generate import plan_generate
from bokehflux.pipeline.memory import Phase, Placement
from bokehflux.pipeline.pipeline import Pipeline
from bokehflux.pipeline.run import Options, execute
from bokehflux.record import GenerateSettings

PHASES: tuple[Phase, ...] = ("text", "denoise", "decode")
SHORTCUTS: dict[str, tuple[str, dict[str, int]]] = {
    "ours, reuse 3": ("ours", {"reuse": 3}),
    "ours, fp8, reuse 3": ("ours, fp8", {"reuse": 3}),
    "ours, 256 tokens": ("ours", {"max_sequence_length": 256}),
}
"""Arm -> the arm whose network it has, and further settings of the run."""
ARMS = (
    *(name for name in OURS if "graph" not in name),
    *SHORTCUTS,
    *(name for name in RIVALS if "published" in name),
)


def job(side_px: int, num_steps: int) -> GenerateSettings:
    """What is made."""
    return GenerateSettings(
        prompt="a red ball on a wooden table, city lights at night", bokeh_targets=TARGET_LEVELS,
        bokeh_pivot=PIVOT_LEVEL, num_inference_steps=num_steps, num_grounding_steps=round(0.8 * num_steps),
        height=side_px, width=side_px,
    )  # fmt: skip


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


def run_ours(pipeline: Pipeline, asked: GenerateSettings, backend: str) -> None:
    """Pictures of all targets, by the product itself."""
    execute(pipeline, plan_generate(pipeline, asked), Options(backend=backend))


def run_published(pipeline: Pipeline, asked: GenerateSettings, _: str) -> None:
    from tests.oracle import rivals

    rivals.published_run(pipeline, asked)


def timed(pipeline: Pipeline, asked: GenerateSettings, arm: StepArm, session: Session) -> Row:
    """Times and peak memory of one arm, after a short job: the plain steps are not compiled yet.

    total_s is wall-clock time, colour transfer included; the phases leave that and little else out.
    """
    device, on_gpu = session.device, session.device.type == "cuda"
    run, runs = (run_ours, 1) if arm.is_ours else (run_published, len(TARGET_LEVELS))
    _, shortcut = SHORTCUTS.get(arm.name, (arm.name, {}))
    asked = dataclasses.replace(asked, **shortcut)  # type: ignore[arg-type]
    # A reused step must be among them: the pivot alone has kernels of its own to compile.
    num_short = 2 if asked.reuse is None else 8
    short = dataclasses.replace(asked, num_inference_steps=num_short, num_grounding_steps=num_short - 1)
    clock = Timed(device=device)
    pipeline = dataclasses.replace(pipeline, transformer=arm.network, memory=clock)
    run(pipeline, short, session.backend)
    clock.seconds.clear()
    before = torch.cuda.memory_allocated(device) if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    begin = time.perf_counter()
    run(pipeline, asked, session.backend)
    seconds = runs * (time.perf_counter() - begin)
    row: Row = {f"{phase}_s": runs * clock.seconds[phase] for phase in PHASES}
    if on_gpu:
        others = sum(networks.num_bytes(network) for network in (*pipeline.text.networks, pipeline.vae))
        peak = torch.cuda.max_memory_allocated(device) - before + arm.weight_bytes + others
        row["peak_gb"] = peak / 1e9
    row |= {"total_s": seconds, "ms": 1000 * seconds}
    return row | {"shortcut": shortcut} if shortcut else row


@torch.inference_mode()
def measure_side(
    session: Session, pipeline: Pipeline, arms: Sequence[StepArm], side: int, batch: Batch, exact: Tensor
) -> list[Row]:
    """A row an arm, which is checked on the first step. The jobs are too long to take turns."""
    torch._dynamo.reset()
    asked, named = job(side, 3 if session.tiny else 30), {arm.name: arm for arm in arms}

    def one_by_one(right: Sequence[Arm]) -> Times:
        names = session.until_spent([arm.name for arm in right])
        return {name: timed(pipeline, asked, named[name], session) for name in names}, None

    racing = [arm.on(batch, exact) for arm in arms]
    rows = race(racing, Rules.of(racing, SANE_ERROR), one_by_one)
    return [{"side": f"{side} px", **row} for row in rows]


def arms_of(session: Session, pipeline: Pipeline) -> list[StepArm]:
    """The comparison arms first: should time run out, without them nothing of ours is known to be fast."""
    wanted = {name: SHORTCUTS.get(name, (name, {}))[0] for name in ARMS if session.wants(name)}
    networks_of = dict.fromkeys(wanted.values())
    arms = build_arms(pipeline.transformer, networks_of, with_levels=True, backend=session.backend)
    made = {arm.name: arm for arm in arms}
    arms = [dataclasses.replace(made[of], name=name) for name, of in wanted.items() if of in made]
    return sorted(arms, key=lambda arm: arm.is_ours)


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
        arms = arms_of(session, pipeline)
        for side in session.until_spent(batches):
            yield measure_side(session, pipeline, arms, side, batches[side], exact[side])


BENCHMARK = Benchmark(
    question="a whole job, text to pictures: six targets on one pivot, 30 steps, by phase",
    checked="as in step, on the first step",
    cases=lambda tiny: {f"{side} px": side for side in networks.setting(tiny).sides_px},
    arms=ARMS,
    columns="side arm total_s text_s denoise_s decode_s speedup error peak_gb verdict",
    bars=("side", "arm", "total_s"),
    measure=measure,
    takes_backend=True,
)
