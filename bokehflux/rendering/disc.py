"""Disc-aperture blur by FFT."""

from __future__ import annotations

import torch


def disc_spectrum(radius_px: torch.Tensor, height: int, width: int, softness: float = 0.0) -> torch.Tensor:
    """Transfer function [B, height, width // 2 + 1] of a disc of unit sum and radius `radius_px` [B] >= 0.

    Radius 0 is the identity and the blur grows continuously from there: the kernel's edge lies at
    sqrt(r^2 + 1/4), the disc that a pixel grows into. The edge is 1 + softness * r pixels wide.
    """
    r = radius_px.view(-1, 1, 1)
    dy = torch.fft.fftfreq(height, 1 / height, device=r.device).view(1, -1, 1)
    dx = torch.fft.fftfreq(width, 1 / width, device=r.device).view(1, 1, -1)
    distance = (dx**2 + dy**2).sqrt()
    kernel = (((r**2 + 0.25).sqrt() - distance) / (1 + softness * r) + 0.5).clamp(0, 1)
    return torch.fft.rfft2(kernel / kernel.sum((1, 2), keepdim=True))


def blur_spectrum(spectrum: torch.Tensor, transfer: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Back to pixels [B, C, height, width] from a layer's `rfft2` and a transfer function; edges wrap."""
    return torch.fft.irfft2(spectrum * transfer[:, None], s=(height, width))
