"""A step of adapter training at FLUX's size by part (data, forward, backward, optimiser), and peak memory.

Random weights, an adapter of rank 128 on all blocks in float32, the base frozen in bfloat16. Text is drawn,
not encoded. "published" is the published formulation: queries of all rows, keys concatenated, values doubled,
with PyTorch's autograd and a checkpoint a block; on diffusers where that is installed ("published,
diffusers"), and in our blocks. Gradients are compared before an arm is timed. `share` is of a large product
alone; what is computed twice counts once.

Under torchrun each process takes as many rows as one would alone, with gradients averaged by
DistributedDataParallel: twice the rows a step on two.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.attention import sdpa_kernel

from benchmarks import networks
from benchmarks.arms import STOCK_ORDER, allow_recompiling
from benchmarks.networks import Setting
from benchmarks.registry import Benchmark, Session
from benchmarks.timing import Row, first_line, gemm_ceiling, relative_error, wait
from bokehflux.attention import AttentionSpec, Grounded
from bokehflux.conditioning import Conditioning
from bokehflux.lens import MAX_LEVEL
from bokehflux.models.embeddings import RopeTable, rope_table
from bokehflux.models.mmdit import MMDiT
from bokehflux.models.units import Network
from bokehflux.pipeline.memory import place
from bokehflux.sampling.latents import LatentGrid, position_ids
from bokehflux.training.adapter import AdapterBatch, Sampling, adapter_step, draw_batch, trainable_adapter
from bokehflux.training.batches import Draws
from bokehflux.training.distributed import averaged, rank_and_world
from bokehflux.training.engine import Recorded, keep_activations, store_fp8
from bokehflux.training.estimate import estimate
from bokehflux.training.objective import mix, velocity_target
from bokehflux.training.optim import Optimizer
from bokehflux.training.state import Ema

WARM_UP = 3
CHECKED = (".0.", ".18.", ".19.", ".56.", ".1.", ".3.")
"""Blocks whose gradients are compared, at full size and of toys."""
MAX_ERROR = {"bf16": 0.2, "fp8": 0.5}
"""Largest relative distance of an arm's gradients from the first arm's, by storage of the base. Random
networks amplify a rounding from block to block; what is wrong is far beyond."""
PHASES = ("data", "forward", "backward", "optimiser")
Loss = Callable[[AdapterBatch], Tensor]


@dataclass(frozen=True, kw_only=True)
class PublishedForm(AttentionSpec):
    """The published formulation, literally, as an attention of our blocks.

    Never on cuDNN where a row has a pivot: its backward pass fails where keys are more than queries.
    """

    pivot_of: tuple[int, ...]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = list(self.pivot_of)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        plain = rows == list(range(len(rows)))
        if not plain:
            q, k, v = q[rows], torch.cat([k, k[rows]], dim=2), torch.cat([v, v], dim=2)
        with sdpa_kernel(STOCK_ORDER if plain else STOCK_ORDER[1:], set_priority=True):
            out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return out if self.value_bias is None else out + self.value_bias[:, None].to(out.dtype)


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a step is computed: fields as those of the recipe."""

    published: Literal["", "our blocks", "diffusers"] = ""
    activations: float = 0.0
    compile: bool = False
    record: bool = False
    storage: Literal["bf16", "fp8"] = "bf16"
    stream: bool = False
    backend: str = "sdpa"


ARMS = {
    "published, diffusers": Way(published="diffusers"),
    "published, our blocks": Way(published="our blocks"),
    "eager, recomputed": Way(),
    "eager, kept": Way(activations=1.0),
    "compiled, recomputed": Way(compile=True),
    "compiled, recomputed, graph": Way(compile=True, record=True),
    "compiled, kept 0.3": Way(compile=True, activations=0.3),
    "compiled, kept 0.4": Way(compile=True, activations=0.4),
    "compiled, kept 0.7": Way(compile=True, activations=0.7),
    "compiled, kept": Way(compile=True, activations=1.0),
    "compiled, kept, graph": Way(compile=True, activations=1.0, record=True),
    "compiled, kept 0.4, graph": Way(compile=True, activations=0.4, record=True),
    "fp8 base, recomputed": Way(compile=True, storage="fp8"),
    "streamed, recomputed": Way(stream=True),
    "deterministic, recomputed": Way(backend="triton"),
}
USUAL = [name for name in ARMS if not name.startswith(("streamed", "deterministic"))]


