"""The Gluon attention kernels, imitated on a CPU: their mathematics, and who waits for whom."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

os.environ.setdefault("TRITON_INTERPRET", "1")

from bokehflux.kernels import attention as package  # noqa: E402
from bokehflux.kernels.attention import launch, reference, select, tiles, triton_fwd  # noqa: E402
from bokehflux.kernels.attention.jobs import grounded_jobs, target_jobs  # noqa: E402
from bokehflux.kernels.attention.tiles import Tile  # noqa: E402
from tests.gluon_emulator import load_emulated  # noqa: E402
from tests.helpers import assert_within_2x  # noqa: E402
from tests.unit.test_triton_attention import bias_of, grounded, published, qkv, wide  # noqa: E402

if torch.cuda.is_available() or not triton_fwd.INTERPRETED:
    pytest.skip("imitated only where Triton's interpreter runs", allow_module_level=True)

each_softmax = pytest.mark.parametrize("fixed", [False, True], ids=["running-maximum", "fixed-offset"])


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    load_emulated(package.__name__, monkeypatch)
    monkeypatch.setattr(select, "why_not_gluon", lambda device: None)


def tile(block_n: int = 16, slots: int = 3, parts: int = 8) -> Tile:
    return Tile(
        block_m=128, block_n=block_n, num_warps=8, num_stages=slots, tma=True,
        max_parts=parts, language=tiles.GLUON,
    )  # fmt: skip


def check_lse(lse: Tensor, q: Tensor, keys: list[Tensor]) -> None:
    """lse [H, L] of one row: q, keys [L, H, D]."""
    scores = torch.einsum("lhd,mhd->hlm", q.float(), torch.cat(keys).float()) * q.shape[-1] ** -0.5
    torch.testing.assert_close(lse, scores.logsumexp(-1), atol=2e-3, rtol=2e-3)


@each_softmax
@pytest.mark.parametrize(("length", "length_k", "tiled"), [
    (1, 1, tile()),
    (65, 33, tile(slots=4)),
    (130, 64, tile(block_n=32)),
    (300, 50, tile(slots=5, parts=1)),
])  # fmt: skip
def test_plain(length: int, length_k: int, tiled: Tile, fixed: bool) -> None:
    q, k, v = qkv(2, 2, length, 2, 64, length_k)
    bias = bias_of(2)
    out, lse = launch.forward(q, k, None, v, bias, None, fixed=fixed, tile=tiled)
    exact = reference.attention(*wide(q, k, v), value_bias=bias)
    assert_within_2x(out, reference.attention(q, k, v, value_bias=bias), exact, atol=2e-3)
    check_lse(lse[1], q[1], [k[1]])


@each_softmax
@pytest.mark.parametrize("length", [16, 100])
@pytest.mark.parametrize("pivot_of", [(0, 0), (1, 1, 1), (2, 1, 2, 1, 2), (0,) * 10], ids=str)
def test_grounded(pivot_of: tuple[int, ...], length: int, fixed: bool) -> None:
    """Pairs, targets, plain rows; more jobs than a launch takes; odd lengths; tiles split along the keys."""
    q, k, v = qkv(len(set(pivot_of)), len(pivot_of), length)
    bias = bias_of(len(pivot_of))
    jobs = grounded_jobs(pivot_of)
    out, lse = launch.forward(q, k, None, v, bias, jobs, fixed=fixed, tile=tile())
    exact = reference.grounded_attention(*wide(q, k, v), pivot_of, value_bias=bias)
    assert_within_2x(out, grounded(q, k, v, pivot_of, bias), exact)
    for row, pivot in enumerate(pivot_of):
        of_pivot = q[sorted(set(pivot_of)).index(pivot)]
        check_lse(lse[row], of_pivot, [k[pivot]] if row == pivot else [k[row], k[pivot]])


@each_softmax
def test_targets(fixed: bool) -> None:
    q, k_pivot, k, v = qkv(2, 3, 70, n=4)
    k_pivot = k_pivot[:2]
    index = (1, 0, 1)
    args = q, k, k_pivot, v, None, target_jobs(index)
    out, _ = launch.forward(*args, fixed=fixed, tile=tile(block_n=32, slots=4))
    exact = reference.target_attention(*wide(q, k_pivot, k, v), index)
    assert_within_2x(out, published(q, k_pivot, k, v, index, None), exact)


@pytest.mark.parametrize("louder", ["own", "pivot"])
def test_scores_far_apart(louder: str) -> None:
    """With a running maximum neither the pivot's scores may be lost nor a target's own."""
    pivot_of = (0, 0, 0)
    q, k, v = qkv(1, 3, 40)
    if louder == "pivot":
        k[0] *= 40
    else:
        k[1:] *= 40
    out, _ = launch.forward(q, k, None, v, None, grounded_jobs(pivot_of), fixed=False, tile=tile())
    exact = reference.grounded_attention(*wide(q, k, v), pivot_of)
    assert_within_2x(out, grounded(q, k, v, pivot_of, None), exact)


def test_split_tiles() -> None:
    """The imitated device has three multiprocessors: this grid has a tail, whose parts are merged."""
    q, k, v = qkv(1, 2, 200, 2)
    jobs = grounded_jobs((0, 0))
    split = launch.forward(q, k, None, v, None, jobs, fixed=True, tile=tile())
    whole = launch.forward(q, k, None, v, None, jobs, fixed=True, tile=tile(parts=1))
    for a, b in zip(split, whole, strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-3)
    assert not torch.equal(split[1], whole[1])


def test_what_a_tensor_descriptor_cannot_express() -> None:
    q, k, v = qkv(1, 1, 20)
    odd = torch.empty(1, 20, 2, 65, dtype=torch.float16)[..., 1:]
    odd.copy_(k)
    with pytest.raises(ValueError, match="16 bytes"):
        launch.forward(q, odd, None, v, None, None, fixed=False, tile=tile())
    assert select.language((q, odd, odd, v)) == tiles.TRITON
    assert select.language((q, k, k, v)) == tiles.GLUON
