"""The layered renderer: against rays through a thin lens, at depth edges, and cut out of flat pictures."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bokehflux.aperture import DISC, Anamorphic, Aperture, CatsEye, Disc, Picture, Polygon
from bokehflux.metrics import psnr
from bokehflux.nano.scenes import Scene, _develop, build_scenes, sample_specs
from bokehflux.rendering.bokehme import classical
from bokehflux.rendering.cut import cut, plane_radii
from bokehflux.rendering.fill import fill
from bokehflux.rendering.layers import Layer, composite, composite_by_quarters
from bokehflux.rendering.photo import BLURRED_PX, GAMMA, blur_photo, raised
from bokehflux.rendering.rims import rims_of_matte
from tests.thin_lens import Surface, ray_cast, round_lens

SIZE = 96


def texture(seed: int, size: int = SIZE) -> Tensor:
    """[3, size, size], 0 ... 1, with detail of every size."""
    draw = torch.Generator().manual_seed(seed)
    octaves = [torch.rand(1, 3, n, n, generator=draw) for n in (4, 12, 36)]
    return sum(F.interpolate(o, (size, size), mode="bilinear") for o in octaves)[0] / len(octaves)


def blob(seed: int, x: float, y: float, radius: float, size: int = SIZE) -> Tensor:
    """A textured disc with an antialiased rim, [4, size, size] premultiplied; x, y, radius in pixels."""
    along = torch.arange(float(size))
    cover = (radius - ((along - x) ** 2 + (along[:, None] - y) ** 2).sqrt() + 0.5).clamp(0, 1)
    return torch.cat([texture(seed, size) * cover, cover[None]])


def scene(near: float, subject: float, far: float) -> list[Surface]:
    """Blur radii of a wall, a disc before it, and one that hides part of both."""
    return [(texture(0), far), (blob(1, 55, 40, 24), subject), (blob(2, 30, 60, 16), near)]


def rendered(surfaces: list[Surface], aperture: Aperture = DISC, by_quarters: bool = True) -> Tensor:
    layers = [
        Layer(light=light[None], radius_px=torch.tensor([radius]) if radius else None)
        for light, radius in surfaces
    ]
    return (composite_by_quarters if by_quarters else composite)(layers, aperture, margin_px=24)[0]


def inner(light: Tensor) -> Tensor:
    """Display values away from the borders, which the truth repeats and the renderer mirrors."""
    return light[None, :, 16:-16, 16:-16].clamp(0, 1) ** (1 / GAMMA)


@pytest.mark.parametrize(
    "radii",
    [(9.0, 0.0, -9.0), (12.0, 6.0, 0.0), (0.0, -5.0, -11.0), (14.0, 0.0, 0.0), (7.0, 2.0, -4.0)],
    ids=["the middle of three", "the farthest", "the nearest", "all but the nearest", "none of three"],
)
def test_a_thin_lens_sees_the_same(radii: tuple[float, float, float]) -> None:
    surfaces = scene(*radii)
    truth = inner(ray_cast(surfaces, round_lens(1024)))
    whole, by_quarters = (psnr(inner(rendered(surfaces, DISC, q)), truth).item() for q in (False, True))
    print(f"one pass {whole:.1f} dB, by quarters {by_quarters:.1f} dB")
    assert by_quarters >= 45 and by_quarters > whole - 0.1


def test_other_apertures_through_a_thin_lens() -> None:
    """A triangle stands on its side behind the focus, on its top before it."""
    side = torch.linspace(-1, 1, 47)
    row, column = torch.meshgrid(side, side, indexing="ij")
    inside = (row < 0.5) & (row > -1 + math.sqrt(3) * column.abs())
    lens = list(zip(column[inside].tolist(), row[inside].tolist(), strict=True))
    for surfaces in (scene(10.0, 0.0, -10.0), scene(12.0, 5.0, 0.0)):
        truth = inner(ray_cast(surfaces, lens))
        assert psnr(inner(rendered(surfaces, Polygon(3))), truth).item() >= 45
        assert psnr(inner(rendered(surfaces, Polygon(3, 180))), truth).item() < 44


def edge(focus_on_subject: bool) -> tuple[Tensor, Tensor, Tensor]:
    """A dark square before a bright wall: photograph, signed radius, and what a thin lens sees, [3, S, S]."""
    light, square = torch.full((3, SIZE, SIZE), 0.7), torch.zeros(4, SIZE, SIZE)
    square[:, 32:64, 32:64] = torch.tensor([0.05, 0.05, 0.05, 1.0])[:, None, None]
    near, far = (0.0, -10.0) if focus_on_subject else (10.0, 0.0)
    flat = square[:3] + light * (1 - square[3:])
    radius = torch.where(square[3] > 0, near, far)
    return flat ** (1 / GAMMA), radius, rendered([(light, far), (square, near)]).clamp(0, 1) ** (1 / GAMMA)


@pytest.mark.parametrize("focus_on_subject", [True, False])
def test_halo_at_a_depth_edge(focus_on_subject: bool) -> None:
    """The largest error along an edge, in display values: what BokehMe's scatter leaves and we do not."""
    photo, radius, truth = edge(focus_on_subject)
    ours = (blur_photo(photo, radius) - truth).abs().max()
    scatter = (classical(photo[None], radius[None] / 10, GAMMA)[0] - truth).abs().max()
    assert ours < 1e-4
    assert scatter > 0.2, "a document says so: docs/rendering.md"


