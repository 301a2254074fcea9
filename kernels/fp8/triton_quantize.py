"""Rowwise quantisation to e4m3 in Triton, fused into the pass that makes the row; `ops` launches it.

A program holds one row in registers: read once, normalised or activated, its largest number found, written
once in a byte each. The arithmetic is `reference`'s, in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .reference import AMAX_FLOOR, E4M3_MAX

_INVERSE_MAX: tl.constexpr = tl.constexpr(1 / E4M3_MAX)
_FLOOR: tl.constexpr = tl.constexpr(AMAX_FLOOR)
SQRT_2_OVER_PI: tl.constexpr = tl.constexpr(0.7978845608028654)


@triton.jit
def gelu(x):
    """x * (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), written as x * sigmoid(2 u)."""
    u = SQRT_2_OVER_PI * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp(-2.0 * u))


@triton.jit
def norm_kernel(
    x, y, gate, scale, shift, x_out, values, scales, length, width, eps,
    stride_row, stride_len, stride_row_y, stride_len_y, stride_gate, stride_scale, stride_shift,
    GATED: tl.constexpr, MODULATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x [B, L, K] -> values [B * L, K], scales [B * L].

    GATED: of x + gate * y, which is stored in x_out [B * L, K]. MODULATED: of norm(that) * (1 + scale) +
    shift. What a part does not read is some pointer.
    """
    token = tl.program_id(0).to(tl.int64)
    row, place = token // length, token % length
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    out = token * width + columns
    z = tl.load(x + row * stride_row + place * stride_len + columns, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        update = tl.load(y + row * stride_row_y + place * stride_len_y + columns, mask=inside, other=0.0)
        strength = tl.load(gate + row * stride_gate + columns, mask=inside, other=0.0).to(tl.float32)
        stored = (z + strength * update.to(tl.float32)).to(x_out.dtype.element_ty)
        tl.store(x_out + out, stored, mask=inside)
        z = stored.to(tl.float32)
    if MODULATED:
        centred = tl.where(inside, z - tl.sum(z, 0) / width, 0.0)
        normed = centred * tl.rsqrt(tl.sum(centred * centred, 0) / width + eps)
        factor = tl.load(scale + row * stride_scale + columns, mask=inside, other=0.0).to(tl.float32)
        offset = tl.load(shift + row * stride_shift + columns, mask=inside, other=0.0).to(tl.float32)
        z = normed * (1.0 + factor) + offset
    unit = tl.maximum(tl.max(tl.abs(z), 0), _FLOOR) * _INVERSE_MAX
    tl.store(values + out, (z * tl.div_rn(1.0, unit)).to(values.dtype.element_ty), mask=inside)
    tl.store(scales + token, unit)


@triton.jit
def gelu_kernel(
    hidden, beside, values, scales, length, width, width_beside,
    stride_row, stride_len, stride_row_beside, stride_len_beside,
    BESIDE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_BESIDE: tl.constexpr,
):  # fmt: skip
    """hidden [B, L, K], beside [B, L, E] -> values [B * L, E + K] of [beside, gelu(hidden)], scales [B * L].

    Without BESIDE there is no such tensor, and E is 0.
    """
    token = tl.program_id(0).to(tl.int64)
    row, place = token // length, token % length
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    start = row * stride_row + place * stride_len
    y = gelu(tl.load(hidden + start + columns, mask=inside, other=0.0).to(tl.float32))
    amax = tl.maximum(tl.max(tl.abs(y), 0), _FLOOR)
    out = values + token * (width + width_beside)
    if BESIDE:
        columns_beside = tl.arange(0, BLOCK_BESIDE)
        inside_beside = columns_beside < width_beside
        start_beside = row * stride_row_beside + place * stride_len_beside
        z = tl.load(beside + start_beside + columns_beside, mask=inside_beside, other=0.0).to(tl.float32)
        amax = tl.maximum(tl.max(tl.abs(z), 0), amax)
        factor = tl.div_rn(1.0, amax * _INVERSE_MAX)
        tl.store(out + columns_beside, (z * factor).to(values.dtype.element_ty), mask=inside_beside)
    else:
        factor = tl.div_rn(1.0, amax * _INVERSE_MAX)
    tl.store(out + width_beside + columns, (y * factor).to(values.dtype.element_ty), mask=inside)
    tl.store(scales + token, amax * _INVERSE_MAX)
