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

from benchmarks import networks
from benchmarks.arms import OURS, RIVALS, StepArm, allow_recompiling, best_stock_attention, build_arms
from benchmarks.cases.step import SANE_ERROR
from benchmarks.networks import PIVOT_LEVEL, TARGET_LEVELS
from benchmarks.registry import Benchmark, Session
from benchmarks.timing import Arm, Row, Rules, Times, race, wait
from bokehflux.pipeline.generate import plan_generate
from bokehflux.pipeline.memory import Phase, Placement
from bokehflux.pipeline.pipeline import Pipeline
from bokehflux.pipeline.run import Options, execute
from bokehflux.settings import GenerateSettings

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
        wait(self.device)
        begin = time.perf_counter()
        yield
        wait(self.device)
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - begin


def timed(pipeline: Pipeline, asked: GenerateSettings, arm: StepArm, session: Session) -> Row:
    """Times and peak memory of one arm, after a short job: the plain steps are not compiled yet.

    total_s is wall-clock time, colour transfer included; the phases leave that and little else out.
    """
    device, on_gpu = session.device, session.device.type == "cuda"
    runs = 1 if arm.is_ours else len(TARGET_LEVELS)
    _, shortcut = SHORTCUTS.get(arm.name, (arm.name, {}))
    asked = dataclasses.replace(asked, **shortcut)  # type: ignore[arg-type]
    # A reused step must be among them: the pivot alone has kernels of its own to compile.
    num_short = 2 if asked.reuse is None else 8
    short = dataclasses.replace(asked, num_inference_steps=num_short, num_grounding_steps=num_short - 1)
    clock = Timed(device=device)
    pipeline = dataclasses.replace(pipeline, transformer=arm.network, memory=clock)

    def run(asked: GenerateSettings) -> None:
        if arm.is_ours:
            execute(pipeline, plan_generate(pipeline, asked), Options(backend=session.backend))
        else:
            from tests.oracle import rivals  # this arm was built: diffusers is installed

            rivals.published_run(pipeline, asked)

    run(short)
    clock.seconds.clear()
    before = torch.cuda.memory_allocated(device) if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    begin = time.perf_counter()
    run(asked)
    seconds = runs * (time.perf_counter() - begin)
    row: Row = {f"{phase}_s": runs * clock.seconds[phase] for phase in PHASES}
    if on_gpu:
        weights = arm.weight_bytes + sum(map(networks.num_bytes, (*pipeline.text.networks, pipeline.vae)))
        row["peak_gb"] = (torch.cuda.max_memory_allocated(device) - before + weights) / 1e9
    row |= {"total_s": seconds, "ms": 1000 * seconds}
    return row | {"shortcut": shortcut} if shortcut else row


def arms_of(session: Session, pipeline: Pipeline) -> list[StepArm]:
    """The comparison arms first: should time run out, without them nothing of ours is known to be fast."""
    wanted = {name: SHORTCUTS.get(name, (name, {}))[0] for name in ARMS if session.wants(name)}
    networks_of = dict.fromkeys(wanted.values())
    arms = build_arms(pipeline.transformer, networks_of, with_levels=True, backend=session.backend)
    made = {arm.name: arm for arm in arms}
    arms = [dataclasses.replace(made[of], name=name) for name, of in wanted.items() if of in made]
    return sorted(arms, key=lambda arm: arm.is_ours)


def measure(session: Session) -> Iterator[list[Row]]:
    """An arm is checked on the first step. The jobs are too long to take turns."""
    allow_recompiling()
    setting, device, levels = networks.setting(session.tiny), session.device, (PIVOT_LEVEL, *TARGET_LEVELS)
    with best_stock_attention():
        pipeline = networks.build_pipeline(setting, device)
        batches = [networks.draw_batch(setting, side, levels, device) for side in session.cases.values()]
        exact = networks.exact_of(pipeline.transformer, batches)
        arms = {arm.name: arm for arm in arms_of(session, pipeline)}
        for case, batch, true in session.until_spent(zip(session.cases, batches, exact, strict=True)):
            torch._dynamo.reset()
            asked = job(session.cases[case], 3 if session.tiny else 30)

            def one_by_one(right: Sequence[Arm], asked: GenerateSettings = asked) -> Times:
                names = session.until_spent([arm.name for arm in right])
                return {name: timed(pipeline, asked, arms[name], session) for name in names}, None

            with torch.inference_mode():
                racing = [arm.on(batch, true) for arm in arms.values()]
                rows = race(racing, Rules.of(racing, SANE_ERROR), one_by_one)
            yield [{"side": case, **row} for row in rows]


BENCHMARK = Benchmark(
    question="a whole job, text to pictures: six targets on one pivot, 30 steps, by phase",
    checked="as in step, on the first step",
    cases=lambda tiny: {f"{side} px": side for side in networks.setting(tiny).sides_px},
    arms=ARMS,
    columns="side arm total_s text_s denoise_s decode_s speedup error peak_gb verdict",
    bars=("side", "arm", "total_s", "s"),
    measure=measure,
    takes_backend=True,
)
