"""Picture metrics against values worked out by hand, and against the renderer that they will judge."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from bokehflux import metrics
from bokehflux.nano.colors import dominant_color
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


def test_lvcorr_is_one_for_a_linear_falling_curve() -> None:
    base = torch.rand(1, 3, 16, 16, generator=seeded(1)) - 0.5
    level = torch.linspace(0, 30, 8)
    images = 0.5 + 0.5 * base * torch.exp(-0.05 * level).view(-1, 1, 1, 1)
    assert metrics.lvcorr(level, images).item() == pytest.approx(1, abs=1e-4)
    assert metrics.lvcorr(level, images.flip(0)).item() == pytest.approx(-1, abs=1e-4)


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
