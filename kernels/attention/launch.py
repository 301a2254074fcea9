"""Launching the attention kernels, forward and backward: in which language and tiles, on which arguments.

`forward` takes the kernels in Gluon (`gluon_fwd`) where `select` says that they can run, elsewhere those in
plain Triton (`triton_fwd`), one of which joins the tiles that either has split along the keys. `backward` is
plain Triton (`triton_bwd`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import select, tiles, triton_bwd, triton_fwd
from .jobs import Job, chunks, pack, rounds, split_pairs
from .tiles import Tail, Tile
from .triton_fwd import Results, Sizes, Strides

KINDS = {
    tiles.PLAIN: triton_fwd.PLAIN.value,
    tiles.TARGET: triton_fwd.TARGET.value,
    tiles.PAIR: triton_fwd.PAIR.value,
}
"""What the kernels call each form."""
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
"""q, k, k_pivot, v, each with contiguous heads."""


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
    q, k, v = (_last_contiguous(x) for x in (q, k, v))
    inputs = q, k, k if k_pivot is None else _last_contiguous(k_pivot), v
    language = _language(inputs, tile)
    for launch in _launches(jobs, language):
        _forward(inputs, value_bias, out, lse, launch, fixed, tile, language)
    return out, lse


def _language(inputs: Inputs, tile: Tile | None) -> str:
    """The tile's, or else `select`'s. Raises ValueError for a Gluon tile that cannot run."""
    if tile is None:
        return select.language(inputs)
    if tile.language == tiles.GLUON and (reason := select.why_not_in_gluon(inputs)):
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


def _forward(
    inputs: Inputs,
    value_bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    jobs: Sequence[Job] | None,
    fixed: bool,
    tile: Tile | None,
    language: str,
) -> None:
    q, _, _, v = inputs
    num_rows, len_k, num_heads, head_dim = v.shape
    len_q = q.shape[1]
    counts = {form: sum(job.form == form for job in jobs or ()) for form in KINDS}
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

    results = Results(out, lse, lse if value_bias is None else value_bias, part_out, part_lse)
    packed = pack(jobs)
    if language == tiles.GLUON:
        _forward_in_gluon(
            inputs, results, packed, tail, tile,
            form=forms[0], mapped=jobs is not None, fixed=fixed, has_bias=value_bias is not None,
            num_programs=device.num_sms,
        )  # fmt: skip
    else:
        m, n = tile.block_m, tile.block_n
        tma, sources = describe(inputs, (m, n, n, n), tile)
        triton_fwd.forward_kernel[(tail.num_whole + tail.num_slots,)](
            *sources, results, _strides(inputs), packed, counts[tiles.PAIR], counts[tiles.TARGET],
            Sizes(len_q, len_k, num_heads), head_dim**-0.5 * math.log2(math.e),
            tail.num_whole, tail.num_parts, tail.num_slots,
            KIND=KINDS[forms[0]] if len(forms) == 1 else triton_fwd.MIXED.value,
            MAPPED=jobs is not None, FIXED=fixed, HAS_BIAS=value_bias is not None,
            EVEN_K=len_k % n == 0, SPLIT=tail.num_slots > 0, TMA=tma, BLOCK_M=m, BLOCK_N=n, D=head_dim,
            num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
    if tail.num_slots:
        triton_fwd.merge_kernel[(tail.num_slots // tail.num_parts, 2 if counts[tiles.PAIR] else 1)](
            results, packed, counts[tiles.PAIR], len_q, num_heads,
            tail.num_whole, tail.num_parts, tail.num_slots,
            MAPPED=jobs is not None, HAS_BIAS=value_bias is not None,
            BLOCK_M=tile.block_m, D=head_dim, num_warps=tile.num_warps, enable_fp_fusion=True,
        )  # fmt: skip


def _forward_in_gluon(
    inputs: Inputs,
    results: Results,
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
    """One form, on one program a multiprocessor. A tensor descriptor can express every input."""
    from . import gluon_fwd  # some versions of Triton only

    q, k, _, v = inputs
    head_dim = v.shape[-1]
    blocks = (gluon_fwd.GROUP_M, tile.block_n, tile.block_n, tile.block_n)
    sources = (descriptor_of(x, block) for x, block in zip(inputs, blocks, strict=True))
    num_items = tail.num_whole + tail.num_slots
    gluon_fwd.forward_kernel[(min(num_programs, num_items),)](
        *(gluon_fwd.with_layout(source) for source in sources), results, packed,
        q.shape[1], k.shape[1], v.shape[2], head_dim**-0.5 * math.log2(math.e),
        tail.num_whole, tail.num_parts, num_items,
        KIND=KINDS[form], MAPPED=mapped, FIXED=fixed, HAS_BIAS=has_bias,
        EVEN_K=k.shape[1] % tile.block_n == 0, NUM_SLOTS=tile.num_stages, BLOCK_N=tile.block_n, D=head_dim,
        num_warps=4, maxnreg=gluon_fwd.MAX_REGISTERS, enable_fp_fusion=True,
    )  # fmt: skip


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    k_pivot: Tensor | None,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    jobs: Sequence[Job] | None,
    *,
    dkv_tile: Tile | None = None,
    dq_tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of q, k, k_pivot and v, from grad [B, L, H, D] and what `forward` took and gave.

    out must be without value bias: rounded together with one, it would blur delta. The tiles stand in for the
    table's, for sweeps and tests.
    """
    q, k, v, grad = (_last_contiguous(x) for x in (q, k, v, grad))
    device, head_dim = tiles.device(q.device), q.shape[-1]
    dkv_tile = dkv_tile or tiles.backward_tile(device, tiles.DKV, head_dim)
    dq_tile = dq_tile or tiles.backward_tile(device, tiles.DQ, head_dim)
    plain, targets = split_pairs(jobs or ())
    sums = torch.float32 if targets else q.dtype

    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if k_pivot is None:
        # Every pivot is a plain row too, and that launch comes first: it writes, targets add.
        dq = torch.empty(q.shape, dtype=sums, device=q.device)
        dk = dk_pivot = torch.empty(k.shape, dtype=sums, device=k.device)
        k_pivot = k
    else:
        dq = torch.zeros(q.shape, dtype=sums, device=q.device)
        dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
        k_pivot = _last_contiguous(k_pivot)
        dk_pivot = torch.zeros(k_pivot.shape, dtype=sums, device=k.device)

    launches: list[Sequence[Job] | None] = [None] if jobs is None else [*chunks(plain)]
    # Launches wait for each other: programs of one launch never add to the same sums.
    launches += [some for round_ in rounds(targets) for some in chunks(round_)]
    sources, delta = (q, k, k_pivot, v, grad), _delta(grad, out)
    for launch in launches:
        _backward(triton_bwd.dkv_kernel, sources, lse, delta, (dk, dk_pivot, dv), dkv_tile, launch)
        _backward(triton_bwd.dq_kernel, sources, lse, delta, (dq,), dq_tile, launch)
    separate = None if dk_pivot is dk else dk_pivot.to(k.dtype)
    return dq.to(q.dtype), dk.to(k.dtype), separate, dv


