"""The table: a plane that recedes from the viewer, textured in perspective."""

from __future__ import annotations

import torch

from .canvas import Canvas, Dice, mix, noise, per_cell, smooth
from .spec import TABLES


def paint_tables(canvas: Canvas, dice: Dice, kind: torch.Tensor, far_edge: torch.Tensor) -> torch.Tensor:
    """Albedo [B, 3, N, N] of tables `kind` [B] whose far edge lies at picture height `far_edge` [B, 1, 1]."""
    nearness = 1 / ((canvas.y - far_edge).clamp(min=0) + 0.4)
    across, along = canvas.x * nearness, -2.0 * nearness
    out = torch.zeros(dice.batch, 3, canvas.n, canvas.n, device=canvas.device)
    for number, paint in enumerate(PAINTERS):
        index = (kind == number).nonzero()[:, 0]
        if len(index):
            out[index] = paint(canvas, dice.of(len(index)), across[index], along[index])
    return out


def _wood(canvas: Canvas, dice: Dice, across: torch.Tensor, along: torch.Tensor) -> torch.Tensor:
    """Planks that run away from the viewer, each with its own tone and a few broad streaks."""
    color = dice.color([(0.30, 0.13, 0.05), (0.42, 0.22, 0.09), (0.17, 0.075, 0.03), (0.50, 0.31, 0.16)])
    u = across * dice.scalar(1.3, 1.8) + 10.3
    tone, shift = per_cell(dice, u.floor(), torch.zeros_like(u), 2)
    streak = torch.sin((u % 1 + 3 * shift) * 19 + 2.5 * torch.sin(along * 1.3 + 6 * shift))
    gap = smooth(0.02, 0.05, 0.5 - (u % 1 - 0.5).abs())
    shade = (0.7 + 0.5 * tone) * (1 + 0.16 * streak) * (0.25 + 0.75 * gap)
    return color * shade[:, None]


def _marble(canvas: Canvas, dice: Dice, across: torch.Tensor, along: torch.Tensor) -> torch.Tensor:
    """Pale stone with crisp veins along the contour lines of smooth noise."""
    color = dice.color([(0.72, 0.72, 0.72), (0.74, 0.68, 0.60), (0.60, 0.66, 0.66)], 0.05)
    thick = _vein(canvas, noise(canvas, dice, 4, 3), 2.2)
    thin = _vein(canvas, noise(canvas, dice, 6, 4), 1.3)
    cloud = noise(canvas, dice, 3, 3, 1)
    shade = (0.85 + 0.3 * cloud) * (1 - 0.42 * thick) * (1 - 0.30 * thin)
    return color * shade[:, None]


def _vein(canvas: Canvas, field: torch.Tensor, half_px: float) -> torch.Tensor:
    """Coverage of the line field = 1/2, of even width: the field over its gradient is a distance."""
    gy, gx = torch.gradient(field, dim=(1, 2))
    distance = (field - 0.5).abs() / (gx**2 + gy**2).sqrt().clamp(min=2e-3)
    half = half_px * canvas.size_px / 256
    return smooth(half + 0.8, half - 0.8, distance)


def _slate(canvas: Canvas, dice: Dice, across: torch.Tensor, along: torch.Tensor) -> torch.Tensor:
    """Dark slabs with pale joints."""
    color = dice.color([(0.050, 0.058, 0.072), (0.075, 0.075, 0.078), (0.045, 0.065, 0.065)])
    scale = dice.scalar(1.2, 1.6)
    row = along * scale + 40
    col = across * scale + 20 + 0.5 * (row.floor() % 2)
    (tone,) = per_cell(dice, col.floor(), row.floor(), 1)
    border = torch.minimum(0.5 - (col % 1 - 0.5).abs(), 0.5 - (row % 1 - 0.5).abs())
    joint = smooth(0.06, 0.03, border)
    shade = 0.6 + 0.9 * tone
    return mix(color * shade[:, None], torch.full_like(color, 0.26), joint[:, None])


def _tablecloth(canvas: Canvas, dice: Dice, across: torch.Tensor, along: torch.Tensor) -> torch.Tensor:
    """Gingham: two sets of woven bands over white."""
    color = dice.color([(0.60, 0.02, 0.025), (0.03, 0.10, 0.45), (0.03, 0.26, 0.07)])
    scale = dice.scalar(2.0, 2.6)

    def band(t: torch.Tensor) -> torch.Tensor:
        return smooth(0.22, 0.28, ((t * scale) % 1 - 0.5).abs())

    cover = (band(across + 20) + band(along * 1.1 + 20)) / 2
    return mix(torch.full_like(color, 0.80), color, cover[:, None])


PAINTERS = (_wood, _marble, _slate, _tablecloth)
assert len(PAINTERS) == len(TABLES)
