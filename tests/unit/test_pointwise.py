"""The Triton forms of the passes between matrix products against plain PyTorch, on toy shapes.

As for attention: in Triton's interpreter without a GPU, compiled with one.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

from bokehflux.attention import Grounded, Plain  # noqa: E402
from bokehflux.kernels import dispatch  # noqa: E402
from bokehflux.kernels.attention import tiles  # noqa: E402
from bokehflux.kernels.pointwise import (  # noqa: E402
    interface,
    ops,
    reference,  # noqa: E402
)
from bokehflux.kernels.pointwise.reference import Projected  # noqa: E402
from bokehflux.models import fused  # noqa: E402
from bokehflux.models.adapter import BokehCondition  # noqa: E402
from bokehflux.models.embeddings import rope_table  # noqa: E402
from bokehflux.models.fused import takes_epilogues  # noqa: E402
from bokehflux.models.linear import Linear, LowRankTerm  # noqa: E402
from bokehflux.sampling.latents import LatentGrid, position_ids  # noqa: E402
from tests.helpers import assert_within_2x  # noqa: E402
from tests.tiny import tiny_mmdit  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned")
DEVICE = "cuda" if ON_GPU else "cpu"
each_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
each_shape = pytest.mark.parametrize(("rows", "length", "width"), [(1, 1, 16), (2, 7, 48), (3, 5, 96)])


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def slices(*shape: int, dtype: torch.dtype) -> Tensor:
    """As the part of a fused projection that lies in its middle: strided rows."""
    *lead, width = shape
    return randn(*lead, width + 32, dtype=dtype)[..., 16 : 16 + width]


def wide(x: Tensor | Sequence) -> Tensor | Sequence:
    if isinstance(x, Tensor):
        return x.double()
    return [Projected(*map(wide, item)) if isinstance(item, Projected) else wide(item) for item in x]


def check(name: str, *args: Tensor | Sequence) -> None:
    """The operator against plain PyTorch in double precision, by the house's rule for low precision."""
    ours, oracle = getattr(ops, name)(*args), getattr(reference, name)(*args)
    exact = getattr(reference, name)(*wide(args))
    if isinstance(ours, Tensor):
        ours, oracle, exact = (ours,), (oracle,), (exact,)
    for mine, theirs, truth in zip(ours, oracle, exact, strict=True):
        assert mine.dtype == theirs.dtype
        assert_within_2x(mine, theirs, truth)


