"""Forward attention in Triton: plain rows, targets on a pivot, and a pivot together with its first target.

For a target row t on pivot p, with E_t = exp(q_p k_t^T / sqrt D) and E_p = exp(q_p k_p^T / sqrt D):

    out_t = (E_t + E_p) v_t / (rowsum E_t + rowsum E_p)        out_p = E_p v_p / rowsum E_p

so a target takes three L x L x D products rather than the four of doubled keys and values, and a program that
does both rows (a pair) takes four for two rows, with E_p made once.

B rows, L tokens, H heads, D head dim. Tensors are [B, L, H, D] with any strides but a contiguous last dim.
Scores are kept in powers of two: log2(e) / sqrt(D) is one factor, folded into the exponent.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import tiles
from .tiles import Tile

PLAIN: tl.constexpr = tl.constexpr(0)
TARGET: tl.constexpr = tl.constexpr(1)
PAIR: tl.constexpr = tl.constexpr(2)
MIXED: tl.constexpr = tl.constexpr(3)
"""All three forms in one launch."""
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
ROW_BITS: tl.constexpr = tl.constexpr(20)
ROW_MASK: tl.constexpr = tl.constexpr((1 << 20) - 1)

logger = logging.getLogger(__name__)

GLUON_VERSIONS = ("3.6.",)
"""Versions of Triton for which `gluon_fwd` is written: Gluon is experimental there, its names still move."""
JOBS_PER_LAUNCH = 8
FORMS = {tiles.PLAIN: PLAIN.value, tiles.TARGET: TARGET.value, tiles.PAIR: PAIR.value}


@triton.jit
def load_tile(
    src, row, head, start, length, stride_row, stride_len, stride_head,
    BLOCK: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """src[row, start : start + BLOCK, head] as [BLOCK, D]; zero from `length` on.

    src is a descriptor over [B, H, L, D] (TMA) or a pointer to [B, L, H, D].
    """
    if TMA:
        tile = src.load([row, head, start, 0]).reshape(BLOCK, D)
    else:
        tokens = tl.arange(0, BLOCK)
        # 64 bits up to the tile, 32 within it.
        base = tl.cast(row, tl.int64) * stride_row + tl.cast(head, tl.int64) * stride_head
        base += tl.cast(start, tl.int64) * stride_len
        tile = tl.load(
            src + base + tokens[:, None] * stride_len + tl.arange(0, D)[None, :],
            mask=(start + tokens < length)[:, None],
            other=0.0,
        )
    return tile


@triton.jit
def pick_job(job, job_0, job_1, job_2, job_3, job_4, job_5, job_6, job_7):
    """(query row, pivot row, own row) of a job, see `pack`. Arguments: a launch copies no list to the GPU."""
    packed = job_0
    packed = tl.where(job == 1, job_1, packed)
    packed = tl.where(job == 2, job_2, packed)
    packed = tl.where(job == 3, job_3, packed)
    packed = tl.where(job == 4, job_4, packed)
    packed = tl.where(job == 5, job_5, packed)
    packed = tl.where(job == 6, job_6, packed)
    packed = tl.where(job == 7, job_7, packed)
    q_row = ((packed >> 1) & ROW_MASK).to(tl.int32)
    pivot_row = ((packed >> (1 + ROW_BITS)) & ROW_MASK).to(tl.int32)
    row = ((packed >> (1 + 2 * ROW_BITS)) & ROW_MASK).to(tl.int32)
    return q_row, pivot_row, row


INTERPRETED = not isinstance(pick_job, triton.JITFunction)
"""Whether this process imitates the kernels on the CPU (TRITON_INTERPRET=1 when triton was imported)."""
PACKED: tl.constexpr = tl.constexpr(not INTERPRETED)


@triton.jit
def _write(
    acc, lse_2, out, lse, value_bias, row, head, start_m, len_q, num_heads,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Finished values [BLOCK_M, D] and log2-sum-exps [BLOCK_M] into contiguous out and lse."""
    tokens = start_m + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, D)
    row_64 = tl.cast(row, tl.int64)
    if HAS_BIAS:
        bias = tl.load(value_bias + (row_64 * num_heads + head) * D + dims)
        acc += bias.to(tl.float32)[None, :]
    offsets = ((row_64 * len_q + tokens) * num_heads + head)[:, None] * D + dims[None, :]
    tl.store(out + offsets, acc.to(out.dtype.element_ty), mask=(tokens < len_q)[:, None])
    tl.store(lse + (row_64 * num_heads + head) * len_q + tokens, lse_2 * LN_2, mask=tokens < len_q)


