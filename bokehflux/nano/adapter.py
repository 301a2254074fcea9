"""Stage 3: the bokeh adapter on the frozen base. Every other step takes groups of one scene, grounded."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from bokehflux.conditioning import Conditioning
from bokehflux.models.adapter import BokehAdapter, init_adapter
from bokehflux.models.embeddings import RopeTable
from bokehflux.models.mmdit import MMDiT
from bokehflux.nano.pool import LatentPool
from bokehflux.nano.recipe import AdapterStage
from bokehflux.training.adapter import AdapterBatch, Guide, adapter_step
from bokehflux.training.log import Log
from bokehflux.training.loop import Course, Step, train
from bokehflux.training.objective import draw_guidance
from bokehflux.training.optim import Optimizer, trapezoid
from bokehflux.training.state import Saves


def draw_batch(
    pool: LatentPool,
    text: Conditioning,
    null_text: Conditioning,
    stage: AdapterStage,
    grouped: bool,
    generator: torch.Generator,
) -> AdapterBatch:
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
        text=Conditioning(
            txt=torch.where(drop[:, None, None], null_text.txt, text.txt[scene]),
            pooled=torch.where(drop[:, None], null_text.pooled, text.pooled[scene]),
        ),
        guidance=torch.where(drop, 1.0, guidance),
        pivot_of=tuple(i // group * group for i in range(batch)) if grouped else None,
    )


def train_adapter(
    mmdit: MMDiT,
    pool: LatentPool,
    text: Conditioning,
    null_text: Conditioning,
    rope: RopeTable,
    stage: AdapterStage,
    generator: torch.Generator,
    log: Log,
    saves: Saves | None = None,
) -> BokehAdapter:
    """Train `mmdit.bokeh` in place on a frozen base; its weights end as the moving average.

    text: of every scene of the pool; null_text: [1, ...] of the empty caption.
    """
    adapter = mmdit.bokeh
    if adapter is None:
        raise ValueError("train_adapter needs an MMDiT that was built with a BokehConfig")
    mmdit.requires_grad_(False)
    init_adapter(adapter)
    named = adapter.trainable()
    for _, parameter in named:
        parameter.requires_grad_(True)
    guide = Guide(null_text=null_text, level_share=stage.level_guidance)

    def loss(step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        grouped = step.number % 2 == 1
        batch = draw_batch(pool, text, null_text, stage, grouped, generator)
        error = adapter_step(mmdit, batch, rope, guide)
        return error, {"grounded" if grouped else "plain": error}

    optimizer = Optimizer(named, stage.lr, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = functools.partial(trapezoid, warmup=0.05)
    course = Course(steps=stage.steps, minutes=stage.minutes, ema_rate=0.003, schedule=schedule)
    log.note("steps", train(loss, optimizer, course, log, saves))
    adapter.requires_grad_(False)
    return adapter
