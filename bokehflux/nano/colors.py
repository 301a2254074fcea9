"""The colour of a subject in nano's world, told from a picture by a vote of its pixels."""

from __future__ import annotations

import torch

from bokehflux.metrics import check_pictures

from .scenery.spec import COLORS

# Hue in degrees, as displayed, of the chromatic colours under the renderer's and roughly any white light.
HUES = {
    "red": 357.0,
    "orange": 30.0,
    "yellow": 53.0,
    "green": 129.0,
    "teal": 178.0,
    "blue": 229.0,
    "purple": 283.0,
    "pink": 339.0,
}
CHROMATIC = 0.22
"""Saturation (max - min) / max above which a pixel has a hue."""
LIGHT = 0.53
"""Value that separates white from black among pixels without one."""


def dominant_color(img: torch.Tensor) -> torch.Tensor:
    """Index into COLORS of what fills the middle of the picture, where the subject stands: long [B].

    Every pixel of a window below the centre votes, weighted by a Gaussian: for the nearest hue if
    it is saturated, else for white or black by its value. Hues outweigh
    grey, which also paints stripes, dots and highlights.
    """
    check_pictures(img)
    height, width = img.shape[-2:]
    rgb = img.float().clamp(0, 1)
    y = (torch.arange(height, device=img.device) + 0.5) / height * 2 - 1
    x = (torch.arange(width, device=img.device) + 0.5) / width * 2 - 1
    weight = torch.exp(-((y[:, None] - 0.36) ** 2) / (2 * 0.14**2) - x[None] ** 2 / (2 * 0.11**2))
    value, low = rgb.amax(1), rgb.amin(1)
    saturation = (value - low) / value.clamp(min=1e-4)
    colored = torch.sigmoid((saturation - CHROMATIC) / 0.02) * torch.sigmoid((value - 0.14) / 0.02)
    hue = _hue(rgb, value, low)
    anchors = torch.tensor(list(HUES.values()), device=img.device).view(1, -1, 1, 1)
    nearest = ((hue[:, None] - anchors + 180) % 360 - 180).abs().argmin(1)  # [B, H, W]
    scores = torch.zeros(img.shape[0], len(COLORS), device=img.device)
    for k, name in enumerate(HUES):
        scores[:, COLORS.index(name)] = (2.0 * colored * (nearest == k) * weight).sum((1, 2))
    grey = (1 - colored) * weight
    scores[:, COLORS.index("white")] = (grey * (value >= LIGHT)).sum((1, 2))
    scores[:, COLORS.index("black")] = (grey * (value < LIGHT)).sum((1, 2))
    return scores.argmax(1)


def _hue(rgb: torch.Tensor, value: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """Degrees [B, H, W] on the HSV circle."""
    r, g, b = rgb.unbind(1)
    spread = (value - low).clamp(min=1e-6)
    sector = torch.where(
        value == r, (g - b) / spread, torch.where(value == g, 2 + (b - r) / spread, 4 + (r - g) / spread)
    )
    return sector * 60 % 360
