"""The bokeh adapter: a level becomes one value vector per block, and queries and keys get low-rank updates.

Parameter names are those of the published adapter file. The published cross-attention has a single key, so
its softmax is one and its output is the value vector itself, whatever the query is. `to_k_bokeh` is loaded
because the file holds it, and never computed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bokehflux.configs import BokehConfig, MMDiTConfig
from bokehflux.lens import check_level, unit_level

if TYPE_CHECKING:
    from bokehflux.models.controls import Controls

NULL_INPUT = -1.0
"""Model input that means "no level": the negative pass, and dropped levels in training."""


@dataclass(frozen=True, kw_only=True, eq=False)
class BokehCondition:
    """What the adapter is asked for: one level per row, and how strongly it acts."""

    levels: Tensor
    """[B] floating point: blur of each row, 0 (all sharp) to 30; NaN is the null level."""
    lora_scale: float | None = None
    """Strength of the query and key updates; None takes the adapter's own."""
    bokeh_scale: float | None = None
    """Strength of the level's value vector; None takes the adapter's own."""
    controls: Controls | None = None
    """What the rows are asked for beside their level."""

    @classmethod
    def of(cls, levels: Sequence[float | None]) -> BokehCondition:
        """A condition from plain numbers; None is the null level. Raises ValueError outside 0-30."""
        for level in levels:
            if level is not None:
                check_level(level)
        values = [math.nan if level is None else level for level in levels]
        return cls(levels=torch.tensor(values, dtype=torch.float64))

    def model_input(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """[B]: the level as 0-1, or -1 for the null level."""
        scaled = torch.where(self.levels.isnan(), NULL_INPUT, unit_level(self.levels))
        return scaled.to(dtype).to(device)

    def rows(self, rows: slice) -> BokehCondition:
        """The condition of some rows of the batch."""
        controls = None if self.controls is None else self.controls.rows(rows)
        return dataclasses.replace(self, levels=self.levels[rows], controls=controls)

    def null(self) -> BokehCondition:
        """The same strengths with every level dropped, and nothing else asked for."""
        return dataclasses.replace(self, levels=torch.full_like(self.levels, math.nan), controls=None)


class LowRank(nn.Module):
    """x [..., in] -> scale * up(down(x)) [..., out]. `init_adapter` makes it start as zero."""

    def __init__(self, in_dim: int, out_dim: int, rank: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.down = nn.Linear(in_dim, rank, bias=False)
        self.up = nn.Linear(rank, out_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.up(self.down(x.to(self.down.weight.dtype)))
        return (out if self.scale == 1 else out * self.scale).to(x.dtype)


class BlockAdapter(nn.Module):
    """What the adapter adds to one block."""

    def __init__(self, config: BokehConfig, hidden_size: int) -> None:
        super().__init__()
        scale = config.low_rank_scale
        self.to_k_bokeh = LowRank(config.context_dim, hidden_size, config.rank, scale)
        self.to_v_bokeh = LowRank(config.context_dim, hidden_size, config.rank, scale)
        self.to_q_adp = LowRank(hidden_size, hidden_size, config.rank, scale) if config.adapt_q else None
        self.to_k_adp = LowRank(hidden_size, hidden_size, config.rank, scale) if config.adapt_k else None

    def update_q(self, q: Tensor, scale: float) -> Tensor:
        """Projected queries [Q, L, E], before their norm -> q + scale * lowrank(q), in place if it can."""
        return q if self.to_q_adp is None else _updated(q, self.to_q_adp, scale)

    def update_k(self, k: Tensor, scale: float) -> Tensor:
        """Projected keys [B, L, E], before their norm -> k + scale * lowrank(k), as `update_q`."""
        return k if self.to_k_adp is None else _updated(k, self.to_k_adp, scale)


def _updated(x: Tensor, update: LowRank, scale: float) -> Tensor:
    if torch.is_grad_enabled():
        return x + scale * update(x)
    return x.add_(update(x).mul_(scale))  # no second x is held; the same two roundings


class BokehAdapter(nn.Module):
    """Level embedding and the adapted blocks, keyed by their number over double then single blocks."""

    def __init__(self, config: BokehConfig, mmdit: MMDiTConfig) -> None:
        super().__init__()
        if config.blocks[-1] >= mmdit.num_blocks:
            raise ValueError(
                f"adapter block {config.blocks[-1]} does not exist: the model has {mmdit.num_blocks}"
            )
        self.config = config
        self.num_heads = mmdit.num_heads
        self.folded_at: float | None = None
        """Strength at which the query and key updates are in the base's weights (`fold`), or None."""
        self.embedding_layer = nn.Sequential(
            nn.Linear(1, config.hidden_dim), nn.ReLU(), nn.Linear(config.hidden_dim, config.context_dim)
        )
        self.adapter_modules = nn.ModuleDict(
            {str(i): BlockAdapter(config, mmdit.hidden_size) for i in config.blocks}
        )

    def block(self, index: int) -> BlockAdapter:
        """The adapter of one adapted block."""
        return self.adapter_modules[str(index)]  # type: ignore[return-value]

    def values(self, model_input: Tensor, scale: float) -> dict[int, Tensor]:
        """[B] (level / 30 or -1) -> the value vector of each adapted block, [B, H, D]."""
        context = self.embedding_layer(model_input.to(self.dtype)[:, None])  # [B, 1] -> [B, C]
        return {  # [B, E] -> [B, H, D]
            i: scale * self.block(i).to_v_bokeh(context).unflatten(-1, (self.num_heads, -1))
            for i in self.config.blocks
        }

    @property
    def dtype(self) -> torch.dtype:
        return next(self.embedding_layer.parameters()).dtype

    @property
    def value_layers(self) -> tuple[LowRank, ...]:
        """In the order in which `values` calls them."""
        return tuple(self.block(i).to_v_bokeh for i in self.config.blocks)

    @property
    def unread(self) -> tuple[nn.Parameter, ...]:
        """The parameters of `to_k_bokeh`, which no output depends on."""
        return tuple(p for i in self.config.blocks for p in self.block(i).to_k_bokeh.parameters())

    def trainable(self) -> list[nn.Parameter]:
        """Every parameter that can change an output."""
        unread = {id(p) for p in self.unread}
        return [p for p in self.parameters() if id(p) not in unread]


def init_adapter(adapter: nn.Module, generator: torch.Generator | None = None) -> None:
    """Start of training: down-projections N(0, 1/rank), up-projections zero: the adapter does nothing yet."""
    for module in adapter.modules():
        if isinstance(module, LowRank):
            nn.init.normal_(module.down.weight, std=1 / module.down.out_features, generator=generator)
            nn.init.zeros_(module.up.weight)
