"""Stage 2: the base model on scenes of unlabelled blur, then its guidance input.

The text encoders are trained from scratch together with the MMDiT. `distill_guidance` then teaches the
model, through its guidance input, what two passes of classifier-free guidance would predict.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bokehflux.attention import Plain
from bokehflux.models.clip import CLIPTextEncoder
from bokehflux.models.embeddings import RopeTable
from bokehflux.models.mmdit import MMDiT
from bokehflux.models.t5 import T5Encoder
from bokehflux.nano.recipe import BaseStage
from bokehflux.training.data import LatentPool
from bokehflux.training.log import Log
from bokehflux.training.objective import guided, logit_normal, mix, velocity_target
from bokehflux.training.optim import Ema, Optimizer, paced, trapezoid


class TextToVelocity(nn.Module):
    """Text encoders and MMDiT as one module: token ids in, velocity out."""

    def __init__(self, mmdit: MMDiT, t5: T5Encoder, clip: CLIPTextEncoder) -> None:
        super().__init__()
        self.mmdit, self.t5, self.clip = mmdit, t5, clip

    def forward(
        self, x: Tensor, t5_ids: Tensor, clip_ids: Tensor, sigma: Tensor, guidance: Tensor, rope: RopeTable
    ) -> Tensor:
        # The backend is named because picking one logs, which a compiled block cannot.
        spec = Plain(backend="sdpa")
        return self.mmdit(x, self.t5(t5_ids), self.clip(clip_ids), sigma, guidance, rope, spec)


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Draws training batches from a pool."""

    pool: LatentPool
    null_t5: Tensor
    null_clip: Tensor
    """Token ids [T] of the empty caption."""
    generator: torch.Generator

    def draw(self, batch: int, caption_dropout: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x0 [B, N, 64], eps of the same shape, T5 ids and CLIP ids [B, T]."""
        pool, device = self.pool, self.generator.device
        scene = torch.randint(pool.num_scenes, (batch,), generator=self.generator, device=device)
        level = torch.randint(pool.latents.shape[1], (batch,), generator=self.generator, device=device)
        x0 = pool.latents[scene, level].float()
        eps = torch.randn(x0.shape, generator=self.generator, device=device)
        drop = torch.rand(batch, 1, generator=self.generator, device=device) < caption_dropout
        t5_ids = torch.where(drop, self.null_t5, pool.t5_ids[scene])
        return x0, eps, t5_ids, torch.where(drop, self.null_clip, pool.clip_ids[scene])


def init_mmdit(mmdit: MMDiT) -> None:
    """Start of training: every block and the output begin as zero (adaLN-zero)."""
    for layer in (*mmdit.units().ahead, mmdit.final_layer):
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)


def train_base(model: TextToVelocity, rope: RopeTable, sampler: Sampler, stage: BaseStage, log: Log) -> None:
    """Train `model` in place; its weights end as the moving average."""
    device = sampler.generator.device
    parameters = list(model.parameters())
    optimizer = Optimizer(parameters, stage.lr, matrices=model.mmdit.units().matrices)
    ema = Ema(parameters, rate=0.0015)
    ones = torch.ones(stage.batch, device=device)
    for step, done in paced(stage.steps, stage.minutes):
        x0, eps, t5_ids, clip_ids = sampler.draw(stage.batch, stage.caption_dropout)
        sigma = logit_normal(stage.batch, stage.sigma_mean, 1.0, sampler.generator)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            v = model(mix(x0, eps, sigma), t5_ids, clip_ids, sigma, ones, rope)
        loss = (v.float() - velocity_target(x0, eps)).square().mean()
        _update(loss, parameters, optimizer, ema, trapezoid(done))
        log.step(step, loss=loss)
    log.note("steps", step + 1)
    ema.copy_to_parameters()


def distill_guidance(
    model: TextToVelocity, rope: RopeTable, sampler: Sampler, stage: BaseStage, log: Log
) -> None:
    """Teach the guidance input in place: g -> u + g (c - u), with u and c predicted by a frozen copy."""
    device, batch = sampler.generator.device, stage.batch
    teacher = TextToVelocity(*copy.deepcopy((model.mmdit, model.t5, model.clip)))
    teacher.requires_grad_(False)
    parameters = list(model.parameters())
    optimizer = Optimizer(parameters, stage.lr * 0.3, matrices=model.mmdit.units().matrices)
    ema = Ema(parameters, rate=0.004)
    ones = torch.ones(batch, device=device)
    for step, done in paced(stage.distill_steps, stage.distill_minutes):
        x0, eps, t5_ids, clip_ids = sampler.draw(batch, stage.caption_dropout)
        sigma = logit_normal(batch, 0.15, 1.1, sampler.generator)
        x = mix(x0, eps, sigma)
        guidance = draw_guidance(batch, stage.max_guidance, sampler.generator)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            with torch.no_grad():
                conditional = teacher(x, t5_ids, clip_ids, sigma, ones, rope).float()
                null_t5, null_clip = sampler.null_t5.expand(batch, -1), sampler.null_clip.expand(batch, -1)
                unconditional = teacher(x, null_t5, null_clip, sigma, ones, rope).float()
            v = model(x, t5_ids, clip_ids, sigma, guidance, rope)
        loss = (v.float() - guided(conditional, unconditional, guidance)).square().mean()
        _update(loss, parameters, optimizer, ema, trapezoid(done))
        log.step(step, distill=loss)
    log.note("distill steps", step + 1)
    ema.copy_to_parameters()


def draw_guidance(batch: int, highest: float, generator: torch.Generator) -> Tensor:
    """[B] guidance between 1 and `highest`, denser near 1; a seventh of the rows exactly 1."""
    u = torch.rand(2, batch, generator=generator, device=generator.device)
    return torch.where(u[0] < 0.15, 1.0, 1 + (highest - 1) * u[1] ** 1.3)


def _update(
    loss: Tensor, parameters: list[nn.Parameter], optimizer: Optimizer, ema: Ema, lr_factor: float
) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step(lr_factor)
    ema.update()
