"""The truth for layered renderers: rays through many points of the lens, meeting surfaces in turn."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Surface = tuple[Tensor, Tensor | float]
"""Light [3 or 4, H, W], linear, times its coverage, the fourth; and its blur radius, a number or [H, W]."""


def round_lens(samples: int = 1024) -> list[tuple[float, float]]:
    """Points in the unit disc, spread as a sunflower's seeds: about as evenly as can be."""
    polar = [(math.sqrt((i + 0.5) / samples), i * math.pi * (3 - math.sqrt(5))) for i in range(samples)]
    return [(distance * math.cos(angle), distance * math.sin(angle)) for distance, angle in polar]


def ray_cast(surfaces: Sequence[Surface], lens: Sequence[tuple[float, float]]) -> Tensor:
    """Light [3, H, W] of surfaces, the farthest first, through points of a lens; borders repeat.

    Through the point u of the lens, what lies at p on a surface of radius r is seen at p - r u: r is above 0
    in front of the focus, and x and y of u are as in the picture.
    """
    height, width = surfaces[0][0].shape[-2:]
    row, column = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    scale = torch.tensor([2 / (width - 1), 2 / (height - 1)])

    def seen(values: Tensor, place: Tensor) -> Tensor:
        return F.grid_sample(
            values[None], (place * scale - 1)[None], align_corners=True, padding_mode="border"
        )[0]

    pixel = torch.stack([column, row], -1)
    total = torch.zeros(3, height, width)
    for point in lens:
        u = torch.tensor(point)
        out = None
        for light, radius in surfaces:
            place = pixel + radius * u if isinstance(radius, float) else pixel
            if not isinstance(radius, float):
                for _ in range(6):  # The radius where the ray meets a slanted surface, ever better.
                    place = pixel + seen(radius[None], place)[0, ..., None] * u
            light = seen(light, place)
            out = light if out is None else light[:3] + out * (1 - light[3:])
        total += out
    return total / len(lens)