def cases(tiny: bool) -> Mapping[str, tuple[int, int]]:
    """Rows of a step, more than one being a group, and their size in pixels."""
    large, small = networks.setting(tiny).sides_px
    sizes = (4, small), (1, large), (4, large), (1, small)
    return {f"{'group of 4' if rows > 1 else 'one row'}, {side} px": (rows, side) for rows, side in sizes}


@dataclass(frozen=True, kw_only=True)
class RandomScenes:
    """Latents and text states that mean nothing, in the host's memory as a folder's are."""

    x0: Tensor
    """[S, R, N, C]"""
    txt: Tensor
    pooled: Tensor
    device: torch.device = torch.device("cpu")

    @property
    def num_scenes(self) -> int:
        return len(self.x0)

    @property
    def num_renders(self) -> int:
        return self.x0.shape[1]

    def latents(self, scene: Tensor, render: Tensor) -> Tensor:
        return self.x0[scene, render].float()

    def levels(self, scene: Tensor, render: Tensor) -> Tensor:
        return render.float() * (MAX_LEVEL / self.num_renders)

    def text(self, scene: Tensor, drop: Tensor, draws: Draws) -> Conditioning:
        count = len(scene)
        return Conditioning(txt=self.txt.expand(count, -1, -1), pooled=self.pooled.expand(count, -1))

    def null_text(self) -> Conditioning:
        return Conditioning(txt=self.txt, pooled=self.pooled)


@dataclass(kw_only=True)
class Trained:
    """An arm: its loss, and what the optimiser moves."""

    loss: Loss
    named: list[tuple[str, nn.Parameter]]
    weight_bytes: int
    """The networks' weights that lie on the device, and were there before the arm was built."""


def build(way: Way, mmdit: MMDiT, rope: RopeTable, ids: Tensor, device: torch.device) -> Trained:
    """Raises ImportError where diffusers is wanted and missing."""
    torch._dynamo.reset()
    twin = networks.on_same_weights(mmdit)
    twin.bokeh = copy.deepcopy(twin.bokeh)
    assert twin.bokeh is not None
    base_bytes = networks.num_bytes(twin) - networks.num_bytes(twin.bokeh)
    if way.stream:  # before the adapter is there, which stays on the device
        bokeh, twin.bokeh = twin.bokeh, None
        place(twin, [], Network(), "stream", device)
        twin.bokeh = bokeh
    if way.storage == "fp8":
        store_fp8(twin, device)
    named = trainable_adapter(twin)
    weight_bytes = 0 if way.stream or way.storage == "fp8" else base_bytes
    if way.published == "diffusers":
        return Trained(loss=on_diffusers(twin, ids), named=named, weight_bytes=weight_bytes)
    keep_activations(twin, way.activations, compile=way.compile)

    def of_tensors(spec: AttentionSpec, *tensors: Tensor) -> Tensor:
        return adapter_step(twin, AdapterBatch.of(spec, *tensors), rope)

    compute = Recorded(of_tensors, [p for _, p in named]) if way.record else of_tensors

    def loss(batch: AdapterBatch) -> Tensor:
        spec = dataclasses.replace(batch.attention, backend=way.backend)
        if way.published:
            grounded = isinstance(spec, Grounded)
            spec = PublishedForm(pivot_of=spec.pivot_of if grounded else tuple(range(len(batch.x0))))
        return compute(spec, *batch.tensors())

    return Trained(loss=loss, named=named, weight_bytes=weight_bytes)


