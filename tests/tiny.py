"""A whole pipeline with random weights, small enough to make a picture in a fraction of a second."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import nn

from bokehflux.conditioning import Conditioning
from bokehflux.configs import BokehConfig, Defaults, MMDiTConfig, ScheduleConfig, VAEConfig
from bokehflux.models.adapter import LowRank
from bokehflux.models.mmdit import MMDiT
from bokehflux.models.norms import RMSNorm
from bokehflux.models.vae import AutoencoderKL
from bokehflux.pipeline.pipeline import Pipeline
from bokehflux.pipeline.provenance import Source

MMDIT = MMDiTConfig(
    in_channels=64, txt_dim=24, pooled_dim=20, hidden_size=32, num_heads=2, num_double=2, num_single=4,
    axes_dim=(4, 6, 6), guidance_embed=True,
)  # fmt: skip
# No field at its default: one that is ignored shows.
BOKEH = BokehConfig(
    blocks=tuple(range(6)), rank=4, hidden_dim=8, context_dim=16, alpha=3.0, lora_scale=0.9, bokeh_scale=1.2
)
VAE = VAEConfig(
    channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=16, norm_groups=4, scale=0.36, shift=0.12
)
TXT_LENGTH = 6


@dataclasses.dataclass(frozen=True)
class FakeText:
    """Stands in for `TextEncoders`: states that depend on the prompt and nothing else."""

    dtype: torch.dtype
    txt_length: int = TXT_LENGTH
    networks: tuple[torch.nn.Module, ...] = ()
    device: str = "cpu"

    def unknown_words(self, prompt: str) -> list[str]:
        return []

    def encode(self, prompts: Sequence[str], txt_length: int | None = None) -> Conditioning:
        rows = [torch.Generator().manual_seed(zlib.crc32(prompt.encode())) for prompt in prompts]
        txt = [torch.randn(txt_length or self.txt_length, MMDIT.txt_dim, generator=g) for g in rows]
        pooled = [torch.randn(MMDIT.pooled_dim, generator=g) for g in rows]
        return Conditioning(
            txt=torch.stack(txt).to(self.device, self.dtype),
            pooled=torch.stack(pooled).to(self.device, self.dtype),
        )


class NamedSource(Source):
    """A model without files, whose hashes are the names that it was asked for by."""

    @cached_property
    def hashes(self) -> tuple[str | None, str | None, tuple[tuple[str, float], ...]]:
        return self.model, self.adapter, self.loras


def tiny_mmdit(bokeh: BokehConfig | None = BOKEH, config: MMDiTConfig = MMDIT) -> MMDiT:
    """Random everywhere, the adapter included: level, scales and grounding all show in the output."""
    torch.manual_seed(0)
    mmdit = MMDiT(config, bokeh)
    for module in mmdit.modules():
        if isinstance(module, LowRank):
            nn.init.normal_(module.down.weight, std=0.5)
            nn.init.normal_(module.up.weight, std=0.5)
        if isinstance(module, RMSNorm):  # attention far from uniform
            nn.init.constant_(module.scale, 1.5)
    return mmdit.eval().requires_grad_(False)


def tiny_pipeline(bokeh: BokehConfig | None = BOKEH, dtype: torch.dtype = torch.float32) -> Pipeline:
    torch.manual_seed(1)
    vae = AutoencoderKL(VAE).eval().requires_grad_(False)
    return Pipeline(
        transformer=tiny_mmdit(bokeh).to(dtype),
        text=FakeText(dtype),  # type: ignore[arg-type]
        vae=vae.to(dtype),
        schedule=ScheduleConfig(dynamic=True, shift=3.0),
        defaults=Defaults(num_inference_steps=5, height_px=32, width_px=48, txt_length=TXT_LENGTH),
        source=Source(model="tiny"),
    )
