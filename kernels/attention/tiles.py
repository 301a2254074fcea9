"""How each attention kernel is cut into tiles and laid over a GPU, as data: every row with its reason.

Nothing here imports triton, so the table can be read and tested anywhere.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch

PLAIN, TARGET, PAIR = "plain", "target", "pair"
"""What a program computes: a row by itself, a target on its pivot, or a pivot with its first target."""
LONGEST_FIRST = (PAIR, TARGET, PLAIN)
MATMULS = {PAIR: 4, TARGET: 3, PLAIN: 2}
"""L x L x D products of each form: the cost of its tiles."""
DKV, DQ = "dkv", "dq"
"""The kernels of the backward pass."""

TRITON, GLUON = "triton", "gluon"
"""What a kernel is written in: Triton, for every GPU, or Gluon, for Hopper and some versions of Triton."""

HOPPER, PORTABLE, INTERPRETER = "sm_90", "sm_80 and up", "interpreter"
"""Families of devices: Hopper; every other NVIDIA GPU from sm_80 on; a CPU, where Triton imitates one."""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """How one kernel is compiled."""

    block_m: int
    """Query tokens that a program holds (forward, dQ) or steps through (dK, dV)."""
    block_n: int
    """Key tokens that a program steps through (forward, dQ) or holds (dK, dV)."""
    num_warps: int
    num_stages: int
    """Depth of the software pipeline; in Gluon, tiles of keys or values that shared memory holds."""
    tma: bool = False
    """Tensor descriptors, Hopper's bulk copies, rather than pointers."""
    programs_per_sm: int = 1
    """How many fit on a multiprocessor at once; the end of the grid is planned by it."""
    max_parts: int = 8
    """How finely the last tiles of a forward grid may be split along the keys; 1: not at all."""
    language: str = TRITON
    """`TRITON` or `GLUON`. In Gluon block_m is 128, num_warps the 8 warps that compute."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One case of the table."""

    family: str
    kernel: str
    """A form (forward), `DKV` or `DQ`."""
    head_dim: int | None
    """None: any."""
    fixed: bool | None = None
    """Without or with running maximum; None: both."""
    tile: Tile
    reason: str
    """What was measured; or "untimed" (right on an H100, not compared with others) or "untested" (never run
    on such a GPU), and what speaks for it."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """What the choice depends on."""

    family: str
    num_sms: int


@dataclass(frozen=True, kw_only=True)
class Tail:
    """Which of the last tiles are split along the keys, so that no multiprocessor waits for another."""

    num_whole: int
    """Tiles before them, computed whole."""
    num_parts: int = 1
    """Parts of each of the others."""
    num_slots: int = 0
    """Parts in all."""


TABLE: tuple[Row, ...] = (
    Row(
        family=HOPPER, kernel=PLAIN, head_dim=128,
        tile=Tile(block_m=128, block_n=128, num_warps=8, num_stages=6, tma=True, language=GLUON),
        reason="H100, 24 heads: 0.398 ms at L 4608, 0.060 at 1536, running maximum 0.430 and 0.063",
    ),
    Row(
        family=HOPPER, kernel=TARGET, head_dim=128,
        tile=Tile(block_m=128, block_n=128, num_warps=8, num_stages=6, tma=True, language=GLUON),
        reason="H100, 24 heads, six targets: 3.58 ms at L 4608, 0.448 at 1536, running maximum 4.18 and "
        "0.514; block_n 64 4.05 and 0.492",
    ),
    Row(
        family=HOPPER, kernel=PAIR, head_dim=128,
        tile=Tile(block_m=128, block_n=64, num_warps=8, num_stages=12, tma=True, language=GLUON),
        reason="H100, 24 heads: 0.837 ms at L 4608, 0.115 at 1536, running maximum 1.076 and 0.139; block_n "
        "128 does not fit into the registers",
    ),
    Row(
        family=HOPPER, kernel=PLAIN, head_dim=64,
        tile=Tile(block_m=128, block_n=128, num_warps=8, num_stages=12, tma=True, language=GLUON),
        reason="H100, 48 heads, L 4608: 0.594 ms, running maximum 0.598; block_n 64 0.604 and 0.686",
    ),
    Row(
        family=HOPPER, kernel=TARGET, head_dim=64,
        tile=Tile(block_m=128, block_n=128, num_warps=8, num_stages=12, tma=True, language=GLUON),
        reason="H100, 48 heads, L 4608, two targets: 1.97 ms, running maximum 2.12; block_n 64 1.94 and 2.38",
    ),
    Row(
        family=HOPPER, kernel=PAIR, head_dim=64,
        tile=Tile(block_m=128, block_n=128, num_warps=8, num_stages=12, tma=True, language=GLUON),
        reason="H100, 48 heads, L 4608: 1.24 ms, running maximum 1.32; block_n 64 1.23 and 1.45",
    ),
    Row(
        family=HOPPER, kernel=PLAIN, head_dim=128, fixed=True,
        tile=Tile(block_m=64, block_n=64, num_warps=4, num_stages=3, tma=True, programs_per_sm=2),
        reason="H100, 24 heads: 0.462 ms at L 4608, 0.064 at 1536",
    ),
    Row(
        family=HOPPER, kernel=PLAIN, head_dim=128, fixed=False,
        tile=Tile(block_m=128, block_n=128, num_warps=8, num_stages=3, tma=True),
        reason="H100, 24 heads: 0.534 ms at L 4608, 0.080 at 1536",
    ),
    Row(
        family=HOPPER, kernel=TARGET, head_dim=128,
        tile=Tile(block_m=128, block_n=64, num_warps=8, num_stages=4, tma=True),
        reason="H100, 24 heads: 0.810 ms at L 4608, 0.110 at 1536; running maximum: 0.901 and 0.119",
    ),
    Row(
        family=HOPPER, kernel=PAIR, head_dim=128,
        tile=Tile(block_m=128, block_n=64, num_warps=8, num_stages=3, tma=True),
        reason="H100, 24 heads: 1.178 ms at L 4608, 0.149 at 1536; running maximum: 1.341 and 0.166; a "
        "fourth stage exceeds shared memory",
    ),
    Row(
        family=HOPPER, kernel=PLAIN, head_dim=64,
        tile=Tile(block_m=128, block_n=64, num_warps=8, num_stages=3, tma=True, programs_per_sm=2),
        reason="untimed; compiled for sm_90: 106 registers, 64 KiB",
    ),
    Row(
        family=HOPPER, kernel=TARGET, head_dim=64,
        tile=Tile(block_m=128, block_n=64, num_warps=8, num_stages=3, tma=True),
        reason="untimed; as for pairs",
    ),
    Row(
        family=HOPPER, kernel=PAIR, head_dim=64,
        tile=Tile(block_m=128, block_n=64, num_warps=8, num_stages=3, tma=True),
        reason="untimed; compiled for sm_90: 169 registers, 112 KiB",
    ),
    Row(
        family=HOPPER, kernel=DKV, head_dim=None,
        tile=Tile(block_m=32, block_n=64, num_warps=8, num_stages=2, tma=True),
        reason="untimed; compiled for sm_90: 223 registers grounded, no spills; block_m 64 spills",
    ),
    Row(
        family=HOPPER, kernel=DQ, head_dim=None,
        tile=Tile(block_m=128, block_n=64, num_warps=8, num_stages=2, tma=True),
        reason="untimed; compiled for sm_90: 182 registers grounded, 160 KiB, no spills",
    ),
    # At most 99 KiB, which every GPU from sm_80 on has, and hardly a spill when compiled for sm_80.
    Row(
        family=PORTABLE, kernel=PLAIN, head_dim=None,
        tile=Tile(block_m=128, block_n=64, num_warps=8, num_stages=3),
        reason="untested; compiled for sm_80: 213 registers, 96 KiB; 4 warps spill",
    ),
    Row(
        family=PORTABLE, kernel=TARGET, head_dim=None,
        tile=Tile(block_m=64, block_n=32, num_warps=4, num_stages=2),
        reason="untested; compiled for sm_80: 250 registers, 45 KiB",
    ),
    Row(
        family=PORTABLE, kernel=PAIR, head_dim=None,
        tile=Tile(block_m=64, block_n=32, num_warps=4, num_stages=2),
        reason="untested; compiled for sm_80: 255 registers, 48 bytes spilled, 53 KiB; block_n 64 spills 200",
    ),
    Row(
        family=PORTABLE, kernel=DKV, head_dim=None,
        tile=Tile(block_m=32, block_n=32, num_warps=4, num_stages=2),
        reason="untested; compiled for sm_80: 228 registers grounded, 42 KiB; block_n 64 spills",
    ),
    Row(
        family=PORTABLE, kernel=DQ, head_dim=None,
        tile=Tile(block_m=32, block_n=32, num_warps=4, num_stages=2),
        reason="untested; compiled for sm_80: 220 registers grounded, 42 KiB; block_m 64 spills",
    ),
    *(
        Row(
            family=INTERPRETER, kernel=kernel, head_dim=None,
            tile=Tile(block_m=16, block_n=16, num_warps=1, num_stages=1),
            reason="the smallest that tl.dot takes: short toy sequences still have several tiles",
        )
        for kernel in (PLAIN, TARGET, PAIR, DKV, DQ)
    ),
)  # fmt: skip


def device(of: torch.device) -> Device:
    """The device a tensor lies on, as far as tiles depend on it. A CPU stands for Triton's interpreter."""
    if of.type != "cuda":
        # Few enough that toy grids have a tail which is worth splitting.
        return Device(family=INTERPRETER, num_sms=3)
    return _cuda_device(of.index if of.index is not None else torch.cuda.current_device())


