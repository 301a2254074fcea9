"""Forward attention for Hopper in Gluon: the forms of `triton_fwd`, with loading and computing warps.

A program is one producer warp and two consumer warpgroups of 64 queries each. It stays for many work items:
program p of P takes items p, p + P, p + 2 P ... The producer copies blocks of keys and values into one ring
of shared memory, in the order the consumers read them, without stopping between work items:

    plain     K0 | K1 V0 | K2 V1 | ... | V(n-1)
    target    Kp0 | K0 | Kp1 V0 | K1 | ... | V(n-1)
    pair      Kp0 | K0 Vp0 | Kp1 V0 | K1 Vp1 | ... | V(n-1)

Between two bars a consumer starts products on the tensor cores. While they run, it takes exponentials of the
scores that are done first. Blocks of keys go from last to first, so that missing keys are masked once, before
the loop.

Protocol. Slot i of the ring has two barriers: `full[i]` (1 arrival, the producer's, and its bytes) and
`empty[i]` (2 arrivals, one a group). Each side counts uses of the ring: use u takes slot u % NUM_SLOTS, in
round u // NUM_SLOTS. A fresh barrier counts as if the phase of parity 1 had just ended. Hence
    producer, round r: waits empty[i] for parity (r & 1) ^ 1 (round 0 passes), announces bytes, copies;
    consumer, round r: waits full[i] for parity r & 1, multiplies, and arrives at empty[i] only after
        `warpgroup_mma_wait` has said that every product that reads the slot is done.
Round r of empty[i] ends when all groups have arrived, so no side can lap the other. Both sides pass the same
sequence of uses, so (slot, parity) carries on from item to item without any reset. Queries have one buffer a
group, with `q_full[g]` and `q_empty[g]` of the same meaning, used once an item. The producer waits for it
after the first keys of an item: the ring needs room for those (three slots), which no consumer may hold.
Barriers are initialised, and fenced for the copy engine, before the warps part. Triton puts a barrier of the
warpgroup before every arrival, so that one thread may speak for all.

`tests/gluon_emulator.py` runs all this on a CPU, `tests/gpu` on a GPU.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.tools import tensor_descriptor

from . import triton_fwd

try:
    from triton.experimental.gluon.language.nvidia.hopper.tma import async_load
except ImportError:  # its name before Triton 3.8
    from triton.experimental.gluon.language.nvidia.hopper.tma import async_copy_global_to_shared as async_load

PLAIN: gl.constexpr = gl.constexpr(triton_fwd.PLAIN.value)
TARGET: gl.constexpr = gl.constexpr(triton_fwd.TARGET.value)
PAIR: gl.constexpr = gl.constexpr(triton_fwd.PAIR.value)
LN_2: gl.constexpr = gl.constexpr(0.6931471805599453)

GROUP_M = 64
"""Queries of a consumer group: the rows of one tensor core instruction of a warpgroup."""
NUM_GROUPS: gl.constexpr = gl.constexpr(2)
BLOCK_M: gl.constexpr = gl.constexpr(2 * GROUP_M)
MAX_REGISTERS = 168
"""A thread: all of a multiprocessor, before the warps trade them. The first group gets the rest of what
`warp_specialize` gives to the others: as much as the second."""

pick_job = gluon.jit(triton_fwd.pick_job.fn)


# The ring. `use` = (slot, parity).


@gluon.jit
def _next(slot, parity, NUM_SLOTS: gl.constexpr):
    wraps = slot == NUM_SLOTS - 1
    return gl.where(wraps, 0, slot + 1), gl.where(wraps, parity ^ 1, parity)


@gluon.jit
def _put(desc, row, head, block, ring, slot, parity, BLOCK_N: gl.constexpr):
    """Producer: copy keys or values of a block into the next slot."""
    slots, full, empty = ring
    mbarrier.wait(empty.index(slot), parity ^ 1)
    mbarrier.expect(full.index(slot), desc.block_type.nbytes)
    async_load(desc, [row, head, block * BLOCK_N, 0], full.index(slot), slots.index(slot))
    return _next(slot, parity, slots.shape[0])


@gluon.jit
def _take(ring, slot, parity):
    """Consumer: the tile of the next slot, once it is there, as [BLOCK_N, D]."""
    slots, full, _ = ring
    mbarrier.wait(full.index(slot), parity)
    return slots.index(slot).reshape([slots.shape[3], slots.shape[4]])


@gluon.jit
def _release(ring, slot):
    _, _, empty = ring
    mbarrier.arrive(empty.index(slot), count=1)


# Work.


@gluon.jit
def _find_work(item, plan, jobs, BLOCK_N: gl.constexpr, MAPPED: gl.constexpr):
    """Item `item` of a launch: rows, head, first query, blocks of keys begin .. end, slot of a part."""
    len_q, len_k, num_heads, num_whole, num_parts, num_items = plan
    num_m = gl.cdiv(len_q, BLOCK_M)
    blocks = gl.cdiv(len_k, BLOCK_N)
    part_slot = item - num_whole
    is_whole = part_slot < 0
    tile = gl.where(is_whole, item, num_whole + part_slot // num_parts)
    part = part_slot % num_parts
    begin = gl.where(is_whole, 0, part * blocks // num_parts)
    end = gl.where(is_whole, blocks, (part + 1) * blocks // num_parts)
    start_m = tile % num_m * BLOCK_M
    head = tile // num_m % num_heads
    job = tile // num_m // num_heads
    q_row, pivot_row, row = job, job, job
    if MAPPED:
        q_row, pivot_row, row = pick_job(job, jobs)
    return q_row, pivot_row, row, head, start_m, begin, end, part_slot


@gluon.jit
def _produce(
    descs, ring, queries, plan, jobs,
    KIND: gl.constexpr, MAPPED: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    q_desc, k_desc, kp_desc, v_desc = descs
    q_tiles, q_full, q_empty = queries
    _, _, _, _, _, num_items = plan
    slot = gl.to_tensor(0)
    parity = gl.to_tensor(0)
    q_parity = gl.to_tensor(0)
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        q_row, pivot_row, row, head, start_m, begin, end, _ = _find_work(item, plan, jobs, BLOCK_N, MAPPED)
        last = end - 1
        if KIND == PLAIN:
            slot, parity = _put(k_desc, row, head, last, ring, slot, parity, BLOCK_N)
        if KIND != PLAIN:
            slot, parity = _put(kp_desc, pivot_row, head, last, ring, slot, parity, BLOCK_N)
            slot, parity = _put(k_desc, row, head, last, ring, slot, parity, BLOCK_N)
        if KIND == PAIR:
            slot, parity = _put(v_desc, pivot_row, head, last, ring, slot, parity, BLOCK_N)
        # After these keys: they need not wait until the queries of the work before are done with.
        for group in gl.static_range(NUM_GROUPS):
            mbarrier.wait(q_empty.index(group), q_parity ^ 1)
            mbarrier.expect(q_full.index(group), q_desc.block_type.nbytes)
            async_load(
                q_desc, [q_row, head, start_m + 64 * group, 0], q_full.index(group), q_tiles.index(group)
            )
        q_parity ^= 1
        for step in range(1, end - begin):
            block = last - step
            if KIND == PLAIN:
                slot, parity = _put(k_desc, row, head, block, ring, slot, parity, BLOCK_N)
                slot, parity = _put(v_desc, row, head, block + 1, ring, slot, parity, BLOCK_N)
            if KIND == TARGET:
                slot, parity = _put(kp_desc, pivot_row, head, block, ring, slot, parity, BLOCK_N)
                slot, parity = _put(v_desc, row, head, block + 1, ring, slot, parity, BLOCK_N)
                slot, parity = _put(k_desc, row, head, block, ring, slot, parity, BLOCK_N)
            if KIND == PAIR:
                slot, parity = _put(kp_desc, pivot_row, head, block, ring, slot, parity, BLOCK_N)
                slot, parity = _put(v_desc, row, head, block + 1, ring, slot, parity, BLOCK_N)
                slot, parity = _put(k_desc, row, head, block, ring, slot, parity, BLOCK_N)
                slot, parity = _put(v_desc, pivot_row, head, block, ring, slot, parity, BLOCK_N)
        slot, parity = _put(v_desc, row, head, begin, ring, slot, parity, BLOCK_N)


# Softmax. Scores are in powers of two after `scale`; m is 0 with a fixed offset.


@gluon.jit
def _first_maximum(s, scale, FIXED: gl.constexpr):
    if FIXED:
        return gl.zeros([64], gl.float32, gl.SliceLayout(1, s.type.layout))
    else:
        return gl.max(s, 1) * scale


@gluon.jit
def _raise(m, s, scale, FIXED: gl.constexpr):
    """The maximum so far."""
    if not FIXED:
        m = gl.maximum(m, gl.max(s, 1) * scale)
    return m


@gluon.jit
def _exp(s, m, scale, FIXED: gl.constexpr):
    if FIXED:
        return gl.exp2(s * scale)
    else:
        return gl.exp2(s * scale - m[:, None])


@gluon.jit
def _weigh(e, dtype: gl.constexpr):
    """e as 16-bit weights for the tensor cores, and its sums, to divide by."""
    # Two conversions an instruction; one by one they would go through the unit that takes exponentials.
    if dtype == gl.bfloat16:
        weights = gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [e], dtype=gl.bfloat16, is_pure=True, pack=2
        )
    else:
        weights = gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [e], dtype=gl.float16, is_pure=True, pack=2
        )
    return weights, gl.sum(e, 1)


@gluon.jit
def _fade(x, factor):
    """x [64, D] times factor [64], which is in the layout of the scores."""
    return x * gl.convert_layout(factor, gl.SliceLayout(1, x.type.layout))[:, None]


@gluon.jit
def _carry(acc, total, sums, m_old, m, FIXED: gl.constexpr):
    """Values and sums so far under the new maximum, a block's sums added."""
    if not FIXED:
        fade = gl.exp2(m_old - m)
        acc = _fade(acc, fade)
        total *= fade
    return acc, total + sums


