"""Stage 4: the reference adapter, on the frozen base with its bokeh adapter."""

from __future__ import annotations

import functools

from bokehflux.models.adapter import init_adapter
from bokehflux.models.embeddings import RopeTable
from bokehflux.models.mmdit import MMDiT
from bokehflux.models.reference import ReferenceAdapter
from bokehflux.nano.adapter import EncodedPool
from bokehflux.nano.recipe import ReferenceStage
from bokehflux.training.log import Log
from bokehflux.training.loop import Course, train
from bokehflux.training.optim import Optimizer, trapezoid
from bokehflux.training.reference import reference_loss
from bokehflux.training.state import Saves


def train_reference(
    mmdit: MMDiT,
    adapter: ReferenceAdapter,
    scenes: EncodedPool,
    ropes: tuple[RopeTable, RopeTable],
    stage: ReferenceStage,
    log: Log,
    saves: Saves | None = None,
) -> None:
    """Train the adapter in place; it ends as its moving average. ropes: of targets, of photographs."""
    init_adapter(adapter)
    course = Course(
        seed=stage.seed,
        batch=stage.batch,
        steps=stage.steps,
        minutes=stage.minutes,
        ema_rate=0.003,
        schedule=functools.partial(trapezoid, warmup=0.05),
    )
    loss = reference_loss(mmdit, adapter, *ropes, stage, scenes)
    optimizer = Optimizer(adapter.trainable(), stage.lr, betas=(0.9, 0.99), weight_decay=0.0)
    log.note("steps", train(loss, optimizer, course, log, saves))
