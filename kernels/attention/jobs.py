"""What a launch of the attention kernels computes: jobs, and how they are handed over."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from . import tiles, triton_fwd

JOBS_PER_LAUNCH = 8


@dataclass(frozen=True, kw_only=True)
class Job:
    """One row of output, or the two of a pair."""

    form: str
    """`tiles.PLAIN`, `tiles.TARGET` or `tiles.PAIR`."""
    q_row: int
    """Row of q."""
    pivot_row: int
    """Row of k_pivot; for a pair, the pivot's row of v, out and lse too."""
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


def chunks(jobs: Sequence[Job]) -> list[Sequence[Job]]:
    """Jobs, longest first, in as few launches of nearly equal size as their number allows."""
    ordered = sorted(jobs, key=lambda job: -tiles.MATMULS[job.form])
    total, launches = len(ordered), -(-len(ordered) // JOBS_PER_LAUNCH)
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


def split_pairs(jobs: Sequence[Job]) -> tuple[list[Job], list[Job]]:
    """Plain rows and targets; a pair is one of each."""
    plain = [job for job in jobs if job.form == tiles.PLAIN]
    targets = [job for job in jobs if job.form == tiles.TARGET]
    for job in jobs:
        if job.form == tiles.PAIR:
            p = job.pivot_row
            plain.append(Job(form=tiles.PLAIN, q_row=job.q_row, pivot_row=p, row=p))
            targets.append(Job(form=tiles.TARGET, q_row=job.q_row, pivot_row=p, row=job.row))
    return plain, targets


def rounds(targets: Sequence[Job]) -> list[list[Job]]:
    """The first target of every pivot, then the second ones, and so on: within a round no two share sums."""
    turns: list[list[Job]] = []
    seen: dict[int, int] = {}
    for job in targets:
        turn = seen[job.q_row] = seen.get(job.q_row, -1) + 1
        if turn == len(turns):
            turns.append([])
        turns[turn].append(job)
    return turns
