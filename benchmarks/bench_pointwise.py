"""The passes between matrix products: time, and the rate at which their bytes move, ours and eager.

    python -m benchmarks.bench_pointwise            # a GPU, FLUX.1's sizes; about a minute
    python -m benchmarks.bench_pointwise --tiny     # toys, on any machine, Triton's interpreter without a GPU

Bytes are those that must be read or written once. Inputs rotate through more than the cache.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.report import Row, chosen_device, table
from benchmarks.timing import environment, interleaved, num_sets

COLUMNS = {"pass": "s", "tokens": "d", "ours_us": ".1f", "tb_s": ".2f", "eager_us": ".1f", "speedup": ".1f"}


def inputs(rows: int, length: int, width: int, dim: int, device: torch.device, dtype: torch.dtype) -> dict:
    """Arguments of every pass, as a single block has them: q, k, v and the MLP's half in one projection."""
    from bokehflux.kernels.pointwise.reference import Projected

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.float32).to(dtype)

    x, y = draw(rows, length, width), draw(rows, length, width)
    q, k, v, hidden = draw(rows, length, 7 * width).split([width, width, width, 4 * width], dim=-1)
    gate, scale, shift = draw(1, 1, 3 * width).chunk(3, dim=-1)
    weights = 1 + 0.1 * draw(dim), 1 + 0.1 * draw(dim)
    angle = torch.rand(length, dim // 2, device=device)
    text = length // 3
    parts = [
        Projected(*(t[:, rows_] for t in (q, k, v)), *weights) for rows_ in (slice(text), slice(text, None))
    ]
    return {
        "modulate": (x, scale, shift),
        "add_gated": (x, y, gate),
        "add_gated_modulate": (x, y, gate, scale, shift),
        "joint_heads (single)": ([Projected(q, k, v, *weights)], angle.cos(), angle.sin()),
        "joint_heads (double)": (parts, angle.cos(), angle.sin()),
        "concat_gelu": (x, hidden),
    }


MOVED = {
    "modulate": 2, "add_gated": 3, "add_gated_modulate": 4, "joint_heads (single)": 4,
    "joint_heads (double)": 6, "concat_gelu": 10,
}  # fmt: skip
"""Numbers that a token moves, in widths."""


def measure(
    sizes: Sequence[tuple[int, int]], width: int, dim: int, device: torch.device, dtype: torch.dtype
) -> list[Row]:
    from bokehflux.kernels.pointwise import ops, reference

    found: list[Row] = []
    for rows, length in sizes:
        moved = rows * length * width * dtype.itemsize
        sets = [inputs(rows, length, width, dim, device, dtype) for _ in range(num_sets(12 * moved, device))]
        for name, widths in MOVED.items():

            def arm(module: object, name: str = name, sets: list[dict] = sets) -> Callable[[int], object]:
                function = getattr(module, name.split()[0])
                return lambda i: function(*sets[i][name])

            with torch.inference_mode():
                times = interleaved({"ours": arm(ops), "eager": arm(reference)}, len(sets), device)
            ours, other = times["ours"].median, times["eager"].median
            found.append(
                {
                    "pass": name, "tokens": rows * length, "ours_us": 1000 * ours, "eager_us": 1000 * other,
                    "tb_s": widths * moved / ours / 1e9, "speedup": other / ours,
                }
            )  # fmt: skip
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="toys, on any machine")
    args = parser.parse_args(argv)
    device = chosen_device(parser, tiny=args.tiny)
    print(", ".join(f"{key} {value}" for key, value in environment(device).items()))
    if args.tiny:
        rows = measure([(2, 6)], 64, 16, device, torch.float16)
    else:
        rows = measure([(1, 1536), (1, 4608), (7, 1536)], 3072, 128, device, torch.bfloat16)
    print(table(rows, COLUMNS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
