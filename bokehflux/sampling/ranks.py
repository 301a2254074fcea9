"""One run on several processes (ranks), a GPU each: its rows are shared out, or the tokens of every row.

`Ranks` is what a run asks: what is mine, and what have the others made? The base class is one process, to
which everything belongs. Every rank has all weights, begins with the same noise and holds the whole latents
after every step, so samplers, plans and pictures know nothing of it. All ranks call the same functions with
the same arguments, as torch.distributed wants it. docs/several_gpus.md says what works together.

B rows, N image tokens, T text tokens, L = T + N, R ranks, H heads, h = H / R, D head dim.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from bokehflux.attention import AtBlock, AttentionSpec
from bokehflux.sampling.pivot_cache import BlockPivot

Batches = Sequence[tuple[slice, AttentionSpec]]
"""All batches of a step, in order: the rows that go through the network together, and their attention."""


class Sizes(NamedTuple):
    """What a run's tensors are made of."""

    num_tokens: tuple[int, int]
    """Text tokens, and image tokens."""
    num_heads: int
    head_dim: int
    dtype: torch.dtype
    """The widest of any step."""


class Ranks:
    """One process, to which every row and every token belongs."""

    size = 1

    def of(self, sizes: Sizes) -> Ranks:
        """For a run of these sizes. Raises ValueError for those that cannot be shared out."""
        return self

    def rows_at_once(self, num_rows: int, max_rows: int | None) -> int | None:
        """How many rows go through a network together; None: all."""
        return max_rows

    def own(self, batches: Batches) -> Batches:
        """The batches that this rank computes, with attentions for its tokens."""
        return batches

    def tokens(self, x: Tensor, dim: int) -> Tensor:
        """The part of image or text tokens that this rank computes."""
        return x

    def pivot(self, num_batches: int) -> BlockPivot:
        """Where the later ones of a step's batches find the pivot's query and key."""
        return BlockPivot(readers=num_batches - 1)

    def joined(self, own: Sequence[Tensor], batches: Batches, x: Tensor) -> Tensor:
        """Velocities [b, n, C] of this rank's batches -> those of all rows and tokens, like x [B, N, C]."""
        return torch.cat(list(own)) if len(own) > 1 else own[0]

    def each(self, make: Callable[[int], Tensor], count: int, shape: Sequence[int]) -> Iterator[Tensor]:
        """make(i), uint8 of a shape, for every i below count, in order."""
        return map(make, range(count))


ALONE = Ranks()