@pytest.mark.parametrize("width", [1, 2, 3, 6])
@pytest.mark.parametrize(("near", "far"), [(9.0, 0.0), (0.0, -9.0)])
def test_a_wire_is_all_rim(width: int, near: float, far: float) -> None:
    light, wire = torch.full((3, 64, 64), 0.6), torch.zeros(4, 64, 64)
    wire[3, :, 30 : 30 + width] = 1
    truth = rendered([(light, far), (wire, near)]) ** (1 / GAMMA)
    flat = (light * (1 - wire[3:])) ** (1 / GAMMA)
    radius = torch.where(wire[3] > 0, near, far)
    assert psnr(blur_photo(flat, radius)[None], truth[None]).item() >= 45


def test_a_matte_that_is_sure_nowhere_still_tells_front_from_back() -> None:
    """Its highest part is the front. Without one, the front's radius was 0: in focus."""
    radius, matte = torch.full((1, 1, 8, 8), 2.0), torch.full((1, 1, 8, 8), 0.1)
    radius[..., 4:], matte[..., 4:] = 6.0, 0.9
    rims = rims_of_matte(radius, matte)
    assert rims.front.min() == 6 and rims.back.max() == 2


@pytest.mark.parametrize("focus_on_subject", [True, False])
def test_rims_are_parted_by_colour(focus_on_subject: bool) -> None:
    """Antialiased rims, as in every photograph; the depth's own edge is hard."""
    light, subject = 0.3 + 0.4 * texture(0), blob(1, 48.3, 47.6, 22.5)
    subject[:3] = torch.tensor([0.02, 0.2, 0.05])[:, None, None] * subject[3]
    near, far = (0.0, -9.0) if focus_on_subject else (9.0, 0.0)
    truth = rendered([(light, far), (subject, near)]) ** (1 / GAMMA)
    flat = (subject[:3] + light * (1 - subject[3:])) ** (1 / GAMMA)
    ours = blur_photo(flat, torch.where(subject[3] > 0.5, near, far))
    assert (ours - truth).abs().max() < 0.15
    assert psnr(ours[None], truth[None]).item() >= 38


def nano_scene(seed: int) -> Scene:
    draw = torch.Generator().manual_seed(seed)
    return build_scenes(sample_specs(1, draw), 128, draw, "cpu")


@pytest.mark.parametrize("gap", [0.35, 0.7])
def test_a_thin_lens_sees_nanos_scenes_the_same(gap: float) -> None:
    """Lamps brighter than white, and every layer out of focus."""
    made = nano_scene(6)
    surfaces: list[Surface] = [
        (made.background[0], 9 * (gap - made.background_gap.item())),
        (made.mid[0], 9 * (gap - made.mid_gap.item())),
        (made.subject[0], 9 * gap),
    ]
    truth = _develop(ray_cast(surfaces, round_lens(1024))[None] * made.exposure)[..., 12:-12, 12:-12]
    whole, by_quarters = (
        psnr(_develop(rendered(surfaces, DISC, q)[None] * made.exposure)[..., 12:-12, 12:-12], truth).item()
        for q in (False, True)
    )
    print(f"one pass {whole:.1f} dB, by quarters {by_quarters:.1f} dB")
    assert by_quarters >= 45 and by_quarters > whole + 5


