"""Rowwise quantisation to e4m3 in Triton, fused into the pass that makes the row.

A program holds one row in registers: read once, normalised or activated, its largest number found, written
once in a byte each. The arithmetic is `reference`'s, in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..pointwise.eager import EPS
from .reference import AMAX_FLOOR, E4M3_MAX

MAX_WIDTH = 32768
"""Numbers in a row that a program's registers hold."""
_INVERSE_MAX: tl.constexpr = tl.constexpr(1 / E4M3_MAX)
_FLOOR: tl.constexpr = tl.constexpr(AMAX_FLOOR)
VALUES = torch.float8_e4m3fn
"""What is stored; conversions saturate and keep what is not a number. Tests look at the numbers before."""
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


def quantize_rows(
    x: Tensor,
    modulation: tuple[Tensor, Tensor] | None = None,
    gated: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x [..., K] -> (values, scale, x + gate * y or None).

    modulation: (scale, shift), as in `reference.quantize_modulated`; gated: (y, gate), with modulation as in
    `reference.add_gated_quantize_modulated`; both for x [B, L, K]. Rows may lie anywhere; one that is not
    contiguous is copied.
    """
    rows = _rows(x)
    length, width = rows.shape[1:]
    values, scales = _outputs(x, width)
    others = [_rows(vector.expand(len(rows), 1, width)) for vector in modulation or ()] or [rows, rows]
    update, gate, added = rows, rows, None
    if gated is not None:
        update, gate = _rows(gated[0]), _rows(gated[1].expand(len(rows), 1, width))
        added = x.new_empty(x.shape)
    if scales.numel():
        norm_kernel[(scales.numel(),)](
            rows, update, gate, *others, rows if added is None else added, values, scales,
            length, width, EPS, rows.stride(0), rows.stride(1), update.stride(0), update.stride(1),
            gate.stride(0), *(vector.stride(0) for vector in others),
            GATED=gated is not None, MODULATED=modulation is not None,
            BLOCK=triton.next_power_of_2(width), num_warps=_num_warps(width),
            enable_fp_fusion=True,
        )  # fmt: skip
    return values, scales, added


def quantize_gelu_rows(hidden: Tensor, beside: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`reference.quantize_gelu`; strides as in `quantize_rows`."""
    rows, width_beside = _rows(hidden), 0 if beside is None else beside.shape[-1]
    others = rows if beside is None else _rows(beside)
    length, width = rows.shape[1:]
    values, scales = _outputs(hidden, width + width_beside)
    if scales.numel():
        gelu_kernel[(scales.numel(),)](
            rows, others, values, scales, length, width, width_beside,
            rows.stride(0), rows.stride(1), others.stride(0), others.stride(1),
            BESIDE=beside is not None, BLOCK=triton.next_power_of_2(width),
            BLOCK_BESIDE=triton.next_power_of_2(max(width_beside, 1)), num_warps=_num_warps(width),
            enable_fp_fusion=True,
        )  # fmt: skip
    return values, scales


def _rows(x: Tensor) -> Tensor:
    """[..., K] -> [B, L, K] with contiguous rows."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x if x.ndim == 3 else x.reshape(1, -1, x.shape[-1])


def _outputs(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    if width > MAX_WIDTH:
        raise ValueError(f"the fp8 kernels take rows of up to {MAX_WIDTH} numbers, got {width}")
    values = x.new_empty((*x.shape[:-1], width), dtype=VALUES)
    return values, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _num_warps(width: int) -> int:
    """16 or 32 numbers a thread at FLUX's widths. Compiled for sm_90 by triton 3.6.0 in bfloat16: accesses of
    16 bytes, 34 to 64 registers, no spills; other counts have not been timed."""
    return 16 if width > 8192 else 8 if width > 1024 else 4