class Shared(Ranks):
    """The processes of a mesh of one dimension. What each makes is broadcast to all."""

    sizes: Sizes
    """The run's; set by `of`."""

    def __init__(self, mesh: DeviceMesh) -> None:
        if mesh.ndim != 1:
            raise ValueError(f"expected a mesh of one dimension, got {mesh.ndim}: take one of them")
        self.group, self.rank, self.size = mesh.get_group(), mesh.get_local_rank(), mesh.size()
        self.device = torch.device(mesh.device_type)

    def of(self, sizes: Sizes) -> Self:
        bound = copy.copy(self)
        bound.sizes = sizes
        return bound

    def each(self, make: Callable[[int], Tensor], count: int, shape: Sequence[int]) -> Iterator[Tensor]:
        made = {i: make(i) for i in range(self.rank, count, self.size)}
        return iter([self._sent(made.get(i), i % self.size, shape, torch.uint8) for i in range(count)])

    def _sent(
        self, made: Tensor | None, owner: int, shape: Sequence[int], dtype: torch.dtype | None = None
    ) -> Tensor:
        """What the owner has made, on every rank."""
        x = self._empty(shape, dtype) if made is None else made.contiguous()
        dist.broadcast(x, dist.get_global_rank(self.group, owner), group=self.group)
        return x

    def _empty(self, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(*shape, dtype=dtype or self.sizes.dtype, device=self.device)


class RowsOverRanks(Shared):
    """Batches take turns among the ranks; the pivot's query and key go from the first to all, block by block.

    They are the batches of one process with the same `max_rows`, so velocities are the same bits.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__(mesh)
        # Ranks without rows take no part in the pivot's broadcasts: a group for every number of those with.
        # The largest first: PyTorch numbers groups, and all members of one must come to the same number.
        ranks = dist.get_process_group_ranks(self.group)
        self._first = {
            count: dist.new_group(ranks[:count], use_local_synchronization=True)
            for count in range(self.size - 1, max(1, self.rank), -1)
        } | {self.size: self.group}

    def rows_at_once(self, num_rows: int, max_rows: int | None) -> int | None:
        share = -(-num_rows // self.size)
        return share if max_rows is None else min(share, max_rows)

    def own(self, batches: Batches) -> Batches:
        return batches[self.rank :: self.size]

    def pivot(self, num_batches: int) -> BlockPivot:
        readers = len(range(self.rank, num_batches, self.size)) - (self.rank == 0)
        group = self._first.get(min(num_batches, self.size))
        if group is None or self.rank >= num_batches:  # nobody reads it, or nobody here
            return BlockPivot(readers)
        return SentPivot(readers, group, self.sizes)

    def joined(self, own: Sequence[Tensor], batches: Batches, x: Tensor) -> Tensor:
        made = dict(zip(range(self.rank, len(batches), self.size), own, strict=True))
        parts = [self._sent(made.get(i), i % self.size, x[rows].shape) for i, (rows, _) in enumerate(batches)]
        return torch.cat(parts)


class SentPivot(BlockPivot):
    """A pivot's query and key of the current block, sent by the group's first rank to its others."""

    def __init__(self, readers: int, group: dist.ProcessGroup, sizes: Sizes) -> None:
        super().__init__(readers)
        self.group, self.sizes = group, sizes
        self.sends = dist.get_rank(group) == 0
        self._under_way: list[dist.Work] = []

    def put(self, step: int, block: int, q: Tensor, k: Tensor) -> None:
        super().put(step, block, q, k)
        for work in self._under_way:  # a block has passed since: they have long arrived
            work.wait()
        self._under_way = self._broadcast(q, k)

    def get(self, step: int, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if not self.sends and not self.holds(step, block):
            num_tokens, num_heads, head_dim, dtype = self.sizes
            shape = (1, sum(num_tokens), num_heads, head_dim)
            q, k = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
            for work in self._broadcast(q, k):
                work.wait()
            super().put(step, block, q, k)
        return super().get(step, block, device)

    def _broadcast(self, q: Tensor, k: Tensor) -> list[dist.Work]:
        # On a GPU, broadcasts have a stream of their own: the sender's attention does not wait for them.
        source = dist.get_global_rank(self.group, 0)
        # The sender's tensors stay referenced until they have arrived: on a CPU, casts are copies.
        self._sent = [x.to(self.sizes.dtype).contiguous() for x in (q, k)]
        return [dist.broadcast(x, source, group=self.group, async_op=True) for x in self._sent]


class TokensOverRanks(Shared):
    """Every rank computes a part of the text and image tokens of all rows, and a part of attention's heads.

    Source: DeepSpeed-Ulysses, Jacobs et al., arXiv 2309.14509.
    """

    def of(self, sizes: Sizes) -> Self:
        if sizes.num_heads % self.size:
            fitting = [str(n) for n in range(1, sizes.num_heads + 1) if sizes.num_heads % n == 0]
            raise ValueError(
                f"{sizes.num_heads} heads of attention cannot be shared out among {self.size} ranks: "
                f"take {', '.join(fitting)}"
            )
        if min(sizes.num_tokens) < self.size:
            txt, img = sizes.num_tokens
            raise ValueError(f"{txt} text and {img} image tokens are too few for {self.size} ranks")
        return super().of(sizes)

    def own(self, batches: Batches) -> Batches:
        lengths = tuple(
            map(sum, zip(*(_parts(count, self.size) for count in self.sizes.num_tokens), strict=True))
        )
        return [
            (rows, HeadsOverRanks(
                whole=spec, group=self.group, rank=self.rank, lengths=lengths, backend=spec.backend
            ))
            for rows, spec in batches
        ]  # fmt: skip

    def tokens(self, x: Tensor, dim: int) -> Tensor:
        return x.tensor_split(self.size, dim)[self.rank]

    def joined(self, own: Sequence[Tensor], batches: Batches, x: Tensor) -> Tensor:
        mine = super().joined(own, batches, x)
        parts = enumerate(x.tensor_split(self.size, dim=1))
        return torch.cat([self._sent(mine if i == self.rank else None, i, p.shape) for i, p in parts], dim=1)


def _parts(count: int, ranks: int) -> list[int]:
    """Sizes of the parts that `tensor_split` makes."""
    return [count // ranks + (i < count % ranks) for i in range(ranks)]


@dataclass(frozen=True, kw_only=True)
class HeadsOverRanks(AtBlock):
    """Attention of all tokens and some heads, called with some tokens and all heads.

    Tokens are exchanged for heads before it, and back after it, in one message each. Between them `whole`
    sees every token, in the order of the ranks, and may be any specification.
    """

    whole: AttentionSpec
    group: dist.ProcessGroup
    rank: int
    lengths: tuple[int, ...]
    """Text and image tokens of each rank, together."""

    def plain(self) -> AttentionSpec:
        return dataclasses.replace(self, whole=self.whole.plain())

    def query_rows(self) -> tuple[int, ...] | None:
        return self.whole.query_rows()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [Q, n, H, D], k and v [B, n, H, D] of this rank's n tokens -> [B, n, H, D]."""
        ranks, (rows, own, heads, dim) = len(self.lengths), k.shape
        some = heads // ranks
        # Tokens before rows, so that parts of any length lie one behind the other, in one copy of everything:
        # [Q or B, n, H, D] -> [R, n, Q + 2 B, h, D] -> [R n, Q + 2 B, h, D]
        by_rank = [x.unflatten(2, (ranks, some)).permute(2, 1, 0, 3, 4) for x in (q, k, v)]
        packed = torch.cat(by_rank, dim=2).flatten(0, 1)
        got = packed.new_empty(sum(self.lengths), *packed.shape[1:])  # [L, Q + 2 B, h, D]
        self._exchange(got, packed, self.lengths, (own,) * ranks)
        q, k, v = got.transpose(0, 1).split([len(q), rows, rows])  # [Q, L, h, D], [B, L, h, D] twice
        bias = self.value_bias
        if bias is not None:
            bias = bias[:, self.rank * some : (self.rank + 1) * some]
        out = self.whole.for_block(self.block, bias, self.logit_bound)(q, k, v)  # [B, L, h, D]
        back = out.new_empty(ranks * own, rows, some, dim)
        self._exchange(back, out.transpose(0, 1).contiguous(), (own,) * ranks, self.lengths)
        # [R n, B, h, D] -> [B, n, H, D]
        return back.unflatten(0, (ranks, own)).permute(2, 1, 0, 3, 4).flatten(2, 3)

    def _exchange(self, into: Tensor, x: Tensor, received: Sequence[int], sent: Sequence[int]) -> None:
        """Part i of x goes to rank i, and part i of `into` comes from it; sizes along the first dim."""
        dist.all_to_all_single(into, x, list(received), list(sent), group=self.group)
