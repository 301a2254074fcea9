"""Picture metrics against values worked out by hand, and against the renderer that they will judge."""

from __future__ import annotations

import colorsys
import dataclasses
import math

import numpy as np
import pytest
import torch

from bokehflux import metrics
from bokehflux.nano.colors import dominant_color
from bokehflux.nano.scenery.spec import COLORS
from bokehflux.nano.scenes import build_scenes, render, sample_specs


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_luma_weights_sum_to_one_and_follow_bt601() -> None:
    colors = torch.eye(3).view(3, 3, 1, 1)
    assert torch.allclose(metrics.luma(colors).flatten(), torch.tensor([0.299, 0.587, 0.114]))


def test_sharpness_is_the_log_population_variance_of_the_laplacian() -> None:
    img = torch.rand(2, 3, 9, 12, generator=seeded(0))
    y = (img.double() * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1).numpy() * 255
    expected = []
    for picture in y:
        values = [
            picture[r - 1, c] + picture[r + 1, c] + picture[r, c - 1] + picture[r, c + 1] - 4 * picture[r, c]
            for r in range(1, 8)
            for c in range(1, 11)
        ]
        expected.append(math.log(np.var(values)))
    assert metrics.sharpness(img).tolist() == pytest.approx(expected, abs=1e-4)


def test_pearson_by_hand() -> None:
    a = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert metrics.pearson(a, 5 - 2 * a).item() == pytest.approx(-1)
    assert metrics.pearson(a, torch.tensor([1.0, 3.0, 2.0, 4.0])).item() == pytest.approx(0.8)
    assert metrics.pearson(a, torch.ones(4)).item() == 0
    assert metrics.pearson(a.expand(3, 4), a.expand(3, 4)).shape == (3,)


def test_spearman_ranks_and_averages_ties() -> None:
    a = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert metrics.spearman(a, a.exp()).item() == pytest.approx(1)
    # Ranks of the second are 0, 1.5, 1.5, 3: correlation 4.5 / sqrt(5 * 4.5).
    tied = metrics.spearman(a, torch.tensor([0.0, 7.0, 7.0, 9.0])).item()
    assert tied == pytest.approx(4.5 / math.sqrt(22.5))


def faded(levels: torch.Tensor, contrast: torch.Tensor) -> torch.Tensor:
    """Pictures [K, 3, 16, 16] of one noise with these contrasts [K]."""
    return 0.5 + 0.5 * (torch.rand(1, 3, 16, 16, generator=seeded(1)) - 0.5) * contrast.view(-1, 1, 1, 1)


def test_lvcorr_against_the_level_is_one_where_the_variance_falls_linearly() -> None:
    level = torch.linspace(0, 30, 8)
    images = faded(level, (1 - 0.03 * level).sqrt())
    assert metrics.lvcorr(level, images).item() == pytest.approx(1, abs=1e-4)
    assert metrics.lvcorr(level, images.flip(0)).item() == pytest.approx(-1, abs=1e-4)
    assert metrics.lvcorr(level, faded(level, torch.ones(8))).item() == 0, "constant"


def test_lvcorr_to_a_reference_by_hand() -> None:
    level = torch.linspace(0, 30, 4)
    reference, images = faded(level, torch.tensor([4.0, 3, 2, 1])), faded(level, torch.tensor([4.0, 2, 3, 1]))
    # Variances go as squares: 16, 9, 4, 1 and 16, 4, 9, 1.
    expected = np.corrcoef([16, 9, 4, 1], [16, 4, 9, 1])[0, 1]
    assert metrics.lvcorr_to(reference, images).item() == pytest.approx(expected, abs=1e-4)
    assert metrics.lvcorr_to(reference, reference / 2).item() == pytest.approx(1, abs=1e-6)


def test_monotonicity_counts_neighbours_that_lose_sharpness() -> None:
    level = torch.linspace(0, 30, 5)
    assert metrics.monotonicity(faded(level, torch.tensor([1.0, 0.8, 0.9, 0.9, 0.5]))).item() == 0.5
    assert metrics.monotonicity(faded(level, torch.ones(5))).item() == 0


def test_psnr_by_hand_and_shape_error() -> None:
    a = torch.zeros(2, 3, 4, 4)
    assert torch.allclose(metrics.psnr(a, a + 0.1), torch.tensor(20.0), atol=1e-3)
    assert (metrics.psnr(a, a) == 100).all()
    with pytest.raises(ValueError, match=r"\[2, 3, 4, 4\] and \[2, 3, 4, 5\]"):
        metrics.psnr(a, torch.zeros(2, 3, 4, 5))