def on_diffusers(mmdit: MMDiT, ids: Tensor) -> Loss:
    """The published adapter on diffusers' transformer, as its sibling's trainer runs it."""
    from tests.oracle import rivals

    assert mmdit.bokeh is not None
    model = rivals.published_model(mmdit, compile=False)
    # `state_dict` gave detached tensors: the adapter's own parameters take their places.
    own = {id_of(p): p for p in mmdit.bokeh.parameters()}
    for tensors in (
        model.adapter,
        *(getattr(p, "weights", {}) for p in model.transformer.attn_processors.values()),
    ):
        for name, tensor in tensors.items():
            tensors[name] = own[id_of(tensor)]
    # Its own checkpointing loses the attention's arguments (0.32.2): the same, a block at a time.
    for blocks in (model.transformer.transformer_blocks, model.transformer.single_transformer_blocks):
        for i, block in enumerate(blocks):
            blocks[i] = checkpoint_wrapper(block, preserve_rng_state=False)

    def loss(batch: AdapterBatch) -> Tensor:
        x, text = mix(batch.x0, batch.eps, batch.sigma), batch.text
        rows = list(batch.attention.pivot_of) if isinstance(batch.attention, Grounded) else None
        levels = torch.where(batch.levels.isnan(), -1.0, batch.levels / MAX_LEVEL)[:, None]
        split = text.txt.shape[1]
        v = model(
            x.to(mmdit.dtype), text.txt, text.pooled, batch.sigma, batch.guidance,
            ids[:split], ids[split:], levels, rows,
        )  # fmt: skip
        return (v.float() - velocity_target(batch.x0, batch.eps)).square().mean()

    return loss


def id_of(tensor: Tensor) -> tuple[int, torch.Size]:
    """Equal for tensors that are the same memory in the same shape."""
    return tensor.data_ptr(), tensor.shape


class Stopwatch:
    """Seconds between marks, on the device's clock."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.marks: list[Any] = []

    def mark(self) -> None:
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        pairs = itertools.pairwise(self.marks)
        if not self.on_gpu:
            return [1000 * (b - a) for a, b in pairs]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in pairs]


def run_steps(
    arm: Trained, draw: Callable[[int], AdapterBatch], count: int, device: torch.device
) -> tuple[list[list[float]], dict[str, Tensor]]:
    """Milliseconds of each phase of each step, and the first step's gradients of the checked blocks."""
    parameters = [p for _, p in arm.named]
    optimizer, ema = Optimizer(arm.named, 1e-4, betas=(0.9, 0.999)), Ema(parameters, 0.001)
    loss = averaged(lambda batch: (arm.loss(batch), {"loss": batch.sigma.mean()}), parameters)
    times, first = [], {}
    for number in range(count):
        watch = Stopwatch(device)
        watch.mark()
        batch = draw(number)
        watch.mark()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            value, _ = loss(batch)
        watch.mark()
        value.backward()
        watch.mark()
        if not number:
            first = {
                name: p.grad.float().cpu()
                for name, p in arm.named
                if p.grad is not None and any(block in name for block in CHECKED)
            }
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step(1.0)
        ema.update()
        watch.mark()
        times.append(watch.milliseconds())
    return times, first


def gradient_error(found: Mapping[str, Tensor], true: Mapping[str, Tensor]) -> float:
    if found.keys() != true.keys() or not true:
        return float("nan")
    return relative_error(*(torch.cat([x[name].flatten() for name in true]) for x in (found, true)))


