"""Attention, forward: our kernels beside PyTorch's, FlashAttention-3 and the published grounded formulation.

    python -m benchmarks.bench_attention [--seconds 200] [--shapes grounded plain-1] [--arms published triton]
    python -m benchmarks.bench_attention --tiny

Every arm's output is compared with float32 before it is timed; a wrong arm is named and not timed. Every
arm is replayed as a CUDA graph over inputs that fill the cache several times; arms take turns. Ours are the
backends of `kernels.attention.select` that are kernels of our own, each with the logits' bound known (a
fixed softmax offset) and without (a running maximum); `triton` takes Gluon where that runs, and plain
Triton is timed beside it. Prints a table and writes attention.json and .png, again after every shape.
`--tiny` runs toys anywhere (on a CPU in Triton's interpreter): its times mean nothing.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from benchmarks.arms import best_stock_attention
from benchmarks.report import RESULTS, Budget, Row, bars, chosen_device, first_line, pick, save, table
from benchmarks.shapes import ATTENTION, TOYS, AttentionShape
from benchmarks.timing import environment, gemm_ceiling, interleaved, num_sets
from bokehflux.kernels.attention import reference, select, tiles

WANTED = (
    "grounded-1-4608", "grounded-6-4608", "plain-1-4608",
    "grounded-1-1536", "grounded-6-1536", "plain-1-1536",
)  # fmt: skip
"""Without `--shapes`, most important first."""
LOGIT_BOUND = 9.5
"""What |q . k| / sqrt(D) stays below in these inputs: a fixed offset is allowed in either dtype."""
MAX_ERROR_RATIO = 2.0
"""Largest error that passes, as a multiple of a stock kernel's on the same inputs."""
CHECKED_HEADS = (0, 11, 23)
STOCK_BACKENDS = ("reference", "sdpa", "flash")
"""Names in `select.BACKENDS` that are not kernels of our own; those after the first are compared too."""
YARDSTICKS = ("cuDNN", "FA2", "flex", "sdpa", "published, cuDNN", "published, FA2", "published, sdpa")
"""`speedup` is over the fastest of these: PyTorch's own, for grounded shapes in the published formulation."""
COLUMNS = {
    "shape": "s", "arm": "s", "ms": ".3f", "speedup": ".2f", "tflops": ".0f",
    "share": ".0%", "error": ".2e", "verdict": "s",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """One set: the same numbers in the layouts that arms take, so that none pays for another's layout.

    Rows are targets, then (except for plain shapes) the pivot.
    """

    q: Tensor
    """[P, L, H, D]: the pivot's queries, or every row's for plain shapes."""
    k: Tensor
    """[B, L, H, D]"""
    v: Tensor
    stock: tuple[Tensor, Tensor, Tensor]
    """The same in contiguous [B, H, L, D]."""
    pairs: list[tuple[Tensor, Tensor, Tensor]]
    """q, k, v of each target and the pivot, [2, H, L, D]: the published batches; one query is unused."""
    pivot_rows: Tensor
    """(1, 1): for both rows of a pair, the row it is grounded on."""

    @property
    def num_bytes(self) -> int:
        return sum(x.nbytes for x in (self.q, self.k, self.v))


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to compute a shape."""

    name: str
    run: Callable[[Inputs], Any]
    num_products: int
    """L x L x D products it takes."""
    read: Callable[[Any], Tensor]
    """The result of `run` as [B, L, H, D], rows as in `Inputs`."""
    is_ours: bool = False


def draw(shape: AttentionShape, device: torch.device, dtype: torch.dtype) -> Inputs:
    """q and k as a QK-norm leaves them, v normal."""
    rows = shape.num_targets + (shape.form != "plain")
    rows_q = rows if shape.form == "plain" else 1
    dims = shape.length, shape.num_heads, shape.head_dim
    norm = (0.98 * LOGIT_BOUND * shape.head_dim**0.5) ** 0.5
    q, k, v = (torch.randn(n, *dims, device=device) for n in (rows_q, rows, rows))
    q, k, v = (
        (norm * F.normalize(q, dim=-1)).to(dtype),
        (norm * F.normalize(k, dim=-1)).to(dtype),
        v.to(dtype),
    )
    q_stock, k_stock, v_stock = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    pairs = []
    if shape.form == "grounded":
        for target in range(shape.num_targets):
            pair = [target, shape.num_targets]
            pairs.append((q_stock[[0, 0]], k_stock[pair], v_stock[pair]))
    pivot_rows = torch.tensor([1, 1], device=device)
    return Inputs(q=q, k=k, v=v, stock=(q_stock, k_stock, v_stock), pairs=pairs, pivot_rows=pivot_rows)


def exact(shape: AttentionShape, x: Inputs, heads: Sequence[int]) -> Tensor:
    """The float32 result of some heads; of target shapes the targets' rows alone."""
    result, n = [], shape.num_targets
    for head in heads:
        q, k, v = (t[:, :, head : head + 1].float() for t in (x.q, x.k, x.v))
        if shape.form == "plain":
            result.append(reference.attention(q, k, v))
        elif shape.form == "target":
            result.append(reference.target_attention(q, k[n:], k[:n], v[:n], [0] * n))
        else:
            result.append(reference.grounded_attention(q, k, v, [n] * (n + 1)))
    return torch.cat(result, dim=2)


# Arms.

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention in [B, H, L, D]."""


def stock_kernels(shape: AttentionShape, device: torch.device) -> list[tuple[str, Kernel]]:
    """PyTorch's attention by backend, FlexAttention, and FlashAttention-3 where a wheel is installed."""
    if device.type != "cuda":
        return [("sdpa", F.scaled_dot_product_attention)]
    found = [("cuDNN", pinned(SDPBackend.CUDNN_ATTENTION)), ("FA2", pinned(SDPBackend.FLASH_ATTENTION))]
    if shape.form == "plain":  # the published formulation does not use it, and it takes long to compile
        found.append(("flex", torch.compile(flex_attention, dynamic=False)))
    fa3 = find_fa3()
    return found if fa3 is None else [*found, ("FA3", fa3)]


def pinned(backend: SDPBackend) -> Kernel:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return attend


def find_fa3() -> Kernel | None:
    """From the wheel fa3-fwd or a build of flash-attention's `hopper` folder."""
    for name in ("fa3_fwd_interface", "flash_attn_interface"):
        try:
            attend = importlib.import_module(name).flash_attn_func
        except (ImportError, OSError) as error:  # not installed, or made for another PyTorch
            print(f"no {name}: {first_line(error)}")
            continue

        def in_its_layout(q: Tensor, k: Tensor, v: Tensor, attend: Callable[..., Any] = attend) -> Tensor:
            out = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        return in_its_layout
    return None


def published_pair(kernel: Kernel, x: Inputs, target: int) -> Tensor:
    """A target with the pivot, as published: queries swapped, keys concatenated, values doubled."""
    q, k, v = x.pairs[target]
    keys = torch.cat([k, k.index_select(0, x.pivot_rows)], dim=2)
    return kernel(q.index_select(0, x.pivot_rows), keys, torch.cat([v, v], dim=2))


def published_target(kernel: Kernel, x: Inputs, target: int) -> Tensor:
    """A target alone on keys of a stored pivot, concatenated."""
    q, k, v = x.stock
    own = slice(target, target + 1)
    return kernel(q, torch.cat([k[own], k[-1:]], dim=2), torch.cat([v[own], v[own]], dim=2))


def stock_arms(shape: AttentionShape, device: torch.device) -> list[Arm]:
    n = shape.num_targets
    arms = []
    for name, kernel in stock_kernels(shape, device):
        if shape.form == "plain":

            def run(x: Inputs, kernel: Kernel = kernel) -> Tensor:
                return kernel(*x.stock)

            arms.append(Arm(name=name, run=run, num_products=2 * n, read=lambda out: out.transpose(1, 2)))
        elif shape.form == "target":

            def run_targets(x: Inputs, kernel: Kernel = kernel) -> list[Tensor]:
                return [published_target(kernel, x, target) for target in range(n)]

            arms.append(
                Arm(
                    name=f"published, {name}",
                    run=run_targets,
                    num_products=4 * n,
                    read=lambda outs: torch.cat(outs).transpose(1, 2),
                )
            )
        else:

            def run_pairs(x: Inputs, kernel: Kernel = kernel) -> list[Tensor]:
                return [published_pair(kernel, x, target) for target in range(n)]

            arms.append(
                Arm(
                    name=f"published, {name}",
                    run=run_pairs,
                    num_products=8 * n,
                    read=lambda outs: torch.cat([*(out[:1] for out in outs), outs[0][1:]]).transpose(1, 2),
                )
            )
    return arms


def backend_arms(shape: AttentionShape) -> list[Arm]:
    """Backends of `select` by name: kernels of our own, and stock ones through two calls merged."""
    arms = []
    for name, found in select.BACKENDS.items():
        is_ours = name not in STOCK_BACKENDS
        if name == STOCK_BACKENDS[0] or (shape.form == "plain" and not is_ours):
            continue
        module = importlib.import_module(found, select.__package__) if isinstance(found, str) else found
        takes_bound = "logit_bound" in inspect.signature(module.attention).parameters
        if takes_bound:
            arms.append(our_arm(shape, name, module, is_ours, {"logit_bound": LOGIT_BOUND}))
        suffix = ", running maximum" if takes_bound else ", two calls merged"
        arms.append(our_arm(shape, name + suffix, module, is_ours, {}))
    return arms


def plain_triton_arms(shape: AttentionShape, device: torch.device) -> list[Arm]:
    """Our kernels in Triton, where the backend of that name would take those in Gluon."""
    from bokehflux.kernels.attention import launch  # imports triton
    from bokehflux.kernels.attention.jobs import grounded_jobs, target_jobs

    of = tiles.device(device)
    if select.why_not_gluon(device) is not None:
        return []
    n = shape.num_targets
    form, jobs = {
        "plain": (tiles.PLAIN, None),
        "target": (tiles.TARGET, target_jobs((0,) * n)),
        "grounded": (tiles.PAIR, grounded_jobs((n,) * (n + 1))),
    }[shape.form]

    def arm(name: str, fixed: bool) -> Arm:
        tile = tiles.forward_tile(of, [form], shape.head_dim, fixed, tiles.TRITON)

        def run(x: Inputs) -> Tensor:
            k, k_pivot, v = (x.k[:n], x.k[n:], x.v[:n]) if form == tiles.TARGET else (x.k, None, x.v)
            return launch.forward(x.q, k, k_pivot, v, None, jobs, fixed=fixed, tile=tile)[0]

        products = {"plain": 2 * n, "target": 3 * n, "grounded": 3 * n + 1}[shape.form]
        return Arm(name=name, run=run, num_products=products, read=lambda out: out, is_ours=True)

    return [arm("plain Triton", True), arm("plain Triton, running maximum", False)]


def our_arm(shape: AttentionShape, name: str, module: Any, is_ours: bool, options: dict[str, float]) -> Arm:
    n = shape.num_targets

    def run(x: Inputs) -> Tensor:
        if shape.form == "plain":
            return module.attention(x.q, x.k, x.v, **options)
        if shape.form == "target":
            return module.target_attention(x.q, x.k[n:], x.k[:n], x.v[:n], [0] * n, **options)
        return module.grounded_attention(x.q, x.k, x.v, [n] * (n + 1), **options)

    ours, merged = {"plain": (2 * n, 2 * n), "target": (3 * n, 4 * n), "grounded": (3 * n + 1, 4 * n + 2)}[
        shape.form
    ]
    return Arm(
        name=name, run=run, num_products=ours if is_ours else merged, read=lambda out: out, is_ours=is_ours
    )


# Measuring.


def errors(shape: AttentionShape, arms: Sequence[Arm], x: Inputs) -> dict[str, float | str]:
    """Each arm's relative error on some heads, or why it could not run."""
    heads = [head for head in CHECKED_HEADS if head < shape.num_heads]
    true = exact(shape, x, heads)
    found: dict[str, float | str] = {}
    for arm in arms:
        try:
            out = arm.read(arm.run(x))[:, :, heads].float()
        except Exception as error:  # of backends and compilers: one arm must not take the others with it
            found[arm.name] = f"failed: {first_line(error)}"
            continue
        found[arm.name] = ((out - true).norm() / true.norm()).item()
    return found


def measure(
    shape: AttentionShape,
    device: torch.device,
    dtype: torch.dtype,
    ceiling: float,
    repeats: int,
    wanted: Sequence[str] = ("",),
) -> list[Row]:
    """A row an arm, ours first; a wrong one is not timed."""
    torch._dynamo.reset()  # else FlexAttention runs into the limit of recompilations
    every = [*backend_arms(shape), *plain_triton_arms(shape, device), *stock_arms(shape, device)]
    every.sort(key=lambda arm: not arm.is_ours)
    arms = [arm for arm in every if any(part in arm.name for part in wanted)]
    first = draw(shape, device, dtype)
    found = errors(shape, arms, first)
    of_stock = [e for arm in arms if not arm.is_ours and isinstance(e := found[arm.name], float) and e == e]
    limit = MAX_ERROR_RATIO * min(of_stock, default=float("nan"))
    right = [arm for arm in arms if isinstance(e := found[arm.name], float) and e <= limit]

    count = num_sets(first.num_bytes, device)
    sets = [first, *(draw(shape, device, dtype) for _ in range(count - 1))]
    timings = interleaved(
        {arm.name: lambda i, arm=arm: arm.run(sets[i]) for arm in right}, count, device, repeats
    )
    yardstick = min((timings[name].median for name in YARDSTICKS if name in timings), default=None)
    rows: list[Row] = []
    for arm in arms:
        error = found[arm.name]
        row: Row = {"shape": shape.name, "arm": arm.name, "ours": arm.is_ours, "error": None}
        rows.append(row)
        if isinstance(error, str):
            row["verdict"] = error
            continue
        row["error"] = error
        if arm not in right:
            row["verdict"] = f"wrong: {error:.2e}, over {limit:.2e}"
            continue
        timing = timings[arm.name]
        is_fair = timing.graph or device.type != "cuda"
        tflops = arm.num_products * shape.product_flop / timing.median / 1e9
        row |= {
            "ms": timing.median, "p20": timing.p20, "p80": timing.p80, "graph": timing.graph,
            "tflops": tflops, "share": tflops / ceiling, "verdict": "ok" if is_fair else "ok, with launches",
            "speedup": None if yardstick is None else yardstick / timing.median,
        }  # fmt: skip
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=None, help="parts of their names, in the order wanted")
    parser.add_argument("--arms", nargs="+", default=[""], help="only arms whose name contains one of these")
    parser.add_argument("--repeats", type=int, default=30, help="measurements an arm")
    parser.add_argument("--seconds", type=float, default=500, help="begin no shape after this")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--tiny", action="store_true", help="toys, on any machine")
    args = parser.parse_args(argv)
    budget = Budget(args.seconds)
    device = chosen_device(parser, tiny=args.tiny)
    # Triton's interpreter knows no bfloat16.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    known = {shape.name: shape for shape in (TOYS if args.tiny else ATTENTION)}
    try:
        shapes = pick(known, args.shapes or ([""] if args.tiny else WANTED))
    except ValueError as error:
        parser.error(str(error))
    torch.manual_seed(0)
    found = environment(device)
    print(", ".join(f"{key} {value}" for key, value in found.items()))
    name, rows = "attention_tiny" if args.tiny else "attention", []
    with torch.no_grad(), best_stock_attention():
        ceiling = gemm_ceiling(device)
        print(f"bf16 matrix product: {ceiling:.0f} TFLOP/s", flush=True)
        for shape in shapes:
            if budget.spent:
                print(f"out of time before {shape.name}")
                break
            some = measure(shape, device, dtype, ceiling, args.repeats, args.arms)
            print(table(some, COLUMNS) + f"\n{budget.left:.0f} s left", flush=True)
            rows += some
            title = f"Attention, {found['device']}: speed-up over PyTorch's best (grounded: as published)"
            plot = bars(title, rows, "shape", "arm", "speedup", "x")
            save(args.out, name, found, rows, plot, ceiling_tflops=ceiling)
    ours = [row for row in rows if row["ours"]]
    return 0 if ours and all(row["verdict"].startswith("ok") for row in ours) else 1


if __name__ == "__main__":
    sys.exit(main())
