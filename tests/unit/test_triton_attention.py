"""The Triton kernels against the float32 definition, on toy shapes.

Without a GPU they run in Triton's interpreter, which has to be asked for before triton is imported; with one
the same tests run the compiled kernels. `tests/gpu` has the sizes and dtypes that only a GPU can do.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from bokehflux.kernels.attention import (  # noqa: E402
    jobs,
    launch,
    ops,
    reference,
    select,
    tiles,
    triton_fwd,
)
from bokehflux.kernels.attention.jobs import grounded_jobs  # noqa: E402
from bokehflux.kernels.attention.tiles import Tail, Tile  # noqa: E402
from tests.helpers import assert_within_2x, max_error  # noqa: E402

if not ON_GPU and not triton_fwd.INTERPRETED:
    pytest.skip(
        "triton was imported without TRITON_INTERPRET=1, and there is no GPU", allow_module_level=True
    )

DEVICE = "cuda" if ON_GPU else "cpu"
BOUND = 8.0
"""No scaled score of `qkv` exceeds it; float16 without a running maximum takes up to 9.7."""
GROUPINGS = [(0,), (1, 1), (0, 0, 0), (1, 1, 1, 3), (2, 1, 2, 1, 2), (0, 1)]
each_softmax = pytest.mark.parametrize("bound", [None, BOUND], ids=["running-maximum", "fixed-offset"])
each_load = pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])


def qkv(rows_q: int, rows: int, length: int, heads: int = 2, dim: int = 64, length_k: int = 0, n: int = 3):
    """Queries and keys of norm 8 at head dim 64, so that scores reach up to `BOUND`; then values. float16."""
    norm = math.sqrt(BOUND * math.sqrt(dim))
    shapes = [(rows_q, length, heads, dim)] + [(rows, length_k or length, heads, dim)] * (n - 1)
    made = [torch.randn(shape, device=DEVICE) for shape in shapes]
    made[:-1] = [norm * F.normalize(x, dim=-1) for x in made[:-1]]
    return [x.half() for x in made]


def published(q: Tensor, k_pivot: Tensor, k: Tensor, v: Tensor, index: tuple[int, ...], bias: Tensor | None):
    """Doubled keys and values through PyTorch's own attention: the oracle for low precision."""
    rows = list(index)
    args = q[rows], torch.cat([k, k_pivot[rows]], dim=1), torch.cat([v, v], dim=1)
    return plain(*args, bias)


def plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    return out if bias is None else out + bias[:, None].to(out.dtype)


def grounded(q: Tensor, k: Tensor, v: Tensor, pivot_of: tuple[int, ...], bias: Tensor | None) -> Tensor:
    pivots = sorted(set(pivot_of))
    return published(q, k[pivots], k, v, tuple(pivots.index(p) for p in pivot_of), bias)


def concatenated(
    q: Tensor, k: Tensor, v: Tensor, k_more: Tensor, v_more: Tensor, bias: Tensor | None = None
) -> Tensor:
    further = (x.expand(len(k), -1, -1, -1) for x in (k_more, v_more))
    return plain(q, *(torch.cat(pair, dim=1) for pair in zip((k, v), further, strict=True)), bias)


def wide(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.detach().float() for x in tensors]


def bias_of(rows: int, heads: int = 2, dim: int = 64) -> Tensor:
    return torch.randn(rows, heads, dim, device=DEVICE)


@each_softmax
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("length", "length_k"), [(1, 1), (17, 17), (63, 16), (5, 100), (65, 65)])
def test_plain(length: int, length_k: int, dim: int, bound: float | None) -> None:
    q, k, v = qkv(2, 2, length, 1, dim, length_k)
    bias = bias_of(2, 1, dim)
    ours = ops.attention(q, k, v, value_bias=bias, logit_bound=bound)
    exact = reference.attention(*wide(q, k, v), value_bias=bias)
    assert_within_2x(ours, plain(q, k, v, bias), exact)


