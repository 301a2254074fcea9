"""The Triton forms of the passes between matrix products against their eager forms, on toy shapes.

As for attention: in Triton's interpreter without a GPU, compiled with one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

from bokehflux.kernels.pointwise import eager, ops  # noqa: E402
from bokehflux.kernels.pointwise.eager import Projected  # noqa: E402
from tests.helpers import assert_within_2x  # noqa: E402

DEVICE = "cuda" if ON_GPU else "cpu"
each_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
each_shape = pytest.mark.parametrize(("rows", "length", "width"), [(1, 1, 16), (2, 7, 48), (3, 5, 96)])


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a kernel leaves unwritten is NaN."""
    empty = Tensor.new_empty
    monkeypatch.setattr(
        Tensor, "new_empty", lambda *args, **options: empty(*args, **options).fill_(torch.nan)
    )


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
    """The operator against the eager form in double precision, by the house's rule for low precision."""
    ours, oracle = getattr(ops, name)(*args), getattr(eager, name)(*args)
    exact = getattr(eager, name)(*wide(args))
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


@pytest.mark.parametrize("queries", [0, 1])
def test_rows_without_queries(queries: int) -> None:
    """A grounded batch projects its pivots' queries alone, or none."""
    made, table = streams((2, 3), 3, queries, 2, 16, torch.float32), rotations(5, 16)
    ours, expected = ops.joint_heads(made, *table), eager.joint_heads(made, *table)
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
