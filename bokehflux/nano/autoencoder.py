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
from bokehflux.training.batches import Draws
from bokehflux.training.log import Log
from bokehflux.training.loop import Course, Step, train
from bokehflux.training.optim import Optimizer
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
        draws, side = (step.draws.every(4), size_px) if whole else (step.draws, size_px // 2)
        return autoencoder_loss(
            vae, crops(images, draws, side), draws, stage, half_scale=step.number % 3 == 0
        )

    optimizer = Optimizer(
        list(vae.named_parameters()), stage.lr, matrices=vae.units().matrices, weight_decay=0.0
    )
    course = Course(
        seed=stage.seed, batch=stage.batch, steps=stage.steps, minutes=stage.minutes, ema_rate=0.002
    )
    log.note("steps", train(loss, optimizer, course, log, saves))
    return _normalised(vae, images[:512])


def autoencoder_loss(
    vae: AutoencoderKL, x: Tensor, draws: Draws, stage: AutoencoderStage, half_scale: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    mean, logvar = (t.float() for t in vae.moments(x))
    z = mean + draws.normal("posterior", *mean.shape[1:]) * (0.5 * logvar).exp()
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


def crops(images: Tensor, draws: Draws, side: int) -> Tensor:
    """Images at random, each cropped to a side on the 8-pixel grid and mirrored at random: [B, 3, side, side]
    in -1..1, channels last."""
    slots = (images.shape[-1] - side) // 8 + 1
    along = torch.arange(side, device=images.device)
    top, left = (8 * draws.integers("crop", slots, 2, 1)).unbind(1)  # [B, 1]
    column = torch.where(draws.integers("mirror", 2, 1) == 1, along.flip(0), along)  # [B, side]
    row = draws.integers("image", len(images), 1, 1)
    x = images[row, :, (top + along)[:, :, None], (left + column)[:, None, :]]  # [B, side, side, 3]
    return (x.float() / 127.5 - 1).permute(0, 3, 1, 2)


@torch.no_grad()
def _normalised(vae: AutoencoderKL, images: Tensor) -> AutoencoderKL:
    """The same weights with scale and shift measured on `images`."""
    means = torch.cat([vae.moments(part.float() / 127.5 - 1)[0].float() for part in images.split(64)])
    config = dataclasses.replace(vae.config, scale=float(1 / means.std()), shift=float(means.mean()))
    result = AutoencoderKL(config).to(images.device)
    result.load_state_dict(vae.state_dict())
    return result.eval().requires_grad_(False)
