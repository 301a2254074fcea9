"""silu(group_norm(x)) for channels-last tensors in Triton, forward and backward.

B images, P = H W positions, C channels, G groups of C / G channels; memory is [B, P, C]. A program takes a
chunk of positions of one image with all its channels, so that every access is contiguous. Statistics are
summed per channel and chunk, then per group by whoever needs them: no atomics, equal inputs give equal bits.

    n = (x - mean) / std       z = n w + b       y = z s, s = sigmoid(z)
    dz = dy s (1 + z (1 - s))  dw = sum n dz     db = sum dz
    dx = (dz w - mean(dz w) - n mean(dz w n)) / std, means over a group of one image
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

AT_ONCE: tl.constexpr = tl.constexpr(16)
"""Chunks whose sums are read together."""
MAX_CHUNKS = 256
SIZES = ["positions", "per_chunk", "num_chunks"]
"""Not worth a compilation each."""
ELEMENTS = 4096
"""Of a block in registers: 32 a thread with 4 warps, of each of the few tensors that are live at once."""


@triton.jit
def _over_group(x, channels, C: tl.constexpr, G: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr):
    """[BLOCK_C] -> for every channel, the sum of x over its group."""
    groups = tl.arange(0, BLOCK_G)
    member = (channels[:, None] // (C // G) == groups[None, :]) & (channels < C)[:, None]
    sums = tl.sum(tl.where(member, x[:, None], 0.0), 0)
    return tl.sum(tl.where(member, sums[None, :], 0.0), 1)


@triton.jit
def _sums(partial, image, num_chunks, channels, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Per channel sums of one image: its chunks' partial sums [B, chunks, C], added up."""
    total = tl.zeros([BLOCK_C], tl.float32)
    for first in tl.range(0, num_chunks, AT_ONCE):
        chunks = first + tl.arange(0, AT_ONCE)
        offsets = (tl.cast(image, tl.int64) * num_chunks + chunks)[:, None] * C + channels[None, :]
        exists = (chunks < num_chunks)[:, None] & (channels < C)[None, :]
        total += tl.sum(tl.load(partial + offsets, mask=exists, other=0.0), 0)
    return total


