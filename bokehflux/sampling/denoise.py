"""The velocity of a run: the network, its conditioning, true CFG and grounding, as one callable.

All rows of a run share prompt, guidance and noise levels, so the modulations of all steps are computed once,
before the first. A target's pivot may be in its batch, in an earlier batch of the same step, or in a
`PivotCache` from an earlier run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bokehflux.attention import (
    AttentionSpec,
    Grounded,
    OnReference,
    OnStored,
    PivotQuery,
    Plain,
    Recorded,
    ReferenceKeys,
)
from bokehflux.conditioning import Conditioning
from bokehflux.models.adapter import BokehCondition
from bokehflux.models.embeddings import RopeTable, rope_table
from bokehflux.models.mmdit import MMDiT, Modulations, Rows, RunConstants
from bokehflux.models.precision import careful_dtype
from bokehflux.sampling.cuda_graph import StepGraphs, worth_capturing
from bokehflux.sampling.latents import LatentGrid, position_ids
from bokehflux.sampling.pivot_cache import PivotCache
from bokehflux.sampling.ranks import ALONE, Batches, Ranks, RowsOverRanks, Sizes

COMPOSED = 0.9
"""Noise level down to which a CPU computes in float32. What is rounded before it moves things in the picture;
what is rounded after it is 0.2 % of the latents (nano, 256 px, 20 steps, from the tenth on)."""
AttentionAt = Callable[[int, int], AttentionSpec]
"""(rows, step) -> what the joint attentions of that step compute, for a batch that is not split."""


@dataclass(frozen=True, kw_only=True)
class Grounding:
    """Which row anchors the scene, and for how long."""

    pivot_row: int | None
    """None: the pivot is not in the batch but in `cache`."""
    num_steps: int
    """Grounded steps, counted from the first."""
    cache: PivotCache | None = None
    """Filled when the pivot is in the batch, read when it is not; None: nothing is kept after the run."""


@dataclass(frozen=True, kw_only=True)
class PromptPass:
    """One prompt's pass through the network: everything that stays the same from step to step."""

    mmdit: MMDiT
    conditioning: Conditioning
    """A single row, shared by all rows of the batch."""
    guidance: float
    """Distilled guidance, an input of the network."""
    rope: RopeTable
    """Rotations of the T text tokens, then the N image tokens."""
    bokeh: BokehCondition | None
    """The levels of the batch's rows; None: the base model alone."""
    constants: RunConstants
    graphs: StepGraphs | None
    """None: no CUDA graphs."""
    known: dict[float, Modulations]
    """By noise level: the modulations of a run's steps, computed together."""
    ranks: Ranks
    """Which share of rows and tokens is computed here; text and rotations are those of its tokens."""

    def modulations(self, sigma: Tensor) -> Modulations:
        """The modulations at one noise level, each [1, 1, E]; a level that is not `known` is computed now."""
        found = self.known.get(float(sigma))
        return found if found is not None else self.table(sigma[None])[float(sigma)]

    def velocity(self, x: Tensor, sigma: Tensor, batches: Batches) -> Tensor:
        """x [B, N, C] -> the velocity of every row at one noise level [B, N, C], computed batch by batch."""
        mine = self.ranks.tokens(x, dim=1)
        parts = [self._part(mine[rows], rows, spec) for rows, spec in self.ranks.own(batches)]
        return self.ranks.joined(self._velocities(parts, self.modulations(sigma)), batches, x)

    def _velocities(self, parts: Sequence[Rows], mods: Modulations) -> list[Tensor]:
        if len(parts) != 1:
            return self.mmdit.velocities(parts, mods, self.rope)
        (part,) = parts

        def evaluate(x: Tensor, mods: Modulations) -> Tensor:
            return self.mmdit.velocities([dataclasses.replace(part, img=x)], mods, self.rope)[0]

        spec, x = part.attention, part.img
        assert spec is not None
        if self.graphs is None or not worth_capturing(self.mmdit, spec, x, part.txt.shape[1]):
            return [evaluate(x, mods)]
        return [self.graphs(spec, evaluate, x, mods)]

    def _part(self, x: Tensor, rows: slice, spec: AttentionSpec) -> Rows:
        return Rows(
            img=x,
            txt=self.conditioning.txt.expand(len(x), -1, -1),  # [b, T, W], without a copy
            attention=spec,
            bokeh=self.bokeh.rows(rows) if self.bokeh is not None else None,
            constants=self.constants.rows(rows),
        )

    def table(self, sigmas: Tensor) -> dict[float, Modulations]:
        """Noise levels [S] -> their modulations, each [1, 1, E]. 2 MB a level for FLUX in bfloat16."""
        count, device, dtype = len(sigmas), self.mmdit.device, self.mmdit.dtype
        mods = self.mmdit.modulations(
            self.conditioning.pooled.expand(count, -1),  # [S, P]: the noise levels are the rows here
            model_sigma(sigmas, careful_dtype(device, dtype)).to(device),
            torch.full((count,), self.guidance, device=device),
        )
        levels = [float(sigma) for sigma in sigmas]
        return {
            level: mods.row(i) if level > COMPOSED else mods.row(i).for_blocks(dtype)
            for i, level in enumerate(levels)
        }


