"""The adapter's query and key updates folded into the projections: they cost nothing per step; undo is exact.

q + s U D q with q = W x + b is (W + s U D W) x + (b + s U D b), the same for k: one matrix product at load
instead of two thin ones per block and step. Folded weights are computed in float32 and rounded once. The
default is unfolded, which reproduces the published rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bokehflux.models.adapter import BlockAdapter, LowRank
from bokehflux.models.linear import Linear
from bokehflux.models.mmdit import MMDiT


@dataclass(frozen=True, kw_only=True, eq=False)
class Folded:
    """What `fold_adapter` changed, kept on the CPU: 2.2 GB for the full-size adapter in bfloat16."""

    mmdit: MMDiT
    originals: tuple[tuple[Linear, str, slice, Tensor], ...]
    """(layer, "weight" or "bias", rows of it, their values before)."""

    @torch.no_grad()
    def undo(self) -> None:
        """Put every changed value back, bit for bit, wherever the network lies now.

        Raises ValueError if the folded weights were quantised to fp8.
        """
        if any(linear.scale is not None for linear, *_ in self.originals):
            raise ValueError("undo comes before fp8: the folded weights are quantised, load the model again")
        for linear, name, rows, before in self.originals:
            getattr(linear, name).data[rows].copy_(before)
        assert self.mmdit.bokeh is not None
        self.mmdit.bokeh.folded_at = None


@torch.no_grad()
def fold_adapter(mmdit: MMDiT, lora_scale: float | None = None) -> Folded:
    """Fold the adapter at one strength (None: its own). Levels stay free; the value branch is not touched.

    A folded network cannot run without levels or at another strength: both raise ValueError until `undo`.
    Raises ValueError without an adapter, if it is folded already, and for projections whose weights are
    stored narrow or have LoRA terms (folding first and attaching later is another sum).
    """
    adapter = mmdit.bokeh
    if adapter is None or adapter.folded_at is not None:
        raise ValueError("fold_adapter needs an adapter that is not folded yet")
    scale = adapter.config.lora_scale if lora_scale is None else lora_scale
    targets = list(_projections(mmdit))
    if any(linear.scale is not None for linear, _ in targets):
        raise ValueError(
            "fold_adapter comes before fp8: load without compute='fp8', fold, then quantize_mmdit"
        )
    if any(not linear.is_dense or linear.terms for linear, _ in targets):
        raise ValueError("fold_adapter needs dense projections without LoRA terms")
    originals: list[tuple[Linear, str, slice, Tensor]] = []
    for linear, block in targets:
        width = linear.in_features
        for part, update in enumerate((block.to_q_adp, block.to_k_adp)):
            if update is None:
                continue
            rows = slice(part * width, (part + 1) * width)
            for name in ("weight", "bias"):
                values = getattr(linear, name).data[rows]
                originals.append((linear, name, rows, values.to("cpu", copy=True)))
                values.copy_(_updated(values, update, scale))
    adapter.folded_at = scale
    return Folded(mmdit=mmdit, originals=tuple(originals))


def _projections(mmdit: MMDiT) -> Iterator[tuple[Linear, BlockAdapter]]:
    """Every adapted block's projection, and the updates for it."""
    assert mmdit.bokeh is not None
    blocks = mmdit.blocks
    for i in mmdit.bokeh.config.blocks:
        yield blocks[i].adapted, mmdit.bokeh.block(i)


def _updated(rows: Tensor, update: LowRank, scale: float) -> Tensor:
    """(I + scale * U D) rows, in float32 or better."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    down, up, rows = update.down.weight.to(wide), update.up.weight.to(wide), rows.to(wide)
    return rows + scale * update.scale * (up @ (down @ rows))
