"""The Triton quantisation as PyTorch operators, for `torch.compile` and CUDA graphs. Imports triton."""

from __future__ import annotations

import torch
from torch import Tensor

from . import triton_quantize


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.quantize`."""
    return _quantize(x, None, None)


def quantize_modulated(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.quantize_modulated`."""
    return _quantize(x, shift, scale)


def quantize_gelu(hidden: Tensor, beside: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`reference.quantize_gelu`."""
    return _quantize_gelu(hidden, beside)


@torch.library.custom_op(
    "bokehflux::quantize_fp8",
    mutates_args=(),
    schema="(Tensor x, Tensor? shift, Tensor? scale) -> (Tensor, Tensor)",
)
def _quantize(x: Tensor, shift: Tensor | None, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    with torch.cuda.device_of(x):
        return triton_quantize.quantize_rows(x, shift, scale)


@torch.library.custom_op(
    "bokehflux::quantize_gelu_fp8",
    mutates_args=(),
    schema="(Tensor hidden, Tensor? beside) -> (Tensor, Tensor)",
)
def _quantize_gelu(hidden: Tensor, beside: Tensor | None) -> tuple[Tensor, Tensor]:
    with torch.cuda.device_of(hidden):
        return triton_quantize.quantize_gelu_rows(hidden, beside)


@_quantize.register_fake
def _(x: Tensor, shift: Tensor | None, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    return _like(x, x.shape[-1])


@_quantize_gelu.register_fake
def _(hidden: Tensor, beside: Tensor | None) -> tuple[Tensor, Tensor]:
    return _like(hidden, hidden.shape[-1] + (0 if beside is None else beside.shape[-1]))


def _like(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    values = x.new_empty((*x.shape[:-1], width), dtype=torch.float8_e4m3fn)
    return values, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
