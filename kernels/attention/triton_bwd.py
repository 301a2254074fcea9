"""Backward attention in Triton: the gradients of `launch.forward`, in memory linear in L.

Probabilities are made again from the log-sum-exps of the forward pass. For a target t on pivot p, one
dP = dO_t V_t^T serves both sets of keys, and with delta = rowsum(dO_t * O_t):

    dV_t = (P_t + P_p)^T dO_t      dS_t = P_t (dP - delta)      dS_p = P_p (dP - delta)
    dK_t = dS_t^T Q_p              dK_p += dS_p^T Q_p           dQ_p += dS_t K_t + dS_p K_p

What belongs to a pivot is summed over its targets. No atomics: the first target of every pivot goes in one
launch, the second ones in the next, each adding to float32 sums, so that the same inputs give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_fwd import load_tile, pick_job

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
DELTA_BLOCK = 32


@triton.jit
def delta_kernel(
    grad, out, delta, stride_g, len_q, num_heads, BLOCK: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """delta [B, H, L]: dot product of each token's gradient with its output."""
    start, head, row = tl.program_id(0) * BLOCK, tl.program_id(1), tl.program_id(2)
    tokens, dims = start + tl.arange(0, BLOCK), tl.arange(0, D)
    exists = (tokens < len_q)[:, None]
    row_64 = tl.cast(row, tl.int64)
    offsets = ((row_64 * len_q + tokens) * num_heads + head)[:, None] * D + dims[None, :]
    values = tl.load(out + offsets, mask=exists, other=0.0).to(tl.float32)
    do = load_tile(grad, row, head, start, len_q, stride_g, BLOCK, D, False)
    line = tl.sum(do.to(tl.float32) * values, 1)
    tl.store(delta + (row_64 * num_heads + head) * len_q + tokens, line, mask=tokens < len_q)