@each_softmax
@pytest.mark.parametrize("pivot_of", GROUPINGS, ids=str)
def test_every_grouping(pivot_of: tuple[int, ...], bound: float | None) -> None:
    q, k, v = qkv(len(set(pivot_of)), len(pivot_of), 17, 1)
    bias = bias_of(len(pivot_of), 1)
    ours = ops.grounded_attention(q, k, v, pivot_of, value_bias=bias, logit_bound=bound)
    exact = reference.grounded_attention(*wide(q, k, v), pivot_of, value_bias=bias)
    assert_within_2x(ours, grounded(q, k, v, pivot_of, bias), exact)


@each_softmax
@pytest.mark.parametrize("length", [1, 63, 100])
@pytest.mark.parametrize("dim", [64, 128])
def test_grounded_lengths(length: int, dim: int, bound: float | None) -> None:
    q, k, v = qkv(1, 3, length, 1, dim)
    ours = ops.grounded_attention(q, k, v, (1, 1, 1), logit_bound=bound)
    exact = reference.grounded_attention(*wide(q, k, v), (1, 1, 1))
    # With one token the oracle is exact, and ours rounds a probability once.
    atol = v.abs().max().item() * 2**-11 if length == 1 else 1e-6
    assert_within_2x(ours, grounded(q, k, v, (1, 1, 1), None), exact, atol=atol)


@each_softmax
@pytest.mark.parametrize(("length", "further", "shared"), [(1, 1, True), (33, 65, False), (40, 17, True)])
def test_extended(length: int, further: int, shared: bool, bound: float | None) -> None:
    q, k, v = qkv(3, 3, length, 2)
    k_more, v_more = qkv(1 if shared else 3, 3, further, 2)[1:]
    bias = bias_of(3, 2)
    exact = reference.extended_attention(*wide(q, k, v, k_more, v_more), value_bias=bias)
    ours = ops.extended_attention(q, k, v, k_more, v_more, value_bias=bias, logit_bound=bound)
    assert_within_2x(ours, concatenated(q, k, v, k_more, v_more, bias), exact)


@each_softmax
@pytest.mark.parametrize("index", [(0,), (1, 0, 1), (0,) * 9], ids=str)
def test_targets_alone(index: tuple[int, ...], bound: float | None) -> None:
    """Nine are more than one launch takes; a pivot may have no targets."""
    q, k, v = qkv(2, len(index), 17, 1)
    k_pivot = qkv(2, 2, 17, 1)[1]
    bias = bias_of(len(index), 1)
    ours = ops.target_attention(q, k_pivot, k, v, index, value_bias=bias, logit_bound=bound)
    exact = reference.target_attention(*wide(q, k_pivot, k, v), index, value_bias=bias)
    assert_within_2x(ours, published(q, k_pivot, k, v, index, bias), exact)


def test_more_rows_than_a_launch_takes() -> None:
    pivot_of = (4,) * 11 + (11, 11, 13)
    q, k, v = qkv(3, 14, 17, 1)
    ours = ops.grounded_attention(q, k, v, pivot_of)
    exact = reference.grounded_attention(*wide(q, k, v), pivot_of)
    assert_within_2x(ours, grounded(q, k, v, pivot_of, None), exact)


