"""The compiled kernels, Triton and Gluon: every tile of the table, real dtypes and lengths, CUDA graphs.

What names no tile runs as the table says: in Gluon on a Hopper GPU with the Triton it is written for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from bokehflux.kernels.attention import launch, ops, reference, select, tiles
from bokehflux.kernels.attention.jobs import grounded_jobs, target_jobs
from bokehflux.kernels.attention.tiles import Row
from tests.helpers import assert_within_2x, max_error

BOUND = 9.5
"""What scores of `make` stay below: within reach of a fixed offset in both dtypes."""
DTYPES = [torch.bfloat16, torch.float16]
COMPILED = [row for row in tiles.TABLE if row.family != tiles.INTERPRETER]
FORWARD = [row for row in COMPILED if row.kernel in tiles.MATMULS]
BACKWARD = [row for row in COMPILED if row.kernel not in tiles.MATMULS]
CASES = [(row, True, torch.bfloat16, (1000, 1536)) for row in FORWARD if row.tile.language == tiles.GLUON]
CASES += [(row, True, torch.bfloat16, (1000,)) for row in FORWARD if row.tile.language == tiles.TRITON]
CASES += [(row, False, torch.float16, (1, 63)) for row in FORWARD if row.head_dim != 64]
"""Row, fixed offset or not, dtype, lengths. Each length but 1 compiles anew, which is what this costs."""
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_language = pytest.mark.parametrize("language", [tiles.TRITON, tiles.GLUON])


@pytest.fixture(autouse=True)
def _exact_float32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


def name(row: Row) -> str:
    t = row.tile
    size = f"{t.block_m}x{t.block_n}-w{t.num_warps}-s{t.num_stages}"
    return f"{row.family}-{t.language}-{row.kernel}-{row.head_dim}-{size}"


def make(
    rows: int, length: int, dim: int, dtype: torch.dtype, heads: int = 3, length_k: int = 0
) -> list[Tensor]:
    """q, k as after a QK-norm, v normal."""
    norm = (0.98 * BOUND * dim**0.5) ** 0.5
    shapes = [(rows, length, heads, dim)] + [(rows, length_k or length, heads, dim)] * 2
    q, k, v = (torch.randn(shape, device="cuda") for shape in shapes)
    return [(norm * F.normalize(q, dim=-1)).to(dtype), (norm * F.normalize(k, dim=-1)).to(dtype), v.to(dtype)]


def plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    return out if bias is None else out + bias[:, None].to(out.dtype)


def published(q: Tensor, k_pivot: Tensor, k: Tensor, v: Tensor, index: list[int]) -> Tensor:
    with torch.nn.attention.sdpa_kernel(
        [torch.nn.attention.SDPBackend.FLASH_ATTENTION, torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION]
    ):
        return plain(q[index], torch.cat([k, k_pivot[index]], dim=1), torch.cat([v, v], dim=1))


def grounded(q: Tensor, k: Tensor, v: Tensor, pivot_of: tuple[int, ...]) -> Tensor:
    pivots = sorted(set(pivot_of))
    return published(q, k[pivots], k, v, [pivots.index(p) for p in pivot_of])


def wide(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().float() for x in tensors]


def skip_unless_it_runs_here(row: Row) -> None:
    """Portable tiles run everywhere; this may be the only place where anyone tries them."""
    if row.family not in (tiles.PORTABLE, tiles.device(torch.device("cuda")).family):
        pytest.skip(f"made for {row.family}")
    skip_without(row.tile.language)


def skip_without(language: str) -> None:
    if language == tiles.GLUON and (reason := select.why_not_gluon(torch.device("cuda"))):
        pytest.skip(f"no Gluon kernels: {reason}")


def inputs_for(row: Row, length: int, dim: int, dtype: torch.dtype) -> tuple[list, tuple[int, ...]]:
    """Arguments of `launch.forward` that hold the row's form, with every shorter one for a pair's tile.

    Returns them and, for every row of the batch, its pivot.
    """
    index = {tiles.PLAIN: (0, 1), tiles.TARGET: (0, 1, 1), tiles.PAIR: (0, 0, 0, 3)}[row.kernel]
    q, k, v = make(len(index), length, dim, dtype)
    if row.kernel == tiles.TARGET:
        return [q[:2], k, make(2, length, dim, dtype)[1], v, None, target_jobs(index)], index
    return [q[sorted(set(index))], k, None, v, None, grounded_jobs(index)], index


@pytest.mark.parametrize(
    ("row", "fixed", "dtype", "lengths"),
    CASES,
    ids=[f"{name(row)}-{'fixed' if fixed else 'running'}-{dtype}" for row, fixed, dtype, _ in CASES],
)
def test_forward_tiles(row: Row, fixed: bool, dtype: torch.dtype, lengths: tuple[int, ...]) -> None:
    skip_unless_it_runs_here(row)
    for dim in select.HEAD_DIMS if row.head_dim is None else (row.head_dim,):
        for length in lengths:
            args, index = inputs_for(row, length, dim, dtype)
            q, k, k_pivot, v = args[:4]
            out, lse = launch.forward(*args, fixed=fixed, tile=row.tile)
            if k_pivot is None:
                exact = reference.grounded_attention(*wide(q, k, v), index)
                oracle = grounded(q, k, v, index)
            else:
                exact = reference.target_attention(*wide(q, k_pivot, k, v), index)
                oracle = published(q, k_pivot, k, v, list(index))
            # With one token the oracle is exact, and a fixed offset rounds a probability once.
            atol = v.abs().max().item() * torch.finfo(dtype).eps if length == 1 else 1e-6
            assert_within_2x(out, oracle, exact, atol=atol)
            assert lse.isfinite().all()


@each_dtype
@pytest.mark.parametrize("row", BACKWARD, ids=name)
def test_backward_tiles(row: Row, dtype: torch.dtype) -> None:
    skip_unless_it_runs_here(row)
    pivot_of = (1, 1, 2, 1)
    chosen = {f"{row.kernel}_tile": row.tile}
    for dim in select.HEAD_DIMS:
        for length in (1000,):
            q, k, v = make(4, length, dim, dtype)
            q = q[[1, 2]].contiguous()
            grad = torch.randn(4, length, 3, dim, device="cuda").to(dtype)
            jobs = grounded_jobs(pivot_of)
            out, lse = launch.forward(q, k, None, v, None, jobs, fixed=False)
            dq, dk, _, dv = launch.backward(grad, q, k, None, v, out, lse, jobs, **chosen)
            theirs = gradients(lambda q, k, v: grounded(q, k, v, pivot_of), [q, k, v], grad)
            true = gradients(
                lambda q, k, v: reference.grounded_attention(q, k, v, pivot_of), wide(q, k, v), grad
            )
            for mine, oracle, exact in zip((dq, dk, dv), theirs, true, strict=True):
                assert_within_2x(mine, oracle, exact)


def gradients(form: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    form(*leaves).backward(grad.to(leaves[0].dtype))
    return [x.grad for x in leaves]


@each_dtype
@pytest.mark.parametrize("bound", [None, BOUND])
@pytest.mark.parametrize(("length", "length_k"), [(1536, 1536), (1533, 4609), (4608, 4608), (4607, 77)])
def test_plain(length: int, length_k: int, bound: float | None, dtype: torch.dtype) -> None:
    q, k, v = make(2, length, 128, dtype, length_k=length_k)
    bias = torch.randn(2, 3, 128, device="cuda")
    ours = ops.attention(q, k, v, value_bias=bias, logit_bound=bound)
    assert_within_2x(ours, plain(q, k, v, bias), reference.attention(*wide(q, k, v), value_bias=bias))


@pytest.mark.parametrize("bound", [None, BOUND])
@pytest.mark.parametrize("pivot_of", [(0, 0), (6,) * 7, (0,) * 12, (0, 0, 2, 2, 4)], ids=str)
@pytest.mark.parametrize("length", [1536, 4608])
def test_grounded(length: int, pivot_of: tuple[int, ...], bound: float | None) -> None:
    q, k, v = make(len(pivot_of), length, 128, torch.bfloat16, heads=1)
    q = q[sorted(set(pivot_of))]
    ours = ops.grounded_attention(q, k, v, pivot_of, logit_bound=bound)
    exact = reference.grounded_attention(*wide(q, k, v), pivot_of)
    assert_within_2x(ours, grounded(q, k, v, pivot_of), exact)


@pytest.mark.parametrize("louder", ["own", "pivot", "both"])
def test_scores_far_apart(louder: str) -> None:
    """Three rows of one pivot: no maximum may be lost where another row's keys dominate."""
    q, k, v = make(3, 700, 128, torch.bfloat16, heads=2)
    if louder != "own":
        k[0] *= 40
    if louder != "pivot":
        k[1:] *= 40
    ours = ops.grounded_attention(q[:1], k, v, (0, 0, 0))
    exact = reference.grounded_attention(*wide(q[:1], k, v), (0, 0, 0))
    assert_within_2x(ours, grounded(q[:1], k, v, (0, 0, 0)), exact)