@triton.jit
def _finish(
    acc, m, total, out, lse, value_bias, part_out, part_lse, row, head, start_m, slot, is_whole,
    len_q, num_heads,
    HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Normalise a tile, then write it, or park it in its slot when it covers a part of the keys only."""
    acc = acc / total[:, None]
    lse_2 = m + tl.log2(total)
    if SPLIT:
        if is_whole:
            _write(
                acc, lse_2, out, lse, value_bias, row, head, start_m, len_q, num_heads, HAS_BIAS, BLOCK_M, D
            )
        else:
            lines = tl.cast(slot, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
            tl.store(part_out + lines[:, None] * D + tl.arange(0, D)[None, :], acc)
            tl.store(part_lse + lines, lse_2)
    else:
        _write(acc, lse_2, out, lse, value_bias, row, head, start_m, len_q, num_heads, HAS_BIAS, BLOCK_M, D)


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
def _row_sums(p, weights, FIXED: tl.constexpr):
    """What values are divided by: sums of p, or with a fixed offset of its 16-bit form that weighted them.

    A running maximum makes the largest weight of a line exactly 1. Without one it is rounded like any other;
    where it dominates, dividing by the rounded sum takes that error out again (bfloat16, normal scores of
    standard deviation 3: error against float32 1.08 times that with a running maximum, otherwise 1.27).
    """
    if FIXED:
        p = weights.to(tl.float32)
    return tl.sum(p, 1)


@triton.jit
def _tile(
    q, k, k_pivot, v, out, lse, value_bias, part_out, part_lse,
    stride_q_row, stride_q_len, stride_q_head, stride_k_row, stride_k_len, stride_k_head,
    stride_kp_row, stride_kp_len, stride_kp_head, stride_v_row, stride_v_len, stride_v_head,
    q_row, pivot_row, row, head, start_m, begin, end, slot, num_slots, is_whole,
    len_q, len_k, num_heads, scale_log2,
    KIND: tl.constexpr, FIXED: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr,
    SPLIT: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head against keys begin .. end. What ends in _p belongs to the pivot's keys."""
    q_tile = load_tile(
        q, q_row, head, start_m, len_q, stride_q_row, stride_q_len, stride_q_head, BLOCK_M, D, TMA
    )
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
            k_tile_p = load_tile(
                k_pivot, pivot_row, head, start, len_k,
                stride_kp_row, stride_kp_len, stride_kp_head, BLOCK_N, D, TMA,
            )  # fmt: skip
            s_p = tl.dot(q_tile, tl.trans(k_tile_p))
        k_tile = load_tile(
            k, row, head, start, len_k, stride_k_row, stride_k_len, stride_k_head, BLOCK_N, D, TMA
        )
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
            v_tile_p = load_tile(
                v, pivot_row, head, start, len_k, stride_v_row, stride_v_len, stride_v_head, BLOCK_N, D, TMA
            )
            weights_p = _narrow(p_p, v_tile_p.dtype)
            total_p += _row_sums(p_p, weights_p, FIXED)
            acc_p = tl.dot(weights_p, v_tile_p, acc_p)
        v_tile = load_tile(
            v, row, head, start, len_k, stride_v_row, stride_v_len, stride_v_head, BLOCK_N, D, TMA
        )
        weights = _narrow(p, v_tile.dtype)
        total += _row_sums(p, weights, FIXED)
        acc = tl.dot(weights, v_tile, acc)

    if KIND == PAIR:
        _finish(
            acc_p, m_p, total_p, out, lse, value_bias, part_out, part_lse, pivot_row, head, start_m,
            slot + num_slots, is_whole, len_q, num_heads, HAS_BIAS, SPLIT, BLOCK_M, D,
        )  # fmt: skip
    _finish(
        acc, m, total, out, lse, value_bias, part_out, part_lse, row, head, start_m,
        slot, is_whole, len_q, num_heads, HAS_BIAS, SPLIT, BLOCK_M, D,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_pairs", "num_targets", "num_whole", "num_parts", "num_slots"])
def _forward_kernel(
    q, k, k_pivot, v, out, lse, value_bias, part_out, part_lse,
    stride_q_row, stride_q_len, stride_q_head, stride_k_row, stride_k_len, stride_k_head,
    stride_kp_row, stride_kp_len, stride_kp_head, stride_v_row, stride_v_len, stride_v_head,
    job_0, job_1, job_2, job_3, job_4, job_5, job_6, job_7, num_pairs, num_targets,
    len_q, len_k, num_heads, scale_log2, num_whole, num_parts, num_slots,
    KIND: tl.constexpr, MAPPED: tl.constexpr, FIXED: tl.constexpr, HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr, SPLIT: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One tile, or one part of the keys of one of the last tiles. Jobs lie pairs first: longest first."""
    program = tl.program_id(0)
    tile, slot = program, program - num_whole
    begin, end = 0, len_k
    is_whole = program < num_whole
    if SPLIT:
        tile = tl.where(is_whole, program, num_whole + slot // num_parts)
        part, blocks = slot % num_parts, tl.cdiv(len_k, BLOCK_N)
        begin = tl.where(is_whole, 0, part * blocks // num_parts * BLOCK_N)
        end = tl.where(is_whole, len_k, tl.minimum((part + 1) * blocks // num_parts * BLOCK_N, len_k))

    num_m = tl.cdiv(len_q, BLOCK_M)
    start_m = tile % num_m * BLOCK_M
    head = tile // num_m % num_heads
    job = tile // num_m // num_heads
    q_row, pivot_row, row = job, job, job
    if MAPPED:
        q_row, pivot_row, row = pick_job(job, job_0, job_1, job_2, job_3, job_4, job_5, job_6, job_7)

    if KIND != MIXED:
        _tile(
            q, k, k_pivot, v, out, lse, value_bias, part_out, part_lse,
            stride_q_row, stride_q_len, stride_q_head, stride_k_row, stride_k_len, stride_k_head,
            stride_kp_row, stride_kp_len, stride_kp_head, stride_v_row, stride_v_len, stride_v_head,
            q_row, pivot_row, row, head, start_m, begin, end, slot, num_slots, is_whole,
            len_q, len_k, num_heads, scale_log2,
            KIND, FIXED, HAS_BIAS, EVEN_K, SPLIT, TMA, BLOCK_M, BLOCK_N, D,
        )  # fmt: skip
    else:
        if job < num_pairs:
            _tile(
                q, k, k_pivot, v, out, lse, value_bias, part_out, part_lse,
                stride_q_row, stride_q_len, stride_q_head, stride_k_row, stride_k_len, stride_k_head,
                stride_kp_row, stride_kp_len, stride_kp_head, stride_v_row, stride_v_len, stride_v_head,
                q_row, pivot_row, row, head, start_m, begin, end, slot, num_slots, is_whole,
                len_q, len_k, num_heads, scale_log2,
                PAIR, FIXED, HAS_BIAS, EVEN_K, SPLIT, TMA, BLOCK_M, BLOCK_N, D,
            )  # fmt: skip
        elif job < num_pairs + num_targets:
            _tile(
                q, k, k_pivot, v, out, lse, value_bias, part_out, part_lse,
                stride_q_row, stride_q_len, stride_q_head, stride_k_row, stride_k_len, stride_k_head,
                stride_kp_row, stride_kp_len, stride_kp_head, stride_v_row, stride_v_len, stride_v_head,
                q_row, pivot_row, row, head, start_m, begin, end, slot, num_slots, is_whole,
                len_q, len_k, num_heads, scale_log2,
                TARGET, FIXED, HAS_BIAS, EVEN_K, SPLIT, TMA, BLOCK_M, BLOCK_N, D,
            )  # fmt: skip
        else:
            _tile(
                q, k, k_pivot, v, out, lse, value_bias, part_out, part_lse,
                stride_q_row, stride_q_len, stride_q_head, stride_k_row, stride_k_len, stride_k_head,
                stride_kp_row, stride_kp_len, stride_kp_head, stride_v_row, stride_v_len, stride_v_head,
                q_row, pivot_row, row, head, start_m, begin, end, slot, num_slots, is_whole,
                len_q, len_k, num_heads, scale_log2,
                PLAIN, FIXED, HAS_BIAS, EVEN_K, SPLIT, TMA, BLOCK_M, BLOCK_N, D,
            )  # fmt: skip


@triton.jit(do_not_specialize=["num_pairs", "num_whole", "num_parts", "num_slots"])
def _merge_kernel(
    out, lse, value_bias, part_out, part_lse,
    job_0, job_1, job_2, job_3, job_4, job_5, job_6, job_7, num_pairs,
    len_q, num_heads, num_whole, num_parts, num_slots,
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
            _, pivot_row, row = pick_job(job, job_0, job_1, job_2, job_3, job_4, job_5, job_6, job_7)
        acc = tl.zeros([BLOCK_M, D], tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        first = tl.program_id(0) * num_parts + is_pivot * num_slots
        for part in range(num_parts):
            lines = tl.cast(first + part, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
            part_m = tl.load(part_lse + lines)
            m_old = m
            m = tl.maximum(m, part_m)
            fade, weight = tl.exp2(m_old - m), tl.exp2(part_m - m)
            values = tl.load(part_out + lines[:, None] * D + tl.arange(0, D)[None, :])
            acc = acc * fade[:, None] + values * weight[:, None]
            total = total * fade + weight
        out_row = tl.where(is_pivot == 1, pivot_row, row)
        _write(
            acc / total[:, None], m + tl.log2(total), out, lse, value_bias, out_row, head, start_m,
            len_q, num_heads, HAS_BIAS, BLOCK_M, D,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Job:
    """One row of output, or the two of a pair."""

    form: str
    """`tiles.PLAIN`, `tiles.TARGET` or `tiles.PAIR`."""
    q_row: int
    """Row of q."""
    pivot_row: int
    """Row of k_pivot; for a pair also the pivot's row of v, out and lse."""
    row: int
    """Row of k, v, out and lse."""


def forward(
    q: Tensor,
    k: Tensor,
    k_pivot: Tensor | None,
    v: Tensor,
    value_bias: Tensor | None,
    jobs: Sequence[Job] | None,
    *,
    fixed: bool,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Values [B, Lq, H, D] in the dtype of q and log-sum-exps [B, H, Lq] in float32; B and the keys are v's.

    k_pivot: keys of pivots, None where they are rows of k. jobs: what to compute, each row of v once; None is
    every row by itself. fixed: no running maximum (see `ops.is_bounded`). tile: in place of the table's and
    `pick_language`'s choice, for sweeps and tests. Raises ValueError for a Gluon tile that cannot run here.
    """
    num_rows, len_k, num_heads, head_dim = v.shape
    len_q = q.shape[1]
    out = torch.empty(num_rows, len_q, num_heads, head_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(num_rows, num_heads, len_q, dtype=torch.float32, device=q.device)
    if value_bias is not None:
        value_bias = value_bias.contiguous()
    q, k, v = (last_contiguous(x) for x in (q, k, v))
    k_pivot = k if k_pivot is None else last_contiguous(k_pivot)
    language = pick_language((q, k, k_pivot, v), tile)
    for launch in _launches(jobs, language):
        _launch(q, k, k_pivot, v, value_bias, out, lse, launch, fixed, tile, language)
    return out, lse


@functools.cache
def why_no_gluon(family: str) -> str | None:
    """The reason why `gluon_fwd` cannot run on a family of devices, or None."""
    if family != tiles.HOPPER:
        return f"they are made for {tiles.HOPPER}, not {family}"
    if not triton.__version__.startswith(GLUON_VERSIONS):
        return f"they are made for Triton {' and '.join(GLUON_VERSIONS)}, not {triton.__version__}"
    return None


def pick_language(tensors: Sequence[Tensor], tile: Tile | None = None) -> str:
    """Gluon where it can run, unless a tile says otherwise. Raises ValueError where that cannot run."""
    reason = why_no_gluon(tiles.device(tensors[0].device).family)
    if reason is None and not all(_describable(x) for x in tensors):
        reason = "a tensor's address or strides are no multiples of 16 bytes, or rows repeat"
    if tile is not None:
        if tile.language == tiles.GLUON and reason is not None:
            raise ValueError(f"the Gluon attention kernels cannot run: {reason}")
        return tile.language
    if reason is not None:
        _log_fallback(reason)
    return tiles.TRITON if reason else tiles.GLUON


@functools.cache
def _log_fallback(reason: str) -> None:
    logger.info("attention runs in plain Triton, not in Gluon: %s", reason)


def _launches(jobs: Sequence[Job] | None, language: str) -> Sequence[Sequence[Job] | None]:
    """Jobs by launch: in Triton all forms together, in Gluon each by itself. None: every row, plain."""
    if jobs is None:
        return [None]
    if language == tiles.TRITON:
        return chunks(jobs)
    by_form = ([job for job in jobs if job.form == form] for form in tiles.LONGEST_FIRST)
    return [launch for some in by_form if some for launch in chunks(some)]


def _launch(
    q: Tensor,
    k: Tensor,
    k_pivot: Tensor,
    v: Tensor,
    value_bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    jobs: Sequence[Job] | None,
    fixed: bool,
    tile: Tile | None,
    language: str,
) -> None:
    num_rows, len_k, num_heads, head_dim = v.shape
    len_q = q.shape[1]
    counts = {form: sum(job.form == form for job in jobs or ()) for form in FORMS}
    if jobs is None:
        counts[tiles.PLAIN] = num_rows
    forms = [form for form in tiles.MATMULS if counts[form]]
    device = tiles.device(q.device)
    tile = tile or tiles.forward_tile(device, forms, head_dim, fixed, language)
    fixed = fixed and not tile.keep_maximum

    per_job = triton.cdiv(len_q, tile.block_m) * num_heads
    tail = tiles.plan_tail(
        tuple((counts[form] * per_job, tiles.MATMULS[form]) for form in tiles.LONGEST_FIRST if counts[form]),
        device.num_sms * tile.programs_per_sm,
        triton.cdiv(len_k, tile.block_n),
        tile.max_parts,
    )
    part_out = part_lse = lse  # never touched where nothing is split
    if tail.num_slots:
        copies = 2 if counts[tiles.PAIR] else 1
        lines = copies * tail.num_slots * tile.block_m
        part_out = torch.empty(lines, head_dim, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(lines, dtype=torch.float32, device=q.device)

    bias = lse if value_bias is None else value_bias
    packed = pack(jobs)
    results = (out, lse, bias, part_out, part_lse)
    if language == tiles.GLUON:
        from . import gluon_fwd  # Hopper and one version of Triton only

        gluon_fwd.launch(
            (q, k, k_pivot, v), results, packed, tail, tile,
            form=forms[0], mapped=jobs is not None, fixed=fixed, has_bias=value_bias is not None,
            num_programs=device.num_sms,
        )  # fmt: skip
    else:
        m, n = tile.block_m, tile.block_n
        tma, sources = describe((q, k, k_pivot, v), (m, n, n, n), tile)
        _forward_kernel[(tail.num_whole + tail.num_slots,)](
            *sources, *results,
            *q.stride()[:3], *k.stride()[:3], *k_pivot.stride()[:3], *v.stride()[:3],
            *packed, counts[tiles.PAIR], counts[tiles.TARGET],
            len_q, len_k, num_heads, head_dim**-0.5 * math.log2(math.e),
            tail.num_whole, tail.num_parts, tail.num_slots,
            KIND=FORMS[forms[0]] if len(forms) == 1 else MIXED.value,
            MAPPED=jobs is not None, FIXED=fixed, HAS_BIAS=value_bias is not None,
            EVEN_K=len_k % n == 0, SPLIT=tail.num_slots > 0, TMA=tma,
            BLOCK_M=m, BLOCK_N=n, D=head_dim, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    if tail.num_slots:
        _merge_kernel[(tail.num_slots // tail.num_parts, 2 if counts[tiles.PAIR] else 1)](
            *results, *packed, counts[tiles.PAIR],
            len_q, num_heads, tail.num_whole, tail.num_parts, tail.num_slots,
            MAPPED=jobs is not None, HAS_BIAS=value_bias is not None,
            BLOCK_M=tile.block_m, D=head_dim, num_warps=tile.num_warps,
        )  # fmt: skip


def chunks(jobs: Sequence[Job]) -> list[Sequence[Job]]:
    """Jobs, longest first, in as few launches of nearly equal size as their number allows."""
    ordered = sorted(jobs, key=lambda job: -tiles.MATMULS[job.form])
    total, launches = len(ordered), triton.cdiv(len(ordered), JOBS_PER_LAUNCH)
    return [ordered[i * total // launches : (i + 1) * total // launches] for i in range(launches)]


def pack(jobs: Sequence[Job] | None) -> list[int]:
    """The jobs of a launch as integers for `pick_job`.

    All are odd and above 2**62, so that Triton sees the same types every time and compiles once.
    """
    packed = []
    for job in jobs or ():
        if max(job.q_row, job.pivot_row, job.row) > ROW_MASK.value:
            raise ValueError(f"expected at most {ROW_MASK.value + 1} rows, but there is {job}")
        fields = job.q_row | job.pivot_row << ROW_BITS.value | job.row << 2 * ROW_BITS.value
        packed.append(1 << 62 | fields << 1 | 1)
    return packed + [1 << 62 | 1] * (JOBS_PER_LAUNCH - len(packed))


def last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def describe(
    tensors: Sequence[Tensor], blocks: Sequence[int], tile: Tile
) -> tuple[bool, Sequence[Tensor | TensorDescriptor]]:
    """What `load_tile` reads from: descriptors if the tile asks for them and every tensor allows it."""
    if tile.tma and all(_describable(x) for x in tensors):
        return True, [descriptor_of(x, block) for x, block in zip(tensors, blocks, strict=True)]
    return False, tensors


def _describable(x: Tensor) -> bool:
    """Whether a tensor descriptor can express x: addresses in multiples of 16 bytes, no repeated rows."""
    strides = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    return x.data_ptr() % 16 == 0 and all(s > 0 and s * x.element_size() % 16 == 0 for s in strides)


def descriptor_of(x: Tensor, block: int) -> TensorDescriptor:
    """Over [B, H, L, D], so that the leading dims of a block are the ones it has one of."""
    x = x.transpose(1, 2)
    # The stride of a dim of size 1 is arbitrary in PyTorch; a descriptor checks it.
    strides = [stride if size > 1 else x.shape[-1] for size, stride in zip(x.shape, x.stride(), strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides[:-1], 1], [1, 1, block, x.shape[-1]])