@functools.cache
def _cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    # AMD counts in other numbers: an MI300 is a 9.4.
    family = HOPPER if properties.major == 9 and torch.version.hip is None else PORTABLE
    return Device(family=family, num_sms=properties.multi_processor_count)


def forward_tile(
    of: Device, forms: Sequence[str], head_dim: int, fixed: bool, language: str = TRITON
) -> Tile:
    """The tile of a launch: that of its longest form, which is the one that needs most."""
    longest = next(form for form in LONGEST_FIRST if form in forms)
    return _find(of.family, longest, head_dim, fixed, language)


def backward_tile(of: Device, kernel: str, head_dim: int) -> Tile:
    """kernel: `DKV` or `DQ`."""
    return _find(of.family, kernel, head_dim, False, TRITON)


def _find(family: str, kernel: str, head_dim: int, fixed: bool, language: str) -> Tile:
    for row in TABLE:
        if (
            row.family == family
            and row.kernel == kernel
            and row.head_dim in (None, head_dim)
            and row.fixed in (None, fixed)
            and row.tile.language == language
        ):
            return row.tile
    raise ValueError(f"no {language} tile for {kernel}, head dim {head_dim}, on {family}: see tiles.TABLE")


MAX_WAVES = 12
"""Grids longer than this have little to lose at their end."""
PART_OVERHEAD, MERGE_OVERHEAD = 2, 4
"""Cost, in steps over one block of keys, of starting and storing a part, and of joining parts. Estimates."""


