"""What is measured on pictures: sharpness, its relation to the level, content kept.

Pictures are [B, 3, H, W] in 0 ... 1, display-referred; functions are batched, deterministic, weight-free.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bokehflux.aperture import DISC
from bokehflux.rendering.blur import Blur


def luma(img: torch.Tensor) -> torch.Tensor:
    """BT.601 luma [B, H, W] on the scale of the input, from [B, 3, H, W]."""
    check_pictures(img)
    r, g, b = img.unbind(1)
    return 0.299 * r + 0.587 * g + 0.114 * b


def sharpness(img: torch.Tensor) -> torch.Tensor:
    """Log of the population variance of the 4-neighbour Laplacian of luma on the 0-255 scale: [B]."""
    y = luma(img.float()) * 255
    inner = y[:, 1:-1, 1:-1]
    laplacian = y[:, :-2, 1:-1] + y[:, 2:, 1:-1] + y[:, 1:-1, :-2] + y[:, 1:-1, 2:] - 4 * inner
    return laplacian.flatten(1).var(1, correction=0).clamp(min=1e-8).log()


def pearson(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Linear correlation along the last axis, shape [...]; 0 where either side is constant."""
    a, b = a.double() - a.double().mean(-1, keepdim=True), b.double() - b.double().mean(-1, keepdim=True)
    scale = a.norm(dim=-1) * b.norm(dim=-1)
    return torch.where(scale > 1e-12, (a * b).sum(-1) / scale.clamp(min=1e-12), 0.0)


def spearman(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Rank correlation along the last axis, ties at their mean rank; 0 where either side is constant."""
    return pearson(_ranks(a), _ranks(b))


def lvcorr(levels: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Level-to-blur correlation of one scene: Pearson of `levels` [K] with -`sharpness(images)` [K, 3, H, W].

    1 is a blur that grows linearly (in log variance) with the level asked for. Bokeh Diffusion's LVCorr.
    """
    return pearson(levels.to(images.device), -sharpness(images))


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB for a peak of 1: [B]; capped at 100 dB."""
    if a.shape != b.shape:
        raise ValueError(f"psnr: expected two pictures of one shape, got {list(a.shape)} and {list(b.shape)}")
    return -10 * (a.float() - b.float()).square().flatten(1).mean(1).clamp(min=1e-10).log10()


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


def blur_matched_psnr(a: torch.Tensor, b: torch.Tensor, radius_px: float = 20.0) -> torch.Tensor:
    """PSNR [B] after the same strong blur of both: whether two levels show one scene.

    `radius_px` is for pictures 256 high and scales with the height.
    """
    radius = radius_px * a.shape[-2] / 256
    return psnr(disc_blur(a, radius), disc_blur(b, radius))


def _ranks(t: torch.Tensor) -> torch.Tensor:
    less = (t[..., None, :] < t[..., :, None]).sum(-1)
    equal = (t[..., None, :] == t[..., :, None]).sum(-1)
    return less + (equal - 1) / 2


def check_pictures(img: torch.Tensor) -> None:
    """Raise ValueError unless img is [B, 3, H, W]."""
    if img.dim() != 4 or img.shape[1] != 3:
        raise ValueError(f"picture: expected [B, 3, H, W], got {list(img.shape)}")
