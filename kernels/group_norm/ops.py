"""The Triton kernels as PyTorch operators, with gradients. Importing this module imports triton."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from . import triton_norm

MAX_CHUNKS = 256
ELEMENTS = 4096
"""Numbers of a tensor in a program's registers: 32 a thread with 4 warps. Few tensors are live at once."""


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """`interface.group_norm_silu` of a channels-last x."""
    return _group_norm_silu(x, weight, bias, groups, eps)[0]


@torch.library.custom_op("bokehflux::group_norm_silu", mutates_args=())
def _group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Values, and the sums of x and of its squares, per channel and chunk [2, B, chunks, C] in float32."""
    grid, sizes = _plan(x)
    y, sums = _like(x)
    with torch.cuda.device_of(x):
        triton_norm.sums_kernel[grid](x, *sums, *sizes, C=x.shape[1], **_blocks(x), enable_fp_fusion=True)
        triton_norm.forward_kernel[grid](
            x, y, weight, bias, *sums, *sizes, eps, **_shapes(x, groups), enable_fp_fusion=True
        )
    return y, sums


@_group_norm_silu.register_fake
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _like(x)


@torch.library.custom_op("bokehflux::group_norm_silu_backward", mutates_args=())
def _group_norm_silu_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, sums: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    grid, sizes = _plan(x)
    dx, of_dz = _like(x)
    dy = dy.contiguous(memory_format=torch.channels_last)
    common, shapes = (weight, bias, *sums, *of_dz, *sizes, eps), _shapes(x, groups)
    with torch.cuda.device_of(x):
        triton_norm.gradient_sums_kernel[grid](x, dy, *common, **shapes, enable_fp_fusion=True)
        triton_norm.backward_kernel[grid](x, dy, dx, *common, **shapes, enable_fp_fusion=True)
    db, dw = (part.sum((0, 1)) for part in of_dz)
    return dx, dw.to(weight.dtype), db.to(bias.dtype)


@_group_norm_silu_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x)[0], torch.empty_like(weight), torch.empty_like(bias)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, ctx.groups, ctx.eps = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, bias, output[1])


def _gradients(ctx: Any, dy: Tensor, _sums: Tensor) -> tuple[Tensor | None, ...]:
    return *_group_norm_silu_backward(dy, *ctx.saved_tensors, ctx.groups, ctx.eps), None, None


_group_norm_silu.register_autograd(_gradients, setup_context=_save)


def _plan(x: Tensor) -> tuple[tuple[int, int], tuple[int, int, int]]:
    """Grid (chunks, images) and sizes (positions, positions a chunk, chunks)."""
    images, _, height, width = x.shape
    positions, block = height * width, _blocks(x)["BLOCK_P"]
    # Enough chunks to fill the GPU eight times over, each of at least four blocks.
    wanted = max(1, min(MAX_CHUNKS, 1024 // images, positions // (4 * block)))
    per_chunk = triton.cdiv(triton.cdiv(positions, wanted), block) * block
    chunks = triton.cdiv(positions, per_chunk)
    return (chunks, images), (positions, per_chunk, chunks)


def _like(x: Tensor) -> tuple[Tensor, Tensor]:
    """Room for a channels-last tensor of x's shape, and for two sums [2, B, chunks, C]."""
    chunks, images = _plan(x)[0]
    sums = torch.empty(2, images, chunks, x.shape[1], dtype=torch.float32, device=x.device)
    return torch.empty_like(x, memory_format=torch.channels_last), sums


def _blocks(x: Tensor) -> dict[str, int]:
    block_c = triton.next_power_of_2(x.shape[1])
    return {"BLOCK_P": max(1, ELEMENTS // block_c), "BLOCK_C": block_c}


def _shapes(x: Tensor, groups: int) -> dict[str, int]:
    return {"C": x.shape[1], "G": groups, "BLOCK_G": triton.next_power_of_2(groups), **_blocks(x)}
