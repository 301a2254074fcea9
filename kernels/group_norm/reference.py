"""silu(group_norm(x)) in PyTorch's operators: the definition, and what runs without Triton."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """As `interface.group_norm_silu`; any layout."""
    # Autocast would copy every activation to float32 first; the operator accumulates in float32 anyway.
    with torch.autocast(x.device.type, enabled=False):
        return F.silu(F.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype), eps))
