"""Peak GPU memory, host memory and time of every memory mode, under a cap on what PyTorch may take.

Each mode runs text, some grounded and plain steps and decoding on random weights. The cap is set with
`torch.cuda.set_per_process_memory_fraction`, at the figure that the mode is meant to stay under (`ARMS`).
A job that does not fit is tried with three rows at a time, row by row, then without cap. Every arm takes a
process of its own, since a mode is chosen once and host memory is counted per process.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import resource
import statistics
import sys
import time
import zlib
from collections.abc import Iterator

import torch

from benchmarks import networks
from benchmarks.networks import PIVOT_LEVEL, TARGET_LEVELS, Setting
from benchmarks.registry import Benchmark, Session
from benchmarks.timing import Row, first_line, wait
from bokehflux.models.linear import Linear
from bokehflux.pipeline.memory import MemoryMode, place
from bokehflux.pipeline.pipeline import Pipeline
from bokehflux.sampling.samplers import StepInfo

ARMS: dict[str, tuple[MemoryMode, str, float | None]] = {
    f"{mode}, {storage}": (mode, storage, cap_gb)
    for mode, storage, cap_gb in (
        ("stream", "bf16", 3.0), ("resident", "bf16", None), ("offload", "bf16", 18.5),
        ("offload", "fp8", 10.0), ("stream", "fp8", 3.0), ("resident", "fp8", None),
    )
}  # fmt: skip
"""Memory mode, storage of linear weights and cap (1e9 bytes) by name, most important first."""
ATTEMPTS = (
    ("ok", True, None), ("ok, 3 rows at a time", True, 3), ("ok, row by row", True, 1),
    ("over the cap, measured without", False, None),
)  # fmt: skip
"""Ways to run a job until one fits: what a row then says, whether the cap holds, rows at once."""


@torch.no_grad()
def build(setting: Setting, mode: MemoryMode, storage: str, device: torch.device) -> Pipeline:
    """Drawn on the device, then put where the mode wants it: the host never holds more than its share.

    storage: fp8 is every linear weight in float8 e4m3, as files that hold it so are loaded: cast at use.
    """
    pipeline = networks.build_pipeline(setting, device)
    for network in (pipeline.transformer, *pipeline.text.networks):
        for layer in network.modules():
            if storage == "fp8" and isinstance(layer, Linear):
                layer.weight.data = layer.weight.data.to(torch.float8_e4m3fn)
    placement = place(pipeline.transformer, pipeline.text.networks, pipeline.vae, mode, device)
    return dataclasses.replace(pipeline, memory=placement)


def cap_memory(device: torch.device, cap_gb: float | None) -> None:
    """From now on, PyTorch's allocator takes no more than 1e9 * cap_gb bytes of the GPU."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.empty_cache()
        # No device here: this function refuses one without an index.
        torch.cuda.set_per_process_memory_fraction(min(1.0, 1e9 * (cap_gb or math.inf) / total))


def run_job(
    pipeline: Pipeline, side_px: int, num_targets: int, num_steps: int, max_rows: int | None = None
) -> Row:
    """Peaks and times of one job."""
    device, on_gpu = pipeline.device, pipeline.device.type == "cuda"
    wait(device)
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    ends: list[float] = []

    def on_step(_: StepInfo) -> None:
        wait(device)
        ends.append(time.perf_counter())

    begin = time.perf_counter()
    result = pipeline.generate(
        "a red ball on a wooden table", TARGET_LEVELS[:num_targets], bokeh_pivot=PIVOT_LEVEL,
        num_inference_steps=num_steps, height=side_px, width=side_px, on_step=on_step,
        max_rows=max_rows,
    )  # fmt: skip
    total = time.perf_counter() - begin
    # The first step holds what is done once; plain steps, the last ones, are shorter.
    grounded, nets = round(0.8 * num_steps), (pipeline.transformer, *pipeline.text.networks, pipeline.vae)
    steps = [1000 * (b - a) for a, b in zip(ends[:-1], ends[1:], strict=True)]
    return {
        "gpu_gb": torch.cuda.max_memory_allocated(device) / 1e9 if on_gpu else None,
        "reserved_gb": torch.cuda.max_memory_reserved(device) / 1e9 if on_gpu else None,
        "host_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "pinned_gb": sum(p.nbytes for n in nets for p in n.parameters() if p.device.type == "cpu") / 1e9,
        "step_ms": statistics.median(steps[: grounded - 1] or steps),
        "total_s": total,
        "crc": zlib.crc32(result.latents.contiguous().view(torch.uint8).cpu().numpy().tobytes()),
    }


def measure_arm(session: Session, arm: str, cap_gb: float | None) -> Iterator[Row]:
    """A row a job."""
    mode, storage, _ = ARMS[arm]
    setting = networks.setting(session.tiny)
    pipeline = build(setting, mode, storage, session.device)
    run_job(pipeline, min(setting.sides_px), 1, 2)  # libraries are loaded and tuned
    for job, (number, side) in session.until_spent(session.cases.items()):
        row: Row = {"job": job, "mode": mode, "storage": storage, "arm": arm, "cap_gb": cap_gb}
        for verdict, is_capped, max_rows in ATTEMPTS if cap_gb else ATTEMPTS[:1]:
            cap_memory(session.device, cap_gb if is_capped else None)
            try:
                found = run_job(pipeline, side, number, session.repeats, max_rows)
            except (MemoryError, torch.cuda.OutOfMemoryError) as error:
                found = {"verdict": first_line(error)}
                print(f"{job}, {arm}: {found['verdict']}", file=sys.stderr, flush=True)
            else:
                found |= {"verdict": verdict, "max_rows": max_rows}
                break
            gc.collect()  # what the attempt has left in cycles
        yield row | found


def compared(rows: list[Row]) -> list[Row]:
    """With `vs_resident`, time of a step over that of the same job with all bf16 weights on the GPU, and
    `same_bits`, whether the latents are those of the resident mode; where that has been measured."""
    measured = {(row["arm"], row["job"]): row for row in rows if "step_ms" in row}
    for row in measured.values():
        base = measured.get(("resident, bf16", row["job"]))
        twin = measured.get((f"resident, {row['storage']}", row["job"]))
        if base is not None:
            row["vs_resident"] = row["step_ms"] / base["step_ms"]
        # Rows in other company are summed in another order.
        if twin is not None and row["max_rows"] == twin["max_rows"]:
            row["same_bits"] = "yes"
            if row["crc"] != twin["crc"]:
                row |= {"same_bits": "NO", "verdict": "wrong: other latents than the resident mode's"}
    return rows


def measure(session: Session) -> Iterator[list[Row]]:
    for arm in ARMS:
        if session.wants(arm):
            for row in measure_arm(session, arm, ARMS[arm][2]):
                yield [row]


BENCHMARK = Benchmark(
    question="peak GPU and host memory and time of each memory mode, bf16 and fp8 storage",
    checked="latents are bit for bit those of the resident mode",
    cases=lambda tiny: {
        f"{number} at {side} px": (number, side)
        for number in (6, 1)
        for side in networks.setting(tiny).sides_px
    },
    arms=tuple(ARMS),
    repeats=8,
    least_repeats=2,
    repeated="steps, of which 80 % are grounded; times are per step, the first one left out",
    columns="job mode storage gpu_gb reserved_gb cap_gb host_gb pinned_gb step_ms total_s vs_resident "
    "same_bits verdict",
    bars=("job", "arm", "gpu_gb", "GB"),
    measure=measure,
    finish=compared,
    isolated=True,
)
