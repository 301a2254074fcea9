"""The reference adapter: a photograph passes the network once and serves targets as keys and values.

A row that shows the photograph has noise level 0, rotary positions of its own, low-rank updates of its
queries, keys and values, and a small MLP after every block; targets are computed by the network as it is, and
read the photograph's keys and values beside their own (`attention.OnReference`). FLUX.2 [klein] caches
reference pictures in this way.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bokehflux.configs import MMDiTConfig, ReferenceConfig
from bokehflux.kernels.pointwise.interface import Projected
from bokehflux.models.adapter import LowRank

POSITION = 1.0
"""First coordinate of a reference token's rotary position; every other token has 0 there."""


class Bottleneck(LowRank):
    """x [..., E] -> up(gelu(down(norm(x)))) [..., E]."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.down(F.layer_norm(x, x.shape[-1:]).to(self.down.weight.dtype))
        return self.up(F.gelu(hidden)).to(x.dtype)


class ReferenceBlock(nn.Module):
    """What is added to one block."""

    def __init__(self, config: ReferenceConfig, mmdit: MMDiTConfig) -> None:
        super().__init__()
        rank, hidden_size = config.rank, mmdit.hidden_size
        self.to_q_ref = LowRank(hidden_size, hidden_size, rank)
        self.to_k_ref = LowRank(hidden_size, hidden_size, rank)
        self.to_v_ref = LowRank(hidden_size, hidden_size, rank)
        self.mlp_ref = Bottleneck(hidden_size, hidden_size, config.width)

    def update(self, heads: Projected) -> Projected:
        """Projected queries, keys and values, each [B, L, E] before norms -> x + lowrank(x)."""
        return heads._replace(
            q=heads.q + self.to_q_ref(heads.q),
            k=heads.k + self.to_k_ref(heads.k),
            v=heads.v + self.to_v_ref(heads.v),
        )

    def after(self, x: Tensor) -> Tensor:
        """What leaves the block, [B, L, E] -> x + mlp(x)."""
        return x + self.mlp_ref(x)


class ReferenceAdapter(nn.Module):
    """The updates of every block, numbered over double then single blocks."""

    def __init__(self, config: ReferenceConfig, mmdit: MMDiTConfig) -> None:
        super().__init__()
        self.config = config
        self.adapter_modules = nn.ModuleDict(
            {str(i): ReferenceBlock(config, mmdit) for i in range(mmdit.num_blocks)}
        )

    def block(self, index: int) -> ReferenceBlock:
        return self.adapter_modules[str(index)]  # type: ignore[return-value]

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """By name, every parameter that can change a target: nothing reads the last block's own output."""
        last = self.block(len(self.adapter_modules) - 1)
        unread = {id(p) for part in (last.to_q_ref, last.mlp_ref) for p in part.parameters()}
        return [(name, p) for name, p in self.named_parameters() if id(p) not in unread]


def reference_ids(ids: Tensor, txt_length: int) -> Tensor:
    """Positions [T + N, 3] of a reference picture's row: as any row's, its image tokens set apart."""
    apart = torch.zeros_like(ids)
    apart[txt_length:, 0] = POSITION
    return ids + apart