@functools.lru_cache(maxsize=256)
def plan_tail(
    tiles: tuple[tuple[int, int], ...], num_programs: int, num_blocks: int, max_parts: int = 8
) -> Tail:
    """Which of a launch's last tiles to split, and into how many parts.

    tiles: (how many, cost of one step), longest first. num_programs: how many the GPU runs at once.
    num_blocks: steps of a whole tile. max_parts: see `Tile`. The GPU hands tiles out in order, so their
    finish can be simulated; a split must gain at least 3 %.
    """
    costs = [cost * num_blocks for count, cost in tiles for _ in range(count)]
    whole = Tail(num_whole=len(costs))
    if min(num_blocks, max_parts) < 2 or not costs or len(costs) > MAX_WAVES * num_programs:
        return whole
    step = tiles[-1][1]
    best, shortest = whole, 0.97 * _makespan(costs, num_programs)
    loose = len(costs) % num_programs
    for num_split in sorted({loose, min(len(costs), loose + num_programs)} - {0}):
        kept = costs[: len(costs) - num_split]
        for parts in range(2, min(max_parts, num_blocks) + 1):
            split = costs[len(kept) :]
            pieces = [cost / parts + step * PART_OVERHEAD for cost in split for _ in range(parts)]
            span = _makespan(kept + pieces, num_programs) + step * MERGE_OVERHEAD
            if span < shortest:
                shortest = span
                best = Tail(num_whole=len(kept), num_parts=parts, num_slots=num_split * parts)
    return best


def _makespan(costs: Sequence[float], num_programs: int) -> float:
    """When the last of these pieces of work ends, if the first free program takes the next one."""
    ends = [0.0] * num_programs
    for cost in costs:
        heapq.heapreplace(ends, ends[0] + cost)
    return max(ends)
