"""The velocity of a run: the network, its conditioning, true CFG and grounding, as one callable."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bokehflux.attention import AttentionSpec, Grounded, PivotQuery, Plain
from bokehflux.models.bokeh import BokehCondition
from bokehflux.models.embeddings import RopeTable, rope_table
from bokehflux.models.mmdit import MMDiT
from bokehflux.sampling.latents import LatentGrid, position_ids
from bokehflux.types import Conditioning


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
    grounding: Grounding | None
    true_cfg: float
    """Above 1: classifier-free guidance against `negative`, at twice the cost."""
    negative: Conditioning | None

    @torch.inference_mode()
    def __call__(self, x: Tensor, sigma: Tensor, step: int) -> Tensor:
        """x [B, N, 64] -> velocity [B, N, 64]. The negative pass has no level, guidance 1 and no grounding."""
        v = self._predict(x, sigma, self.conditioning, self.guidance, self.bokeh, self._attention(len(x), step))
        if self.true_cfg > 1 and self.negative is not None:
            null = self.bokeh.null() if self.bokeh is not None else None
            v_neg = self._predict(x, sigma, self.negative, 1.0, null, Plain())
            v = v_neg + self.true_cfg * (v - v_neg)
        return v

    def _attention(self, rows: int, step: int) -> AttentionSpec:
        if self.grounding is None or step >= self.grounding.num_steps:
            return Plain()
        pivot_of = (self.grounding.pivot_row,) * rows
        shares_keys = self.mmdit.bokeh is None or self.mmdit.bokeh.config.adapt_k
        return Grounded(pivot_of=pivot_of) if shares_keys else PivotQuery(pivot_of=pivot_of)

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
    """The noise level as the published pipeline hands it to the network: 1000 sigma rounded to `dtype`, / 1000.

    In bfloat16 this keeps about three digits of the timestep; another rounding is another picture.
    """
    return (sigma * 1000).to(dtype) / 1000


def denoiser(
    mmdit: MMDiT,
    conditioning: Conditioning,
    grid: LatentGrid,
    *,
    guidance: float = 3.0,
    bokeh: BokehCondition | None = None,
    grounding: Grounding | None = None,
    true_cfg: float = 1.0,
    negative: Conditioning | None = None,
) -> Denoiser:
    """A `Denoiser` for one prompt (conditioning of one row, shared by every row of the batch) and size.

    Raises ValueError for true CFG without a negative conditioning.
    """
    if true_cfg > 1 and negative is None:
        raise ValueError("true_cfg above 1 needs a negative conditioning")
    ids = position_ids(grid, conditioning.txt.shape[1], mmdit.device)
    return Denoiser(
        mmdit=mmdit,
        conditioning=conditioning,
        rope=rope_table(ids, mmdit.config.axes_dim, mmdit.config.theta),
        guidance=guidance,
        bokeh=bokeh,
        grounding=grounding,
        true_cfg=true_cfg,
        negative=negative,
    )
