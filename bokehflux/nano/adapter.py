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
from bokehflux.training.adapter import AdapterBatch, adapter_step
from bokehflux.training.batches import Draws
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
    draws: Draws,
) -> AdapterBatch:
    """Rows of a pool: unrelated, or groups of one scene at distinct levels.

    text: of every scene of the pool; null_text: [1, ...] of the empty caption.
    """
    group, renders = stage.group if grouped else 1, pool.latents.shape[1]
    # Scene, noise and its level, caption and guidance are one per group, as in a sweep of one prompt.
    each = draws.groups(group)

    def spread(x: Tensor) -> Tensor:
        return x.repeat_interleave(group, dim=0)

    scene = spread(each.integers("scene", pool.num_scenes))
    render = each.uniform("renders", renders).argsort(dim=1)[:, :group].flatten()
    x0 = pool.latents[scene, render].float()
    levels = torch.where(draws.uniform("level") < stage.level_dropout, math.nan, pool.levels[scene, render])
    leave_out = spread(each.uniform("unguided level") < stage.level_guidance)
    drop = spread(each.uniform("caption") < stage.caption_dropout)
    return AdapterBatch(
        x0=x0,
        eps=spread(each.normal("noise", *x0.shape[1:])),
        sigma=spread(each.uniform("sigma")),
        levels=levels,
        unguided_levels=torch.where(leave_out, math.nan, levels),
        text=Conditioning(
            txt=torch.where(drop[:, None, None], null_text.txt, text.txt[scene]),
            pooled=torch.where(drop[:, None], null_text.pooled, text.pooled[scene]),
        ),
        guidance=torch.where(drop, 1.0, spread(draw_guidance(each, stage.max_guidance))),
        pivot_of=tuple(i // group * group for i in range(len(draws))) if grouped else None,
    )


def train_adapter(
    mmdit: MMDiT,
    pool: LatentPool,
    text: Conditioning,
    null_text: Conditioning,
    rope: RopeTable,
    stage: AdapterStage,
    log: Log,
    saves: Saves | None = None,
) -> BokehAdapter:
    """Train `mmdit.bokeh` in place on a frozen base; it ends as its moving average. Texts as `draw_batch`."""
    adapter = mmdit.bokeh
    if adapter is None:
        raise ValueError("train_adapter needs an MMDiT that was built with a BokehConfig")
    mmdit.requires_grad_(False)
    init_adapter(adapter)
    named = adapter.trainable()
    for _, parameter in named:
        parameter.requires_grad_(True)

    def loss(step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        grouped = step.number % 2 == 1
        batch = draw_batch(pool, text, null_text, stage, grouped, step.draws)
        error = adapter_step(mmdit, batch, rope, null_text)
        return error, {"grounded" if grouped else "plain": error}

    optimizer = Optimizer(named, stage.lr, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = functools.partial(trapezoid, warmup=0.05)
    course = Course(
        seed=stage.seed,
        batch=stage.batch,
        steps=stage.steps,
        minutes=stage.minutes,
        ema_rate=0.003,
        schedule=schedule,
    )
    log.note("steps", train(loss, optimizer, course, log, saves))
    adapter.requires_grad_(False)
    return adapter