@dataclass(frozen=True, kw_only=True)
class Denoiser:
    """velocity(x, sigma, step) for a batch of rows that share prompt and size; built by `denoiser`."""

    positive: PromptPass
    grounding: Grounding | None
    reference: ReferenceKeys | None
    """A photograph that rows without grounding look at."""
    attention: AttentionAt | None
    """Your own specification of every step's attention, in place of `grounding`."""
    true_cfg: float
    """Above 1: classifier-free guidance against `negative`, at twice the cost."""
    negative: PromptPass | None
    max_rows: int | None
    """How many rows go through the network together; None: all."""
    backend: str
    """Attention of every specification made here; `attention` names its own."""

    @torch.inference_mode()
    def __call__(self, x: Tensor, sigma: Tensor, step: int) -> Tensor:
        """x [B, N, C] at noise level sigma -> velocity [B, N, C]."""
        v = self.positive.velocity(x, sigma, list(self.batches(len(x), step)))
        if self.true_cfg > 1 and self.negative is not None:
            # The negative pass attends plainly even in grounded steps, as published.
            plain = [(rows, Plain(backend=self.backend)) for rows in self._slices(len(x))]
            v_neg = self.negative.velocity(x, sigma, plain)
            v = v_neg + self.true_cfg * (v - v_neg)
        return v

    def batches(self, rows: int, step: int) -> Iterator[tuple[slice, AttentionSpec]]:
        """The batches of a step and their attention. The pivot's comes first: the others read its keys."""
        if self.attention is not None:
            yield slice(0, rows), self.attention(rows, step)
            return
        grounding = self.grounding
        if grounding is None or step >= grounding.num_steps:
            alone: AttentionSpec = Plain(backend=self.backend)
            if self.reference is not None:
                alone = OnReference(keys=self.reference, backend=self.backend)
            for part in self._slices(rows):
                yield part, alone
            return
        adapter = self.positive.mmdit.bokeh
        parts = list(self._slices(rows))
        ranks = self.positive.ranks
        store = grounding.cache if grounding.cache is not None else ranks.pivot(len(parts))
        if grounding.pivot_row is not None:
            first, *parts = parts
            pivot_of = (grounding.pivot_row,) * len(range(rows)[first])
            if adapter is not None and not adapter.config.adapt_k:
                # As published: where the adapter leaves keys alone, targets do not read the pivot's keys.
                yield first, PivotQuery(pivot_of=pivot_of, backend=self.backend)
            elif parts or grounding.cache is not None:
                yield first, Recorded(pivot_of=pivot_of, store=store, step=step, backend=self.backend)
            else:
                yield first, Grounded(pivot_of=pivot_of, backend=self.backend)
        for part in parts:
            yield part, OnStored(store=store, step=step, backend=self.backend)

    def _slices(self, rows: int) -> Iterator[slice]:
        size = rows if self.max_rows is None else self.max_rows
        for start in range(0, rows, size):
            yield slice(start, min(start + size, rows))


def model_sigma(sigma: Tensor, dtype: torch.dtype) -> Tensor:
    """The noise level as the published pipeline hands it over: 1000 sigma, rounded to `dtype`, / 1000.

    In bfloat16 this keeps about three digits of the timestep; another rounding makes another picture.
    """
    return (sigma * 1000).to(dtype) / 1000


