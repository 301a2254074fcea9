"""The passes between matrix products: time, and the rate at which their bytes move, ours and eager.

Bytes are those that must be read or written once. Inputs rotate through more than the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.registry import Benchmark, Session, by_case
from benchmarks.timing import Arm, Row, Rules, num_sets, race, relative_error

MOVED = {
    "modulate": 2, "add_gated": 3, "add_gated_modulate": 4, "joint_heads (single)": 4,
    "joint_heads (double)": 6, "concat_gelu": 10,
}  # fmt: skip
"""Numbers that a token moves, in widths, by pass."""
SIZES, TOYS = ((1, 1536), (1, 4608), (7, 1536)), ((2, 6),)
"""Rows and tokens."""
ARMS = ("ours", "eager")
Arguments = dict[str, tuple]


def inputs(session: Session, rows: int, length: int, width: int, dim: int) -> Arguments:
    """Arguments of every pass, as a single block has them: q, k, v and the MLP's half in one projection."""
    from bokehflux.kernels.pointwise.interface import Projected

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=session.device, dtype=torch.float32).to(session.half)

    x, y = draw(rows, length, width), draw(rows, length, width)
    q, k, v, hidden = draw(rows, length, 7 * width).split([width, width, width, 4 * width], dim=-1)
    gate, scale, shift = draw(1, 1, 3 * width).chunk(3, dim=-1)
    weights = 1 + 0.1 * draw(dim), 1 + 0.1 * draw(dim)
    angle = torch.rand(length, dim // 2, device=session.device)
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


def flat(result: object) -> Tensor:
    """Every number of a pass's result."""
    tensors = [result] if isinstance(result, Tensor) else list(result)  # type: ignore[call-overload]
    return torch.cat([tensor.float().flatten() for tensor in tensors])


def widened(arguments: object) -> object:
    """The same numbers in float32."""
    if isinstance(arguments, Tensor):
        return arguments.float()
    found = [widened(argument) for argument in arguments]  # type: ignore[attr-defined]
    return type(arguments)(*found) if hasattr(arguments, "_fields") else type(arguments)(found)


@torch.inference_mode()
def measure_pass(session: Session, case: tuple[int, int, str]) -> list[Row]:
    """A row an arm."""
    from bokehflux.kernels.pointwise import ops, reference

    width, dim = (64, 16) if session.tiny else (3072, 128)
    num_rows, length, name = case
    function, moved = name.split()[0], num_rows * length * width * session.half.itemsize
    count = num_sets(12 * moved, session.device)
    sets = [inputs(session, num_rows, length, width, dim) for _ in range(count)]
    true = flat(getattr(reference, function)(*widened(sets[0][name])))
    arms = [
        Arm(
            name=arm,
            call=lambda i, module=module: getattr(module, function)(*sets[i][name]),
            error=lambda out: relative_error(flat(out), true),
            is_ours=arm == "ours",
        )
        for arm, module in zip(ARMS, (ops, reference), strict=True)
    ]
    rows = race(arms, Rules.of(arms), session.replayed(len(sets)))
    for row in rows:
        if "ms" in row:
            row |= {"us": 1000 * row["ms"], "tb_s": MOVED[name] * moved / row["ms"] / 1e9}
    return rows


BENCHMARK = Benchmark(
    question="the passes between matrix products (norms, gates, rotations, GELU): time and TB/s",
    checked="results against eager in float32: at most twice the error of eager in the same dtype",
    cases=lambda tiny: {
        f"{name}, {rows} x {length}": (rows, length, name)
        for rows, length in (TOYS if tiny else SIZES)
        for name in MOVED
    },
    arms=ARMS,
    repeats=30,
    columns="case arm us tb_s speedup error verdict",
    bars=("case", "arm", "us", "us"),
    measure=by_case(measure_pass),
)
