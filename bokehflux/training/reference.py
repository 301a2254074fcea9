"""Training a reference adapter on a frozen model: one picture of a scene, drawn again at another level.

The photograph passes the network once, targets read its keys and values, and only the photograph's updates
are trained. Real pairs are renders of one scene, so the target is known to the pixel.

What counts is the picture that a step's velocity leads to, as `sampling.inversion.followed` mends it: not
the velocity, whose errors are largest where noise is weak and the network needs no photograph.
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
    """Rows that look at each photograph, which passes the network once for them; they divide the batch. The
    first is the photograph itself, from which others learn what their pictures lack."""
    first: float = 0.2
    """Share of photographs whose rows are noise alone, where sampling begins."""
    own: float = 0.5
    """Share of photographs whose rows are on the way to what the network itself draws in one step, not to the
    truth: in sampling it meets its own errors."""

    def __post_init__(self) -> None:
        if self.targets < 2:
            raise ValueError(f"targets must be at least 2, the photograph among them, got {self.targets}")


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
        chosen = each.on(scenes.device)
        scene = chosen.integers("scene", scenes.num_scenes)
        source = chosen.integers("photo", scenes.num_renders)
        source = torch.where(chosen.uniform("sharp") < how.sharp, 0, source)
        target = draws.on(scenes.device).integers("target", scenes.num_renders).view(-1, how.targets)
        target[:, 0] = source
        text = scenes.text(scene, chosen.uniform("caption") < how.caption_dropout, chosen)

        def rows(x: Tensor) -> Tensor:
            return x.repeat_interleave(how.targets, dim=0)

        which = rows(scene), target.flatten()
        x0, levels = (onto(of(*which), draws.device) for of in (scenes.latents, scenes.levels))
        # As in sampling, the rows of a photograph share noise and noise level.
        sigma = rows((each.spread("sigma") / (1 - how.first)).clamp(max=1))
        eps, guidance = rows(each.normal("noise", *x0.shape[1:])), torch.ones_like(sigma)
        photo, photo_levels = x0[:: how.targets], BokehCondition(levels=levels[:: how.targets])
        # As in `adapter_step`: every block sees inputs that ask for gradients.
        txt = text.txt.detach().requires_grad_()
        keys = read_reference(
            mmdit, adapter, photo.clone().requires_grad_(), Conditioning(txt=txt, pooled=text.pooled),
            photo_levels, reference_rope, guidance[: len(photo)],
        )  # fmt: skip
        spec = OnReference(keys=keys.repeated(how.targets), backend="sdpa")

        def pictures(towards: Tensor, sigma: Tensor) -> Tensor:
            """Where states on the way towards these lead, all [B, N, C]; `sampling.inversion.followed`."""
            x, of = mix(towards, eps, sigma).requires_grad_(), BokehCondition(levels=levels)
            v = mmdit(x, rows(txt), rows(text.pooled), sigma, guidance, rope, spec, of).float()
            drawn = (x - sigma[:, None, None] * v).unflatten(0, (-1, how.targets))
            lacks = photo[:, None] - drawn[:, :1]
            return torch.cat([drawn[:, :1], drawn[:, 1:] + lacks], dim=1).flatten(0, 1)

        with torch.no_grad():
            own = pictures(x0, torch.ones_like(sigma)).unflatten(0, (-1, how.targets))
        own[:, 0] = photo
        is_own = rows(each.uniform("own") < how.own)[:, None, None]
        error = (pictures(torch.where(is_own, own.flatten(0, 1), x0), sigma) - x0).square().mean()
        return error, {"loss": error}

    return loss
