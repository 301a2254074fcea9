"""How far full-size FLUX.1-dev with the bokeh adapter strays from its float32 result in bfloat16.

    python -m benchmarks.full_size_error [--out benchmarks/results]
    python -m benchmarks.full_size_error --tiny

Ours, eager (the arm that reproduces the published rounding), beside the published formulation on diffusers:
one velocity each on the same random weights and inputs, unbounded and as a pair, at two noise levels; both
against ours in float32 with the written-out reference attention. Passes when our error is at most the
published one's plus 5 % in every case. Nothing is timed: `bench_step` does that, and checks every arm. Needs
diffusers. Writes full_size_error.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks import networks, rivals
from benchmarks.arms import best_stock_attention
from benchmarks.bench_step import LEVELS
from benchmarks.networks import FULL, TINY, Batch, Setting
from benchmarks.report import RESULTS, Row, chosen_device, table
from benchmarks.timing import environment
from bokehflux.weights.files.write import write_json

SIGMAS = (0.9, 0.3)
"""Exact in bfloat16, times 1000 too: the arms get what the reference gets."""
KINDS = ("one row", "pair")
COLUMNS = {"case": "s", "error": ".3e", "published": ".3e", "ratio": ".3f", "verdict": "s"}


def batches(setting: Setting, device: torch.device, seed: int) -> Iterator[tuple[str, Batch]]:
    for side in setting.sides_px:
        for sigma in SIGMAS:
            for kind in KINDS:
                batch = networks.draw_batch(setting, side, LEVELS[kind], device, seed)
                yield f"{kind}, {side} px, sigma {sigma}", dataclasses.replace(batch, sigma=sigma)


@torch.inference_mode()
def run(setting: Setting, device: torch.device, seed: int = 0, limit: float = 1.05) -> Iterator[Row]:
    """A row a case. limit: largest passing ratio of our error to the published one's."""
    with torch.inference_mode(False):
        mmdit = networks.build_mmdit(setting, device, seed)
        wide, published = networks.widened(mmdit), rivals.published_model(mmdit, compile=False)
    for name, batch in batches(setting, device, seed):
        exact = networks.exact(wide, batch)
        error = networks.relative_error(networks.our_step(mmdit, batch)(), batch, exact)
        other = networks.relative_error(rivals.published_step(published, batch)(), batch, exact)
        verdict = "pass" if error <= limit * other else "FAIL"  # FAIL for NaN
        yield {"case": name, "error": error, "published": other, "ratio": error / other, "verdict": verdict}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--tiny", action="store_true", help="a toy on any machine, within twice")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    device = chosen_device(parser, tiny=args.tiny)
    found = environment(device)
    print(", ".join(f"{key} {value}" for key, value in found.items()))
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"full_size_error{'_tiny' if args.tiny else ''}.json"
    setting, limit = (TINY, 2.0) if args.tiny else (FULL, 1.05)
    rows: list[Row] = []
    with best_stock_attention():
        for row in run(setting, device, args.seed, limit):
            rows.append(row)
            write_json(path, {"environment": found, "rows": rows, "seed": args.seed, "limit": limit})
    print(table(rows, COLUMNS))
    return 0 if all(row["verdict"] == "pass" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
