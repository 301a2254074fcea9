"""What joins several calls of a kernel to one attention: rows of batches, sums over them, two softmaxes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import dispatch

MAX_ROWS = 16
"""Rows that are joined one by one; hundreds, as small models train on, are indexed."""


def take_rows(x: Tensor, rows: Sequence[int]) -> Tensor:
    """x[rows], as a view where the rows are one row repeated or a contiguous run (every inference batch).

    A few others are joined: an index comes from the host, and a CUDA graph cannot hold one.
    """
    if not rows:
        return x[:0]
    first, count = rows[0], len(rows)
    if all(row == first for row in rows):
        return x[first : first + 1].expand(count, *x.shape[1:])
    if list(rows) == list(range(first, first + count)):
        return x[first : first + count]
    return torch.cat([x[row : row + 1] for row in rows]) if count <= MAX_ROWS else x[list(rows)]


def runs(rows: Sequence[int]) -> list[tuple[slice, slice]]:
    """Rows in runs that follow one another: where each lies among `rows`, and which rows it is."""
    starts = [i for i, row in enumerate(rows) if i == 0 or row != rows[i - 1] + 1]
    return [
        (slice(i, j), slice(rows[i], rows[i] + j - i)) for i, j in itertools.pairwise([*starts, len(rows)])
    ]


def sum_rows(x: Tensor, rows: Sequence[int]) -> Tensor:
    """x[rows].sum(0), in float32 if x has 16 bits."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    parts = [x[these].sum(0, dtype=dtype) for _, these in runs(rows)]
    return sum(parts[1:], parts[0])


def merge(own: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    """One softmax over two sets of keys, from values [B, L, H, D] and log-sum-exps [B, L, H] of each."""
    share = torch.sigmoid(other[1] - own[1])[..., None]
    return torch.lerp(own[0].to(share.dtype), other[0].to(share.dtype), share).to(own[0].dtype)


def merge_(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """`merge` in place, with the log-sum-exp of both sets: values [B, L, H, D] and log-sum-exps [B, H, L]."""
    if dispatch.takes(out, other):
        from . import triton_joins

        triton_joins.merge_(out, lse, other, other_lse)
        return
    out.copy_(merge((out, lse.transpose(1, 2)), (other, other_lse.transpose(1, 2))))
    torch.logaddexp(lse, other_lse, out=lse)
