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


def join_gradients(own: Sequence[Tensor], more: Sequence[Tensor], pivot_of: Sequence[int]) -> Tensor:
    """The gradient of the pivots' queries [P, L, H, D], where rows and targets had calls of their own.

    own: gradients of q (a query a row), k and v [B, L, H, D], the last two contiguous and brought to their
    sums in place. more: the same of the targets [T, L, H, D], whose keys were their pivots'. What a pivot is
    to all its targets is summed in float32 before it is rounded.
    """
    (dq_rows, dk, dv), (dq_more, dk_more, dv_more) = own, more
    targets = [row for row, pivot in enumerate(pivot_of) if row != pivot]
    pivots = sorted(set(pivot_of))
    dq = dk.new_empty((len(pivots), *dk.shape[1:]))
    fused = dispatch.takes(*own, *more) and all(x.is_contiguous() for x in (*own, *more))
    for place, pivot in enumerate(pivots):
        rows = [row for row, one in enumerate(pivot_of) if one == pivot]
        those = [i for i, row in enumerate(targets) if pivot_of[row] == pivot]
        if fused and rows == list(range(pivot, pivot + len(rows))):
            from . import triton_joins

            mine, group, first = slice(pivot, pivot + len(rows)), len(rows) - 1, those[0] if those else 0
            other = (x[first : first + group] for x in more)
            triton_joins.join_gradients_(dq[place], dq_rows[mine], dk[mine], dv[mine], *other)
            continue
        total = sum_rows(dq_rows, rows)
        if those:
            total += sum_rows(dq_more, those)
            dk[pivot] = sum_rows(dk_more, those).add_(dk[pivot])
        dq[place] = total
        for i in those:
            dv[targets[i]].add_(dv_more[i])
    return dq


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
