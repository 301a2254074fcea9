"""Training a bokeh adapter on a frozen base: its batches, its objective, its loop.

Some steps take unrelated rows at labelled levels. The others take groups of one scene at several levels,
which share noise and noise level; rows grounded on the group's first row, its pivot, attend with the pivot's
queries, as they do when pictures are made. Scenes come from anywhere (`Scenes`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from bokehflux.attention import AttentionSpec, Grounded, Plain
from bokehflux.conditioning import Conditioning, onto
from bokehflux.models.adapter import BokehCondition
from bokehflux.models.controls import Controls
from bokehflux.models.embeddings import RopeTable
from bokehflux.models.mmdit import MMDiT
from bokehflux.training.batches import Draws
from bokehflux.training.engine import Recorded, mean_of
from bokehflux.training.guard import Rows
from bokehflux.training.loop import Loss, Step
from bokehflux.training.objective import draw_guidance, guided, mix, velocity_target


class Scenes(Protocol):
    """Scenes at several levels each, as latents with captions."""

    @property
    def device(self) -> torch.device:
        """Where it wants to be told numbers of scenes and renders."""

    @property
    def num_scenes(self) -> int: ...

    @property
    def num_renders(self) -> int:
        """Pictures of each scene."""

    def latents(self, scene: Tensor, render: Tensor) -> Tensor:
        """Scene and render numbers [B] -> packed model latents [B, N, C] float32."""

    def levels(self, scene: Tensor, render: Tensor) -> Tensor:
        """Scene and render numbers [B] -> levels [B], 0-30."""

    def text(self, scene: Tensor, drop: Tensor, draws: Draws) -> Conditioning:
        """A caption of each scene [G], the empty prompt where `drop` [G] is true. draws: of the G samples, to
        choose among several captions."""

    def null_text(self) -> Conditioning:
        """The empty prompt, [1, ...]."""


class NamedScenes(Scenes, Protocol):
    @property
    def names(self) -> Sequence[str]:
        """What messages call the scenes."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How batches are drawn from scenes."""

    grouped: float = 0.5
    """Share of the steps that take groups; the others take unrelated rows."""
    group: int = 4
    """Rows of one scene that share noise and noise level under grounded attention, in steps of groups."""
    swap_probability: float = 1.0
    """Share of a group's other rows that are grounded on its first; the rest keep noise, noise level and
    queries of their own. The paper's sibling trained with 0.2, and makes pictures with 1."""
    first_grounded_block: int = 0
    """Blocks before it attend plainly: 19 grounds FLUX.1's single-stream blocks only."""
    level_dropout: float = 0.1
    """Share of rows that are told no level."""
    caption_dropout: float = 0.1
    """Share of scenes whose caption is left out."""
    noise_offset: float = 0.0
    """Deviation of further noise that is constant over a channel (published: 0.05)."""
    sigma: Literal["uniform", "logit-normal"] = "uniform"
    """How noise levels are distributed over 0-1."""
    sigma_mean: float = 0.0
    """logit-normal: noise levels concentrate around sigmoid(sigma_mean)."""
    sigma_std: float = 1.0
    sigma_shift: float = 1.0
    """Above 1, noise levels move towards 1, as a sampler's schedule is shifted for large pictures."""
    spread_sigma: bool = True
    """Take the noise levels of a batch from equal parts of their distribution: less noise in the gradient."""
    max_guidance: float = 1.0
    """Above 1: lead away from the prediction without text by a guidance drawn between 1 and this."""
    level_guidance: float = 0.0
    """Share of scenes in which that prediction leaves out the level, too: 0 keeps the blur's own strength."""
    deterministic: bool = False
    """Equal bits in every run on one kind of GPU: attention with our own backward pass, which adds in a fixed
    order, and no other algorithm that does not. Slower."""

    def in_groups(self, step: int) -> bool:
        """Whether a step takes groups: they are spread evenly over a run."""
        return math.floor((step + 1) * self.grouped) > math.floor(step * self.grouped)

    def backend(self, device: torch.device) -> str:
        """The attention that blocks use there."""
        return "triton" if self.deterministic and device.type == "cuda" else "sdpa"

    def num_patterns(self, rows: int) -> int:
        """Attentions that steps of `rows` can have: plain, and one for each pattern of grounded rows."""
        return 1 + (self.group ** (rows // self.group) if 0 < self.swap_probability < 1 else 1)


@dataclass(frozen=True, kw_only=True)
class AdapterBatch:
    """B rows of training data for the adapter."""

    x0: Tensor
    """[B, N, C] packed model latents."""
    eps: Tensor
    """[B, N, C] noise, equal for rows that are grounded together."""
    sigma: Tensor
    """[B] noise levels, equal in the same way."""
    levels: Tensor
    """[B] 0-30, NaN where the level is dropped."""
    unguided_levels: Tensor
    """[B] the same for the prediction that guidance leads away from, which may leave out further levels."""
    text: Conditioning
    """What each row shows."""
    guidance: Tensor
    """[B] guidance the row is trained at; 1 is plain flow matching."""
    attention: AttentionSpec
    """Which rows are grounded on which."""

    def tensors(self) -> tuple[Tensor, ...]:
        """All of it but `attention`."""
        drawn = self.x0, self.eps, self.sigma, self.levels, self.unguided_levels, self.guidance
        return *drawn, self.text.txt, self.text.pooled

    @classmethod
    def of(cls, attention: AttentionSpec, *tensors: Tensor) -> AdapterBatch:
        """From its `tensors`."""
        x0, eps, sigma, levels, unguided_levels, guidance, txt, pooled = tensors
        return cls(
            x0=x0, eps=eps, sigma=sigma, levels=levels, unguided_levels=unguided_levels,
            text=Conditioning(txt=txt, pooled=pooled), guidance=guidance, attention=attention,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GroundedFrom(AttentionSpec):
    """Grounded from block `first` on, plain before it."""

    grounded: Grounded
    first: int

    def for_block(
        self, block: int, value_bias: Tensor | None, logit_bound: float | None = None
    ) -> AttentionSpec:
        spec = self.grounded if block >= self.first else Plain(backend=self.backend)
        return spec.for_block(block, value_bias, logit_bound)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise AssertionError("blocks are given what `for_block` returns")


def choose(scenes: Scenes, group: int, each: Draws) -> tuple[Tensor, Tensor]:
    """The scene of each group [G], and the renders of its rows [B]."""
    renders = each.uniform("renders", scenes.num_renders).argsort(dim=1)[:, :group]
    return each.integers("scene", scenes.num_scenes), renders.flatten()


def row_names(how: Sampling, plain: NamedScenes, grouped: NamedScenes) -> Rows:
    """What a step's rows are called where it is refused: scene, render and level."""

    def rows(number: int, draws: Draws) -> list[str]:
        scenes, group = (grouped, how.group) if how.in_groups(number) else (plain, 1)
        scene, render = choose(scenes, group, draws.groups(group).on(scenes.device))
        scene = scene.repeat_interleave(group)
        told = zip(scene.tolist(), render.tolist(), scenes.levels(scene, render).tolist(), strict=True)
        return [f"{scenes.names[s]}, picture {r + 1}, level {level:g}" for s, r, level in told]

    return rows


def draw_batch(scenes: Scenes, how: Sampling, grouped: bool, draws: Draws) -> AdapterBatch:
    """Rows of unrelated scenes, or of groups: a scene at distinct levels, its pivot in the first row.

    Which of a scene's renders is the pivot is random. Raises ValueError for broken groups.
    """
    group = how.group if grouped else 1
    # Scene, noise and its level, caption and guidance are one per group, as in a sweep of one prompt.
    each = draws.groups(group)

    def rows(x: Tensor) -> Tensor:
        return x.repeat_interleave(group, dim=0)

    chosen = each.on(scenes.device)
    scene, render = choose(scenes, group, chosen)
    drop = chosen.uniform("caption") < how.caption_dropout
    text = scenes.text(scene, drop, chosen)
    x0 = onto(scenes.latents(rows(scene), render), draws.device)
    levels = onto(scenes.levels(rows(scene), render), draws.device)
    eps, sigma = rows(_noise(each, how, x0.shape)), rows(_sigma(each, how))
    backend = how.backend(draws.device)
    spec: AttentionSpec = Plain(backend=backend)
    if grouped:
        pivot_of = _pivots(each, how)
        spec = Grounded(pivot_of=pivot_of, backend=backend)
        if how.first_grounded_block:
            spec = GroundedFrom(grounded=spec, first=how.first_grounded_block, backend=backend)
        if how.swap_probability < 1:
            alone = [row == pivot and row % group > 0 for row, pivot in enumerate(pivot_of)]
            own = onto(torch.tensor(alone), x0.device)
            eps = torch.where(own[:, None, None], _noise(draws, how, x0.shape), eps)
            # Not spread: which rows are alone depends on their place, and so would their noise level.
            sigma = torch.where(own, _sigma(draws, dataclasses.replace(how, spread_sigma=False)), sigma)
    levels = torch.where(draws.uniform("level") < how.level_dropout, math.nan, levels)
    leave_out = rows(each.uniform("unguided level") < how.level_guidance)
    return AdapterBatch(
        x0=x0,
        eps=eps,
        sigma=sigma,
        levels=levels,
        unguided_levels=torch.where(leave_out, math.nan, levels),
        text=Conditioning(txt=rows(text.txt), pooled=rows(text.pooled)),
        guidance=rows(torch.where(onto(drop, draws.device), 1.0, draw_guidance(each, how.max_guidance))),
        attention=spec,
    )


def _noise(draws: Draws, how: Sampling, shape: Sequence[int]) -> Tensor:
    """[len(draws), N, C] for latents of `shape` [B, N, C]."""
    eps = draws.normal("noise", *shape[1:])
    if how.noise_offset:
        # A packed token holds four pixels of every channel, side by side.
        offset = draws.normal("noise offset", 1, shape[2] // 4).repeat_interleave(4, dim=2)
        eps = eps + how.noise_offset * offset
    return eps


def _sigma(draws: Draws, how: Sampling) -> Tensor:
    """[len(draws)] noise levels."""
    u = draws.spread("sigma") if how.spread_sigma else draws.uniform("sigma")
    if how.sigma == "logit-normal":
        u = torch.sigmoid(torch.special.ndtri(u) * how.sigma_std + how.sigma_mean)
    return how.sigma_shift * u / (1 + (how.sigma_shift - 1) * u)


def _pivots(each: Draws, how: Sampling) -> tuple[int, ...]:
    """For each row, the one on which it is grounded.

    The rows of a group are exchangeable, so those that are grounded come first: patterns are few, and blocks
    are compiled for each.
    """
    swapped = each.on(torch.device("cpu")).uniform("swap", how.group - 1) < how.swap_probability
    pivot_of = []
    for i, count in enumerate(swapped.sum(dim=1).tolist()):
        first = i * how.group
        pivot_of += [first if row <= count else first + row for row in range(how.group)]
    return tuple(pivot_of)


def adapter_step(
    mmdit: MMDiT,
    batch: AdapterBatch,
    rope: RopeTable,
    null_text: Conditioning | None = None,
    controls: Controls | None = None,
) -> Tensor:
    """The mean of `row_losses`."""
    return row_losses(mmdit, batch, rope, null_text, controls).mean()


def row_losses(
    mmdit: MMDiT,
    batch: AdapterBatch,
    rope: RopeTable,
    null_text: Conditioning | None = None,
    controls: Controls | None = None,
) -> Tensor:
    """Losses [B] of a batch: flow matching, towards the guided velocity where the empty prompt is given.

    A distilled base is sampled at guidance g, so its adapter may be trained there: the target is
    u + g (data velocity - u), u being the model's own prediction for `null_text`, [1, ...]. Rows then weigh
    1 / g^2, the growth of the target's variance. mmdit: with an adapter. controls: what the rows are asked
    for beside their level. Parameters of either ask for gradients.
    """
    x = mix(batch.x0, batch.eps, batch.sigma)
    target, weight = velocity_target(batch.x0, batch.eps), torch.ones_like(batch.sigma)
    spec, text = batch.attention, batch.text
    if null_text is not None:
        txt, pooled = null_text.txt.expand_as(text.txt), null_text.pooled.expand_as(text.pooled)
        levels = BokehCondition(levels=batch.unguided_levels, controls=controls)
        with torch.no_grad():
            u = mmdit(x, txt, pooled, batch.sigma, torch.ones_like(batch.sigma), rope, spec, levels).float()
        target, weight = guided(target, u, batch.guidance), batch.guidance**2
    # The first block's inputs ask for gradients like every other's, so that all share one compiled graph.
    x, txt = x.detach().requires_grad_(), text.txt.detach().requires_grad_()
    levels = BokehCondition(levels=batch.levels, controls=controls)
    v = mmdit(x, txt, text.pooled, batch.sigma, batch.guidance, rope, spec, levels).float()
    return (v - target).square().mean(dim=(1, 2)) / weight


def adapter_loss(
    mmdit: MMDiT,
    rope: RopeTable,
    how: Sampling,
    plain: Scenes,
    grouped: Scenes,
    *,
    record: bool = False,
    rows: int | None = None,
) -> Loss:
    """For `train`: unrelated rows of `plain` and groups of `grouped`, as often as `how` says.

    record: as CUDA graphs, one for each pattern of grounded rows. rows: how many go through the network at a
    time; None is all. The step is the same, to rounding.
    """
    null_text = plain.null_text() if how.max_guidance > 1 else None
    parameters = [p for p in mmdit.parameters() if p.requires_grad]

    def of_tensors(attention: AttentionSpec, *tensors: Tensor) -> Tensor:
        return adapter_step(mmdit, AdapterBatch.of(attention, *tensors), rope, null_text)

    compute = Recorded(of_tensors, parameters) if record else of_tensors

    def loss(step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        in_groups = how.in_groups(step.number)

        def of(draws: Draws) -> Tensor:
            batch = draw_batch(grouped if in_groups else plain, how, in_groups, draws)
            return compute(batch.attention, *batch.tensors())

        if rows is None or rows >= len(step.draws):
            error = of(step.draws)
        else:
            error = mean_of([partial(of, part) for part in step.draws.parts(rows)], parameters)
        return error, {"grounded" if in_groups else "plain": error}

    return loss


def trainable_adapter(mmdit: MMDiT) -> list[tuple[str, nn.Parameter]]:
    """Freeze everything but what can change an output, and name it. Raises ValueError without an adapter."""
    if mmdit.bokeh is None:
        raise ValueError("training an adapter needs an MMDiT that was built with a BokehConfig")
    mmdit.requires_grad_(False)
    for parameter in mmdit.bokeh.trainable():
        parameter.requires_grad_(True)
    return [(name, p) for name, p in mmdit.bokeh.named_parameters() if p.requires_grad]
