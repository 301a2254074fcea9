"""The one public attention interface: checks its arguments, picks a backend by name, runs it.

Backends: `reference` (float32 definition), `sdpa` (PyTorch's kernels), `flash` (a flash-attn wheel's) and
`triton` (ours, 16-bit types, head dim 64 or 128). `auto` takes the one that `automatic` names, or `sdpa`
where that one cannot take the tensors or gradients are needed, and logs once what and why. `auto-strict`
raises ValueError rather than fall back from our kernels, and takes them for gradients too. A backend asked
for by its name never falls back.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from . import eager, reference

logger = logging.getLogger(__name__)

BACKENDS: dict[str, ModuleType | str] = {
    "reference": reference,
    "sdpa": eager,
    "flash": ".flash",
    "triton": ".ops",
}
"""By name, a module with `attention`, `target_attention` and `grounded_attention`, or the name of one that is
imported when it is first used."""

BOUNDED = frozenset({"triton"})
"""Backends that take `logit_bound`; the others have no use for one."""


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
    backend: a name in `BACKENDS`, or "auto". Returns [B, L, H, D].
    Raises ValueError for shapes that disagree or an unknown backend.
    """
    _check(q, k, v, value_bias)
    name = _resolve(backend, q, k, v, value_bias)
    return _module(name).attention(q, k, v, value_bias=value_bias, **_bound(name, logit_bound))


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
    _check(k, k, v, value_bias)
    _check(q, k_pivot, k_pivot, None)
    if q.shape[1:] != k.shape[1:]:
        raise ValueError(f"pivot and targets differ in [L, H, D]: {tuple(q.shape[1:])}, {tuple(k.shape[1:])}")
    if len(pivot_index) != k.shape[0] or not all(0 <= p < q.shape[0] for p in pivot_index):
        raise ValueError(f"expected {k.shape[0]} pivots below {q.shape[0]}, got {tuple(pivot_index)}")
    name = _resolve(backend, q, k_pivot, k, v, value_bias)
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
    _check(k, k, v, value_bias)
    check_pivots(pivot_of)
    if len(pivot_of) != k.shape[0]:
        raise ValueError(f"pivot_of names {len(pivot_of)} rows, but k has {k.shape[0]}")
    if q.shape != (len(set(pivot_of)), *k.shape[1:]):
        raise ValueError(
            f"expected the queries of the {len(set(pivot_of))} pivots alone, for k {tuple(k.shape)}; "
            f"got q {tuple(q.shape)}"
        )
    name = _resolve(backend, q, k, v, value_bias)
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


def _check(q: Tensor, k: Tensor, v: Tensor, value_bias: Tensor | None) -> None:
    if q.ndim != 4 or k.shape != v.shape or k.shape[:1] + k.shape[2:] != q.shape[:1] + q.shape[2:]:
        raise ValueError(
            "expected q, k, v in [B, L, H, D] with equal B, H, D; "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if value_bias is not None and value_bias.shape != (q.shape[0], *q.shape[2:]):
        raise ValueError(
            f"expected value_bias [B, H, D] for q {tuple(q.shape)}, got {tuple(value_bias.shape)}"
        )


class Choice(NamedTuple):
    """What `auto` means on a kind of device."""

    backend: str
    reason: str


FOR_GRADIENTS = Choice(
    "sdpa",
    "gradients are needed, and with them PyTorch's kernels are faster on Hopper; backend 'triton' takes less "
    "memory with many targets: benchmarks/results/train_attention.json",
)


def automatic(device: torch.device) -> Choice:
    """The backend that `auto` prefers on a device, and why. Whether it takes a tensor is another question."""
    if device.type != "cuda":
        return Choice("sdpa", f"there are no kernels of our own for {device.type}")
    reason = _why_no_gluon(device)
    if reason is None:
        return Choice("triton", "fastest of those measured on Hopper: benchmarks/results/attention.json")
    return Choice("sdpa", f"our fastest kernels cannot run here, {reason}; the others are asked for by name")


def choose(device: torch.device, dtype: torch.dtype, head_dim: int, *, gradients: bool = False) -> Choice:
    """What `auto` runs for such queries, with or without a backward pass to follow, and why."""
    choice = automatic(device)
    if choice.backend != "triton":
        return choice
    if reason := _why_not_triton(device, dtype, head_dim):
        return Choice("sdpa", reason)
    return FOR_GRADIENTS if gradients else choice


def _resolve(backend: str, q: Tensor, *others: Tensor | None) -> str:
    """A name in `BACKENDS`. Raises ValueError for any other, and where `auto-strict` cannot run ours.

    others: the further tensors that gradients may be needed of.
    """
    if backend in ("auto", "auto-strict"):
        # `auto-strict` forbids falling back from our kernels, and with gradients they can run.
        gradients = backend == "auto" and _needs_gradients(q, *others)
        choice = choose(q.device, q.dtype, q.shape[-1], gradients=gradients)
        if backend == "auto-strict" and choice.backend == "sdpa":
            raise ValueError(f"attention may not fall back on PyTorch's kernels, but {choice.reason}")
        if not torch.compiler.is_compiling():  # a log line is no part of a traced graph
            _log_choice(q.device.type, choice)
        return choice.backend
    if backend not in BACKENDS:
        raise ValueError(
            f"unknown attention backend {backend!r}: expected 'auto' or one of {sorted(BACKENDS)}"
        )
    return backend


def _needs_gradients(*inputs: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


@functools.cache
def _why_no_gluon(device: torch.device) -> str | None:
    try:
        from . import launch, tiles
    except ImportError as error:  # Triton has no wheels for some systems
        return f"Triton's modules cannot be imported: {error}"
    return launch.why_no_gluon(tiles.device(device).family)


def _why_not_triton(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    from . import ops

    return ops.why_not(device, dtype, head_dim)


def _module(name: str) -> ModuleType:
    found = BACKENDS[name]
    return importlib.import_module(found, __package__) if isinstance(found, str) else found


def _bound(name: str, logit_bound: float | None) -> dict[str, float | None]:
    return {"logit_bound": logit_bound} if name in BOUNDED else {}


@functools.cache
def _log_choice(device_type: str, choice: Choice) -> None:
    logger.info("attention backend for %s: %s (%s)", device_type, choice.backend, choice.reason)
