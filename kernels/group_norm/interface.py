"""silu(group_norm(x)) in one call: PyTorch's operators, or our kernels where those would copy.

PyTorch's CUDA group norm cannot take the channels-last layout and turns every activation twice. A 16-bit
channels-last tensor on an NVIDIA GPU therefore goes through `ops`, read twice and written once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from . import reference


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """x [B, C, H, W] normalised over groups of C / groups channels, weighted, shifted, through SiLU.

    weight, bias: [C], any float dtype. Statistics in float32. Returns x's shape, dtype and layout.
    Differentiable. Raises ValueError when groups does not divide C.
    """
    if x.ndim != 4 or x.shape[1] % groups:
        raise ValueError(f"expected [B, C, H, W] with C a multiple of {groups} groups, got {tuple(x.shape)}")
    if takes(x):
        from . import ops

        return ops.group_norm_silu(x, weight, bias, groups, eps)
    return reference.group_norm_silu(x, weight, bias, groups, eps)


def takes(x: Tensor) -> bool:
    """Whether the kernels run such a tensor: 16 bits, channels last, on an NVIDIA GPU from sm_80 on."""
    return dispatch.takes(x) and x.is_contiguous(memory_format=torch.channels_last)
