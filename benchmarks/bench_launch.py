"""Does the GPU wait for Python? Steps of whole runs, launched kernel by kernel and replayed as CUDA graphs.

    python -m benchmarks.bench_launch            # a GPU, full size, random weights; about a minute
    python -m benchmarks.bench_launch --tiny     # toys, on any machine; a CPU has no graphs

`launch` is what Python needs to launch a step, `step` what a step takes, medians of a run; a GPU that never
waits has launch < step. `first` and `second` are the steps that a graph costs more: warm-up and capture.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence

import torch

from benchmarks.networks import FULL, TINY, Batch, Setting, build_mmdit, draw_batch
from benchmarks.report import Row, chosen_device, table
from benchmarks.timing import environment
from bokehflux.attention import AttentionSpec, Grounded, Plain
from bokehflux.conditioning import Conditioning
from bokehflux.models.adapter import BokehCondition
from bokehflux.models.mmdit import MMDiT
from bokehflux.sampling import cuda_graph
from bokehflux.sampling.denoise import denoiser
from bokehflux.sampling.latents import LatentGrid

STEPS = 12
LEVELS = {"plain": None, "pair": (15.0, 0.0), "pivot + 2": (15.0, 0.0, 30.0)}
COLUMNS = {
    "case": "s", "steps": "s", "first": ".1f", "second": ".1f", "launch": ".1f", "step": ".1f",
}  # fmt: skip


@torch.inference_mode()
def run(mmdit: MMDiT, batch: Batch, side_px: int, graphs: bool, backend: str) -> list[tuple[float, float]]:
    """(launch, step) of every step, in milliseconds."""
    dtype, device, rows = mmdit.dtype, mmdit.device, batch.num_rows
    spec: AttentionSpec = Plain(backend=backend)
    if batch.num_targets:
        spec = Grounded(pivot_of=(0,) * rows, backend=backend)
    sigmas = torch.linspace(1, 0, STEPS + 1)
    velocity = denoiser(
        mmdit,
        Conditioning(txt=batch.txt.to(dtype), pooled=batch.pooled.to(dtype)),
        LatentGrid(height_px=side_px, width_px=side_px),
        bokeh=None if batch.levels is None else BokehCondition.of(batch.levels),
        attention=lambda rows, step: spec,
        sigmas=sigmas,
        cuda_graphs=graphs,
    )
    x = batch.img.to(dtype).expand(rows, -1, -1).contiguous()
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = []
    for step in range(STEPS):
        wait()
        begin = time.perf_counter()
        velocity(x, sigmas[step], step)
        launched = time.perf_counter()
        wait()
        times.append((1000 * (launched - begin), 1000 * (time.perf_counter() - begin)))
    return times


def measure(setting: Setting, device: torch.device, backend: str) -> list[Row]:
    mmdit, rows = build_mmdit(setting, device), []
    cuda_graph.MAX_TOKENS = 10**9  # every case, to see from where on they are worth it
    for side_px in sorted(setting.sides_px):
        for name, levels in LEVELS.items():
            batch = draw_batch(setting, side_px, levels, device)
            run(mmdit, batch, side_px, False, backend)  # kernels are compiled here
            for graphs in (False, True):
                times = run(mmdit, batch, side_px, graphs, backend)
                launch, step = (statistics.median(column[2:]) for column in zip(*times, strict=True))
                rows.append(
                    {
                        "case": f"{side_px} {name}, {batch.num_rows * batch.length} tokens",
                        "steps": "replayed" if graphs else "launched",
                        "first": times[0][1], "second": times[1][1], "launch": launch, "step": step,
                    }
                )  # fmt: skip
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="auto", help="attention, by name")
    parser.add_argument("--tiny", action="store_true", help="toys, on any machine")
    args = parser.parse_args(argv)
    device = chosen_device(parser, tiny=args.tiny)
    print(", ".join(f"{key} {value}" for key, value in environment(device).items()))
    print(table(measure(TINY if args.tiny else FULL, device, args.backend), COLUMNS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
