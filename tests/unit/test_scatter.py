"""Scatter: the reference against the formula as it stands, and the Triton form against the reference.

In Triton's interpreter without a GPU, compiled with one.
"""

from __future__ import annotations

import math
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

from bokehflux.kernels import dispatch  # noqa: E402
from bokehflux.kernels.scatter import interface, ops, reference  # noqa: E402
from bokehflux.kernels.scatter.reference import Iris  # noqa: E402

DEVICE = "cuda" if ON_GPU else "cpu"
IRISES = {
    "disc": Iris(),
    "hexagon": Iris(6),
    "turned triangle": Iris(3, 0.3),
    "donut": Iris(donut=0.4),
    "octagonal donut": Iris(8, 0.1, 0.3),
}
each_iris = pytest.mark.parametrize("iris", IRISES.values(), ids=IRISES)


def by_the_formula(light: Tensor, radius_px: Tensor, iris: Iris) -> tuple[Tensor, Tensor]:
    """One picture [C, H, W], [H, W], pixel by pixel in double precision: mean and weight."""
    channels, height, width = light.shape
    total, weight = torch.zeros(channels, height, width).double(), torch.zeros(height, width).double()
    for y in range(height):
        for x in range(width):
            r = abs(float(radius_px[y, x]))
            for v in range(height):
                for u in range(width):
                    dy, dx = v - y, u - x
                    if max(abs(dy), abs(dx)) > math.floor(r) + 1:
                        continue
                    edge = r
                    if iris.sides:
                        corner = math.pi / 2 - math.pi / iris.sides
                        angle = abs(math.atan2(dy, dx) + iris.first_angle) % (2 * math.pi / iris.sides)
                        edge = r * math.sin(corner) / math.sin(angle + corner)
                    distance = math.hypot(dy, dx)
                    w = (0.5 + 0.5 * math.tanh(4 * (edge - distance))) / (r**2 + 0.2)
                    w *= 1 - iris.donut + iris.donut * math.tanh(0.2 * (1 + distance - edge))
                    total[:, v, u] += w * light[:, y, x]
                    weight[v, u] += w
    return total / weight, weight


def picture(height: int, width: int, largest: float, batch: int = 1) -> tuple[Tensor, Tensor]:
    """Light, and radii of both signs, a few of them 0."""
    radius = largest * (2 * torch.rand(batch, height, width) - 1)
    return torch.rand(batch, 3, height, width), radius * (torch.rand_like(radius) > 0.1)


@each_iris
def test_the_formula(iris: Iris) -> None:
    light, radius = picture(7, 11, 3.5)
    mean, weight = interface.scatter(light, radius, iris)
    expected = by_the_formula(light[0], radius[0], iris)
    torch.testing.assert_close(mean[0].double(), expected[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(weight[0].double(), expected[1], atol=0, rtol=1e-5)


def test_pictures_and_bands_are_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    light, radius = picture(23, 9, 5.0, batch=2)
    whole = interface.scatter(light, radius), interface.dilate(radius)
    monkeypatch.setattr(reference, "ROWS", 4)
    torch.testing.assert_close(interface.scatter(light, radius), whole[0])
    assert torch.equal(interface.dilate(radius), whole[1])
    alone = interface.scatter(light[1:], radius[1:])
    torch.testing.assert_close([t[1:] for t in interface.scatter(light, radius)], list(alone))


def test_dilation_takes_the_largest_signed_radius() -> None:
    _, radius = picture(8, 13, 4.0)
    along, down = torch.meshgrid(torch.arange(13.0), torch.arange(8.0), indexing="xy")
    place = torch.stack([down, along], -1).flatten(0, 1)
    covers = torch.cdist(place, place) <= radius.abs().flatten()[:, None]
    expected = torch.where(covers, radius.flatten()[:, None], -math.inf).amax(0).view(8, 13)
    assert torch.equal(interface.dilate(radius)[0], expected)


def test_far_blur_marks_nothing_sharper() -> None:
    radius = torch.zeros(1, 9, 9)
    radius[0, 4, 4] = -4
    assert torch.equal(interface.dilate(radius), radius)
    radius[0, 4, 4] = 4
    assert (interface.dilate(radius)[0, 4] == 4).all()


def test_no_defocus_is_not_quite_the_identity() -> None:
    light = torch.zeros(1, 3, 5, 5)
    light[:, :, 2, 2] = 1
    mean, _ = interface.scatter(light, torch.zeros(1, 5, 5))
    assert mean[0, 0, 2, 1] / mean[0, 0, 2, 2] == pytest.approx(6.7e-4, rel=0.01)


@given(height=st.integers(1, 12), width=st.integers(1, 12), largest=st.floats(0, 6), seed=st.integers(0, 99))
def test_properties(height: int, width: int, largest: float, seed: int) -> None:
    """Even light stays even, results lie within what is given, a turned picture gives a turned result."""
    torch.manual_seed(seed)
    light, radius = picture(height, width, largest)
    mean, weight = interface.scatter(light, radius)
    assert (weight > 0).all()
    assert mean.min() >= light.min() - 1e-6 and mean.max() <= light.max() + 1e-6
    even, _ = interface.scatter(torch.full_like(light, 0.3), radius)
    torch.testing.assert_close(even, torch.full_like(light, 0.3))
    turned, _ = interface.scatter(light.rot90(1, (2, 3)), radius.rot90(1, (1, 2)))
    torch.testing.assert_close(turned, mean.rot90(1, (2, 3)))
    torch.testing.assert_close(interface.scatter(light, -radius)[0], mean)


def test_energy_of_even_blur() -> None:
    """Away from the borders, a disc of one radius hands on all its light."""
    light = torch.zeros(1, 3, 41, 41)
    light[0, :, 20, 20] = torch.tensor([1.0, 2.0, 3.0])
    mean, _ = interface.scatter(light, torch.full((1, 41, 41), 7.3))
    torch.testing.assert_close(mean.sum((2, 3))[0], torch.tensor([1.0, 2.0, 3.0]), rtol=1e-5, atol=0)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch, poisoned: None) -> None:
    """Pictures of several tiles that the interpreter can bear, and NaN where a kernel writes nothing."""
    if not ON_GPU:
        monkeypatch.setattr(ops, "ROWS", 4)
        monkeypatch.setattr(ops, "COLS", 16)


def compare(light: Tensor, radius: Tensor, iris: Iris) -> None:
    reach = int(radius.abs().max()) + 1
    ours = ops.scatter(light.to(DEVICE), radius.to(DEVICE), iris, reach)
    mean, weight = reference.scatter(light.double(), radius.double(), iris, reach)
    torch.testing.assert_close(ours[0].double().cpu(), mean, atol=2e-6, rtol=0)
    torch.testing.assert_close(ours[1].double().cpu(), weight, atol=0, rtol=1e-5)


def compare_dilation(radius: Tensor) -> None:
    reach = int(radius.abs().max()) + 1
    assert torch.equal(ops.dilate(radius.to(DEVICE), reach).cpu(), reference.dilate(radius, reach))


@each_iris
def test_triton(iris: Iris, small_tiles: None) -> None:
    compare(*picture(5, 18, 1.7), iris)


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 1, 1), (2, 4, 16), (2, 5, 7)])
def test_triton_sizes(batch: int, height: int, width: int, small_tiles: None) -> None:
    light, radius = picture(height, width, 1.4, batch)
    compare(light, radius, Iris())
    compare_dilation(radius)


