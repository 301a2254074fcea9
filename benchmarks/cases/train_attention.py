"""Attention forward and backward, as training needs it: backends by name and the published form.

Times are whole passes with their launches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from benchmarks import shapes
from benchmarks.arms import STOCK_ORDER
from benchmarks.cases.attention import CHECKED_HEADS, STOCK_BACKENDS, Kernel, by_name
from benchmarks.registry import Benchmark, Session
from benchmarks.shapes import AttentionShape
from benchmarks.timing import Arm, Row, Rules, gemm_ceiling, race, relative_error
from bokehflux.kernels.attention import select

SCORE_SPREAD = 2.0
"""Standard deviation of the scores: attention picks a few tokens, so that its errors show."""
SANE_ERROR = 0.05
"""No error above this passes, whatever the published form's: that one may be wrong itself."""
PUBLISHED = "published"
BACKWARD_PRODUCTS = 2.5
"""Work of a backward pass that keeps no scores, over the forward pass's: five products for two."""
ARMS = (PUBLISHED, *select.BACKENDS)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """One pass: rows are targets, then the pivot (plain shapes: rows by themselves)."""

    q: Tensor
    """[P, L, H, D]: the pivot's queries, or every row's for plain shapes."""
    k: Tensor
    v: Tensor
    grad: Tensor
    """Gradient of the output, [B, L, H, D]."""

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


def published(shape: AttentionShape) -> Kernel:
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


def forward_backward(attend: Kernel, x: Inputs) -> tuple[Tensor, ...]:
    """Output, then gradients of q, k and v."""
    out = attend(x.q, x.k, x.v)
    return (out.detach(), *torch.autograd.grad(out, (x.q, x.k, x.v), x.grad))


def exact(shape: AttentionShape, x: Inputs, heads: list[int]) -> tuple[Tensor, ...]:
    """By the definition, in float32, a head at a time."""
    attend = by_name(shape, "reference")
    parts = [forward_backward(attend, x.heads([head])) for head in heads]
    return tuple(torch.cat(tensors, dim=2) for tensors in zip(*parts, strict=True))


def worst_error(found: Sequence[Tensor], true: Sequence[Tensor], heads: list[int]) -> float:
    """Largest relative error of output and gradients; NaN if any is."""
    errors = [relative_error(a[:, :, heads], b) for a, b in zip(found, true, strict=True)]
    return float("nan") if any(e != e for e in errors) else max(errors)


# Measuring.


def measure_shape(shape: AttentionShape, session: Session, ceiling: float) -> list[Row]:
    """A row an arm. Not in inference mode: gradients are the point."""
    x = draw(shape, session.device, session.half)
    heads = [head for head in CHECKED_HEADS if head < shape.num_heads]
    true = exact(shape, x, heads)
    backends = [name for name in ARMS[1:] if session.wants(name)]
    ways = {PUBLISHED: published(shape), **{name: by_name(shape, name) for name in backends}}
    arms = [
        Arm(
            name=name,
            call=lambda _, attend=attend: forward_backward(attend, x),
            error=lambda found: worst_error(found, true, heads),
            # Other stock kernels are credited with the work that ours take.
            tera_flop=(1 + BACKWARD_PRODUCTS) * shape.tera_flop("published" if name == PUBLISHED else "ours"),
            is_ours=name not in (PUBLISHED, *STOCK_BACKENDS),
        )
        for name, attend in ways.items()
    ]
    rules = Rules(error_of=[PUBLISHED], max_error=SANE_ERROR, speed_of=[PUBLISHED])
    return [{"shape": shape.name, **row} for row in race(arms, rules, session.sustained(ceiling))]


def measure(session: Session) -> Iterator[list[Row]]:
    torch.manual_seed(0)
    ceiling = gemm_ceiling(session.device)
    for shape in session.until_spent(session.cases.values()):
        yield measure_shape(shape, session, ceiling)


BENCHMARK = Benchmark(
    question="attention, forward and backward, as training needs it: time and memory by backend",
    checked="output and gradients against float32 autograd: at most twice the published form's error",
    ceiling="an 8192 x 8192 x 8192 bf16 product, before everything else",
    cases=lambda tiny: {name: shape for name, shape in shapes.known(tiny).items() if shape.form != "target"},
    usual_cases=(
        "grounded-1-4608", "grounded-1-1536", "grounded-6-4608", "grounded-2-1536", "plain-2-4608",
        "plain-2-1536",
    ),  # a pair is what the adapter trains on
    arms=ARMS,
    usual_arms=[name for name in ARMS if name != "reference"],
    repeats=30,
    columns="shape arm ms speedup tflops share workspace_mb error verdict",
    bars=("shape", "arm", "ms"),
    measure=measure,
)  # fmt: skip
