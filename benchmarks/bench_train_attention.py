"""Attention forward and backward, as training needs it: backends by name and the published form.

    python -m benchmarks.bench_train_attention [--seconds 300] [--shapes grounded] [--backends triton sdpa]
    python -m benchmarks.bench_train_attention --tiny

Output and gradients of every arm are compared with float32 autograd before it is timed; a wrong arm is named
and not timed. Times are whole passes with their launches. Writes train_attention.json and .png.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from benchmarks.arms import STOCK_ORDER
from benchmarks.report import (
    RESULTS,
    Budget,
    Row,
    bars,
    chosen_device,
    first_line,
    save,
    table,
    turns,
    workspace_bytes,
)
from benchmarks.shapes import ATTENTION, TOYS, AttentionShape
from benchmarks.timing import environment, gemm_ceiling
from bokehflux.kernels.attention import interface, reference, select

WANTED = (
    "grounded-1-4608",
    "grounded-1-1536",
    "grounded-6-4608",
    "grounded-2-1536",
    "plain-2-4608",
    "plain-2-1536",
)
"""Most important first: a pair is what the adapter trains on."""
CHECKED_HEADS = (0, 11, 23)
SCORE_SPREAD = 2.0
"""Standard deviation of the scores: attention picks a few tokens, so that its errors show."""
MAX_ERROR_RATIO = 2.0
"""Largest error of output or any gradient that passes, as a multiple of the published form's."""
SANE_ERROR = 0.05
"""No error above this passes, whatever the published form's: that one may be wrong itself."""
PUBLISHED = "published"
BACKWARD_PRODUCTS = 2.5
"""Work of a backward pass that keeps no scores, over the forward pass's: five products for two."""
COLUMNS = {
    "shape": "s", "arm": "s", "ms": ".3f", "speedup": ".2f", "tflops": ".0f",
    "share": ".0%", "workspace_mb": ".0f", "error": ".2e", "verdict": "s",
}  # fmt: skip

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """One pass: rows are targets, then the pivot (plain shapes: rows by themselves)."""

    q: Tensor
    """[P, L, H, D]: the pivot's queries, or every row's for plain shapes."""
    k: Tensor
    v: Tensor
    grad: Tensor
    """Of the output, [B, L, H, D]."""

    def heads(self, heads: list[int]) -> Inputs:
        """Some heads in float32, gradients wanted."""
        q, k, v = (x[:, :, heads].detach().float().requires_grad_() for x in (self.q, self.k, self.v))
        return Inputs(q=q, k=k, v=v, grad=self.grad[:, :, heads].float())


def draw(shape: AttentionShape, device: torch.device, dtype: torch.dtype) -> Inputs:
    rows = shape.num_targets + (shape.form != "plain")
    rows_q = rows if shape.form == "plain" else 1
    dims = shape.length, shape.num_heads, shape.head_dim

    def normal(rows: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(rows, *dims, device=device)).to(dtype)

    q, k, v = normal(rows_q, SCORE_SPREAD), normal(rows), normal(rows)
    return Inputs(q=q.requires_grad_(), k=k.requires_grad_(), v=v.requires_grad_(), grad=normal(rows))


