"""Two softmaxes joined to one in Triton, and their gradients: a read of each and a write.

PyTorch's operators make five copies of the softmaxes, and ten launches for the gradients of a pair.

Called inside an operator of its own (`stock`), hence no operator here.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 4096
"""Numbers of a head that a program takes: four 16-byte loads a thread and tensor. Never fewer than its
threads, since `out` is joined in place: of two warps with one number, one may read what the other wrote."""

JOINED = 2048
"""Numbers that a program joins of gradients: no fewer than its threads, for the same reason."""


def merge_(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """See `joins.merge_`. out and lse are contiguous."""
    rows, length, heads, dim = out.shape
    block_d = triton.next_power_of_2(dim)
    block_l = ELEMENTS // block_d
    other, other_lse, joined = other.contiguous(), other_lse.contiguous(), torch.empty_like(lse)
    with torch.cuda.device_of(out):
        join_kernel[(triton.cdiv(length, block_l), heads, rows)](
            out, lse, other, other_lse, joined, length, dim,
            H=heads, BLOCK_L=block_l, BLOCK_D=block_d, enable_fp_fusion=True,
        )  # fmt: skip
    lse.copy_(joined)


@triton.jit(do_not_specialize=["length"])
def join_kernel(
    out, lse, other, other_lse, joined, length, dim,
    H: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head, row = tl.program_id(1), tl.program_id(2)
    tokens = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    exists = tokens < length
    lines = (tl.cast(row, tl.int64) * H + head) * length + tokens
    a = tl.load(lse + lines, mask=exists, other=0.0)
    b = tl.load(other_lse + lines, mask=exists, other=0.0)
    largest = tl.maximum(a, b)
    # Not in place: every warp reads the sums of all tokens, and none waits for the others to have read them.
    tl.store(joined + lines, largest + tl.log(tl.exp(a - largest) + tl.exp(b - largest)), mask=exists)
    columns = tl.arange(0, BLOCK_D)
    at = ((tl.cast(row, tl.int64) * length + tokens) * H + head)[:, None] * dim + columns[None, :]
    here = exists[:, None] & (columns < dim)[None, :]
    x = tl.load(out + at, mask=here, other=0.0).to(tl.float32)
    y = tl.load(other + at, mask=here, other=0.0).to(tl.float32)
    merged = x + tl.sigmoid(b - a)[:, None] * (y - x)
    tl.store(out + at, merged.to(out.dtype.element_ty), mask=here)


def join_gradients_(
    dq: Tensor, dq_rows: Tensor, dk: Tensor, dv: Tensor, dq_more: Tensor, dk_more: Tensor, dv_more: Tensor
) -> None:
    """See `joins.join_gradients`, for a pivot and its targets, which follow it. All contiguous.

    dq [L, H, D] is written; dq_rows, dk, dv [1 + T, L, H, D], of which the pivot's dk and the targets' dv are
    brought to their sums; dq_more, dk_more, dv_more [T, L, H, D].
    """
    size = dq.numel()
    with torch.cuda.device_of(dq):
        gradients_kernel[(triton.cdiv(size, JOINED),)](
            dq, dq_rows, dk, dv, dq_more, dk_more, dv_more, size,
            TARGETS=len(dq_more), BLOCK=JOINED, enable_fp_fusion=True,
        )  # fmt: skip


@triton.jit(do_not_specialize=["size"])
def gradients_kernel(
    dq, dq_rows, dk, dv, dq_more, dk_more, dv_more, size, TARGETS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    at = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = at < size
    query = tl.load(dq_rows + at, mask=here, other=0.0).to(tl.float32)
    key = tl.load(dk + at, mask=here, other=0.0).to(tl.float32)
    row = at
    for _ in tl.static_range(TARGETS):
        query += tl.load(dq_more + row, mask=here, other=0.0).to(tl.float32)
        key += tl.load(dk_more + row, mask=here, other=0.0).to(tl.float32)
        value = tl.load(dv_more + row, mask=here, other=0.0).to(tl.float32)
        row += size  # rows of targets come after the pivot's
        query += tl.load(dq_rows + row, mask=here, other=0.0).to(tl.float32)
        value += tl.load(dv + row, mask=here, other=0.0).to(tl.float32)
        tl.store(dv + row, value.to(dv.dtype.element_ty), mask=here)
    tl.store(dq + at, query.to(dq.dtype.element_ty), mask=here)
    if TARGETS > 0:
        tl.store(dk + at, key.to(dk.dtype.element_ty), mask=here)
