"""The compiled passes between matrix products: real dtypes and sizes, and GELU in a product's epilogue."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bokehflux.attention import Grounded
from bokehflux.kernels.pointwise import interface, reference
from bokehflux.kernels.pointwise.reference import Projected
from bokehflux.models.adapter import BokehCondition
from bokehflux.models.embeddings import RopeTable, rope_table
from bokehflux.models.fused import gelu_columns, of_halves, takes_epilogues
from bokehflux.models.linear import Linear
from bokehflux.sampling.latents import LatentGrid, position_ids
from tests.helpers import assert_within_2x
from tests.tiny import tiny_mmdit

pytestmark = pytest.mark.usefixtures("poisoned")
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
each_size = pytest.mark.parametrize(
    ("rows", "length", "width"),
    [(1, 1536, 3072), (2, 4608, 3072), (3, 1537, 3072), (2, 333, 256), (1, 65, 1008)],
)


def slices(*shape: int, dtype: torch.dtype) -> Tensor:
    """The middle of a fused projection."""
    *lead, width = shape
    return torch.randn(*lead, 3 * width, device="cuda").to(dtype)[..., width : 2 * width]


def wide(x):
    if isinstance(x, Tensor):
        return x.float()
    return [Projected(*map(wide, item)) if isinstance(item, Projected) else wide(item) for item in x]


def check(name: str, *args) -> None:
    """Through the interface, twice with equal bits, at most twice plain PyTorch's error against float32."""
    ours, again = (getattr(interface, name)(*args) for _ in range(2))
    oracle, exact = getattr(reference, name)(*args), getattr(reference, name)(*wide(args))
    if isinstance(ours, Tensor):
        ours, again, oracle, exact = (ours,), (again,), (oracle,), (exact,)
    for mine, same, theirs, truth in zip(ours, again, oracle, exact, strict=True):
        assert torch.equal(mine, same) and mine.dtype == theirs.dtype
        assert_within_2x(mine, theirs, truth)
        assert (mine.float() - truth).norm() <= (theirs.float() - truth).norm() * 1.001


