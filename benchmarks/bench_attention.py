"""Attention, forward: our kernels beside PyTorch's, FlashAttention-3 and the published grounded formulation.

    python -m benchmarks.bench_attention [--shapes grounded] [--out benchmarks/results]
    python -m benchmarks.bench_attention --sweep-tiles --shapes grounded-6-4608
    python -m benchmarks.bench_attention --dry

Every arm's output is compared with float32 before it is timed; a wrong arm is named and not timed. Prints a
table and writes attention.json and attention.png. `--sweep-tiles` tries block shapes for our kernels instead
and prints what the rows of `kernels.attention.tiles` should say. `--dry` runs toys anywhere (on a CPU in
Triton's interpreter): its times mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from benchmarks.shapes import ATTENTION, TOYS, AttentionShape
from benchmarks.timing import Timing, environment, gemm_ceiling, interleaved, num_sets
from bokehflux.kernels.attention import eager, reference
from bokehflux.weights.write import replacing, write_json

LOGIT_BOUND = 9.5
"""What |q . k| / sqrt(D) stays below in these inputs: a fixed offset is allowed in either dtype."""
MAX_ERROR_RATIO = 2.0
"""Largest error that passes, as a multiple of a stock kernel's on the same inputs."""
CHECKED_HEADS = (0, 11, 23)
PLAIN_YARDSTICKS = ("cuDNN", "FA2", "flex", "sdpa")
"""Speed-ups on plain shapes are over the fastest of these."""
YARDSTICKS = ("published, cuDNN", "published, sdpa")
INKS = ("#1f6fb4", "#7fb2dd", "#d62728", "#2a9d3a", "#888888", "#b8860b", "#6a3d9a", "#c77cbf")


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


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One arm on one shape."""

    shape: str
    arm: str
    verdict: str
    """"ok", or why the arm was not timed."""
    error: float | None = None
    """Norm of the difference from float32 over the norm of the float32 result."""
    timing: Timing | None = None
    tflops: float | None = None
    """Of the work that the arm does."""
    share: float | None = None
    """tflops over the rate of a large bfloat16 matrix product in this run."""
    speedup: float | None = None
    """Time of PyTorch's best arm (plain), or of the published form on cuDNN (others), over this one's."""


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


def stock_kernels(device: torch.device) -> list[tuple[str, Kernel]]:
    """PyTorch's attention by backend, FlexAttention, and FlashAttention-3 where a wheel is installed."""
    if device.type != "cuda":
        return [("sdpa", F.scaled_dot_product_attention)]
    found = [
        ("cuDNN", pinned(SDPBackend.CUDNN_ATTENTION)),
        ("FA2", pinned(SDPBackend.FLASH_ATTENTION)),
        ("flex", torch.compile(flex_attention, dynamic=False)),
    ]
    fa3 = find_fa3()
    return found if fa3 is None else [*found, ("FA3", fa3)]


def pinned(backend: SDPBackend) -> Kernel:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return attend


def find_fa3() -> Kernel | None:
    for name in ("fa3_fwd_interface", "flash_attn_interface"):
        try:
            attend = importlib.import_module(name).flash_attn_func
        except (ImportError, AttributeError):
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
    for name, kernel in stock_kernels(device):
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
    if shape.form == "grounded":
        arms.append(
            Arm(
                name="two calls merged",
                run=lambda x: eager.grounded_attention(x.q, x.k, x.v, [n] * (n + 1)),
                num_products=2 + 4 * n,
                read=lambda out: out,
            )
        )
    return arms


def our_arms(shape: AttentionShape) -> list[Arm]:
    from bokehflux.kernels.attention import ops

    n = shape.num_targets
    arms = []
    for name, bound in (("ours", LOGIT_BOUND), ("ours, running maximum", None)):

        def run(x: Inputs, bound: float | None = bound) -> Tensor:
            if shape.form == "plain":
                return ops.attention(x.q, x.k, x.v, logit_bound=bound)
            if shape.form == "target":
                return ops.target_attention(x.q, x.k[n:], x.k[:n], x.v[:n], [0] * n, logit_bound=bound)
            return ops.grounded_attention(x.q, x.k, x.v, [n] * (n + 1), logit_bound=bound)

        products = {"plain": 2 * n, "target": 3 * n, "grounded": 3 * n + 1}[shape.form]
        arms.append(Arm(name=name, run=run, num_products=products, read=lambda out: out, is_ours=True))
    return arms


# Measuring.


