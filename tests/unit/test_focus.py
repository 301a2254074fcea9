"""Focus: what is sharp by point, mask, distance, slab and tilted plane, and how far the rest is from it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bokehflux import lens
from bokehflux.rendering.focus import (
    Focus,
    at_distance,
    at_point,
    between,
    disparity_of,
    normalised,
    on_mask,
    quantile,
    radius_map,
    tilted,
)

DISPARITY = torch.linspace(0.1, 1.0, 64).expand(512, 64).contiguous()
"""1/m, nearer to the right."""


def test_radii_of_a_wall_behind_the_focus() -> None:
    """The lens's own formula, and its sign: above 0 before the focus."""
    distances_m = torch.tensor([1.0, 2.0, 4.0, math.inf])
    disparity = (1 / distances_m).expand(512, 4)
    radius = radius_map(disparity, at_distance(2.0), 20.0) * 512 / 4  # a picture of 4 pixels has little blur
    expected = [lens.radius_px(20.0, d, 2.0) for d in distances_m.tolist()]
    torch.testing.assert_close(radius[0], torch.tensor(expected) * torch.tensor([1.0, 1, -1, -1]))


def test_blur_grows_with_the_picture() -> None:
    small, large = torch.rand(512, 600), torch.rand(1, 1).expand(1024, 1200)
    small[:] = large[0, 0]
    focus = Focus(0.0, 0.0)
    assert radius_map(large, focus, 7.0)[0, 0] == 2 * radius_map(small, focus, 7.0)[0, 0]


def test_a_point_is_sharp() -> None:
    radius = radius_map(DISPARITY, at_point(DISPARITY, 20, 100), 30.0)
    assert radius[:, 20].abs().max() == 0 and (radius[:, :20] < 0).all() and (radius[:, 21:] > 0).all()


def test_a_point_is_not_fooled_by_one_pixel() -> None:
    broken = DISPARITY.clone()
    broken[100, 20] = 50.0
    assert at_point(broken, 20, 100) == at_point(DISPARITY, 20, 100)
    assert at_point(broken, 0, 0).near == pytest.approx(0.1, abs=0.05)


def test_a_mask_is_sharp_by_its_median_or_whole() -> None:
    mask = torch.zeros_like(DISPARITY, dtype=torch.bool)
    mask[:, 10:31] = True
    middle = radius_map(DISPARITY, on_mask(DISPARITY, mask), 30.0)
    assert middle[0, 20].abs() < 1e-5 and middle[0, 10] < 0 < middle[0, 30]
    whole = radius_map(DISPARITY, on_mask(DISPARITY, mask, share=1.0), 30.0)
    assert whole[mask].abs().max() < 1e-5
    assert (whole[:, :10] < 0).all() and (whole[:, 31:] > 0).all()


def test_a_slab_is_sharp() -> None:
    radius = radius_map(DISPARITY, between(2.0, 4.0), 30.0)
    sharp = (DISPARITY >= 0.25) & (DISPARITY <= 0.5)
    assert torch.equal(radius == 0, sharp)
    edge = DISPARITY[0, 40]
    assert radius[0, 40] == pytest.approx(30 * 64 / 512 * float(edge - 0.5), rel=1e-5)


def test_a_tilted_plane_is_sharp_where_it_lies() -> None:
    """A floor that recedes upwards lies in focus as a whole; what stands on it does not."""
    floor = torch.linspace(0.05, 0.8, 48)[:, None].expand(48, 64).clone() + torch.linspace(0, 0.1, 64)
    focus = tilted(floor, ((3, 4), (60, 8), (20, 44)))
    standing = floor.clone()
    standing[20:30, 30:40] = 0.9
    radius = radius_map(standing, focus, 30.0)
    on_floor = torch.ones(48, 64, dtype=torch.bool)
    on_floor[20:30, 30:40] = False
    assert radius[on_floor].abs().max() < 1e-4 and radius[~on_floor].min() > 0.5


def test_a_map_of_levels() -> None:
    levels = torch.zeros(512, 64)
    levels[:, 32:] = 20.0
    radius = radius_map(DISPARITY, Focus(0.0, 0.0), levels)
    assert (radius[:, :32] == 0).all()
    assert torch.equal(radius[:, 32:], radius_map(DISPARITY, Focus(0.0, 0.0), 20.0)[:, 32:])
    with pytest.raises(ValueError, match=r"must be \[512, 64\] as disparity, got \[64, 512\]"):
        radius_map(DISPARITY, Focus(0.0, 0.0), levels.mT)


@given(level=st.floats(0, 30), low=st.floats(0, 1), range_=st.floats(0, 0.5), more=st.floats(0, 0.5))
def test_more_depth_of_field_is_never_more_blur(level: float, low: float, range_: float, more: float) -> None:
    thin = radius_map(DISPARITY, Focus(low, low + range_), level)
    deep = radius_map(DISPARITY, Focus(low - more, low + range_ + more), level)
    assert (deep.abs() <= thin.abs() + 1e-5).all() and (deep * thin >= 0).all()
    assert radius_map(DISPARITY, Focus(low, low + range_), 0.0).abs().max() == 0


def test_unknown_depth_is_the_median() -> None:
    depth = torch.tensor([[1.0, 2.0, 4.0], [math.nan, math.inf, 0.0], [-1.0, 2.0, 2.0]])
    assert disparity_of(depth).tolist() == [[1.0, 0.5, 0.25], [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]
    assert normalised(torch.tensor([2.0, 3.0, 6.0])).tolist() == pytest.approx([0, 0.25, 1])


def test_quantiles_of_more_pixels_than_torch_takes() -> None:
    assert quantile(torch.arange(2**24 + 2, dtype=torch.float32), 0.5) == pytest.approx(2**23 + 0.5, abs=1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: at_point(DISPARITY, 64, 0), r"expected a pixel of 64 x 512, got \(64, 0\)"),
        (lambda: at_point(DISPARITY, 0, -1), r"expected a pixel of 64 x 512, got \(0, -1\)"),
        (lambda: on_mask(DISPARITY, torch.zeros(3, 3, dtype=torch.bool)), "focus mask: expected bool"),
        (lambda: on_mask(DISPARITY, torch.zeros_like(DISPARITY) > 1), r"with a pixel set.* with 0$"),
        (lambda: on_mask(DISPARITY, DISPARITY > 0, 1.5), "expected 0 ... 1, got 1.5"),
        (lambda: at_distance(0), "expected 0 < near <= far in metres, got 0"),
        (lambda: between(3, 2), "expected 0 < near <= far in metres, got 3 and 2"),
        (lambda: between(math.nan, 2), "expected 0 < near <= far"),
        (lambda: tilted(DISPARITY, ((0, 0), (1, 1), (3, 3))), "three pixels that are not in a line"),
        (lambda: Focus(1.0, 0.5), "a far end of no more disparity"),
        (lambda: radius_map(DISPARITY, Focus(0.1, 0.1), 31.0), "level must be between 0"),
        (lambda: radius_map(DISPARITY, Focus(0.1, 0.1), -torch.ones(512, 64)), "level must be between 0"),
        (lambda: radius_map(DISPARITY * math.nan, Focus(0.1, 0.1), 3.0), "disparity: expected finite"),
        (lambda: radius_map(DISPARITY[None], Focus(0.1, 0.1), 3.0), r"disparity: expected finite .*\[1, 512"),
        (lambda: disparity_of(torch.zeros(3, 3)), "found no pixel that is finite and above 0"),
        (lambda: disparity_of(torch.zeros(3)), r"depth_m: expected \[H, W\], got \[3\]"),
    ],
)
def test_bad_input(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
