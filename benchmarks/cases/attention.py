"""Attention, forward: our kernels beside PyTorch's, FlashAttention-3 and the published grounded formulation.

Ours are the backends of `kernels.attention.interface` that are kernels of our own, each with the logits'
bound known (a fixed softmax offset) and without (a running maximum). `triton` takes Gluon where that runs;
there plain Triton is timed beside it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from benchmarks import shapes
from benchmarks.arms import best_stock_attention
from benchmarks.registry import Benchmark, Session, by_case
from benchmarks.shapes import AttentionShape
from benchmarks.timing import Arm, Row, Rules, first_line, num_sets, race, relative_error
from bokehflux.kernels.attention import interface, select, tiles

LOGIT_BOUND = 9.5
"""What |q . k| / sqrt(D) stays below in these inputs: a fixed offset is allowed in either dtype."""
STOCK_BACKENDS = ("reference", "sdpa", "flash")
"""Names in `select.BACKENDS` that are not kernels of our own."""
YARDSTICKS = ("cuDNN", "FA2", "flex", "sdpa", "published, cuDNN", "published, FA2", "published, sdpa")
"""`speedup` is over the fastest of these: PyTorch's own, for grounded shapes in the published formulation."""
Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention of q, k, v; stock kernels take [B, H, L, D], ours [B, L, H, D]."""


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


def draw(shape: AttentionShape, device: torch.device, dtype: torch.dtype) -> Inputs:
    """q and k as a QK-norm leaves them, v normal."""
    rows = shape.num_targets + (shape.form != "plain")
    rows_q = rows if shape.form == "plain" else 1
    dims = shape.length, shape.num_heads, shape.head_dim
    norm = (0.98 * LOGIT_BOUND * shape.head_dim**0.5) ** 0.5
    q, k, v = (torch.randn(n, *dims, device=device) for n in (rows_q, rows, rows))
    q, k = (norm * F.normalize(x, dim=-1) for x in (q, k))
    ours = [x.to(dtype) for x in (q, k, v)]
    return arranged(shape, ours, [x.transpose(1, 2).contiguous() for x in ours])


def arranged(shape: AttentionShape, ours: Sequence[Tensor], stock: Sequence[Tensor]) -> Inputs:
    """q, k and v in our layout and in that of stock kernels; the published batches are made of the latter."""
    q, k, v = stock
    targets = range(shape.num_targets) if shape.form == "grounded" else ()
    pairs = [(q.expand(2, -1, -1, -1), *(x[[i, shape.num_targets]] for x in (k, v))) for i in targets]
    pivot_rows = torch.tensor([1, 1], device=q.device)
    return Inputs(q=ours[0], k=ours[1], v=ours[2], stock=(q, k, v), pairs=pairs, pivot_rows=pivot_rows)


def exact(shape: AttentionShape, x: Inputs, heads: Sequence[int]) -> Tensor:
    """The float32 result of some heads, by the definition; of target shapes the targets' rows alone."""
    attend = by_name(shape, "reference")
    return torch.cat([attend(*(t[:, :, h : h + 1].float() for t in (x.q, x.k, x.v))) for h in heads], dim=2)


# Arms.


def stock_kernels(shape: AttentionShape, device: torch.device) -> Iterator[tuple[str, Kernel]]:
    """PyTorch's attention by backend, FlexAttention, and FlashAttention-3 where a wheel is installed.

    That is fa3-fwd, or a build of flash-attention's `hopper` folder.
    """
    if device.type != "cuda":
        yield "sdpa", F.scaled_dot_product_attention
        return
    for name, backend in (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("FA2", SDPBackend.FLASH_ATTENTION)):
        yield name, sdpa_kernel(backend)(F.scaled_dot_product_attention)
    if shape.form == "plain":  # the published formulation does not use it, and it takes long to compile
        yield "flex", torch.compile(flex_attention, dynamic=False)
    for module in ("fa3_fwd_interface", "flash_attn_interface"):
        try:
            attend = importlib.import_module(module).flash_attn_func
        except (ImportError, OSError) as error:  # not installed, or made for another PyTorch
            print(f"no {module}: {first_line(error)}")
        else:
            yield "FA3", functools.partial(in_its_layout, attend)
            return


