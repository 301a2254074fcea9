"""Block shapes for our attention kernels: what the rows of `kernels.attention.tiles` should say.

Those of Triton, on Hopper those of Gluon too, for the longest form of work in a shape.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import torch

from benchmarks import shapes
from benchmarks.cases.attention import FORMS, draw_sets, exact, on_tile
from benchmarks.registry import Benchmark, Session, by_case
from benchmarks.shapes import AttentionShape
from benchmarks.timing import Arm, Row, Rules, race, relative_error
from bokehflux.kernels.attention import tiles

MAX_ERROR = 0.02


@torch.no_grad()
def measure_shape(session: Session, shape: AttentionShape) -> list[Row]:
    return [row for fixed in (True, False) for row in sweep(shape, session, fixed)]


def sweep(shape: AttentionShape, session: Session, fixed: bool) -> list[Row]:
    """A row for every candidate tile, fastest first. fixed: the softmax takes a fixed offset."""
    sets = draw_sets(shape, session)
    true, form, of = exact(shape, sets[0], [0]), FORMS[shape.form], tiles.device(session.device)
    languages = (tiles.TRITON, tiles.GLUON) if of.family == tiles.HOPPER else (tiles.TRITON,)
    usual = [tiles.forward_tile(of, [form], shape.head_dim, fixed, language) for language in languages]
    swept = {describe(tile): tile for tile in [*usual, *candidates(of, form, shape.head_dim)]}
    runs = {name: on_tile(shape, tile, fixed) for name, tile in swept.items()}
    arms = [
        Arm(
            name=name,
            call=lambda i, run=run: run(sets[i]),
            error=lambda out: relative_error(out[:, :, :1], true),
            is_ours=swept[name] in usual,
        )
        for name, run in runs.items()
    ]
    rows = race(arms, Rules(error_of=None, max_error=MAX_ERROR), session.replayed(len(sets)))
    for row in rows:
        row |= {"softmax": "fixed offset" if fixed else "running maximum", "in_table": row["ours"]}
        row["fields"] = dataclasses.asdict(swept[row["arm"]])
    return sorted(rows, key=lambda row: row.get("ms", float("inf")))


def candidates(device: tiles.Device, form: str, head_dim: int) -> Iterator[tiles.Tile]:
    """Tiles that may fit, by their shared memory."""
    if device.family == tiles.INTERPRETER:
        yield tiles.Tile(block_m=32, block_n=16, num_warps=1, num_stages=1)
        return
    tma, limit = (True, 227) if device.family == tiles.HOPPER else (False, 99)
    for m, n, warps, stages in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)):
        kib = (m + stages * tiles.MATMULS[form] * n) * head_dim * 2 / 1024
        too_many_accumulators = m == 128 and warps == 4 and form == tiles.PAIR
        if kib <= limit and not too_many_accumulators and (m, warps) != (64, 8):
            per_sm = 2 if warps == 4 and 2 * kib <= limit else 1
            for parts in (1, 8):
                yield tiles.Tile(
                    block_m=m, block_n=n, num_warps=warps, num_stages=stages, tma=tma,
                    programs_per_sm=per_sm, max_parts=parts,
                )  # fmt: skip
    if device.family == tiles.HOPPER:
        for n, slots in itertools.product((64, 128), (4, 5, 6, 8, 12, 16)):
            if (128 + slots * n) * head_dim * 2 / 1024 <= limit:
                yield tiles.Tile(
                    block_m=128, block_n=n, num_warps=8, num_stages=slots, tma=True, language=tiles.GLUON
                )


def describe(tile: tiles.Tile) -> str:
    return (
        f"{tile.language} {tile.block_m}x{tile.block_n} w{tile.num_warps} s{tile.num_stages} "
        f"{'descriptors' if tile.tma else 'pointers'} {tile.programs_per_sm}/SM parts<={tile.max_parts}"
    )


BENCHMARK = Benchmark(
    question="which block shapes our attention kernels should take",
    checked="outputs of one head against float32: a relative error of at most 0.02",
    cases=shapes.known,
    usual_cases=shapes.USUAL,
    repeats=10,
    repeated="measurements of a tile",
    columns="shape softmax arm ms in_table verdict",
    measure=by_case(measure_shape, "shape"),
)
