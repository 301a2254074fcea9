"""Launching the attention kernels, from the host: in which language and tiles they run, on which arguments.

`forward` takes the Gluon kernels (`gluon_fwd`) where they can run, elsewhere those in plain Triton
(`triton_fwd`), which also join the tiles that either language has split along the keys. The backward pass
(`triton_bwd`) launches itself, with the jobs, the packing and the descriptors of this file.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import select, tiles, triton_fwd
from .tiles import Tail, Tile

JOBS_PER_LAUNCH = 8
FORMS = {
    tiles.PLAIN: triton_fwd.PLAIN.value,
    tiles.TARGET: triton_fwd.TARGET.value,
    tiles.PAIR: triton_fwd.PAIR.value,
}
"""What the kernels call each form."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One row of output, or the two of a pair."""

    form: str
    """`tiles.PLAIN`, `tiles.TARGET` or `tiles.PAIR`."""
    q_row: int
    """Row of q."""
    pivot_row: int
    """Row of k_pivot; for a pair also the pivot's row of v, out and lse."""
    row: int
    """Row of k, v, out and lse."""


@functools.lru_cache(maxsize=256)
def target_jobs(pivot_index: tuple[int, ...]) -> tuple[Job, ...]:
    """The jobs of `reference.target_attention`: every row is a target."""
    return tuple(Job(form=tiles.TARGET, q_row=p, pivot_row=p, row=i) for i, p in enumerate(pivot_index))


@functools.lru_cache(maxsize=256)
def grounded_jobs(pivot_of: tuple[int, ...]) -> tuple[Job, ...]:
    """The jobs of `reference.grounded_attention`: a pair for the first target of every pivot, targets for the
    others, plain rows for pivots alone."""
    jobs = []
    for slot, pivot in enumerate(sorted(set(pivot_of))):
        targets = [row for row, p in enumerate(pivot_of) if p == pivot and row != pivot]
        first, *others = targets or [pivot]
        forms = [tiles.PAIR if targets else tiles.PLAIN, *[tiles.TARGET] * len(others)]
        for form, row in zip(forms, (first, *others), strict=True):
            jobs.append(Job(form=form, q_row=slot, pivot_row=pivot, row=row))
    return tuple(jobs)


