"""Attention: every form against the float32 definition, and the one public interface."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bokehflux.attention import Grounded, OnStored, PivotQuery, Plain, Recorded
from bokehflux.kernels.attention import interface, joins, reference, sdpa, select, stock, tiles
from bokehflux.kernels.attention.select import FOR_GRADIENTS, Choice
from bokehflux.sampling.pivot_cache import PivotCache
from tests.helpers import assert_within_2x, max_error
from tests.tiny import tiny_pipeline

ON_CPU = ["sdpa", "auto"]
GROUPINGS = [
    (0, 0),
    (1, 1),
    (0, 0, 2, 2, 4),
    (3, 3, 3, 3),
    (0, 1, 2),
    (2, 1, 2, 1, 2),
    (0, 0, 0, 3, 3),
    (4, 3, 3, 3, 4),
]
every_grouping = pytest.mark.parametrize("pivot_of", GROUPINGS, ids=str)
every_backend = pytest.mark.parametrize("backend", ON_CPU)


def qkv(
    rows: int, length: int, heads: int = 2, dim: int = 16, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Queries long enough that the softmax is far from uniform."""
    q, k, v = (torch.randn(rows, length, heads, dim) for _ in range(3))
    return [(2 * q).to(dtype), k.to(dtype), v.to(dtype)]


def grounded(
    form: ModuleType, q: Tensor, k: Tensor, v: Tensor, pivot_of: tuple[int, ...], **options
) -> Tensor:
    """The form's grounded attention, given only those queries that any form may use."""
    return form.grounded_attention(q[sorted(set(pivot_of))], k, v, pivot_of, **options)


def published_grounding(q: Tensor, k: Tensor, v: Tensor, pivot_of: tuple[int, ...]) -> Tensor:
    """Doubled keys and values through PyTorch's attention: the oracle for low precision."""
    rows = list(pivot_of)
    args = q[rows], torch.cat([k, k[rows]], dim=1), torch.cat([v, v], dim=1)
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in args)).transpose(1, 2)


def double(*tensors: Tensor) -> list[Tensor]:
    return [t.double() for t in tensors]


@every_backend
@pytest.mark.parametrize("length", [1, 63, 100])
def test_attention_is_the_definition(backend: str, length: int) -> None:
    q, k, v = qkv(2, length)
    bias = torch.randn(2, 2, 16)
    exact = reference.attention(*double(q, k, v), value_bias=bias.double())
    ours = interface.attention(q, k, v, value_bias=bias, backend=backend)
    assert ours.shape == q.shape and ours.dtype == q.dtype
    torch.testing.assert_close(ours.double(), exact, atol=3e-6, rtol=0)


@every_backend
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(("length", "further", "shared"), [(1, 1, True), (63, 20, False), (20, 63, True)])
def test_extended_attention_is_the_definition(
    backend: str, length: int, further: int, shared: bool, gradients: bool
) -> None:
    q, k, v = qkv(2, length)
    k_more, v_more = qkv(1 if shared else 2, further)[1:]
    bias = torch.randn(2, 2, 16)
    exact = reference.extended_attention(*double(q, k, v, k_more, v_more), value_bias=bias.double())
    v_more.requires_grad_(gradients)
    ours = interface.extended_attention(q, k, v, k_more, v_more, value_bias=bias, backend=backend)
    assert ours.requires_grad == gradients
    torch.testing.assert_close(ours.detach().double(), exact, atol=3e-6, rtol=0)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_mixed_types_are_refused(backend: str) -> None:
    """A stock kernel called by itself may read float32 as if it were bfloat16, and say nothing."""
    q, k, v = qkv(2, 5)
    low = k.bfloat16()
    calls = [
        (interface.attention, (q, low, v)),
        (interface.extended_attention, (q, k, v, low, v)),
        (interface.target_attention, (q[:1], low[:1], k, v, [0, 0])),
        (interface.target_attention, (q[:1].bfloat16(), low[:1], k, v, [0, 0])),
        (interface.grounded_attention, (q[:1].bfloat16(), k.clone().requires_grad_(), v, [0, 0])),
    ]
    for function, args in calls:
        with pytest.raises(ValueError, match=r"one dtype, got torch.bfloat16 and torch.float"):
            function(*args, backend=backend)


def test_further_keys_that_do_not_fit_are_refused() -> None:
    q, k, v = qkv(3, 5)
    for rows, heads in ((2, 2), (3, 1)):
        k_more, v_more = qkv(rows, 4, heads)[1:]
        with pytest.raises(ValueError, match="k_more"):
            interface.extended_attention(q, k, v, k_more, v_more)
    with pytest.raises(ValueError, match="k_more and v_more"):
        interface.extended_attention(q, k, v, k[:, :4], v)


