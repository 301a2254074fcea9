"""Stage 3: the bokeh adapter on a frozen base, as the paper trains it.

Half of the steps take unrelated rows at labelled levels; the other half take groups of one scene that share
noise and noise level, with every row grounded on the first of its group. `adapter_step` is the whole
objective and knows nothing about nano: any source of `AdapterBatch` and any frozen MMDiT will do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bokehflux.attention import Grounded, Plain
from bokehflux.models.adapter import BokehAdapter, BokehCondition, init_adapter
from bokehflux.models.embeddings import RopeTable
from bokehflux.models.mmdit import MMDiT
from bokehflux.nano.base import draw_guidance
from bokehflux.nano.recipe import AdapterStage
from bokehflux.training.data import LatentPool, LevelDraw
from bokehflux.training.log import Log
from bokehflux.training.objective import guided, mix, velocity_target
from bokehflux.training.optim import Ema, Optimizer, paced, trapezoid

TextLookup = tuple[Tensor, Tensor]
"""T5 states [S, T, W] and pooled vectors [S, P], one per scene."""


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
    txt: Tensor
    """[B, T, W]"""
    pooled: Tensor
    """[B, P]"""
    guidance: Tensor
    """[B] guidance the row is trained at; 1 is plain flow matching."""
    pivot_of: tuple[int, ...] | None
    """The grounding of a grouped batch."""


def adapter_step(
    mmdit: MMDiT, batch: AdapterBatch, null_text: TextLookup, rope: RopeTable, level_guidance: float = 0.0
) -> Tensor:
    """Loss of one batch: flow matching towards the guided velocity.

    A distilled base is sampled at guidance g, so the adapter is trained there: the target is
    u + g (data velocity - u), u being the model's own prediction without text, at the row's level (in a
    share `level_guidance` of rows, from the end of the batch, without level as well). null_text: the empty
    prompt's states [1, T, W] and pooled [1, P]. Weighted by 1 / g^2, the growth of the target's variance.
    """
    rows, device = len(batch.x0), batch.x0.device
    x = mix(batch.x0, batch.eps, batch.sigma)
    spec = (
        Plain(backend="sdpa") if batch.pivot_of is None else Grounded(pivot_of=batch.pivot_of, backend="sdpa")
    )
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        with torch.no_grad():
            null_txt, null_pooled = null_text[0].expand(rows, -1, -1), null_text[1].expand(rows, -1)
            keep = torch.arange(rows, device=device) < round(rows * (1 - level_guidance))
            levels = torch.where(keep, batch.levels, math.nan)
            ones = torch.ones(rows, device=device)
            u = mmdit(
                x, null_txt, null_pooled, batch.sigma, ones, rope, spec, BokehCondition(levels=levels)
            ).float()
        condition = BokehCondition(levels=batch.levels)
        # The first block's inputs ask for gradients like every other's, so that all share one compiled graph.
        x, txt = x.requires_grad_(), batch.txt.detach().requires_grad_()
        v = mmdit(x, txt, batch.pooled, batch.sigma, batch.guidance, rope, spec, condition).float()
    target = guided(velocity_target(batch.x0, batch.eps), u, batch.guidance)
    return ((v - target).square().mean(dim=(1, 2)) / batch.guidance**2).mean()


def draw_batch(
    pool: LatentPool, text: TextLookup, null_text: TextLookup, stage: AdapterStage, grouped: bool,
    generator: torch.Generator,
) -> AdapterBatch:  # fmt: skip
    """Rows of a pool: unrelated, or groups of one scene at distinct levels."""
    device, batch, group = generator.device, stage.batch, stage.group if grouped else 1
    groups, renders = batch // group, pool.latents.shape[1]

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    scene = torch.randint(pool.num_scenes, (groups,), generator=generator, device=device).repeat_interleave(
        group
    )
    render = uniform(groups, renders).argsort(dim=1)[:, :group].flatten()
    x0 = pool.latents[scene, render].float()
    eps = torch.randn((groups, *x0.shape[1:]), generator=generator, device=device).repeat_interleave(
        group, dim=0
    )
    levels = torch.where(uniform(batch) < stage.level_dropout, math.nan, pool.levels[scene, render])
    # Captions and guidance are one per group, as in a sweep of one prompt.
    drop = (uniform(groups) < stage.caption_dropout).repeat_interleave(group)
    guidance = draw_guidance(groups, stage.max_guidance, generator).repeat_interleave(group)
    return AdapterBatch(
        x0=x0,
        eps=eps,
        sigma=uniform(groups).repeat_interleave(group),
        levels=levels,
        txt=torch.where(drop[:, None, None], null_text[0], text[0][scene]),
        pooled=torch.where(drop[:, None], null_text[1], text[1][scene]),
        guidance=torch.where(drop, 1.0, guidance),
        pivot_of=tuple(i // group * group for i in range(batch)) if grouped else None,
    )


def train_adapter(
    mmdit: MMDiT, pool: LatentPool, text: TextLookup, null_text: TextLookup, rope: RopeTable,
    stage: AdapterStage, generator: torch.Generator, log: Log,
) -> BokehAdapter:  # fmt: skip
    """Train `mmdit.bokeh` in place on a frozen base; its weights end as the moving average."""
    adapter = mmdit.bokeh
    if adapter is None:
        raise ValueError("train_adapter needs an MMDiT that was built with a BokehConfig")
    mmdit.requires_grad_(False)
    init_adapter(adapter)
    parameters = adapter.trainable()
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = Optimizer(parameters, stage.lr, betas=(0.9, 0.99), weight_decay=0.0)
    ema = Ema(parameters, rate=0.003)
    for step, done in paced(stage.steps, stage.minutes):
        grouped = step % 2 == 1
        batch = draw_batch(pool, text, null_text, stage, grouped, generator)
        loss = adapter_step(mmdit, batch, null_text, rope, stage.level_guidance)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step(trapezoid(done, warmup=0.05))
        ema.update()
        log.step(step, **{"grounded" if grouped else "plain": loss})
    log.note("steps", step + 1)
    ema.copy_to_parameters()
    adapter.requires_grad_(False)
    return adapter


def stratified_levels(generator: torch.Generator, renders: int, exact_zero: float = 0.25) -> LevelDraw:
    """For `latent_pool`: a level from each of `renders` equal parts of 0-30, the first at times just 0."""

    def draw(count: int, k: int) -> Tensor:
        u = torch.rand(2, count, generator=generator, device=generator.device)
        levels = (k + u[0]) * (30 / renders)
        return torch.where(u[1] < exact_zero, 0.0, levels) if k == 0 else levels

    return draw
