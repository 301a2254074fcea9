"""Attention through PyTorch's `scaled_dot_product_attention`: backend `sdpa`.

A row that looks at two sets of keys, its own and a pivot's or further ones, is two calls merged by their
log-sum-exp, so neither keys nor values are ever concatenated. With gradients `stock` does so for groups of
pivots and targets; other rows are one call on concatenated keys, because PyTorch does not differentiate
through the log-sum-exp. In bfloat16 on a CPU, targets share the exponentials of their pivot's scores. Pivot
rows are plain attention: a doubled, identical set of keys leaves a softmax unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..dispatch import needs_gradients
from . import stock
from .joins import merge, take_rows

BLOCK_SCORES = 1 << 19
"""Scores of one row that a CPU works on at once: 2 MB, which stay in its cache."""


def attention(q: Tensor, k: Tensor, v: Tensor, *, value_bias: Tensor | None = None) -> Tensor:
    """Shapes as `reference.attention`; accumulation as PyTorch's kernel for this device and dtype."""
    if needs_gradients(q, k, v) and q.shape == k.shape and stock.is_fastest(q):
        return add_bias(stock.grounded_attention(q, k, v, range(len(q))), value_bias)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(
        1, 2
    )
    return add_bias(out, value_bias)


def extended_attention(
    q: Tensor, k: Tensor, v: Tensor, k_more: Tensor, v_more: Tensor, *, value_bias: Tensor | None = None
) -> Tensor:
    """Shapes and meaning as `reference.extended_attention`."""
    k_more, v_more = (x.expand(len(k), -1, -1, -1) for x in (k_more, v_more))
    if needs_gradients(q, k, v, k_more, v_more):
        out = _differentiable(q, torch.cat([k, k_more], dim=1), torch.cat([v, v_more], dim=1))
    else:
        out = merge(attention_with_lse(q, k, v), attention_with_lse(q, k_more, v_more))
    return add_bias(out, value_bias)


def target_attention(
    q: Tensor,
    k_pivot: Tensor,
    k: Tensor,
    v: Tensor,
    pivot_index: Sequence[int],
    *,
    value_bias: Tensor | None = None,
) -> Tensor:
    """Shapes and meaning as `reference.target_attention`."""
    gradients = needs_gradients(q, k_pivot, k, v)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and not gradients:
        return add_bias(_sharing_exponentials(q, k_pivot, k, v, pivot_index), value_bias)
    q, k_pivot = take_rows(q, pivot_index), take_rows(k_pivot, pivot_index)
    if gradients:
        out = _differentiable(q, torch.cat([k, k_pivot], dim=1), torch.cat([v, v], dim=1))
    else:
        out = merge(attention_with_lse(q, k, v), attention_with_lse(q, k_pivot, v))
    return add_bias(out, value_bias)


def _differentiable(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # cuDNN's backward fails where keys and queries differ in length (torch 2.11, H200).
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return attention(q, k, v)


def _sharing_exponentials(
    q: Tensor, k_pivot: Tensor, k: Tensor, v: Tensor, pivot_index: Sequence[int]
) -> Tensor:
    """(e + e') v / sum(e + e'), where e are the exponentials of a target's own scores and e' those of its
    pivot's, which are the same for all its targets. Scores are float32; e + e' meets v in v's dtype."""
    out = torch.empty_like(k)  # [N, L, H, D]
    length, num_heads, dim = q.shape[1:]
    heads = max(1, BLOCK_SCORES // length**2)
    queries = max(1, BLOCK_SCORES // (heads * length))
    blocks = [
        (slice(first, first + queries), slice(head, head + heads))
        for head in range(0, num_heads, heads)
        for first in range(0, length, queries)
    ]
    for pivot in set(pivot_index):
        targets = [row for row, index in enumerate(pivot_index) if index == pivot]
        for at, some in blocks:
            scaled = q[pivot, at, some].transpose(0, 1).float() * dim**-0.5  # [h, n, D]
            scores = scaled @ k_pivot[pivot, :, some].permute(1, 2, 0).float()  # [h, n, L]
            largest = scores.amax(-1, keepdim=True)
            shared = scores.sub_(largest).exp_()
            for row in targets:
                scores = scaled @ k[row, :, some].permute(1, 2, 0).float()
                offset = torch.maximum(scores.amax(-1, keepdim=True), largest)
                weights = scores.sub_(offset).exp_().addcmul_(shared, (largest - offset).exp_())
                values = weights.to(v.dtype) @ v[row, :, some].transpose(0, 1)  # [h, n, D]
                out[row, at, some] = (values / weights.sum(-1, keepdim=True)).transpose(0, 1)
    return out


def grounded_attention(
    q: Tensor, k: Tensor, v: Tensor, pivot_of: Sequence[int], *, value_bias: Tensor | None = None
) -> Tensor:
    """Shapes and meaning as `reference.grounded_attention`."""
    if needs_gradients(q, k, v) and stock.takes_rows(q, pivot_of):
        return add_bias(stock.grounded_attention(q, k, v, pivot_of), value_bias)
    return add_bias(by_rows(attention, target_attention, q, k, v, pivot_of), value_bias)


def by_rows(
    plain: Callable[..., Tensor],
    target: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pivot_of: Sequence[int],
) -> Tensor:
    """Grounded attention of two functions, one for the pivots' rows and one for the targets'."""
    pivots = sorted(set(pivot_of))
    targets = [row for row, pivot in enumerate(pivot_of) if row != pivot]
    k_pivot = take_rows(k, pivots)
    ungrounded = plain(q, k_pivot, take_rows(v, pivots))
    if not targets:
        return ungrounded
    index = [pivots.index(pivot_of[row]) for row in targets]
    grounded = target(q, k_pivot, take_rows(k, targets), take_rows(v, targets), index)
    order = pivots + targets
    back = sorted(range(len(order)), key=order.__getitem__)
    return take_rows(torch.cat([ungrounded, grounded]), back)


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention [B, L, H, D] and the log-sum-exp of its scaled scores [B, L, H]. No gradients."""
    if stock.takes(q):
        out, lse = stock.with_lse(q, k, v, stock.fastest_forward(q, k, v))
        return out, lse.transpose(1, 2)
    args = [t.transpose(1, 2) for t in (q, k, v)]
    scores = args[0] @ args[1].mT * q.shape[-1] ** -0.5
    out, lse = scores.softmax(dim=-1) @ args[2], scores.float().logsumexp(dim=-1)
    return out.transpose(1, 2), lse.transpose(1, 2)


def add_bias(out: Tensor, value_bias: Tensor | None) -> Tensor:
    return out if value_bias is None else out + value_bias[:, None].to(out.dtype)
