"""The definition: joint attention and pivot-grounded attention, written out in float32.

Slow, obvious and differentiable; every other form is measured against it. Shapes: B rows, L joint tokens,
H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, *, value_bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v + value_bias, row by row.

    q, k, v [B, L, H, D] (k and v may be longer than q); value_bias [B, H, D] is added to every token.
    Returns [B, L, H, D] in the dtype of q; all arithmetic is float32 (float64 stays float64).
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("blhd,bmhd->bhlm", q.to(wide), k.to(wide)) * q.shape[-1] ** -0.5
    out = torch.einsum("bhlm,bmhd->blhd", scores.softmax(dim=-1), v.to(wide))
    if value_bias is not None:
        out = out + value_bias.to(wide)[:, None]
    return out.to(q.dtype)


def grounded_attention(
    q: Tensor, k: Tensor, v: Tensor, pivot_of: Sequence[int], *, value_bias: Tensor | None = None
) -> Tensor:
    """Pivot-grounded attention (Bokeh Diffusion, "grounded self-attention"), in its published form.

    Row i looks with the query of row pivot_of[i], at its own keys and that row's keys, and reads its own
    values for both: softmax(Q_p [K_i; K_p]^T / sqrt(D)) [V_i; V_i] + value_bias_i. A row that is its own
    pivot comes out as plain attention would give it.
    """
    rows = list(pivot_of)
    return attention(q[rows], torch.cat([k, k[rows]], dim=1), torch.cat([v, v], dim=1), value_bias=value_bias)