def test_flux_sizes_at_full_width() -> None:
    """24 heads, the pair of 1024 pixels: the grid that is timed. Checked by head, to fit float32 scores."""
    q, k, v = make(2, 4608, 128, torch.bfloat16, heads=24)
    ours = ops.grounded_attention(q[:1], k, v, (0, 0), logit_bound=BOUND)
    for head in range(0, 24, 5):
        one = [x[:, :, head : head + 1] for x in (q[:1], k, v)]
        exact = reference.grounded_attention(*wide(*one), (0, 0))
        assert_within_2x(ours[:, :, head : head + 1], grounded(*one, (0, 0)), exact)


def test_targets_on_stored_pivots() -> None:
    q, k, v = make(4, 1536, 128, torch.bfloat16)
    q, k_pivot = q[:2].contiguous(), make(2, 1536, 128, torch.bfloat16)[1]
    index = [1, 0, 1, 1]
    for bound in (None, BOUND):
        ours = ops.target_attention(q, k_pivot, k, v, index, logit_bound=bound)
        exact = reference.target_attention(*wide(q, k_pivot, k, v), index)
        assert_within_2x(ours, published(q, k_pivot, k, v, index), exact)


@pytest.mark.parametrize("shared", [False, True])
def test_further_keys_and_values(shared: bool) -> None:
    q, k, v = make(3, 1536, 128, torch.bfloat16)
    k_more, v_more = make(1 if shared else 3, 1000, 128, torch.bfloat16)[1:]
    further = [x.expand(3, -1, -1, -1) for x in (k_more, v_more)]
    exact = reference.extended_attention(*wide(q, k, v, k_more, v_more))
    oracle = plain(q, *(torch.cat(pair, dim=1) for pair in zip((k, v), further, strict=True)))
    for bound in (None, BOUND):
        ours = ops.extended_attention(q, k, v, k_more, v_more, logit_bound=bound)
        assert_within_2x(ours, oracle, exact)