def forward(
    q: Tensor,
    k: Tensor,
    k_pivot: Tensor | None,
    v: Tensor,
    value_bias: Tensor | None,
    jobs: Sequence[Job] | None,
    *,
    fixed: bool,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Values [B, Lq, H, D] in the dtype of q and log-sum-exps [B, H, Lq] in float32; B and the keys are v's.

    k_pivot: keys of pivots, None where they are rows of k. jobs: what to compute, each row of v once; None is
    every row by itself. fixed: no running maximum (see `ops.is_bounded`). tile: in place of the table's and
    `select`'s choice, for sweeps and tests. Raises ValueError for a Gluon tile that cannot run here.
    """
    num_rows, len_k, num_heads, head_dim = v.shape
    len_q = q.shape[1]
    out = torch.empty(num_rows, len_q, num_heads, head_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(num_rows, num_heads, len_q, dtype=torch.float32, device=q.device)
    if value_bias is not None:
        value_bias = value_bias.contiguous()
    q, k, v = (last_contiguous(x) for x in (q, k, v))
    k_pivot = k if k_pivot is None else last_contiguous(k_pivot)
    language = pick_language((q, k, k_pivot, v), tile)
    for launch in _launches(jobs, language):
        _launch(q, k, k_pivot, v, value_bias, out, lse, launch, fixed, tile, language)
    return out, lse


def pick_language(tensors: Sequence[Tensor], tile: Tile | None) -> str:
    """The tile's, or else `select`'s. Raises ValueError for a Gluon tile that cannot run."""
    if tile is None:
        return select.language(tensors)
    if tile.language == tiles.GLUON and (reason := select.why_not_in_gluon(tensors)):
        raise ValueError(f"the Gluon attention kernels cannot run: {reason}")
    return tile.language


def _launches(jobs: Sequence[Job] | None, language: str) -> Sequence[Sequence[Job] | None]:
    """Jobs by launch: in Triton all forms together, in Gluon each by itself. None: every row, plain."""
    if jobs is None:
        return [None]
    if language == tiles.TRITON:
        return chunks(jobs)
    by_form = ([job for job in jobs if job.form == form] for form in tiles.LONGEST_FIRST)
    return [launch for some in by_form if some for launch in chunks(some)]


def _launch(
    q: Tensor,
    k: Tensor,
    k_pivot: Tensor,
    v: Tensor,
    value_bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    jobs: Sequence[Job] | None,
    fixed: bool,
    tile: Tile | None,
    language: str,
) -> None:
    num_rows, len_k, num_heads, head_dim = v.shape
    len_q = q.shape[1]
    counts = {form: sum(job.form == form for job in jobs or ()) for form in FORMS}
    if jobs is None:
        counts[tiles.PLAIN] = num_rows
    forms = [form for form in tiles.MATMULS if counts[form]]
    device = tiles.device(q.device)
    tile = tile or tiles.forward_tile(device, forms, head_dim, fixed, language)

    per_job = triton.cdiv(len_q, tile.block_m) * num_heads
    tail = tiles.plan_tail(
        tuple((counts[form] * per_job, tiles.MATMULS[form]) for form in tiles.LONGEST_FIRST if counts[form]),
        device.num_sms * tile.programs_per_sm,
        triton.cdiv(len_k, tile.block_n),
        tile.max_parts,
    )
    part_out = part_lse = lse  # never touched where nothing is split
    if tail.num_slots:
        copies = 2 if counts[tiles.PAIR] else 1
        lines = copies * tail.num_slots * tile.block_m
        part_out = torch.empty(lines, head_dim, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(lines, dtype=torch.float32, device=q.device)

    bias = lse if value_bias is None else value_bias
    packed = pack(jobs)
    results = triton_fwd.Results(out, lse, bias, part_out, part_lse)
    if language == tiles.GLUON:
        _run_gluon(
            (q, k, k_pivot, v), results, packed, tail, tile,
            form=forms[0], mapped=jobs is not None, fixed=fixed, has_bias=value_bias is not None,
            num_programs=device.num_sms,
        )  # fmt: skip
    else:
        m, n = tile.block_m, tile.block_n
        tma, sources = describe((q, k, k_pivot, v), (m, n, n, n), tile)
        triton_fwd.forward_kernel[(tail.num_whole + tail.num_slots,)](
            *sources, results, tuple(triton_fwd.Strides(*x.stride()[:3]) for x in (q, k, k_pivot, v)),
            packed, counts[tiles.PAIR], counts[tiles.TARGET], triton_fwd.Sizes(len_q, len_k, num_heads),
            head_dim**-0.5 * math.log2(math.e), tail.num_whole, tail.num_parts, tail.num_slots,
            KIND=FORMS[forms[0]] if len(forms) == 1 else triton_fwd.MIXED.value,
            MAPPED=jobs is not None, FIXED=fixed, HAS_BIAS=value_bias is not None,
            EVEN_K=len_k % n == 0, SPLIT=tail.num_slots > 0, TMA=tma,
            BLOCK_M=m, BLOCK_N=n, D=head_dim, num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
    if tail.num_slots:
        triton_fwd.merge_kernel[(tail.num_slots // tail.num_parts, 2 if counts[tiles.PAIR] else 1)](
            results, packed, counts[tiles.PAIR], len_q, num_heads,
            tail.num_whole, tail.num_parts, tail.num_slots,
            MAPPED=jobs is not None, HAS_BIAS=value_bias is not None,
            BLOCK_M=tile.block_m, D=head_dim, num_warps=tile.num_warps, enable_fp_fusion=True,
        )  # fmt: skip


def _run_gluon(
    tensors: Sequence[Tensor],
    results: Sequence[Tensor],
    packed: Sequence[int],
    tail: Tail,
    tile: Tile,
    *,
    form: str,
    mapped: bool,
    fixed: bool,
    has_bias: bool,
    num_programs: int,
) -> None:
    """One form, on one program a multiprocessor.

    tensors: q, k, k_pivot, v, all of which a tensor descriptor can express. results: out, lse, value bias,
    and where parts are parked: values and log2-sum-exps. packed: as `pack` gives it.
    """
    from . import gluon_fwd  # Hopper and one version of Triton only

    q, k, _, v = tensors
    head_dim = v.shape[-1]
    blocks = (gluon_fwd.GROUP_M, tile.block_n, tile.block_n, tile.block_n)
    sources = (descriptor_of(x, block) for x, block in zip(tensors, blocks, strict=True))
    num_items = tail.num_whole + tail.num_slots
    gluon_fwd.forward_kernel[(min(num_programs, num_items),)](
        *(gluon_fwd.with_layout(source) for source in sources), results, packed,
        q.shape[1], k.shape[1], v.shape[2], head_dim**-0.5 * math.log2(math.e),
        tail.num_whole, tail.num_parts, num_items,
        KIND=FORMS[form], MAPPED=mapped, FIXED=fixed, HAS_BIAS=has_bias,
        EVEN_K=k.shape[1] % tile.block_n == 0, NUM_SLOTS=tile.num_stages, BLOCK_N=tile.block_n, D=head_dim,
        num_warps=4, maxnreg=gluon_fwd.MAX_REGISTERS, enable_fp_fusion=True,
    )  # fmt: skip


def chunks(jobs: Sequence[Job]) -> list[Sequence[Job]]:
    """Jobs, longest first, in as few launches of nearly equal size as their number allows."""
    ordered = sorted(jobs, key=lambda job: -tiles.MATMULS[job.form])
    total, launches = len(ordered), triton.cdiv(len(ordered), JOBS_PER_LAUNCH)
    return [ordered[i * total // launches : (i + 1) * total // launches] for i in range(launches)]


def pack(jobs: Sequence[Job] | None) -> tuple[int, ...]:
    """The jobs of a launch as integers for `triton_fwd.pick_job`.

    All are odd and above 2**62, so that Triton sees the same types every time and compiles once.
    """
    bits, max_row = triton_fwd.ROW_BITS.value, triton_fwd.ROW_MASK.value
    packed = []
    for job in jobs or ():
        if max(job.q_row, job.pivot_row, job.row) > max_row:
            raise ValueError(f"expected at most {max_row + 1} rows, but there is {job}")
        fields = job.q_row | job.pivot_row << bits | job.row << 2 * bits
        packed.append(1 << 62 | fields << 1 | 1)
    return tuple(packed + [1 << 62 | 1] * (JOBS_PER_LAUNCH - len(packed)))


def last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def describe(
    tensors: Sequence[Tensor], blocks: Sequence[int], tile: Tile
) -> tuple[bool, Sequence[Tensor | TensorDescriptor]]:
    """What `triton_fwd.load_tile` reads: descriptors if the tile asks for them and every tensor allows it."""
    if tile.tma and all(map(select.is_describable, tensors)):
        return True, [descriptor_of(x, block) for x, block in zip(tensors, blocks, strict=True)]
    return False, tensors


def descriptor_of(x: Tensor, block: int) -> TensorDescriptor:
    """Over [B, H, L, D], so that the leading dims of a block are the ones it has one of."""
    x = x.transpose(1, 2)
    # The stride of a dim of size 1 is arbitrary in PyTorch; a descriptor checks it.
    strides = [stride if size > 1 else x.shape[-1] for size, stride in zip(x.shape, x.stride(), strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides[:-1], 1], [1, 1, block, x.shape[-1]])
