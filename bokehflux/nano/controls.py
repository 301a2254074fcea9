"""Stage 5: the control adapter, on the frozen base with its bokeh adapter."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from bokehflux.aperture import DISC, Anamorphic, Aperture, Donut, Polygon
from bokehflux.conditioning import Conditioning
from bokehflux.lens import MAX_LEVEL, unit_level
from bokehflux.models.controls import (
    ControlAdapter,
    Controls,
    init_controls,
    shape_picture,
    token_features,
)
from bokehflux.models.embeddings import RopeTable
from bokehflux.models.mmdit import MMDiT
from bokehflux.nano.adapter import EncodedPool, train_on_frozen
from bokehflux.nano.recipe import ControlsStage
from bokehflux.nano.scenes import Scene, gaps, render
from bokehflux.training.batches import Draws
from bokehflux.training.controls import controls_loss
from bokehflux.training.log import Log
from bokehflux.training.loop import Look
from bokehflux.training.state import Saves

PLAIN = 2
"""The first renders of a scene: the subject sharp, a disc. Others have a focus or a shape of their own."""
SHAPED = (2, 5)
"""Renders with another shape than a disc: the first has the subject sharp."""
RENDERS = 6
MIXED = 2
"""Further pictures of a scene: a part of one render beside the rest of another."""


def levels_with_sharp(count: int, _: int, generator: torch.Generator) -> Tensor:
    """Uniform in 0-30, and exactly 0 in one case of ten."""
    u = torch.rand(2, count, generator=generator, device=generator.device)
    return torch.where(u[1] < 0.1, 0.0, u[0] * MAX_LEVEL)


def drawn_aperture(generator: torch.Generator) -> Aperture:
    """A polygon, a donut or an ellipse."""
    kind, size, turn = torch.rand(3, generator=generator, device=generator.device).tolist()
    if kind < 0.5:
        return Polygon(3 + int(size * 4), rotation_deg=turn * 360)
    return Donut(0.35 + 0.3 * size) if kind < 0.7 else Anamorphic(2.5 ** (2 * size - 1))


@dataclass(kw_only=True)
class Views:
    """Renders scenes (`pool.Show`), and notes how, chunk by chunk."""

    focus: list[list[Tensor]] = field(default_factory=lambda: [[] for _ in range(RENDERS)])
    shape: list[list[Tensor]] = field(default_factory=lambda: [[] for _ in range(RENDERS)])
    features: list[list[Tensor]] = field(default_factory=lambda: [[] for _ in range(RENDERS)])

    def __call__(self, scene: Scene, levels: Tensor, k: int, generator: torch.Generator) -> Tensor:
        aperture = drawn_aperture(generator) if k in SHAPED else DISC
        focus = torch.zeros_like(levels) if k <= SHAPED[0] else self._planes(scene, generator)
        circles = unit_level(levels).view(-1, 1, 1) * (gaps(scene) - focus.view(-1, 1, 1))
        self.focus[k].append(focus)
        self.shape[k].append(shape_picture(aperture).to(levels.device).expand(len(levels), -1))
        self.features[k].append(token_features(circles))
        return render(scene, levels, focus if k > SHAPED[0] else None, aperture)

    def _planes(self, scene: Scene, generator: torch.Generator) -> Tensor:
        """Anywhere, or at the background, or at the objects behind the subject."""
        u = torch.rand(2, len(scene), generator=generator, device=generator.device).to(scene.mid_gap)
        plane = torch.where(u[0] < 0.3, scene.background_gap, u[1])
        return torch.where(u[0] > 0.85, scene.mid_gap, plane)

    def noted(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Focus [S, R], shape [S, R, 256] and features [S, R, N, 8] of S scenes."""
        focus, shape, features = (
            torch.stack([torch.cat(chunks) for chunks in of], 1)
            for of in (self.focus, self.shape, self.features)
        )
        return focus, shape.to(dtype), features.to(dtype)


