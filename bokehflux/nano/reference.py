"""Stage 4: the reference adapter, on the frozen base with its bokeh adapter."""

from __future__ import annotations

from bokehflux.models.adapter import init_adapter
from bokehflux.models.embeddings import RopeTable
from bokehflux.models.mmdit import MMDiT
from bokehflux.models.reference import ReferenceAdapter
from bokehflux.nano.adapter import EncodedPool, train_on_frozen
from bokehflux.nano.recipe import ReferenceStage
from bokehflux.training.log import Log
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
    loss = reference_loss(mmdit, adapter, *ropes, stage, scenes)
    train_on_frozen(loss, adapter.trainable(), stage, log, saves)