def test_reference_by_hand() -> None:
    """Two tokens, one head: numbers worked out on paper."""
    q = torch.tensor([[1.0], [0.0]])[None, :, None]
    k = torch.tensor([[0.0], [2.0]])[None, :, None]
    v = torch.tensor([[10.0], [20.0]])[None, :, None]
    share = 1 / (1 + torch.tensor(-2.0).exp())
    out = reference.attention(q, k, v, value_bias=torch.full((1, 1, 1), 5.0)).flatten()
    torch.testing.assert_close(out, torch.stack([15 + 10 * share, torch.tensor(20.0)]))


def test_reference_keeps_float64() -> None:
    q, k, v = double(*qkv(1, 5))
    assert reference.attention(q, k, v).dtype == torch.float64
    assert max_error(reference.attention(q.float(), k.float(), v.float()), reference.attention(q, k, v)) > 0


@every_backend
@every_grouping
@pytest.mark.parametrize("length", [1, 63])
def test_grounded_attention_is_the_definition(backend: str, pivot_of: tuple[int, ...], length: int) -> None:
    q, k, v = qkv(len(pivot_of), length)
    bias = torch.randn(len(pivot_of), 2, 16)
    exact = grounded(reference, *double(q, k, v), pivot_of, value_bias=bias.double())
    ours = grounded(interface, q, k, v, pivot_of, value_bias=bias, backend=backend)
    assert ours.shape == q.shape and ours.dtype == q.dtype
    torch.testing.assert_close(ours.double(), exact, atol=3e-6, rtol=0)


@every_backend
@every_grouping
def test_pivots_come_out_as_plain_attention(backend: str, pivot_of: tuple[int, ...]) -> None:
    q, k, v = qkv(len(pivot_of), 37)
    ours = grounded(interface, q, k, v, pivot_of, backend=backend)
    plain = interface.attention(q, k, v, backend=backend)
    for row, pivot in enumerate(pivot_of):
        if row == pivot:
            torch.testing.assert_close(ours[row], plain[row], atol=1e-6, rtol=0)
        else:
            assert max_error(ours[row], plain[row]) > 0.1


@every_backend
def test_grounded_attention_at_odd_length_100(backend: str) -> None:
    q, k, v = qkv(3, 100, heads=1)
    exact = grounded(reference, *double(q, k, v), (1, 1, 1))
    ours = grounded(interface, q, k, v, (1, 1, 1), backend=backend)
    torch.testing.assert_close(ours.double(), exact, atol=3e-6, rtol=0)


def test_grounding_is_a_mix_of_two_attentions_by_their_log_sum_exp() -> None:
    """The identity behind the form without concatenation, in float64."""
    q, k, v = double(*qkv(2, 21))
    q_pivot = q[[0]]
    scores = [torch.einsum("blhd,bmhd->bhlm", q_pivot, keys) / 4 for keys in (k[[1]], k[[0]])]
    own, other = (torch.einsum("bhlm,bmhd->blhd", s.softmax(-1), v[[1]]) for s in scores)
    own_lse, other_lse = (s.logsumexp(-1).transpose(1, 2)[..., None] for s in scores)
    total = torch.logaddexp(own_lse, other_lse)
    mixed = (own_lse - total).exp() * own + (other_lse - total).exp() * other
    torch.testing.assert_close(grounded(reference, q, k, v, (0, 0))[1:], mixed)


def test_log_sum_exp() -> None:
    q, k, v = qkv(2, 63)
    out, lse = sdpa.attention_with_lse(q, k, v)
    scores = torch.einsum("blhd,bmhd->blhm", *double(q, k)) / 4
    assert lse.shape == (2, 63, 2) and lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.double(), reference.attention(*double(q, k, v)), atol=3e-6, rtol=0)


@every_backend
@pytest.mark.parametrize("pivot_of", [(0, 0, 0), (0, 0, 2, 2, 4)], ids=str)
@pytest.mark.parametrize("length", [63, 100])
def test_bfloat16(backend: str, pivot_of: tuple[int, ...], length: int) -> None:
    q, k, v = qkv(len(pivot_of), length, dtype=torch.bfloat16)
    exact = grounded(reference, q.float(), k.float(), v.float(), pivot_of)
    oracle = published_grounding(q, k, v, pivot_of)
    with torch.no_grad():
        ours = grounded(interface, q, k, v, pivot_of, backend=backend)
    assert ours.dtype == torch.bfloat16
    assert_within_2x(ours, oracle, exact)
    plain = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
    exact_plain = reference.attention(q.float(), k.float(), v.float())
    assert_within_2x(interface.attention(q, k, v, backend=backend), plain, exact_plain)


