"""Attention through a flash-attn wheel, where one is installed: backend `flash`.

FlashAttention 3 (Hopper) is preferred to FlashAttention 2. Grounded forms are two calls merged by their
log-sum-exp, with gradients one call on concatenated keys, as in `sdpa`. Only FlashAttention 3, forward, has
run on a GPU (benchmarks/results).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..dispatch import needs_gradients
from .joins import merge, take_rows
from .sdpa import add_bias, by_rows

MODULES = ("flash_attn_interface", "fa3_fwd_interface", "flash_attn")
"""Where `flash_attn_func` may live: FlashAttention 3, its forward-only wheel `fa3-fwd`, FlashAttention 2."""
FORWARD_ONLY = "fa3_fwd_interface"


def attention(q: Tensor, k: Tensor, v: Tensor, *, value_bias: Tensor | None = None) -> Tensor:
    """Shapes as `reference.attention`; bfloat16 or float16 on a GPU.

    Raises ValueError where no wheel is installed, and for gradients where the wheel cannot compute them.
    """
    return add_bias(_attend(q, k, v)[0], value_bias)


def extended_attention(
    q: Tensor, k: Tensor, v: Tensor, k_more: Tensor, v_more: Tensor, *, value_bias: Tensor | None = None
) -> Tensor:
    """Shapes and meaning as `reference.extended_attention`; errors as `attention`."""
    k_more, v_more = (x.expand(len(k), -1, -1, -1) for x in (k_more, v_more))
    if needs_gradients(q, k, v, k_more, v_more):
        out = _attend(q, torch.cat([k, k_more], dim=1), torch.cat([v, v_more], dim=1))[0]
    else:
        out = merge(_attend(q, k, v), _attend(q, k_more, v_more))
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
    """Shapes and meaning as `reference.target_attention`; errors as `attention`."""
    q, k_pivot = take_rows(q, pivot_index), take_rows(k_pivot, pivot_index)
    if needs_gradients(q, k_pivot, k, v):
        out = _attend(q, torch.cat([k, k_pivot], dim=1), torch.cat([v, v], dim=1))[0]
    else:
        out = merge(_attend(q, k, v), _attend(q, k_pivot, v))
    return add_bias(out, value_bias)


def grounded_attention(
    q: Tensor, k: Tensor, v: Tensor, pivot_of: Sequence[int], *, value_bias: Tensor | None = None
) -> Tensor:
    """Shapes and meaning as `reference.grounded_attention`; errors as `attention`."""
    return add_bias(by_rows(attention, target_attention, q, k, v, pivot_of), value_bias)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention [B, L, H, D] and the log-sum-exp of its scaled scores [B, L, H]."""
    name, attend = _kernel()
    _check(name, q, k, v)
    out, lse = attend(q, k, v, return_attn_probs=True)[:2]
    return out, lse[..., : q.shape[1]].transpose(1, 2)


def _check(name: str, *inputs: Tensor) -> None:
    q = inputs[0]
    if name == FORWARD_ONLY and needs_gradients(*inputs):
        raise ValueError("the wheel fa3-fwd cannot compute gradients: train with backend 'triton' or 'sdpa'")
    if q.device.type != "cuda" or q.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"flash attention takes bfloat16 and float16 on an NVIDIA GPU, not {q.dtype} on {q.device.type}"
        )


@functools.cache
def _kernel() -> tuple[str, Callable[..., Any]]:
    """Its module and `flash_attn_func`, which takes [B, L, H, D]."""
    for name in MODULES:
        try:
            return name, importlib.import_module(name).flash_attn_func
        except ImportError:
            continue
    raise ValueError(
        f"attention backend 'flash' needs one of the modules {', '.join(MODULES)}: "
        "pip install flash-attn, or fa3-fwd on a Hopper GPU"
    )
