"""Which block shapes each attention kernel runs with, as data: one row a case, each with its reason.

Nothing here imports triton, so the table can be read, printed and tested anywhere.
"""

from __future__ import annotations

import functools
import heapq
from dataclasses import dataclass

PLAIN, TARGET, PAIR = "plain", "target", "pair"
"""What one program computes: a row by itself, a target on its pivot, or a pivot with its first target."""
MATMULS = {PLAIN: 2, TARGET: 3, PAIR: 4}
"""L x L x D products a tile of each form takes: its cost."""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """How one kernel is compiled."""

    block_m: int
    """Query tokens a program holds (forward and dQ) or steps through (dK, dV)."""
    block_n: int
    """Key tokens a program steps through (forward and dQ) or holds (dK, dV)."""
    num_warps: int
    num_stages: int
    """Depth of the software pipeline over the stepped-through tokens."""
    tma: bool = False
    """Tensor descriptors (Hopper's bulk copies) rather than pointers."""
    programs_per_sm: int = 1
    """How many fit on one multiprocessor at once; the tail of the grid is planned by it."""
    reason: str
    """What was measured, or "untested"."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """What the choice depends on. `family` None is Triton's interpreter on a CPU."""

    family: str | None
    num_sms: int


HOPPER, AMPERE, SMALL = "sm_90", "sm_80", "portable"
INTERPRETER = Device(family=None, num_sms=3)
"""Three pretended multiprocessors: few enough for toy grids to have a tail that is worth splitting."""

_TOY = Tile(block_m=16, block_n=16, num_warps=1, num_stages=1, reason="interpreter: smallest that tl.dot takes")

FORWARD: dict[tuple[str, str, int, bool], Tile] = {
    # (family, form, head dim, fixed offset)
    (HOPPER, PLAIN, 128, True): Tile(
        block_m=64, block_n=64, num_warps=4, num_stages=3, tma=True, programs_per_sm=2,
        reason="H200, 24 heads: 0.461 ms at L 4608 (566 TFLOP/s), 0.074 at 1536; 128x128 w8 s3: 0.484 at 4608",
    ),
    (HOPPER, PLAIN, 128, False): Tile(
        block_m=128, block_n=128, num_warps=8, num_stages=3, tma=True,
        reason="H200, 24 heads: 0.537 ms at L 4608 (485 TFLOP/s)",
    ),
    (HOPPER, TARGET, 128, True): Tile(
        block_m=128, block_n=64, num_warps=8, num_stages=4, tma=True,
        reason="H200, 24 heads: 0.745 ms at L 4608 (526 TFLOP/s); at 1536 s3 was best with 0.120",
    ),
    (HOPPER, TARGET, 128, False): Tile(
        block_m=128, block_n=64, num_warps=8, num_stages=4, tma=True,
        reason="H200, 24 heads: 0.911 ms at L 4608, 0.144 at 1536, tile as for the fixed offset",
    ),
    (HOPPER, PAIR, 128, True): Tile(
        block_m=128, block_n=64, num_warps=8, num_stages=3, tma=True,
        reason="H200, 24 heads: 1.155 ms at L 4608 (452 TFLOP/s), 0.181 at 1536; s4 exceeds shared memory",
    ),
    (HOPPER, PAIR, 128, False): Tile(
        block_m=128, block_n=64, num_warps=8, num_stages=3, tma=True,
        reason="H200, 24 heads: 1.29 ms at L 4608 (404 TFLOP/s), 0.197 at 1536",
    ),
}  # fmt: skip


def _both_softmaxes(family: str, form: str, head_dim: int, tile: Tile) -> None:
    for fixed in (False, True):
        FORWARD.setdefault((family, form, head_dim, fixed), tile)
