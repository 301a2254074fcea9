"""Blur found in two pictures of one scene, and the brightness of lights that a photograph clips."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bokehflux.aperture import DISC
from bokehflux.focus import Point
from bokehflux.rendering import probe
from bokehflux.rendering.lens_map import LensMap
from bokehflux.rendering.lights import restored
from bokehflux.rendering.photo import GAMMA, blur_photo, glow_shown


def textured(height: int, width: int) -> Tensor:
    """[3, H, W] with detail of several sizes everywhere."""
    drawn = torch.Generator().manual_seed(0)
    parts = []
    for size in (4, 8, 16):
        noise = torch.rand(1, 3, height // size, width // size, generator=drawn)
        parts.append(torch.nn.functional.interpolate(noise, (height, width)))
    return (sum(parts) / 3)[0] * 0.8 + 0.1  # type: ignore[operator]


@pytest.mark.parametrize(("level", "own_level", "size"), [(28.0, 0.0, (128, 160)), (20.0, 12.0, (144, 128))])
def test_radii_are_found_without_depth(level: float, own_level: float, size: tuple[int, int]) -> None:
    height, width = size
    picture = textured(height, width)
    wall = 0.18 * level  # radius in pixels
    subject = torch.zeros(height, width, dtype=torch.bool)
    subject[height // 4 : 3 * height // 4, width // 4 : width // 2] = True
    radius = torch.where(subject, 0.0, -wall)
    own = blur_photo(picture, radius * own_level / level)
    lens = LensMap.from_pictures(own, blur_photo(picture, radius), level, own_level)
    # Blurs add up as squares do: what is missing to a level is the root of a difference of squares.
    found = lens.radius_px((level**2 - own_level**2) ** 0.5)
    missing = wall * (1 - (own_level / level) ** 2) ** 0.5
    far = ~subject & (torch.arange(width) > 0.7 * width)
    inside = torch.zeros_like(subject)
    inside[2 * height // 5 : 3 * height // 5, width // 3 : 2 * width // 5] = True
    assert float(found[far].median()) == pytest.approx(-missing, rel=0.15)
    assert float(found[inside].abs().median()) < missing / 4
    assert lens.residual < 0.03
    moved = lens.focused_at(Point(width - 4, height // 2))
    assert float(moved.radius_px(level)[inside].median()) > 2


def test_flat_places_take_their_neighbours_radius() -> None:
    picture = textured(128, 128)
    picture[:, 40:80, 60:100] = 0.5
    lens = LensMap.from_pictures(picture, blur_photo(picture, torch.full((128, 128), -5.0)), 28)
    assert (lens.radius_px(28)[10:-10, 10:-10] + 5).abs().mean() < 1


def test_a_sharp_subject_is_explained_by_no_disc() -> None:
    """Far from what lies behind, a disc blurs the subject itself, and so does not explain it."""
    picture = textured(96, 96)[None]
    behind = torch.ones(1, 1, 96, 96)
    behind[..., 16:80, 16:80] = probe.IN_FRONT
    whole, disc = (probe._blurred(picture, [6.0], [count])[0] for count in (torch.ones_like(behind), behind))
    torch.testing.assert_close(disc[:, 40:56, 40:56], whole[:, 40:56, 40:56], atol=1e-4, rtol=0)
    rim = (disc - whole)[:, 20:76, 12:16].abs().mean()
    assert rim > 0.01, "what is behind hardly takes colours from the subject"


def test_what_differs_by_blur_alone_shows_small_subjects() -> None:
    """A network's picture is read in larger windows, which its lost detail fools less."""
    y, x = torch.arange(128.0)[:, None], torch.arange(128.0)
    from_middle = ((x - 64) ** 2 + (y - 64) ** 2).sqrt()
    picture = textured(128, 128)
    blurred = blur_photo(picture, torch.where(from_middle < 20, 0.0, -8.0))
    exact, loose = (
        -LensMap.from_pictures(picture, blurred, 28, loose=loose).radius_px(28)[from_middle < 16].mean()
        for loose in (False, True)
    )
    assert exact < 1.5 < 2.5 < loose