def published(shape: AttentionShape) -> Attend:
    """Queries swapped, keys concatenated, values doubled, a pair at a time; the pivot's output once.

    On cuDNN where it can: its backward pass fails where keys are more than queries (torch 2.11, H200).
    """
    kernels = STOCK_ORDER if shape.form == "plain" else STOCK_ORDER[1:]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(kernels, set_priority=True):
            return attend_on_it(q, k, v)

    def attend_on_it(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if shape.form == "plain":
            out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
            return out.transpose(1, 2)
        n = shape.num_targets
        q2, pivot_keys = q.expand(2, -1, -1, -1).transpose(1, 2), k[[n, n]]
        outs = []
        for target in range(n):
            keys = torch.cat([k[[target, n]], pivot_keys], dim=1).transpose(1, 2)
            values = v[[target, n]]
            values = torch.cat([values, values], dim=1).transpose(1, 2)
            outs.append(F.scaled_dot_product_attention(q2, keys, values).transpose(1, 2))
        return torch.cat([*(out[:1] for out in outs), outs[-1][1:]])

    return attend


def by_name(shape: AttentionShape, backend: str) -> Attend:
    if shape.form == "plain":
        return lambda q, k, v: interface.attention(q, k, v, backend=backend)
    pivots = [shape.num_targets] * (shape.num_targets + 1)
    return lambda q, k, v: interface.grounded_attention(q, k, v, pivots, backend=backend)


def forward_backward(attend: Attend, x: Inputs) -> tuple[Tensor, ...]:
    """Output, then gradients of q, k and v."""
    out = attend(x.q, x.k, x.v)
    return (out.detach(), *torch.autograd.grad(out, (x.q, x.k, x.v), x.grad))


def exact(shape: AttentionShape, x: Inputs, heads: list[int]) -> tuple[Tensor, ...]:
    """By the definition, in float32, a head at a time."""
    pivots = [shape.num_targets] * (shape.num_targets + 1)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if shape.form == "plain":
            return reference.attention(q, k, v)
        return reference.grounded_attention(q, k, v, pivots)

    parts = [forward_backward(attend, x.heads([head])) for head in heads]
    return tuple(torch.cat(tensors, dim=2) for tensors in zip(*parts, strict=True))


def worst_error(found: Sequence[Tensor], true: Sequence[Tensor], heads: list[int]) -> float:
    """Largest relative error of output and gradients; NaN if any is."""
    errors = [
        ((a[:, :, heads].float() - b).norm() / b.norm()).item() for a, b in zip(found, true, strict=True)
    ]
    return float("nan") if any(e != e for e in errors) else max(errors)


def tera_flop(shape: AttentionShape, is_published: bool) -> float:
    """1e12 operations: the published form's own work; for every other arm that of our kernels."""
    n = shape.num_targets
    products = 2 * n if shape.form == "plain" else 8 * n if is_published else 3 * n + 1
    return products * (1 + BACKWARD_PRODUCTS) * shape.product_flop / 1e12


def measure(
    shape: AttentionShape,
    backends: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    ceiling: float,
    repeats: int,
    budget: Budget,
) -> list[Row]:
    """A row an arm. Not in inference mode: gradients are the point."""
    x = draw(shape, device, dtype)
    heads = [head for head in CHECKED_HEADS if head < shape.num_heads]
    true = exact(shape, x, heads)
    arms = {PUBLISHED: published(shape), **{name: by_name(shape, name) for name in backends}}
    errors: dict[str, float | str] = {}
    for name, attend in arms.items():
        try:
            errors[name] = worst_error(forward_backward(attend, x), true, heads)
        except Exception as error:  # a backend that cannot take the shape, a compiler, too little memory
            errors[name] = f"failed: {first_line(error)}"
    yardstick = errors[PUBLISHED]
    limit = min(MAX_ERROR_RATIO * yardstick, SANE_ERROR) if isinstance(yardstick, float) else float("nan")
    calls = {
        name: lambda attend=attend: forward_backward(attend, x)
        for name, attend in arms.items()
        if isinstance(e := errors[name], float) and e <= limit
    }
    room = {name: workspace_bytes(call, device) for name, call in calls.items()}
    timings = turns(calls, device, repeats, budget)
    rows: list[Row] = []
    for name in arms:
        error = errors[name]
        row: Row = {"shape": shape.name, "arm": name, "error": error if isinstance(error, float) else None}
        if name not in calls:
            row["verdict"] = error if isinstance(error, str) else f"wrong: more than {limit:.2e}"
        else:
            timing, extra = timings[name], room[name]
            tflops = 1000 * tera_flop(shape, name == PUBLISHED) / timing.median
            row |= {
                "ms": timing.median, "p20": timing.p20, "p80": timing.p80, "tflops": tflops,
                "share": tflops / ceiling, "workspace_mb": None if extra is None else extra / 1e6,
                "speedup": timings[PUBLISHED].median / timing.median if PUBLISHED in timings else None,
                "verdict": "ok",
            }  # fmt: skip
        rows.append(row)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="", help="only shapes whose name contains this")
    parser.add_argument("--backends", nargs="+", choices=sorted(select.BACKENDS), default=None)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=300, help="begin no shape after this")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--tiny", action="store_true", help="toys, on any machine")
    args = parser.parse_args(argv)
    budget = Budget(args.seconds)
    device = chosen_device(parser, tiny=args.tiny)
    # Triton's interpreter knows no bfloat16.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    known = {shape.name: shape for shape in ATTENTION}
    shapes = [s for s in TOYS if s.form != "target"] if args.tiny else [known[name] for name in WANTED]
    shapes = [shape for shape in shapes if args.shapes in shape.name]
    if not shapes:
        parser.error(f"no shape's name contains {args.shapes!r}")
    torch.manual_seed(0)
    found = environment(device)
    print(", ".join(f"{key} {value}" for key, value in found.items()))
    ceiling = gemm_ceiling(device)
    print(f"bf16 matrix product: {ceiling:.0f} TFLOP/s", flush=True)
    backends = args.backends or [name for name in select.BACKENDS if name != "reference"]
    name, rows = "train_attention_tiny" if args.tiny else "train_attention", []
    for shape in shapes:
        if budget.spent:
            print(f"out of time before {shape.name}")
            break
        some = measure(shape, backends, device, dtype, ceiling, args.repeats, budget)
        print(table(some, COLUMNS), flush=True)
        rows += some
        plot = bars(
            f"Forward and backward, {found['device']}: milliseconds", rows, "shape", "arm", "ms", "ms"
        )
        save(args.out, name, found, rows, plot, ceiling_tflops=ceiling)
    return 0 if rows and all(row["verdict"] == "ok" for row in rows if row["arm"] == "triton") else 1


if __name__ == "__main__":
    sys.exit(main())
