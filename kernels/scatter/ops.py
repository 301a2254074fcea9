"""The Triton forms as PyTorch operators, without gradients. Importing this module imports triton."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from . import triton_scatter
from .reference import DISC, Iris, offset_table

ROWS, COLS, WARPS, UNROLL = 4, 128, 4, 4
"""A tile has 4 results a thread: sums stay in registers, reads lie side by side. UNROLL neighbours are asked
in one turn: their addresses are one register and a constant. 72 registers with triton 3.9. Not yet timed."""


def scatter(light: Tensor, radius_px: Tensor, iris: Iris, reach: int) -> tuple[Tensor, Tensor]:
    return _scatter(light, radius_px, *iris, reach)


@torch.library.custom_op("bokehflux::scatter", mutates_args=())
def _scatter(
    light: Tensor, radius_px: Tensor, sides: int, first_angle: float, donut: float, reach: int
) -> tuple[Tensor, Tensor]:
    radius, reach = radius_px.abs(), reach + UNROLL  # The last turn of a row goes a little too far.
    given = torch.cat([light, torch.ones_like(light[:, :1])], 1) / (radius**2 + 0.2)[:, None]
    given, padded = _padded(given, reach), _padded(radius, reach)
    offsets = offset_table(reach, Iris(sides, first_angle, donut)).to(light.device)
    mean, weight = light.new_empty(light.shape), light.new_empty(radius.shape)
    with torch.cuda.device_of(light):
        triton_scatter.scatter_kernel[_grid(radius)](
            given, padded, offsets, _largest_near(radius, reach), mean, weight,
            *radius.shape[1:], *padded.shape[1:], reach, donut,
            DONUT=donut != 0, ROWS=ROWS, COLS=COLS, UNROLL=UNROLL, num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return mean, weight


@_scatter.register_fake
def _(light: Tensor, radius_px: Tensor, *_: float) -> tuple[Tensor, Tensor]:
    return light.new_empty(light.shape), light.new_empty(radius_px.shape)


@torch.library.custom_op("bokehflux::dilate", mutates_args=())
def dilate(radius_px: Tensor, reach: int) -> Tensor:
    padded, out = _padded(radius_px, reach, -torch.inf), radius_px.new_empty(radius_px.shape)
    offsets = offset_table(reach, DISC).to(radius_px.device)
    with torch.cuda.device_of(radius_px):
        triton_scatter.dilate_kernel[_grid(radius_px)](
            padded, offsets, _largest_near(radius_px.abs(), reach), out,
            *radius_px.shape[1:], *padded.shape[1:], reach,
            ROWS=ROWS, COLS=COLS, num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return out


@dilate.register_fake
def _(radius_px: Tensor, reach: int) -> Tensor:
    return radius_px.new_empty(radius_px.shape)


def _grid(radius: Tensor) -> tuple[int, int, int]:
    batch, height, width = radius.shape
    return triton.cdiv(width, COLS), triton.cdiv(height, ROWS), batch


def _padded(x: Tensor, reach: int, value: float = 0.0) -> Tensor:
    """x [..., H, W] with `reach` more on every side, after whole tiles."""
    below, right = -x.shape[-2] % ROWS, -x.shape[-1] % COLS
    return F.pad(x, (reach, reach + right, reach, reach + below), value=value).contiguous()


def _largest_near(radius: Tensor, reach: int) -> Tensor:
    """The largest radius among the pixels within reach of each tile: [B, tiles down, tiles across]."""
    below, right = -radius.shape[-2] % ROWS, -radius.shape[-1] % COLS
    tiles = F.max_pool2d(F.pad(radius, (0, right, 0, below))[:, None], (ROWS, COLS))
    far = triton.cdiv(reach, ROWS), triton.cdiv(reach, COLS)
    tiles = F.pad(tiles, (far[1], far[1], far[0], far[0]))
    return F.max_pool2d(tiles, (2 * far[0] + 1, 2 * far[1] + 1), 1)[:, 0]