def test_disc_blur_matches_direct_convolution() -> None:
    img = torch.rand(1, 3, 24, 31, generator=seeded(2))
    radius = 3.0
    d = torch.arange(-6, 7).float()
    kernel = (math.sqrt(radius**2 + 0.25) + 0.5 - (d[:, None] ** 2 + d[None] ** 2).sqrt()).clamp(0, 1)
    wide = torch.nn.functional.pad(img, (6, 6, 6, 6), mode="reflect")
    expected = torch.nn.functional.conv2d(wide, (kernel / kernel.sum()).expand(3, 1, 13, 13), groups=3)
    assert torch.allclose(metrics.disc_blur(img, radius), expected, atol=1e-5)
    assert torch.allclose(metrics.disc_blur(img, 0.0), img, atol=1e-5)
    with pytest.raises(ValueError, match="expected >= 0, got -1"):
        metrics.disc_blur(img, -1.0)


def test_blur_matched_psnr_ignores_detail_but_not_content() -> None:
    a = torch.rand(1, 3, 64, 64, generator=seeded(3)) * 0.2 + 0.4
    detail = (torch.rand(1, 3, 64, 64, generator=seeded(4)) - 0.5) * 0.2
    assert metrics.blur_matched_psnr(a, a + detail) > metrics.psnr(a, a + detail) + 10
    shifted = torch.cat([a[..., :32] + 0.3, a[..., 32:]], -1)
    assert metrics.blur_matched_psnr(a, shifted) < 20


