"""Attention forward and backward, as training needs it: backends by name and the published form.

Times are whole passes with their launches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from benchmarks import shapes
from benchmarks.arms import STOCK_ORDER
from benchmarks.cases import attention
from benchmarks.cases.attention import STOCK_BACKENDS, Kernel, by_name
from benchmarks.registry import Benchmark, Session, by_case
from benchmarks.shapes import AttentionShape
from benchmarks.timing import Arm, Row, Rules, race, relative_error
from bokehflux.kernels.attention import select

SHARPER = 2.5
"""Queries of `attention`'s times this: attention picks a few tokens, so that its errors show."""
SANE_ERROR = 0.05
"""No error above this passes, whatever the published form's: that one may be wrong itself."""
PUBLISHED = "published"
BACKWARD_PRODUCTS = 2.5
"""Work of a backward pass that keeps no scores, over the forward pass's: five products for two."""
ARMS = (PUBLISHED, *select.BACKENDS)
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
"""q, k and v, rows as in `attention.Inputs`, and the output's gradient [B, L, H, D]."""


def published(shape: AttentionShape) -> Kernel:
    """The published form on PyTorch's fastest kernel; the pivot's output counts once.

    On cuDNN where it can: its backward pass fails where keys are more than queries (torch 2.11, H200).
    """
    order = STOCK_ORDER if shape.form == "plain" else STOCK_ORDER[1:]
    kernel = sdpa_kernel(order, set_priority=True)(F.scaled_dot_product_attention)

    def attend(*x: Tensor) -> Tensor:
        inputs = attention.arranged(shape, x, [t.transpose(1, 2) for t in x])
        return attention.joined(shape, attention.published(shape, kernel, inputs))

    return attend


def forward_backward(attend: Kernel, x: Inputs) -> tuple[Tensor, ...]:
    """Output, then gradients of q, k and v."""
    *x, grad = x
    leaves = [t.detach().requires_grad_() for t in x]
    out = attend(*leaves)
    return (out.detach(), *torch.autograd.grad(out, leaves, grad))


def exact(shape: AttentionShape, x: Inputs, heads: Sequence[int]) -> tuple[Tensor, ...]:
    """By the definition, in float32, a head at a time."""
    attend = by_name(shape, "reference")
    parts = [forward_backward(attend, tuple(t[:, :, [head]].float() for t in x)) for head in heads]
    return tuple(torch.cat(tensors, dim=2) for tensors in zip(*parts, strict=True))


def worst_error(found: Sequence[Tensor], true: Sequence[Tensor], heads: Sequence[int]) -> float:
    """Largest relative error of output and gradients; NaN if any is."""
    errors = [relative_error(a[:, :, heads], b) for a, b in zip(found, true, strict=True)]
    return torch.tensor(errors).max().item()  # of which `max` would hide a NaN


def measure_shape(session: Session, shape: AttentionShape) -> list[Row]:
    """A row an arm. Not in inference mode: gradients are the point."""
    drawn = attention.draw(shape, session.device, session.half)
    x: Inputs = (SHARPER * drawn.q, drawn.k, drawn.v, torch.randn_like(drawn.v))
    true = exact(shape, x, shape.checked_heads)
    backends = {name: by_name(shape, name) for name in ARMS[1:] if session.wants(name)}
    arms = [
        Arm(
            name=name,
            call=lambda _, attend=attend: forward_backward(attend, x),
            error=lambda found: worst_error(found, true, shape.checked_heads),
            # Other stock kernels are credited with the work that ours take.
            tera_flop=(1 + BACKWARD_PRODUCTS) * shape.tera_flop("published" if name == PUBLISHED else "ours"),
            is_ours=name not in (PUBLISHED, *STOCK_BACKENDS),
        )
        for name, attend in {PUBLISHED: published(shape), **backends}.items()
    ]
    rules = Rules(error_of=[PUBLISHED], max_error=SANE_ERROR, speed_of=[PUBLISHED])
    return race(arms, rules, session.sustained())


BENCHMARK = Benchmark(
    question="attention, forward and backward, as training needs it: time and memory by backend",
    checked="output and gradients against float32 autograd: at most twice the published form's error",
    cases=lambda tiny: {name: shape for name, shape in shapes.known(tiny).items() if shape.form != "target"},
    usual_cases=(
        "grounded-1-4608", "grounded-1-1536", "grounded-6-4608", "grounded-2-1536", "plain-2-4608",
        "plain-2-1536",
    ),  # a pair is what the adapter trains on
    arms=ARMS,
    usual_arms=[name for name in ARMS if name != "reference"],
    repeats=30,
    columns="shape arm ms speedup tflops share workspace_mb error verdict",
    bars=("shape", "arm", "ms", "ms"),
    measure=by_case(measure_shape, "shape"),
)  # fmt: skip