def in_its_layout(attend: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def published(shape: AttentionShape, kernel: Kernel, x: Inputs) -> list[Tensor]:
    """Calls of a stock kernel, [B, H, L, D] each: a plain shape in one, others a target at a time.

    As published: grounded, queries are swapped, keys concatenated, values doubled; a target alone is on keys
    of the stored pivot.
    """
    q, k, v = x.stock
    if shape.form == "plain":
        return [kernel(q, k, v)]
    if shape.form == "target":
        keys = [torch.cat([own, k[-1:]], dim=2) for own in k[:-1].split(1)]
        values = [torch.cat([own, own], dim=2) for own in v[:-1].split(1)]
        return [kernel(q, *pair) for pair in zip(keys, values, strict=True)]
    outs = []
    for q, k, v in x.pairs:
        keys = torch.cat([k, k.index_select(0, x.pivot_rows)], dim=2)
        outs.append(kernel(q.index_select(0, x.pivot_rows), keys, torch.cat([v, v], dim=2)))
    return outs


def joined(shape: AttentionShape, outs: Tensor | list[Tensor]) -> Tensor:
    """What a kernel of ours or `published` computes as [B, L, H, D], rows as in `Inputs`."""
    if isinstance(outs, Tensor):
        return outs
    if shape.form == "grounded":
        outs = [*(out[:1] for out in outs), outs[0][1:]]
    return torch.cat(outs).transpose(1, 2)


class Way(NamedTuple):
    """How an arm computes a shape."""

    name: str
    kind: shapes.Way
    run: Callable[[Inputs], Tensor | list[Tensor]]
    """What it gives is read by `joined`."""


def on_ours(attend: Kernel) -> Callable[[Inputs], Tensor]:
    return lambda x: attend(x.q, x.k, x.v)


def by_backend(shape: AttentionShape) -> Iterator[Way]:
    """Backends of `select` by name: kernels of our own, and stock ones through two calls merged."""
    for name in select.BACKENDS:
        if name not in STOCK_BACKENDS:
            yield Way(name, "ours", on_ours(by_name(shape, name, LOGIT_BOUND)))
            yield Way(f"{name}, running maximum", "ours", on_ours(by_name(shape, name)))
        elif name != "reference" and shape.form != "plain":
            yield Way(f"{name}, two calls merged", "merged", on_ours(by_name(shape, name)))


def by_name(shape: AttentionShape, backend: str, bound: float | None = None) -> Kernel:
    """A backend of `interface` on q, k, v in [B, L, H, D], rows as in `Inputs`."""
    n, pivots = shape.num_targets, [shape.num_targets] * (shape.num_targets + 1)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if shape.form == "plain":
            return interface.attention(q, k, v, logit_bound=bound, backend=backend)
        if shape.form == "grounded":
            return interface.grounded_attention(q, k, v, pivots, logit_bound=bound, backend=backend)
        return interface.target_attention(q, k[n:], k[:n], v[:n], [0] * n, logit_bound=bound, backend=backend)

    return attend


def in_plain_triton(shape: AttentionShape, device: torch.device) -> Iterator[Way]:
    """Our kernels in Triton, where the backend of that name would take those in Gluon."""
    if select.why_not_gluon(device) is None:
        for name, fixed in (("plain Triton", True), ("plain Triton, running maximum", False)):
            tile = tiles.forward_tile(
                tiles.device(device), [FORMS[shape.form]], shape.head_dim, fixed, tiles.TRITON
            )
            yield Way(name, "ours", on_tile(shape, tile, fixed))


FORMS = {"plain": tiles.PLAIN, "target": tiles.TARGET, "grounded": tiles.PAIR}
"""A shape's longest form of work in our kernels."""


def on_tile(shape: AttentionShape, tile: tiles.Tile, fixed: bool) -> Callable[[Inputs], Tensor]:
    """Our kernel with one block shape. fixed: the softmax takes a fixed offset."""
    from bokehflux.kernels.attention import jobs as work  # launch imports triton
    from bokehflux.kernels.attention import launch

    n = shape.num_targets
    jobs = {
        "plain": None,
        "target": work.target_jobs((0,) * n),
        "grounded": work.grounded_jobs((n,) * (n + 1)),
    }[shape.form]

    def run(x: Inputs) -> Tensor:
        k, k_pivot, v = (x.k[:n], x.k[n:], x.v[:n]) if shape.form == "target" else (x.k, None, x.v)
        return launch.forward(x.q, k, k_pivot, v, None, jobs, fixed=fixed, tile=tile)[0]

    return run


def in_stock(shape: AttentionShape, device: torch.device) -> Iterator[Way]:
    """Stock kernels: on plain shapes as they are, on others in the published formulation."""
    prefix = "" if shape.form == "plain" else "published, "
    for name, kernel in stock_kernels(shape, device):
        yield Way(prefix + name, "published", functools.partial(published, shape, kernel))


# Measuring.


def draw_sets(shape: AttentionShape, session: Session) -> list[Inputs]:
    """As many as fill the GPU's cache several times."""
    size = 3 * shape.num_targets * shape.length * shape.num_heads * shape.head_dim * session.half.itemsize
    return [draw(shape, session.device, session.half) for _ in range(num_sets(size, session.device))]


@torch.no_grad()
@best_stock_attention()
def measure_shape(session: Session, shape: AttentionShape) -> list[Row]:
    """A row an arm, ours first."""
    torch._dynamo.reset()  # else FlexAttention runs into the limit of recompilations
    device = session.device
    ways = [*by_backend(shape), *in_plain_triton(shape, device), *in_stock(shape, device)]
    ways.sort(key=lambda way: way.kind != "ours")
    sets, heads = draw_sets(shape, session), shape.checked_heads
    true = exact(shape, sets[0], heads)
    arms = [
        Arm(
            name=way.name,
            call=lambda i, way=way: way.run(sets[i]),
            error=lambda out: relative_error(joined(shape, out)[:, :, heads], true),
            tera_flop=shape.tera_flop(way.kind),
            is_ours=way.kind == "ours",
        )
        for way in ways
        if session.wants(way.name)
    ]
    return race(arms, Rules.of(arms, speed_of=YARDSTICKS), session.replayed(len(sets)))


BENCHMARK = Benchmark(
    question="attention, forward: time by shape and kernel",
    checked="outputs against float32 by the definition: at most twice the best stock kernel's error",
    cases=shapes.known,
    usual_cases=shapes.USUAL,
    arms=(
        "triton", "triton, running maximum", "plain Triton", "plain Triton, running maximum",
        "sdpa, two calls merged", "flash, two calls merged", "cuDNN", "FA2", "flex", "FA3", "sdpa",
        "published, cuDNN", "published, FA2", "published, FA3", "published, sdpa",
    ),
    repeats=30,
    columns="shape arm ms speedup tflops share error verdict",
    bars=("shape", "arm", "speedup", "x"),
    measure=by_case(measure_shape, "shape"),
)  # fmt: skip
