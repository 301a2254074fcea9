"""What is measured on pictures: sharpness, its relation to the level, content kept, the blur's radius.

Pictures are [B, 3, H, W] in 0 ... 1, display-referred; functions are batched, deterministic, weight-free.
docs/metrics.md says what each figure means and how it can mislead.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from bokehflux.aperture import DISC
from bokehflux.rendering.blur import Blur
from bokehflux.rendering.photo import GAMMA

SMALLEST_FALL = 1e-3
"""A fall of `sharpness` that is less is rounding, not blur."""
RADIUS_STEP = 1.12
"""Ratio of neighbouring radii that `blur_radius` tries; what lies between is interpolated."""
LARGEST_RADIUS = 1 / 12
"""The largest that it tries, as a share of the shorter side; level 30 across all of a scene is 1 / 17."""


def luma(img: torch.Tensor) -> torch.Tensor:
    """BT.601 luma [B, H, W] on the scale of the input, from [B, 3, H, W]."""
    check_pictures(img)
    r, g, b = img.unbind(1)
    return 0.299 * r + 0.587 * g + 0.114 * b


def laplacian_variance(img: torch.Tensor) -> torch.Tensor:
    """Population variance of the 4-neighbour Laplacian of luma on the 0-255 scale: [B]."""
    y = luma(img.float()) * 255
    inner = y[:, 1:-1, 1:-1]
    laplacian = y[:, :-2, 1:-1] + y[:, 2:, 1:-1] + y[:, 1:-1, :-2] + y[:, 1:-1, 2:] - 4 * inner
    return laplacian.flatten(1).var(1, correction=0)


def sharpness(img: torch.Tensor) -> torch.Tensor:
    """Log of `laplacian_variance`: [B]."""
    return laplacian_variance(img).clamp(min=1e-8).log()


def pearson(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Linear correlation along the last axis, shape [...]; 0 where either side is constant."""
    a, b = a.double() - a.double().mean(-1, keepdim=True), b.double() - b.double().mean(-1, keepdim=True)
    scale = a.norm(dim=-1) * b.norm(dim=-1)
    return torch.where(scale > 1e-12, (a * b).sum(-1) / scale.clamp(min=1e-12), 0.0)


def spearman(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Rank correlation along the last axis, ties at their mean rank; 0 where either side is constant."""
    return pearson(_ranks(a), _ranks(b))


def lvcorr(levels: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """LVCorr against the level: Pearson of `levels` [K] with -`laplacian_variance` of one scene [K, 3, H, W].

    The variant of Generative Refocusing (arXiv 2512.16923). A lens scores less than 1, since its sharpness
    falls ever more slowly. 0 where the sharpness is constant.
    """
    return pearson(levels.to(images.device), -laplacian_variance(images))


def lvcorr_to(reference: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """LVCorr against a rendered reference: Pearson of both `laplacian_variance`s, [K, 3, H, W].

    The variant of Bokeh Diffusion (arXiv 2503.08434): the reference itself scores 1.
    """
    return pearson(laplacian_variance(reference), laplacian_variance(images))


def monotonicity(images: torch.Tensor) -> torch.Tensor:
    """Share of neighbours among [K, 3, H, W], levels ascending, of which the latter is blurrier."""
    return (sharpness(images).diff() < -SMALLEST_FALL).double().mean()


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB for a peak of 1: [B]; capped at 100 dB."""
    if a.shape != b.shape:
        raise ValueError(f"psnr: expected two pictures of one shape, got {list(a.shape)} and {list(b.shape)}")
    return -10 * (a.float() - b.float()).square().flatten(1).mean(1).clamp(min=1e-10).log10()


def ssim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Structural similarity of luma for a peak of 1, Gaussian windows of sigma 1.5 and 11 pixels: [B]."""
    if a.shape != b.shape or min(a.shape[-2:]) < 11:
        shapes = f"{list(a.shape)} and {list(b.shape)}"
        raise ValueError(f"ssim: expected two pictures of one shape, 11 pixels or more a side, got {shapes}")
    place = torch.arange(-5.0, 6.0, dtype=torch.float64, device=a.device)
    window = torch.exp(-(place**2) / (2 * 1.5**2))
    window = (window / window.sum()).view(1, 1, 11, 1)

    def mean(values: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.conv2d(values, window), window.mT)

    x, y = luma(a).double()[:, None], luma(b).double()[:, None]
    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    light = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
    structure = (2 * (mean(x * y) - mean_x * mean_y) + 0.03**2) / (var_x + var_y + 0.03**2)
    return (light * structure).flatten(1).mean(1)


def disc_blur(img: torch.Tensor, radius_px: float) -> torch.Tensor:
    """The picture blurred by a disc of `radius_px` >= 0, mirrored at its borders."""
    check_pictures(img)
    if radius_px < 0:
        raise ValueError(f"radius_px: expected >= 0, got {radius_px:g}")
    pad = min(int(radius_px) + 2, img.shape[-1] - 1, img.shape[-2] - 1)
    wide = F.pad(img.float(), (pad, pad, pad, pad), mode="reflect")
    height, width = wide.shape[-2:]
    blurred = Blur(wide, DISC).by(torch.tensor([float(radius_px)], device=img.device))
    return blurred[:, :, pad : height - pad, pad : width - pad]


def blur_matched(
    a: torch.Tensor, b: torch.Tensor, radius_px: float = 20.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both after the same strong blur: what is left to compare is whether two levels show one scene.

    `radius_px` is for pictures 256 high and scales with the height.
    """
    radius = radius_px * a.shape[-2] / 256
    return disc_blur(a, radius), disc_blur(b, radius)


def blur_matched_psnr(a: torch.Tensor, b: torch.Tensor, radius_px: float = 20.0) -> torch.Tensor:
    """PSNR [B] of `blur_matched`."""
    return psnr(*blur_matched(a, b, radius_px))


def sharpness_kept(images: torch.Tensor, first: torch.Tensor, region: torch.Tensor) -> torch.Tensor:
    """How much of its contrast at pixels' scale a region keeps: [K] of [K, 3, H, W], from `first` [3, H, W].

    The ratio of both standard deviations of the Laplacian within region [H, W], the smaller by the larger: 1
    is unchanged, less is blurred or sharpened. NaN where the region is smaller than 16 pixels.
    """
    if region[1:-1, 1:-1].sum() < 16:
        return torch.full((len(images),), math.nan)
    found = contrast(torch.cat([first[None], images]), region)
    return torch.exp(-(found[1:] - found[0]).abs())


def contrast(images: torch.Tensor, region: torch.Tensor) -> torch.Tensor:
    """Log standard deviation of the Laplacian of luma, [K] of [K, 3, H, W], within region [H, W].

    The picture's outermost pixels, which have no four neighbours, are left out.
    """
    y = luma(images.float())
    laplacian = F.conv2d(y[:, None], y.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None])[:, 0]
    inside = laplacian[:, region.bool()[1:-1, 1:-1]]
    return inside.std(1, correction=0).clamp(min=1e-6).log()