def measure_arm(
    session: Session,
    name: str,
    mmdit: MMDiT,
    setting: Setting,
    case: tuple[int, int],
    true: dict[str, Tensor],
) -> Row:
    """A row; `true` becomes the arm's gradients if it is empty."""
    device, (rows, side) = session.device, case
    on_gpu = device.type == "cuda"
    grid = LatentGrid(height_px=side, width_px=side)
    ids = position_ids(grid, setting.txt_length, device)
    rope = rope_table(ids, setting.mmdit.axes_dim, setting.mmdit.theta)
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(torch.bfloat16)

    scenes = RandomScenes(
        x0=normal(8, 4, grid.num_tokens, setting.mmdit.in_channels),
        txt=normal(1, setting.txt_length, setting.mmdit.txt_dim).to(device, setting.dtype),
        pooled=normal(1, setting.mmdit.pooled_dim).to(device, setting.dtype),
    )
    how = Sampling(group=rows, level_dropout=0.0, caption_dropout=0.0)

    rank, world = rank_and_world()

    def draw(number: int) -> AdapterBatch:
        return draw_batch(scenes, how, rows > 1, Draws.of_step(0, number, rows * world, device, rank, world))

    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    row: Row = {"arm": name, "ours": not name.startswith("published")}
    begin = time.perf_counter()
    try:
        arm = build(ARMS[name], mmdit, rope, ids, device)
        _, found = run_steps(arm, draw, WARM_UP, device)
        wait(device)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        ready = time.perf_counter() - begin
        times, _ = run_steps(arm, draw, session.repeats, device)
    except Exception as error:  # of compilers too: one arm must not take the others with it
        return {**row, "verdict": f"failed: {first_line(error)}"}
    true.update({} if true else found)
    error = gradient_error(found, true)
    row |= {
        "error": error,
        "verdict": "ok" if error <= MAX_ERROR[ARMS[name].storage] else f"wrong: {error:.2e}",
        "ready_s": ready,
    }
    parts = [statistics.median(step[i] for step in times) for i in range(len(PHASES))]
    row |= {f"{phase}_ms": part for phase, part in zip(PHASES, parts, strict=True)}
    row["ms"] = statistics.median(map(sum, times))
    if on_gpu:
        # A graph's own memory counts as allocated only while it is being recorded.
        peak = torch.cuda.max_memory_reserved if ARMS[name].record else torch.cuda.max_memory_allocated
        row["peak_gb"] = (peak() - before + arm.weight_bytes) / 1e9
    return row


def measure(session: Session) -> Iterator[list[Row]]:
    allow_recompiling()
    if "WORLD_SIZE" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group()
    setting = networks.setting(session.tiny)
    if session.device.type != "cuda":
        setting = dataclasses.replace(setting, dtype=torch.float32)
    ceiling = gemm_ceiling(session.device)
    mmdit = networks.build_mmdit(setting, session.device)
    assert mmdit.bokeh is not None
    mmdit.bokeh.float()
    for name, case in session.cases.items():
        true: dict[str, Tensor] = {}
        rows, side = case
        cost = estimate(
            setting.mmdit, setting.bokeh, rows=rows, txt_tokens=setting.txt_length,
            img_tokens=LatentGrid(height_px=side, width_px=side).num_tokens, activations=1.0,
        )  # fmt: skip
        for arm in session.until_spent([arm for arm in ARMS if session.wants(arm)]):
            row = measure_arm(session, arm, mmdit, setting, case, true)
            gc.collect()
            if "ms" in row:
                row["tflops"] = cost.flops / row["ms"] / 1e9
                row["share"] = row["tflops"] / ceiling
            yield [{"case": name, **row}]


def compared(rows: list[Row]) -> list[Row]:
    """`speedup` is over the published form, on diffusers where that was measured."""
    for row in rows:
        rivals = {r["arm"]: r["ms"] for r in rows if r["case"] == row["case"] and not r["ours"] and "ms" in r}
        against = next((rivals[name] for name in ARMS if name in rivals), None)
        if against is not None and "ms" in row:
            row["speedup"] = against / row["ms"]
    return rows


BENCHMARK = Benchmark(
    question="a step of adapter training: seconds by part, and peak memory",
    checked="gradients of four blocks against the first arm's: at most 20 % off, 50 % from fp8",
    cases=cases,
    usual_cases=("group of 4, 512", "one row, 1024", "group of 4, 1024"),
    arms=list(ARMS),
    usual_arms=USUAL,
    repeats=6,
    least_repeats=2,
    repeated="steps of an arm",
    columns="case arm ms data_ms forward_ms backward_ms optimiser_ms peak_gb speedup share error verdict",
    bars=("case", "arm", "ms", "ms"),
    measure=measure,
    finish=compared,
)
