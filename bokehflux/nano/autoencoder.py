"""Stage 1: the autoencoder, on rendered scenes at random levels."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from bokehflux.configs import VAEConfig
from bokehflux.models.vae import AutoencoderKL
from bokehflux.nano.pool import Shoot, rendered, uniform_levels
from bokehflux.nano.recipe import AutoencoderStage
from bokehflux.training.log import Log
from bokehflux.training.loop import Course, Step, train
from bokehflux.training.optim import Optimizer, is_filter
from bokehflux.training.state import Saves

FULL_SIZE_SHARE = 0.2
"""Last share of the steps, on whole images."""


def train_autoencoder(
    config: VAEConfig,
    stage: AutoencoderStage,
    size_px: int,
    device: torch.device,
    log: Log,
    saves: Saves | None = None,
) -> AutoencoderKL:
    """Train from scratch; the returned model's scale and shift give its latents mean 0 and std 1."""
    generator = torch.Generator(device).manual_seed(stage.seed)
    torch.manual_seed(stage.seed)
    vae = AutoencoderKL(config).to(device)
    vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    shoot = Shoot(scenes=stage.scenes, draw=uniform_levels, size_px=size_px)
    with torch.no_grad():
        images = torch.cat([(x * 255).round().to(torch.uint8) for *_, x in rendered(shoot, generator)])
    log.note("images", len(images))

    def loss(step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        whole = step.done >= 1 - FULL_SIZE_SHARE
        batch, side = (stage.batch // 4, size_px) if whole else (stage.batch, size_px // 2)
        return _loss(vae, _crops(images, batch, side, generator), stage, half_scale=step.number % 3 == 0)

    optimizer = Optimizer(list(vae.named_parameters()), stage.lr, matrices=is_filter, weight_decay=0.0)
    course = Course(steps=stage.steps, minutes=stage.minutes, ema_rate=0.002)
    log.note("steps", train(loss, optimizer, course, log, saves))
    return _normalised(vae, images[:512])


def _loss(
    vae: AutoencoderKL, x: Tensor, stage: AutoencoderStage, half_scale: bool
) -> tuple[Tensor, dict[str, Tensor]]:
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
    return loss, {"l1": l1, "edges": edges, "kl": kl}


def laplacian_pyramid(error: Tensor, levels: int = 3) -> Tensor:
    """Mean L1 of the band-pass levels of an error image [B, 3, H, W]: punishes lost edges more than tint."""
    total = error.new_zeros(())
    for _ in range(levels):
        coarse = F.avg_pool2d(error, 2)
        total = total + (error - F.interpolate(coarse, scale_factor=2.0, mode="nearest")).abs().mean()
        error = coarse
    return total


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