def errors(shape: AttentionShape, arms: Sequence[Arm], x: Inputs) -> dict[str, float | str]:
    """Each arm's relative error on some heads, or why it could not run."""
    heads = [head for head in CHECKED_HEADS if head < shape.num_heads]
    true = exact(shape, x, heads)
    found: dict[str, float | str] = {}
    for arm in arms:
        try:
            out = arm.read(arm.run(x))[:, :, heads].float()
        except RuntimeError as error:  # a backend that cannot take the shape
            found[arm.name] = f"failed: {str(error).strip().splitlines()[0][:80]}"
            continue
        found[arm.name] = ((out - true).norm() / true.norm()).item()
    return found


def measure(
    shape: AttentionShape, device: torch.device, dtype: torch.dtype, ceiling: float, repeats: int
) -> list[Measurement]:
    torch._dynamo.reset()  # else FlexAttention runs into the limit of recompilations
    arms = [*our_arms(shape), *stock_arms(shape, device)]
    first = draw(shape, device, dtype)
    found = errors(shape, arms, first)
    of_stock = [e for arm in arms if not arm.is_ours and isinstance(e := found[arm.name], float) and e == e]
    limit = MAX_ERROR_RATIO * min(of_stock, default=0.0)
    right = [arm for arm in arms if isinstance(e := found[arm.name], float) and e <= limit]

    count = num_sets(first.num_bytes, device)
    sets = [first, *(draw(shape, device, dtype) for _ in range(count - 1))]
    timings = interleaved(
        {arm.name: lambda i, arm=arm: arm.run(sets[i]) for arm in right}, count, device, repeats
    )
    yardsticks = PLAIN_YARDSTICKS if shape.form == "plain" else YARDSTICKS
    yardstick = min((timings[name].median for name in yardsticks if name in timings), default=float("nan"))
    result = []
    for arm in arms:
        error = found[arm.name]
        if arm not in right:
            why = error if isinstance(error, str) else f"wrong: error {error:.2e}, allowed {limit:.2e}"
            result.append(Measurement(shape=shape.name, arm=arm.name, verdict=why))
            continue
        timing = timings[arm.name]
        tflops = arm.num_products * shape.product_flop / timing.median / 1e9
        result.append(
            Measurement(
                shape=shape.name, arm=arm.name, verdict="ok", error=float(error), timing=timing,
                tflops=tflops, share=tflops / ceiling, speedup=yardstick / timing.median,
            )
        )  # fmt: skip
    return result


def show(measurements: Sequence[Measurement]) -> None:
    for m in measurements:
        if m.timing is None:
            print(f"  {m.arm:<24}{m.verdict}")
            continue
        spread = f"{m.timing.p20:.3f}-{m.timing.p80:.3f}"
        mark = "" if m.timing.graph else "  (with launches)"
        print(
            f"  {m.arm:<24}{m.timing.median:>9.3f} ms {spread:>16}{m.tflops:>8.0f} TFLOP/s{m.share:>7.0%}"
            f"{m.speedup:>7.2f}x{m.error:>10.2e}{mark}",
            flush=True,
        )


