"""Procedural scenes with lens-true defocus: what `nano` learns from.

A scene is four layers in linear light, background, table, objects behind and subject, built once and rendered
at any level: each layer is blurred by the disc its depth asks for and laid over the one behind. Premultiplied
layers make occlusion right at defocused edges; HDR points in the background become discs of conserved energy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

from bokehflux.aperture import DISC, Aperture
from bokehflux.lens import MAX_LEVEL, unit_level
from bokehflux.rendering.layers import Layer, composite

from .scenery.backgrounds import paint_backgrounds
from .scenery.canvas import Canvas, Dice, inside, smooth
from .scenery.objects import Placement, paint_objects
from .scenery.spec import MAX_MID, SceneSpec, sample_specs
from .scenery.tables import paint_tables

__all__ = ["RADIUS_AT_30", "Scene", "SceneSpec", "build_scenes", "gaps", "render", "sample_specs"]

RADIUS_AT_30 = 13.0
"""Radius in pixels of the disc that a point at infinity becomes at level 30, in a picture of 256 pixels."""
EDGE_SOFTNESS = 0.10
"""A real lens's discs end softly; this keeps large discs from being sharper than what they replace."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """B layered scenes, N = size + 2 pad pixels a side; linear colours, premultiplied where covered."""

    background: torch.Tensor
    """[B, 3, N, N] HDR."""
    background_gap: torch.Tensor
    """[B] distance in disparity between subject and background, 1 for infinity."""
    table: torch.Tensor
    """[B, 4, N, N]."""
    table_gap: torch.Tensor
    """[B] the same for the table's far edge."""
    table_depth: torch.Tensor
    """[B, N, 1] down the table: 0 where the subject stands, 1 at the far edge, below 0 nearer; -1 ... 1."""
    mid: torch.Tensor
    """[B, 4, N, N] objects behind the subject."""
    mid_gap: torch.Tensor
    """[B]."""
    subject: torch.Tensor
    """[B, 4, N, N], always in focus."""
    exposure: torch.Tensor
    """[B, 1, 1, 1]."""
    size_px: int

    def __len__(self) -> int:
        return self.background.shape[0]

    def select(self, index: torch.Tensor | slice) -> Scene:
        tensors = {f.name: getattr(self, f.name)[index] for f in fields(self) if f.name != "size_px"}
        return Scene(**tensors, size_px=self.size_px)


def build_scenes(
    spec: SceneSpec, size_px: int, generator: torch.Generator, device: torch.device | str
) -> Scene:
    """Paint the scenes of `spec` on `device`; `generator` (any device) decides what the spec leaves open."""
    device = torch.device(device)
    spec = spec.to(device)
    canvas, dice = Canvas(size_px, device), Dice(generator, device, len(spec))
    background, light = paint_backgrounds(canvas, dice, spec.background)

    far_edge, stand = dice.scalar(0.24, 0.40), dice.scalar(0.64, 0.80)
    azimuth, rise = dice.uniform(math.pi * 0.2, math.pi * 0.8), dice.uniform(0.5, 0.9)
    towards_light = F.normalize(
        torch.stack([0.8 * azimuth.cos(), -0.55 - 0.4 * azimuth.sin(), rise], 1), dim=1
    )

    subject_at = Placement(dice.scalar(-0.09, 0.09), stand, dice.scalar(0.82, 1.02))
    table = paint_tables(canvas, dice, spec.table, far_edge) * light
    table = table * (0.62 + 0.50 * smooth(-0.2, 1.0, canvas.y))[:, None]
    table = _sheen(canvas, table, background, far_edge)

    mid_base = far_edge + dice.scalar(0.05, 0.13)
    side = torch.where(dice.scalar(0, 1) < 0.5, -1.0, 1.0)
    mid = torch.zeros(len(spec), 4, canvas.n, canvas.n, device=device)
    for j in range(MAX_MID):
        at = Placement(
            subject_at.cx + side * (1 - 2 * j) * dice.scalar(0.56, 0.80), mid_base, dice.scalar(0.42, 0.62)
        )
        present = (spec.num_mid > j).view(-1, 1, 1)
        table = table * (1 - _shadow(canvas, at, towards_light) * present)[:, None]
        plain = torch.zeros_like(spec.pattern)
        shape, color = spec.mid_shape[:, j], spec.mid_color[:, j]
        layer = paint_objects(canvas, dice, at, shape, color, plain, light, towards_light) * present[:, None]
        mid = mid * (1 - layer[:, 3:]) + layer
    table = table * (1 - _shadow(canvas, subject_at, towards_light))[:, None]
    subject = paint_objects(
        canvas, dice, subject_at, spec.shape, spec.color, spec.pattern, light, towards_light
    )

    cover = inside(canvas, canvas.y - far_edge).expand(-1, -1, canvas.n)
    table_gap = dice.uniform(0.45, 0.60)
    depth = (stand - canvas.y) / (stand - far_edge)
    return Scene(
        background=background,
        background_gap=dice.uniform(0.9, 1.0),
        table=torch.cat([table * cover[:, None], cover[:, None]], 1),
        table_gap=table_gap,
        table_depth=depth.clamp(-1, 1),
        mid=mid,
        mid_gap=table_gap * ((stand - mid_base) / (stand - far_edge)).view(-1),
        subject=subject,
        exposure=dice.uniform(0.92, 1.15, 1, 1, 1),
        size_px=size_px,
    )