def test_the_table_is_followed() -> None:
    skip_without(tiles.GLUON)
    q, k, v = make(1, 100, 128, torch.bfloat16)
    assert select.language((q, k, k, v)) == tiles.GLUON


@each_language
@pytest.mark.parametrize("length", [1536, 1000])
def test_split_and_whole_tiles_agree(length: int, language: str) -> None:
    """On 132 multiprocessors these grids end in split tiles; without splitting the result is the same."""
    skip_without(language)
    device = tiles.device(torch.device("cuda"))
    for pivot_of in ((0,), (0, 0), (0, 0, 0)):
        q, k, v = make(len(pivot_of), length, 128, torch.bfloat16, heads=24)
        jobs = grounded_jobs(pivot_of)
        tile = tiles.forward_tile(device, [job.form for job in jobs], 128, True, language)
        unsplit = dataclasses.replace(tile, max_parts=1)
        args = q[:1], k, None, v, None, jobs
        split = launch.forward(*args, fixed=True, tile=tile)
        whole = launch.forward(*args, fixed=True, tile=unsplit)
        assert max_error(split[1], whole[1]) < 1e-4
        assert_within_2x(split[0], whole[0], whole[0].float(), atol=2**-7 * whole[0].abs().max().item())


@pytest.mark.parametrize("far", ["q", "k", "v"])
def test_addresses_beyond_32_bits(far: str) -> None:
    """A row 2^31 elements and more behind the first, for pointers and for descriptors."""
    if torch.cuda.mem_get_info()[0] < 14 * 2**30:
        pytest.skip("needs 14 GiB of free GPU memory")
    q, k, v = make(2, 100, 64, torch.bfloat16, heads=2)
    inputs = {"q": q, "k": k, "v": v}
    stride = 2**31 + 4096
    store = torch.zeros(stride + q[0].numel(), dtype=q.dtype, device="cuda")
    view = store.as_strided(q.shape, (stride, *q.stride()[1:]))
    view.copy_(inputs[far])
    moved = {**inputs, far: view}
    jobs = grounded_jobs((0, 1))
    for row in FORWARD:
        if row.head_dim in (None, 64) and row.family == tiles.device(q.device).family:
            if row.tile.language == tiles.GLUON and select.why_not_gluon(q.device):
                continue
            here = launch.forward(q, k, None, v, None, jobs, fixed=False, tile=row.tile)
            there = launch.forward(
                *(moved[n] for n in "qk"), None, moved["v"], None, jobs, fixed=False, tile=row.tile
            )
            assert torch.equal(here[0], there[0])


@pytest.mark.parametrize("shift", [0, 8, 4])
def test_layouts(shift: int) -> None:
    """Slices of a packed projection, 16-byte aligned for descriptors or (4 elements off) not."""
    packed = torch.randn(2, 333, 3 * 2 * 128 + 16, device="cuda", dtype=torch.bfloat16)
    q, k, v = packed[..., shift : shift + 768].unflatten(-1, (3, 2, 128)).unbind(2)
    ours = ops.attention(q, k, v)
    assert_within_2x(ours, plain(q, k, v), reference.attention(*wide(q, k, v)))