@every_backend
@every_grouping
def test_gradients_and_both_forms(backend: str, pivot_of: tuple[int, ...]) -> None:
    """With gradients another code path runs: same output, and the gradients of the definition."""
    bias = torch.randn(len(pivot_of), 2, 16)
    inputs = [*qkv(len(pivot_of), 13), bias]
    weight = torch.randn(len(pivot_of), 13, 2, 16)
    ours = [t.clone().requires_grad_() for t in inputs]
    theirs = [t.double().requires_grad_() for t in inputs]
    out = grounded(interface, *ours[:3], pivot_of, value_bias=ours[3], backend=backend)
    (out * weight).sum().backward()
    exact = grounded(reference, *theirs[:3], pivot_of, value_bias=theirs[3])
    (exact * weight).sum().backward()
    with torch.no_grad():
        quiet = grounded(interface, *ours[:3], pivot_of, value_bias=ours[3], backend=backend)
    assert not quiet.requires_grad
    torch.testing.assert_close(out.detach(), quiet, atol=3e-6, rtol=0)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, atol=2e-5, rtol=1e-4)


def test_stock_attention_with_gradients_is_one_node() -> None:
    """A whole graph under a compiler, right by PyTorch's own checks, with the work it is credited with."""
    q, k, v = (x.requires_grad_() for x in qkv(3, 10))
    args = q[:1].detach().requires_grad_(), k, v, [0, 0, 0]
    torch.library.opcheck(stock._grounded, args)
    compiled = torch.compile(stock.grounded_attention, backend="aot_eager", fullgraph=True)
    gradients = [
        torch.autograd.grad(f(*args).square().sum(), args[:3]) for f in (compiled, stock.grounded_attention)
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    stock.register_flops()
    with FlopCounterMode(display=False) as counter:
        stock._grounded(*args)[0].sum().backward()
    assert counter.get_total_flops() == 7 * 2 * 5 * 2 * 10**2 * 16  # 2 + 5 products, 3 own and 2 pivots' keys


@every_backend
def test_inputs_need_not_be_contiguous(backend: str) -> None:
    """[B, H, L, D] storage seen as [B, L, H, D], rows of a larger batch, and every second token."""
    wide = [torch.randn(6, 2, 40, 16).transpose(1, 2)[::2, 1::2] for _ in range(3)]
    assert not any(t.is_contiguous() for t in wide)
    exact = grounded(reference, *double(*wide), (1, 1, 2))
    ours = grounded(interface, *wide, (1, 1, 2), backend=backend)
    torch.testing.assert_close(ours.double(), exact, atol=3e-6, rtol=0)
    shared = [t[:1].expand(3, -1, -1, -1) for t in wide]
    torch.testing.assert_close(
        interface.attention(*shared, backend=backend).double(),
        reference.attention(*double(*shared)),
        atol=3e-6,
        rtol=0,
    )


@settings(max_examples=25)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=5),
    st.integers(1, 40),
    st.integers(1, 3),
    st.sampled_from([8, 16, 24, 64]),
    st.booleans(),
)
def test_any_shape(wishes: list[int], length: int, heads: int, dim: int, with_bias: bool) -> None:
    """Any grouping: rows take the first row that wished for the same group as their pivot."""
    pivot_of = tuple(wishes.index(wish) for wish in wishes)
    q, k, v = qkv(len(pivot_of), length, heads, dim)
    bias = torch.randn(len(pivot_of), heads, dim) if with_bias else None
    exact = grounded(
        reference, *double(q, k, v), pivot_of, value_bias=None if bias is None else bias.double()
    )
    ours = grounded(interface, q, k, v, pivot_of, value_bias=bias)
    torch.testing.assert_close(ours.double(), exact, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("rows", "is_view"), [((2, 2, 2), True), ((1, 2, 3), True), ((3, 1), False), ((0, 0, 1), False)], ids=str
)
def test_take_rows(rows: tuple[int, ...], is_view: bool) -> None:
    x = torch.randn(4, 3)
    taken = joins.take_rows(x, rows)
    assert torch.equal(taken, x[list(rows)])
    assert (taken.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()) == is_view


@pytest.mark.parametrize(
    ("rows", "runs"),
    [
        ([1, 2, 3], [(slice(0, 3), slice(1, 4))]),
        ([1, 3, 4], [(slice(0, 1), slice(1, 2)), (slice(1, 3), slice(3, 5))]),
        ([2, 2], [(slice(0, 1), slice(2, 3)), (slice(1, 2), slice(2, 3))]),
    ],
)
def test_runs_and_sums_of_rows(rows: list[int], runs: list[tuple[slice, slice]]) -> None:
    assert joins.runs(rows) == runs
    x = torch.randn(5, 40).bfloat16()
    assert torch.equal(joins.sum_rows(x, rows), x[rows].float().sum(0))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("shape", [(1, 33, 2, 24), (3, 64, 1, 128), (2, 700, 2, 8)], ids=str)
