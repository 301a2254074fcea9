"""Grounded attention with gradients, from PyTorch's kernels: two calls merged by their log-sum-exps, twice.

A target has two sets of keys. Forward, each set is one call of a stock kernel and `joins.merge_` makes one
softmax of both. Backward, a stock kernel makes probabilities again from the log-sum-exp that it is given:
with the merged one, and the merged output, its gradients are exactly those of its own share of the softmax.
So neither keys nor values are ever concatenated, nor saved twice, and a call has as many keys as queries,
which cuDNN's backward pass insists on. (The same identity carries ring attention: Liu et al. 2023.)

For compilers it is one custom operator and its gradient, one node. Without one the same functions are called
directly: the kernels of a pair of 1,536 tokens are faster than a host that calls operators in Python.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import tiles
from .joins import MAX_ROWS, join_gradients, merge_, runs, take_rows

HALF = (torch.bfloat16, torch.float16)
CUDNN_FORWARD = frozenset({(8, 6), (8, 9), (10, 0)})
"""Compute capabilities, beside Hopper's, whose fastest forward pass is cuDNN's. We never ran them; published
are cuDNN against flash 62 : 51 TFLOP/s on sm_86, 106 : 86 on sm_89, 135 : 136 on sm_80 (pytorch #192799), 1.2
to 2.0 times FlashAttention 4 on sm_100 (sglang #33655), 0.88 times flash on sm_120 (transformers #48163)."""


def takes(q: Tensor) -> bool:
    """Whether there is a stock kernel, with a backward pass, for q [B, L, H, D] on its device."""
    if q.device.type == "cpu":
        return True
    if q.device.type != "cuda" or q.shape[-1] % 8 or q.shape[-1] > 128:
        return False
    return (
        q.dtype == torch.float32 or q.dtype in HALF and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


def takes_rows(q: Tensor, pivot_of: Sequence[int]) -> bool:
    """`takes`, for few enough rows: gradients of targets and pivots are joined row by row."""
    return takes(q) and len(pivot_of) <= MAX_ROWS


def is_fastest(q: Tensor) -> bool:
    """Whether to use it for plain rows too: PyTorch by itself does not choose cuDNN, which is 1.4 to 1.7
    times as fast on Hopper (benchmarks/results/train_attention.json)."""
    return takes(q) and _kernel(q) == "cudnn"


def grounded_attention(q: Tensor, k: Tensor, v: Tensor, pivot_of: Sequence[int]) -> Tensor:
    """Shapes and meaning as `reference.grounded_attention`; rows that name themselves attend plainly."""
    if torch.compiler.is_compiling() or type(q) is not Tensor:
        return _grounded(q, k, v, list(pivot_of))[0]
    return _Direct.apply(q, k, v, list(pivot_of))  # type: ignore[no-any-return]


def _kernel(q: Tensor) -> str:
    if q.device.type == "cpu":
        return "cpu"
    if q.dtype == torch.float32:
        return "efficient"
    return "cudnn" if tiles.device(q.device).family == tiles.HOPPER else "flash"


def fastest_forward(q: Tensor, k: Tensor, v: Tensor) -> str:
    """The kernel for q, k and v [B, L, H, D] where no backward pass follows.

    On cards that we did not run, cuDNN's only where PyTorch says that it takes them: else the usual one.
    """
    kernel = _kernel(q)
    if kernel != "flash" or torch.version.hip is not None:  # AMD counts in other numbers
        return kernel
    if torch.cuda.get_device_capability(q.device) not in CUDNN_FORWARD:
        return kernel
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    asked = torch.backends.cuda.SDPAParams(heads[0], heads[1], heads[2], None, 0.0, False, False)
    return "cudnn" if torch.backends.cuda.can_use_cudnn_attention(asked) else kernel


def with_lse(q: Tensor, k: Tensor, v: Tensor, kernel: str | None = None) -> tuple[Tensor, Tensor]:
    """Attention [B, L, H, D] and the log-sum-exp of its scaled scores [B, H, L] float32. No gradients.

    kernel: None is the one whose backward pass can follow.
    """
    args, kernel = [x.transpose(1, 2) for x in (q, k, v)], kernel or _kernel(q)
    if kernel == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args)
    elif kernel == "efficient":
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(*args, None, True)
    elif kernel == "cudnn":
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(*args, None, True)
    else:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(*args)
    # cuDNN adds a dim, and some kernels pad to a multiple of their tile.
    lse = lse.reshape(*args[0].shape[:2], -1)[..., : q.shape[1]]
    return out.transpose(1, 2), lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, where out and lse [B, H, L] may be those of a softmax over further keys."""
    args, kernel = [x.transpose(1, 2) for x in (grad, q, k, v, out)], _kernel(q)
    if kernel == "cpu":
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*args, lse, 0.0, False)
    else:
        # No dropout, hence no seed; cuDNN wants one on the device all the same.
        length, none = q.shape[1], torch.zeros((), dtype=torch.int64, device=q.device)
        if kernel == "efficient":
            # Padded to 32, where probabilities are exp(-inf).
            lse = torch.nn.functional.pad(lse, (0, -length % 32), value=float("inf"))
            op = torch.ops.aten._scaled_dot_product_efficient_attention_backward
            mask = [True, True, True, False]
            *grads, _ = op(*args[:4], None, args[4], lse, none, none, 0.0, mask)
        elif kernel == "cudnn":
            op, lse = torch.ops.aten._scaled_dot_product_cudnn_attention_backward, lse.contiguous()[..., None]
            grads = op(*args, lse, none, none, None, None, None, length, k.shape[1], 0.0, False)
        else:
            op, lse = torch.ops.aten._scaled_dot_product_flash_attention_backward, lse.contiguous()
            grads = op(*args, lse, None, None, length, k.shape[1], 0.0, False, none, none)
    dq, dk, dv = (x.transpose(1, 2) for x in grads)
    return dq, dk, dv


def _plan(pivot_of: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """For each row the query it takes; the rows that are targets, and their pivots."""
    pivots = sorted(set(pivot_of))
    targets = [row for row, pivot in enumerate(pivot_of) if row != pivot]
    return [pivots.index(p) for p in pivot_of], targets, [pivot_of[row] for row in targets]


def _forward(q: Tensor, k: Tensor, v: Tensor, pivot_of: list[int]) -> tuple[Tensor, Tensor]:
    """Values [B, L, H, D] and log-sum-exps [B, H, L] of whole softmaxes, which carry no gradient."""
    query_of, targets, pivots = _plan(pivot_of)
    queries = take_rows(q, query_of)
    out, lse = with_lse(queries, k, v)
    out, lse = out.contiguous(), lse.contiguous()
    if targets:
        queries, values = take_rows(queries, targets), take_rows(v, targets)
        other, other_lse = with_lse(queries, take_rows(k, pivots), values)
        for these, rows in runs(targets):
            merge_(out[rows], lse[rows], other[these], other_lse[these])
    return out, lse


_grounded = torch.library.custom_op("bokehflux::stock_grounded_attention", _forward, mutates_args=())


@_grounded.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, pivot_of: list[int]) -> tuple[Tensor, Tensor]:
    rows, length, heads, _ = v.shape
    return v.new_empty(v.shape), v.new_empty((rows, heads, length), dtype=_lse_dtype(v))


def _lse_dtype(v: Tensor) -> torch.dtype:
    return torch.float64 if v.dtype == torch.float64 else torch.float32


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pivot_of: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    query_of, targets, pivots = _plan(pivot_of)
    grad, queries = grad.contiguous(), take_rows(q, query_of)
    dq_rows, dk, dv = backward(grad, queries, k, v, out, lse)
    dk, dv = dk.contiguous(), dv.contiguous()
    if not targets:
        return dq_rows.contiguous(), dk, dv
    args = [take_rows(x, targets) for x in (v, out, lse)]
    dq_more, dk_more, dv_more = backward(
        take_rows(grad, targets), take_rows(queries, targets), take_rows(k, pivots), *args
    )
    return join_gradients((dq_rows, dk, dv), (dq_more, dk_more, dv_more), pivot_of), dk, dv


_grounded_backward = torch.library.custom_op(
    "bokehflux::stock_grounded_attention_backward", _backward, mutates_args=()
)


@_grounded_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pivot_of: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, list[int]], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.pivot_of = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output)


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return *_grounded_backward(grad, *ctx.saved_tensors, ctx.pivot_of), None


_grounded.register_autograd(_gradients, setup_context=_save)


class _Direct(torch.autograd.Function):
    """`_grounded` without an operator's overhead."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, pivot_of: list[int]) -> Tensor:
        ctx.pivot_of = pivot_of
        out, lse = _forward(q, k, v, pivot_of)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        q, k, v, out, lse = ctx.saved_tensors
        return *_backward(grad, q, k, v, out, lse, ctx.pivot_of), None


def _flops(products: int) -> Any:
    """So many L x L x D products a call."""

    def formula(*shapes: Any, out_shape: Any = None, **_: Any) -> int:
        rows, length, heads, dim = next(s for s in shapes[::-1] if isinstance(s, torch.Size) and len(s) == 4)
        calls = rows + sum(row != pivot for row, pivot in enumerate(shapes[-1]))
        return products * 2 * calls * heads * length**2 * dim

    return formula


@functools.cache
def register_flops() -> None:
    """Tell PyTorch how much work a call is: its compiler weighs that against memory."""
    from torch.utils.flop_counter import register_flop_formula  # imports triton

    register_flop_formula(torch.ops.bokehflux.stock_grounded_attention)(_flops(2))
    register_flop_formula(torch.ops.bokehflux.stock_grounded_attention_backward)(_flops(5))
