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
from bokehflux.nano.pool import LatentPool
from bokehflux.nano.recipe import BaseStage
from bokehflux.training.batches import Draws
from bokehflux.training.log import Log
from bokehflux.training.loop import Course, Step, train
from bokehflux.training.objective import draw_guidance, guided, logit_normal, mix, velocity_target
from bokehflux.training.optim import Optimizer
from bokehflux.training.state import Saves

DISTILLED = 1000
"""Added to the seed, so that distillation does not begin with the samples that training began with."""


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
    """Training batches of a pool."""

    pool: LatentPool
    null_t5: Tensor
    null_clip: Tensor
    """Token ids [T] of the empty caption."""

    def batch(self, draws: Draws, caption_dropout: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x0 [B, N, 64], eps of the same shape, T5 ids and CLIP ids [B, T]."""
        pool = self.pool
        scene = draws.integers("scene", pool.num_scenes)
        x0 = pool.latents[scene, draws.integers("render", pool.latents.shape[1])].float()
        drop = draws.uniform("caption", 1) < caption_dropout
        t5_ids = torch.where(drop, self.null_t5, pool.t5_ids[scene])
        clip_ids = torch.where(drop, self.null_clip, pool.clip_ids[scene])
        return x0, draws.normal("noise", *x0.shape[1:]), t5_ids, clip_ids


def init_mmdit(mmdit: MMDiT) -> None:
    """Start of training: every block and the output begin as zero (adaLN-zero)."""
    for layer in (*mmdit.units().ahead, mmdit.final_layer):
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)


def train_base(
    model: TextToVelocity,
    rope: RopeTable,
    sampler: Sampler,
    stage: BaseStage,
    log: Log,
    saves: Saves | None = None,
) -> None:
    """Train `model` in place; its weights end as the moving average."""

    def loss(step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        x0, eps, t5_ids, clip_ids = sampler.batch(step.draws, stage.caption_dropout)
        sigma = logit_normal(step.draws, stage.sigma_mean, 1.0)
        v = model(mix(x0, eps, sigma), t5_ids, clip_ids, sigma, torch.ones_like(sigma), rope)
        error = (v.float() - velocity_target(x0, eps)).square().mean()
        return error, {"loss": error}

    optimizer = Optimizer(list(model.named_parameters()), stage.lr, matrices=model.mmdit.units().matrices)
    course = Course(
        seed=stage.seed, batch=stage.batch, steps=stage.steps, minutes=stage.minutes, ema_rate=0.0015
    )
    log.note("steps", train(loss, optimizer, course, log, saves))


def distill_guidance(
    model: TextToVelocity,
    rope: RopeTable,
    sampler: Sampler,
    stage: BaseStage,
    log: Log,
    saves: Saves | None = None,
) -> None:
    """Teach the guidance input in place: g -> u + g (c - u), with u and c predicted by a frozen copy."""
    teacher = TextToVelocity(*copy.deepcopy((model.mmdit, model.t5, model.clip))).requires_grad_(False)

    def loss(step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        x0, eps, t5_ids, clip_ids = sampler.batch(step.draws, stage.caption_dropout)
        sigma = logit_normal(step.draws, 0.15, 1.1)
        x, ones = mix(x0, eps, sigma), torch.ones_like(sigma)
        guidance = draw_guidance(step.draws, stage.max_guidance)
        null_t5, null_clip = sampler.null_t5.expand_as(t5_ids), sampler.null_clip.expand_as(clip_ids)
        with torch.no_grad():
            conditional = teacher(x, t5_ids, clip_ids, sigma, ones, rope).float()
            unconditional = teacher(x, null_t5, null_clip, sigma, ones, rope).float()
        v = model(x, t5_ids, clip_ids, sigma, guidance, rope).float()
        error = (v - guided(conditional, unconditional, guidance)).square().mean()
        return error, {"distill": error}

    optimizer = Optimizer(
        list(model.named_parameters()), stage.lr * 0.3, matrices=model.mmdit.units().matrices
    )
    course = Course(
        seed=stage.seed + DISTILLED,
        batch=stage.batch,
        steps=stage.distill_steps,
        minutes=stage.distill_minutes,
        ema_rate=0.004,
    )
    log.note("distill steps", train(loss, optimizer, course, log, saves))