def denoiser(
    mmdit: MMDiT,
    conditioning: Conditioning,
    grid: LatentGrid,
    *,
    guidance: float = 3.0,
    bokeh: BokehCondition | None = None,
    grounding: Grounding | None = None,
    reference: ReferenceKeys | None = None,
    attention: AttentionAt | None = None,
    true_cfg: float = 1.0,
    negative: Conditioning | None = None,
    sigmas: Tensor | None = None,
    max_rows: int | None = None,
    cuda_graphs: bool = True,
    backend: str = "auto",
    ranks: Ranks = ALONE,
) -> Denoiser:
    """Build the `Denoiser` of one prompt and size.

    conditioning: one row, shared by every row of the batch. guidance: the distilled guidance; the negative
    pass has guidance 1 and the null level. reference: a photograph that every row looks at. attention: a
    specification of your own for every step, in place of `grounding`. sigmas: the noise levels of the run,
    whose modulations are computed now, all together.
    max_rows: how many rows go through the network together; further rows take turns in each block and share
    the pivot's queries and keys, so N targets always cost N + 1 rows (the pivot must then be row 0).
    cuda_graphs: whether steps of small batches may be replayed as CUDA graphs (`cuda_graph.py` says when and
    at what cost); this changes no number.
    backend: the attention of every specification made here, by name (`kernels.attention.select`).
    ranks: the processes that share this run; each of them builds the same denoiser.
    Raises ValueError for true CFG without a negative conditioning, for both grounding and attention, and for
    a split that these rules forbid.
    """
    if true_cfg > 1 and negative is None:
        raise ValueError(f"true_cfg {true_cfg:g} needs a negative conditioning, got none")
    if attention is not None and grounding is not None:
        raise ValueError("grounding chooses the attention of every step: give it or attention, not both")
    _check_split(mmdit, grounding, attention, max_rows, ranks)
    num_tokens = (conditioning.txt.shape[1], grid.num_tokens)
    careful = careful_dtype(mmdit.device, mmdit.dtype)
    ranks = ranks.of(Sizes(num_tokens, mmdit.config.num_heads, mmdit.config.head_dim, careful))
    ids = position_ids(grid, num_tokens[0], mmdit.device).split(num_tokens)
    ids = torch.cat([ranks.tokens(part, dim=0) for part in ids])  # [T / R + N / R, 3]
    rope = rope_table(ids, mmdit.config.axes_dim, mmdit.config.theta)

    if bokeh is not None and bokeh.controls is not None:
        mine = ranks.tokens(bokeh.controls.features, dim=1)
        bokeh = dataclasses.replace(bokeh, controls=dataclasses.replace(bokeh.controls, features=mine))

    def prepare(conditioning: Conditioning, guidance: float, bokeh: BokehCondition | None) -> PromptPass:
        with torch.inference_mode():
            made = PromptPass(
                mmdit=mmdit,
                conditioning=Conditioning(
                    txt=ranks.tokens(conditioning.txt, dim=1).to(careful),
                    pooled=conditioning.pooled.to(careful),
                ),
                guidance=guidance,
                rope=rope,
                bokeh=bokeh,
                constants=mmdit.constants(bokeh),
                graphs=StepGraphs() if cuda_graphs else None,
                known={},
                ranks=ranks,
            )
            if sigmas is not None:
                made.known.update(made.table(sigmas[sigmas > 0]))
        return made

    null = bokeh.null() if bokeh is not None else None
    return Denoiser(
        positive=prepare(conditioning, guidance, bokeh),
        grounding=grounding,
        reference=reference,
        attention=attention,
        true_cfg=true_cfg,
        negative=prepare(negative, 1.0, null) if true_cfg > 1 and negative is not None else None,
        max_rows=max_rows,
        backend=backend,
    )


def _check_split(
    mmdit: MMDiT,
    grounding: Grounding | None,
    attention: AttentionAt | None,
    max_rows: int | None,
    ranks: Ranks,
) -> None:
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows must be at least 1, got {max_rows}")
    if max_rows is not None and attention is not None:
        raise ValueError("max_rows cannot split a batch with an attention of your own: leave one of them out")
    if grounding is None:
        return
    if grounding.pivot_row is None and grounding.cache is None:
        raise ValueError("grounding needs a pivot: give pivot_row, or a filled cache")
    over = isinstance(ranks, RowsOverRanks)
    if grounding.cache is not None and over:
        raise ValueError(
            "a pivot cache is filled by one process: share out the tokens, or the scenes, not the rows"
        )
    splits = max_rows is not None or grounding.cache is not None or over
    if splits and grounding.pivot_row not in (0, None):
        row = grounding.pivot_row
        raise ValueError(
            f"max_rows, a pivot cache and rows over ranks need the pivot in row 0, got row {row}"
        )
    if splits and mmdit.bokeh is not None and not mmdit.bokeh.config.adapt_k:
        raise ValueError(
            "max_rows, a pivot cache and rows over ranks need an adapter that updates keys (unfreeze_k)"
        )