@triton.jit
def _store_gradient(
    x, tensor, row, head, start, length, num_heads,
    ADD: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """x [BLOCK, D] into (or onto) rows of a contiguous [B, L, H, D]."""
    tokens = start + tl.arange(0, BLOCK)
    offsets = (tl.cast(row, tl.int64) * length + tokens) * num_heads + head
    pointers = tensor + offsets[:, None] * D + tl.arange(0, D)[None, :]
    exists = (tokens < length)[:, None]
    if ADD:
        x += tl.load(pointers, mask=exists, other=0.0).to(tl.float32)
    tl.store(pointers, x.to(tensor.dtype.element_ty), mask=exists)


@triton.jit
def dkv_kernel(
    q, k, k_pivot, v, grad, lse, delta, dk, dk_pivot, dv, strides, jobs, sizes, scale,
    GROUNDED: tl.constexpr, MAPPED: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """dK and dV of BLOCK_N keys of one row; with GROUNDED, what the row adds to the pivot's dK too.

    Scores lie transposed, [BLOCK_N, BLOCK_M], so that no product needs its left side turned.
    """
    stride_q, stride_k, stride_kp, stride_v, stride_g = strides
    len_q, len_k, num_heads = sizes
    start_n, head, job = tl.program_id(0) * BLOCK_N, tl.program_id(1), tl.program_id(2)
    q_row, pivot_row, row = job, job, job
    if MAPPED:
        q_row, pivot_row, row = pick_job(job, jobs)
    k_tile = load_tile(k, row, head, start_n, len_k, stride_k, BLOCK_N, D, TMA)
    v_tile = load_tile(v, row, head, start_n, len_k, stride_v, BLOCK_N, D, TMA)
    dk_acc = tl.zeros([BLOCK_N, D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, D], tl.float32)
    if GROUNDED:
        k_tile_p = load_tile(k_pivot, pivot_row, head, start_n, len_k, stride_kp, BLOCK_N, D, TMA)
        dk_acc_p = tl.zeros([BLOCK_N, D], tl.float32)

    lines = (tl.cast(row, tl.int64) * num_heads + head) * len_q
    for start_m in tl.range(0, len_q, BLOCK_M):
        tokens = start_m + tl.arange(0, BLOCK_M)
        exists = tokens < len_q
        # Probabilities of tokens that are not there: exp2(-inf).
        lse_2 = tl.load(lse + lines + tokens, mask=exists, other=float("inf")) * LOG2_E
        line_delta = tl.load(delta + lines + tokens, mask=exists, other=0.0)
        q_tile = load_tile(q, q_row, head, start_m, len_q, stride_q, BLOCK_M, D, TMA)
        do = load_tile(grad, row, head, start_m, len_q, stride_g, BLOCK_M, D, TMA)
        p = tl.exp2(tl.dot(k_tile, tl.trans(q_tile)) * (scale * LOG2_E) - lse_2[None, :])
        slope = tl.dot(v_tile, tl.trans(do)) - line_delta[None, :]
        if GROUNDED:
            p_p = tl.exp2(tl.dot(k_tile_p, tl.trans(q_tile)) * (scale * LOG2_E) - lse_2[None, :])
            dv_acc = tl.dot((p + p_p).to(do.dtype), do, dv_acc)
            dk_acc_p = tl.dot((p_p * slope).to(q_tile.dtype), q_tile, dk_acc_p)
        else:
            dv_acc = tl.dot(p.to(do.dtype), do, dv_acc)
        dk_acc = tl.dot((p * slope).to(q_tile.dtype), q_tile, dk_acc)

    _store_gradient(dk_acc * scale, dk, row, head, start_n, len_k, num_heads, False, BLOCK_N, D)
    _store_gradient(dv_acc, dv, row, head, start_n, len_k, num_heads, False, BLOCK_N, D)
    if GROUNDED:
        _store_gradient(
            dk_acc_p * scale, dk_pivot, pivot_row, head, start_n, len_k, num_heads, True, BLOCK_N, D
        )


@triton.jit
def dq_kernel(
    q, k, k_pivot, v, grad, lse, delta, dq, strides, jobs, sizes, scale,
    GROUNDED: tl.constexpr, MAPPED: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """What one row of output adds to dQ of BLOCK_M queries; without GROUNDED the row is the only one."""
    stride_q, stride_k, stride_kp, stride_v, stride_g = strides
    len_q, len_k, num_heads = sizes
    start_m, head, job = tl.program_id(0) * BLOCK_M, tl.program_id(1), tl.program_id(2)
    q_row, pivot_row, row = job, job, job
    if MAPPED:
        q_row, pivot_row, row = pick_job(job, jobs)
    tokens = start_m + tl.arange(0, BLOCK_M)
    lines = (tl.cast(row, tl.int64) * num_heads + head) * len_q
    lse_2 = tl.load(lse + lines + tokens, mask=tokens < len_q, other=float("inf")) * LOG2_E
    line_delta = tl.load(delta + lines + tokens, mask=tokens < len_q, other=0.0)
    q_tile = load_tile(q, q_row, head, start_m, len_q, stride_q, BLOCK_M, D, TMA)
    do = load_tile(grad, row, head, start_m, len_q, stride_g, BLOCK_M, D, TMA)
    acc = tl.zeros([BLOCK_M, D], tl.float32)

    for start in tl.range(0, len_k, BLOCK_N):
        exists = (start + tl.arange(0, BLOCK_N) < len_k)[None, :]
        k_tile = load_tile(k, row, head, start, len_k, stride_k, BLOCK_N, D, TMA)
        v_tile = load_tile(v, row, head, start, len_k, stride_v, BLOCK_N, D, TMA)
        slope = tl.dot(do, tl.trans(v_tile)) - line_delta[:, None]
        s = tl.where(exists, tl.dot(q_tile, tl.trans(k_tile)), float("-inf"))
        ds = tl.exp2(s * (scale * LOG2_E) - lse_2[:, None]) * slope
        acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc)
        if GROUNDED:
            k_tile_p = load_tile(k_pivot, pivot_row, head, start, len_k, stride_kp, BLOCK_N, D, TMA)
            s_p = tl.where(exists, tl.dot(q_tile, tl.trans(k_tile_p)), float("-inf"))
            ds_p = tl.exp2(s_p * (scale * LOG2_E) - lse_2[:, None]) * slope
            acc = tl.dot(ds_p.to(k_tile_p.dtype), k_tile_p, acc)

    _store_gradient(acc * scale, dq, q_row, head, start_m, len_q, num_heads, GROUNDED, BLOCK_M, D)
