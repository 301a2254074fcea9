"""Two softmaxes joined to one in Triton: a read of each and a write. PyTorch's operators make five copies.

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