def vectors(count: int, rows: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    return list(torch.randn(rows, 1, count * width, device="cuda").to(dtype).chunk(count, dim=-1))


@each_dtype
@each_size
def test_norms_and_gates(rows: int, length: int, width: int, dtype: torch.dtype) -> None:
    x, y = 3 * slices(rows, length, width, dtype=dtype), slices(rows, length, width, dtype=dtype)
    for given_rows in {1, rows}:
        gate, scale, shift = vectors(3, given_rows, width, dtype)
        check("modulate", x, scale, shift)
        check("add_gated", x, y, gate)
        check("add_gated_modulate", x, y, gate, scale, shift)


@each_dtype
@pytest.mark.parametrize("queries", [0, 1, 2])
@pytest.mark.parametrize(("heads", "dim"), [(24, 128), (4, 64)])
@pytest.mark.parametrize("lengths", [(512, 1024), (512, 4096), (7, 26), (1537,)], ids=str)
def test_joint_heads(
    lengths: tuple[int, ...], heads: int, dim: int, queries: int, dtype: torch.dtype
) -> None:
    streams = [
        Projected(
            *(slices(rows, length, heads * dim, dtype=dtype) for rows in (queries, 2, 2)),
            *(1 + torch.randn(dim, device="cuda").to(dtype) for _ in range(2)),
        )
        for length in lengths
    ]
    angle = 10 * torch.rand(sum(lengths), dim // 2, device="cuda")
    if queries:
        check("joint_heads", streams, angle.cos(), angle.sin())
        return
    q, k, v = interface.joint_heads(streams, angle.cos(), angle.sin())
    assert len(q) == 0 and k.isfinite().all() and v.isfinite().all()


@each_dtype
@each_size
def test_concat_gelu(rows: int, length: int, width: int, dtype: torch.dtype) -> None:
    joint = slices(rows, length, width, dtype=dtype)
    check("concat_gelu", joint, slices(rows, length, 4 * width, dtype=dtype))


@each_dtype
@pytest.mark.parametrize("length", [1, 333, 1024])
@pytest.mark.parametrize("start", [0, 3072])
def test_gelu_in_the_epilogue(start: int, length: int, dtype: torch.dtype) -> None:
    layer = Linear(3072, 12288).to("cuda", dtype).requires_grad_(False)
    exact = copy.deepcopy(layer).float()
    x = torch.randn(2, length, 3072, device="cuda").to(dtype)
    assert takes_epilogues(x, layer)
    oracle = F.gelu(F.linear(x, layer.weight[start:], layer.bias[start:]), approximate="tanh")
    truth = F.gelu(exact.columns(x.float(), start, 12288), approximate="tanh")
    assert_within_2x(gelu_columns(layer, x, start, 12288), oracle, truth)


@each_dtype
@pytest.mark.parametrize("length", [1, 333, 1024])
def test_a_product_of_two_parts(length: int, dtype: torch.dtype) -> None:
    layer = Linear(3072 + 12288, 3072).to("cuda", dtype).requires_grad_(False)
    exact = copy.deepcopy(layer).float()
    x = torch.randn(2, length, 3072 + 12288, device="cuda").to(dtype)
    left, right = x.split([3072, 12288], dim=-1)
    ours = of_halves(layer, left.contiguous(), right.contiguous())
    assert_within_2x(ours, layer(x), exact(x.float()))


def test_past_32_bits() -> None:
    """More numbers than 32 bits count."""
    length = 2**31 // 3072 + 9
    x = torch.zeros(1, length, 3072, device="cuda", dtype=torch.bfloat16)
    x[0, -1] = torch.randn(3072, device="cuda").bfloat16()
    scale, shift = vectors(2, 1, 3072, torch.bfloat16)
    last = x[:, -1:], scale, shift
    exact = reference.modulate(*map(wide, last))
    assert_within_2x(interface.modulate(x, scale, shift)[:, -1:], reference.modulate(*last), exact)


def test_a_network_through_them() -> None:
    low = tiny_mmdit().to("cuda", torch.bfloat16)
    exact, config = copy.deepcopy(low).float(), low.config
    ids = position_ids(LatentGrid(height_px=256, width_px=240), 63)
    rope = RopeTable(*(t.cuda() for t in rope_table(ids, config.axes_dim, config.theta)))
    draw = torch.Generator("cuda").manual_seed(0)
    img, txt, pooled = (
        torch.randn(shape, generator=draw, device="cuda").bfloat16()
        for shape in ((3, 240, 64), (3, 63, config.txt_dim), (3, config.pooled_dim))
    )
    rest = torch.full((3,), 0.7, device="cuda"), torch.full((3,), 3.0, device="cuda"), rope
    given = Grounded(pivot_of=(0, 0, 0)), BokehCondition.of([15, 0, 30])
    with torch.no_grad():
        truth = exact(img.float(), txt.float(), pooled.float(), *rest, *given)
        ours = low(img, txt, pooled, *rest, *given)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(interface, "takes", lambda *tensors, weights=(): False)
            oracle = low(img, txt, pooled, *rest, *given)
    assert not torch.equal(ours, oracle)
    assert_within_2x(ours, oracle, truth)


@torch.inference_mode()
def test_long_rows_of_one_stream_are_multiplied_where_they_lie() -> None:
    layer = Linear(3072, 3072).cuda().bfloat16()
    x = torch.randn(3, 4608, 3072, device="cuda", dtype=torch.bfloat16)[:, 512:]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = layer(x)
    assert torch.cuda.max_memory_allocated() - before < 1.1 * out.nbytes  # and no copy of x
    copied = F.linear(x.contiguous(), layer.weight, layer.bias)
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    assert_within_2x(out, copied, exact)
