"""Apertures: a point of light takes their shape, keeps its energy, and grows with the level."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bokehflux.aperture import (
    Anamorphic,
    Aperture,
    CatsEye,
    Disc,
    Donut,
    Picture,
    Polygon,
    aperture_text,
    parse_aperture,
)
from bokehflux.rendering.blur import Blur, aperture_spectrum
from bokehflux.rendering.layers import Layer, composite, composite_by_quarters, quarters
from bokehflux.rendering.photo import blur_photo

SIZE = 97


def heart(x: Tensor, y: Tensor) -> Tensor:
    x, y = 1.2 * x, 0.1 - 1.2 * y
    return (x**2 + y**2 - 0.5) ** 3 - 1.4 * x**2 * y**3 < 0


def drawn(inside: Callable[[Tensor, Tensor], Tensor], side: int = 64) -> Picture:
    along = (torch.arange(side) + 0.5) / side * 2 - 1
    return Picture(inside(along, along[:, None]).float())


def in_triangle(x: Tensor, y: Tensor) -> Tensor:
    return (y < 0.5) & (y > -1 + math.sqrt(3) * x.abs())


SHAPES: dict[str, tuple[Aperture, Callable[[Tensor, Tensor], Tensor]]] = {
    "disc": (Disc(), lambda x, y: x**2 + y**2 < 1),
    "triangle": (Polygon(3), in_triangle),
    "donut": (Donut(0.6), lambda x, y: (x**2 + y**2 < 1) & (x**2 + y**2 > 0.36)),
    "anamorphic": (Anamorphic(2), lambda x, y: (2 * x) ** 2 + y**2 < 1),
    "square": (Polygon(4, 45), lambda x, y: torch.maximum(x.abs(), y.abs()) < math.sqrt(0.5)),
    "heart": (drawn(heart), heart),
}
"""Apertures, and by themselves, in the unit circle, the shapes that they should have."""
each_shape = pytest.mark.parametrize("name", SHAPES)
APERTURES = [*(aperture for aperture, _ in SHAPES.values()), CatsEye(0.6), Polygon(7, 10), Anamorphic(0.6)]


def template(inside: Callable[[Tensor, Tensor], Tensor], radius_px: float) -> Tensor:
    """What a shape covers of every pixel, by 7 x 7 points in each."""
    fine = (torch.arange(7 * SIZE) + 0.5) / 7 - SIZE / 2
    hits = inside(fine / radius_px, fine[:, None] / radius_px).float()
    return hits.view(SIZE, 7, SIZE, 7).mean((1, 3))


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def light_through(aperture: Aperture, radius_px: float) -> Tensor:
    """A point of light in the middle of a dark photograph, in linear light."""
    photo = torch.zeros(3, SIZE, SIZE)
    photo[:, SIZE // 2, SIZE // 2] = 1
    return blur_photo(photo, torch.full((SIZE, SIZE), radius_px), aperture)[0] ** 2.2


@each_shape
@pytest.mark.parametrize("radius_px", [6.0, 13.5, 26.0])
def test_a_point_of_light_takes_the_shape(name: str, radius_px: float) -> None:
    aperture, inside = SHAPES[name]
    upright = light_through(aperture, -radius_px)
    assert correlation(upright, template(inside, radius_px)) >= 0.95
    turned = light_through(aperture, radius_px)
    assert correlation(turned, template(inside, radius_px).flip(0, 1)) >= 0.95, "before the focus"


def test_shapes_are_told_apart() -> None:
    draw, right, tried = torch.Generator().manual_seed(1), 0, 0
    for radius_px in (4 + 10 * torch.rand(8, generator=draw)).tolist():
        templates = {name: template(inside, radius_px) for name, (_, inside) in SHAPES.items()}
        for name, (aperture, _) in SHAPES.items():
            noisy = light_through(aperture, -radius_px)
            noisy = noisy + 0.2 * noisy.max() * torch.randn(noisy.shape, generator=draw)
            found = max(templates, key=lambda other: correlation(noisy, templates[other]))
            right, tried = right + (found == name), tried + 1
    assert right >= 0.95 * tried


def kernel(aperture: Aperture, radius_px: float, at: tuple[float, float] = (0.0, 0.0)) -> Tensor:
    """[SIZE, SIZE] with the light in the middle."""
    spectrum = aperture_spectrum(aperture, torch.tensor([radius_px]), SIZE, SIZE, at=at)
    return torch.fft.fftshift(torch.fft.irfft2(spectrum, s=(SIZE, SIZE))[0])


@pytest.mark.parametrize("aperture", APERTURES, ids=lambda a: type(a).__name__)
def test_level_0_is_the_identity_and_light_is_kept(aperture: Aperture) -> None:
    picture = torch.rand(2, 4, 24, 37)
    blur = Blur(picture, aperture)
    torch.testing.assert_close(blur.by(torch.zeros(2)), picture, atol=2e-6, rtol=0)
    out = blur.by(torch.tensor([-5.0, 0.7]))
    torch.testing.assert_close(out.sum((2, 3)), picture.sum((2, 3)), rtol=1e-4, atol=0)


@given(radius_px=st.floats(-12, 12), seed=st.integers(0, 99))
def test_turning_the_picture_turns_the_blur(radius_px: float, seed: int) -> None:
    picture = torch.rand(1, 3, 21, 21, generator=torch.Generator().manual_seed(seed))
    radius = torch.tensor([radius_px])
    blurred = Blur(picture, Disc()).by(radius)
    torch.testing.assert_close(Blur(picture.rot90(1, (2, 3)), Disc()).by(radius), blurred.rot90(1, (2, 3)))
    turned = Blur(picture.rot90(1, (2, 3)), Polygon(3, -90)).by(radius)
    torch.testing.assert_close(
        turned, Blur(picture, Polygon(3)).by(radius).rot90(1, (2, 3)), atol=1e-5, rtol=0
    )


def radius_of(spot: Tensor) -> float:
    """That of the disc with the same second moment."""
    along = torch.arange(SIZE) - SIZE // 2
    return math.sqrt(2 * float((spot * (along**2 + along[:, None] ** 2)).sum() / spot.sum()))


def test_radius_is_linear_in_the_level() -> None:
    levels = torch.tensor([2.0, 5.0, 10.0, 20.0, 30.0])
    found = torch.tensor([radius_of(light_through(Disc(), -level)) for level in levels.tolist()])
    slope = torch.corrcoef(torch.stack([levels, found]))[0, 1] * found.std() / levels.std()
    assert slope == pytest.approx(1, abs=0.05)
    assert (found - levels).abs().max() < 0.3


def test_cats_eyes_open_towards_the_middle() -> None:
    middle, corner = kernel(CatsEye(0.5), 12.0), kernel(CatsEye(0.5), 12.0, (0.8, 0.6))
    torch.testing.assert_close(middle, kernel(Disc(), 12.0))
    along = torch.arange(SIZE) - SIZE // 2
    outward, across = 0.8 * along + 0.6 * along[:, None], 0.8 * along[:, None] - 0.6 * along
    lit = corner > corner.max() / 2
    assert outward[lit].max() == pytest.approx(6, abs=0.8) and outward[lit].min() == pytest.approx(
        -6, abs=0.8
    )
    assert across[lit].max() > 9


def test_cats_eyes_in_a_picture() -> None:
    """A light at the right border is narrow, one in the centre is round."""
    photo = torch.zeros(3, 65, 129)
    photo[:, 32, [64, 112]] = 1
    out = blur_photo(photo, torch.full((65, 129), -10.0), CatsEye(0.9))[0] ** 2.2
    lit = out > out.max() / 3
    widths = [int(part.any(0).count_nonzero()) for part in (lit[:, 44:85], lit[:, 92:])]
    heights = [int(part.any(1).count_nonzero()) for part in (lit[:, 44:85], lit[:, 92:])]
    assert widths[0] == heights[0] and widths[1] < 0.6 * heights[1]


@pytest.mark.parametrize(("x", "y"), [(64, 64), (13, 13), (115, 13)])
def test_quarters_of_a_cats_eye_are_equally_bright(x: int, y: int) -> None:
    """In a corner two of its quarters are small, and get less light, not brighter."""
    light = torch.zeros(1, 3, 129, 129)
    light[..., y, x] = 1
    layers = [Layer(light=light, radius_px=torch.tensor([-10.0]))]
    whole, by_quarters = (f(layers, CatsEye(0.6), margin_px=12) for f in (composite, composite_by_quarters))
    assert correlation(by_quarters, whole) > 0.999


@pytest.mark.parametrize("aperture", APERTURES, ids=lambda a: type(a).__name__)
def test_quarters_make_the_whole(aperture: Aperture) -> None:
    parts = quarters(aperture)
    assert sum(share for share, _ in parts) == pytest.approx(1)
    together = sum(share * kernel(part, -9.0) for share, part in parts)
    assert (together - kernel(aperture, -9.0)).abs().sum() < 0.03


def test_light_in_one_quarter_only() -> None:
    light = torch.zeros(8, 8)
    light[:4, 4:] = 1
    ((share, _),) = quarters(Picture(light))
    assert share == 1
    assert light_through(Picture(light), -8.0).sum() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Polygon(2), "blades: expected a whole number from 3 to 100, got 2"),
        (lambda: Donut(1.0), "hole: expected between 0 and 1, got 1"),
        (lambda: Anamorphic(math.nan), "squeeze: expected 0.05 to 20, got nan"),
        (lambda: CatsEye(1), "cut: expected from 0 to below 1, got 1"),
        (lambda: Picture(torch.ones(3, 4)), r"expected a square \[n, n\], got \[3, 4\]"),
        (lambda: Picture(torch.zeros(3, 3)), "at least 0, and one above 0"),
        (lambda: Picture(torch.full((3, 3), math.nan)), "at least 0, and one above 0"),
    ],
)
def test_what_is_not_an_aperture(make: Callable[[], Aperture], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@given(
    st.just(Disc())
    | st.builds(Polygon, st.integers(3, 100), st.floats(-360, 360))
    | st.builds(Donut, st.floats(0.01, 0.99))
    | st.builds(Anamorphic, st.floats(0.05, 20))
    | st.builds(CatsEye, st.floats(0, 0.99))
)
def test_text_and_back(aperture: Aperture) -> None:
    assert parse_aperture(aperture_text(aperture)) == aperture


@pytest.mark.parametrize(
    ("text", "aperture"),
    [
        ("disc", Disc()),
        ("polygon", Polygon(6)),
        ("Polygon:7", Polygon(7)),
        ("polygon:6@15", Polygon(6, 15)),
        ("polygon@-15.5", Polygon(6, -15.5)),
        ("donut:.4", Donut(0.4)),
        ("anamorphic:2", Anamorphic(2)),
        ("cats-eye:0.5", CatsEye(0.5)),
        ("shapes/my star.PNG", Path("shapes/my star.PNG")),
    ],
)
def test_what_people_type(text: str, aperture: Aperture | Path) -> None:
    assert parse_aperture(text) == aperture
    assert parse_aperture(aperture_text(aperture)) == aperture


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected disc, polygon:BLADES"),
        ("hexagon", "cats-eye:CUT or the name of a picture .*, got 'hexagon'"),
        ("disc:3", "got 'disc:3'"),
        ("donut:0.5@3", "got 'donut:0.5@3'"),
        ("donut:nan", "got 'donut:nan'"),
        ("polygon:six", "got 'polygon:six'"),
        ("polygon:6.5", "expected a whole number from 3 to 100, got 6.5"),
        ("polygon:1000000", "from 3 to 100"),
        ("donut:1", "hole: expected between 0 and 1, got 1"),
        ("cats-eye:1", "cut: expected from 0 to below 1, got 1"),
        ("anamorphic:0", "squeeze: expected 0.05 to 20, got 0"),
    ],
)
def test_other_words(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_aperture(text)


@pytest.mark.parametrize("aperture", [Disc(), Donut(0.4), Anamorphic(3), Anamorphic(0.4)], ids=str)
def test_rims_are_as_soft_on_every_side(aperture: Aperture) -> None:
    """Across the rim, along both axes, coverage falls from 1 to 0 within the width that was asked for."""
    along, nought, edge = torch.linspace(0, 60, 6001), torch.zeros(1), torch.tensor(2.5)
    for x, y in ((along, nought), (nought, along)):
        cover = aperture.spread(x, y, torch.tensor(40.0), edge)
        rim = int((cover > 0).nonzero().max())
        soft = along[(cover > 0.01) & (cover < 0.99) & (along > along[rim] - 5)]
        assert float(soft.max() - soft.min()) == pytest.approx(2.5, rel=0.12)
