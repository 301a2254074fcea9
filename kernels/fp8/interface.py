"""fp8 products with rowwise scales: what quantises, what multiplies, and where that can run.

CUDA quantises in Triton, a CPU in plain PyTorch; the product is `torch._scaled_mm` on both (its CPU form is
exact and slow: it is there to try things).
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch
from . import reference

MULTIPLE = 16
"""Both sizes of a weight must be multiples of it."""
LEAST_ROWS = 256
"""Tokens that a product on a GPU is filled up to."""


class Quantized(NamedTuple):
    """A tensor [..., K] as values * scale."""

    values: Tensor
    """[..., K] float8_e4m3fn"""
    scale: Tensor
    """[..., 1] float32"""
    dtype: torch.dtype
    """What it was quantised from, and what its products come in."""


def quantize(x: Tensor) -> Quantized:
    """x [..., K] with one scale a row."""
    values, scale = _module(x).quantize(x)
    return Quantized(values, scale, x.dtype)


def quantize_modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Quantized:
    """norm(x) * (1 + scale) + shift in one pass; x [B, L, K], scale and shift [B or 1, 1, K]."""
    values, scales = _module(x).quantize_modulated(x, scale, shift)
    return Quantized(values, scales, shift.dtype)  # that of x, which a CPU keeps in float32


def add_gated_quantize_modulated(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Quantized]:
    """x + gate * y [B, L, K], and `quantize_modulated` of that sum, in one pass."""
    x, values, scales = _module(x).add_gated_quantize_modulated(x, y, gate, scale, shift)
    return x, Quantized(values, scales, shift.dtype)


def quantize_gelu(hidden: Tensor, beside: Tensor | None = None) -> Quantized:
    """[beside, gelu(hidden)] in one pass; hidden [..., K], beside [..., E] -> [..., E + K]."""
    values, scale = _module(hidden).quantize_gelu(hidden, beside)
    return Quantized(values, scale, hidden.dtype)


def product(x: Quantized, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (weight * scale)^T + bias; weight [N, K] float8_e4m3fn, scale [N] float32, bias [N] -> [..., N]."""
    values, scales = x.values.flatten(0, -2), x.scale.flatten(0, -2)
    count = len(values)
    if not count:
        return x.scale.new_empty((*x.values.shape[:-1], len(weight)), dtype=x.dtype)
    if values.is_cuda and count < LEAST_ROWS:
        # cuBLAS has no kernel for fewer at FLUX's widest layers (torch 2.11, H100: 63 rows of 12288).
        missing = LEAST_ROWS - count
        values = F.pad(values.view(torch.uint8), (0, 0, 0, missing)).view(values.dtype)
        scales = F.pad(scales, (0, 0, 0, missing), value=1.0)
    out = torch._scaled_mm(
        values,
        weight.t(),
        scale_a=scales,
        scale_b=scale[None],
        bias=bias,
        out_dtype=x.dtype,
        use_fast_accum=True,
    )
    return out[:count].unflatten(0, x.values.shape[:-1])


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why products in fp8 with results in `dtype` cannot run on a device, or None."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) < (8, 9):
            return f"it needs compute capability 8.9 or higher (Ada, Hopper), {device} has {major}.{minor}"
        if reason := dispatch.why_not(device):
            return reason
    elif device.type != "cpu":
        return f"{device.type} has no fp8"
    ones = torch.ones(128, device=device)
    weight = torch.zeros(128, 128, device=device, dtype=torch.float8_e4m3fn)
    try:
        product(Quantized(weight, ones[:, None], dtype), weight, ones)
    except RuntimeError as error:  # which PyTorch, device and dtype go together is known to PyTorch alone
        first_line = str(error).partition("\n")[0]
        return f"this PyTorch has no such product for {dtype} on {device}: {first_line}"
    return None


def takes(x: Tensor) -> bool:
    """Whether Triton quantises such a tensor: on CUDA, always (`why_not` tells whether it can)."""
    return x.is_cuda


def _module(x: Tensor) -> ModuleType:
    if takes(x):
        from . import ops  # imports triton

        return ops
    return reference