def test_two_softmaxes_are_joined_in_triton(shape: tuple[int, ...]) -> None:
    """As by PyTorch's operators, even where one of the sets has all of the weight."""
    from bokehflux.kernels.attention import triton_joins

    batch, length, heads, _ = shape
    values = [torch.randn(shape).half() for _ in range(2)]
    sums = [torch.randn(batch, heads, length) * 60 for _ in range(2)]
    ours, lse = (torch.cat([torch.full_like(x[:1], 7), x]) for x in (values[0], sums[0]))
    triton_joins.merge_(ours[1:], lse[1:], values[1], sums[1])
    exact = joins.merge(
        *((x.double(), s.double().transpose(1, 2)) for x, s in zip(values, sums, strict=True))
    )
    torch.testing.assert_close(ours[1:].double(), exact, atol=2e-3, rtol=0)
    torch.testing.assert_close(lse[1:], torch.logaddexp(*sums), atol=1e-5, rtol=1e-6)
    assert (ours[0] == 7).all() and (lse[0] == 7).all()


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("pivot_of", [(0, 0), (0, 0, 0, 0), (0, 0, 0, 3, 4, 4), (0, 1)], ids=str)
def test_gradients_are_joined_in_triton(pivot_of: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """As by PyTorch's operators, in float32 sums rounded once."""
    from bokehflux.kernels.attention import triton_joins

    rows, targets = len(pivot_of), sum(row != pivot for row, pivot in enumerate(pivot_of))
    own, more = ([torch.randn(n, 37, 3, 24).half() for _ in "qkv"] for n in (rows, targets))
    exact = [x.double() for x in own]
    dq = joins.join_gradients(exact, [x.double() for x in more], pivot_of)
    launched: list[int] = []
    whole = triton_joins.join_gradients_
    monkeypatch.setattr(triton_joins, "join_gradients_", lambda *x: (launched.append(len(x)), whole(*x)))
    monkeypatch.setattr(joins.dispatch, "takes", lambda *_: True)
    ours = joins.join_gradients(own, more, pivot_of)
    assert len(launched) == len(set(pivot_of))
    for found, true in zip((ours, *own[1:]), (dq, *exact[1:]), strict=True):
        torch.testing.assert_close(found.double(), true, atol=1e-5, rtol=2**-11)


@pytest.mark.parametrize(
    "shapes",
    [
        [(4, 2, 8)] * 3,
        [(1, 4, 2, 8), (1, 4, 2, 8), (1, 5, 2, 8)],
        [(1, 4, 2, 8), (2, 4, 2, 8), (2, 4, 2, 8)],
        [(1, 4, 2, 8), (1, 4, 3, 8), (1, 4, 3, 8)],
        [(1, 4, 2, 8), (1, 4, 2, 6), (1, 4, 2, 6)],
    ],
    ids=str,
)
def test_wrong_shapes(shapes: list[tuple[int, ...]]) -> None:
    tensors = [torch.zeros(shape) for shape in shapes]
    with pytest.raises(ValueError, match=r"expected q, k, v in \[B, L, H, D\]") as caught:
        interface.attention(*tensors)
    assert str(tuple(shapes[1])) in str(caught.value)
    with pytest.raises(ValueError, match=r"expected q, k, v in|expected the queries|but k has"):
        interface.grounded_attention(*tensors, (0,))


@pytest.mark.parametrize("shape", [(2, 8), (1, 2, 8), (2, 8, 2), (2, 1, 2, 8)])
def test_wrong_value_bias(shape: tuple[int, ...]) -> None:
    q = torch.zeros(2, 4, 2, 8)
    with pytest.raises(ValueError, match=r"value_bias \[B, H, D\]"):
        interface.attention(q, q, q, value_bias=torch.zeros(shape))


@pytest.mark.parametrize("pivot_of", [(1, 0), (0, 0, 1), (2, 2), (0, -1), (-1,)], ids=str)
def test_rows_must_be_grounded_on_pivots(pivot_of: tuple[int, ...]) -> None:
    q = torch.zeros(len(pivot_of), 3, 1, 8)
    with pytest.raises(ValueError, match="not a pivot"):
        interface.grounded_attention(q, q, q, pivot_of)
    for spec in (Grounded, PivotQuery):
        with pytest.raises(ValueError, match="not a pivot"):
            spec(pivot_of=pivot_of)


def test_pivots_must_be_as_many_as_rows() -> None:
    q = torch.zeros(3, 4, 1, 8)
    with pytest.raises(ValueError, match="names 2 rows, but k has 3"):
        grounded(interface, q, q, q, (0, 0))


def test_unknown_backend_names_the_known_ones() -> None:
    q = torch.zeros(1, 4, 1, 8)
    with pytest.raises(ValueError, match=r"unknown attention backend 'flashy'.*'reference', 'sdpa'"):
        interface.attention(q, q, q, backend="flashy")
    with pytest.raises(ValueError, match="flashy"):
        grounded(interface, q, q, q, (0,), backend="flashy")


def test_a_backend_of_your_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """`BACKENDS` is a dict: anything with its functions can be registered under a name."""
    calls = []

    def mine(*args: object, **options: object) -> Tensor:
        calls.append((args[3:], options))
        return args[0]  # type: ignore[return-value]

    monkeypatch.setitem(select.BACKENDS, "mine", SimpleNamespace(attention=mine, grounded_attention=mine))
    q, k, v = qkv(2, 4)
    bias = torch.ones(2, 2, 16)
    assert Plain(backend="mine")(q, k, v) is q
    pivot = q[:1]
    assert Grounded(pivot_of=(0, 0), backend="mine").for_block(3, bias)(pivot, k, v) is pivot
    assert calls == [((), {"value_bias": None}), (((0, 0),), {"value_bias": bias})]


def test_a_pipeline_is_told_its_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(select.BACKENDS, "sdpa", SimpleNamespace())  # what "auto" would take
    options = {"bokeh_pivot": 15, "num_inference_steps": 2, "backend": "reference"}
    assert len(tiny_pipeline().generate("a cup", [8, 25], **options).images) == 2


def test_the_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    select._log_choice.cache_clear()  # tests before may have logged
    q, k, v = qkv(1, 4)
    with caplog.at_level(logging.INFO, logger=select.__name__):
        interface.attention(q, k, v, backend="sdpa")
        assert not caplog.records
        for _ in range(3):
            interface.attention(q, k, v)
            grounded(interface, q, k, v, (0,))
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("INFO", "attention backend for cpu: sdpa (our kernels need an NVIDIA GPU, not cpu)")
    ]