@gluon.jit
def _mask(s, block, len_k, EVEN_K: gl.constexpr, BLOCK_N: gl.constexpr):
    if not EVEN_K:
        keys = block * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, s.type.layout))
        s = gl.where((keys < len_k)[None, :], s, float("-inf"))
    return s


@gluon.jit
def _start_scores(q, no_scores, ring, slot, parity):
    """Start q k^T on the next tile of the ring. Returns it, that tile's slot and the next use."""
    k = _take(ring, slot, parity)
    s = warpgroup_mma(q, k.permute((1, 0)), no_scores, use_acc=False, is_async=True)
    return s, slot, _next(slot, parity, ring[0].shape[0])


@gluon.jit
def _first_scores(
    q, no_scores, ring, slot, parity, end, len_k, EVEN_K: gl.constexpr, BLOCK_N: gl.constexpr
):  # fmt: skip
    """Scores of the last block of keys, which comes first and may lack some, and the next use."""
    s, k_slot, use = _start_scores(q, no_scores, ring, slot, parity)
    s = warpgroup_mma_wait(0, [s])
    _release(ring, k_slot)
    return _mask(s, end - 1, len_k, EVEN_K, BLOCK_N), use


@gluon.jit
def _start_values(weights, acc, ring, slot, parity):
    """Start acc += weights v on the next tile of the ring. Returns acc, that tile's slot and the next use."""
    v = _take(ring, slot, parity)
    operand = gl.convert_layout(weights, gl.DotOperandLayout(0, acc.type.layout, 2))
    acc = warpgroup_mma(operand, v, acc, is_async=True)
    return acc, slot, _next(slot, parity, ring[0].shape[0])


