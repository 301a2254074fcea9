"""Block shapes for our attention kernels: what the rows of `kernels.attention.tiles` should say.

    python -m benchmarks.sweep_tiles [--shapes grounded-6-4608] [--seconds 500]
    python -m benchmarks.sweep_tiles --tiny

Those of Triton, on Hopper those of Gluon too. Every candidate that compiles and is right is timed as a CUDA
graph, candidates in turns. Prints the fastest and writes attention_tiles.json, again after every shape.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.bench_attention import WANTED, Inputs, draw, exact
from benchmarks.report import RESULTS, Budget, Row, chosen_device, first_line, pick
from benchmarks.shapes import ATTENTION, TOYS, AttentionShape
from benchmarks.timing import environment, interleaved, num_sets
from bokehflux.kernels.attention import tiles
from bokehflux.weights.write import write_json


def sweep(shape: AttentionShape, device: torch.device, dtype: torch.dtype, repeats: int) -> list[Row]:
    """Every candidate tile of a shape's longest form that compiles and is right, fastest first."""
    from bokehflux.kernels.attention import launch  # imports triton
    from bokehflux.kernels.attention.jobs import grounded_jobs, target_jobs

    n = shape.num_targets
    form = {"plain": tiles.PLAIN, "target": tiles.TARGET, "grounded": tiles.PAIR}[shape.form]
    jobs = {
        tiles.PLAIN: None,
        tiles.TARGET: target_jobs((0,) * n),
        tiles.PAIR: grounded_jobs((n,) * (n + 1)),
    }[form]
    count = num_sets(draw(shape, device, dtype).num_bytes, device)
    sets = [draw(shape, device, dtype) for _ in range(count)]

    def run(x: Inputs, fixed: bool, tile: tiles.Tile) -> Tensor:
        k, k_pivot, v = (x.k[:n], x.k[n:], x.v[:n]) if form == tiles.TARGET else (x.k, None, x.v)
        return launch.forward(x.q, k, k_pivot, v, None, jobs, fixed=fixed, tile=tile)[0]

    on_hopper = tiles.device(device).family == tiles.HOPPER
    languages = (tiles.TRITON, tiles.GLUON) if on_hopper else (tiles.TRITON,)
    rows = []
    for fixed in (True, False):
        true = exact(shape, sets[0], [0])
        usual = [
            tiles.forward_tile(tiles.device(device), [form], shape.head_dim, fixed, language)
            for language in languages
        ]
        calls = {}
        for tile in dict.fromkeys([*usual, *candidates(tiles.device(device), form, shape.head_dim)]):
            try:
                out = run(sets[0], fixed, tile)[:, :, :1].float()
            except Exception as error:  # of Triton's compiler: what does not fit is no candidate
                print(f"    {describe(tile)}: {first_line(error)}")
                continue
            if not (out - true).norm() <= 0.02 * true.norm():
                print(f"    {describe(tile)}: WRONG")
                continue
            calls[tile] = lambda i, fixed=fixed, tile=tile: run(sets[i], fixed, tile)
        timings = interleaved({describe(t): call for t, call in calls.items()}, count, device, repeats)
        for tile in calls:
            rows.append(
                {
                    "shape": shape.name,
                    "fixed": fixed,
                    "tile": dataclasses.asdict(tile),
                    "in_table": tile in usual,
                    "ms": timings[describe(tile)].median,
                }
            )
    rows.sort(key=lambda row: (not row["fixed"], row["ms"]))
    for fixed in (True, False):
        print(f"  {shape.name}, {'fixed offset' if fixed else 'running maximum'}")
        for row in [r for r in rows if r["fixed"] == fixed][:8]:
            star = " <- table" if row["in_table"] else ""
            print(f"    {row['ms']:.3f} ms  {describe(tiles.Tile(**row['tile']))}{star}", flush=True)
    return rows


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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=None, help="parts of their names, in the order wanted")
    parser.add_argument("--repeats", type=int, default=10, help="measurements a tile")
    parser.add_argument("--seconds", type=float, default=500, help="begin no shape after this")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--tiny", action="store_true", help="toys, on any machine")
    args = parser.parse_args(argv)
    budget = Budget(args.seconds)
    device = chosen_device(parser, tiny=args.tiny)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    known = {shape.name: shape for shape in (TOYS if args.tiny else ATTENTION)}
    try:
        shapes = pick(known, args.shapes or ([""] if args.tiny else WANTED))
    except ValueError as error:
        parser.error(str(error))
    torch.manual_seed(0)
    found = environment(device)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"attention_tiles{'_tiny' if args.tiny else ''}.json"
    rows: list[Row] = []
    with torch.no_grad():
        for shape in shapes:
            if budget.spent:
                print(f"out of time before {shape.name}")
                break
            rows += sweep(shape, device, dtype, args.repeats)
            write_json(path, {"environment": found, "rows": rows})
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