def blur_radius(
    images: torch.Tensor, sharp: torch.Tensor, region: torch.Tensor | None = None
) -> torch.Tensor:
    """Radius [K] in pixels of the disc that turns `sharp` [3, H, W] into [K, 3, H, W] within a region.

    A fit by least squares in linear light, over all discs up to `LARGEST_RADIUS` of the shorter side. What
    lies outside of region [H, W] is left out on both sides, so that it does not bleed in. 0 is unchanged; NaN
    where the region has fewer than 16 pixels, where it holds NaN, and where the largest disc fits best.
    """
    light = luma(torch.cat([sharp[None], images]).float().clamp(0, 1) ** GAMMA)[:, None]
    weight = torch.ones_like(light[:1]) if region is None else region.to(light)[None, None]
    light = torch.where(weight > 0, light, 0.0)  # 0 times NaN would be NaN
    largest = LARGEST_RADIUS * min(light.shape[-2:])
    if weight.sum() < 16 or largest < 1:
        return torch.full((len(images),), math.nan)
    count = 1 + math.ceil(math.log(largest / 0.5, RADIUS_STEP))
    radii = torch.cat([torch.zeros(1), 0.5 * RADIUS_STEP ** torch.arange(count)]).to(light.device)
    height, width = light.shape[-2:]
    pad = min(int(largest) + 2, width - 1, height - 1)
    both = F.pad(torch.cat([light[:1] * weight, weight], 1), (pad, pad, pad, pad), mode="reflect")
    spectrum, errors = torch.fft.rfft2(both), []
    frequency = torch.hypot(
        torch.fft.fftfreq(both.shape[-2], device=light.device)[:, None],
        torch.fft.rfftfreq(both.shape[-1], device=light.device),
    )
    for radius in radii:
        phase = (2 * math.pi * radius * frequency).clamp(min=1e-4)
        transfer = 2 * torch.special.bessel_j1(phase) / phase  # of a disc with unit sum
        blurred = torch.fft.irfft2(spectrum * transfer, s=both.shape[-2:])
        light_in, weight_in = blurred[:, :, pad : pad + height, pad : pad + width].split(1, 1)
        difference = light[1:] - light_in / weight_in.clamp(min=1e-3)
        errors.append((difference.square() * weight).flatten(1).sum(1) / weight.sum())
    return torch.stack([_lowest(radii, each) for each in torch.stack(errors, 1)])


def _lowest(radii: torch.Tensor, errors: torch.Tensor) -> torch.Tensor:
    """The radius of the least of errors [R], by the parabola through it and its neighbours."""
    best = int(errors.argmin())
    if not errors.isfinite().all():
        return errors.new_tensor(math.nan)
    if best in (0, len(radii) - 1):
        return radii[best] if best == 0 else errors.new_tensor(math.nan)
    (a, b, c), (x, y, z) = errors[best - 1 : best + 2].double(), radii[best - 1 : best + 2].double()
    up, down = (b - a) / (y - x), (c - b) / (z - y)
    lowest = (x + y) / 2 - up * (z - x) / 2 / (down - up).clamp(min=1e-30)
    return lowest.clamp(x, z).to(radii)


def _ranks(t: torch.Tensor) -> torch.Tensor:
    less = (t[..., None, :] < t[..., :, None]).sum(-1)
    equal = (t[..., None, :] == t[..., :, None]).sum(-1)
    return less + (equal - 1) / 2


def check_pictures(img: torch.Tensor) -> None:
    """Raise ValueError unless img is [B, 3, H, W]."""
    if img.dim() != 4 or img.shape[1] != 3:
        raise ValueError(f"picture: expected [B, 3, H, W], got {list(img.shape)}")
