"""Forward attention in Triton: plain rows, targets on a pivot, and a pivot together with its first target.

For a target row t on pivot p, with E_t = exp(q_p k_t^T / sqrt D) and E_p = exp(q_p k_p^T / sqrt D):

    out_t = (E_t + E_p) v_t / (rowsum E_t + rowsum E_p)        out_p = E_p v_p / rowsum E_p

so a target takes three L x L x D products rather than the four of doubled keys and values, and a program that
does both rows (a pair) takes four for two rows, with E_p made once.

B rows, L tokens, H heads, D head dim. Tensors are [B, L, H, D] with any strides but a contiguous last dim.
Scores are kept in powers of two: log2(e) / sqrt(D) is one factor, folded into the exponent.

With a running maximum the largest weight of a line is exactly 1; with a fixed offset it is rounded to 16 bits
like any other, while the sum that divides it is not. Where it dominates, that is the larger error: 1.03 times
a running maximum's for normal scores of standard deviation 1, 1.3 times for 3 (bfloat16, L 1536).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

PLAIN: tl.constexpr = tl.constexpr(0)
TARGET: tl.constexpr = tl.constexpr(1)
PAIR: tl.constexpr = tl.constexpr(2)
MIXED: tl.constexpr = tl.constexpr(3)
"""All three forms in one launch."""
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
ROW_BITS: tl.constexpr = tl.constexpr(20)
ROW_MASK: tl.constexpr = tl.constexpr((1 << 20) - 1)


class Strides(NamedTuple):
    """Elements from one row, token and head of a [B, L, H, D] to the next."""

    row: int
    token: int
    head: int


class Sizes(NamedTuple):
    len_q: int
    len_k: int
    num_heads: int


class Results(NamedTuple):
    """What a launch writes, and the bias that it adds on the way."""

    out: Tensor
    """[B, Lq, H, D]"""
    lse: Tensor
    """[B, H, Lq]"""
    value_bias: Tensor
    """[B, H, D]; any tensor without HAS_BIAS."""
    part_out: Tensor
    """[lines, D] of float32: tiles that cover a part of the keys; any tensor where none does."""
    part_lse: Tensor
    """[lines], in powers of two."""


@triton.jit
def load_tile(src, row, head, start, length, stride, BLOCK: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr):
    """src[row, start : start + BLOCK, head] as [BLOCK, D]; zero from `length` on.

    src is a descriptor over [B, H, L, D] (TMA) or a pointer to [B, L, H, D] with `Strides`.
    """
    if TMA:
        tile = src.load([row, head, start, 0]).reshape(BLOCK, D)
    else:
        tokens = tl.arange(0, BLOCK)
        # 64 bits up to the tile, 32 within it.
        base = tl.cast(row, tl.int64) * stride.row + tl.cast(head, tl.int64) * stride.head
        base += tl.cast(start, tl.int64) * stride.token
        tile = tl.load(
            src + base + tokens[:, None] * stride.token + tl.arange(0, D)[None, :],
            mask=(start + tokens < length)[:, None],
            other=0.0,
        )
    return tile


@triton.jit
def pick_job(job, jobs):
    """(query row, pivot row, own row) of a job. Arguments: a launch copies no list to the GPU.

    `launch.pack` is the other way round.
    """
    packed = jobs[0]
    for i in tl.static_range(1, 8):
        packed = tl.where(job == i, jobs[i], packed)
    q_row = ((packed >> 1) & ROW_MASK).to(tl.int32)
    pivot_row = ((packed >> (1 + ROW_BITS)) & ROW_MASK).to(tl.int32)
    row = ((packed >> (1 + 2 * ROW_BITS)) & ROW_MASK).to(tl.int32)
    return q_row, pivot_row, row


INTERPRETED = not isinstance(pick_job, triton.JITFunction)
"""Whether this process imitates the kernels on the CPU (TRITON_INTERPRET=1 when triton was imported)."""
PACKED: tl.constexpr = tl.constexpr(not INTERPRETED and torch.version.hip is None)
"""Whether an instruction of NVIDIA's narrows two numbers at once."""


