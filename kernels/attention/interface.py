"""The one public attention interface: checks its arguments, lets `select` pick a backend, runs it."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType

from torch import Tensor

from . import select


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    value_bias: Tensor | None = None,
    logit_bound: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v + value_bias.

    q, k, v: [B, L, H, D], one dtype. value_bias: [B, H, D] or None, added to every token of its row.
    logit_bound: what |q . k| / sqrt(D) never exceeds, if that is known: see `ops.is_bounded`.
    backend: a name in `select.BACKENDS`, or "auto". Returns [B, L, H, D].
    Raises ValueError for shapes or dtypes that disagree or an unknown backend.
    """
    _check(q, k, v, value_bias)
    name = select.resolve(backend, q, k, v, value_bias, grounded=False)
    return _module(name).attention(q, k, v, value_bias=value_bias, **_bound(name, logit_bound))


def extended_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_more: Tensor,
    v_more: Tensor,
    *,
    value_bias: Tensor | None = None,
    logit_bound: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Own tokens and further ones with values of their own: a reference picture's, computed once.

    q, k, v [B, L, H, D]; k_more, v_more [B, M, H, D], or [1, M, H, D] where all rows share them. Neither keys
    nor values are concatenated, except with gradients in PyTorch's kernels. Other arguments and errors as
    `attention`; the mathematics is `reference.extended_attention`.
    """
    _check(q, k, v, value_bias, k_more, v_more)
    if k_more.shape != v_more.shape or k_more.ndim != 4 or k_more.shape[2:] != k.shape[2:]:
        raise ValueError(
            f"expected k_more and v_more [B, M, H, D] for k {tuple(k.shape)}, "
            f"got {tuple(k_more.shape)} and {tuple(v_more.shape)}"
        )
    if len(k_more) not in (1, len(k)):
        raise ValueError(f"expected one row of k_more, or {len(k)} as of k, got {len(k_more)}")
    name = select.resolve(backend, q, k, v, k_more, v_more, value_bias, grounded=False)
    bound = _bound(name, logit_bound)
    return _module(name).extended_attention(q, k, v, k_more, v_more, value_bias=value_bias, **bound)


def target_attention(
    q: Tensor,
    k_pivot: Tensor,
    k: Tensor,
    v: Tensor,
    pivot_index: Sequence[int],
    *,
    value_bias: Tensor | None = None,
    logit_bound: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Targets on pivots outside the batch: target n uses query and further keys of pivot pivot_index[n].

    q, k_pivot [P, L, H, D]; k, v [N, L, H, D]; pivot_index: N numbers below P; value_bias [N, H, D].
    Returns [N, L, H, D]. The mathematics is `reference.target_attention`; errors as `attention`.
    """
    _check(k, k, v, value_bias, q, k_pivot)
    if q.shape != k_pivot.shape or q.shape[1:] != k.shape[1:]:
        raise ValueError(
            "expected q and k_pivot [P, L, H, D], k and v [N, L, H, D] with equal L, H, D; "
            f"got {tuple(q.shape)}, {tuple(k_pivot.shape)}, {tuple(k.shape)}"
        )
    if len(pivot_index) != k.shape[0] or not all(0 <= p < q.shape[0] for p in pivot_index):
        raise ValueError(f"expected {k.shape[0]} pivots below {q.shape[0]}, got {tuple(pivot_index)}")
    name = select.resolve(backend, q, k_pivot, k, v, value_bias, grounded=True)
    bound = _bound(name, logit_bound)
    return _module(name).target_attention(q, k_pivot, k, v, pivot_index, value_bias=value_bias, **bound)


def grounded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pivot_of: Sequence[int],
    *,
    value_bias: Tensor | None = None,
    logit_bound: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Pivots and targets in one batch: row i uses query and further keys of row pivot_of[i].

    q [P, L, H, D]: the pivots' queries alone, in row order; k, v [B, L, H, D]; pivot_of: B row numbers, a
    pivot names itself. Other arguments and errors as `attention`; the mathematics is
    `reference.grounded_attention`.
    """
    _check(k, k, v, value_bias, q)
    check_pivots(pivot_of)
    if len(pivot_of) != k.shape[0]:
        raise ValueError(f"pivot_of names {len(pivot_of)} rows, but k has {k.shape[0]}")
    if q.shape != (len(set(pivot_of)), *k.shape[1:]):
        raise ValueError(
            f"expected the queries of the {len(set(pivot_of))} pivots alone, for k {tuple(k.shape)}; "
            f"got q {tuple(q.shape)}"
        )
    name = select.resolve(backend, q, k, v, value_bias, grounded=True)
    bound = _bound(name, logit_bound)
    return _module(name).grounded_attention(q, k, v, pivot_of, value_bias=value_bias, **bound)


def check_pivots(pivot_of: Sequence[int]) -> None:
    """Raise ValueError unless every row names a row that is its own pivot."""
    for row, pivot in enumerate(pivot_of):
        if not 0 <= pivot < len(pivot_of) or pivot_of[pivot] != pivot:
            raise ValueError(
                f"row {row} is grounded on row {pivot}, which is not a pivot "
                f"(a row that names itself) of a batch of {len(pivot_of)}: {tuple(pivot_of)}"
            )


def _check(q: Tensor, k: Tensor, v: Tensor, value_bias: Tensor | None, *others: Tensor) -> None:
    """Raise ValueError unless the shapes fit and all but the bias, which is cast, have one dtype.

    Stock kernels called by themselves may not look: they would read one type's memory as another's.
    """
    if q.ndim != 4 or k.shape != v.shape or k.shape[:1] + k.shape[2:] != q.shape[:1] + q.shape[2:]:
        raise ValueError(
            "expected q, k, v in [B, L, H, D] with equal B, H, D; "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if any(x.dtype != v.dtype for x in (q, k, *others)):
        found = sorted({str(x.dtype) for x in (q, k, v, *others)})
        raise ValueError(f"expected queries, keys and values of one dtype, got {' and '.join(found)}")
    if value_bias is not None and value_bias.shape != (q.shape[0], *q.shape[2:]):
        raise ValueError(
            f"expected value_bias [B, H, D] for q {tuple(q.shape)}, got {tuple(value_bias.shape)}"
        )


def _module(name: str) -> ModuleType:
    found = select.BACKENDS[name]
    return importlib.import_module(found, __package__) if isinstance(found, str) else found


def _bound(name: str, logit_bound: float | None) -> dict[str, float | None]:
    return {"logit_bound": logit_bound} if name in select.BOUNDED else {}
