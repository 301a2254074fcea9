"""Where the time of one denoising step goes: a table by kernel, from torch.profiler.

Several steps are traced right after others, in the state that the GPU's clock has settled in; the table is of
one of them. Of each kernel: calls, time, share of the step, and what it achieves: TFLOP/s for matrix products
(from the shapes of the operators that launched them) and for attention (whose work per step is known), TB/s
for kernels that torch.compile made (from the tensors they are given) and for our passes between products. A
machine without a GPU shows operators instead.
"""

from __future__ import annotations

import gzip
import json
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import networks
from benchmarks.arms import StepArm, allow_recompiling, best_stock_attention
from benchmarks.cases import step
from benchmarks.networks import Batch
from benchmarks.registry import Benchmark, Session
from benchmarks.timing import Row, gemm_ceiling, sustained_milliseconds

ATTENTION = re.compile(
    r"flash|fmha|sdpa|scaled_dot_product|cudnn.*attention|bokehflux::\w*attention|^(forward|merge)_kernel$",
    re.I,
)
"""Names of attention kernels: PyTorch's, cuDNN's and ours."""
ITEM_BYTES = {
    "c10::BFloat16": 2, "c10::Half": 2, "float": 4, "double": 8, "long int": 8, "int": 4, "bool": 1,
    "c10::Float8_e4m3fn": 1, "unsigned char": 1,
}  # fmt: skip
"""By the profiler's names of element types."""
NAME_WIDTH = 80
WRITTEN = {"modulate": 1, "add_gated": 1, "add_gated_modulate": 2, "concat_gelu": 5}
"""Our passes by operator: what they write, in units of their first input (an MLP is four times as wide)."""
Event = Mapping[str, Any]


@dataclass(kw_only=True)
class Total:
    """One kernel over a step."""

    calls: int = 0
    us: float = 0.0
    flop: float = 0.0
    bytes: float = 0.0


def trace(run: Callable[[], object], device: torch.device) -> list[Event]:
    """Events of one call, as PyTorch writes them for a browser's trace viewer."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, record_shapes=True) as profiler:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        raw = path.read_bytes()
    text = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    return json.loads(text)["traceEvents"]


def kernels(events: Sequence[Event]) -> Iterator[tuple[Event, Event | None]]:
    """Every kernel or copy on the GPU and the operator that launched it; without any, operators' own time."""
    operators = [event for event in events if event.get("cat") == "cpu_op"]
    launched = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if not launched:
        for event in without_children(operators):
            yield event, event
        return
    by_id = {event["args"]["External id"]: event for event in operators if "External id" in event["args"]}
    for event in launched:
        yield event, by_id.get(event.get("args", {}).get("External id"))


def without_children(operators: Sequence[Event]) -> list[Event]:
    """The operators, their duration less that of those they call."""
    result: list[dict[str, Any]] = []
    open_ones: list[dict[str, Any]] = []
    for event in sorted(operators, key=lambda event: (event["tid"], event["ts"], -event["dur"])):
        while open_ones and not (open_ones[-1]["tid"] == event["tid"] and event["ts"] < open_ones[-1]["end"]):
            open_ones.pop()
        if open_ones:
            open_ones[-1]["dur"] -= event["dur"]
        result.append({**event, "end": event["ts"] + event["dur"]})
        open_ones.append(result[-1])
    return result


FACTORS = {"mm": 0, "bmm": 0, "_scaled_mm": 0, "addmm": 1, "_addmm_activation": 1, "baddbmm": 1}
"""Matrix products by operator: the place of the first factor among the arguments, the second follows."""


def product_flop(operator: Event) -> float:
    """Work of a matrix product, by the shapes of its inputs; 0 for other operators."""
    first = FACTORS.get(operator["name"].removeprefix("aten::"))
    dims = operator.get("args", {}).get("Input Dims", [])
    if first is None or len(dims) < first + 2:
        return 0.0
    return 2.0 * math.prod(dims[first]) * dims[first + 1][-1]


def tensor_bytes(operator: Event) -> float:
    """Size of the tensors given to a kernel of torch.compile: read or written once each."""
    args = operator.get("args", {})
    pairs = zip(args.get("Input Dims", []), args.get("Input type", []), strict=False)
    return float(
        sum(
            math.prod(dims) * ITEM_BYTES[kind]
            for dims, kind in pairs
            if kind in ITEM_BYTES and dims and all(isinstance(n, int) for n in dims)
        )
    )