def training_step(inputs: list[Tensor]) -> list[Tensor]:
    """Every form once, forward and backward."""
    q, k, v, bias = inputs
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v, bias)]
    out = ops.grounded_attention(leaves[0][:1], leaves[1], leaves[2], (0, 0, 0), value_bias=leaves[3])
    out = out + ops.attention(leaves[0], leaves[1], leaves[2], value_bias=leaves[3], logit_bound=BOUND)
    out = out + ops.target_attention(leaves[0][:2], leaves[1][:2], leaves[1], leaves[2], [0, 1, 0])
    out.backward(torch.linspace(-1, 1, out.numel(), device="cuda").view_as(out).to(out.dtype))
    return [out.detach(), *(x.grad for x in leaves)]


def training_inputs() -> list[Tensor]:
    return [*make(3, 1000, 128, torch.bfloat16), torch.randn(3, 3, 128, device="cuda")]


def test_the_same_bits_every_time() -> None:
    inputs = training_inputs()
    first = training_step(inputs)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, training_step(inputs), strict=True))


def test_nothing_is_read_before_it_is_written(request: pytest.FixtureRequest) -> None:
    inputs = training_inputs()
    clean = training_step(inputs)
    request.getfixturevalue("poisoned")
    assert torch.empty(1).isnan().all()
    for a, b in zip(clean, training_step(inputs), strict=True):
        assert a.isfinite().all() and torch.equal(a, b)


def test_new_groupings_compile_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row numbers are arguments; kernels are compiled by kind of work, not by batch."""
    q, k, v = make(8, 1536, 128, torch.bfloat16)

    def call(pivot_of: tuple[int, ...]) -> None:
        rows = len(pivot_of)
        ops.grounded_attention(q[: len(set(pivot_of))], k[:rows], v[:rows], pivot_of, logit_bound=BOUND)

    for tail in ((0, 0, 0), (0, 0, 0, 0), (0,) * 7, (0,) * 8):
        call(tail)
    compiled = []
    original = triton.JITFunction._do_compile
    monkeypatch.setattr(
        triton.JITFunction,
        "_do_compile",
        lambda self, *a, **o: (compiled.append(self), original(self, *a, **o))[1],
    )
    for pivot_of in ((2, 2, 2), (1, 1, 1, 1), (6,) * 7, (7,) * 8, (3,) * 8):
        call(pivot_of)
    assert not compiled


def test_compiled_by_inductor() -> None:
    inputs = training_inputs()

    def forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return ops.grounded_attention(q[:1] * 1, k, v, (0, 0, 0), value_bias=bias, logit_bound=BOUND).sin()

    with torch.no_grad():
        exact = forward(*inputs)
        for mode in ("default", "reduce-overhead"):
            compiled = torch.compile(forward, fullgraph=True, mode=mode)
            for _ in range(3):
                torch.compiler.cudagraph_mark_step_begin()
                assert max_error(compiled(*inputs).clone(), exact.float()) < 2**-7

    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    compiled = torch.compile(forward, fullgraph=True)
    compiled(*leaves).sum().backward()
    true = [x.detach().clone().requires_grad_() for x in inputs]
    forward(*true).sum().backward()
    for a, b in zip(leaves, true, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("form", ["plain", "target", "grounded"])
def test_graph_capture(form: str) -> None:
    """A captured call replayed on other values: nothing it needs is left in Python."""
    q, k, v, bias = training_inputs()
    calls: dict[str, Callable[[], Tensor]] = {
        "plain": lambda: ops.attention(q, k, v, value_bias=bias, logit_bound=BOUND),
        "target": lambda: ops.target_attention(
            q[:1], k[:1], k, v, [0, 0, 0], value_bias=bias, logit_bound=BOUND
        ),
        "grounded": lambda: ops.grounded_attention(
            q[:1], k, v, (0, 0, 0), value_bias=bias, logit_bound=BOUND
        ),
    }
    call = calls[form]
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call()
        for x, new in zip((q, k, v, bias), training_inputs(), strict=True):
            x.copy_(new)
        graph.replay()
        replayed = out.clone()
        assert torch.equal(replayed, call())


def test_memory_grows_linearly() -> None:
    """Forward and backward: a doubled length doubles the memory at its peak."""

    def peak(length: int) -> int:
        q, k, v = (x.requires_grad_() for x in make(2, length, 128, torch.bfloat16, heads=8))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        ops.grounded_attention(q[:1], k, v, (0, 0)).sum().backward()
        return torch.cuda.max_memory_allocated() - before

    peak(512)
    assert peak(16384) < 2.3 * peak(8192)
