"""The public functions of this folder: each picks its Triton form or plain PyTorch, by one rule.

Triton runs where `dispatch.takes` says so and no gradient is needed. It computes in float32 and rounds once,
where a result is stored; plain PyTorch (`reference`) rounds after every operation.

B rows, L tokens, E width, H heads, D head dim (a power of two of at least 16). Shifts, scales and gates are
[B, 1, E], or [1, 1, E] for all rows. Only last dims need be contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import dispatch
from . import reference
from .reference import Projected


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Layer norm of x [B, L, E] without parameters, then * (1 + scale) + shift."""
    if takes(x, scale, shift):
        from . import ops

        return ops.modulate(x, scale, shift)
    return reference.modulate(x, scale, shift)


def add_gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate * y, all [B, L, E]."""
    if takes(x, y, gate):
        from . import ops

        return ops.add_gated(x, y, gate)
    return reference.add_gated(x, y, gate)


def add_gated_modulate(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """The sum of `add_gated`, and `modulate` of that sum (as stored: the two calls give the same bits)."""
    if takes(x, y, gate, scale, shift):
        from . import ops

        return ops.add_gated_modulate(x, y, gate, scale, shift)
    return reference.add_gated_modulate(x, y, gate, scale, shift)


def joint_heads(streams: Sequence[Projected], cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What joint attention reads: streams one after the other, queries and keys normalised and rotated.

    streams: text, then image, or one alone; cos, sin: [L, D/2] float32 of all tokens together. Returns q
    [Q, L, H, D], k and v [B, L, H, D]; the values of one stream alone are a view.
    """
    weights = [t for s in streams for t in (s.q_scale, s.k_scale)]
    if takes(*(t for s in streams for t in (s.q, s.k, s.v)), weights=weights):
        from . import ops

        return ops.joint_heads(streams, cos, sin)
    return reference.joint_heads(streams, cos, sin)


def concat_gelu(joint: Tensor, hidden: Tensor) -> Tensor:
    """[joint | GELU(hidden)] along the last dim: [B, L, E] and [B, L, M] -> [B, L, E + M]. The tanh form."""
    if takes(joint, hidden):
        from . import ops

        return ops.concat_gelu(joint, hidden)
    return reference.concat_gelu(joint, hidden)


def takes(*tensors: Tensor, weights: Sequence[Tensor] = ()) -> bool:
    """Whether the Triton form runs on these; weights may be of another type."""
    return dispatch.takes(*tensors) and not dispatch.needs_gradients(*tensors, *weights)