@each_load
@each_softmax
@pytest.mark.parametrize(("block_m", "block_n"), [(16, 32), (32, 16), (64, 64)])
def test_tiles_and_loads(block_m: int, block_n: int, tma: bool, bound: float | None) -> None:
    tile = Tile(block_m=block_m, block_n=block_n, num_warps=4, num_stages=2, tma=tma)
    pivot_of = (0, 0, 0, 3)
    q, k, v = qkv(2, 4, 63, 1)
    jobs = grounded_jobs(pivot_of)
    ours, lse = launch.forward(q, k, None, v, None, jobs, fixed=bound is not None, tile=tile)
    exact = reference.grounded_attention(*wide(q, k, v), pivot_of)
    assert_within_2x(ours, grounded(q, k, v, pivot_of, None), exact)
    # Log-sum-exps, of one set of keys for pivots. A fixed offset sums probabilities rounded to float16.
    atol = 2**-11 if bound else 1e-5
    for row, slot, key_rows in ((0, 0, [0]), (1, 0, [1, 0]), (2, 0, [2, 0]), (3, 1, [3])):
        keys = torch.cat([k[r] for r in key_rows]).double()
        scores = torch.einsum("lhd,mhd->hlm", q[slot].double(), keys) / 8
        assert max_error(lse[row], scores.logsumexp(-1).float()) <= atol


def test_descriptors_are_used_where_they_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    tile = Tile(block_m=16, block_n=16, num_warps=4, num_stages=1, tma=True)
    q = torch.zeros(2, 9, 3, 64, dtype=torch.float16, device=DEVICE)
    assert launch.describe((q, q.transpose(1, 2).contiguous().transpose(1, 2)), (16, 16), tile)[0]
    assert launch.describe((q[:1],), (16,), tile)[0]
    assert not launch.describe((q,), (16,), Tile(block_m=16, block_n=16, num_warps=4, num_stages=1))[0]
    assert not launch.describe((q[:1].expand(2, -1, -1, -1),), (16,), tile)[0], "a repeated row"
    odd = torch.zeros(2, 9, 3, 65, dtype=torch.float16, device=DEVICE)[..., :64]
    assert not launch.describe((odd,), (16,), tile)[0], "rows 130 bytes apart"
    assert not launch.describe((q.view(-1)[1:65].view(1, 1, 1, 64),), (16,), tile)[0], "2 bytes off"


@each_load
def test_any_strides(tma: bool) -> None:
    """[B, H, L, D] storage, slices of a packed projection, every second token, repeated rows, odd strides."""
    pivot_of = (0, 0, 2)
    tile = Tile(block_m=16, block_n=16, num_warps=4, num_stages=1, tma=tma)
    for make in (
        lambda rows: torch.randn(rows, 2, 19, 64, device=DEVICE).half().transpose(1, 2),
        lambda rows: torch.randn(rows, 19, 3, 2, 64, device=DEVICE).half()[:, :, 1],
        lambda rows: torch.randn(2 * rows, 38, 2, 64, device=DEVICE).half()[::2, 1::2],
        lambda rows: torch.randn(1, 19, 2, 64, device=DEVICE).half().expand(rows, -1, -1, -1),
        lambda rows: torch.randn(rows, 19, 2, 67, device=DEVICE).half()[..., 2:66],
        lambda rows: torch.randn(rows, 19, 64, 2, device=DEVICE).half().transpose(2, 3),
    ):
        q, k, v = make(2), make(3), make(3)
        assert not v.is_contiguous()
        jobs = grounded_jobs(pivot_of)
        ours, _ = launch.forward(q, k, None, v, None, jobs, fixed=False, tile=tile)
        exact = reference.grounded_attention(*wide(q, k, v), pivot_of)
        assert_within_2x(ours, grounded(q, k, v, pivot_of, None), exact)


@pytest.mark.parametrize("louder", ["own", "pivot", "both"])
def test_scores_far_apart(louder: str) -> None:
    """Pairs and targets have maxima of their own: none may be lost where another row's keys dominate."""
    pivot_of = (0, 0, 0)
    q, k, v = qkv(1, 3, 40, 1)
    if louder != "own":
        k[0] *= 40
    if louder != "pivot":
        k[1:] *= 40
    ours = ops.grounded_attention(q, k, v, pivot_of)
    exact = reference.grounded_attention(*wide(q, k, v), pivot_of)
    assert_within_2x(ours, grounded(q, k, v, pivot_of, None), exact)
    assert ops.is_bounded(320.0, torch.float16) is False


