"""The truth for layered renderers: rays through many points of the lens, each meeting the layers in turn."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bokehflux.rendering.layers import Layer


def ray_cast(layers: list[Layer], samples: int = 1024) -> Tensor:
    """Light [B, 3, H, W] of flat layers through a round lens; edges wrap.

    Seen from one point u of the lens, a layer of radius r lies shifted by r u. The points are a sunflower's,
    as even as points in a disc can be.
    """
    total = 0
    for i in range(samples):
        distance, angle = math.sqrt((i + 0.5) / samples), i * math.pi * (3 - math.sqrt(5))
        x, y = distance * math.cos(angle), distance * math.sin(angle)
        out = None
        for layer in layers:
            light = layer.light
            if layer.radius_px is not None:
                light = torch.stack([_shifted(*pair, x, y) for pair in zip(light, layer.radius_px.tolist(), strict=True)])
            out = light if out is None else light[:, :3] + out * (1 - light[:, 3:])
        total = total + out
    return total / samples


def _shifted(light: Tensor, radius_px: float, x: float, y: float) -> Tensor:
    """light [C, H, W] moved by a fraction of pixels: each mixed of its four neighbours."""
    for dim, move in ((-2, y * radius_px), (-1, x * radius_px)):
        whole = math.floor(move)
        light = torch.lerp(light.roll(whole, dim), light.roll(whole + 1, dim), move - whole)
    return light
