"""Several GPUs against one of them: scenes, the rows of a scene, and the tokens of one row, shared out.

    torchrun --nproc-per-node 2 -m benchmarks.run ranks

Every process builds the same random weights. Jobs are those of `generate`, ours, folded; the arm of one GPU
runs on the first while the others wait. `predicted` is a speed-up by shapes alone: the largest share of the
work, and what is sent at the rates of `Rates`.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.multiprocessing.reductions import reduce_tensor

from benchmarks import networks
from benchmarks.arms import best_stock_attention
from benchmarks.cases.generate import Timed, job
from benchmarks.registry import Benchmark, Session
from benchmarks.timing import Row, milliseconds, relative_error, wait
from bokehflux.configs import FLUX_DEV
from bokehflux.models.mmdit import MMDiT
from bokehflux.pipeline.generate import plan_generate
from bokehflux.pipeline.pipeline import Pipeline
from bokehflux.pipeline.run import Options, Result, execute
from bokehflux.sampling.latents import LatentGrid
from bokehflux.sampling.ranks import ALONE, Ranks, RowsOverRanks, TokensOverRanks
from bokehflux.settings import GenerateSettings

SETTLED_SECONDS = 2.0
"""How long steps run before they are timed: a GPU's clock follows the power that it draws."""
SEVENTH = 11.25
GOALS: dict[str, dict[int, float]] = {
    "rows, 6 targets": {2: 1.70, 4: 3.1},
    "rows, 7 targets": {2: 1.85, 8: 6.5},
    "one row": {2: 1.66, 4: 2.85, 8: 4.6},
    "scenes": {2: 1.94, 4: 3.88, 8: 7.76},
}
"""Speed-up over one GPU that is wanted, by case and number of GPUs. One row: 72, 42 and 26 ms of 119.6."""


class Rates(NamedTuple):
    """What two H100s (NV18, NCCL 2.28) send, measured alone: milliseconds a block of FLUX at 1024 px."""

    pivot_ms: float = 0.181
    """57 MB broadcast."""
    tokens_ms: float = 0.094
    """28 MB exchanged."""