def test_triton_far_beyond_the_borders(small_tiles: None) -> None:
    light, radius = picture(3, 5, 0.0)
    radius[0, 1, 2] = 5.5
    compare(light, radius, Iris())
    compare_dilation(radius)


def test_triton_asks_fewer_where_radii_are_small(small_tiles: None) -> None:
    """One corner of a long picture is blurred: tiles out of its reach ask for single neighbours."""
    light, radius = picture(4, 60, 0.5)
    radius[:, :, :3] = 2.5
    near = ops._largest_near(radius.abs(), 3)
    assert ON_GPU or (near[0, 0, 0] == 2.5 and near[0, 0, -1] <= 0.5)
    compare(light, radius, Iris())


def test_strided_input(small_tiles: None) -> None:
    light, radius = picture(4, 6, 0.9)
    compare(light.mT, radius.mT, Iris())


def test_operators_are_registered() -> None:
    light, radius = (t.to(DEVICE) for t in picture(2, 3, 0.9))
    for op, args in ((ops._scatter, (light, radius, *Iris(), 1)), (ops.dilate, (radius, 1))):
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def test_who_takes_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    light, radius = picture(2, 2, 1.0)
    assert not interface.takes(light, radius)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    monkeypatch.setattr(dispatch, "runs_triton", lambda device: True)
    assert interface.takes(light, radius)
    assert not interface.takes(light.double(), radius)
    assert not interface.takes(light.requires_grad_(), radius)
    with torch.no_grad():
        assert interface.takes(light, radius)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not interface.takes(light.detach(), radius)


def test_gradients_flow_through_the_reference() -> None:
    light, radius = picture(4, 5, 1.7)
    light.requires_grad_()
    mean, _ = interface.scatter(light, radius)
    mean.square().sum().backward()
    assert light.grad is not None and light.grad.isfinite().all() and light.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("light", "radius", "message"),
    [
        (torch.zeros(1, 4, 3, 3), torch.zeros(1, 3, 3), r"got \[1, 4, 3, 3\] and \[1, 3, 3\]"),
        (torch.zeros(3, 3, 3), torch.zeros(1, 3, 3), r"got \[3, 3, 3\] and"),
        (torch.zeros(2, 3, 3, 3), torch.zeros(1, 3, 3), r"and \[1, 3, 3\]"),
        (torch.zeros(1, 3, 3, 3), torch.full((1, 3, 3), math.nan), "expected finite numbers"),
        (torch.zeros(1, 3, 3, 3), torch.full((1, 3, 3), -math.inf), "expected finite numbers"),
    ],
)
def test_bad_input(light: Tensor, radius: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        interface.scatter(light, radius)


def test_bad_input_of_dilate() -> None:
    with pytest.raises(ValueError, match=r"expected radius_px \[B, H, W\], got \[3, 3\]"):
        interface.dilate(torch.zeros(3, 3))