def test_specifications() -> None:
    q, k, v = qkv(3, 9)
    bias = torch.randn(3, 2, 16)
    pivots = (1, 1, 1)
    torch.testing.assert_close(Plain(value_bias=bias)(q, k, v), reference.attention(q, k, v, value_bias=bias))
    torch.testing.assert_close(
        Grounded(pivot_of=pivots, value_bias=bias)(q[1:2], k, v),
        grounded(reference, q, k, v, pivots, value_bias=bias),
    )
    torch.testing.assert_close(
        PivotQuery(pivot_of=pivots, value_bias=bias)(q[1:2], k, v),
        reference.attention(q[[1, 1, 1]], k, v, value_bias=bias),
    )


def test_for_block_copies() -> None:
    bias = torch.randn(2, 2, 16)
    spec = Grounded(pivot_of=(0, 0), backend="reference")
    shifted = spec.for_block(4, bias)
    assert shifted.value_bias is bias and spec.value_bias is None
    assert (shifted.pivot_of, shifted.backend) == ((0, 0), "reference")
    other = spec.for_block(5, bias)
    assert vars(shifted) == vars(other), "blocks share compiled code: their numbers must not show"
    q, k, v = qkv(2, 5)
    torch.testing.assert_close(shifted(q[:1], k, v), spec(q[:1], k, v) + bias[:, None])


def test_query_rows() -> None:
    """Only pivots are asked for their queries."""
    assert Plain().query_rows() is None
    assert Grounded(pivot_of=(2, 2, 2)).query_rows() == PivotQuery(pivot_of=(2, 2, 2)).query_rows() == (2,)
    assert Grounded(pivot_of=(0, 0, 2, 2, 4)).query_rows() == (0, 2, 4)


def test_the_queries_of_targets_are_refused() -> None:
    q, k, v = qkv(3, 5)
    with pytest.raises(ValueError, match="queries of the 1 pivots alone"):
        interface.grounded_attention(q, k, v, (0, 0, 0))


@every_backend
def test_targets_on_pivots_elsewhere(backend: str) -> None:
    """`target_attention` gives targets what they get in one batch with their pivots."""
    q, k, v = qkv(5, 21)
    bias = torch.randn(5, 2, 16)
    together = grounded(reference, *double(q, k, v), (0, 1, 0, 1, 1), value_bias=bias.double())
    ours = interface.target_attention(
        q[:2], k[:2], k[2:], v[2:], (0, 1, 1), value_bias=bias[2:], backend=backend
    )
    torch.testing.assert_close(ours.double(), together[2:], atol=3e-6, rtol=0)