@dataclass(frozen=True, kw_only=True)
class Here:
    """One of the processes."""

    session: Session
    mesh: DeviceMesh
    pipeline: Pipeline
    unfolded: MMDiT
    """The network that the pipeline's was folded from, on the weights that both leave as they are."""

    @property
    def device(self) -> torch.device:
        return self.session.device

    @property
    def is_first(self) -> bool:
        return dist.get_rank() == 0

    def together(self) -> None:
        """Wait for this GPU, and for the other processes."""
        wait(self.device)
        dist.all_reduce(torch.zeros(1))  # on gloo: no GPU spins meanwhile

    def agreed(self, number: int) -> int:
        """The first process's number."""
        told: list[int] = [number]
        dist.broadcast_object_list(told, device=torch.device("cpu"))
        return told[0]

    def job(self, side_px: int, targets: int) -> GenerateSettings:
        levels = (*networks.TARGET_LEVELS, SEVENTH)[:targets]
        return dataclasses.replace(job(side_px, self.session.repeats), bokeh_targets=levels)

    def run(self, asked: GenerateSettings, ranks: Ranks = ALONE, max_rows: int | None = None) -> Result:
        options = Options(ranks=ranks, max_rows=max_rows, backend=self.session.backend)
        return execute(self.pipeline, plan_generate(self.pipeline, asked), options)

    def seconds(self, work: Callable[[], object], everywhere: bool) -> Row:
        """Wall-clock time until all processes have done it, or the first alone."""
        clock = self.pipeline.memory
        assert isinstance(clock, Timed)
        self.together()
        clock.seconds.clear()
        begin = time.perf_counter()
        if everywhere or self.is_first:
            work()
        self.together()
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, **{f"{phase}_s": spent for phase, spent in clock.seconds.items()}}

    def settled(self, step: Callable[[], object], everywhere: bool) -> Row:
        """Milliseconds of a step that follows many."""
        self.together()
        if not (everywhere or self.is_first):
            self.together()
            return {}
        for _ in range(3):  # compiled, captured, replayed
            step()
        first = milliseconds(step, self.device)
        count = max(1, round(1000 * SETTLED_SECONDS / first)) if self.device.type == "cuda" else 1
        count = self.agreed(count) if everywhere else count
        for _ in range(count):
            step()
        times = [milliseconds(step, self.device) for _ in range(max(1, count // 4))]
        self.together()
        return {"ms": statistics.median(times)}


def pictures(result: Result) -> list[bytes]:
    return [image.tobytes() for image in (*result.images, result.pivot_image) if image is not None]


def measure_rows(here: Here, name: str, side_px: int, targets: int) -> Iterator[list[Row]]:
    """The pictures of a short job are compared first, byte by byte."""
    asked = here.job(side_px, targets)
    ranks, share = RowsOverRanks(here.mesh), -(-asked.num_rows // here.mesh.size())
    short = dataclasses.replace(asked, num_inference_steps=2, num_grounding_steps=1)
    found = pictures(here.run(short, ranks))
    equal = whole = True
    if here.is_first:  # which warms everything up, too
        equal = found == pictures(here.run(short, max_rows=share))
        whole = found == pictures(here.run(short))
    one = here.seconds(lambda: here.run(asked), everywhere=False)
    steps = here.session.repeats
    yield [{"case": name, "arm": "one GPU", "ranks": 1, "verdict": "ok", "steps": steps, **one}]
    row = here.seconds(lambda: here.run(asked, ranks), everywhere=True)
    row |= {
        "arm": "rows over GPUs",
        "ranks": here.mesh.size(),
        "verdict": "ok" if equal else "wrong: other bytes",
    }
    yield [{"case": name, **row, "share_rows": share, "as_one_batch": whole}]


def measure_scenes(here: Here, name: str, side_px: int, targets: int) -> Iterator[list[Row]]:
    """As many scenes as GPUs, each on one."""
    mine = dataclasses.replace(here.job(side_px, targets), seed=dist.get_rank())
    one = here.seconds(lambda: here.run(mine), everywhere=False)
    yield [{"case": name, "arm": "one GPU", "ranks": 1, "verdict": "ok", **one}]
    row = here.seconds(lambda: here.run(mine), everywhere=True)
    yield [{"case": name, "arm": "scenes over GPUs", "ranks": here.mesh.size(), "verdict": "ok", **row}]


@torch.inference_mode()
def measure_tokens(here: Here, name: str, side_px: int, _: int) -> Iterator[list[Row]]:
    """A step of one row, checked against float32."""
    setting, mmdit = networks.setting(here.session.tiny), here.pipeline.transformer
    batch = networks.draw_batch(setting, side_px, (networks.PIVOT_LEVEL,), here.device)
    (exact,) = networks.exact_of(here.unfolded, [batch])
    errors = {}
    for arm, ranks in {"one GPU": ALONE, "tokens over GPUs": TokensOverRanks(here.mesh)}.items():
        step = networks.our_step(mmdit, batch, here.session.backend, graph=True, ranks=ranks)
        everywhere = ranks is not ALONE
        errors[arm] = relative_error(step(), exact) if everywhere or here.is_first else 0.0
        row = here.settled(step, everywhere)
        verdict = "ok" if errors[arm] <= 2 * errors["one GPU"] or not here.is_first else "wrong"
        yield [
            {"case": name, "arm": arm, "ranks": ranks.size, "error": errors[arm], "verdict": verdict, **row}
        ]


@torch.inference_mode()
def measure_sending(here: Here, name: str, side_px: int, _: int) -> Iterator[list[Row]]:
    """A pivot's query and key of one block beside eight products, as the first process sends it."""
    if here.device.type != "cuda" or here.mesh.size() == 1:
        return
    length, width = 512 + LatentGrid(height_px=side_px, width_px=side_px).num_tokens, FLUX_DEV.hidden_size
    sent = torch.randn(2, length, width, device=here.device, dtype=torch.bfloat16)
    x, weight = sent[0], torch.randn(width, 4 * width, device=here.device, dtype=torch.bfloat16)
    into = torch.empty_like(sent)
    theirs: list[object] = [reduce_tensor(into)] if dist.get_rank() == 1 else [None]
    dist.broadcast_object_list(theirs, src=1, device=torch.device("cpu"))
    side = torch.cuda.Stream()
    if here.is_first:
        rebuild, args = theirs[0]  # type: ignore[misc]
        there = rebuild(*args)

    def products() -> None:
        for _ in range(8):
            torch.mm(x, weight)

    def beside() -> None:
        work = dist.broadcast(sent, 0, async_op=True)
        products()
        assert work is not None
        work.wait()

    def before() -> None:
        dist.broadcast(sent, 0)
        products()

    def copied() -> None:
        side.wait_stream(torch.cuda.current_stream())
        if here.is_first:
            with torch.cuda.stream(side):
                there.copy_(sent, non_blocking=True)
        products()
        torch.cuda.current_stream().wait_stream(side)

    ways = {"products alone": products, "broadcast beside": beside, "broadcast before": before,
            "copied beside": copied}  # fmt: skip
    for arm, way in ways.items():
        row = here.settled(way, everywhere=True)
        yield [{"case": name, "arm": arm, "ranks": here.mesh.size(), "verdict": "ok", **row}]


def predicted(case: str, ranks: int, one: Row) -> float | None:
    """Speed-up by shapes alone."""
    blocks = FLUX_DEV.num_blocks
    if case.startswith("rows"):
        targets = int(case.split()[1])
        sending = 0.8 * one["steps"] * blocks * Rates().pivot_ms / 1000
        share = -(-(targets + 1) // ranks) / (targets + 1)
        return one["seconds"] / (one["seconds"] * share + sending)
    if case.startswith("one row"):
        # Of its n / R tokens a rank sends all but the R-th part.
        sending = blocks * Rates().tokens_ms * (ranks - 1) / ranks**2 * 4
        return one["ms"] / (one["ms"] / ranks + sending)
    return float(ranks) if case.startswith("scenes") else None


def finish(rows: list[Row]) -> list[Row]:
    """With speed-ups over one GPU."""
    ones = {row["case"]: row for row in rows if row["arm"] == "one GPU"}
    made = []
    for row in rows:
        one, case = ones.get(row["case"]), row["case"]
        if one is None or one is row or not {"ms", "seconds"} & set(one):
            made.append(row)
            continue
        scenes = row["ranks"] if case.startswith("scenes") else 1
        key = "ms" if "ms" in row else "seconds"
        goal = next((by[row["ranks"]] for name, by in GOALS.items()
                     if case.startswith(name) and row["ranks"] in by), None)  # fmt: skip
        expected = predicted(case, row["ranks"], one)
        made.append({**row, "speedup": scenes * one[key] / row[key], "predicted": expected, "goal": goal})
    return made


def measure(session: Session) -> Iterator[list[Row]]:
    if "WORLD_SIZE" not in os.environ:
        raise ValueError("start it with torchrun: torchrun --nproc-per-node 2 -m benchmarks.run ranks")
    if session.device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # gloo for what is not on a GPU: who is ready, and how often a step is timed.
    dist.init_process_group("cpu:gloo,cuda:nccl" if session.device.type == "cuda" else "gloo")
    mesh = init_device_mesh(session.device.type, (int(os.environ["WORLD_SIZE"]),))
    built = networks.build_pipeline(networks.setting(session.tiny), session.device)
    folded, clock = networks.folded(built.transformer), Timed(device=session.device)
    pipeline = dataclasses.replace(built, transformer=folded, memory=clock)
    here = Here(session=session, mesh=mesh, pipeline=pipeline, unfolded=built.transformer)
    with best_stock_attention():
        for name, (measure_one, side_px, targets) in session.cases.items():
            yield from measure_one(here, name, side_px, targets)
            if session.device.type == "cuda":
                torch.cuda.empty_cache()
    dist.destroy_process_group()


def cases(tiny: bool) -> dict[str, tuple[Callable[..., Iterator[list[Row]]], int, int]]:
    """(what measures it, side in pixels, targets)."""
    side = networks.setting(tiny).sides_px[0]
    return {
        f"rows, 6 targets, {side} px": (measure_rows, side, 6),
        f"one row, {side} px": (measure_tokens, side, 0),
        f"rows, 7 targets, {side} px": (measure_rows, side, 7),
        f"scenes, {side} px": (measure_scenes, side, 6),
        f"sending, {side} px": (measure_sending, side, 0),
    }


BENCHMARK = Benchmark(
    question="scenes, rows of a scene and tokens of a row on several GPUs, against one (under torchrun)",
    checked="rows: the bytes of one GPU that takes as many at once; one row: at most twice one GPU's error",
    cases=cases,
    repeats=30,
    repeated="denoising steps of a job",
    least_repeats=2,
    columns="case arm ranks seconds ms speedup predicted goal denoise_s decode_s error as_one_batch verdict",
    bars=("case", "arm", "speedup", "x"),
    measure=measure,
    finish=finish,
    takes_backend=True,
    needs_gpu=True,
)
