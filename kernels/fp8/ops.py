"""The Triton quantisation as PyTorch operators, for `torch.compile` and CUDA graphs. Imports triton."""

from __future__ import annotations

import torch
from torch import Tensor

from . import triton_quantize


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.quantize`."""
    return _quantize(x, None, None)


def quantize_modulated(x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.quantize_modulated`."""
    return _quantize(x, scale, shift)


def quantize_gelu(hidden: Tensor, beside: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`reference.quantize_gelu`."""
    return _quantize_gelu(hidden, beside)


@torch.library.custom_op("bokehflux::add_gated_quantize_modulated_fp8", mutates_args=())
def add_gated_quantize_modulated(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.add_gated_quantize_modulated`."""
    with torch.cuda.device_of(x):
        values, scales, added = triton_quantize.quantize_rows(x, (scale, shift), (y, gate))
    assert added is not None
    return added, values, scales


@add_gated_quantize_modulated.register_fake
def _(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), *_like(x, x.shape[-1])


@torch.library.custom_op(
    "bokehflux::quantize_fp8",
    mutates_args=(),
    schema="(Tensor x, Tensor? scale, Tensor? shift) -> (Tensor, Tensor)",
)
def _quantize(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    modulation = None if scale is None or shift is None else (scale, shift)
    with torch.cuda.device_of(x):
        return triton_quantize.quantize_rows(x, modulation)[:2]


@torch.library.custom_op(
    "bokehflux::quantize_gelu_fp8",
    mutates_args=(),
    schema="(Tensor hidden, Tensor? beside) -> (Tensor, Tensor)",
)
def _quantize_gelu(hidden: Tensor, beside: Tensor | None) -> tuple[Tensor, Tensor]:
    with torch.cuda.device_of(hidden):
        return triton_quantize.quantize_gelu_rows(hidden, beside)


@_quantize.register_fake
def _(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    return _like(x, x.shape[-1])


@_quantize_gelu.register_fake
def _(hidden: Tensor, beside: Tensor | None) -> tuple[Tensor, Tensor]:
    return _like(hidden, hidden.shape[-1] + (0 if beside is None else beside.shape[-1]))


def _like(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    values = x.new_empty((*x.shape[:-1], width), dtype=torch.float8_e4m3fn)
    return values, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
