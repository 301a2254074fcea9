"""The Triton forms as PyTorch operators, with fake implementations. Importing this module imports triton.

Arguments and results as in `interface`, any floating-point dtype; they have no gradient. Without a GPU they
run in Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from . import triton_forms
from .reference import EPS, Projected

# All are bound by memory, so a thread should have several 16-byte loads under way. The sizes are not swept;
# compiled for sm_90 by triton 3.6.0 at E 3072, bfloat16: no spills, and tokens move by 16 bytes everywhere.
NORM_TILE, NORM_WARPS = 4096, 4
"""Numbers that a program takes: four loads a thread. 62 registers (modulate) and 72 (with a gate)."""
HEADS_WARPS = 8
"""A token at a time, two loads a thread. 40 registers; 62 with 4 warps and weights through shared memory."""
GELU_BLOCK, GELU_WARPS = 2048, 4
"""Columns that a program takes: two loads a thread. 32 registers."""


@torch.library.custom_op("bokehflux::modulate", mutates_args=())
def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    out = x.new_empty(x.shape)
    _residual_norm(x, None, None, scale, shift, None, out)
    return out


@modulate.register_fake
def _(x: Tensor, *_: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("bokehflux::add_gated", mutates_args=())
def add_gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    out = x.new_empty(x.shape)
    _residual_norm(x, y, gate, None, None, out, None)
    return out


@add_gated.register_fake
def _(x: Tensor, *_: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("bokehflux::add_gated_modulate", mutates_args=())
def add_gated_modulate(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    out, normed = x.new_empty(x.shape), x.new_empty(x.shape)
    _residual_norm(x, y, gate, scale, shift, out, normed)
    return out, normed


@add_gated_modulate.register_fake
def _(x: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _residual_norm(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    x_out: Tensor | None,
    norm_out: Tensor | None,
) -> None:
    """The kernel's parts that have their arguments."""
    batch, length, width = x.shape
    gated, normed = y is not None, scale is not None
    # What a part does not read is some pointer.
    y, gate = (y, gate) if y is not None and gate is not None else (x, x[:, :1])
    scale, shift = (scale, shift) if scale is not None and shift is not None else (x[:, :1], x[:, :1])
    block = triton.next_power_of_2(width)
    rows = max(1, NORM_TILE // block)
    with torch.cuda.device_of(x):
        triton_forms.residual_norm[(triton.cdiv(length, rows), batch)](
            x, y, gate, scale, shift,
            x if x_out is None else x_out, x if norm_out is None else norm_out, length, width, EPS,
            *_strides(x, x.shape), *_strides(y, x.shape),
            *(_strides(vector, (batch, 1, width))[0] for vector in (gate, scale, shift)),
            GATED=gated, NORMED=normed, ROWS=rows, BLOCK_E=block, num_warps=NORM_WARPS,
            enable_fp_fusion=True,
        )  # fmt: skip


def joint_heads(streams: Sequence[Projected], cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `interface.joint_heads`. One stream's values are a view, which no operator may return."""
    columns = [list(column) for column in zip(*streams, strict=True)]
    if len(streams) > 1:
        q, k, v = _joint_heads(*columns, cos, sin)
        return q, k, v
    q, k = _joint_heads(*columns, cos, sin)
    return q, k, streams[0].v.unflatten(-1, (-1, q.shape[-1]))


@torch.library.custom_op(
    "bokehflux::joint_heads",
    mutates_args=(),
    schema="(Tensor[] q, Tensor[] k, Tensor[] v, Tensor[] q_scale, Tensor[] k_scale, Tensor cos, Tensor sin)"
    " -> Tensor[]",
)
def _joint_heads(
    q: list[Tensor],
    k: list[Tensor],
    v: list[Tensor],
    q_scale: list[Tensor],
    k_scale: list[Tensor],
    cos: Tensor,
    sin: Tensor,
) -> list[Tensor]:
    outs = _like_heads(q, k, v, q_scale, k_scale, cos, sin)
    rows, joint_length, num_heads, dim = outs[1].shape
    queries, width, first = outs[0].shape[0], num_heads * dim, 0
    if any(x.shape != (joint_length, dim // 2) or not x.is_contiguous() for x in (cos, sin)):
        raise ValueError(
            f"expected contiguous cos and sin {(joint_length, dim // 2)} for {joint_length} tokens, "
            f"got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    for stream in zip(q, k, v, q_scale, k_scale, strict=True):
        length = stream[1].shape[1]
        with torch.cuda.device_of(cos):
            triton_forms.stream_heads[(length, queries + rows)](
                *stream, cos, sin, outs[0], outs[1], outs[-1],
                queries, first, joint_length, num_heads, EPS,
                *_strides(stream[0], (queries, length, width)),
                *_strides(stream[1], (rows, length, width)), *_strides(stream[2], (rows, length, width)),
                COPY_V=len(outs) > 2, BLOCK_H=triton.next_power_of_2(num_heads), D=dim,
                num_warps=HEADS_WARPS, enable_fp_fusion=True,
            )  # fmt: skip
        first += length
    return outs


@_joint_heads.register_fake
def _like_heads(
    q: list[Tensor],
    k: list[Tensor],
    v: list[Tensor],
    q_scale: list[Tensor],
    k_scale: list[Tensor],
    cos: Tensor,
    sin: Tensor,
) -> list[Tensor]:
    """Joint q and k, and v where there is more than one stream to join."""
    length, dim = sum(x.shape[1] for x in k), q_scale[0].shape[0]
    joined = (q, k, v) if len(k) > 1 else (q, k)
    return [x[0].new_empty((x[0].shape[0], length, x[0].shape[2] // dim, dim)) for x in joined]


@torch.library.custom_op("bokehflux::concat_gelu", mutates_args=())
def concat_gelu(joint: Tensor, hidden: Tensor) -> Tensor:
    out = _like_concat(joint, hidden)
    batch, length, width = out.shape
    with torch.cuda.device_of(joint):
        triton_forms.concat_gelu[(length, triton.cdiv(width, GELU_BLOCK), batch)](
            joint, hidden, out, joint.shape[2], hidden.shape[2], length,
            *_strides(joint, joint.shape), *_strides(hidden, (batch, length, hidden.shape[2])),
            BLOCK=GELU_BLOCK, num_warps=GELU_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return out


@concat_gelu.register_fake
def _like_concat(joint: Tensor, hidden: Tensor) -> Tensor:
    return joint.new_empty((*joint.shape[:2], joint.shape[2] + hidden.shape[2]))


def _strides(x: Tensor, shape: Sequence[int]) -> tuple[int, int]:
    """Strides of batch rows (0 where all share one) and of tokens, of what is read as `shape` [B, L, E].

    Raises ValueError for other shapes, beyond which a kernel would read, and for strided channels.
    """
    if len(x) not in (1, shape[0]) or x.shape[1:] != tuple(shape[1:]):
        raise ValueError(f"expected shape {tuple(shape)}, or one row of it, got {tuple(x.shape)}")
    if x.stride(2) != 1:
        raise ValueError(f"expected contiguous channels, got strides {x.stride()} for {tuple(x.shape)}")
    return x.stride(0) if len(x) > 1 else 0, x.stride(1)