@pytest.mark.parametrize("index", [(0, 1), (0, 1, 2), (0, -1, 0), (0, 0, 0, 0)], ids=str)
def test_targets_need_pivots_that_exist(index: tuple[int, ...]) -> None:
    q, k, v = qkv(3, 5)
    with pytest.raises(ValueError, match="expected 3 pivots below 2"):
        interface.target_attention(q[:2], k[:2], k, v, index)


@pytest.mark.parametrize("length", [1, 4, 6])
@pytest.mark.parametrize("part", ["both", "k_pivot"])
def test_pivots_are_as_long_as_their_targets(length: int, part: str) -> None:
    """Kernels bound their reads of a pivot's keys by the targets' length."""
    q, k, v = qkv(3, 5)
    pivot, k_pivot, _ = qkv(2, length)
    with pytest.raises(ValueError, match="with equal L, H, D; got .*, .2, [146], 2, 16., .3, 5, 2, 16."):
        interface.target_attention(pivot if part == "both" else q[:2], k_pivot, k, v, (0, 0, 1))


def test_stored_pivot() -> None:
    """What `Recorded` stores, `OnStored` reads: targets come out as in one batch with the pivot."""
    store = PivotCache()
    q, k, v = qkv(4, 9)
    spec = Recorded(pivot_of=(0, 0), store=store, step=3).for_block(7, None)
    assert spec.query_rows() == (0,)
    first = spec(q[:1], k[:2], v[:2])
    rest = OnStored(store=store, step=3).for_block(7, None)(q[:0], k[2:], v[2:])
    together = grounded(reference, q, k, v, (0, 0, 0, 0))
    torch.testing.assert_close(torch.cat([first, rest]), together, atol=3e-6, rtol=0)
    with pytest.raises(ValueError, match="holds nothing for step 3, block 8"):
        OnStored(store=store, step=3).for_block(8, None)(q[:0], k[2:], v[2:])


