"""How benchmarks take time: arms take turns, inputs rotate through more than the cache, medians count."""

from __future__ import annotations

import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

COMMIT_VARIABLE = "BOKEHFLUX_COMMIT"
"""Names the commit where the code is a copy without its history, as on a lent machine."""
CACHE_MULTIPLE = 3
"""How many times the GPU's L2 the rotated inputs of an arm fill."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Milliseconds of one call."""

    median: float
    p20: float
    p80: float
    graph: bool
    """Replayed as a CUDA graph: nothing but the GPU is in the figure."""

    @classmethod
    def of(cls, times: Sequence[float], graph: bool) -> Timing:
        ordered = sorted(times)
        last = len(ordered) - 1
        return cls(
            median=statistics.median(ordered),
            p20=ordered[round(0.2 * last)],
            p80=ordered[round(0.8 * last)],
            graph=graph,
        )


def num_sets(bytes_per_set: int, device: torch.device) -> int:
    """How many sets of inputs to rotate, so that none is found in the cache when its turn comes again."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, -(-CACHE_MULTIPLE * cache // bytes_per_set))


def interleaved(
    arms: Mapping[str, Callable[[int], Any]], sets: int, device: torch.device, repeats: int = 30
) -> dict[str, Timing]:
    """Time every arm: arm(i) runs it on input set i.

    A measurement is one pass over all sets; passes of different arms take turns, so a GPU that grows warmer
    or is shared treats all alike. On CUDA a pass is one graph where the arm allows capture. An arm that fails
    raises.
    """
    if device.type != "cuda":
        return {name: Timing.of(_cpu_times(arm, sets, min(repeats, 3)), False) for name, arm in arms.items()}
    passes = {name: _pass(arm, sets) for name, arm in arms.items()}
    times: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(repeats + 3):
        for name, (run, _) in passes.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            if repeat >= 3:
                times[name].append(start.elapsed_time(end) / sets)
    return {name: Timing.of(times[name], passes[name][1]) for name in arms}


def _pass(arm: Callable[[int], Any], sets: int) -> tuple[Callable[[], None], bool]:
    """One call over every set, and whether it is a graph."""

    def eager() -> None:
        for i in range(sets):
            arm(i)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        eager()
        eager()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            eager()
    except RuntimeError as error:  # what cannot be captured is timed with its launches, and marked
        torch.cuda.set_stream(current)  # a capture that fails leaves its own behind
        print(f"    not captured, timed eagerly: {str(error).splitlines()[0]}")
        return eager, False
    return graph.replay, True


def _cpu_times(arm: Callable[[int], Any], sets: int, repeats: int) -> list[float]:
    times = []
    for repeat in range(repeats + 1):
        begin = time.perf_counter()
        for i in range(sets):
            arm(i)
        if repeat:
            times.append(1000 * (time.perf_counter() - begin) / sets)
    return times


def gemm_ceiling(device: torch.device, size: int = 8192) -> float:
    """TFLOP/s of a size x size x size bfloat16 product of normal random numbers (zeros run faster)."""
    size, pairs = _factors(device, size)

    def multiply(i: int) -> Tensor:
        return pairs[i][0] @ pairs[i][1]

    timing = interleaved({"gemm": multiply}, len(pairs), device, repeats=10)["gemm"]
    return 2 * size**3 / timing.median / 1e9


def gemm_burst(device: torch.device, count: int = 64, size: int = 8192) -> tuple[Callable[[], None], float]:
    """`count` such products in a row (0.1 s on an H100), to take turns with steps, and their 1e12 operations.

    What a GPU sustains falls with the power it draws: a product alone, measured before everything else, is
    up to 5 % faster than in the state in which steps are timed.
    """
    size, pairs = _factors(device, size)

    def multiply() -> None:
        for i in range(count):
            torch.mm(*pairs[i % len(pairs)])

    return multiply, count * 2 * size**3 / 1e12


def _factors(device: torch.device, size: int) -> tuple[int, list[tuple[Tensor, Tensor]]]:
    """Two pairs of factors, and their size: small without a GPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    size = size if device.type == "cuda" else 256
    draw = [torch.randn(size, size, device=device, dtype=dtype) for _ in range(4)]
    return size, [(draw[0], draw[1]), (draw[2], draw[3])]


def environment(device: torch.device) -> dict[str, str]:
    """What a figure depends on besides the code: GPU, driver, versions, commit, command."""
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    program = Path(sys.argv[0])
    found = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "driver": "none",
        "torch": torch.__version__,
        "triton": "none",
        "commit": os.environ.get(COMMIT_VARIABLE) or _output(describe),
        "command": f"python -m {program.parent.name}.{program.stem} {shlex.join(sys.argv[1:])}".rstrip(),
    }
    if device.type == "cuda":
        query = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
        found["driver"] = query.splitlines()[0]
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        pass
    return found


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
