"""The Triton kernels of this folder; `ops` launches them. Importing this module imports triton.

Every kernel reads its tokens once, computes in float32 and rounds once, where it stores. Tokens may lie at
any stride (views of a fused projection); channels and results are contiguous.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def residual_norm(
    x, y, gate, scale, shift, x_out, norm_out, length, width, eps,
    x_stride_b, x_stride_l, y_stride_b, y_stride_l, gate_stride_b, scale_stride_b, shift_stride_b,
    GATED: tl.constexpr, NORMED: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """x_out = x + gate * y (GATED), and norm_out = LN(x_out, or x) * (1 + scale) + shift (NORMED).

    A program takes ROWS tokens of one batch row, whole.
    """
    batch = tl.program_id(1).to(tl.int64)
    tokens = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_E)
    inside = columns < width
    mask = (tokens < length)[:, None] & inside[None, :]
    out = (batch * length + tokens)[:, None] * width + columns[None, :]

    value = tl.load(
        x + batch * x_stride_b + tokens[:, None] * x_stride_l + columns[None, :], mask=mask, other=0.0
    )
    value = value.to(tl.float32)
    if GATED:
        strength = tl.load(gate + batch * gate_stride_b + columns, mask=inside, other=0.0).to(tl.float32)
        update = tl.load(
            y + batch * y_stride_b + tokens[:, None] * y_stride_l + columns[None, :], mask=mask, other=0.0
        )
        stored = (value + strength[None, :] * update.to(tl.float32)).to(x_out.dtype.element_ty)
        tl.store(x_out + out, stored, mask=mask)
        value = stored.to(tl.float32)
    if NORMED:
        mean = tl.sum(value, axis=1) / width
        centred = tl.where(mask, value - mean[:, None], 0.0)
        variance = tl.sum(centred * centred, axis=1) / width
        normed = centred * tl.rsqrt(variance + eps)[:, None]
        factor = 1.0 + tl.load(scale + batch * scale_stride_b + columns, mask=inside, other=0.0).to(
            tl.float32
        )
        offset = tl.load(shift + batch * shift_stride_b + columns, mask=inside, other=0.0).to(tl.float32)
        normed = normed * factor[None, :] + offset[None, :]
        tl.store(norm_out + out, normed.to(norm_out.dtype.element_ty), mask=mask)


@triton.jit
def norm_rotate(
    src, weight, cos, sin, dst, num_heads, eps, BLOCK_H: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """dst = rotation of (src / rms(src) * weight), for the heads [H, D] of one token; cos, sin [D/2]."""
    dims = tl.arange(0, D)
    half = tl.arange(0, D // 2)
    heads = tl.arange(0, BLOCK_H)[:, None]
    x = tl.load(src + heads * D + dims[None, :], mask=heads < num_heads, other=0.0).to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]
    x = x * tl.load(weight + dims).to(tl.float32)[None, :]
    even, odd = tl.split(tl.reshape(x, [BLOCK_H, D // 2, 2]))
    c, s = tl.load(cos + half)[None, :], tl.load(sin + half)[None, :]
    x = tl.reshape(tl.join(even * c - odd * s, odd * c + even * s), [BLOCK_H, D])
    tl.store(dst + heads * D + dims[None, :], x.to(dst.dtype.element_ty), mask=heads < num_heads)


@triton.jit
def stream_heads(
    q, k, v, q_weight, k_weight, cos, sin, q_out, k_out, v_out,
    num_queries, first, joint_length, num_heads, eps,
    q_stride_b, q_stride_l, k_stride_b, k_stride_l, v_stride_b, v_stride_l,
    COPY_V: tl.constexpr, BLOCK_H: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One token of one stream into its place in the joint sequence, from token `first` on.

    Programs below num_queries along axis 1 take the queries of a row, the others the keys (and values).
    """
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)
    place = first + token
    cos += place * (D // 2)
    sin += place * (D // 2)
    if row < num_queries:
        dst = q_out + (row * joint_length + place) * num_heads * D
        src = q + row * q_stride_b + token * q_stride_l
        norm_rotate(src, q_weight, cos, sin, dst, num_heads, eps, BLOCK_H, D)
    else:
        row -= num_queries
        to = (row * joint_length + place) * num_heads * D
        src = k + row * k_stride_b + token * k_stride_l
        norm_rotate(src, k_weight, cos, sin, k_out + to, num_heads, eps, BLOCK_H, D)
        if COPY_V:
            heads = tl.arange(0, BLOCK_H)[:, None]
            at = heads * D + tl.arange(0, D)[None, :]
            values = tl.load(v + row * v_stride_b + token * v_stride_l + at, mask=heads < num_heads)
            tl.store(v_out + to + at, values, mask=heads < num_heads)


@triton.jit
def concat_gelu(
    joint, hidden, out, width, hidden_width, length,
    joint_stride_b, joint_stride_l, hidden_stride_b, hidden_stride_l, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of one token of [joint | gelu(hidden)]."""
    batch = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    left = columns < width
    inside = columns < width + hidden_width
    kept = tl.load(joint + batch * joint_stride_b + token * joint_stride_l + columns, mask=left, other=0.0)
    source = hidden + batch * hidden_stride_b + token * hidden_stride_l
    x = tl.load(source + (columns - width), mask=inside & (columns >= width), other=0.0).to(tl.float32)
    # (1 + tanh u) / 2 = sigmoid(2 u), exact near both ends.
    gelu = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    value = tl.where(left, kept.to(tl.float32), gelu)
    line = (batch * length + token) * (width + hidden_width)
    tl.store(out + line + columns, value.to(out.dtype.element_ty), mask=inside)
