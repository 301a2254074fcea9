"""Scalars and positions as vectors: sinusoids of noise level and guidance, their MLPs, rotary tables."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bokehflux.models.linear import Linear

SINUSOID_DIM = 256


def sinusoid(value: Tensor, dim: int = SINUSOID_DIM) -> Tensor:
    """[B] -> [B, dim] float32: cosines then sines of 1000 x value, at periods from 2 pi to 20,000 pi.

    value is multiplied by 1000 in its own dtype, as in the published code (in bfloat16 the rounding shows).
    """
    freqs = torch.exp(-math.log(10_000) * torch.arange(dim // 2, device=value.device) / (dim // 2))
    angles = (value * 1000).float()[:, None] * freqs  # [B, dim / 2]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class MLPEmbedder(nn.Module):
    """Linear, SiLU, Linear."""

    def __init__(self, in_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.in_layer = Linear(in_dim, hidden_dim)
        self.out_layer = Linear(hidden_dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class RopeTable(NamedTuple):
    """Cosine and sine of every token's rotation, each [L, head_dim / 2] float32."""

    cos: Tensor
    sin: Tensor


def rope_table(ids: Tensor, axes_dim: tuple[int, ...], theta: int) -> RopeTable:
    """Position ids [L, axes] -> rotations; axis a rotates axes_dim[a] channels. Angles in float64.

    float64 matters: in bfloat16, or even float32, the angles of far positions are wrong enough to see. For
    devices without float64 (MPS) the CPU computes the table.
    """
    device = ids.device
    ids = ids.double() if device.type != "mps" else ids.cpu().double()
    angles = []
    for axis, dim in enumerate(axes_dim):
        freqs = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64, device=ids.device) / dim)
        angles.append(ids[:, axis, None] * freqs)  # [L, dim / 2]
    angle = torch.cat(angles, dim=-1)  # [L, head_dim / 2]
    return RopeTable(angle.cos().float().to(device), angle.sin().float().to(device))
