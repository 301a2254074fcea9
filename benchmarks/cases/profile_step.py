"""Where the time of one denoising step goes: a table by kernel, from torch.profiler.

Several steps are traced right after others, in the state that the GPU's clock has settled in; the table is of
one of them. Of each kernel: calls, time, share of the step, and TFLOP/s of matrix products (from the shapes
of the operators that launched them) and of attention (whose work per step is known). A machine without a GPU
shows operators instead.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import profile

from benchmarks import networks
from benchmarks.arms import StepArm
from benchmarks.cases import step
from benchmarks.networks import Batch
from benchmarks.registry import Benchmark, Session
from benchmarks.timing import Row, gemm_ceiling, sustained_milliseconds, wait

ATTENTION = re.compile(
    r"flash|fmha|sdpa|scaled_dot_product|cudnn.*attention|bokehflux::\w*attention|^(forward|merge)_kernel$",
    re.I,
)
"""Names of attention kernels: PyTorch's, cuDNN's and ours."""
FACTORS = {"mm": 0, "bmm": 0, "_scaled_mm": 0, "addmm": 1, "_addmm_activation": 1, "baddbmm": 1}
"""Matrix products by operator: the place of the first factor among the arguments, the second follows."""


def trace(call: Callable[[], object], times: int, device: torch.device) -> Sequence[FunctionEvent]:
    """Events of calls in a row, on the CPU and the GPU."""
    with profile(record_shapes=True) as profiler:
        for _ in range(times):
            call()
        wait(device)
    return profiler.events() or []


def product_flop(operator: FunctionEvent) -> float:
    """Work of a matrix product, by the shapes of its inputs; 0 for other operators."""
    first = FACTORS.get(operator.name.removeprefix("aten::"))
    dims = operator.input_shapes or []
    if first is None or len(dims) < first + 2:
        return 0.0
    return 2.0 * math.prod(dims[first]) * dims[first + 1][-1]


def table_of(events: Sequence[FunctionEvent], attention_flop: float, steps: int = 1) -> list[Row]:
    """A row for every kernel or copy on the GPU, longest first; without any, for every operator's own time.

    The events are of so many steps, the rows of one. attention_flop: of a step, shared by all attention
    kernels in proportion to their time.
    """
    operators = [event for event in events if event.device_type == DeviceType.CPU]
    on_gpu = [e for e in events if e.device_type != DeviceType.CPU and not e.is_user_annotation]
    calls, us, flop = Counter[str](), Counter[str](), Counter[str]()
    for event in on_gpu or operators:
        calls[event.name] += 1
        us[event.name] += event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
    for operator in operators:
        # A product may take several kernels (a reduction over its parts): its work is the longest one's.
        longest = max(operator.kernels, key=lambda kernel: kernel.duration, default=operator)
        flop[longest.name] += product_flop(operator)
    attention = sum(time for name, time in us.items() if ATTENTION.search(name))
    rows: list[Row] = []
    for name, time in us.most_common():
        work = steps * attention_flop * time / attention if ATTENTION.search(name) else flop[name]
        row = {"kernel": label_of(name, 80), "label": label_of(name, 26), "calls": calls[name] // steps}
        row |= {"ms": time / 1000 / steps, "share": time / us.total()}
        rows.append(row | {"tflops": work / time / 1e6 if work and time else None})
    return rows


def label_of(kernel: str, width: int) -> str:
    """Both ends of a long name: the last letters of a library's kernel tell its epilogue."""
    half = width // 2
    return kernel if len(kernel) <= width else f"{kernel[: half - 1]}..{kernel[1 - half :]}"


@torch.inference_mode()
def profiled(session: Session, batch: Batch, arm: StepArm) -> list[Row]:
    """A row a kernel, with the step's time without the profiler."""
    call, config = arm.prepare(batch), networks.setting(session.tiny).mmdit
    for _ in range(3):
        call()
    steps = session.repeats if session.device.type == "cuda" else 1
    trace(call, 1, session.device)  # the profiler's own start takes time, in which the GPU would cool
    step_ms = sustained_milliseconds(call, session.device)
    _, attention = networks.tera_flop(config, batch, arm.is_ours)
    rows = table_of(trace(call, steps, session.device), 1e12 * attention, steps)
    print(f"{step_ms:.2f} ms a step, kernels {sum(row['ms'] for row in rows):.2f} ms")
    return [{"arm": arm.name, "step_ms": step_ms, **row} for row in rows]


def measure(session: Session) -> Iterator[list[Row]]:
    ceiling = gemm_ceiling(session.device)
    print(f"bf16 matrix product: {ceiling:.0f} TFLOP/s")
    for name, batch, _, arms in step.each_case(session, checked=False):
        for arm in arms:
            rows = profiled(session, batch, arm)
            yield [{"case": name, "ceiling_tflops": ceiling, **row} for row in rows]


BENCHMARK = Benchmark(
    question="where a step's time goes, by kernel",
    checked="nothing: step does",
    cases=step.cases,
    usual_cases=("pivot + 6, 1024",),
    arms=step.BENCHMARK.arms,
    usual_arms=("ours$",),
    repeats=8,
    repeated="steps in one trace",
    columns="kernel calls ms share tflops",
    bars=("label", "arm", "ms", "ms"),
    measure=measure,
    takes_backend=True,
)
