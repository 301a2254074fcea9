"""Latent noise, the 2x2 packing of latents into tokens, and token positions."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

logger = logging.getLogger(__name__)

LATENT_PX = 8
"""Pixels per latent along a side."""
TOKEN_PX = 2 * LATENT_PX
"""Pixels per image token along a side."""


@dataclass(frozen=True, kw_only=True)
class LatentGrid:
    """The size of an image in pixels and tokens. Raises ValueError unless both sides are multiples of 16."""

    height_px: int
    width_px: int

    def __post_init__(self) -> None:
        for name in ("height_px", "width_px"):
            side = getattr(self, name)
            if side < TOKEN_PX or side % TOKEN_PX:
                raise ValueError(f"{name} must be a positive multiple of {TOKEN_PX}, got {side}")

    @classmethod
    def floored(cls, height_px: int, width_px: int) -> LatentGrid:
        """The largest grid that fits into the given size; warns where it is smaller (as published does).

        Raises ValueError for a side below 16 pixels.
        """
        if min(height_px, width_px) < TOKEN_PX:
            raise ValueError(
                f"height and width must be at least {TOKEN_PX} pixels, got {height_px} x {width_px}"
            )
        grid = cls(height_px=height_px // TOKEN_PX * TOKEN_PX, width_px=width_px // TOKEN_PX * TOKEN_PX)
        if (grid.height_px, grid.width_px) != (height_px, width_px):
            logger.warning(
                "size %d x %d (height x width) is not a multiple of %d: using %d x %d",
                height_px, width_px, TOKEN_PX, grid.height_px, grid.width_px,
            )  # fmt: skip
        return grid

    @property
    def token_hw(self) -> tuple[int, int]:
        """Image tokens (down, across)."""
        return self.height_px // TOKEN_PX, self.width_px // TOKEN_PX

    @property
    def num_tokens(self) -> int:
        return self.token_hw[0] * self.token_hw[1]


def noise(grid: LatentGrid, seed: int, dtype: torch.dtype, channels: int = 16) -> Tensor:
    """Unpacked noise [1, channels, H/8, W/8] on the CPU, drawn from a CPU generator in `dtype`.

    The published code draws in the compute dtype too. bfloat16 and float32 noise of one seed differ by at
    least their rounding, and by more where PyTorch draws the two differently. Raises ValueError for a seed of
    more than 64 bits.
    """
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must fit in 64 bits, got {seed}")
    shape = (1, channels, grid.height_px // LATENT_PX, grid.width_px // LATENT_PX)
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=dtype)


def pack(latents: Tensor) -> Tensor:
    """[B, C, H/8, W/8] -> tokens [B, H/16 * W/16, 4C]."""
    return rearrange(latents, "b c (h dy) (w dx) -> b (h w) (c dy dx)", dy=2, dx=2)


def unpack(tokens: Tensor, grid: LatentGrid) -> Tensor:
    """Tokens [B, H/16 * W/16, 4C] -> [B, C, H/8, W/8]."""
    h, w = grid.token_hw
    return rearrange(tokens, "b (h w) (c dy dx) -> b c (h dy) (w dx)", h=h, w=w, dy=2, dx=2)


def position_ids(grid: LatentGrid, txt_length: int, device: torch.device | None = None) -> Tensor:
    """[T + N, 3] float32: zeros for text tokens, then (0, row, column) of every image token."""
    h, w = grid.token_hw
    ids = torch.zeros(txt_length + h * w, 3, device=device)
    # Tokens run row by row: the row index repeats within a row, the column index starts anew.
    ids[txt_length:, 1] = torch.arange(h, device=device).repeat_interleave(w)
    ids[txt_length:, 2] = torch.arange(w, device=device).repeat(h)
    return ids