def pass_bytes(operator: Event) -> float:
    """Moved by a pass of ours between products, 0 for other operators: inputs read once, results written."""
    times = WRITTEN.get(operator["name"].removeprefix("bokehflux::"), 0)
    args = operator.get("args", {})
    first = {"args": {key: args.get(key, [])[:1] for key in ("Input Dims", "Input type")}}
    return tensor_bytes(operator) + times * tensor_bytes(first) if times else 0.0


def totals(events: Sequence[Event]) -> dict[str, Total]:
    """By kernel, longest first."""
    found: dict[str, Total] = {}
    longest: dict[int, tuple[Event, Event]] = {}
    for event, operator in kernels(events):
        total = found.setdefault(event["name"], Total())
        total.calls += 1
        total.us += event["dur"]
        if operator is None:
            continue
        made_by_inductor = event["name"].startswith("triton_")
        total.bytes += tensor_bytes(operator) if made_by_inductor else pass_bytes(operator)
        known = longest.get(id(operator))
        if known is None or event["dur"] > known[0]["dur"]:
            longest[id(operator)] = event, operator
    # A product may take several kernels (a reduction over its parts): its work is the longest one's.
    for event, operator in longest.values():
        found[event["name"]].flop += product_flop(operator)
    return dict(sorted(found.items(), key=lambda item: -item[1].us))


def rows_of(found: Mapping[str, Total], attention_flop: float, steps: int = 1) -> list[Row]:
    """The totals of so many steps as a table of one.

    attention_flop: of a step, shared by all attention kernels in proportion to their time.
    """
    whole = sum(total.us for total in found.values())
    attention = sum(total.us for name, total in found.items() if ATTENTION.search(name))
    rows: list[Row] = []
    for name, total in found.items():
        flop = total.flop
        if ATTENTION.search(name):
            flop = steps * attention_flop * total.us / attention
        seconds = total.us / 1e6
        rows.append(
            {
                "kernel": name if len(name) <= NAME_WIDTH else name[: NAME_WIDTH - 3] + "...",
                "calls": total.calls // steps,
                "ms": total.us / 1000 / steps,
                "share": total.us / whole,
                "tflops": flop / seconds / 1e12 if flop and seconds else None,
                "tb_s": total.bytes / seconds / 1e12 if total.bytes and seconds else None,
            }
        )
    return rows


def label_of(kernel: str, width: int = 26) -> str:
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

    def several() -> None:
        for _ in range(steps):
            call()

    trace(call, session.device)  # the profiler's own start takes time, in which the GPU would cool
    step_ms = sustained_milliseconds(call, session.device)
    way = "ours" if arm.is_ours else "published"
    attention = 1e12 * config.num_blocks * networks.attention_shape(config, batch).tera_flop(way)
    rows = rows_of(totals(trace(several, session.device)), attention, steps)
    print(f"{step_ms:.2f} ms a step, kernels {sum(row['ms'] for row in rows):.2f} ms")
    return [{"arm": arm.name, "label": label_of(row["kernel"]), "step_ms": step_ms, **row} for row in rows]


def measure(session: Session) -> Iterator[list[Row]]:
    allow_recompiling()
    ceiling = session.facts["ceiling_tflops"] = gemm_ceiling(session.device)
    print(f"bf16 matrix product: {ceiling:.0f} TFLOP/s")
    batches = step.draw_batches(session)
    mmdit = networks.build_mmdit(networks.setting(session.tiny), session.device)
    with best_stock_attention():
        for name, batch, arms in step.with_arms(session, mmdit, batches):
            for arm in arms:
                yield [{"case": name, **row} for row in profiled(session, batch, arm)]


BENCHMARK = Benchmark(
    question="where a step's time goes, by kernel",
    checked="nothing: step does",
    ceiling="an 8192 x 8192 x 8192 bf16 product, before everything else; beside the rows",
    cases=step.cases,
    usual_cases=("pivot + 6, 1024",),
    arms=step.BENCHMARK.arms,
    usual_arms=("ours$",),
    repeats=8,
    repeated="steps in one trace",
    columns="kernel calls ms share tflops tb_s",
    bars=("label", "arm", "ms"),
    measure=measure,
    takes_backend=True,
)
