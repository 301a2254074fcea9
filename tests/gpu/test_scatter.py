"""The compiled scatter: real sizes and radii, against the reference in double precision, equal bits twice."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bokehflux.kernels.scatter import interface, reference
from bokehflux.kernels.scatter.reference import Iris

pytestmark = pytest.mark.usefixtures("poisoned")


def check(light: Tensor, radius: Tensor, iris: Iris) -> None:
    assert interface.takes(light, radius)
    ours, again = (interface.scatter(light, radius, iris) for _ in range(2))
    reach = int(radius.abs().max()) + 1
    exact = reference.scatter(light.double(), radius.double(), iris, reach)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    assert (ours[0] - exact[0]).abs().max() < 1e-5
    assert (ours[1] / exact[1] - 1).abs().max() < 1e-4
    nearest = interface.dilate(radius)
    assert torch.equal(nearest, interface.dilate(radius)) and torch.equal(
        nearest, reference.dilate(radius, reach)
    )


@pytest.mark.parametrize("iris", [Iris(), Iris(6), Iris(5, 0.3, 0.4)], ids=["disc", "hexagon", "donut"])
@pytest.mark.parametrize(
    ("batch", "height", "width", "largest"),
    [(1, 512, 512, 30.0), (2, 333, 127, 12.0), (3, 1, 1, 2.0), (1, 5, 700, 60.0), (2, 64, 128, 0.0)],
)
def test_against_the_reference(batch: int, height: int, width: int, largest: float, iris: Iris) -> None:
    light = torch.rand(batch, 3, height, width, device="cuda")
    radius = largest * (2 * torch.rand(batch, height, width, device="cuda") - 1)
    check(light, radius, iris)


def test_level_30_everywhere() -> None:
    light = torch.rand(1, 3, 512, 512, device="cuda")
    check(light, torch.full((1, 512, 512), 30.0, device="cuda"), Iris())


def test_one_lamp_in_a_sharp_picture() -> None:
    """Only the tiles in its reach ask far; what they find is the same."""
    light, radius = torch.rand(1, 3, 400, 600, device="cuda"), torch.zeros(1, 400, 600, device="cuda")
    radius[0, 200, 300] = 45.5
    check(light, radius, Iris())


def test_past_32_bits() -> None:
    """More numbers than 32 bits count: the last picture of a large batch is as by itself."""
    count = 2**31 // (4 * 1032 * 1032) + 2
    light = torch.rand(1, 3, 1024, 1024, device="cuda").expand(count, -1, -1, -1)
    radius = torch.rand(1, 1024, 1024, device="cuda").expand(count, -1, -1) * 2
    mean, weight = interface.scatter(light, radius)
    alone = interface.scatter(light[-1:], radius[-1:])
    assert torch.equal(mean[-1:], alone[0]) and torch.equal(weight[-1:], alone[1])