def plot(measurements: Sequence[Measurement], title: str) -> Image.Image:
    """Bars: speed-up over the comparison arm, a group a shape."""
    timed = [m for m in measurements if m.speedup is not None and m.speedup == m.speedup]
    names = list(dict.fromkeys(m.arm for m in timed))
    shapes = list(dict.fromkeys(m.shape for m in timed))
    bar, left, top = 14, 150, 40 + 20 * len(names)
    height = top + sum(bar * sum(m.shape == s for m in timed) + 14 for s in shapes) + 20
    image = Image.new("RGB", (900, height), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    pen.text((10, 10), title, "black", font)
    for i, name in enumerate(names):
        pen.rectangle((10, 36 + 20 * i, 24, 48 + 20 * i), INKS[i % len(INKS)])
        pen.text((32, 34 + 20 * i), name, "black", font)
    scale = 640 / max((m.speedup or 0.0 for m in timed), default=1.0)
    y = top
    for shape in shapes:
        pen.text((10, y), shape, "black", font)
        for m in (m for m in timed if m.shape == shape):
            end = left + scale * (m.speedup or 0.0)
            pen.rectangle((left, y + 2, end, y + bar - 1), INKS[names.index(m.arm) % len(INKS)])
            pen.text((end + 4, y), f"{m.speedup:.2f}x", "black", font)
            y += bar
        y += 14
    one = left + scale
    pen.line((one, top - 4, one, y), "black")
    return image


# Tiles.


def sweep(
    shape: AttentionShape, device: torch.device, dtype: torch.dtype, repeats: int
) -> list[dict[str, Any]]:
    """Every candidate tile of a shape's longest form that compiles and is right, fastest first."""
    import triton.errors

    from bokehflux.kernels.attention import ops, tiles, triton_fwd

    n = shape.num_targets
    form = {"plain": tiles.PLAIN, "target": tiles.TARGET, "grounded": tiles.PAIR}[shape.form]
    jobs = {
        tiles.PLAIN: None,
        tiles.TARGET: ops._target_jobs((0,) * n),
        tiles.PAIR: ops._grounded_jobs((n,) * (n + 1)),
    }[form]
    count = num_sets(draw(shape, device, dtype).num_bytes, device)
    sets = [draw(shape, device, dtype) for _ in range(count)]

    def run(x: Inputs, fixed: bool, tile: tiles.Tile) -> Tensor:
        k, k_pivot, v = (x.k[:n], x.k[n:], x.v[:n]) if form == tiles.TARGET else (x.k, None, x.v)
        return triton_fwd.forward(x.q, k, k_pivot, v, None, jobs, fixed=fixed, tile=tile)[0]

    rows = []
    for fixed in (True, False):
        true = exact(shape, sets[0], [0])
        usual = tiles.forward_tile(tiles.device(device), [form], shape.head_dim, fixed)
        calls = {}
        for tile in dict.fromkeys([usual, *candidates(tiles.device(device), form, shape.head_dim)]):
            try:
                out = run(sets[0], fixed, tile)[:, :, :1].float()
            except (RuntimeError, triton.errors.TritonError) as error:
                print(
                    f"    {describe(tile)}: {type(error).__name__}: {str(error).strip().splitlines()[0][:70]}"
                )
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
                    "in_table": tile == usual,
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


def candidates(device: Any, form: str, head_dim: int) -> Iterator[Any]:
    """Tiles that may fit, by their shared memory."""
    from bokehflux.kernels.attention import tiles

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


def describe(tile: Any) -> str:
    return (
        f"{tile.block_m}x{tile.block_n} w{tile.num_warps} s{tile.num_stages} "
        f"{'descriptors' if tile.tma else 'pointers'} {tile.programs_per_sm}/SM parts<={tile.max_parts}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="", help="only shapes whose name contains this")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--repeats", type=int, default=30, help="measurements an arm")
    parser.add_argument("--sweep-tiles", action="store_true", help="find the best tiles instead")
    parser.add_argument("--dry", action="store_true", help="toy shapes, on any machine")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        if not args.dry:
            parser.error("there is no GPU; --dry tries everything on toy shapes")
        os.environ.setdefault("TRITON_INTERPRET", "1")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    shapes = [shape for shape in (TOYS if args.dry else ATTENTION) if args.shapes in shape.name]
    if not shapes:
        parser.error(f"no shape's name contains {args.shapes!r}")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)

    found = environment(device)
    print(", ".join(f"{key} {value}" for key, value in found.items()))
    args.out.mkdir(parents=True, exist_ok=True)
    suffix = "_dry" if args.dry else ""
    with torch.no_grad():
        if args.sweep_tiles:
            rows = [row for shape in shapes for row in sweep(shape, device, dtype, max(5, args.repeats // 3))]
            write_json(args.out / f"attention_tiles{suffix}.json", {"environment": found, "rows": rows})
            return 0
        ceiling = gemm_ceiling(device)
        print(f"bf16 matrix product: {ceiling:.0f} TFLOP/s")
        measurements = []
        for shape in shapes:
            print(shape.name)
            some = measure(shape, device, dtype, ceiling, args.repeats)
            show(some)
            measurements += some
        after = gemm_ceiling(device)
    print(f"bf16 matrix product afterwards: {after:.0f} TFLOP/s")
    report = {
        "environment": found,
        "ceiling_tflops": [ceiling, after],
        "measurements": [dataclasses.asdict(m) for m in measurements],
    }
    write_json(args.out / f"attention{suffix}.json", report)
    title = f"Attention, {found['device']}: speed-up over PyTorch's best (plain), published on cuDNN (others)"
    with replacing(args.out / f"attention{suffix}.png") as temporary:
        plot(measurements, title).save(temporary, format="PNG")
    failed = [m for m in measurements if m.arm.startswith("ours") and m.verdict != "ok"]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
