"""Our kernels as PyTorch operators: backend `triton`.

They are a custom operator with a fake implementation and a gradient, so `torch.compile` and CUDA graphs take
each call as one opaque node. Importing this module imports triton.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..dispatch import needs_gradients
from . import launch, select
from .jobs import Job, grounded_jobs, target_jobs
from .joins import merge
from .sdpa import add_bias

MAX_LOG2_SCORE = {torch.bfloat16: 96.0, torch.float16: 14.0}
"""How large |q . k| * log2(e) / sqrt(D) may get without a running maximum: see `is_bounded`."""


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, value_bias: Tensor | None = None, logit_bound: float | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v + value_bias, as `reference.attention`.

    q [B, Lq, H, D], k and v [B, Lk, H, D], bfloat16 or float16, D 64 or 128, any strides (copied where the
    last dim is not contiguous); value_bias [B, H, D]. logit_bound: what |q . k| / sqrt(D) never exceeds,
    known for instance from QK-norm weights; if small enough (see `is_bounded`) the softmax runs without a
    running maximum, unless gradients are needed. A bound that is not true can give infinities.
    Returns [B, Lq, H, D]. Raises ValueError where `select.why_not_triton` names a reason.
    """
    fused, added, fixed = _bias_and_offset(value_bias, logit_bound, q, k, v)
    return add_bias(_attention(q, k, None, v, None, fused, fixed)[0], added)


def extended_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_more: Tensor,
    v_more: Tensor,
    *,
    value_bias: Tensor | None = None,
    logit_bound: float | None = None,
) -> Tensor:
    """Own and further tokens, as `reference.extended_attention`; the rest as `attention`.

    Each set of keys is a launch of the plain kernel, and the two are merged. On the way back each set takes
    its share of the gradients from the log-sum-exps of both.
    """
    *_, fixed = _bias_and_offset(value_bias, logit_bound, q, k, v, k_more, v_more)
    return add_bias(_extended_attention(q, k, v, k_more, v_more, fixed)[0], value_bias)


def target_attention(
    q: Tensor,
    k_pivot: Tensor,
    k: Tensor,
    v: Tensor,
    pivot_index: Sequence[int],
    *,
    value_bias: Tensor | None = None,
    logit_bound: float | None = None,
) -> Tensor:
    """Targets on pivots outside the batch, as `reference.target_attention`; the rest as `attention`."""
    fused, added, fixed = _bias_and_offset(value_bias, logit_bound, q, k_pivot, k, v)
    return add_bias(_attention(q, k, k_pivot, v, list(pivot_index), fused, fixed)[0], added)


def grounded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pivot_of: Sequence[int],
    *,
    value_bias: Tensor | None = None,
    logit_bound: float | None = None,
) -> Tensor:
    """Pivots and targets together, as `reference.grounded_attention`; the rest as `attention`."""
    fused, added, fixed = _bias_and_offset(value_bias, logit_bound, q, k, v)
    return add_bias(_attention(q, k, None, v, list(pivot_of), fused, fixed)[0], added)


def is_bounded(logit_bound: float | None, dtype: torch.dtype) -> bool:
    """Whether probabilities can be left unscaled: exp(score) itself, no maximum subtracted.

    With every score in -b .. b powers of two, bfloat16 and the float32 sums hold 2^-b .. 2^b to full relative
    precision while b <= 96: 2^31 is left for the length times the largest value, 2^-30 for the smallest value
    that counts. float16 products need b <= 14: 2^15, the sum of a target's two, is within its range, 2^-14 is
    its smallest normal number.
    """
    return logit_bound is not None and 0 <= logit_bound * math.log2(math.e) <= MAX_LOG2_SCORE.get(dtype, -1.0)


def _bias_and_offset(
    value_bias: Tensor | None, logit_bound: float | None, *inputs: Tensor
) -> tuple[Tensor | None, Tensor | None, bool]:
    """The bias for the kernel's epilogue, the bias to add afterwards, and whether the offset is fixed.

    The backward pass needs the output without the bias, and takes probabilities to be exactly those that the
    output was made with: a fixed offset rounds the largest (see `triton_fwd`).
    """
    if needs_gradients(*inputs, value_bias):
        return None, value_bias, False
    return value_bias, None, is_bounded(logit_bound, inputs[0].dtype)


def _check(q: Tensor, *others: Tensor) -> None:
    select.check_triton(q.device, q.dtype, q.shape[-1])
    if any((x.dtype, x.device) != (q.dtype, q.device) for x in others):
        raise ValueError(
            f"the Triton attention kernels cannot run: all of q, k, v must be {q.dtype} on {q.device}"
        )


# One operator for all forms, and one for its gradients: k_pivot and the list of pivots say which.