@triton.jit
def _write(
    acc, lse_2, results, row, head, start_m, len_q, num_heads,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Finished values [BLOCK_M, D] and log2-sum-exps [BLOCK_M] into contiguous out and lse."""
    tokens = start_m + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, D)
    row_64 = tl.cast(row, tl.int64)
    if HAS_BIAS:
        bias = tl.load(results.value_bias + (row_64 * num_heads + head) * D + dims)
        acc += bias.to(tl.float32)[None, :]
    offsets = ((row_64 * len_q + tokens) * num_heads + head)[:, None] * D + dims[None, :]
    tl.store(results.out + offsets, acc.to(results.out.dtype.element_ty), mask=(tokens < len_q)[:, None])
    tl.store(results.lse + (row_64 * num_heads + head) * len_q + tokens, lse_2 * LN_2, mask=tokens < len_q)


@triton.jit
def _finish(
    acc, m, total, results, row, head, start_m, slot, is_whole, len_q, num_heads,
    HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Normalise a tile, then write it, or park it in its slot when it covers a part of the keys only."""
    acc = acc / total[:, None]
    lse_2 = m + tl.log2(total)
    if SPLIT:
        if is_whole:
            _write(acc, lse_2, results, row, head, start_m, len_q, num_heads, HAS_BIAS, BLOCK_M, D)
        else:
            lines = tl.cast(slot, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
            tl.store(results.part_out + lines[:, None] * D + tl.arange(0, D)[None, :], acc)
            tl.store(results.part_lse + lines, lse_2)
    else:
        _write(acc, lse_2, results, row, head, start_m, len_q, num_heads, HAS_BIAS, BLOCK_M, D)


@triton.jit
def _narrow(p, dtype: tl.constexpr):
    """p in 16 bits, two to an instruction: one by one they go through the unit that takes exponentials."""
    if PACKED and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [p], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    elif PACKED:
        return tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [p], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        return p.to(dtype)


@triton.jit
def _tile(
    q, k, k_pivot, v, results, strides, rows, start_m, keys, part, sizes, scale_log2,
    KIND: tl.constexpr, FIXED: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr,
    SPLIT: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head against some keys. What ends in _p belongs to the pivot's keys.

    rows: the queries', the pivot's and its own, then the head. keys: the first, and the one after the last.
    part: its slot, how many slots there are, and whether the tile is a whole one after all.
    """
    stride_q, stride_k, stride_kp, stride_v = strides
    q_row, pivot_row, row, head = rows
    begin, end = keys
    slot, num_slots, is_whole = part
    len_q, len_k, num_heads = sizes
    q_tile = load_tile(q, q_row, head, start_m, len_q, stride_q, BLOCK_M, D, TMA)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    # With a fixed offset m stays at that offset: zero.
    m = tl.zeros([BLOCK_M], tl.float32)
    if not FIXED:
        m += float("-inf")
    if KIND == PAIR:
        acc_p = tl.zeros([BLOCK_M, D], tl.float32)
        total_p = tl.zeros([BLOCK_M], tl.float32)
        m_p = m

    for start in tl.range(begin, end, BLOCK_N):
        if KIND != PLAIN:
            k_tile_p = load_tile(k_pivot, pivot_row, head, start, len_k, stride_kp, BLOCK_N, D, TMA)
            s_p = tl.dot(q_tile, tl.trans(k_tile_p))
        k_tile = load_tile(k, row, head, start, len_k, stride_k, BLOCK_N, D, TMA)
        s = tl.dot(q_tile, tl.trans(k_tile))
        if not EVEN_K:
            # Every block holds at least one key, so no line is all -inf.
            exists = (start + tl.arange(0, BLOCK_N) < len_k)[None, :]
            s = tl.where(exists, s, float("-inf"))
            if KIND != PLAIN:
                s_p = tl.where(exists, s_p, float("-inf"))

        if FIXED:
            p = tl.exp2(s * scale_log2)
            if KIND != PLAIN:
                p_p = tl.exp2(s_p * scale_log2)
                p += p_p
        else:
            m_old = m
            if KIND == PLAIN:
                m = tl.maximum(m, tl.max(s, 1) * scale_log2)
            if KIND == TARGET:
                m = tl.maximum(m, tl.max(tl.maximum(s, s_p), 1) * scale_log2)
            if KIND == PAIR:
                m_p_old = m_p
                m_p = tl.maximum(m_p, tl.max(s_p, 1) * scale_log2)
                m = tl.maximum(m, tl.maximum(m_p, tl.max(s, 1) * scale_log2))
            p = tl.exp2(s * scale_log2 - m[:, None])
            if KIND == TARGET:
                p += tl.exp2(s_p * scale_log2 - m[:, None])
            if KIND == PAIR:
                p_p = tl.exp2(s_p * scale_log2 - m_p[:, None])
                # From the pivot's maximum to the target's, which is never smaller: one factor a line.
                p += p_p * tl.exp2(m_p - m)[:, None]
                fade_p = tl.exp2(m_p_old - m_p)
                total_p *= fade_p
                acc_p *= fade_p[:, None]
            fade = tl.exp2(m_old - m)
            total *= fade
            acc *= fade[:, None]

        if KIND == PAIR:
            v_tile_p = load_tile(v, pivot_row, head, start, len_k, stride_v, BLOCK_N, D, TMA)
            weights_p = _narrow(p_p, v_tile_p.dtype)
            total_p += tl.sum(p_p, 1)
            acc_p = tl.dot(weights_p, v_tile_p, acc_p)
        v_tile = load_tile(v, row, head, start, len_k, stride_v, BLOCK_N, D, TMA)
        weights = _narrow(p, v_tile.dtype)
        total += tl.sum(p, 1)
        acc = tl.dot(weights, v_tile, acc)

    if KIND == PAIR:
        _finish(
            acc_p, m_p, total_p, results, pivot_row, head, start_m, slot + num_slots, is_whole,
            len_q, num_heads, HAS_BIAS, SPLIT, BLOCK_M, D,
        )  # fmt: skip
    _finish(
        acc, m, total, results, row, head, start_m, slot, is_whole,
        len_q, num_heads, HAS_BIAS, SPLIT, BLOCK_M, D,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_pairs", "num_targets", "num_whole", "num_parts", "num_slots"])
def forward_kernel(
    q, k, k_pivot, v, results, strides, jobs, num_pairs, num_targets, sizes, scale_log2,
    num_whole, num_parts, num_slots,
    KIND: tl.constexpr, MAPPED: tl.constexpr, FIXED: tl.constexpr, HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr, SPLIT: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One tile, or one part of the keys of one of the last tiles. Jobs lie pairs first: longest first."""
    program = tl.program_id(0)
    tile, slot = program, program - num_whole
    begin, end = 0, sizes.len_k
    is_whole = program < num_whole
    if SPLIT:
        tile = tl.where(is_whole, program, num_whole + slot // num_parts)
        part, blocks = slot % num_parts, tl.cdiv(sizes.len_k, BLOCK_N)
        begin = tl.where(is_whole, 0, part * blocks // num_parts * BLOCK_N)
        last = tl.minimum((part + 1) * blocks // num_parts * BLOCK_N, sizes.len_k)
        end = tl.where(is_whole, sizes.len_k, last)

    num_m = tl.cdiv(sizes.len_q, BLOCK_M)
    start_m = tile % num_m * BLOCK_M
    head = tile // num_m % sizes.num_heads
    job = tile // num_m // sizes.num_heads
    q_row, pivot_row, row = job, job, job
    if MAPPED:
        q_row, pivot_row, row = pick_job(job, jobs)

    rows, part = (q_row, pivot_row, row, head), (slot, num_slots, is_whole)
    work = (results, strides, rows, start_m, (begin, end), part, sizes, scale_log2)
    if KIND != MIXED:
        _tile(q, k, k_pivot, v, *work, KIND, FIXED, HAS_BIAS, EVEN_K, SPLIT, TMA, BLOCK_M, BLOCK_N, D)
    elif job < num_pairs:
        _tile(q, k, k_pivot, v, *work, PAIR, FIXED, HAS_BIAS, EVEN_K, SPLIT, TMA, BLOCK_M, BLOCK_N, D)
    elif job < num_pairs + num_targets:
        _tile(q, k, k_pivot, v, *work, TARGET, FIXED, HAS_BIAS, EVEN_K, SPLIT, TMA, BLOCK_M, BLOCK_N, D)
    else:
        _tile(q, k, k_pivot, v, *work, PLAIN, FIXED, HAS_BIAS, EVEN_K, SPLIT, TMA, BLOCK_M, BLOCK_N, D)


@triton.jit(do_not_specialize=["num_pairs", "num_whole", "num_parts", "num_slots"])
def merge_kernel(
    results, jobs, num_pairs, len_q, num_heads, num_whole, num_parts, num_slots,
    MAPPED: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Join the parts of one split tile, always in the same order. Axis 1: own rows, then pivots of pairs."""
    tile = num_whole + tl.program_id(0)
    num_m = tl.cdiv(len_q, BLOCK_M)
    start_m = tile % num_m * BLOCK_M
    head = tile // num_m % num_heads
    job = tile // num_m // num_heads
    is_pivot = tl.program_id(1)
    if (is_pivot == 0) | (job < num_pairs):
        pivot_row, row = job, job
        if MAPPED:
            _, pivot_row, row = pick_job(job, jobs)
        acc = tl.zeros([BLOCK_M, D], tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        first = tl.program_id(0) * num_parts + is_pivot * num_slots
        for part in range(num_parts):
            lines = tl.cast(first + part, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
            part_m = tl.load(results.part_lse + lines)
            m_old = m
            m = tl.maximum(m, part_m)
            fade, weight = tl.exp2(m_old - m), tl.exp2(part_m - m)
            values = tl.load(results.part_out + lines[:, None] * D + tl.arange(0, D)[None, :])
            acc = acc * fade[:, None] + values * weight[:, None]
            total = total * fade + weight
        out_row = tl.where(is_pivot == 1, pivot_row, row)
        _write(
            acc / total[:, None], m + tl.log2(total), results, out_row, head, start_m,
            len_q, num_heads, HAS_BIAS, BLOCK_M, D,
        )  # fmt: skip
