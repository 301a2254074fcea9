"""Training a reference adapter on a frozen model: one picture of a scene, drawn again at another level.

The photograph passes the network once, targets read its keys and values, and only the photograph's updates
are trained. Real pairs are renders of one scene, so the target is known to the pixel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bokehflux.attention import OnReference
from bokehflux.conditioning import Conditioning
from bokehflux.models.adapter import BokehCondition
from bokehflux.models.embeddings import RopeTable
from bokehflux.models.mmdit import MMDiT
from bokehflux.models.reference import ReferenceAdapter
from bokehflux.sampling.reference import read_reference
from bokehflux.training.adapter import Scenes
from bokehflux.training.loop import Loss, Step
from bokehflux.training.objective import mix, velocity_target


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """How photographs and targets are drawn."""

    sharp: float = 0.5
    """Share of photographs that are their scene's first render, the sharpest; the others are any of them."""
    caption_dropout: float = 0.1
    """Share of scenes whose caption is left out."""


def reference_loss(
    mmdit: MMDiT,
    adapter: ReferenceAdapter,
    rope: RopeTable,
    reference_rope: RopeTable,
    how: Pairs,
    scenes: Scenes,
) -> Loss:
    """For `train`. mmdit: frozen, with its bokeh adapter. reference_rope: of `reference_ids`."""

    def loss(step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        draws = step.draws
        chosen = draws.on(scenes.device)
        scene = chosen.integers("scene", scenes.num_scenes)
        source, target = chosen.integers("renders", scenes.num_renders, 2).unbind(1)
        source = torch.where(chosen.uniform("sharp") < how.sharp, 0, source)
        text = scenes.text(scene, chosen.uniform("caption") < how.caption_dropout, chosen)
        photo, x0 = (scenes.latents(scene, render).to(draws.device) for render in (source, target))
        levels = [BokehCondition(levels=scenes.levels(scene, r).to(draws.device)) for r in (source, target)]
        sigma, eps = draws.spread("sigma"), draws.normal("noise", *x0.shape[1:])
        guidance = torch.ones_like(sigma)
        text = Conditioning(txt=text.txt.detach().requires_grad_(), pooled=text.pooled)
        photo.requires_grad_()
        keys = read_reference(mmdit, adapter, photo, text, levels[0], reference_rope, guidance)
        spec = OnReference(store=keys, backend="sdpa")
        # As in `adapter_step`: every block sees inputs that ask for gradients.
        x = mix(x0, eps, sigma).requires_grad_()
        v = mmdit(x, text.txt, text.pooled, sigma, guidance, rope, spec, levels[1]).float()
        error = (v - velocity_target(x0, eps)).square().mean()
        return error, {"loss": error}

    return loss
