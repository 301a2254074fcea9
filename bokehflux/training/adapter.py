"""The objective of a bokeh adapter on a frozen base, as the paper trains it.

A batch holds unrelated rows at labelled levels, or groups of one scene that share noise and noise level, with
every row grounded on the first of its group. Where batches come from is the recipe's business.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bokehflux.attention import Grounded, Plain
from bokehflux.conditioning import Conditioning
from bokehflux.models.adapter import BokehCondition
from bokehflux.models.embeddings import RopeTable
from bokehflux.models.mmdit import MMDiT
from bokehflux.training.objective import guided, mix, velocity_target


@dataclass(frozen=True, kw_only=True)
class AdapterBatch:
    """B rows of training data for the adapter."""

    x0: Tensor
    """[B, N, C] packed model latents."""
    eps: Tensor
    """[B, N, C] noise, equal within a grounded group."""
    sigma: Tensor
    """[B] noise levels, equal within a grounded group."""
    levels: Tensor
    """[B] 0-30, NaN where the level is dropped."""
    text: Conditioning
    """Of the B rows."""
    guidance: Tensor
    """[B] guidance the row is trained at; 1 is plain flow matching."""
    pivot_of: tuple[int, ...] | None
    """The grounding of a grouped batch."""


@dataclass(frozen=True, kw_only=True)
class Guide:
    """The velocity without text, away from which a guidance-distilled base is to be led."""

    null_text: Conditioning
    """[1, ...] of the empty prompt."""
    level_share: float = 0.0
    """Share of the rows, from the end of the batch, in which the level is dropped together with the text."""


def adapter_step(mmdit: MMDiT, batch: AdapterBatch, rope: RopeTable, guide: Guide | None = None) -> Tensor:
    """Loss of one batch: flow matching, towards the guided velocity if there is a guide.

    A distilled base is sampled at guidance g, so its adapter is trained there: the target is
    u + g (data velocity - u), u being the model's own prediction without text. Rows then weigh 1 / g^2, the
    growth of the target's variance. mmdit: with an adapter, whose parameters ask for gradients.
    """
    rows, device = len(batch.x0), batch.x0.device
    x = mix(batch.x0, batch.eps, batch.sigma)
    plain, pivot_of = batch.pivot_of is None, batch.pivot_of or ()
    spec = Plain(backend="sdpa") if plain else Grounded(pivot_of=pivot_of, backend="sdpa")
    target, weight = velocity_target(batch.x0, batch.eps), torch.ones(rows, device=device)
    if guide is not None:
        keep = torch.arange(rows, device=device) < round(rows * (1 - guide.level_share))
        levels = BokehCondition(levels=torch.where(keep, batch.levels, math.nan))
        null_txt = guide.null_text.txt.expand(rows, -1, -1)
        null_pooled = guide.null_text.pooled.expand(rows, -1)
        with torch.no_grad():
            ones = torch.ones(rows, device=device)
            u = mmdit(x, null_txt, null_pooled, batch.sigma, ones, rope, spec, levels).float()
        target, weight = guided(target, u, batch.guidance), batch.guidance**2
    # The first block's inputs ask for gradients like every other's, so that all share one compiled graph.
    x, txt = x.requires_grad_(), batch.text.txt.detach().requires_grad_()
    levels = BokehCondition(levels=batch.levels)
    v = mmdit(x, txt, batch.text.pooled, batch.sigma, batch.guidance, rope, spec, levels).float()
    return ((v - target).square().mean(dim=(1, 2)) / weight).mean()
