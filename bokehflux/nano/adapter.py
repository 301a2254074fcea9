"""Stage 3: the bokeh adapter on the frozen base."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bokehflux.conditioning import Conditioning
from bokehflux.models.adapter import init_adapter
from bokehflux.models.embeddings import RopeTable
from bokehflux.models.mmdit import MMDiT
from bokehflux.nano.pool import LatentPool
from bokehflux.nano.recipe import AdapterStage, FrozenBaseStage
from bokehflux.training.adapter import adapter_loss, trainable_adapter
from bokehflux.training.batches import Draws
from bokehflux.training.log import Log
from bokehflux.training.loop import Course, Look, Loss, train
from bokehflux.training.optim import Optimizer, trapezoid
from bokehflux.training.state import Saves


@dataclass(frozen=True, kw_only=True)
class EncodedPool:
    """A pool's scenes with their captions as the text encoders see them."""

    pool: LatentPool
    captions: Conditioning
    """One row a scene."""
    empty: Conditioning
    """[1, ...] of the empty caption."""

    @property
    def num_scenes(self) -> int:
        return self.pool.num_scenes

    @property
    def num_renders(self) -> int:
        return self.pool.latents.shape[1]

    def latents(self, scene: Tensor, render: Tensor) -> Tensor:
        return self.pool.latents[scene, render].float()

    def levels(self, scene: Tensor, render: Tensor) -> Tensor:
        return self.pool.levels[scene, render]

    @property
    def device(self) -> torch.device:
        return self.pool.latents.device

    def text(self, scene: Tensor, drop: Tensor, draws: Draws) -> Conditioning:
        return Conditioning(
            txt=torch.where(drop[:, None, None], self.empty.txt, self.captions.txt[scene]),
            pooled=torch.where(drop[:, None], self.empty.pooled, self.captions.pooled[scene]),
        )

    def null_text(self) -> Conditioning:
        return self.empty


def train_adapter(
    mmdit: MMDiT,
    scenes: EncodedPool,
    rope: RopeTable,
    stage: AdapterStage,
    log: Log,
    saves: Saves | None = None,
) -> None:
    """Train `mmdit.bokeh` in place on a frozen base; it ends as its moving average."""
    named = trainable_adapter(mmdit)
    assert mmdit.bokeh is not None
    init_adapter(mmdit.bokeh)
    loss = adapter_loss(mmdit, rope, stage, plain=scenes, grouped=scenes)
    train_on_frozen(loss, named, stage, log, saves)
    mmdit.requires_grad_(False)


def train_on_frozen(
    loss: Loss,
    named: list[tuple[str, nn.Parameter]],
    stage: FrozenBaseStage,
    log: Log,
    saves: Saves | None,
    looks: Sequence[Look] = (),
) -> None:
    """Train what a stage adds to the frozen base; the parameters end as their moving average."""
    course = Course(
        seed=stage.seed,
        batch=stage.batch,
        steps=stage.steps,
        minutes=stage.minutes,
        ema_rate=0.003,
        schedule=functools.partial(trapezoid, warmup=0.05),
    )
    optimizer = Optimizer(named, stage.lr, betas=(0.9, 0.99), weight_decay=0.0)
    log.note("steps", train(loss, optimizer, course, log, saves, looks))