@pytest.mark.parametrize("focus", ["subject", "middle", "background"])
@pytest.mark.parametrize("seed", [3, 4])
def test_a_flat_picture_and_its_depth(seed: int, focus: str) -> None:
    """The bundled model's scenes as flat pictures with depth: 30 dB to the scene, whatever is sharp."""
    made = nano_scene(seed)
    gap = {"subject": 0.0, "middle": made.mid_gap.item(), "background": made.background_gap.item()}[focus]
    table = (made.table_gap * made.table_depth[0].abs()).expand(made.table.shape[-2:])
    largest = 28 / 30 * 13 * 128 / 256
    surfaces: list[Surface] = [
        (made.background[0], largest * (gap - made.background_gap.item())),
        (made.table[0], largest * (gap - table)),
        (made.mid[0], largest * (gap - made.mid_gap.item())),
        (made.subject[0], largest * gap),
    ]
    flat, radius = surfaces[0][0], torch.full(table.shape, surfaces[0][1])
    for light, its_radius in surfaces[1:]:
        flat = light[:3] + flat * (1 - light[3:])
        radius = torch.where(light[3] > 0.5, torch.as_tensor(its_radius), radius)
    truth = ray_cast(surfaces, round_lens(192))

    def shown(light: Tensor) -> Tensor:
        return _develop(light[None] * made.exposure)[..., 8:-8, 8:-8]

    ours = composite_by_quarters(cut(flat[None], radius[None]), margin_px=16)[0]
    found, untouched = (psnr(shown(light), shown(truth)).item() for light in (ours, flat))
    print(f"{found:.1f} dB, untouched {untouched:.1f} dB")
    assert found >= 30 and found > untouched + 5


def test_a_matte_parts_what_one_pixel_shows() -> None:
    """A soft rim, half subject and half wall, in front of a far wall."""
    wall, subject = 0.2 * texture(0), blob(1, 48, 48, 20)
    cover = F.avg_pool2d(subject[None], 5, 1, 2)[0]
    truth = rendered([(wall, -9.0), (cover, 0.0)]).clamp(0, 1) ** (1 / GAMMA)
    flat = (cover[:3] + wall * (1 - cover[3:])) ** (1 / GAMMA)
    radius = torch.where(cover[3] > 0.5, 0.0, -9.0)
    errors = [
        psnr(blur_photo(flat, radius, matte=matte)[None], truth[None]).item() for matte in (None, cover[3])
    ]
    assert errors[1] > errors[0] + 3
    hard = (cover[3] > 0.5).float()
    assert torch.equal(blur_photo(flat, radius, matte=hard), blur_photo(flat, radius)), "knows no more"


def test_a_matte_leaves_other_rims_to_the_colours() -> None:
    """Two subjects, and a matte of one."""
    wall, first, second = 0.2 * texture(0), blob(1, 28, 48, 14), blob(2, 70, 48, 14)
    cover = F.avg_pool2d(first[None], 5, 1, 2)[0]
    truth = rendered([(wall, -9.0), (second, 0.0), (cover, 0.0)]).clamp(0, 1) ** (1 / GAMMA)
    flat = second[:3] + wall * (1 - second[3:])
    flat = (cover[:3] + flat * (1 - cover[3:])) ** (1 / GAMMA)
    radius = torch.where((cover[3] > 0.5) | (second[3] > 0.5), 0.0, -9.0)
    by_color, by_matte = ((blur_photo(flat, radius, matte=matte) - truth).abs() for matte in (None, cover[3]))
    assert torch.equal(by_color[..., 52:], by_matte[..., 52:]) or (
        by_matte[..., 52:].mean() < 1.05 * by_color[..., 52:].mean()
    )
    assert by_matte[..., :48].mean() < 0.8 * by_color[..., :48].mean()


