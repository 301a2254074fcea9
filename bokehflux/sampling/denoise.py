"""The velocity of a run: the network, its conditioning, true CFG and grounding, as one callable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bokehflux.attention import AttentionSpec, Grounded, PivotQuery, Plain
from bokehflux.models.bokeh import BokehCondition
from bokehflux.models.embeddings import RopeTable, rope_table
from bokehflux.models.mmdit import MMDiT
from bokehflux.sampling.latents import LatentGrid, position_ids
from bokehflux.types import Conditioning

AttentionAt = Callable[[int, int], AttentionSpec]
"""(rows, step) -> what the joint attentions of that step compute."""


@dataclass(frozen=True, kw_only=True)
class Grounding:
    """Which row anchors the scene, and for how long."""

    pivot_row: int
    num_steps: int
    """Grounded steps, counted from the first."""


@dataclass(frozen=True, kw_only=True)
class Denoiser:
    """velocity(x, sigma, step) for a batch of rows that share prompt and size; built by `denoiser`."""

    mmdit: MMDiT
    conditioning: Conditioning
    rope: RopeTable
    guidance: float
    """Distilled guidance, an input of the network."""
    bokeh: BokehCondition | None
    attention: AttentionAt
    true_cfg: float
    """Above 1: classifier-free guidance against `negative`, at twice the cost."""
    negative: Conditioning | None

    @torch.inference_mode()
    def __call__(self, x: Tensor, sigma: Tensor, step: int) -> Tensor:
        """x [B, N, 64] -> velocity [B, N, 64]. The negative pass: no level, guidance 1, plain attention."""
        spec = self.attention(len(x), step)
        v = self._predict(x, sigma, self.conditioning, self.guidance, self.bokeh, spec)
        if self.true_cfg > 1 and self.negative is not None:
            null = self.bokeh.null() if self.bokeh is not None else None
            v_neg = self._predict(x, sigma, self.negative, 1.0, null, Plain())
            v = v_neg + self.true_cfg * (v - v_neg)
        return v

    def _predict(
        self,
        x: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        guidance: float,
        bokeh: BokehCondition | None,
        spec: AttentionSpec,
    ) -> Tensor:
        rows = len(x)
        return self.mmdit(
            x,
            conditioning.txt.expand(rows, -1, -1),
            conditioning.pooled.expand(rows, -1),
            model_sigma(sigma, x.dtype).to(x.device).expand(rows),
            torch.full((rows,), guidance, device=x.device),
            self.rope,
            spec,
            bokeh,
        )


def model_sigma(sigma: Tensor, dtype: torch.dtype) -> Tensor:
    """The noise level as the published pipeline hands it over: 1000 sigma rounded to `dtype`, / 1000.

    In bfloat16 this keeps about three digits of the timestep; another rounding is another picture.
    """
    return (sigma * 1000).to(dtype) / 1000


def grounded_attention_at(mmdit: MMDiT, grounding: Grounding | None) -> AttentionAt:
    """The published choice: grounded for the first steps, then plain; without grounding always plain."""
    shares_keys = mmdit.bokeh is None or mmdit.bokeh.config.adapt_k

    def attention_at(rows: int, step: int) -> AttentionSpec:
        if grounding is None or step >= grounding.num_steps:
            return Plain()
        pivot_of = (grounding.pivot_row,) * rows
        return Grounded(pivot_of=pivot_of) if shares_keys else PivotQuery(pivot_of=pivot_of)

    return attention_at


def denoiser(
    mmdit: MMDiT,
    conditioning: Conditioning,
    grid: LatentGrid,
    *,
    guidance: float = 3.0,
    bokeh: BokehCondition | None = None,
    grounding: Grounding | None = None,
    attention: AttentionAt | None = None,
    true_cfg: float = 1.0,
    negative: Conditioning | None = None,
) -> Denoiser:
    """A `Denoiser` for one prompt (conditioning of one row, shared by every row of the batch) and size.

    attention: a specification of your own for every step, in place of `grounding`.
    Raises ValueError for true CFG without a negative conditioning, and for both grounding and attention.
    """
    if true_cfg > 1 and negative is None:
        raise ValueError("true_cfg above 1 needs a negative conditioning")
    if attention is not None and grounding is not None:
        raise ValueError("grounding chooses the attention of every step: give it or attention, not both")
    ids = position_ids(grid, conditioning.txt.shape[1], mmdit.device)
    return Denoiser(
        mmdit=mmdit,
        conditioning=conditioning,
        rope=rope_table(ids, mmdit.config.axes_dim, mmdit.config.theta),
        guidance=guidance,
        bokeh=bokeh,
        attention=attention or grounded_attention_at(mmdit, grounding),
        true_cfg=true_cfg,
        negative=negative,
    )