def test_values_of_any_bias_dtype() -> None:
    q, k, v = qkv(2, 2, 5, 1)
    bias = bias_of(2, 1)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        ours = ops.attention(q, k, v, value_bias=bias.to(dtype))
        exact = reference.attention(*wide(q, k, v), value_bias=bias.to(dtype))
        assert_within_2x(ours, exact.half(), exact, atol=2e-3)


# Without a running maximum.


def test_when_the_offset_may_be_fixed() -> None:
    assert not ops.is_bounded(None, torch.bfloat16)
    assert ops.is_bounded(66.5, torch.bfloat16) and not ops.is_bounded(66.6, torch.bfloat16)
    assert ops.is_bounded(9.7, torch.float16) and not ops.is_bounded(9.71, torch.float16)
    assert not ops.is_bounded(1.0, torch.float32) and not ops.is_bounded(float("nan"), torch.bfloat16)
    assert not ops.is_bounded(-1.0, torch.bfloat16)


@pytest.mark.parametrize("signs", [(1.0, 1.0), (-1.0, -1.0), (1.0, -1.0)], ids=str)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 9.7), (torch.bfloat16, 66.5)], ids=str)
def test_fixed_offset_at_its_limit(
    signs: tuple[float, float], dtype: torch.dtype, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every score of a row at one end of the range, or the two sets of keys at opposite ends."""
    if not ON_GPU:
        monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", cast)
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
    assert ops.is_bounded(bound, dtype)
    direction = F.normalize(torch.randn(64, device=DEVICE), dim=0)
    length = math.sqrt(0.998 * bound * 8)  # less than the bound by more than bfloat16 rounds
    v = torch.randn(2, 40, 1, 64, device=DEVICE).to(dtype)
    q = (length * direction).to(dtype).expand(1, 40, 1, 64).contiguous()
    k = torch.stack([sign * length * direction for sign in signs]).to(dtype)
    k = k[:, None, None] * torch.linspace(0.97, 1, 40, device=DEVICE).to(dtype)[:, None, None]
    jobs = grounded_jobs((0, 0))
    ours, lse = launch.forward(q, k, None, v, None, jobs, fixed=True)
    assert lse.isfinite().all()
    exact = reference.grounded_attention(*wide(q, k, v), (0, 0))
    assert_within_2x(ours, grounded(q, k, v, (0, 0), None), exact)


# The interpreter's own bfloat16 does not do (triton 3.9): conversions cut off, products multiply the bits.


def cast(self, src, dst_type, original=interpreter.InterpreterBuilder.cast_impl):
    if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
        return original(self, src, dst_type)
    bits = torch.from_numpy(src.data).bfloat16().view(torch.uint16)
    return interpreter.TensorHandle(bits.numpy(), dst_type.scalar)


def dot(self, a, b, d, *precision, original=interpreter.InterpreterBuilder.create_dot):
    a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
    return original(self, a, b, d, *precision)


# The backward pass.


def gradients(form: Callable[..., Tensor], inputs: list[Tensor | None], weight: Tensor) -> list[Tensor]:
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    form(*leaves).backward(weight.to(leaves[0].dtype))
    return [x.grad for x in leaves if x is not None]


def check_gradients(ours: Callable, oracle: Callable, exact: Callable, inputs: list[Tensor | None]) -> None:
    shape = exact(*wide(*inputs)).shape
    weight = torch.randn(shape, device=DEVICE).half()
    results = gradients(ours, inputs, weight), gradients(oracle, inputs, weight)
    for mine, theirs, true in zip(*results, gradients(exact, wide(*inputs), weight), strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        # With one key the oracle is exact, zeros included, and ours keeps roundings of size 1.
        atol = 4 * 2**-11 * weight.abs().max().item() if shape[1] == 1 else 1e-6
        assert_within_2x(mine, theirs, true, atol=atol)


@each_softmax
@pytest.mark.parametrize(
    ("length", "length_k", "dim"), [(1, 1, 64), (17, 40, 64), (49, 49, 64), (33, 20, 128)]
)
def test_plain_backward(length: int, length_k: int, dim: int, bound: float | None) -> None:
    bias = bias_of(2, 1, dim) if length != 17 else None
    check_gradients(
        lambda q, k, v, b: ops.attention(q, k, v, value_bias=b, logit_bound=bound),
        plain,
        lambda q, k, v, b: reference.attention(q, k, v, value_bias=b),
        [*qkv(2, 2, length, 1, dim, length_k), bias],
    )


@pytest.mark.parametrize("pivot_of", [*GROUPINGS, (1,) * 10], ids=str)
def test_grounded_backward(pivot_of: tuple[int, ...]) -> None:
    rows = len(pivot_of)
    check_gradients(
        lambda q, k, v, b: ops.grounded_attention(q, k, v, pivot_of, value_bias=b),
        lambda q, k, v, b: grounded(q, k, v, pivot_of, b),
        lambda q, k, v, b: reference.grounded_attention(q, k, v, pivot_of, value_bias=b),
        [*qkv(len(set(pivot_of)), rows, 17, 1), bias_of(rows, 1)],
    )


@each_softmax
@pytest.mark.parametrize(("length", "dim"), [(1, 64), (63, 64), (40, 128)])
def test_grounded_backward_lengths(length: int, dim: int, bound: float | None) -> None:
    check_gradients(
        lambda q, k, v: ops.grounded_attention(q, k, v, (0, 0), logit_bound=bound),
        lambda q, k, v: grounded(q, k, v, (0, 0), None),
        lambda q, k, v: reference.grounded_attention(q, k, v, (0, 0)),
        qkv(1, 2, length, 1, dim),
    )


@pytest.mark.parametrize("shared", [False, True])
def test_extended_backward(shared: bool) -> None:
    q, k, v = qkv(3, 3, 40, 1)
    k_more, v_more = qkv(1 if shared else 3, 3, 23, 1)[1:]
    inputs = [q, k, v, k_more, v_more]
    check_gradients(ops.extended_attention, concatenated, reference.extended_attention, inputs)


@pytest.mark.parametrize("index", [(0,), (1, 0, 1), (1, 1)], ids=str)
def test_target_backward(index: tuple[int, ...]) -> None:
    """One of two pivots may have no target: its gradients are zeros, not whatever memory held."""
    rows = len(index)
    q, k, v = qkv(2, rows, 33, 1)
    k_pivot = qkv(2, 2, 33, 1)[1]
    check_gradients(
        lambda q, kp, k, v, b: ops.target_attention(q, kp, k, v, index, value_bias=b),
        lambda q, kp, k, v, b: published(q, kp, k, v, index, b),
        lambda q, kp, k, v, b: reference.target_attention(q, kp, k, v, index, value_bias=b),
        [q, k_pivot, k, v, bias_of(rows, 1)],
    )


@each_load
@pytest.mark.parametrize(("block_m", "block_n"), [(16, 32), (32, 16)])
def test_backward_tiles(block_m: int, block_n: int, tma: bool) -> None:
    tile = Tile(block_m=block_m, block_n=block_n, num_warps=4, num_stages=1, tma=tma)
    q, k, v = qkv(1, 3, 40, 1)
    jobs = grounded_jobs((0, 0, 0))
    out, lse = launch.forward(q, k, None, v, None, jobs, fixed=False)
    # [B, H, L, D] storage, as a transposed consumer would hand it back.
    grad = torch.randn(3, 1, 40, 64, device=DEVICE).half().transpose(1, 2)
    args = grad, q, k, None, v, out, lse, jobs
    dq, dk, _, dv = launch.backward(*args, dkv_tile=tile, dq_tile=tile)
    theirs = gradients(lambda q, k, v: grounded(q, k, v, (0, 0, 0), None), [q, k, v], grad)
    true = gradients(lambda q, k, v: reference.grounded_attention(q, k, v, (0, 0, 0)), wide(q, k, v), grad)
    for a, b, c in zip((dq, dk, dv), theirs, true, strict=True):
        assert_within_2x(a, b, c)


def test_no_backward_launch_adds_to_a_sum_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that would be a race; the interpreter, which runs programs one by one, would not show it."""
    launches: list[list[jobs.Job]] = []

    def pack(some: list[jobs.Job]) -> tuple[int, ...]:
        launches.append(some)
        return jobs.pack(some)

    q, k, v = (x.requires_grad_() for x in qkv(2, 6, 5, 1))
    out = ops.grounded_attention(q, k, v, (0, 0, 0, 3, 3, 0))
    monkeypatch.setattr(launch, "pack", pack)
    out.sum().backward()
    assert sum(job.form == tiles.TARGET for some in launches for job in some) == 2 * 4
    for some in launches:
        for row_of in (lambda job: job.q_row, lambda job: job.row):
            assert len({row_of(job) for job in some}) == len(some)


def test_gradients_that_are_not_laid_out_like_outputs() -> None:
    """`sum` hands back one number seen as a tensor: stride 0 everywhere."""
    q, k, v = (x.requires_grad_() for x in qkv(2, 2, 9, 1))
    ops.attention(q, k, v).sum().backward()
    true = gradients(reference.attention, wide(q, k, v), torch.ones(2, 9, 1, 64, device=DEVICE))
    torch.testing.assert_close(v.grad.float(), true[2], atol=5e-3, rtol=5e-3)


def test_a_bias_alone_can_be_trained() -> None:
    q, k, v = qkv(2, 2, 9, 1)
    bias = bias_of(2, 1).requires_grad_()
    ops.attention(q, k, v, value_bias=bias).backward(torch.ones(2, 9, 1, 64, dtype=q.dtype, device=DEVICE))
    assert torch.equal(bias.grad, torch.full_like(bias, 9.0))


# What every form owes.

FORMS: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "plain": lambda x: ops.attention(x[1], x[2], x[3], value_bias=x[4]),
    "target": lambda x: ops.target_attention(x[0], x[5], x[2], x[3], (0, 0, 0), value_bias=x[4]),
    "grounded": lambda x: ops.grounded_attention(x[0], x[2], x[3], (1, 1, 1), value_bias=x[4]),
    "extended": lambda x: ops.extended_attention(x[1], x[2], x[3], x[0], x[5], value_bias=x[4]),
    "grounded, two pivots": lambda x: ops.grounded_attention(x[5], x[2], x[3], (0, 0, 2), value_bias=x[4]),
}


