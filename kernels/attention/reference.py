"""The definition: joint attention and pivot-grounded attention, written out in float32.

Slow, obvious and differentiable; every other form is measured against it. Shapes: B rows, L joint tokens,
H heads, D head dim; P pivots (rows that name themselves), N targets.
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


def extended_attention(
    q: Tensor, k: Tensor, v: Tensor, k_more: Tensor, v_more: Tensor, *, value_bias: Tensor | None = None
) -> Tensor:
    """Every row attends to its own tokens and to further ones, which bring their values along.

    softmax(q [k; k_more]^T / sqrt(D)) [v; v_more] + value_bias. q, k, v [B, L, H, D]; k_more, v_more
    [B, M, H, D], or [1, M, H, D] where all rows share them; value_bias [B, H, D]. Returns [B, L, H, D].
    """
    more = (x.expand(len(k), -1, -1, -1) for x in (k_more, v_more))
    keys, values = (torch.cat(pair, dim=1) for pair in zip((k, v), more, strict=True))
    return attention(q, keys, values, value_bias=value_bias)


def target_attention(
    q: Tensor,
    k_pivot: Tensor,
    k: Tensor,
    v: Tensor,
    pivot_index: Sequence[int],
    *,
    value_bias: Tensor | None = None,
) -> Tensor:
    """Targets grounded on pivots that need not be in the batch (Bokeh Diffusion, in its published form).

    Target n looks with the query of pivot p = pivot_index[n], at its own keys and the pivot's, and reads its
    own values for both: softmax(Q_p [K_n; K_p]^T / sqrt(D)) [V_n; V_n] + value_bias_n.
    q, k_pivot [P, L, H, D]; k, v [N, L, H, D]; value_bias [N, H, D]. Returns [N, L, H, D].
    """
    index = list(pivot_index)
    keys = torch.cat([k, k_pivot[index]], dim=1)
    return attention(q[index], keys, torch.cat([v, v], dim=1), value_bias=value_bias)


def grounded_attention(
    q: Tensor, k: Tensor, v: Tensor, pivot_of: Sequence[int], *, value_bias: Tensor | None = None
) -> Tensor:
    """Pivots and targets in one batch: row i is grounded on row pivot_of[i]; a pivot names itself.

    q [P, L, H, D]: the queries of the pivots alone, in row order (no target's is ever used). k, v
    [B, L, H, D]; value_bias [B, H, D]. Every row is computed as a target, pivots on themselves: a doubled,
    identical set of keys leaves a softmax unchanged, so a pivot comes out as plain attention would give it.
    """
    pivots = sorted(set(pivot_of))
    return target_attention(q, k[pivots], k, v, [pivots.index(p) for p in pivot_of], value_bias=value_bias)
