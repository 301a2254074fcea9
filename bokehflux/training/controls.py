"""Training a control adapter on a frozen model with its bokeh adapter: the same objective, with more asked.

Groups of one scene differ in level, focus, aperture or map, and share noise as a sweep does.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from bokehflux.models.controls import ControlAdapter, Controls
from bokehflux.models.embeddings import RopeTable
from bokehflux.models.mmdit import MMDiT
from bokehflux.training.adapter import Sampling, Scenes, adapter_step, choose, draw_batch
from bokehflux.training.batches import Draws
from bokehflux.training.loop import Loss, Step


class ControlledScenes(Scenes, Protocol):
    """Scenes of which is known how every picture was taken."""

    def controls(self, adapter: ControlAdapter, scene: Tensor, render: Tensor, draws: Draws) -> Controls:
        """What pictures [B] are asked for by. draws: of the rows, to choose in which words."""


def controls_loss(
    mmdit: MMDiT, adapter: ControlAdapter, rope: RopeTable, how: Sampling, scenes: ControlledScenes
) -> Loss:
    """For `train`. mmdit: frozen. Unrelated rows and groups alternate as `how` says."""
    null_text = scenes.null_text() if how.max_guidance > 1 else None

    def loss(step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        grouped = how.in_groups(step.number)
        group = how.group if grouped else 1
        batch = draw_batch(scenes, how, grouped, step.draws)
        # The same numbers as in the batch: draws go by name.
        scene, render = choose(scenes, group, step.draws.groups(group).on(scenes.device))
        asked = scenes.controls(
            adapter, scene.repeat_interleave(group), render, step.draws.on(scenes.device)
        )  # fmt: skip
        error = adapter_step(mmdit, batch, rope, null_text, asked)
        return error, {"grounded" if grouped else "plain": error}

    return loss
