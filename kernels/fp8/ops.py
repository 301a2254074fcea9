"""The Triton quantisation as PyTorch operators, without gradients. Importing this module imports triton."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..pointwise.reference import EPS
from . import triton_quantize

MAX_WIDTH = 32768
"""Numbers in a row that a program's registers hold."""
VALUES = torch.float8_e4m3fn
"""What is stored; conversions saturate and keep what is not a number. Tests look at the numbers before."""


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
        values, scales, added = _quantize_rows(x, (scale, shift), (y, gate))
    assert added is not None
    return added, values, scales


@add_gated_quantize_modulated.register_fake
def _(x: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), *_outputs(x, x.shape[-1])


@torch.library.custom_op(
    "bokehflux::quantize_fp8",
    mutates_args=(),
    schema="(Tensor x, Tensor? scale, Tensor? shift) -> (Tensor, Tensor)",
)
def _quantize(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    modulation = None if scale is None or shift is None else (scale, shift)
    with torch.cuda.device_of(x):
        return _quantize_rows(x, modulation)[:2]


@torch.library.custom_op(
    "bokehflux::quantize_gelu_fp8",
    mutates_args=(),
    schema="(Tensor hidden, Tensor? beside) -> (Tensor, Tensor)",
)
def _quantize_gelu(hidden: Tensor, beside: Tensor | None) -> tuple[Tensor, Tensor]:
    rows, width_beside = _rows(hidden), 0 if beside is None else beside.shape[-1]
    others = rows if beside is None else _rows(beside.expand(*hidden.shape[:-1], width_beside))
    length, width = rows.shape[1:]
    values, scales = _outputs(hidden, width + width_beside)
    if scales.numel():
        with torch.cuda.device_of(hidden):
            triton_quantize.gelu_kernel[(scales.numel(),)](
                rows, others, values, scales, length, width, width_beside,
                rows.stride(0), rows.stride(1), others.stride(0), others.stride(1),
                BESIDE=beside is not None, BLOCK=triton.next_power_of_2(width),
                BLOCK_BESIDE=triton.next_power_of_2(max(width_beside, 1)), num_warps=_num_warps(width),
                enable_fp_fusion=True,
            )  # fmt: skip
    return values, scales


@_quantize.register_fake
def _(x: Tensor, *_: Tensor | None) -> tuple[Tensor, Tensor]:
    return _outputs(x, x.shape[-1])


@_quantize_gelu.register_fake
def _(hidden: Tensor, beside: Tensor | None) -> tuple[Tensor, Tensor]:
    return _outputs(hidden, hidden.shape[-1] + (0 if beside is None else beside.shape[-1]))


def _quantize_rows(
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
        update, gate = _rows(gated[0].expand(x.shape)), _rows(gated[1].expand(len(rows), 1, width))
        added = x.new_empty(x.shape)
    if scales.numel():
        triton_quantize.norm_kernel[(scales.numel(),)](
            rows, update, gate, *others, rows if added is None else added, values, scales,
            length, width, EPS, rows.stride(0), rows.stride(1), update.stride(0), update.stride(1),
            gate.stride(0), *(vector.stride(0) for vector in others),
            GATED=gated is not None, MODULATED=modulation is not None,
            BLOCK=triton.next_power_of_2(width), num_warps=_num_warps(width),
            enable_fp_fusion=True,
        )  # fmt: skip
    return values, scales, added


def _rows(x: Tensor) -> Tensor:
    """[..., K] -> [B, L, K] with contiguous rows."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x if x.ndim == 3 else x.reshape(1, -1, x.shape[-1])


def _outputs(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Room for values [..., width] and scales [..., 1] of the rows of x."""
    if width > MAX_WIDTH:
        raise ValueError(f"the fp8 kernels take rows of up to {MAX_WIDTH} numbers, got {width}")
    values = x.new_empty((*x.shape[:-1], width), dtype=VALUES)
    return values, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _num_warps(width: int) -> int:
    """16 or 32 numbers a thread at FLUX's widths. Compiled for sm_90 by triton 3.6.0 in bfloat16: accesses of
    16 bytes, 34 to 64 registers, no spills; other counts have not been timed."""
    return 16 if width > 8192 else 8 if width > 1024 else 4