@dataclass(frozen=True, kw_only=True)
class ControlledScenes:
    """A pool's scenes (`training.adapter.Scenes`), and what each picture may be asked for by.

    Pictures are numbered: the plain renders twice over, which makes them pivots more often, the other
    renders, then mixed ones, which latents allow: a token shows its own pixels and little of others'.
    """

    encoded: EncodedPool
    focus: Tensor
    """[S, R]"""
    shape: Tensor
    """[S, R, 256]"""
    features: Tensor
    """[S, R, N, 8]"""
    parts: Tensor
    """bool [S, MIXED, N]: tokens of the first of both renders."""
    pairs: Tensor
    """[S, MIXED, 2]: which renders."""
    by_map: float
    """Share of the pictures that are asked for by their map, mixed ones apart."""

    @classmethod
    def of(
        cls, encoded: EncodedPool, views: Views, by_map: float, generator: torch.Generator
    ) -> ControlledScenes:
        """Scenes rendered by `views`."""
        latents = encoded.pool.latents
        count, tokens = latents.shape[0], latents.shape[2]
        focus, shape, features = views.noted(latents.dtype)
        u = torch.rand(4, count, MIXED, generator=generator, device=latents.device)
        discs = torch.tensor([k for k in range(RENDERS) if k not in SHAPED], device=latents.device)
        chosen = torch.rand(count, MIXED, len(discs), generator=generator, device=latents.device)
        side = round(tokens**0.5)
        place = (torch.arange(side, device=latents.device) + 0.5) / side - 0.5
        angle, offset = u[0][..., None, None] * 2 * torch.pi, (u[1][..., None, None] - 0.5) * 0.6
        half = angle.cos() * place + angle.sin() * place[:, None] > offset  # [S, MIXED, h, w]
        return cls(
            encoded=encoded, focus=focus, shape=shape, features=features,
            parts=half.flatten(2), pairs=discs[chosen.argsort(2)[..., :2]], by_map=by_map,
        )  # fmt: skip

    @property
    def device(self) -> torch.device:
        return self.encoded.device

    @property
    def num_scenes(self) -> int:
        return self.encoded.num_scenes

    @property
    def num_renders(self) -> int:
        return PLAIN + RENDERS + MIXED

    def _renders(self, scene: Tensor, render: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Both renders of each picture [B], and bool [B, N]: which tokens show the second."""
        mixed = render - PLAIN - RENDERS
        which = mixed.clamp(min=0)
        own = torch.where(render < 2 * PLAIN, render // 2, render - PLAIN)
        first, second = self.pairs[scene, which].unbind(1)
        first, second = (torch.where(mixed < 0, own, each) for each in (first, second))
        return first, second, ~self.parts[scene, which]

    def _mixed(self, values: Tensor, scene: Tensor, render: Tensor) -> Tensor:
        first, second, others = self._renders(scene, render)
        return torch.where(others[..., None], values[scene, second], values[scene, first]).float()

    def latents(self, scene: Tensor, render: Tensor) -> Tensor:
        return self._mixed(self.encoded.pool.latents, scene, render)

    def levels(self, scene: Tensor, render: Tensor) -> Tensor:
        levels, (first, second, _) = self.encoded.pool.levels, self._renders(scene, render)
        return torch.maximum(levels[scene, first], levels[scene, second])

    def text(self, scene: Tensor, drop: Tensor, draws: Draws) -> Conditioning:
        return self.encoded.text(scene, drop, draws)

    def null_text(self) -> Conditioning:
        return self.encoded.null_text()

    def controls(self, adapter: ControlAdapter, scene: Tensor, render: Tensor, draws: Draws) -> Controls:
        """By its map or its focus, and its shape. Half of the plain ones without a map ask for nothing."""
        u, first = draws.uniform("told"), self._renders(scene, render)[0]
        mapped = (u < self.by_map) | (render >= PLAIN + RENDERS)
        nothing = (u > 0.5 + self.by_map / 2) & (render < 2 * PLAIN)
        features = self._mixed(self.features, scene, render)
        return Controls(
            adapter=adapter,
            focus=torch.where(mapped | nothing, torch.nan, self.focus[scene, first]),
            shape=self.shape[scene, first].float(),
            features=torch.where(mapped[:, None, None], features, torch.nan),
        )


def train_controls(
    mmdit: MMDiT,
    adapter: ControlAdapter,
    scenes: ControlledScenes,
    rope: RopeTable,
    stage: ControlsStage,
    log: Log,
    saves: Saves | None = None,
    looks: tuple[Look, ...] = (),
) -> None:
    """Train the adapter in place; it ends as its moving average."""
    init_controls(adapter)
    loss = controls_loss(mmdit, adapter, rope, stage, scenes)
    train_on_frozen(loss, list(adapter.named_parameters()), stage, log, saves, looks)