@gluon.jit
def _last_values(q_empty, weights, acc, ring, slot, parity):
    """acc plus the values of the item's last block, and the next use.

    No scores are left, so queries are given back first.
    """
    mbarrier.arrive(q_empty, count=1)
    acc, v_slot, use = _start_values(weights, acc, ring, slot, parity)
    acc = warpgroup_mma_wait(0, [acc])
    _release(ring, v_slot)
    return acc, use


@gluon.jit
def _row(
    q, q_empty, no_scores, acc, ring, slot, parity, begin, end, len_k, scale,
    FIXED: gl.constexpr, EVEN_K: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """A row by itself: values [64, D] to be divided, offsets, sums [64], and where the ring stands.

    acc: zeros.
    """
    dtype: gl.constexpr = ring[0].dtype
    s, use = _first_scores(q, no_scores, ring, slot, parity, end, len_k, EVEN_K, BLOCK_N)
    m = _first_maximum(s, scale, FIXED)
    weights, total = _weigh(_exp(s, m, scale, FIXED), dtype)
    slot, parity = use

    for _ in range(1, end - begin):
        s, k_slot, use = _start_scores(q, no_scores, ring, slot, parity)
        acc, v_slot, use = _start_values(weights, acc, ring, use[0], use[1])
        slot, parity = use
        s = warpgroup_mma_wait(1, [s])
        _release(ring, k_slot)
        m_old = m
        m = _raise(m, s, scale, FIXED)
        weights, sums = _weigh(_exp(s, m, scale, FIXED), dtype)
        acc = warpgroup_mma_wait(0, [acc])
        _release(ring, v_slot)
        acc, total = _carry(acc, total, sums, m_old, m, FIXED)

    acc, use = _last_values(q_empty, weights, acc, ring, slot, parity)
    return acc, m, total, use


@gluon.jit
def _add_pivot(s, m, weights_p, m_p, scale, FIXED: gl.constexpr):
    """Exponentials of a target's scores plus the pivot's; the target's maximum, never below the pivot's."""
    e_p = weights_p.to(gl.float32)
    if FIXED:
        return _exp(s, m, scale, FIXED) + e_p, m
    else:
        m = gl.maximum(_raise(m, s, scale, FIXED), m_p)
        return _exp(s, m, scale, FIXED) + e_p * gl.exp2(m_p - m)[:, None], m


@gluon.jit
def _target(
    q, q_empty, no_scores, acc, ring, slot, parity, begin, end, len_k, scale,
    FIXED: gl.constexpr, EVEN_K: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """A target on its pivot: results as in `_row`.

    A step is two halves: the pivot's keys, then the target's own. The pivot's exponentials wait for the
    target's in 16 bits: in 32 they would not fit into the registers.
    """
    dtype: gl.constexpr = ring[0].dtype
    s_p, use = _first_scores(q, no_scores, ring, slot, parity, end, len_k, EVEN_K, BLOCK_N)
    m_p = _first_maximum(s_p, scale, FIXED)
    weights_p, _ = _weigh(_exp(s_p, m_p, scale, FIXED), dtype)

    s, use = _first_scores(q, no_scores, ring, use[0], use[1], end, len_k, EVEN_K, BLOCK_N)
    e, m = _add_pivot(s, m_p, weights_p, m_p, scale, FIXED)
    weights, total = _weigh(e, dtype)
    slot, parity = use

    for _ in range(1, end - begin):
        s_p, k_slot, use = _start_scores(q, no_scores, ring, slot, parity)
        acc, v_slot, use = _start_values(weights, acc, ring, use[0], use[1])
        s_p = warpgroup_mma_wait(1, [s_p])
        _release(ring, k_slot)
        m_p = _raise(m, s_p, scale, FIXED)
        weights_p, _ = _weigh(_exp(s_p, m_p, scale, FIXED), dtype)
        acc = warpgroup_mma_wait(0, [acc])
        _release(ring, v_slot)

        s, k_slot, use = _start_scores(q, no_scores, ring, use[0], use[1])
        slot, parity = use
        s = warpgroup_mma_wait(0, [s])
        _release(ring, k_slot)
        m_old = m
        e, m = _add_pivot(s, m_p, weights_p, m_p, scale, FIXED)
        weights, sums = _weigh(e, dtype)
        acc, total = _carry(acc, total, sums, m_old, m, FIXED)

    acc, use = _last_values(q_empty, weights, acc, ring, slot, parity)
    return acc, m, total, use


@gluon.jit
def _pair(
    q, q_empty, no_scores, acc, ring, slot, parity, begin, end, len_k, scale,
    FIXED: gl.constexpr, EVEN_K: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """A pivot with its first target: results of the target as in `_row`, then the pivot's.

    Every half step runs one product of scores beside one of values: the pivot's scores with the target's
    values, then the target's scores with the pivot's values. The pivot's exponentials reach the target in 16
    bits, as they weigh the pivot's values: in 32 they would not fit into the registers.
    """
    dtype: gl.constexpr = ring[0].dtype
    s_p, use = _first_scores(q, no_scores, ring, slot, parity, end, len_k, EVEN_K, BLOCK_N)
    m_p = _first_maximum(s_p, scale, FIXED)
    weights_p, total_p = _weigh(_exp(s_p, m_p, scale, FIXED), dtype)

    s, k_slot, use = _start_scores(q, no_scores, ring, use[0], use[1])
    acc_p, v_slot, use = _start_values(weights_p, acc, ring, use[0], use[1])
    s = warpgroup_mma_wait(1, [s])
    _release(ring, k_slot)
    s = _mask(s, end - 1, len_k, EVEN_K, BLOCK_N)
    e, m = _add_pivot(s, m_p, weights_p, m_p, scale, FIXED)
    weights, total = _weigh(e, dtype)
    acc_p = warpgroup_mma_wait(0, [acc_p])
    _release(ring, v_slot)
    slot, parity = use

    for _ in range(1, end - begin):
        s_p, k_slot, use = _start_scores(q, no_scores, ring, slot, parity)
        acc, v_slot, use = _start_values(weights, acc, ring, use[0], use[1])
        s_p = warpgroup_mma_wait(1, [s_p])
        _release(ring, k_slot)
        m_old = m_p
        m_p = _raise(m_p, s_p, scale, FIXED)
        weights_p, sums = _weigh(_exp(s_p, m_p, scale, FIXED), dtype)
        acc_p, total_p = _carry(acc_p, total_p, sums, m_old, m_p, FIXED)
        acc = warpgroup_mma_wait(0, [acc])
        _release(ring, v_slot)

        s, k_slot, use = _start_scores(q, no_scores, ring, use[0], use[1])
        acc_p, v_slot, use = _start_values(weights_p, acc_p, ring, use[0], use[1])
        slot, parity = use
        s = warpgroup_mma_wait(1, [s])
        _release(ring, k_slot)
        m_old = m
        e, m = _add_pivot(s, m, weights_p, m_p, scale, FIXED)
        weights, sums = _weigh(e, dtype)
        acc, total = _carry(acc, total, sums, m_old, m, FIXED)
        acc_p = warpgroup_mma_wait(0, [acc_p])
        _release(ring, v_slot)

    acc, use = _last_values(q_empty, weights, acc, ring, slot, parity)
    return acc, m, total, acc_p, m_p, total_p, use


@gluon.jit
def _store(
    acc, m, total, results, plan, row, head, start_m, line, part_slot,
    HAS_BIAS: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Normalise and write 64 queries, or park them where they cover a part of the keys only."""
    len_q, _, num_heads, _, _, _ = plan
    VALUES: gl.constexpr = acc.type.layout
    lines = gl.arange(0, 64, gl.SliceLayout(1, VALUES))
    dims = gl.arange(0, D, gl.SliceLayout(0, VALUES))
    lse_2 = gl.convert_layout(m + gl.log2(total), gl.SliceLayout(1, VALUES))
    acc = _fade(acc, 1.0 / total)
    if part_slot >= 0:
        parked = part_slot.to(gl.int64) * BLOCK_M + line + lines
        gl.store(results.part_out + parked[:, None] * D + dims[None, :], acc)
        gl.store(results.part_lse + parked, lse_2)
    else:
        tokens = start_m + line + lines
        row_64 = row.to(gl.int64)
        if HAS_BIAS:
            bias = gl.load(results.value_bias + (row_64 * num_heads + head) * D + dims)
            acc += bias.to(gl.float32)[None, :]
        offsets = ((row_64 * len_q + tokens) * num_heads + head)[:, None] * D + dims[None, :]
        gl.store(results.out + offsets, acc.to(results.out.dtype.element_ty), mask=(tokens < len_q)[:, None])
        gl.store(
            results.lse + (row_64 * num_heads + head) * len_q + tokens, lse_2 * LN_2, mask=tokens < len_q
        )


@gluon.jit
def _consume(
    group, ring, queries, results, plan, jobs, scale,
    KIND: gl.constexpr, MAPPED: gl.constexpr, FIXED: gl.constexpr, EVEN_K: gl.constexpr,
    HAS_BIAS: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Warpgroup `group`: queries 64 * group .. of every tile of this program."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    VALUES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    q_tiles, q_full, q_empty = queries
    _, len_k, _, num_whole, _, num_items = plan
    slot = gl.to_tensor(0)
    parity = gl.to_tensor(0)
    q_parity = gl.to_tensor(0)
    no_scores = gl.zeros([64, BLOCK_N], gl.float32, SCORES)
    zeros = gl.zeros([64, D], gl.float32, VALUES)
    line = 64 * group
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        _, pivot_row, row, head, start_m, begin, end, part_slot = _find_work(
            item, plan, jobs, BLOCK_N, MAPPED
        )
        mbarrier.wait(q_full.index(group), q_parity)
        q_parity ^= 1
        q = q_tiles.index(group).reshape([64, D])
        if KIND == PAIR:
            acc, m, total, acc_p, m_p, total_p, use = _pair(
                q, q_empty.index(group), no_scores, zeros, ring, slot, parity, begin, end, len_k, scale,
                FIXED, EVEN_K, BLOCK_N,
            )  # fmt: skip
        if KIND == TARGET:
            acc, m, total, use = _target(
                q, q_empty.index(group), no_scores, zeros, ring, slot, parity, begin, end, len_k, scale,
                FIXED, EVEN_K, BLOCK_N,
            )  # fmt: skip
        if KIND == PLAIN:
            acc, m, total, use = _row(
                q, q_empty.index(group), no_scores, zeros, ring, slot, parity, begin, end, len_k, scale,
                FIXED, EVEN_K, BLOCK_N,
            )  # fmt: skip
        slot, parity = use
        if KIND == PAIR:
            _store(
                acc_p, m_p, total_p, results, plan, pivot_row, head, start_m, line,
                gl.where(part_slot < 0, part_slot, part_slot + num_items - num_whole),
                HAS_BIAS, D,
            )  # fmt: skip
        _store(
            acc, m, total, results, plan, row, head, start_m, line, part_slot,
            HAS_BIAS, D,
        )  # fmt: skip


@gluon.jit(do_not_specialize=["len_q", "len_k", "num_heads", "num_whole", "num_parts", "num_items"])
def forward_kernel(
    q_desc, k_desc, kp_desc, v_desc, results, jobs,
    len_q, len_k, num_heads, scale_log2, num_whole, num_parts, num_items,
    KIND: gl.constexpr, MAPPED: gl.constexpr, FIXED: gl.constexpr, HAS_BIAS: gl.constexpr,
    EVEN_K: gl.constexpr, NUM_SLOTS: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Persistent: one program a multiprocessor. See the module for who waits for whom."""
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_tiles = gl.allocate_shared_memory(q_desc.dtype, [NUM_GROUPS, 1, 1, 64, D], q_desc.layout)
    slots = gl.allocate_shared_memory(k_desc.dtype, [NUM_SLOTS, 1, 1, BLOCK_N, D], k_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [NUM_GROUPS, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [NUM_GROUPS, 1], BARRIER)
    full = gl.allocate_shared_memory(gl.int64, [NUM_SLOTS, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [NUM_SLOTS, 1], BARRIER)
    for i in gl.static_range(NUM_GROUPS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(NUM_SLOTS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=NUM_GROUPS)
    fence_async_shared()

    descs = (q_desc, k_desc, kp_desc, v_desc)
    ring = (slots, full, empty)
    queries = (q_tiles, q_full, q_empty)
    plan = (len_q, len_k, num_heads, num_whole, num_parts, num_items)
    # Written out: a tuple in a variable forgets what is constant.
    gl.warp_specialize(
        [
            (_consume, (0, ring, queries, results, plan, jobs, scale_log2, KIND, MAPPED, FIXED, EVEN_K,
                        HAS_BIAS, BLOCK_N, D)),
            (_consume, (1, ring, queries, results, plan, jobs, scale_log2, KIND, MAPPED, FIXED, EVEN_K,
                        HAS_BIAS, BLOCK_N, D)),
            (_produce, (descs, ring, queries, plan, jobs, KIND, MAPPED, BLOCK_N)),
        ],
        [4, 1], [240, 24],
    )  # fmt: skip


def with_layout(plain: tensor_descriptor.TensorDescriptor) -> TensorDescriptor:
    """A descriptor of `launch.descriptor_of`, with the layout that the tensor cores read."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return TensorDescriptor(plain.base, plain.shape, plain.strides, plain.block_shape, layout)