def _jobs(k_pivot: Tensor | None, pivots: Sequence[int] | None) -> tuple[Job, ...] | None:
    """pivots: for targets on k_pivot `pivot_index`, in one batch `pivot_of`, None where rows are plain."""
    if pivots is None:
        return None
    return (grounded_jobs if k_pivot is None else target_jobs)(tuple(pivots))


@torch.library.custom_op(
    "bokehflux::attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor? k_pivot, Tensor v, int[]? pivots, Tensor? value_bias, bool fixed)"
    " -> (Tensor, Tensor)",
)
def _attention(
    q: Tensor,
    k: Tensor,
    k_pivot: Tensor | None,
    v: Tensor,
    pivots: Sequence[int] | None,
    value_bias: Tensor | None,
    fixed: bool,
) -> tuple[Tensor, Tensor]:
    """Values, and the log-sum-exps of the scores, [B, H, Lq] float32, from which the backward pass starts.

    They carry no gradient."""
    _check(q, *(x for x in (k, k_pivot, v) if x is not None))
    with torch.cuda.device_of(q):
        return launch.forward(q, k, k_pivot, v, value_bias, _jobs(k_pivot, pivots), fixed=fixed)


@_attention.register_fake
def _(q: Tensor, k: Tensor, k_pivot: Tensor | None, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    rows, length = v.shape[0], q.shape[1]
    out = q.new_empty((rows, length, *v.shape[2:]))
    return out, q.new_empty((rows, v.shape[2], length), dtype=torch.float32)


@torch.library.custom_op(
    "bokehflux::attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor? k_pivot, Tensor v, Tensor out, Tensor lse, "
    "int[]? pivots) -> Tensor[]",
)
def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    k_pivot: Tensor | None,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    pivots: Sequence[int] | None,
) -> list[Tensor]:
    """Gradients of q, k, v and, where there is one, k_pivot."""
    with torch.cuda.device_of(q):
        dq, dk, dk_pivot, dv = launch.backward(grad, q, k, k_pivot, v, out, lse, _jobs(k_pivot, pivots))
    return [dq, dk, dv] if dk_pivot is None else [dq, dk, dv, dk_pivot]


@_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, k_pivot: Tensor | None, v: Tensor, *_: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (q, k, v, k_pivot) if x is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, k_pivot, v, ctx.pivots, value_bias, _ = inputs
    if value_bias is not None:
        raise RuntimeError("an operator with a value bias has no gradient: call this module's functions")
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, k_pivot, v, *output)


def _gradients(ctx: Any, grad: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk, dv, *dk_pivot = _attention_backward(grad, *ctx.saved_tensors, ctx.pivots)
    return dq, dk, dk_pivot[0] if dk_pivot else None, dv, None, None, None


_attention.register_autograd(_gradients, setup_context=_save)


@torch.library.custom_op(
    "bokehflux::extended_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor k_more, Tensor v_more, bool fixed) -> (Tensor, Tensor)",
)
def _extended_attention(
    q: Tensor, k: Tensor, v: Tensor, k_more: Tensor, v_more: Tensor, fixed: bool
) -> tuple[Tensor, Tensor]:
    _check(q, k, v, k_more, v_more)
    with torch.cuda.device_of(q):
        own, lse = launch.forward(q, k, None, v, None, None, fixed=fixed)
        others = launch.forward(_as_rows(q, len(k_more)), k_more, None, v_more, None, None, fixed=fixed)
    other, other_lse = others[0].view(own.shape), _lse_as_rows(others[1], len(q))
    out = merge((own, lse.transpose(1, 2)), (other, other_lse.transpose(1, 2)))
    return out, torch.logaddexp(lse, other_lse)


@_extended_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, k_more: Tensor, v_more: Tensor, fixed: bool) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


def _as_rows(x: Tensor, rows: int) -> Tensor:
    """[B, L, H, D] -> [rows, B L / rows, H, D]: rows that share their keys are one long row."""
    return x.reshape(rows, -1, *x.shape[2:])


def _lse_as_rows(lse: Tensor, rows: int) -> Tensor:
    """The same for log-sum-exps, and back: [B, H, L] -> [rows, H, B L / rows]."""
    return lse.transpose(1, 2).reshape(rows, -1, lse.shape[1]).transpose(1, 2).contiguous()


def _save_extended(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:-1], *output)


def _extended_gradients(ctx: Any, grad: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, k_more, v_more, out, lse = ctx.saved_tensors
    rows = len(k_more)
    further = (*(_as_rows(x, rows) for x in (grad, q)), k_more, None, v_more)
    dq, dk, dv = _attention_backward(grad, q, k, None, v, out, lse, None)
    dq_more, *more = _attention_backward(*further, _as_rows(out, rows), _lse_as_rows(lse, rows), None)
    return dq + dq_more.view(q.shape), dk, dv, *more, None


_extended_attention.register_autograd(_extended_gradients, setup_context=_save_extended)
