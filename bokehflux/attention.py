"""Attention specifications: what one attention call computes, as a value that travels through the networks.

A specification is a frozen dataclass derived from `AttentionSpec` with a call `(q, k, v) -> out`, all
[B, L, H, D] (L = text then image tokens, already normalised and rotated). Blocks know nothing else about
attention, so a new variant is one class here (or in your own file) passed to `MMDiT.forward`. Which kernel
runs is decided in `kernels.attention.select`.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from bokehflux.kernels.attention import interface


@dataclass(frozen=True, kw_only=True)
class AttentionSpec(ABC):
    value_bias: Tensor | None = None
    """[B, H, D] added to every token's output, or None. Set per block by the bokeh adapter."""
    logit_bound: float | None = None
    """What |q . k| / sqrt(D) never exceeds, set per block of a run; None: not known."""
    backend: str = "auto"
    """A name in `kernels.attention.select.BACKENDS`, or "auto"."""

    def for_block(
        self, block: int, value_bias: Tensor | None, logit_bound: float | None = None
    ) -> AttentionSpec:
        """A copy for one block, counted over double then single ones, whose outputs are shifted by value_bias
        [B, H, D]. It does not keep the number, or blocks would be compiled one by one."""
        return dataclasses.replace(self, value_bias=value_bias, logit_bound=logit_bound)

    def _call(self, function: Callable[..., Tensor], *args: Tensor | Sequence[int]) -> Tensor:
        """One of the interface's functions, with what every specification holds."""
        return function(*args, value_bias=self.value_bias, logit_bound=self.logit_bound, backend=self.backend)

    def plain(self) -> AttentionSpec:
        """What takes its place in blocks that the adapter leaves alone."""
        return Plain(backend=self.backend)

    def query_rows(self) -> tuple[int, ...] | None:
        """Rows whose queries the call takes, ascending; None means all. Other queries are not computed."""
        return None

    @abstractmethod
    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [Q, L, H, D] of the `query_rows`, k and v [B, L, H, D] -> [B, L, H, D]."""


@dataclass(frozen=True, kw_only=True)
class Plain(AttentionSpec):
    """Every row attends to itself."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._call(interface.attention, q, k, v)


@dataclass(frozen=True, kw_only=True)
class _OnPivotRows(AttentionSpec):
    pivot_of: tuple[int, ...]
    """For each row of the batch, the row it is grounded on; a pivot names itself."""

    def __post_init__(self) -> None:
        interface.check_pivots(self.pivot_of)

    def query_rows(self) -> tuple[int, ...]:
        return tuple(sorted(set(self.pivot_of)))


@dataclass(frozen=True, kw_only=True)
class Grounded(_OnPivotRows):
    """Row i attends with the query of its pivot, to its own and the pivot's keys, reading its own values."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._call(interface.grounded_attention, q, k, v, self.pivot_of)


@dataclass(frozen=True, kw_only=True)
class PivotQuery(_OnPivotRows):
    """Row i attends with the query of its pivot, to its own keys only (adapters that leave keys alone)."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = self.query_rows()
        q = q[[rows.index(pivot) for pivot in self.pivot_of]]
        return self._call(interface.attention, q, k, v)


class PivotStore(Protocol):
    """Where a pivot's queries and keys wait for targets of a later batch: `sampling.pivot_cache`."""

    def put(self, step: int, block: int, q: Tensor, k: Tensor) -> None: ...

    def get(self, step: int, block: int, device: torch.device) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True, kw_only=True)
class AtBlock(AttentionSpec):
    """Base of what must know where it is called. Under a compiler its blocks share no code."""

    block: int = 0
    """The block it is called in."""

    def for_block(
        self, block: int, value_bias: Tensor | None, logit_bound: float | None = None
    ) -> AttentionSpec:
        return dataclasses.replace(self, block=block, value_bias=value_bias, logit_bound=logit_bound)


@dataclass(frozen=True, kw_only=True)
class Recorded(AtBlock, Grounded):
    """`Grounded` on one pivot, whose query and keys are stored on the way."""

    store: PivotStore
    step: int

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pivot = self.pivot_of[0]
        self.store.put(self.step, self.block, q, k[pivot : pivot + 1])
        return super().__call__(q, k, v)


@dataclass(frozen=True, kw_only=True)
class OnStored(AtBlock):
    """Every row is a target, grounded on a stored pivot: no row of the batch needs a query."""

    store: PivotStore
    step: int

    def query_rows(self) -> tuple[int, ...]:
        return ()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # What another process sent comes in the type of its widest step.
        q, k_pivot = (x.to(k.dtype) for x in self.store.get(self.step, self.block, k.device))
        return self._call(interface.target_attention, q, k_pivot, k, v, (0,) * len(k))


@dataclass(eq=False)
class Kept:
    """Keys and values of a picture's image tokens in one block, each [B, M, H, D]."""

    k: Tensor | None = None
    v: Tensor | None = None


class ReferenceKeys(defaultdict[int, Kept]):
    """A reference picture as keys and values, by block: filled in one pass, read in every step."""

    def __init__(self) -> None:
        super().__init__(Kept)

    def repeated(self, times: int) -> ReferenceKeys:
        """Each picture for `times` rows that follow each other."""
        many = ReferenceKeys()
        for block, kept in self.items():
            assert kept.k is not None and kept.v is not None
            many[block] = Kept(*(x.repeat_interleave(times, dim=0) for x in (kept.k, kept.v)))
        return many


@dataclass(frozen=True, kw_only=True)
class _WithKeys(AttentionSpec):
    """Its copy for a block holds what is kept of that block, not its number: blocks share compiled code."""

    keys: ReferenceKeys
    here: Kept = field(default_factory=Kept)

    def for_block(
        self, block: int, value_bias: Tensor | None, logit_bound: float | None = None
    ) -> AttentionSpec:
        here = self.keys[block]
        return dataclasses.replace(self, here=here, value_bias=value_bias, logit_bound=logit_bound)


@dataclass(frozen=True, kw_only=True)
class ReferenceRow(_WithKeys):
    """Every row attends to itself, and the keys and values of its image tokens are kept on the way."""

    first: int
    """Its first image token."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Copied where they are views of something larger.
        self.here.k, self.here.v = (x[:, self.first :].contiguous() for x in (k, v))
        return self._call(interface.attention, q, k, v)


@dataclass(frozen=True, kw_only=True)
class OnReference(_WithKeys):
    """Every row attends with its own queries to its own tokens and to a kept picture's, values included."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert self.here.k is not None and self.here.v is not None, "read_reference fills the keys first"
        # A CPU's first steps are wider than the one pass that filled the keys.
        more = (x.to(k.dtype) for x in (self.here.k, self.here.v))
        return self._call(interface.extended_attention, q, k, v, *more)