def test_another_scene_leaves_a_residual() -> None:
    picture = textured(128, 128)
    assert LensMap.from_pictures(picture, picture.flip(-1), 28).residual > 0.1


def test_a_large_photograph_has_its_map_at_its_own_size() -> None:
    picture = textured(384, 512)
    radius = torch.full((384, 512), -12.0)
    small = torch.nn.functional.interpolate(blur_photo(picture, radius)[None], (96, 128), mode="area")[0]
    found = LensMap.from_pictures(picture, small, 28).radius_px(28)
    assert found.shape == (384, 512)
    assert float(found.median()) == pytest.approx(-12, rel=0.15)


def test_bad_pictures() -> None:
    picture = textured(64, 64)
    for sharp, blurred, levels, says in (
        (picture[0], picture, (28,), "expected"),
        (picture, picture[:, :8], (28,), "too small"),
        (picture, picture, (31,), "between 0"),
        (picture, picture, (10, 12), "own_level"),
    ):
        with pytest.raises(ValueError, match=says):
            LensMap.from_pictures(sharp, blurred, *levels)


def points(peaks: list[float], sigma: float) -> Tensor:
    """[1, 3, 64, 32 n] light with a point of every peak, none of them clipped."""
    y, x = torch.arange(64.0)[:, None] - 32.3, torch.arange(32.0) - 15.8
    spot = (-(x**2 + y**2) / (2 * sigma**2)).exp()
    light = torch.cat([0.05 + peak * spot for peak in peaks], -1)
    return light.expand(1, 3, -1, -1).clone()


@pytest.mark.parametrize("sigma", [1.0, 1.3])
def test_the_glow_of_a_clipped_light_tells_its_energy(sigma: float) -> None:
    true = points([3.0, 6.0, 12.0], sigma)
    photo = (true.clamp(0, 1) ** (1 / GAMMA) * 255).round() / 255
    found = restored(photo**GAMMA)
    for light, expected in zip(found.split(32, -1), true.split(32, -1), strict=True):
        assert float(light.sum()) == pytest.approx(float(expected.sum()), rel=0.1)
    disc = blur_photo(photo[0], torch.full((64, 96), -8.0), DISC, highlights=None)
    expected = blur_photo(photo[0], torch.full((64, 96), -8.0), DISC)
    assert (disc**GAMMA).sum() > (expected**GAMMA).sum() * 1.2


@pytest.mark.parametrize("share", [0.4, 1.0])
def test_discs_tell_how_bright_lights_are(share: float) -> None:
    photo = ((points([6.0, 9.0], 1.2).clamp(0, 1) ** (1 / GAMMA) * 255).round() / 255)[0]
    radius = torch.full((64, 64), -8.0)
    shown = blur_photo(photo, radius, highlights=None, glow=share)
    assert glow_shown(photo, radius, shown) == pytest.approx(share, abs=0.03)
    assert glow_shown(photo / 2, radius, shown) == 1, "no light is clipped"
    lens = LensMap(blur=radius / 28, far=0.0, glow=share)
    torch.testing.assert_close(lens.render(photo, 28, highlights=None), shown)


def test_what_is_not_a_light_stays() -> None:
    paper = torch.full((1, 3, 64, 64), 0.1)
    paper[..., 10:40, 10:40] = 1.0
    assert torch.equal(restored(paper), paper)
    comet = points([6.0, 6.0], 1.2).clamp(max=1)
    comet[..., 36:] = 0.05
    comet[..., 31:34, 46:50] = 1.0
    comet[..., 30:35, 50:56] = 0.55  # its glow lies on one side alone
    assert torch.equal(restored(comet)[..., 36:], comet[..., 36:])
    assert (restored(comet)[..., :32] > 1).any(), "the light beside it is one"
    grey = torch.full((1, 3, 64, 64), 0.5)
    assert torch.equal(restored(grey), grey)
    white = torch.ones(1, 3, 64, 64)
    assert torch.equal(restored(white), white)
