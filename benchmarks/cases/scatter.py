"""The scatter of BokehMe: pictures a second by level, in Triton and in plain PyTorch, beside its roofline.

Radius 30 means 3,300 weights a pixel. A bound counts what no form of the sum can do without: the instructions
of a weight, and the reads of its five numbers from L1, on all SMs at once. Its cost grows with the square of
the radius.
"""

from __future__ import annotations

import torch

from benchmarks.registry import Benchmark, Session, by_case
from benchmarks.timing import Arm, Row, Rules, race, relative_error

INSTRUCTIONS, READ_BYTES = 27, 20
"""A weight's: for 32 weights at a time, and from L1."""
WARPS, L1_BYTES = 4, 128
"""What an SM begins and reads in a cycle."""
CLOCK_HZ = 1.755e9
"""An H100's under load."""
MAX_ERROR = 2e-5
"""Relative, against float64: 3,300 additions in float32 have half of it."""
ARMS = ("triton", "eager")


def num_weights(level: float, side_px: int) -> int:
    """Weights that are not 0 for side_px^2 pixels of radius `level`."""
    from bokehflux.kernels.scatter.reference import DISC, FADED_PX, offset_table

    distance, ring, _ = offset_table(int(level) + 1, DISC)
    return side_px**2 * int(((distance <= level + FADED_PX) & (ring <= level + 1)).sum())


def bound_ms(weights: int, device: torch.device) -> float:
    """The larger of both bounds on a GPU."""
    rate = torch.cuda.get_device_properties(device).multi_processor_count * CLOCK_HZ / 1000
    return max(weights * INSTRUCTIONS / 32 / WARPS, weights * READ_BYTES / L1_BYTES) / rate


@torch.inference_mode()
def measure_level(session: Session, case: tuple[float, int]) -> list[Row]:
    """A row an arm, every pixel of that radius."""
    from bokehflux.kernels.scatter import interface, ops, reference

    level, side_px = case
    on_gpu, reach = session.device.type == "cuda", int(level) + 1
    light = torch.rand(1, 3, side_px, side_px, device=session.device)
    radius = torch.full((1, side_px, side_px), level, device=session.device)
    exact = reference.scatter(light.double(), radius.double(), reference.DISC, reach)[0]
    calls = {"eager": lambda _: reference.scatter(light, radius, reference.DISC, reach)}
    if on_gpu:
        calls["triton"] = lambda _: interface.scatter(light, radius)
    elif session.tiny:  # in Triton's interpreter
        calls["triton"] = lambda _: ops.scatter(light, radius, reference.DISC, reach)
    arms = [
        Arm(
            name=name,
            call=calls[name],
            error=lambda found: relative_error(found[0], exact),
            is_ours=name == "triton" or not on_gpu,
        )
        for name in ARMS
        if session.wants(name) and name in calls
    ]
    rules = Rules(error_of=None, max_error=MAX_ERROR, speed_of=["eager"])
    rows = race(arms, rules, session.sustained())
    for row in (row for row in rows if "ms" in row):
        row["images_s"] = 1000 / row["ms"]
        if on_gpu:
            row["share"] = bound_ms(num_weights(level, side_px), session.device) / row["ms"]
    return rows


BENCHMARK = Benchmark(
    question="BokehMe's scatter: pictures a second by level, ours and plain PyTorch, on a GPU or a CPU",
    checked="results against float64: a relative error of at most 2e-5",
    cases=lambda tiny: {
        f"level {level:g}, {side} px": (level, side)
        for level, side in ([(3.0, 20)] if tiny else [(30.0, 512), (20.0, 512), (10.0, 512), (5.0, 512)])
    },
    arms=ARMS,
    repeats=9,
    columns="case arm ms images_s share speedup error verdict",
    bars=("case", "arm", "images_s", "images/s"),
    measure=by_case(measure_level),
    needs_gpu=False,
)
