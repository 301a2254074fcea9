"""Peak GPU memory, host memory and time of every memory mode, under a cap on what PyTorch may take.

    python -m benchmarks.bench_memory [--seconds 550] [--modes stream resident] [--storages bf16]
    python -m benchmarks.bench_memory --tiny

A process per mode and storage, since a mode is chosen once and host memory is counted per process. Each runs
text, some grounded and plain steps and decoding on random weights, for one and six targets at both sizes. The
cap is set with `torch.cuda.set_per_process_memory_fraction`, at the figure that the mode is meant to stay
under (`CAPS_GB`) or --cap-gb; a job that does not fit is tried with three rows at a time, row by row, then
without cap. Writes memory.json and memory.png.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import resource
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from benchmarks import networks
from benchmarks.networks import FULL, PIVOT_LEVEL, TARGET_LEVELS, TINY, Setting
from benchmarks.report import RESULTS, Budget, Row, bars, chosen_device, first_line, save, table
from benchmarks.timing import environment
from bokehflux.models.linear import Linear
from bokehflux.pipeline.memory import MODES, MemoryMode, place
from bokehflux.pipeline.pipeline import Pipeline
from bokehflux.sampling.samplers import StepInfo

STORAGES = ("bf16", "fp8")
ORDER: tuple[tuple[MemoryMode, str], ...] = (
    ("stream", "bf16"), ("resident", "bf16"), ("offload", "bf16"),
    ("offload", "fp8"), ("stream", "fp8"), ("resident", "fp8"),
)  # fmt: skip
"""Most important first."""
CAPS_GB = {
    ("offload", "bf16"): 18.5,
    ("offload", "fp8"): 10.0,
    ("stream", "bf16"): 3.0,
    ("stream", "fp8"): 3.0,
}
"""1e9 bytes; other combinations run without cap."""
MEASURED_AGAINST = ("resident", "bf16")
NUM_STEPS = 8
"""Of which 80 % are grounded. Memory does not depend on it; times are per step, the first one left out."""
ROW_MARK = "ROW "
COLUMNS = {
    "job": "s", "mode": "s", "storage": "s", "gpu_gb": ".2f", "reserved_gb": ".2f", "cap_gb": ".1f",
    "host_gb": ".2f", "pinned_gb": ".2f", "step_ms": ".1f", "total_s": ".2f", "vs_resident": ".2f",
    "same_bits": "s", "verdict": "s",
}  # fmt: skip


@torch.no_grad()
def store_fp8(network: nn.Module) -> None:
    """Every linear weight in float8 e4m3, as files that hold it so are loaded: cast at use."""
    for layer in network.modules():
        if isinstance(layer, Linear):
            layer.weight.data = layer.weight.data.to(torch.float8_e4m3fn)


def build(setting: Setting, mode: MemoryMode, storage: str, device: torch.device) -> Pipeline:
    """Drawn on the device, then put where the mode wants it: the host never holds more than its share."""
    pipeline = networks.build_pipeline(setting, device)
    if storage == "fp8":
        for network in (pipeline.mmdit, *pipeline.text.networks):
            store_fp8(network)
    placement = place(pipeline.mmdit, pipeline.text.networks, pipeline.vae, mode, device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    return dataclasses.replace(pipeline, memory=placement)


def pinned_bytes(pipeline: Pipeline) -> int:
    networks_ = (pipeline.mmdit, *pipeline.text.networks, pipeline.vae)
    return sum(p.nbytes for network in networks_ for p in network.parameters() if p.device.type == "cpu")


@contextlib.contextmanager
def capped(device: torch.device, cap_gb: float | None) -> Iterator[None]:
    """Inside, PyTorch's allocator takes no more than 1e9 * cap_gb bytes of the GPU."""
    if device.type != "cuda" or cap_gb is None:
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.empty_cache()
    # No device here: this function refuses one without an index.
    torch.cuda.set_per_process_memory_fraction(min(1.0, 1e9 * cap_gb / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def run_job(
    pipeline: Pipeline, side_px: int, num_targets: int, num_steps: int, max_rows: int | None = None
) -> Row:
    """Peaks and times of one job."""
    device = pipeline.device
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    ends: list[float] = []

    def on_step(_: StepInfo) -> None:
        if on_gpu:
            torch.cuda.synchronize(device)
        ends.append(time.perf_counter())

    begin = time.perf_counter()
    result = pipeline.generate(
        "a red ball on a wooden table", TARGET_LEVELS[:num_targets], bokeh_pivot=PIVOT_LEVEL,
        num_inference_steps=num_steps, height=side_px, width=side_px, on_step=on_step,
        max_rows=max_rows,
    )  # fmt: skip
    total = time.perf_counter() - begin
    # The first step holds what is done once; plain steps, the last ones, are shorter.
    grounded = round(0.8 * num_steps)
    steps = [1000 * (b - a) for a, b in zip(ends[:-1], ends[1:], strict=True)]
    return {
        "gpu_gb": torch.cuda.max_memory_allocated(device) / 1e9 if on_gpu else None,
        "reserved_gb": torch.cuda.max_memory_reserved(device) / 1e9 if on_gpu else None,
        "host_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "pinned_gb": pinned_bytes(pipeline) / 1e9,
        "step_ms": statistics.median(steps[: grounded - 1] or steps),
        "total_s": total,
        "crc": zlib.crc32(result.latents.contiguous().view(torch.uint8).cpu().numpy().tobytes()),
    }


def measure(
    setting: Setting,
    mode: MemoryMode,
    storage: str,
    device: torch.device,
    *,
    cap_gb: float | None,
    num_steps: int,
    emit: Callable[[Row], None],
    budget: Budget,
) -> None:
    """Every job of one mode, most important first, each handed to `emit` when it is done."""
    pipeline = build(setting, mode, storage, device)
    run_job(pipeline, min(setting.sides_px), 1, 2)  # libraries are loaded and tuned
    for num_targets in (6, 1):
        for side in setting.sides_px:
            if budget.spent:
                return
            row: Row = {
                "job": f"{num_targets} at {side} px", "mode": mode, "storage": storage, "cap_gb": cap_gb,
            }  # fmt: skip
            for verdict, cap, max_rows in attempts(cap_gb):
                try:
                    with capped(device, cap):
                        found = run_job(pipeline, side, num_targets, num_steps, max_rows)
                except (MemoryError, torch.cuda.OutOfMemoryError) as error:
                    found = {"verdict": first_line(error)}
                    print(f"{row['job']}, {mode}, {storage}: {found['verdict']}", file=sys.stderr, flush=True)
                else:
                    found |= {"verdict": verdict, "max_rows": max_rows}
                    break
                gc.collect()  # what the attempt has left in cycles
            emit(row | found)


def attempts(cap_gb: float | None) -> list[tuple[str, float | None, int | None]]:
    """What a row says, its cap, and rows at once: ways to run a job until one fits."""
    free = ("ok" if cap_gb is None else "over the cap, measured without", None, None)
    if cap_gb is None:
        return [free]
    return [("ok", cap_gb, None), ("ok, 3 rows at a time", cap_gb, 3), ("ok, row by row", cap_gb, 1), free]


def in_child(mode: str, storage: str, options: Sequence[str], budget: Budget) -> list[Row]:
    """Rows of a process of its own; those it made before its time was up or it failed."""
    command = [
        sys.executable, "-m", "benchmarks.bench_memory", "--child", "--modes", mode, "--storages", storage,
        "--seconds", f"{budget.left:.0f}", *options,
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, timeout=budget.left + 30, check=False
        )
        output, problem = done.stdout, f"exit status {done.returncode}" if done.returncode else None
    except subprocess.TimeoutExpired as error:
        raw = error.stdout or b""
        output, problem = raw.decode() if isinstance(raw, bytes) else raw, "out of time"
    rows = [
        json.loads(line.removeprefix(ROW_MARK)) for line in output.splitlines() if line.startswith(ROW_MARK)
    ]
    if problem is not None:
        rows.append({"job": "the rest", "mode": mode, "storage": storage, "verdict": problem})
    return rows


def compared(rows: Sequence[Row]) -> list[Row]:
    """With `vs_resident`, time of a step over that of the same job with all bf16 weights on the GPU, and
    `same_bits`, whether the latents are those of the resident mode; where that has been measured."""
    measured = {(row["mode"], row["storage"], row["job"]): row for row in rows if "step_ms" in row}
    result = []
    for row in rows:
        base = measured.get((*MEASURED_AGAINST, row["job"]))
        twin = measured.get(("resident", row["storage"], row["job"]))
        if "step_ms" in row and base is not None:
            row = row | {"vs_resident": row["step_ms"] / base["step_ms"]}
        # Rows in other company are summed in another order.
        if "crc" in row and twin is not None and row.get("max_rows") == twin.get("max_rows"):
            row = row | {"same_bits": "yes" if row["crc"] == twin["crc"] else "NO"}
        result.append(row)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--storages", nargs="+", choices=STORAGES, default=STORAGES)
    parser.add_argument(
        "--cap-gb", type=float, default=None, help="1e9 bytes, for every mode; default: its own"
    )
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    parser.add_argument("--seconds", type=float, default=550, help="begin nothing after this")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--tiny", action="store_true", help="toys, on any machine")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.steps < 2:
        parser.error("--steps must be at least 2")
    budget = Budget(args.seconds)
    device = chosen_device(parser, tiny=args.tiny)
    wanted = [(m, s) for m, s in ORDER if m in args.modes and s in args.storages]
    if args.child:
        ((mode, storage),) = wanted
        measure(
            TINY if args.tiny else FULL,
            mode,
            storage,
            device,
            cap_gb=args.cap_gb if args.cap_gb is not None else CAPS_GB.get((mode, storage)),
            num_steps=args.steps,
            emit=lambda row: print(ROW_MARK + json.dumps(row), flush=True),
            budget=budget,
        )
        return 0

    found = environment(device)
    print(", ".join(f"{key} {value}" for key, value in found.items()))
    options = ["--steps", str(args.steps), *(["--tiny"] if args.tiny else [])]
    if args.cap_gb is not None:
        options += ["--cap-gb", str(args.cap_gb)]
    name, rows = "memory_tiny" if args.tiny else "memory", []
    for mode, storage in wanted:
        if budget.spent:
            print(f"out of time before {mode}, {storage}")
            break
        rows = compared([*rows, *in_child(mode, storage, options, budget)])
        print(f"{mode}, {storage}: {budget.left:.0f} s left", flush=True)
        labelled = [row | {"label": f"{row['mode']}, {row['storage']}"} for row in rows]
        plot = bars(
            f"Peak GPU memory, {found['device']}: 1e9 bytes", labelled, "job", "label", "gpu_gb", "GB"
        )
        save(args.out, name, found, rows, plot, num_steps=args.steps)
    print(table(rows, COLUMNS))  # at the end: ratios need the resident rows
    good = all(row["verdict"].startswith("ok") and row.get("same_bits") != "NO" for row in rows)
    return 0 if rows and good else 1


if __name__ == "__main__":
    sys.exit(main())
