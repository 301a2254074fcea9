"""Our kernels as PyTorch operators: backend `triton`.

Each form is a custom operator with a fake implementation and a gradient, so `torch.compile` and CUDA graphs
take it as one opaque node. Importing this module imports triton.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import launch, select
from .jobs import grounded_jobs, target_jobs

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
    return _add(_attention(q, k, v, fused, fixed)[0], added)


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
    return _add(_target_attention(q, k_pivot, k, v, list(pivot_index), fused, fixed)[0], added)


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
    return _add(_grounded_attention(q, k, v, list(pivot_of), fused, fixed)[0], added)


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
    tensors = inputs if value_bias is None else (*inputs, value_bias)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return None, value_bias, False
    return value_bias, None, is_bounded(logit_bound, inputs[0].dtype)


def _add(out: Tensor, value_bias: Tensor | None) -> Tensor:
    return out if value_bias is None else out + value_bias[:, None].to(out.dtype)


def _check(q: Tensor, *others: Tensor) -> None:
    reason = select.why_not_triton(q.device, q.dtype, q.shape[-1])
    if reason is None and any((x.dtype, x.device) != (q.dtype, q.device) for x in others):
        reason = f"all of q, k, v must be {q.dtype} on {q.device}"
    if reason is not None:
        raise ValueError(f"the Triton attention kernels cannot run: {reason}")


# Each operator gives beside its values the log-sum-exps of its scores, [B, H, Lq] float32, from which the
# backward pass starts. They carry no gradient.


@torch.library.custom_op(
    "bokehflux::attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? value_bias, bool fixed) -> (Tensor, Tensor)",
)
def _attention(
    q: Tensor, k: Tensor, v: Tensor, value_bias: Tensor | None, fixed: bool
) -> tuple[Tensor, Tensor]:
    _check(q, k, v)
    with torch.cuda.device_of(q):
        return launch.forward(q, k, None, v, value_bias, None, fixed=fixed)


@torch.library.custom_op(
    "bokehflux::target_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k_pivot, Tensor k, Tensor v, int[] pivot_index, Tensor? value_bias, bool fixed)"
    " -> (Tensor, Tensor)",
)
def _target_attention(
    q: Tensor,
    k_pivot: Tensor,
    k: Tensor,
    v: Tensor,
    pivot_index: Sequence[int],
    value_bias: Tensor | None,
    fixed: bool,
) -> tuple[Tensor, Tensor]:
    _check(q, k_pivot, k, v)
    with torch.cuda.device_of(q):
        return launch.forward(q, k, k_pivot, v, value_bias, target_jobs(tuple(pivot_index)), fixed=fixed)


@torch.library.custom_op(
    "bokehflux::grounded_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, int[] pivot_of, Tensor? value_bias, bool fixed)"
    " -> (Tensor, Tensor)",
)
def _grounded_attention(
    q: Tensor, k: Tensor, v: Tensor, pivot_of: Sequence[int], value_bias: Tensor | None, fixed: bool
) -> tuple[Tensor, Tensor]:
    _check(q, k, v)
    with torch.cuda.device_of(q):
        return launch.forward(q, k, None, v, value_bias, grounded_jobs(tuple(pivot_of)), fixed=fixed)


def _like_forward(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    rows, length = v.shape[0], q.shape[1]
    out = q.new_empty((rows, length, *v.shape[2:]))
    return out, q.new_empty((rows, v.shape[2], length), dtype=torch.float32)


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, value_bias: Tensor | None, fixed: bool) -> tuple[Tensor, Tensor]:
    return _like_forward(q, v)


@_target_attention.register_fake
def _(
    q: Tensor,
    k_pivot: Tensor,
    k: Tensor,
    v: Tensor,
    pivot_index: Sequence[int],
    value_bias: Tensor | None,
    fixed: bool,
) -> tuple[Tensor, Tensor]:
    return _like_forward(q, v)


@_grounded_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, pivot_of: Sequence[int], value_bias: Tensor | None, fixed: bool
) -> tuple[Tensor, Tensor]:
    return _like_forward(q, v)


# One backward operator for all forms: k_pivot and the list of pivots say which.


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
    """Gradients of q, k, v and, where there is one, k_pivot. pivots: the list of the forward call."""
    jobs = None
    if pivots is not None:
        jobs = (grounded_jobs if k_pivot is None else target_jobs)(tuple(pivots))
    with torch.cuda.device_of(q):
        dq, dk, dk_pivot, dv = launch.backward(grad, q, k, k_pivot, v, out, lse, jobs)
    return [dq, dk, dv] if dk_pivot is None else [dq, dk, dv, dk_pivot]


@_attention_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    k_pivot: Tensor | None,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    pivots: Sequence[int] | None,
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (q, k, v, k_pivot) if x is not None]


def _save(
    ctx: Any,
    q: Tensor,
    k: Tensor,
    k_pivot: Tensor | None,
    v: Tensor,
    value_bias: Tensor | None,
    pivots: Sequence[int] | None,
    output: tuple[Tensor, Tensor],
) -> None:
    if value_bias is not None:
        raise RuntimeError("operators with a value bias have no gradient: call this module's functions")
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, k_pivot, v, out, lse)
    ctx.pivots = pivots


def _gradients(ctx: Any, grad: Tensor) -> list[Tensor]:
    q, k, k_pivot, v, out, lse = ctx.saved_tensors
    return _attention_backward(grad, q, k, k_pivot, v, out, lse, ctx.pivots)


def _setup_attention(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, value_bias, _ = inputs
    _save(ctx, q, k, None, v, value_bias, None, output)


def _backward_attention(ctx: Any, grad: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk, dv = _gradients(ctx, grad)
    return dq, dk, dv, None, None


def _setup_target(ctx: Any, inputs: Any, output: Any) -> None:
    q, k_pivot, k, v, pivot_index, value_bias, _ = inputs
    _save(ctx, q, k, k_pivot, v, value_bias, pivot_index, output)


def _backward_target(ctx: Any, grad: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk, dv, dk_pivot = _gradients(ctx, grad)
    return dq, dk_pivot, dk, dv, None, None, None


def _setup_grounded(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, pivot_of, value_bias, _ = inputs
    _save(ctx, q, k, None, v, value_bias, pivot_of, output)


def _backward_grounded(ctx: Any, grad: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk, dv = _gradients(ctx, grad)
    return dq, dk, dv, None, None, None


_attention.register_autograd(_backward_attention, setup_context=_setup_attention)
_target_attention.register_autograd(_backward_target, setup_context=_setup_target)
_grounded_attention.register_autograd(_backward_grounded, setup_context=_setup_grounded)
