"""Weights of the RMS norms of queries and keys; `kernels.pointwise` applies them, with the rotations."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """The weight of x / rms(x) * scale over the last dimension."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))


class QKNorm(nn.Module):
    """Separate RMS norms for queries and keys, over the head dim."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(head_dim)
        self.key_norm = RMSNorm(head_dim)

    def largest(self) -> Tensor:
        """[2] float32: the largest weight of queries and of keys, by size."""
        return torch.stack([norm.scale.abs().max().float() for norm in (self.query_norm, self.key_norm)])
