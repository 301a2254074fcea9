"""Rowwise quantisation to e4m3 in plain PyTorch, in float32: the definition, and the form for CPUs.

A row x of K numbers gets the scale amax |x| * (1 / 448) and becomes x * (1 / scale) in e4m3: products
and a reciprocal that every device rounds alike.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..pointwise import reference as pointwise

E4M3_MAX = 448.0
"""Largest number of e4m3: no row holds a larger one after scaling, so none is ever clipped."""
AMAX_FLOOR = 1e-12
"""Rows below are quantised as if this were their largest number: zeros stay zeros, with a finite scale."""


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., K], any floating dtype -> (values [..., K] float8_e4m3fn, scale [..., 1] float32).

    values * scale stands for x. Rows that are not finite give values that are not a number.
    """
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp_min(AMAX_FLOOR) * (1 / E4M3_MAX)
    return (wide * scale.reciprocal()).to(torch.float8_e4m3fn), scale


def quantize_modulated(x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize` of norm(x) * (1 + scale) + shift; x [B, L, K], scale and shift [B or 1, 1, K]."""
    return quantize(pointwise.modulate(x.float(), scale.float(), shift.float()))


def add_gated_quantize_modulated(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """x + gate * y in the dtype of x, and `quantize_modulated` of that sum as it is stored."""
    x = pointwise.add_gated(x.float(), y.float(), gate.float()).to(x.dtype)
    return x, *quantize_modulated(x, scale, shift)


def quantize_gelu(hidden: Tensor, beside: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`quantize` of [beside, gelu(hidden)], one scale for both; hidden [..., K], beside [..., E]."""
    active = F.gelu(hidden.float(), approximate="tanh")
    return quantize(active if beside is None else torch.cat([beside.float(), active], dim=-1))
