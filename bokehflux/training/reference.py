"""Training a reference adapter on a frozen model: one picture of a scene, drawn again at another level.

The photograph passes the network once, targets read its keys and values, and only the photograph's updates
are trained. Real pairs are renders of one scene, so the target is known to the pixel.

What counts is the picture that a step's velocity leads to, not the velocity: the network alone tells noise
from picture well where noise is weak, and in velocities the errors there are 30 times as large.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bokehflux.attention import OnReference
from bokehflux.conditioning import Conditioning, onto
from bokehflux.models.adapter import BokehCondition
from bokehflux.models.embeddings import RopeTable
from bokehflux.models.mmdit import MMDiT
from bokehflux.models.reference import ReferenceAdapter
from bokehflux.sampling.reference import read_reference
from bokehflux.training.adapter import Scenes
from bokehflux.training.loop import Loss, Step
from bokehflux.training.objective import mix


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """How photographs and targets are drawn."""

    sharp: float = 0.5
    """Share of photographs that are their scene's first render, the sharpest; the others are any of them."""
    caption_dropout: float = 0.1
    """Share of scenes whose caption is left out."""
    targets: int = 4
    """Rows that look at each photograph, which passes the network once for them; they divide the batch."""
    first: float = 0.2
    """Share of rows that are noise alone, where sampling begins."""
    own: float = 0.5
    """Share of rows on the way to the picture that the network itself draws in one step, not to the true
    one: in sampling it meets its own errors."""


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
        each = draws.groups(how.targets)  # a photograph

        def rows(x: Tensor) -> Tensor:
            return x.repeat_interleave(how.targets, dim=0)

        chosen = each.on(scenes.device)
        scene = chosen.integers("scene", scenes.num_scenes)
        source = chosen.integers("photo", scenes.num_renders)
        source = torch.where(chosen.uniform("sharp") < how.sharp, 0, source)
        target = draws.on(scenes.device).integers("target", scenes.num_renders)
        text = scenes.text(scene, chosen.uniform("caption") < how.caption_dropout, chosen)
        photo, x0 = (
            onto(scenes.latents(*which), draws.device) for which in ((scene, source), (rows(scene), target))
        )
        photo_levels, levels = (
            BokehCondition(levels=onto(scenes.levels(*which), draws.device))
            for which in ((scene, source), (rows(scene), target))
        )
        # The targets of a photograph are spread over all noise levels, as those of the whole step are.
        sigma = draws.spread("sigma").view(how.targets, -1).T.flatten()
        sigma = (sigma / (1 - how.first)).clamp(max=1)
        eps, guidance = draws.normal("noise", *x0.shape[1:]), torch.ones_like(sigma)
        # As in `adapter_step`: every block sees inputs that ask for gradients.
        txt = text.txt.detach().requires_grad_()
        keys = read_reference(
            mmdit, adapter, photo.requires_grad_(), Conditioning(txt=txt, pooled=text.pooled), photo_levels,
            reference_rope, guidance[: len(photo)],
        )  # fmt: skip
        spec = OnReference(keys=keys.repeated(how.targets), backend="sdpa")

        def picture(x: Tensor, sigma: Tensor) -> Tensor:
            x = x.requires_grad_()
            v = mmdit(x, rows(txt), rows(text.pooled), sigma, guidance, rope, spec, levels).float()
            return x - sigma[:, None, None] * v

        with torch.no_grad():
            drawn = picture(eps, torch.ones_like(sigma))
        own = draws.uniform("own") < how.own
        error = picture(mix(torch.where(own[:, None, None], drawn, x0), eps, sigma), sigma) - x0
        loss = error.square().mean()
        return loss, {"loss": loss}

    return loss