def render(
    scene: Scene, levels: torch.Tensor, focus: torch.Tensor | None = None, aperture: Aperture = DISC
) -> torch.Tensor:
    """Pictures [B, 3, S, S], display-referred, 0 ... 1, of B scenes at `levels` [B], each 0 ... 30.

    Blur radius in pixels = level / 30 * RADIUS_AT_30 * S / 256 * |gap - focus|, both distances in disparity
    from the subject. focus [B], 0 ... 1: the plane that is sharp; None: the subject. ValueError on other
    shapes.
    """
    if levels.shape != (len(scene),):
        raise ValueError(f"levels: expected one per scene, [{len(scene)}], got {list(levels.shape)}")
    # Beyond level 30 a disc would reach across the padding; clamping costs no synchronisation, a check would.
    behind = -unit_level(levels.clamp(0, MAX_LEVEL)) * RADIUS_AT_30 * scene.size_px / 256
    at = torch.zeros_like(levels) if focus is None else focus
    table_gap, table_share = scene.table_gap, scene.table_depth.abs()
    if focus is not None:
        slope = (_table_gaps(scene) - focus.view(-1, 1, 1)).abs()
        table_gap = slope.amax((1, 2)).clamp(min=1e-6)
        table_share = slope / table_gap.view(-1, 1, 1)
    layers = [
        Layer(light=scene.background, radius_px=behind * (scene.background_gap - at)),
        Layer(light=scene.table, radius_px=behind * table_gap, share=table_share),
        Layer(light=scene.mid, radius_px=behind * (scene.mid_gap - at)),
        Layer(light=scene.subject, radius_px=None if focus is None else behind * -focus),
    ]
    out = composite(layers, aperture, softness=EDGE_SOFTNESS)
    return _develop(_inner(scene, out) * scene.exposure)


def gaps(scene: Scene) -> torch.Tensor:
    """[B, S, S]: how far behind the subject, in disparity, each pixel lies. Less a focus, that is its circle
    of confusion as a share of the level's, signed: above 0 behind the focus."""
    behind = scene.background_gap.view(-1, 1, 1).expand(-1, *scene.background.shape[-2:])
    zero = torch.zeros_like(scene.mid_gap).view(-1, 1, 1)
    nearer = (
        (scene.table, _table_gaps(scene)),
        (scene.mid, scene.mid_gap.view(-1, 1, 1)),
        (scene.subject, zero),
    )
    for layer, gap in nearer:
        behind = torch.where(layer[:, 3] > 0.5, gap, behind)
    return _inner(scene, behind)


def _table_gaps(scene: Scene) -> torch.Tensor:
    """[B, N, 1]"""
    return scene.table_gap.view(-1, 1, 1) * scene.table_depth


def _inner(scene: Scene, values: torch.Tensor) -> torch.Tensor:
    """[..., N, N] without the padding."""
    pad = (values.shape[-1] - scene.size_px) // 2
    return values[..., pad : pad + scene.size_px, pad : pad + scene.size_px]


def _develop(light: torch.Tensor) -> torch.Tensor:
    """Linear light to display: a small black point, straight to 0.7, then a shoulder."""
    x = (light - 0.003).clamp(min=0)
    knee = 0.7
    x = torch.where(x < knee, x, 1 - (1 - knee) * torch.exp(-(x - knee) / (1 - knee)))
    return x.clamp(min=1e-6) ** (1 / 2.2)


def _shadow(canvas: Canvas, at: Placement, towards_light: torch.Tensor) -> torch.Tensor:
    """How much light an object takes from the table, [B, N, N]: a cast shadow and a dark contact."""
    w = at.height * 0.42
    away = -towards_light[:, 0].view(-1, 1, 1) * w * 0.5
    cast = ((canvas.x - at.cx - away) / w) ** 2 + ((canvas.y - at.base + 0.015) / (w * 0.24)) ** 2
    contact = ((canvas.x - at.cx) / (w * 0.66)) ** 2 + ((canvas.y - at.base + 0.005) / (w * 0.12)) ** 2
    return (0.50 * torch.exp(-1.1 * cast) + 0.40 * torch.exp(-2 * contact)).clamp(max=0.9)


def _sheen(
    canvas: Canvas, table: torch.Tensor, background: torch.Tensor, far_edge: torch.Tensor
) -> torch.Tensor:
    """The table mirrors a blurred background, upside down, more so towards its far edge."""
    coarse = F.adaptive_avg_pool2d(background.clamp(max=3), 6).flip(2)
    mirrored = F.interpolate(coarse, (canvas.n, canvas.n), mode="bilinear", align_corners=False)
    share = 0.04 + 0.12 * smooth(0.5, 0.0, canvas.y - far_edge)
    return table + (mirrored * 0.9 - table) * share[:, None]
