"""TAEF1's decoder ("tiny autoencoder for FLUX.1"): cheap pictures of latents, for previews.

About 1.2 million parameters: plain convolutions of one width with ReLU between them, without normalisation
and attention. It takes the latents that the transformer sees, without the autoencoder's scale and shift.
Parameter names are those of the published `taef1_decoder.safetensors`: positions in one sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTH = 64
BLOCKS = (3, 3, 3, 1)
"""Residual blocks at each resolution, coarsest first; the resolution doubles between them."""


class Clamp(nn.Module):
    """Draw outlying latents softly into (-3, 3)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class Block(nn.Module):
    """Three convolutions around a shortcut, [B,C,H,W] -> [B,C,H,W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv(channels, channels),
            nn.ReLU(),
            _conv(channels, channels),
            nn.ReLU(),
            _conv(channels, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


class TinyDecoder(nn.Sequential):
    """Model latents [B,z,h,w] -> images [B,3,8h,8w], about [-1, 1] but not clamped."""

    def __init__(self, latent_channels: int, width: int = WIDTH) -> None:
        layers: list[nn.Module] = [Clamp(), _conv(latent_channels, width), nn.ReLU()]
        for num_blocks in BLOCKS[:-1]:
            layers += [Block(width) for _ in range(num_blocks)]
            layers += [nn.Upsample(scale_factor=2), _conv(width, width, bias=False)]
        layers += [*(Block(width) for _ in range(BLOCKS[-1])), _conv(width, 3)]
        super().__init__(*layers)

    def forward(self, latents: Tensor) -> Tensor:
        weight = next(self.parameters())
        return super().forward(latents.to(weight.device, weight.dtype)) * 2 - 1


def _conv(channels_in: int, channels_out: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=bias)
