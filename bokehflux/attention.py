"""Attention specifications: what one attention call computes, as a value that travels through the networks.

A specification is a frozen dataclass with a `value_bias` field and a call `(q, k, v) -> out`, all
[B, L, H, D] (L = text then image tokens, already normalised and rotated). Blocks know nothing else about
attention, so a new variant is one class here (or in your own file) passed to `MMDiT.forward`. Which kernel
runs is decided in `kernels.attention`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

from bokehflux.kernels.attention import interface


class AttentionSpec(Protocol):
    @property
    def value_bias(self) -> Tensor | None:
        """[B, H, D] added to every token's output, or None. Set per block by the bokeh adapter."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Plain:
    """Every row attends to itself."""

    value_bias: Tensor | None = None
    backend: str = "auto"
    """A name in `kernels.attention.interface.BACKENDS`, or "auto"."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return interface.attention(q, k, v, value_bias=self.value_bias, backend=self.backend)


@dataclass(frozen=True, kw_only=True)
class Grounded:
    """Row i attends with the query of its pivot, to its own and the pivot's keys, reading its own values."""

    pivot_of: tuple[int, ...]
    """For each row of the batch, the row it is grounded on; a pivot names itself."""
    value_bias: Tensor | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        interface.check_pivots(self.pivot_of)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return interface.grounded_attention(
            q, k, v, self.pivot_of, value_bias=self.value_bias, backend=self.backend
        )


@dataclass(frozen=True, kw_only=True)
class PivotQuery:
    """Row i attends with the query of its pivot, to its own keys only (adapters that leave keys alone)."""

    pivot_of: tuple[int, ...]
    value_bias: Tensor | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        interface.check_pivots(self.pivot_of)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return interface.attention(
            q[list(self.pivot_of)], k, v, value_bias=self.value_bias, backend=self.backend
        )


Spec = TypeVar("Spec", bound=AttentionSpec)


def with_value_bias(spec: Spec, value_bias: Tensor | None) -> Spec:
    """A copy of the specification whose outputs are shifted by value_bias [B, H, D]."""
    return dataclasses.replace(spec, value_bias=value_bias)  # type: ignore[type-var]