@pytest.mark.parametrize("device", [None, "cpu", "cpu:0"])
def test_a_cache_holds_no_more_than_the_pivot(device: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where "cuda" and "cuda:0" differ, and a tensor is moved between them without a copy."""
    monkeypatch.setattr(Tensor, "to", lambda x, *_, copy=False, **__: x.clone() if copy else x)
    store, k = PivotCache(device), torch.randn(4, 9, 2, 16)
    store.put(0, 0, k[:1], k[:1])
    kept = store.get(0, 0, k.device)
    assert [x.untyped_storage().nbytes() for x in kept] == [x.nbytes for x in kept]


HOPPER, AMPERE = tiles.HOPPER, tiles.PORTABLE
BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("family", "triton", "dtype", "head_dim", "plain", "on_pivot", "reason", "off"),
    [
        (HOPPER, (3, 6), BF16, 128, "triton", "triton", "fastest of those measured", None),
        (HOPPER, (3, 9), BF16, 64, "triton", "triton", "fastest of those measured", None),
        (
            HOPPER,
            (3, 10),
            BF16,
            128,
            "sdpa",
            "triton",
            "plain Triton",
            "for Triton 3.6 to 3.9, not 3.10",
        ),
        (HOPPER, (3, 5), BF16, 128, "sdpa", "triton", "plain Triton", "for Triton 3.6 to 3.9, not 3.5"),
        (HOPPER, (3, 10), BF16, 64, "sdpa", "sdpa", "not known to be faster", "not 3.10"),
        (HOPPER, (3, 3), BF16, 128, "sdpa", "sdpa", "3.4 or newer, not 3.3", "3.4 or newer, not 3.3"),
        (HOPPER, None, BF16, 128, "sdpa", "sdpa", "triton is not installed", "triton is not installed"),
        (HOPPER, (3, 7), torch.float32, 128, "sdpa", "sdpa", "not torch.float32", None),
        (HOPPER, (3, 7), BF16, 16, "sdpa", "sdpa", "head dims (64, 128), not 16", None),
        (AMPERE, (3, 7), BF16, 128, "sdpa", "sdpa", "made for Hopper (sm_90)", None),
    ],
)
def test_what_auto_takes(
    family: str,
    triton: tuple[int, int] | None,
    dtype: torch.dtype,
    head_dim: int,
    plain: str,
    on_pivot: str,
    reason: str,
    off: str | None,
    pretend_gpu: Callable[..., torch.device],
) -> None:
    """By GPU, version of Triton, type and head dim: without a pivot, and with one."""
    device = pretend_gpu(family, triton)
    alone = select.choose(device, dtype, head_dim, grounded=False)
    grounded = select.choose(device, dtype, head_dim, grounded=True)
    assert (alone.backend, grounded.backend) == (plain, on_pivot)
    assert reason in grounded.reason and alone.off == grounded.off
    assert alone.off is None if off is None else off in str(alone.off)
    for pivot in (False, True):
        ours = select.choose(device, dtype, head_dim, grounded=pivot)
        trained = select.choose(device, dtype, head_dim, grounded=pivot, gradients=True)
        assert trained == (FOR_GRADIENTS if ours.backend == "triton" else ours)


def test_a_faster_path_that_is_off_is_said_loudly_once(
    pretend_gpu: Callable[..., torch.device],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    device = pretend_gpu(tiles.HOPPER, (3, 10))
    choices = [select.choose(device, torch.bfloat16, 128, grounded=grounded) for grounded in (False, True)]
    monkeypatch.setattr(select, "choose", lambda *_, grounded, gradients: choices[grounded])
    monkeypatch.setitem(select.BACKENDS, "triton", sdpa)
    monkeypatch.setattr(select, "BOUNDED", frozenset())
    q, k, v = qkv(2, 4)
    with caplog.at_level(logging.INFO, logger=select.__name__):
        for _ in range(2):
            interface.attention(q, k, v)
            grounded(interface, q, k, v, (0, 0))
            assert select.language((q.half(), k.half(), k.half(), v.half())) == tiles.TRITON
    loud = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert loud == [
        "attention is slower than this GPU allows: our kernels for it are off: "
        "they are made for Triton 3.6 to 3.9, not 3.10"
    ]
    assert len(caplog.records) == 3


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` prefers the backend `triton`, which gives zeros."""

    def zeros(q: Tensor, *others: object, **options: object) -> Tensor:
        return torch.zeros_like(q)

    def choose(*_: object, grounded: bool, gradients: bool) -> Choice:
        return FOR_GRADIENTS if gradients else Choice("triton", "the fastest")

    module = SimpleNamespace(attention=zeros, grounded_attention=zeros, target_attention=zeros)
    monkeypatch.setitem(select.BACKENDS, "triton", module)
    monkeypatch.setattr(select, "choose", choose)


FORMS = [
    (interface.attention, ("q", "k", "v", "value_bias"), {}),
    (interface.target_attention, ("q", "k_pivot", "k", "v", "value_bias"), {"pivot_index": (0,)}),
    (interface.grounded_attention, ("q", "k", "v", "value_bias"), {"pivot_of": (0,)}),
]


@pytest.mark.parametrize(
    ("form", "names", "options", "wanted"),
    [(*form, wanted) for form in FORMS for wanted in form[1]],
    ids=[f"{form[0].__name__}-{wanted}" for form in FORMS for wanted in form[1]],
)
def test_auto_is_pytorchs_where_gradients_are_needed(
    form: Callable[..., Tensor], names: tuple[str, ...], options: dict, wanted: str, ours: None
) -> None:
    """Gradients of any input; not where they are off, or where ours are asked for by name."""
    q, k, v = qkv(1, 4)
    every = {"q": q, "k_pivot": k.clone(), "k": k, "v": v, "value_bias": torch.ones(1, 2, 16)}
    inputs = {name: every[name] for name in names}

    def is_ours(backend: str) -> bool:
        return not form(**inputs, **options, backend=backend).any()

    assert is_ours("auto") and not is_ours("sdpa")
    inputs[wanted].requires_grad_()
    assert not is_ours("auto")
    assert is_ours("triton")
    with torch.no_grad():
        assert is_ours("auto")


def test_the_choice_for_gradients_is_logged_once_and_names_the_other(
    ours: None, caplog: pytest.LogCaptureFixture
) -> None:
    select._log_choice.cache_clear()
    q, k, v = qkv(1, 4)
    with caplog.at_level(logging.INFO, logger=select.__name__):
        for _ in range(2):
            interface.attention(q, k, v)
            interface.attention(q.clone().requires_grad_(), k, v)
    without, with_gradients = (r.getMessage() for r in caplog.records)
    assert without == "attention backend for cpu: triton (the fastest)"
    assert "cpu: sdpa (gradients are needed" in with_gradients
    assert "backend 'triton' takes less memory" in with_gradients


def test_the_choice_for_gradients_is_compiled_without_a_break(ours: None) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(interface.attention, backend="eager", fullgraph=True)
    q, k, v = qkv(1, 4)
    assert not compiled(q, k, v).any()
    q.requires_grad_()
    out = compiled(q, k, v)
    assert torch.equal(out, interface.attention(q, k, v, backend="sdpa"))
    out.sum().backward()
    assert q.grad is not None and q.grad.isfinite().all()
    with torch.no_grad():
        assert not compiled(q, k, v).any()


@pytest.fixture
def flash_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel that computes what flash-attn does, with its padded log-sum-exps, on a CPU."""
    from bokehflux.kernels.attention import flash

    def flash_attn_func(
        q: Tensor, k: Tensor, v: Tensor, return_attn_probs: bool
    ) -> tuple[Tensor, Tensor, None]:
        assert return_attn_probs
        out, lse = sdpa.attention_with_lse(q, k, v)
        return out, torch.nn.functional.pad(lse.transpose(1, 2), (0, 3)), None

    monkeypatch.setattr(flash, "_kernel", lambda: ("flash_attn", flash_attn_func))
    monkeypatch.setattr(flash, "_check", lambda *_: None)


@pytest.mark.parametrize("pivot_of", [(0, 0), (1, 1, 1), (0, 1)], ids=str)
def test_flash_backend(pivot_of: tuple[int, ...], flash_wheel: None) -> None:
    q, k, v = qkv(len(pivot_of), 9)
    bias = torch.randn(len(pivot_of), *q.shape[2:])
    exact = grounded(reference, q, k, v, pivot_of, value_bias=bias)
    torch.testing.assert_close(
        grounded(interface, q, k, v, pivot_of, value_bias=bias, backend="flash"), exact
    )


def test_flash_backend_without_a_wheel() -> None:
    q, k, v = qkv(1, 4)
    with pytest.raises(ValueError, match="pip install flash-attn, or fa3-fwd"):
        interface.attention(q, k, v, backend="flash")


@pytest.mark.parametrize(("dim", "dtype", "capability", "expected"), [
    (128, torch.bfloat16, (8, 0), True), (64, torch.float16, (9, 0), True),
    (136, torch.bfloat16, (9, 0), False), (100, torch.bfloat16, (9, 0), False),
    (128, torch.bfloat16, (7, 5), False), (128, torch.float32, (7, 5), True),
    (128, torch.float64, (9, 0), False),
])  # fmt: skip
def test_where_a_gpu_has_a_stock_kernel(
    dim: int, dtype: torch.dtype, capability: tuple[int, int], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    there = SimpleNamespace(device=torch.device("cuda"), shape=(1, 9, 2, dim), dtype=dtype)
    assert stock.takes(there) is expected  # type: ignore[arg-type]


@pytest.mark.parametrize(("capability", "dtype", "expected"), [
    ((8, 0), torch.bfloat16, "flash"), ((8, 6), torch.float16, "cudnn"), ((8, 9), torch.bfloat16, "cudnn"),
    ((9, 0), torch.bfloat16, "cudnn"), ((10, 0), torch.bfloat16, "cudnn"), ((12, 0), torch.bfloat16, "flash"),
    ((8, 9), torch.float32, "efficient"),
])  # fmt: skip
def test_the_fastest_stock_kernel_of_a_card(
    capability: tuple[int, int], dtype: torch.dtype, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    family = HOPPER if capability == (9, 0) else tiles.PORTABLE
    monkeypatch.setattr(tiles, "device", lambda _: tiles.Device(family=family, num_sms=108))
    monkeypatch.setattr(torch.backends.cuda, "can_use_cudnn_attention", lambda _: True)
    q, k, v = torch.empty(3, 1, 9, 2, 128, dtype=dtype, device="meta")
    assert stock.fastest_forward(q, k, v) == expected
    with monkeypatch.context() as refusing:
        refusing.setattr(torch.backends.cuda, "can_use_cudnn_attention", lambda _: False)
        usual = expected if capability == (9, 0) or dtype == torch.float32 else "flash"
        assert stock.fastest_forward(q, k, v) == usual, "what PyTorch says that cuDNN cannot take"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(tiles, "device", lambda _: tiles.Device(family=tiles.PORTABLE, num_sms=108))
    assert stock.fastest_forward(q, k, v) != "cudnn", "AMD counts in other numbers"


def test_a_tile_is_one_that_was_chosen_for_the_maximum_at_hand() -> None:
    """Rows that hold for a fixed or a running maximum alone are found for that one."""
    device = tiles.Device(family=HOPPER, num_sms=132)
    rows = [row for row in tiles.TABLE if row.fixed is not None and row.family == HOPPER]
    assert {row.fixed for row in rows} == {True, False}
    for row in rows:
        found = tiles.forward_tile(device, [row.kernel], row.head_dim or 128, row.fixed, row.tile.language)
        assert found == row.tile, row.reason
