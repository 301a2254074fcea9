"""silu(group_norm(x)) for channels-last tensors in Triton, forward and backward; `ops` launches it.

B images, P = H W positions, C channels, G groups of C / G channels; memory is [B, P, C]. A program takes a
chunk of positions of one image with all its channels, so that every access is contiguous. Statistics are
summed per channel and chunk, then per group by whoever needs them: no atomics, equal inputs give equal bits.

    n = (x - mean) / std       z = n w + b       y = z s, s = sigmoid(z)
    dz = dy s (1 + z (1 - s))  dw = sum n dz     db = sum dz
    dx = (dz w - mean(dz w) - n mean(dz w n)) / std, means over a group of one image
"""

from __future__ import annotations

import triton
import triton.language as tl

AT_ONCE: tl.constexpr = tl.constexpr(16)
"""Chunks whose sums are read together."""
SIZES = ["positions", "per_chunk", "num_chunks"]
"""Not worth a compilation each."""


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
def sums_kernel(
    x, sum_x, sum_xx, positions, per_chunk, num_chunks,
    C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
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
def forward_kernel(
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
def gradient_sums_kernel(
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
def backward_kernel(
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