def _delta(grad: Tensor, out: Tensor) -> Tensor:
    num_rows, len_q, num_heads, head_dim = out.shape
    delta = torch.empty(num_rows, num_heads, len_q, dtype=torch.float32, device=out.device)
    block = triton_bwd.DELTA_BLOCK
    triton_bwd.delta_kernel[(triton.cdiv(len_q, block), num_heads, num_rows)](
        grad, out.contiguous(), delta, *_strides([grad]), len_q, num_heads,
        BLOCK=block, D=head_dim, enable_fp_fusion=True,
    )  # fmt: skip
    return delta


def _backward(
    kernel: triton.JITFunction,
    sources: tuple[Tensor, ...],
    lse: Tensor,
    delta: Tensor,
    results: tuple[Tensor, ...],
    tile: Tile,
    jobs: Sequence[Job] | None,
) -> None:
    """sources: q, k, k_pivot, v, grad."""
    q, _, _, v, _ = sources
    num_rows, len_k, num_heads, head_dim = v.shape
    m, n, len_q = tile.block_m, tile.block_n, q.shape[1]
    num_blocks = triton.cdiv(len_q, m) if kernel is triton_bwd.dq_kernel else triton.cdiv(len_k, n)
    tma, loaded = describe(sources, (m, n, n, n, m), tile)
    kernel[(num_blocks, num_heads, num_rows if jobs is None else len(jobs))](
        *loaded, lse, delta, *results, _strides(sources), pack(jobs), Sizes(len_q, len_k, num_heads),
        head_dim**-0.5,
        GROUNDED=jobs is not None and jobs[0].form == tiles.TARGET, MAPPED=jobs is not None, TMA=tma,
        BLOCK_M=m, BLOCK_N=n, D=head_dim,
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(tensors: Sequence[Tensor]) -> tuple[Strides, ...]:
    return tuple(Strides(*x.stride()[:3]) for x in tensors)


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