def inputs_of(form: str) -> list[Tensor]:
    q, k, v = qkv(1, 3, 35, 1)
    further = qkv(2 if form == "grounded, two pivots" else 1, 3, 35, 1)[0]
    return [q, k.flip(1).contiguous(), k, v, bias_of(3, 1), further]


def run(form: str, inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = FORMS[form](leaves)
    out.backward(torch.linspace(-1, 1, out.numel(), device=DEVICE).view_as(out).half())
    return [out, *(x.grad for x in leaves if x.grad is not None)]


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_read_before_it_is_written(form: str, request: pytest.FixtureRequest) -> None:
    inputs = inputs_of(form)
    clean = run(form, inputs)
    request.getfixturevalue("poisoned")
    assert torch.empty(1).isnan().all()
    dirty = run(form, inputs)
    assert len(clean) == len(dirty) >= 5
    for a, b in zip(clean, dirty, strict=True):
        assert a.isfinite().all() and torch.equal(a, b)


@pytest.mark.parametrize("form", FORMS)
def test_the_same_bits_every_time(form: str) -> None:
    inputs = inputs_of(form)
    for a, b in zip(run(form, inputs), run(form, inputs), strict=True):
        assert torch.equal(a, b)


def test_operators_are_registered_completely() -> None:
    """Schemas, fake implementations, gradients and traced gradients, as PyTorch itself checks them."""
    q, k, v = (x.requires_grad_() for x in qkv(1, 2, 17, 1))
    bias = bias_of(2, 1)
    k_pivot = k.detach()[:1].clone().requires_grad_()
    own = k.detach().clone().requires_grad_()
    torch.library.opcheck(ops._attention, (own, k, None, v, None, None, True))
    q_, k_, v_, bias_ = (x.detach() for x in (own, k, v, bias))
    torch.library.opcheck(ops._attention, (q_, k_, None, v_, None, bias_, False))
    torch.library.opcheck(ops._attention, (q, k, k_pivot, v, [0, 0], None, False))
    torch.library.opcheck(ops._attention, (q, k, None, v, [1, 1], None, False))
    more = [x.detach().clone().requires_grad_() for x in (k_pivot, k_pivot)]
    torch.library.opcheck(ops._extended_attention, (own, k, v, *more, False))


@pytest.mark.parametrize(
    ("form", "backend"), [*((form, "aot_eager") for form in FORMS), ("grounded", "eager")]
)
def test_compiled_without_a_break(form: str, backend: str) -> None:
    inputs = inputs_of(form)
    plainly = run(form, inputs)
    compiled = torch.compile(FORMS[form], backend=backend, fullgraph=True)
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = compiled(leaves)
    out.backward(torch.linspace(-1, 1, out.numel(), device=DEVICE).view_as(out).half())
    for a, b in zip(plainly, [out, *(x.grad for x in leaves if x.grad is not None)], strict=True):
        assert torch.equal(a, b)


def test_what_cannot_run_says_so() -> None:
    q = torch.zeros(1, 4, 1, 64, dtype=torch.float16, device=DEVICE)
    with pytest.raises(ValueError, match="head dims.*not 32"):
        ops.attention(*[q[..., :32].contiguous()] * 3)
    with pytest.raises(ValueError, match="float32"):
        ops.attention(*[q.float()] * 3)
    with pytest.raises(ValueError, match=r"all of q, k, v must be torch.float16"):
        ops.attention(q, q, q.float())
    assert select.why_not_triton(torch.device("meta"), torch.float16, 64) is not None
    assert select.why_not_triton(torch.device(DEVICE), torch.float16, 64) is None


# Tiles and schedule: no kernel runs.


@pytest.mark.parametrize("family", [tiles.HOPPER, tiles.PORTABLE, tiles.INTERPRETER])
def test_the_table_covers_every_case(family: str) -> None:
    device = tiles.Device(family=family, num_sms=132)
    for head_dim in select.HEAD_DIMS:
        for fixed in (False, True):
            for form in tiles.LONGEST_FIRST:
                assert tiles.forward_tile(device, [form], head_dim, fixed).block_m >= 16
        for kernel in (tiles.DKV, tiles.DQ):
            assert tiles.backward_tile(device, kernel, head_dim).block_n >= 16
    both = tiles.forward_tile(device, [tiles.TARGET, tiles.PAIR], 128, True)
    assert both == tiles.forward_tile(device, [tiles.PAIR], 128, True)
    assert all(row.reason for row in tiles.TABLE)
    with pytest.raises(ValueError, match="head dim 96"):
        tiles.forward_tile(tiles.Device(family=tiles.HOPPER, num_sms=1), [tiles.PLAIN], 96, True)


@pytest.mark.parametrize("num_programs", [3, 132, 264])
@pytest.mark.parametrize(
    "forms", [((288, 2),), ((288, 4),), ((288, 4), (1440, 3)), ((7, 4), (1, 2)), ((1, 2),)]
)
@pytest.mark.parametrize("num_blocks", [1, 2, 24, 72])
def test_the_end_of_the_grid(num_blocks: int, forms: tuple[tuple[int, int], ...], num_programs: int) -> None:
    count = sum(number for number, _ in forms)
    tail = tiles.plan_tail(forms, num_programs, num_blocks)
    assert tail.num_slots % tail.num_parts == 0
    assert tail.num_whole + tail.num_slots // tail.num_parts == count
    assert 1 <= tail.num_parts <= num_blocks
    assert tiles.plan_tail(forms, num_programs, num_blocks, 1) == Tail(num_whole=count)


def test_the_machine_is_full_at_512_pixels() -> None:
    """24 heads, 1536 tokens, 132 multiprocessors: 288 tiles are 2.2 waves, and the last one is cut up."""
    tail = tiles.plan_tail(((288, 4),), 132, 24)
    assert (tail.num_whole, tail.num_slots // tail.num_parts) == (264, 24)
    assert 0.9 * 132 <= tail.num_slots <= 132


@each_softmax
@pytest.mark.parametrize("pivot_of", [(0, 1), (1, 1), (0, 0, 0)], ids=["plain", "pair", "pair and target"])
def test_split_tiles(pivot_of: tuple[int, ...], bound: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of the keys, merged, give what whole tiles give. The split ones include both rows of pairs."""
    tile = Tile(block_m=16, block_n=16, num_warps=4, num_stages=1)
    q, k, v = qkv(len(set(pivot_of)), len(pivot_of), 70, 1)
    bias = bias_of(len(pivot_of), 1)
    args = q, k, None, v, bias, grounded_jobs(pivot_of)
    whole = launch.forward(*args, fixed=bound is not None, tile=tile)
    total = 5 * (2 if len(pivot_of) == 3 else len(set(pivot_of)))
    plan = Tail(num_whole=1, num_parts=3, num_slots=3 * (total - 1))
    monkeypatch.setattr(tiles, "plan_tail", lambda *_: plan)
    parts = launch.forward(*args, fixed=bound is not None, tile=tile)
    for a, b, tolerance in zip(parts, whole, (2e-3, 1e-5 if bound is None else 2**-11), strict=True):
        assert max_error(a, b.float()) <= tolerance
    exact = reference.grounded_attention(*wide(q, k, v), pivot_of, value_bias=bias)
    assert_within_2x(parts[0], grounded(q, k, v, pivot_of, bias), exact)


def test_jobs_survive_packing() -> None:
    some = grounded_jobs((3, 3, 2, 3, 5, 5))
    assert [(job.form, job.q_row, job.pivot_row, job.row) for job in some] == [
        (tiles.PLAIN, 0, 2, 2),
        (tiles.PAIR, 1, 3, 0),
        (tiles.TARGET, 1, 3, 1),
        (tiles.PAIR, 2, 5, 4),
    ]
    chunks = jobs.chunks(some * 5)
    assert sorted(str(job) for chunk in chunks for job in chunk) == sorted(map(str, some * 5))
    sizes = [len(chunk) for chunk in chunks]
    assert max(sizes) <= jobs.JOBS_PER_LAUNCH and max(sizes) - min(sizes) <= 1
    packed = jobs.pack(some)
    assert len(packed) == jobs.JOBS_PER_LAUNCH
    # One type and one divisibility, whatever the rows: nothing is compiled twice.
    assert all(2**62 < number < 2**63 and number % 2 for number in packed)
    assert packed[1] >> 1 & 0xFFFFF == 1 and packed[1] >> 21 & 0xFFFFF == 3 and packed[1] >> 41 & 0xFFFFF == 0
    with pytest.raises(ValueError, match="1048576 rows"):
        jobs.pack([jobs.Job(form=tiles.PLAIN, q_row=2**20, pivot_row=0, row=0)])
