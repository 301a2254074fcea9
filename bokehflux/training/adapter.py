"""The objective of a bokeh adapter on a frozen base, as the paper trains it.

A batch holds unrelated rows at labelled levels, or groups of one scene that share noise and noise level, with
every row grounded on the first of its group. Where batches come from is the recipe's business.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bokehflux.attention import AttentionSpec, Grounded, Plain
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
    unguided_levels: Tensor
    """[B] the same for the prediction that guidance leads away from, which may leave out further levels."""
    text: Conditioning
    """Of the B rows."""
    guidance: Tensor
    """[B] guidance the row is trained at; 1 is plain flow matching."""
    pivot_of: tuple[int, ...] | None
    """The grounding of a grouped batch."""


def adapter_step(
    mmdit: MMDiT, batch: AdapterBatch, rope: RopeTable, null_text: Conditioning | None = None
) -> Tensor:
    """Loss of one batch: flow matching, towards the guided velocity where the empty prompt is given.

    A distilled base is sampled at guidance g, so its adapter is trained there: the target is
    u + g (data velocity - u), u being the model's own prediction for `null_text`, [1, ...]. Rows then weigh
    1 / g^2, the growth of the target's variance. mmdit: with an adapter, whose parameters ask for gradients.
    """
    x = mix(batch.x0, batch.eps, batch.sigma)
    target, weight = velocity_target(batch.x0, batch.eps), torch.ones_like(batch.sigma)
    spec: AttentionSpec = Plain(backend="sdpa")
    if batch.pivot_of is not None:
        spec = Grounded(pivot_of=batch.pivot_of, backend="sdpa")
    if null_text is not None:
        null_txt, null_pooled = (
            null_text.txt.expand_as(batch.text.txt),
            null_text.pooled.expand_as(batch.text.pooled),
        )
        levels = BokehCondition(levels=batch.unguided_levels)
        with torch.no_grad():
            ones = torch.ones_like(batch.sigma)
            u = mmdit(x, null_txt, null_pooled, batch.sigma, ones, rope, spec, levels).float()
        target, weight = guided(target, u, batch.guidance), batch.guidance**2
    # The first block's inputs ask for gradients like every other's, so that all share one compiled graph.
    x, txt = x.requires_grad_(), batch.text.txt.detach().requires_grad_()
    levels = BokehCondition(levels=batch.levels)
    v = mmdit(x, txt, batch.text.pooled, batch.sigma, batch.guidance, rope, spec, levels).float()
    return ((v - target).square().mean(dim=(1, 2)) / weight).mean()
