"""Focus: as text, and what is sharp by point, mask, distance, slab and tilted plane; how far the rest is."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bokehflux import lens
from bokehflux.focus import Depth, Focus, Plane, Point, Slab, Subject, parse_focus
from bokehflux.rendering.depth import disparity_of, filled_disparity, normalised, quantile
from bokehflux.rendering.lens_map import LensMap
from bokehflux.rendering.photo import blur_photo

DISPARITY = torch.linspace(0.1, 1.0, 64).expand(512, 64).contiguous()
"""1/m, nearer to the right."""
MAP = LensMap(blur=DISPARITY, px_m=1.0)
NOTHING = torch.zeros_like(DISPARITY) > 1


def test_radii_of_a_wall_behind_the_focus() -> None:
    """The lens's own formula, and its sign: above 0 before the focus."""
    distances_m = torch.tensor([1.0, 2.0, 4.0, math.inf])
    found = LensMap.from_depth(distances_m.expand(512, 4)).focused_at(Slab(2.0, 2.0))
    expected = [lens.radius_px(20.0, d, 2.0) for d in distances_m.tolist()]
    torch.testing.assert_close(
        found.radius_px(20.0)[0] * 512 / 4,  # a picture of 4 pixels has little blur
        torch.tensor(expected) * torch.tensor([1.0, 1, -1, -1]),
    )


def test_both_meanings_of_a_level() -> None:
    """Over the range, the farthest and nearest points lie one level apart; distances mean what they did."""
    depth_m = torch.linspace(1, 5, 40).expand(512, 40).contiguous()
    raw, over_range = (
        LensMap.from_depth(depth_m, unify).focused_at(Slab(2, 3)) for unify in ("raw", "range")
    )
    gap = over_range.blur.max() - over_range.blur.min()
    assert gap.item() == pytest.approx(40 / 512, rel=1e-5)
    torch.testing.assert_close(over_range.radius_px(16.0), raw.radius_px(20.0), atol=1e-5, rtol=1e-4)


def test_shares_of_the_depth_lead_from_the_nearest_to_the_farthest_place() -> None:
    """But for a trace at both ends, which is noise of the map."""
    ramp = LensMap(blur=torch.linspace(-2, 1, 1001).expand(3, 1001).contiguous())
    for text, sharp in (("near", 0.97), ("far", -1.97), ("0.5", -0.5)):
        radius = ramp.focused_at(parse_focus(text)).radius_px(10.0)[0]
        assert float(ramp.blur[0, radius.abs().argmin()]) == pytest.approx(sharp, abs=0.01)
        assert float(radius.max() - radius.min()) == pytest.approx(30, rel=1e-5), "and the slope stays"
    radius = ramp.focused_at(Depth(0, 0.5)).radius_px(10.0)[0]
    assert float((radius == 0).float().mean()) == pytest.approx(0.49, abs=0.005)


def test_without_focus_all_is_sharp() -> None:
    assert not LensMap.from_depth(torch.rand(9, 9) + 1).radius_px(30.0).any()


def test_blur_grows_with_the_picture() -> None:
    large, small = (LensMap(blur=torch.full((n, n), n / 512), far=0.0, near=0.0) for n in (1024, 512))
    assert large.radius_px(7.0)[0, 0] == 2 * small.radius_px(7.0)[0, 0]
    torch.testing.assert_close(small.resized(1024, 1024).radius_px(7.0), large.radius_px(7.0))


