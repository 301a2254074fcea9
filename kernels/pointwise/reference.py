"""The passes in plain PyTorch: their definition, and what runs without Triton, with gradients or compiled.

The definition is what they give on float32 tensors. In 16-bit types every operation rounds, in the order in
which the published networks round.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6
"""The epsilon of every norm here."""


class Projected(NamedTuple):
    """One stream's queries, keys and values as they leave their projection, and the norms that wait for them.

    Views of a fused projection will do: only the last dim need be contiguous.
    """

    q: Tensor
    """[Q, L, E], of those rows whose queries are used."""
    k: Tensor
    """[B, L, E]"""
    v: Tensor
    """[B, L, E]"""
    q_scale: Tensor
    """[D] weight of the queries' RMS norm; E = H D."""
    k_scale: Tensor
    """[D]"""


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    out = F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift
    # A CPU keeps x in float32 where it multiplies in bfloat16.
    return out.to(scale.dtype) if x.device.type == "cpu" else out


def add_gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x + gate * y


def add_gated_modulate(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    x = add_gated(x, y, gate)
    return x, modulate(x, scale, shift)


def rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    """x / rms(x) * scale over the last dim; statistics in float32, scaled in the input's dtype."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + EPS)).to(x.dtype) * scale.to(
        x.dtype
    )


def rotate(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    """Rotate neighbouring channel pairs of x [B, L, H, D] by cos, sin [L, D/2]; float32, then dtype."""
    pairs = x.float().unflatten(-1, (-1, 2))  # [B, L, H, D/2, 2]
    cos, sin = cos[:, None], sin[:, None]  # [L, 1, D/2]
    if _on_cpu(x, dtype):
        # One pass instead of seven. In float32 its fused multiply-adds would move last bits.
        turned = torch.view_as_complex(pairs) * torch.complex(cos, sin)
        return torch.view_as_real(turned).flatten(-2).to(dtype)
    even, odd = pairs.unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).to(dtype)


def _on_cpu(x: Tensor, dtype: torch.dtype) -> bool:
    return x.device.type == "cpu" and dtype == torch.bfloat16 and not torch.compiler.is_compiling()


def joint_heads(streams: Sequence[Projected], cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dim, dtype = streams[0].q_scale.shape[0], streams[0].q.dtype
    # A CPU rounds queries and keys once, as Triton does.
    inside = torch.float32 if _on_cpu(streams[0].q, dtype) else dtype

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, dim))

    q = _joined([rms_norm(heads(s.q).to(inside), s.q_scale) for s in streams])
    k = _joined([rms_norm(heads(s.k).to(inside), s.k_scale) for s in streams])
    return rotate(q, cos, sin, dtype), rotate(k, cos, sin, dtype), _joined([heads(s.v) for s in streams])


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def concat_gelu(joint: Tensor, hidden: Tensor) -> Tensor:
    return torch.cat([joint, F.gelu(hidden, approximate="tanh")], dim=-1)