@triton.jit
def _statistics(
    sum_x, sum_xx, image, num_chunks, channels, positions, eps,
    C: tl.constexpr, G: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / std of each channel's group."""
    count = positions * (C // G)
    total = _sums(sum_x, image, num_chunks, channels, C, BLOCK_C)
    squares = _sums(sum_xx, image, num_chunks, channels, C, BLOCK_C)
    mean = _over_group(total, channels, C, G, BLOCK_C, BLOCK_G) / count
    variance = _over_group(squares, channels, C, G, BLOCK_C, BLOCK_G) / count - mean * mean
    return mean, tl.rsqrt(tl.maximum(variance, 0.0) + eps)


@triton.jit(do_not_specialize=SIZES)
def _sums_kernel(
    x,
    sum_x,
    sum_xx,
    positions,
    per_chunk,
    num_chunks,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    chunk, image = tl.program_id(0), tl.program_id(1)
    channels, rows = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_P)
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    start = chunk * per_chunk
    end = tl.minimum(start + per_chunk, positions)
    base = tl.cast(image, tl.int64) * positions
    for first in tl.range(start, end, BLOCK_P):
        exists = (first + rows < end)[:, None] & (channels < C)[None, :]
        offsets = (base + first + rows)[:, None] * C + channels[None, :]
        value = tl.load(x + offsets, mask=exists, other=0.0).to(tl.float32)
        total += value
        squares += value * value
    out = (tl.cast(image, tl.int64) * num_chunks + chunk) * C + channels
    tl.store(sum_x + out, tl.sum(total, 0), mask=channels < C)
    tl.store(sum_xx + out, tl.sum(squares, 0), mask=channels < C)


@triton.jit(do_not_specialize=SIZES)
def _forward_kernel(
    x, y, weight, bias, sum_x, sum_xx, positions, per_chunk, num_chunks, eps,
    C: tl.constexpr, G: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
):  # fmt: skip
    chunk, image = tl.program_id(0), tl.program_id(1)
    channels, rows = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_P)
    mean, rstd = _statistics(
        sum_x, sum_xx, image, num_chunks, channels, positions, eps, C, G, BLOCK_C, BLOCK_G
    )
    w = tl.load(weight + channels, mask=channels < C, other=0.0).to(tl.float32) * rstd
    b = tl.load(bias + channels, mask=channels < C, other=0.0).to(tl.float32) - mean * w
    start = chunk * per_chunk
    end = tl.minimum(start + per_chunk, positions)
    base = tl.cast(image, tl.int64) * positions
    for first in tl.range(start, end, BLOCK_P):
        exists = (first + rows < end)[:, None] & (channels < C)[None, :]
        offsets = (base + first + rows)[:, None] * C + channels[None, :]
        z = tl.load(x + offsets, mask=exists, other=0.0).to(tl.float32) * w[None, :] + b[None, :]
        tl.store(y + offsets, (z * tl.sigmoid(z)).to(y.dtype.element_ty), mask=exists)


@triton.jit
def _slopes(dy, n, w, b):
    """Gradient of z = n w + b from that of silu(z)."""
    z = n * w + b
    s = tl.sigmoid(z)
    return dy * s * (1 + z * (1 - s))


@triton.jit(do_not_specialize=SIZES)
def _gradient_sums_kernel(
    x, dy, weight, bias, sum_x, sum_xx, sum_dz, sum_dzn, positions, per_chunk, num_chunks, eps,
    C: tl.constexpr, G: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
):  # fmt: skip
    chunk, image = tl.program_id(0), tl.program_id(1)
    channels, rows = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_P)
    mean, rstd = _statistics(
        sum_x, sum_xx, image, num_chunks, channels, positions, eps, C, G, BLOCK_C, BLOCK_G
    )
    w = tl.load(weight + channels, mask=channels < C, other=0.0).to(tl.float32)
    b = tl.load(bias + channels, mask=channels < C, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    total_n = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    start = chunk * per_chunk
    end = tl.minimum(start + per_chunk, positions)
    base = tl.cast(image, tl.int64) * positions
    for first in tl.range(start, end, BLOCK_P):
        exists = (first + rows < end)[:, None] & (channels < C)[None, :]
        offsets = (base + first + rows)[:, None] * C + channels[None, :]
        n = (tl.load(x + offsets, mask=exists, other=0.0).to(tl.float32) - mean[None, :]) * rstd[None, :]
        # Where nothing exists the gradient is read as zero, and so is dz.
        dz = _slopes(tl.load(dy + offsets, mask=exists, other=0.0).to(tl.float32), n, w[None, :], b[None, :])
        total += dz
        total_n += dz * n
    out = (tl.cast(image, tl.int64) * num_chunks + chunk) * C + channels
    tl.store(sum_dz + out, tl.sum(total, 0), mask=channels < C)
    tl.store(sum_dzn + out, tl.sum(total_n, 0), mask=channels < C)


@triton.jit(do_not_specialize=SIZES)
def _backward_kernel(
    x, dy, dx, weight, bias, sum_x, sum_xx, sum_dz, sum_dzn, positions, per_chunk, num_chunks, eps,
    C: tl.constexpr, G: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
):  # fmt: skip
    chunk, image = tl.program_id(0), tl.program_id(1)
    channels, rows = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_P)
    mean, rstd = _statistics(
        sum_x, sum_xx, image, num_chunks, channels, positions, eps, C, G, BLOCK_C, BLOCK_G
    )
    w = tl.load(weight + channels, mask=channels < C, other=0.0).to(tl.float32)
    b = tl.load(bias + channels, mask=channels < C, other=0.0).to(tl.float32)
    count = positions * (C // G)
    mean_dz = w * _sums(sum_dz, image, num_chunks, channels, C, BLOCK_C)
    mean_dz = _over_group(mean_dz, channels, C, G, BLOCK_C, BLOCK_G) / count
    mean_dzn = w * _sums(sum_dzn, image, num_chunks, channels, C, BLOCK_C)
    mean_dzn = _over_group(mean_dzn, channels, C, G, BLOCK_C, BLOCK_G) / count
    start = chunk * per_chunk
    end = tl.minimum(start + per_chunk, positions)
    base = tl.cast(image, tl.int64) * positions
    for first in tl.range(start, end, BLOCK_P):
        exists = (first + rows < end)[:, None] & (channels < C)[None, :]
        offsets = (base + first + rows)[:, None] * C + channels[None, :]
        n = (tl.load(x + offsets, mask=exists, other=0.0).to(tl.float32) - mean[None, :]) * rstd[None, :]
        dz = _slopes(tl.load(dy + offsets, mask=exists, other=0.0).to(tl.float32), n, w[None, :], b[None, :])
        value = (dz * w[None, :] - mean_dz[None, :] - n * mean_dzn[None, :]) * rstd[None, :]
        tl.store(dx + offsets, value.to(dx.dtype.element_ty), mask=exists)


class _GroupNormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        grid, sizes, shape = _plan(x, groups)
        sum_x, sum_xx = torch.empty(2, *shape, dtype=torch.float32, device=x.device)
        y = torch.empty_like(x, memory_format=torch.channels_last)
        with torch.cuda.device_of(x):
            _sums_kernel[grid](x, sum_x, sum_xx, *sizes, C=x.shape[1], **_blocks(x))
            _forward_kernel[grid](x, y, weight, bias, sum_x, sum_xx, *sizes, eps, **_shapes(x, groups))
        ctx.save_for_backward(x, weight, bias, sum_x, sum_xx)
        ctx.groups, ctx.eps = groups, eps
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, sum_x, sum_xx = ctx.saved_tensors
        grid, sizes, shape = _plan(x, ctx.groups)
        dy = dy.contiguous(memory_format=torch.channels_last)
        sum_dz, sum_dzn = torch.empty(2, *shape, dtype=torch.float32, device=x.device)
        dx = torch.empty_like(x, memory_format=torch.channels_last)
        common = (weight, bias, sum_x, sum_xx, sum_dz, sum_dzn, *sizes, ctx.eps)
        with torch.cuda.device_of(x):
            _gradient_sums_kernel[grid](x, dy, *common, **_shapes(x, ctx.groups))
            _backward_kernel[grid](x, dy, dx, *common, **_shapes(x, ctx.groups))
        return dx, sum_dzn.sum((0, 1)).to(weight.dtype), sum_dz.sum((0, 1)).to(bias.dtype), None, None


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """`interface.group_norm_silu` of a channels-last x."""
    return _GroupNormSiLU.apply(x, weight, bias, groups, eps)


def _plan(x: Tensor, groups: int) -> tuple[tuple[int, int], tuple[int, int, int], tuple[int, int, int]]:
    """Grid (chunks, images), sizes (positions, positions a chunk, chunks), shape of partial sums."""
    images, channels, height, width = x.shape
    positions, block = height * width, _blocks(x)["BLOCK_P"]
    # Enough chunks to fill the GPU eight times over, each of at least four blocks.
    wanted = max(1, min(MAX_CHUNKS, 1024 // images, positions // (4 * block)))
    per_chunk = triton.cdiv(triton.cdiv(positions, wanted), block) * block
    chunks = triton.cdiv(positions, per_chunk)
    return (chunks, images), (positions, per_chunk, chunks), (images, chunks, channels)


def _blocks(x: Tensor) -> dict[str, int]:
    block_c = triton.next_power_of_2(x.shape[1])
    return {"BLOCK_P": max(1, ELEMENTS // block_c), "BLOCK_C": block_c, "enable_fp_fusion": True}


def _shapes(x: Tensor, groups: int) -> dict[str, int]:
    return {"C": x.shape[1], "G": groups, "BLOCK_G": triton.next_power_of_2(groups), **_blocks(x)}
