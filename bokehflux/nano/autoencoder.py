"""Stage 1: the autoencoder, on rendered scenes at random levels."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from bokehflux.configs import VAEConfig
from bokehflux.models.vae import AutoencoderKL
from bokehflux.nano.recipe import AutoencoderStage
from bokehflux.training.data import rendered
from bokehflux.training.log import Log
from bokehflux.training.optim import Ema, Optimizer, paced, trapezoid

FULL_SIZE_SHARE = 0.2
"""Last share of the steps, on whole images."""


def train_autoencoder(
    config: VAEConfig, stage: AutoencoderStage, size_px: int, device: torch.device, log: Log
) -> AutoencoderKL:
    """Train from scratch; the returned model's scale and shift give its latents mean 0 and std 1."""
    generator = torch.Generator(device).manual_seed(stage.seed)
    torch.manual_seed(stage.seed)
    vae = AutoencoderKL(config).to(device)
    vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = _image_pool(stage.scenes, size_px, generator)
    log.note("images", len(images))

    parameters = list(vae.parameters())
    optimizer = Optimizer(parameters, stage.lr, matrices=vae.units().matrices, weight_decay=0.0)
    ema = Ema(parameters, rate=0.002)
    for step, done in paced(stage.steps, stage.minutes):
        whole = done >= 1 - FULL_SIZE_SHARE
        x = _crops(
            images, stage.batch // 4 if whole else stage.batch, size_px if whole else size_px // 2, generator
        )
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss, l1, edges, kl = _loss(vae, x, stage, step % 3 == 0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step(trapezoid(done))
        ema.update()
        log.step(step, l1=l1, edges=edges, kl=kl)
    log.note("steps", step + 1)
    ema.copy_to_parameters()
    return _normalised(vae, images[:512])


def _loss(vae: AutoencoderKL, x: Tensor, stage: AutoencoderStage, half_scale: bool) -> tuple[Tensor, ...]:
    mean, logvar = (t.float() for t in vae.moments(x))
    z = mean + torch.randn_like(mean) * (0.5 * logvar).exp()
    error = vae.decoder(z).float() - x
    l1, edges = error.abs().mean(), laplacian_pyramid(error)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    loss = l1 + stage.square_weight * error.square().mean() + stage.edge_weight * edges + stage.kl_weight * kl
    if half_scale:
        small = vae.decoder(F.avg_pool2d(z, 2)).float() - F.avg_pool2d(x, 2)
        loss = loss + stage.half_scale_weight * (
            small.abs().mean() + stage.edge_weight * laplacian_pyramid(small)
        )
    return loss, l1, edges, kl


def laplacian_pyramid(error: Tensor, levels: int = 3) -> Tensor:
    """Mean L1 of the band-pass levels of an error image [B, 3, H, W]: punishes lost edges more than tint."""
    total = error.new_zeros(())
    for _ in range(levels):
        coarse = F.avg_pool2d(error, 2)
        total = total + (error - F.interpolate(coarse, scale_factor=2.0, mode="nearest")).abs().mean()
        error = coarse
    return total


@torch.no_grad()
def _image_pool(count: int, size_px: int, generator: torch.Generator) -> Tensor:
    """[count, 3, S, S] uint8, at levels uniform in 0-30."""

    def draw(n: int, _: int) -> Tensor:
        return torch.rand(n, generator=generator, device=generator.device) * 30

    parts = [(im * 255).round().to(torch.uint8) for *_, im in rendered(count, 1, draw, generator, size_px)]
    return torch.cat(parts)


def _crops(images: Tensor, batch: int, side: int, generator: torch.Generator) -> Tensor:
    """Random images, one random crop position on the 8-pixel grid and one mirroring per batch, in -1..1."""
    device = images.device
    rows = torch.randint(len(images), (batch,), generator=generator, device=device)
    slots = (images.shape[-1] - side) // 8 + 1
    top, left, mirror = (int(torch.randint(n, (), device="cpu")) for n in (slots, slots, 2))
    x = images[rows, :, 8 * top : 8 * top + side, 8 * left : 8 * left + side].float() / 127.5 - 1
    return (x.flip(3) if mirror else x).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def _normalised(vae: AutoencoderKL, images: Tensor) -> AutoencoderKL:
    """The same weights with scale and shift measured on `images`."""
    means = torch.cat([vae.moments(part.float() / 127.5 - 1)[0].float() for part in images.split(64)])
    config = dataclasses.replace(vae.config, scale=float(1 / means.std()), shift=float(means.mean()))
    result = AutoencoderKL(config).to(images.device)
    result.load_state_dict(vae.state_dict())
    return result.eval().requires_grad_(False)
