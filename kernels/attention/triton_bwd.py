"""Backward attention in Triton: the gradients of `launch.forward`, in memory linear in L.

Probabilities are made again from the log-sum-exps of the forward pass. For a target t on pivot p, one
dP = dO_t V_t^T serves both sets of keys, and with delta = rowsum(dO_t * O_t):

    dV_t = (P_t + P_p)^T dO_t      dS_t = P_t (dP - delta)      dS_p = P_p (dP - delta)
    dK_t = dS_t^T Q_p              dK_p += dS_p^T Q_p           dQ_p += dS_t K_t + dS_p K_p

What belongs to a pivot is summed over its targets. No atomics: the first target of every pivot goes in one
launch, the second ones in the next, each adding to float32 sums, so that the same inputs give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .launch import Job, chunks, describe, last_contiguous, pack
from .tiles import Tile
from .triton_fwd import Sizes, Strides, load_tile, pick_job

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
DELTA_BLOCK = 32


@triton.jit
def _delta_kernel(
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
def _dkv_kernel(
    q, k, k_pivot, v, grad, lse, delta, results, strides, jobs, sizes, scale,
    GROUNDED: tl.constexpr, MAPPED: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """dK and dV of BLOCK_N keys of one row; with GROUNDED also what the row adds to the pivot's dK.

    Scores lie transposed, [BLOCK_N, BLOCK_M], so that no product needs its left side turned.
    """
    dk, dk_pivot, dv = results
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
def _dq_kernel(
    q, k, k_pivot, v, grad, lse, delta, results, strides, jobs, sizes, scale,
    GROUNDED: tl.constexpr, MAPPED: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """What one row of output adds to dQ of BLOCK_M queries; without GROUNDED the row is the only one."""
    dq = results[0]
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


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    k_pivot: Tensor | None,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    jobs: Sequence[Job] | None,
    *,
    dkv_tile: Tile | None = None,
    dq_tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of q, k, k_pivot and v, from grad [B, L, H, D] and what `launch.forward` took and gave.

    out must be without value bias: rounded together with one, it would blur delta. The tiles stand in for the
    table's, for sweeps and tests.
    """
    q, k, v, grad = (last_contiguous(x) for x in (q, k, v, grad))
    device, head_dim = tiles.device(q.device), q.shape[-1]
    dkv_tile = dkv_tile or tiles.backward_tile(device, tiles.DKV, head_dim)
    dq_tile = dq_tile or tiles.backward_tile(device, tiles.DQ, head_dim)
    plain, targets = _split_pairs(jobs or ())
    sums = torch.float32 if targets else q.dtype

    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if k_pivot is None:
        # Every pivot is a plain row too, and that launch comes first: it writes, targets add.
        dq = torch.empty(q.shape, dtype=sums, device=q.device)
        dk = dk_pivot = torch.empty(k.shape, dtype=sums, device=k.device)
        k_pivot = k
    else:
        dq = torch.zeros(q.shape, dtype=sums, device=q.device)
        dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
        k_pivot = last_contiguous(k_pivot)
        dk_pivot = torch.zeros(k_pivot.shape, dtype=sums, device=k.device)

    tensors = (q, k, k_pivot, v, grad, lse, _delta(grad, out))
    if jobs is None:
        _launch(tensors, dq, dk, dk_pivot, dv, None, dkv_tile, dq_tile)
    for launch in chunks(plain):
        _launch(tensors, dq, dk, dk_pivot, dv, launch, dkv_tile, dq_tile)
    for round_ in _rounds(targets):
        for launch in chunks(round_):
            _launch(tensors, dq, dk, dk_pivot, dv, launch, dkv_tile, dq_tile)
    separate = None if dk_pivot is dk else dk_pivot.to(k.dtype)
    return dq.to(q.dtype), dk.to(k.dtype), separate, dv


def _split_pairs(jobs: Sequence[Job]) -> tuple[list[Job], list[Job]]:
    """Plain rows and targets; a pair is one of each."""
    plain = [job for job in jobs if job.form == tiles.PLAIN]
    targets = [job for job in jobs if job.form == tiles.TARGET]
    for job in jobs:
        if job.form == tiles.PAIR:
            p = job.pivot_row
            plain.append(Job(form=tiles.PLAIN, q_row=job.q_row, pivot_row=p, row=p))
            targets.append(Job(form=tiles.TARGET, q_row=job.q_row, pivot_row=p, row=job.row))
    return plain, targets


def _rounds(targets: Sequence[Job]) -> list[list[Job]]:
    """The first target of every pivot, then the second ones, and so on: within a round no two share sums."""
    rounds: list[list[Job]] = []
    seen: dict[int, int] = {}
    for job in targets:
        turn = seen[job.q_row] = seen.get(job.q_row, -1) + 1
        if turn == len(rounds):
            rounds.append([])
        rounds[turn].append(job)
    return rounds


def _delta(grad: Tensor, out: Tensor) -> Tensor:
    num_rows, len_q, num_heads, head_dim = out.shape
    delta = torch.empty(num_rows, num_heads, len_q, dtype=torch.float32, device=out.device)
    _delta_kernel[(triton.cdiv(len_q, DELTA_BLOCK), num_heads, num_rows)](
        grad, out.contiguous(), delta, Strides(*grad.stride()[:3]), len_q, num_heads,
        BLOCK=DELTA_BLOCK, D=head_dim,
        enable_fp_fusion=True,
    )  # fmt: skip
    return delta


def _launch(
    tensors: tuple[Tensor, ...],
    dq: Tensor,
    dk: Tensor,
    dk_pivot: Tensor,
    dv: Tensor,
    jobs: Sequence[Job] | None,
    dkv_tile: Tile,
    dq_tile: Tile,
) -> None:
    sources, others = tensors[:5], tensors[5:]
    q, k, k_pivot, v, grad = sources
    num_rows, len_k, num_heads, head_dim = v.shape
    len_q = q.shape[1]
    num_jobs = num_rows if jobs is None else len(jobs)
    strides = tuple(Strides(*x.stride()[:3]) for x in sources)
    arguments = (strides, pack(jobs), Sizes(len_q, len_k, num_heads), head_dim**-0.5)
    grounded = jobs is not None and jobs[0].form == tiles.TARGET
    for kernel, tile, length, block, results in (
        (_dkv_kernel, dkv_tile, len_k, dkv_tile.block_n, (dk, dk_pivot, dv)),
        (_dq_kernel, dq_tile, len_q, dq_tile.block_m, (dq,)),
    ):
        m, n = tile.block_m, tile.block_n
        tma, loaded = describe(sources, (m, n, n, n, m), tile)
        kernel[(triton.cdiv(length, block), num_heads, num_jobs)](
            *loaded, *others, results, *arguments,
            GROUNDED=grounded, MAPPED=jobs is not None, TMA=tma,
            BLOCK_M=m, BLOCK_N=n, D=head_dim, num_warps=tile.num_warps, num_stages=tile.num_stages,
            enable_fp_fusion=True,
        )  # fmt: skip