def test_a_matte_of_a_subject_behind_everything() -> None:
    """A wrong matte makes a wrong picture, and no error."""
    out = blur_photo(texture(0), torch.full((SIZE, SIZE), 3.0), matte=blob(1, 40, 40, 20)[3])
    assert out.isfinite().all()


def test_what_is_sharp_stays_as_it_is() -> None:
    photo = texture(3)[:, :41, :67]
    torch.testing.assert_close(blur_photo(photo, torch.zeros(41, 67)), photo, atol=2e-6, rtol=0)
    half = torch.zeros(41, 67)
    half[:, 50:] = -8
    torch.testing.assert_close(blur_photo(photo, half)[:, :, :48], photo[:, :, :48], atol=1e-5, rtol=0)


@given(height=st.integers(1, 40), width=st.integers(1, 40), seed=st.integers(0, 9), most=st.floats(0, 15))
def test_any_size_any_radius(height: int, width: int, seed: int, most: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    photo = torch.rand(3, height, width, generator=draw)
    radius = most * (2 * torch.rand(height, width, generator=draw) - 1)
    out = blur_photo(photo, radius)
    assert out.shape == photo.shape and out.min() >= 0 and out.max() <= 1
    gray = torch.full_like(photo, 0.4)
    torch.testing.assert_close(blur_photo(gray, radius), gray, atol=1e-4, rtol=0), "even light stays even"


@given(seed=st.integers(0, 99), near=st.floats(0, 9), far=st.floats(-9, 0))
def test_turning_the_photo_turns_its_blur(seed: int, near: float, far: float) -> None:
    photo = texture(seed, 32)
    radius = torch.where(blob(seed, 12, 18, 7, 32)[3] > 0.5, near, far)
    turned = blur_photo(photo.rot90(1, (1, 2)), radius.rot90(1, (0, 1)))
    torch.testing.assert_close(turned, blur_photo(photo, radius).rot90(1, (1, 2)), atol=1e-3, rtol=0)


def test_blur_changes_without_a_step() -> None:
    """A wall that recedes to the right: the local contrast of its stripes falls steadily."""
    stripes = (torch.arange(160) % 2).float().expand(3, 48, 160) * 0.8 + 0.1
    out = blur_photo(stripes, torch.linspace(0, -2, 160).expand(48, 160).contiguous())
    contrast = (out[0, 24, 1:] - out[0, 24, :-1]).abs()
    assert (contrast.diff().abs() < 0.08).all() and contrast[1] > 0.7 and contrast[-5] < 0.1


def test_slanted_layers_and_flat_ones_agree_where_they_should() -> None:
    light, radius = torch.rand(1, 4, 20, 30), torch.tensor([-6.0])
    back = Layer(light=torch.rand(1, 3, 20, 30))
    flat = composite([back, Layer(light=light, radius_px=radius)])
    slanted = composite([back, Layer(light=light, radius_px=radius, share=torch.ones(1, 20, 1))])
    torch.testing.assert_close(slanted, flat)
    sharp = composite([back, Layer(light=light, radius_px=radius, share=torch.zeros(1, 20, 1))])
    torch.testing.assert_close(sharp, composite([back, Layer(light=light)]))


def test_fill_keeps_what_is_known() -> None:
    light, known = torch.rand(1, 3, 13, 22), (torch.rand(1, 1, 13, 22) < 0.3).float()
    filled = fill(light, known)
    assert torch.equal(filled[known.expand_as(light) == 1], light[known.expand_as(light) == 1])
    assert filled.min() >= 0 and filled.max() <= 1
    torch.testing.assert_close(fill(torch.full_like(light, 0.3), known), torch.full_like(light, 0.3))


@given(values=st.lists(st.floats(-60, 60, width=32), min_size=1, max_size=30))
def test_planes_lie_where_surfaces_do(values: list[float]) -> None:
    radii = plane_radii(torch.tensor(values))
    assert radii == sorted(set(radii)) and 0 in radii
    for value in values:
        assert min(abs(value - radius) for radius in radii) <= max(1, 0.125 * abs(value))


@given(value=st.floats(0.625, 60, width=32), sign=st.sampled_from([-1, 1]))
def test_a_flat_surface_has_a_plane_of_its_own(value: float, sign: int) -> None:
    assert sign * value in plane_radii(torch.full((5,), sign * value))


def test_highlights() -> None:
    light = torch.tensor([[0.2, 0.5, 1.0], [0.2, 0.5, 0.8], [0.2, 0.5, 0.6]]).view(1, 3, 1, 3)
    blurred = torch.full((1, 3), -6.0)
    assert torch.equal(raised(light, 1.0, blurred), light)
    assert torch.equal(raised(light, 20.0, 0 * blurred), light), "what is sharp stays as it is"
    out = raised(light, 20.0, blurred)
    torch.testing.assert_close(out[..., :2], light[..., :2])
    torch.testing.assert_close(out[..., 2], 20 * light[..., 2])
    photo = torch.zeros(3, 41, 41)
    photo[:, 20, 20] = 1
    discs = [blur_photo(photo, torch.full((41, 41), -6.0), highlights=h)[0, 20, 20].item() for h in (1, 20)]
    assert discs[1] == pytest.approx(20 ** (1 / GAMMA) * discs[0], rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(1, 4, 4), torch.zeros(4, 4)), r"got \[1, 1, 4, 4\] and \[1, 4, 4\]"),
        ((torch.zeros(3, 4, 4), torch.zeros(4, 5)), r"got \[1, 3, 4, 4\] and \[1, 4, 5\]"),
        ((torch.full((3, 4, 4), 255.0), torch.zeros(4, 4)), "display values of 0 ... 1, got 255 ... 255"),
        ((torch.full((3, 4, 4), -0.1), torch.zeros(4, 4)), "display values of 0 ... 1, got -0.1 ... -0.1"),
        ((torch.zeros(3, 4, 4), torch.full((4, 4), math.nan)), "expected finite numbers, found nan"),
        ((torch.zeros(3, 4, 4), torch.zeros(4, 4), Disc(), torch.full((4, 4), 2.0)), "matte: expected"),
        ((torch.zeros(3, 4, 4), torch.zeros(4, 4), Disc(), None, 0.5), "highlights: expected at least 1"),
    ],
)
def test_bad_input(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        blur_photo(*arguments)


def test_the_farthest_layer_covers() -> None:
    for layers in ([], [Layer(light=torch.zeros(1, 4, 3, 3))]):
        with pytest.raises(ValueError, match="expected the farthest to have 3 channels"):
            composite(layers)
    with pytest.raises(ValueError, match="expected at least one"):
        composite_by_quarters([])


def test_margins() -> None:
    """A mirror at every edge, whatever size an FFT likes."""
    light = torch.rand(1, 3, 17, 23)
    out = composite([Layer(light=light, radius_px=torch.tensor([-4.0]))], margin_px=7)
    wide = F.pad(light, (11, 11, 11, 11), mode="reflect")
    same = composite([Layer(light=wide, radius_px=torch.tensor([-4.0]))])[..., 11:-11, 11:-11]
    torch.testing.assert_close(out, same, atol=1e-5, rtol=0)
    for margin in (17, -1):
        with pytest.raises(ValueError, match=rf"less than the picture's \[17, 23\], got {margin}"):
            composite([Layer(light=light)], margin_px=margin)


def test_apertures_by_quarters() -> None:
    for aperture in (CatsEye(), Anamorphic(), Picture(torch.rand(9, 9))):
        whole, parts = (rendered(scene(0.0, 0.0, -8.0), aperture, q) for q in (False, True))
        assert (whole - parts).abs().max() < 0.02


def test_lights_are_raised_as_they_lose_their_edge() -> None:
    """By the share of a full blur that they have: half of it, half of the gain."""
    light, full = torch.ones(1, 3, 2, 2), torch.full((2, 2), 100.0)
    gain = float(raised(light, 9.0, full).max()) - 1
    for share in (0.25, 0.5, 1.0):
        radius_px = torch.full((2, 2), -share * BLURRED_PX)
        torch.testing.assert_close(raised(light, 9.0, radius_px) - 1, torch.full_like(light, share * gain))