def test_ssim_matches_its_definition_window_by_window() -> None:
    a = torch.rand(1, 3, 14, 17, generator=seeded(5))
    b = (a + 0.3 * torch.rand(1, 3, 14, 17, generator=seeded(6))).clamp(0, 1)
    x, y = (metrics.luma(t.double())[0].numpy() for t in (a, b))
    place = np.arange(-5, 6)
    window = np.exp(-(place[:, None] ** 2 + place[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for r in range(14 - 10):
        for c in range(17 - 10):
            u, v = x[r : r + 11, c : c + 11], y[r : r + 11, c : c + 11]
            mu, mv = (window * u).sum(), (window * v).sum()
            vu, vv = (window * (u - mu) ** 2).sum(), (window * (v - mv) ** 2).sum()
            uv = (window * (u - mu) * (v - mv)).sum()
            light = (2 * mu * mv + 1e-4) / (mu**2 + mv**2 + 1e-4)
            values.append(light * (2 * uv + 9e-4) / (vu + vv + 9e-4))
    assert metrics.ssim(a, b).item() == pytest.approx(np.mean(values), abs=1e-6)
    assert metrics.ssim(a, a).item() == pytest.approx(1)
    with pytest.raises(ValueError, match="11 pixels or more"):
        metrics.ssim(a[..., :8], b[..., :8])


def test_sharpness_kept_looks_at_the_region_alone() -> None:
    first = torch.rand(3, 32, 32, generator=seeded(7))
    left = torch.zeros(32, 32, dtype=torch.bool)
    left[:, :16] = True
    soft = metrics.disc_blur(first[None], 1.5)[0]
    half = torch.where(left, first, soft)
    images = torch.stack([first, half, soft, 0.5 + 0.5 * (first - 0.5)])
    kept = metrics.sharpness_kept(images, first, torch.nn.functional.pad(left[:, :14], (0, 18)))
    assert kept[:2].tolist() == pytest.approx([1, 1], abs=1e-5) and kept[2] < 0.4
    assert kept[3].item() == pytest.approx(0.5, abs=1e-4)
    sharpened = metrics.sharpness_kept(first[None], images[3], left)
    assert sharpened.item() == pytest.approx(0.5, abs=1e-4), "more than there was is a change, too"
    assert metrics.sharpness_kept(images, first, left & False).isnan().all()


def test_the_edge_of_a_picture_is_no_contrast() -> None:
    flat = torch.full((1, 3, 12, 9), 0.7)
    assert metrics.contrast(flat, torch.ones(12, 9)).item() == pytest.approx(math.log(1e-6))


FINE = 6
"""Points a pixel's side of the scene that is photographed: optics happens before pixels."""


def disc(radius: float) -> torch.Tensor:
    """A disc of this radius in points, drawn by sampling 4 x 4 places in each: none of our own code."""
    n = int(radius) + 2
    at = (np.arange(4 * (2 * n + 1)) + 0.5) / 4 - n - 0.5
    inside = (at[:, None] ** 2 + at[None] ** 2 <= radius**2).reshape(2 * n + 1, 4, 2 * n + 1, 4)
    return torch.from_numpy(inside.mean((1, 3)) / inside.mean((1, 3)).sum()).float()


def things(kind: str, size: int = 96) -> torch.Tensor:
    """Linear light [3, size * FINE, size * FINE] with something to measure blur by."""
    n = size * FINE
    y, x = torch.meshgrid(torch.arange(n) / FINE, torch.arange(n) / FINE, indexing="ij")
    light = torch.full((3, n, n), 0.05)
    if kind == "edges":  # slanted, as on the charts by which lenses are measured
        light[:, x + 0.11 * y > 50.3] += 0.5
        light[:, y - 0.17 * x > 29.6] += 0.3
    elif kind == "lights":
        for row, column in ((20.3, 30.1), (50.7, 70.4), (75.2, 22.8)):
            light[:, (y - row) ** 2 + (x - column) ** 2 < 1.5**2] = 1.0
    else:
        coarse = torch.rand(1, 3, size // 4, size // 4, generator=seeded(9))
        light = torch.nn.functional.interpolate(coarse, (n, n), mode="bilinear")[0]
    return light


def photographed(light: torch.Tensor, radius: float = 0.0) -> torch.Tensor:
    """Blurred by a disc of so many pixels, gathered into pixels, displayed, 8 bits: [3, H, W]."""
    if radius:
        kernel = disc(radius * FINE)
        n, (height, width) = kernel.shape[0] // 2, light.shape[-2:]
        wide = torch.nn.functional.pad(light[None], (n, n, n, n), mode="reflect")[0]
        shape = (height + 4 * n, width + 4 * n)
        spectrum = torch.fft.rfft2(wide, s=shape) * torch.fft.rfft2(kernel, s=shape)
        light = torch.fft.irfft2(spectrum, s=shape)[:, 2 * n : 2 * n + height, 2 * n : 2 * n + width]
    pixels = torch.nn.functional.avg_pool2d(light, FINE)
    return (pixels.clamp(0, 1) ** (1 / 2.2) * 255).round() / 255


RADII = (1.2, 1.7, 3.0, 5.2, 7.0)


@pytest.mark.parametrize("kind", ["edges", "lights", "texture"])
def test_blur_radius_recovers_known_discs(kind: str) -> None:
    light = things(kind)
    sharp = photographed(light)
    images = torch.stack([sharp, *(photographed(light, radius) for radius in RADII)])
    found = metrics.blur_radius(images, sharp)
    assert found[0] == 0
    assert found[1:].tolist() == pytest.approx(RADII, rel=0.05)


def test_blur_radius_tells_regions_apart() -> None:
    light = things("texture")
    near = torch.zeros(96, 96, dtype=torch.bool)
    near[30:66, 30:66] = True
    sharp = photographed(light)
    images = torch.stack([torch.where(near, sharp, photographed(light, radius)) for radius in RADII])
    assert metrics.blur_radius(images, sharp, near).tolist() == [0.0] * len(RADII)
    assert metrics.blur_radius(images, sharp, ~near).tolist() == pytest.approx(RADII, rel=0.05)


def test_blur_radius_says_when_there_is_none() -> None:
    sharp = photographed(things("texture"))
    assert metrics.blur_radius(sharp[None], sharp, torch.zeros(96, 96)).isnan().all(), "an empty region"
    assert metrics.blur_radius(torch.full((1, 3, 96, 96), 0.5), sharp).isnan().all(), "beyond any disc"


def test_blur_radius_says_when_a_pixel_is_none() -> None:
    """In that picture alone; in none where it lies outside of the region."""
    light = things("texture")
    sharp = photographed(light)
    images = torch.stack([photographed(light, radius) for radius in RADII])
    inside = torch.zeros(96, 96, dtype=torch.bool)
    inside[20:76, 20:76] = True
    wanted = metrics.blur_radius(images, sharp, inside)
    images[2, 1, 50, 50] = torch.nan
    found = metrics.blur_radius(images, sharp, inside)
    assert found.isnan().tolist() == [False, False, True, False, False]
    assert torch.equal(found[[0, 1, 3, 4]], wanted[[0, 1, 3, 4]])
    images[2], sharp[0, 5, 5] = photographed(light, RADII[2]), torch.nan
    images[0, 2, 80, 3] = torch.nan
    assert torch.equal(metrics.blur_radius(images, sharp, inside), wanted)
    sharp[:, 50, 50] = torch.nan
    assert metrics.blur_radius(images, sharp, inside).isnan().all()


def test_pictures_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected \[B, 3, H, W\], got \[3, 8, 8\]"):
        metrics.sharpness(torch.zeros(3, 8, 8))


@pytest.mark.parametrize("level", [0.0, 15.0])
def test_dominant_color_reads_the_renderer(level: float) -> None:
    n = 90
    spec = sample_specs(n, seeded(7))
    i = torch.arange(n)
    spec = dataclasses.replace(spec, color=i % 10, pattern=i // 10 % 3)
    found = dominant_color(render(build_scenes(spec, 64, seeded(8), "cpu"), torch.full((n,), level)))
    assert (found == spec.color).float().mean() >= 0.97


@pytest.mark.parametrize(
    ("hue", "name"), [(3, "red"), (350, "red"), (345, "pink"), (45, "yellow"), (250, "blue")]
)
def test_hues_lie_on_a_circle(hue: int, name: str) -> None:
    """The nearest one may lie beyond 0 degrees."""
    color = torch.tensor(colorsys.hsv_to_rgb(hue / 360, 0.8, 0.8)).view(1, 3, 1, 1)
    assert COLORS[int(dominant_color(color.expand(1, 3, 16, 16)))] == name