def vectors(count: int, rows: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """Modulation vectors, views of one projection as they are."""
    return list(randn(rows, 1, count * width, dtype=dtype).chunk(count, dim=-1))


@each_dtype
@each_shape
def test_modulate(rows: int, length: int, width: int, dtype: torch.dtype) -> None:
    x = 3 * randn(rows, length, width, dtype=dtype) + 1
    for given_rows in {1, rows}:
        check("modulate", x, *vectors(2, given_rows, width, dtype))
    check("modulate", x[:, length // 2 :], *vectors(2, 1, width, dtype))


@each_dtype
@each_shape
def test_add_gated(rows: int, length: int, width: int, dtype: torch.dtype) -> None:
    x, y = slices(rows, length, width, dtype=dtype), slices(rows, length, width, dtype=dtype)
    gate, scale, shift = vectors(3, rows, width, dtype)
    check("add_gated", x, y, gate)
    check("add_gated_modulate", x, y, gate, scale, shift)
    # Whether two passes are one never shows in a picture.
    total, normed = ops.add_gated_modulate(x, y, gate, scale, shift)
    assert torch.equal(total, ops.add_gated(x, y, gate))
    assert torch.equal(normed, ops.modulate(total, scale, shift))


@each_dtype
def test_a_constant_row_has_no_variance(dtype: torch.dtype) -> None:
    x = torch.full((1, 2, 48), 7.0, device=DEVICE, dtype=dtype)
    scale, shift = vectors(2, 1, 48, dtype)
    torch.testing.assert_close(ops.modulate(x, scale, shift), shift.expand_as(x), atol=0, rtol=0)


def streams(
    lengths: Sequence[int], rows: int, queries: int, heads: int, dim: int, dtype: torch.dtype
) -> list[Projected]:
    width = heads * dim
    return [
        Projected(
            slices(queries, length, width, dtype=dtype),
            slices(rows, length, width, dtype=dtype),
            slices(rows, length, width, dtype=dtype),
            1 + randn(dim, dtype=dtype),
            1 + randn(dim, dtype=dtype),
        )
        for length in lengths
    ]


def rotations(length: int, dim: int) -> tuple[Tensor, Tensor]:
    angle = 10 * torch.rand(length, dim // 2, device=DEVICE)
    return angle.cos(), angle.sin()


@each_dtype
@pytest.mark.parametrize(("heads", "dim"), [(1, 16), (3, 64), (2, 128)])
@pytest.mark.parametrize("lengths", [(5,), (1, 1), (3, 6)], ids=str)
def test_joint_heads(lengths: tuple[int, ...], heads: int, dim: int, dtype: torch.dtype) -> None:
    check("joint_heads", streams(lengths, 2, 2, heads, dim, dtype), *rotations(sum(lengths), dim))


@settings(max_examples=12)
@given(
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    rows=st.integers(1, 3),
    queries=st.integers(1, 3),
    heads=st.integers(1, 5),
    dim=st.sampled_from([16, 32]),
)
def test_joint_heads_of_any_size(lengths: list[int], rows: int, queries: int, heads: int, dim: int) -> None:
    check(
        "joint_heads",
        streams(lengths, rows, queries, heads, dim, torch.float16),
        *rotations(sum(lengths), dim),
    )


@settings(max_examples=12)
@given(rows=st.integers(1, 3), length=st.integers(1, 9), width=st.integers(16, 70))
def test_passes_of_any_size(rows: int, length: int, width: int) -> None:
    """Channels that are not a multiple of anything, tokens that leave a block half empty."""
    x, y = (slices(rows, length, width, dtype=torch.float16) for _ in range(2))
    gate, scale, shift = vectors(3, rows, width, torch.float16)
    check("add_gated_modulate", x, y, gate, scale, shift)
    check("concat_gelu", x, y)


@pytest.mark.parametrize("queries", [0, 1])
def test_rows_without_queries(queries: int) -> None:
    """A grounded batch projects its pivots' queries alone, or none."""
    made, table = streams((2, 3), 3, queries, 2, 16, torch.float32), rotations(5, 16)
    ours, expected = ops.joint_heads(made, *table), reference.joint_heads(made, *table)
    assert [len(x) for x in ours] == [queries, 3, 3]
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_one_stream_keeps_its_values() -> None:
    (stream,) = streams((5,), 2, 2, 2, 16, torch.float16)
    v = ops.joint_heads([stream], *rotations(5, 16))[2]
    assert v.shape == (2, 5, 2, 16) and v.data_ptr() == stream.v.data_ptr()


@each_dtype
@each_shape
def test_concat_gelu(rows: int, length: int, width: int, dtype: torch.dtype) -> None:
    hidden = 4 * slices(rows, length, 3 * width, dtype=dtype)
    hidden[0, 0, :6] = torch.tensor([0.0, -0.0, 60.0, -60.0, 1e-4, -1e-4])
    joint = slices(rows, length, width, dtype=dtype)
    check("concat_gelu", joint, hidden)
    assert torch.equal(ops.concat_gelu(joint, hidden)[..., :width], joint)


def test_operators_are_registered() -> None:
    """Schemas that tell the truth, and fake implementations that give what the kernels give."""
    x, y = (randn(2, 3, 48, dtype=torch.float32) for _ in range(2))
    gate, scale, shift = vectors(3, 2, 48, torch.float32)
    columns = [list(column) for column in zip(*streams((2, 3), 2, 1, 3, 16, torch.float32), strict=True)]
    calls = [
        (ops.modulate, (x, scale, shift)),
        (ops.add_gated, (x, y, gate)),
        (ops.add_gated_modulate, (x, y, gate, scale, shift)),
        (ops._joint_heads, (*columns, *rotations(5, 16))),
        (ops.concat_gelu, (x, y)),
    ]
    for op, args in calls:
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def test_strided_channels_are_refused() -> None:
    x, scale, shift = randn(1, 48, 3, dtype=torch.float32).mT, *vectors(2, 1, 48, torch.float32)
    with pytest.raises(ValueError, match="expected contiguous channels, got strides"):
        ops.modulate(x, scale, shift)


def test_what_a_kernel_would_read_beyond_is_refused() -> None:
    """On a GPU it would be an illegal memory access, or numbers of another tensor."""
    x, y = (randn(3, 5, 48, dtype=torch.float32) for _ in range(2))
    gate, scale, shift = vectors(3, 3, 48, torch.float32)
    made, (cos, sin) = streams((2, 3), 2, 2, 3, 16, torch.float32), rotations(5, 16)
    few_values = [made[0], made[1]._replace(v=made[1].v[:, :2])]
    few_queries = [made[0], made[1]._replace(q=torch.cat([made[1].q, made[1].q]))]
    strided = cos.T.contiguous().T
    calls = [
        *((ops.add_gated, (x, bad, gate)) for bad in (y[:2], y[:, :4], y[..., :32])),
        *((ops.modulate, (x, bad, shift)) for bad in (scale[:2], scale[..., :32], x)),
        *((ops.joint_heads, (bad, cos, sin)) for bad in (few_values, few_queries)),
        *((ops.joint_heads, (made, bad, sin)) for bad in (cos[:4], cos[:, :4], strided)),
        *((ops.concat_gelu, (x, bad)) for bad in (y[:2], y[:, :4])),
    ]
    for op, args in calls:
        with pytest.raises(ValueError, match="expected (shape|contiguous cos and sin)"):
            op(*args)


@pytest.mark.parametrize("spec", [Plain(), Grounded(pivot_of=(0, 0, 0))], ids=["plain", "grounded"])
def test_a_network_through_them(spec: Plain | Grounded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pass of every block, strides and row counts as they come."""
    low = tiny_mmdit().half().to(DEVICE)
    exact, config = copy.deepcopy(low).float(), low.config
    rope = rope_table(position_ids(LatentGrid(height_px=32, width_px=48), 5), config.axes_dim, config.theta)
    rope = type(rope)(*(t.to(DEVICE) for t in rope))
    img, txt = (randn(3, n, c, dtype=torch.float16) for n, c in ((6, 64), (5, config.txt_dim)))
    pooled = randn(3, config.pooled_dim, dtype=torch.float16)
    sigma, guidance = torch.full((3,), 0.7, device=DEVICE), torch.full((3,), 3.0, device=DEVICE)
    levels, called = BokehCondition.of([15, 0, 30]), []
    for name in ("modulate", "add_gated", "add_gated_modulate", "joint_heads", "concat_gelu"):
        op = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *args, op=op, name=name: called.append(name) or op(*args))
    with torch.no_grad():
        truth = exact(img.float(), txt.float(), pooled.float(), sigma, guidance, rope, spec, levels)
        monkeypatch.setattr(interface, "takes", lambda *tensors, weights=(): False)
        oracle = low(img, txt, pooled, sigma, guidance, rope, spec, levels)
        assert not called
        monkeypatch.setattr(interface, "takes", lambda *tensors, weights=(): True)
        ours = low(img, txt, pooled, sigma, guidance, rope, spec, levels)
    double, single = config.num_double, config.num_single
    counts = {name: called.count(name) for name in set(called)}
    assert counts == {
        "modulate": 2 + 1,  # before the first block of a kind
        "add_gated": 2,  # where text and image are joined
        "add_gated_modulate": 4 * double - 2 + single,  # the final norm's among them
        "joint_heads": double + single,
        "concat_gelu": single,
    }
    assert_within_2x(ours, oracle, truth)


@pytest.mark.parametrize("storage", [torch.float32, torch.float8_e4m3fn], ids=str)
def test_a_network_whose_products_are_taken_apart(
    storage: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What CUDA does: GELU in the epilogue, the single blocks' second product in two."""
    low = tiny_mmdit().to(DEVICE)
    for layer in (module for module in low.modules() if isinstance(module, Linear)):
        layer.weight.data = layer.weight.data.to(storage)
    rope = rope_table(
        position_ids(LatentGrid(height_px=32, width_px=48), 5), low.config.axes_dim, low.config.theta
    )
    rope = type(rope)(*(t.to(DEVICE) for t in rope))
    img, txt = (randn(3, n, c, dtype=torch.float32) for n, c in ((6, 64), (5, low.config.txt_dim)))
    pooled = randn(3, low.config.pooled_dim, dtype=torch.float32)
    sigma, guidance = torch.full((3,), 0.7, device=DEVICE), torch.full((3,), 3.0, device=DEVICE)
    levels, spec, parts = BokehCondition.of([15, 0, 30]), Grounded(pivot_of=(0, 0, 0)), []

    def with_gelu(bias: Tensor, x: Tensor, weight: Tensor, use_gelu: bool) -> Tensor:
        assert use_gelu
        return F.gelu(torch.addmm(bias, x, weight), approximate="tanh")

    with torch.no_grad():
        whole = low(img, txt, pooled, sigma, guidance, rope, spec, levels)
        monkeypatch.setattr(fused, "takes_epilogues", lambda *_: True)
        monkeypatch.setattr(torch, "_addmm_activation", with_gelu)
        real = fused.of_halves
        monkeypatch.setattr(fused, "of_halves", lambda *args: parts.append(args) or real(*args))
        apart = low(img, txt, pooled, sigma, guidance, rope, spec, levels)
    assert len(parts) == low.config.num_single
    torch.testing.assert_close(apart, whole, rtol=1e-4, atol=1e-5)


def test_who_takes_epilogues(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = Linear(16, 8).bfloat16(), torch.zeros(1, 16, dtype=torch.bfloat16)
    assert not takes_epilogues(x, layer)  # gradients
    layer.requires_grad_(False)
    assert takes_epilogues(x, layer)
    assert not takes_epilogues(x.float(), layer) and not takes_epilogues(x.half(), layer)
    assert not takes_epilogues(x.to("meta"), layer)  # a device of which nothing is known
    assert not takes_epilogues(x.clone().requires_grad_(), layer)
    layer.terms = (LowRankTerm(down=torch.zeros(1, 16), up=torch.zeros(8, 1), strength=1.0),)
    assert not takes_epilogues(x, layer)
    layer.terms = ()
    layer.dequantize = lambda weight, dtype: weight
    assert not takes_epilogues(x, layer)
    layer.dequantize = None
    layer.weight.data = layer.weight.data.to(torch.float8_e4m3fn)
    assert takes_epilogues(x, layer)  # a weight that is cast
    layer.set_fp8(layer.weight.data, torch.ones(8))
    assert not takes_epilogues(x, layer)
    layer = Linear(16, 8).bfloat16().requires_grad_(False)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not takes_epilogues(x, layer)


def test_a_cpu_and_gradients_take_plain_pytorch(
    monkeypatch: pytest.MonkeyPatch, pretend_gpu: Callable[..., torch.device]
) -> None:
    assert not interface.takes(torch.zeros(1, dtype=torch.float16))
    monkeypatch.setattr(Tensor, "is_cuda", True)
    half, wide_one = torch.zeros(1, dtype=torch.float16), torch.zeros(1)
    learned = torch.zeros(1, dtype=torch.float16, requires_grad=True)
    pretend_gpu(tiles.PORTABLE, (3, 9))
    assert interface.takes(half, half, weights=[wide_one])
    assert not interface.takes(half, wide_one)
    assert not interface.takes(wide_one)
    assert not interface.takes(half, learned)
    assert not interface.takes(half, weights=[learned])
    with torch.no_grad():
        assert interface.takes(half, learned, weights=[learned])
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not interface.takes(half)


@pytest.mark.parametrize(("triton", "reason"), [(None, "not installed"), ((3, 3), "3.4 or newer, not 3.3")])
def test_without_triton_a_gpu_takes_plain_pytorch_and_says_so_once(
    triton: tuple[int, int] | None,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    pretend_gpu: Callable[..., torch.device],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(Tensor, "is_cuda", True)
    pretend_gpu(tiles.PORTABLE, triton)
    for _ in range(2):
        assert not interface.takes(torch.zeros(1, dtype=torch.float16))
    (said,) = caplog.records
    assert said.levelname == "WARNING" and reason in said.getMessage()


def test_amd_is_let_through_and_told_that_nobody_has_tried(
    monkeypatch: pytest.MonkeyPatch,
    pretend_gpu: Callable[..., torch.device],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(Tensor, "is_cuda", True)
    device = pretend_gpu(tiles.PORTABLE, (3, 9))
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "need an NVIDIA GPU" in str(dispatch.why_not(device)), "neither: a CPU's PyTorch"
    dispatch.why_not.cache_clear()
    monkeypatch.setattr(torch.version, "hip", "7.0")
    for _ in range(2):
        assert interface.takes(torch.zeros(1, dtype=torch.float16))
    (said,) = caplog.records
    assert said.levelname == "WARNING" and "nobody has tested them" in said.getMessage()


def test_a_cpu_rounds_queries_and_keys_once() -> None:
    """In bfloat16 as Triton does: norm and rotation in float32, then one rounding."""
    made, table = streams((3, 5), 2, 2, 2, 16, torch.bfloat16), rotations(8, 16)
    ours = reference.joint_heads([Projected(*(t.cpu() for t in s)) for s in made], *(t.cpu() for t in table))
    exact = reference.joint_heads(
        [Projected(*(t.cpu().float() for t in s)) for s in made], *(t.cpu() for t in table)
    )
    for x, wide in zip(ours, exact, strict=True):
        assert torch.equal(x, wide.bfloat16())