def test_a_map_at_another_size() -> None:
    """The picture of a sloping wall at twice the size: twice the blur, the same focus."""
    small, large = (LensMap.from_depth(1 / torch.linspace(0.1, 1.0, n).expand(n // 2, n)) for n in (64, 128))
    for focus in (Slab(2, 3), Point(20, 10), Plane((Point(0, 0), Point(60, 3), Point(9, 30)))):
        found = small.focused_at(focus).resized(64, 128).radius_px(30.0)
        double = Point(40, 20) if isinstance(focus, Point) else focus
        if isinstance(focus, Plane):
            double = Plane(tuple(Point(2 * p.x, 2 * p.y) for p in focus.points))  # type: ignore[arg-type]
        torch.testing.assert_close(found, large.focused_at(double).radius_px(30.0), atol=0.05, rtol=0)
    with pytest.raises(ValueError, match="a map of 64 x 32 does not lie over a picture of 64 x 128"):
        small.resized(128, 64)


def test_the_picture_is_rendered_by_its_radii() -> None:
    picture, found = torch.rand(3, 48, 64), LensMap(blur=DISPARITY[:48], far=0.5, near=0.5)
    assert torch.equal(found.render(picture, 30.0), blur_photo(picture, found.radius_px(30.0)))


def test_a_point_is_sharp() -> None:
    radius = MAP.focused_at(Point(20, 100)).radius_px(30.0)
    assert radius[:, 20].abs().max() == 0 and (radius[:, :20] < 0).all() and (radius[:, 21:] > 0).all()


def test_a_point_is_not_fooled_by_one_pixel() -> None:
    broken = DISPARITY.clone()
    broken[100, 20] = 50.0
    assert LensMap(blur=broken).focused_at(Point(20, 100)).near == MAP.focused_at(Point(20, 100)).near
    assert MAP.focused_at(Point(0, 0)).near == pytest.approx(0.1, abs=0.05)


def test_a_mask_is_sharp_by_its_median_or_whole() -> None:
    mask = torch.zeros_like(DISPARITY, dtype=torch.bool)
    mask[:, 10:31] = True
    middle = MAP.focused_at(Subject(), mask).radius_px(30.0)
    assert middle[0, 20].abs() < 1e-5 and middle[0, 10] < 0 < middle[0, 30]
    whole = MAP.focused_at(Subject(1.0), mask).radius_px(30.0)
    assert whole[mask].abs().max() < 1e-5
    assert (whole[:, :10] < 0).all() and (whole[:, 31:] > 0).all()


def test_a_slab_is_sharp() -> None:
    radius = MAP.focused_at(Slab(2.0, 4.0)).radius_px(30.0)
    sharp = (DISPARITY >= 0.25) & (DISPARITY <= 0.5)
    assert torch.equal(radius == 0, sharp)
    assert radius[0, 40] == pytest.approx(30 * float(DISPARITY[0, 40] - 0.5), rel=1e-5)


def test_a_tilted_plane_is_sharp_where_it_lies() -> None:
    """A floor that recedes upwards lies in focus as a whole; what stands on it does not."""
    floor = torch.linspace(0.05, 0.8, 48)[:, None].expand(48, 64).clone() + torch.linspace(0, 0.1, 64)
    standing = floor.clone()
    standing[20:30, 30:40] = 0.9
    focus = Plane((Point(3, 4), Point(60, 8), Point(20, 44)))
    radius = LensMap(blur=standing).focused_at(focus).radius_px(30.0)
    on_floor = torch.ones(48, 64, dtype=torch.bool)
    on_floor[20:30, 30:40] = False
    assert radius[on_floor].abs().max() < 1e-4 and radius[~on_floor].min() > 0.5


def test_a_map_of_levels() -> None:
    found = MAP.focused_at(Slab(math.inf, math.inf))
    levels = torch.zeros(512, 64)
    levels[:, 32:] = 20.0
    radius = found.radius_px(levels)
    assert (radius[:, :32] == 0).all()
    assert torch.equal(radius[:, 32:], found.radius_px(20.0)[:, 32:])
    with pytest.raises(ValueError, match=r"must be \[512, 64\], got \[64, 512\]"):
        found.radius_px(levels.mT)


@given(level=st.floats(0, 30), low=st.floats(0, 1), range_=st.floats(0, 0.5), more=st.floats(0, 0.5))
def test_more_depth_of_field_is_never_more_blur(level: float, low: float, range_: float, more: float) -> None:
    thin = LensMap(blur=DISPARITY, far=low, near=low + range_)
    deep = LensMap(blur=DISPARITY, far=low - more, near=low + range_ + more).radius_px(level)
    radius = thin.radius_px(level)
    assert (deep.abs() <= radius.abs() + 1e-5).all() and (deep * radius >= 0).all()
    assert thin.radius_px(0.0).abs().max() == 0


def test_unknown_depth_is_the_median_and_the_sky_is_far() -> None:
    depth = torch.tensor([[1.0, 2.0, 4.0], [math.nan, math.inf, 0.0], [-1.0, 2.0, 2.0]])
    assert disparity_of(depth).tolist() == [[1.0, 0.5, 0.25], [0.5, 0.0, 0.5], [0.5, 0.5, 0.5]]
    assert normalised(torch.tensor([2.0, 3.0, 6.0])).tolist() == pytest.approx([0, 0.25, 1])


@pytest.mark.parametrize("gap", [1, 4, 9, 30])
def test_a_hole_beside_a_near_thing_belongs_to_what_it_hides(gap: int) -> None:
    """As a stereo pair leaves it: the near thing, then what only one eye sees."""
    depth = torch.full((40, 100), 10.0)
    depth[:, :30], depth[:, 30 : 30 + gap] = 2.0, math.nan
    disparity = filled_disparity(depth)
    assert (disparity[:, :30] == 0.5).all() and disparity[:, 30:].allclose(torch.tensor(0.1))
    assert (LensMap.from_depth(depth).focused_at(Point(10, 10)).radius_px(30.0)[:, 30:] < 0).all()


def test_a_hole_within_a_thing_is_of_that_thing() -> None:
    depth = torch.full((64, 64), 10.0)
    depth[8:56, 8:56], depth[28:36, 28:36] = 2.0, 0.0
    assert torch.equal(filled_disparity(depth), 1 / torch.where(depth == 0, 2.0, depth))


@given(height=st.integers(1, 20), width=st.integers(1, 20), unknown=st.floats(0, 1), seed=st.integers(0, 99))
def test_filling_invents_no_distance_and_leaves_none_unknown(
    height: int, width: int, unknown: float, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    depth = torch.rand(height, width, generator=draw) + 0.5
    depth[torch.rand(height, width, generator=draw) < unknown] = math.nan
    depth[0, 0] = math.inf
    found, known = filled_disparity(depth), ~depth.isnan()
    assert torch.equal(found[known], 1 / depth[known]) and torch.isin(found, 1 / depth[known]).all()


def test_quantiles_of_more_pixels_than_torch_takes() -> None:
    assert quantile(torch.arange(2**24 + 2, dtype=torch.float32), 0.5) == pytest.approx(2**23 + 0.5, abs=1)


points = st.builds(Point, st.integers(0, 99_999), st.integers(0, 99_999))
distances = st.floats(1e-3, 1e6) | st.just(math.inf)
planes = st.lists(points, min_size=3, max_size=3).filter(
    lambda p: (p[1].x - p[0].x) * (p[2].y - p[0].y) != (p[1].y - p[0].y) * (p[2].x - p[0].x)
)


@given(
    points
    | st.builds(Subject, st.floats(0, 1).map(lambda share: round(share, 4)))
    | st.lists(distances, min_size=2, max_size=2).map(lambda ends: Slab(*sorted(ends)))
    | st.lists(st.floats(0, 1).map(lambda share: round(share, 4)), min_size=2, max_size=2).map(
        lambda ends: Depth(*sorted(ends))
    )
    | planes.map(lambda corners: Plane(tuple(corners)))
)
def test_text_and_back(focus: Focus) -> None:
    assert parse_focus(str(focus)) == focus


@pytest.mark.parametrize(
    ("text", "focus"),
    [
        ("120,80", Point(120, 80)),
        (" Mask ", Subject()),
        ("mask:0.5", Subject(0.5)),
        ("2.5m", Slab(2.5, 2.5)),
        ("2-4m", Slab(2, 4)),
        ("2m-inf", Slab(2, math.inf)),
        ("inf", Slab(math.inf, math.inf)),
        ("Near", Depth(0, 0)),
        ("far", Depth(1, 1)),
        ("0.5", Depth(0.5, 0.5)),
        ("0-.25", Depth(0, 0.25)),
        ("0,0/10,0/0,10", Plane((Point(0, 0), Point(10, 0), Point(0, 10)))),
    ],
)
def test_what_people_type(text: str, focus: Focus) -> None:
    assert parse_focus(text) == focus


@pytest.mark.parametrize(
    "text", ["", "120", "120,", "-1,2", "2.5", "m", "masks", "1,2/3,4", "1,2/3,4/5,6/7,8"]
)
def test_other_words(text: str) -> None:
    with pytest.raises(ValueError, match="focus: expected a point X,Y in pixels, near, far, a share"):
        parse_focus(text)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MAP.focused_at(Point(64, 0)), r"expected a pixel of 64 x 512, got 64,0"),
        (lambda: Point(0, -1), r"expected pixels from 0 on, got 0,-1"),
        (lambda: MAP.focused_at(Subject()), "focus mask: expected a mask, got none"),
        (lambda: MAP.focused_at(Subject(), torch.zeros(3, 3) > 1), "focus mask: expected bool"),
        (lambda: MAP.focused_at(Subject(), NOTHING), "it is empty, and something"),
        (lambda: parse_focus("mask:1.5"), "expected 0 to 1, got 1.5"),
        (lambda: parse_focus("0m"), "expected 0 < near <= far in metres, got 0m"),
        (lambda: parse_focus("3m-2m"), "expected 0 < near <= far in metres, got 3m-2m"),
        (lambda: parse_focus("0.8-0.2"), r"expected 0 \(nearest\) <= near <= far <= 1 .*, got 0.8-0.2"),
        (lambda: Slab(math.nan, 2), "expected 0 < near <= far"),
        (lambda: LensMap(blur=DISPARITY).focused_at(Slab(1, 2)), "distances are not known, give a point"),
        (lambda: parse_focus("0,0/1,1/3,3"), "three pixels that are not in a line"),
        (lambda: LensMap(blur=DISPARITY, far=1.0, near=0.5), "a far end of no more blur"),
        (lambda: MAP.radius_px(31.0), "level must be between 0"),
        (lambda: MAP.radius_px(-torch.ones(512, 64)), "level must be between 0"),
        (lambda: LensMap(blur=DISPARITY * math.nan), "blur: expected finite"),
        (lambda: LensMap(blur=DISPARITY[None]), r"blur: expected finite .*\[1, 512"),
        (lambda: LensMap.from_depth(torch.ones(3, 3), "range"), "needs depth that differs"),
        (lambda: LensMap.from_depth(torch.ones(3, 3), "both"), "expected raw or range, got 'both'"),
        (lambda: disparity_of(torch.zeros(3, 3)), "found no pixel that is above 0"),
        (lambda: disparity_of(torch.zeros(3)), r"depth_m: expected \[H, W\], got \[3\]"),
    ],
)
def test_bad_input(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@given(
    at=st.tuples(*[st.integers(0, 90)] * 2),
    step=st.tuples(*[st.integers(-9, 9)] * 2),
    times=st.integers(-9, 9),
)
def test_three_pixels_of_a_line_are_no_plane(at: tuple[int, int], step: tuple[int, int], times: int) -> None:
    x, y = at[0] + 90, at[1] + 90  # with room for every step
    line = [Point(x, y), Point(x + step[0], y + step[1]), Point(x + times * step[0], y + times * step[1])]
    with pytest.raises(ValueError, match="not in a line"):
        Plane((line[0], line[1], line[2]))
    if any(step):
        Plane((line[0], line[1], Point(x - step[1], y + step[0])))
