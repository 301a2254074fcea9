"""What nano learns from, made on the fly: scenes to images, images to a pool of latents with captions."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bokehflux.lens import MAX_LEVEL
from bokehflux.models.vae import AutoencoderKL
from bokehflux.nano import captions
from bokehflux.nano.scenes import Scene, SceneSpec, build_scenes, render, sample_specs
from bokehflux.sampling.latents import pack

LevelDraw = Callable[[int, int, torch.Generator], Tensor]
"""(count, k, generator) -> [count] levels in 0-30 for the k-th render of each scene."""
Show = Callable[[Scene, Tensor, int, torch.Generator], Tensor]
"""(scenes, levels, k, generator) -> the k-th picture of each, [b, 3, S, S] in 0-1."""
Tokenize = Callable[[list[str]], tuple[Tensor, Tensor]]
"""Captions -> (T5 ids [B, T], CLIP ids [B, T])."""


def uniform_levels(count: int, _: int, generator: torch.Generator) -> Tensor:
    """Uniform in 0-30."""
    return torch.rand(count, generator=generator, device=generator.device) * MAX_LEVEL


def mostly_sharp_levels(count: int, _: int, generator: torch.Generator) -> Tensor:
    """A third of them below 6: fine detail is the harder half."""
    return torch.rand(count, generator=generator, device=generator.device) ** 1.5 * MAX_LEVEL


def stratified_levels(renders: int, exact_zero: float = 0.25) -> LevelDraw:
    """A level from each of `renders` equal parts of 0-30, the first at times just 0."""

    def draw(count: int, k: int, generator: torch.Generator) -> Tensor:
        u = torch.rand(2, count, generator=generator, device=generator.device)
        levels = (k + u[0]) * (MAX_LEVEL / renders)
        return torch.where(u[1] < exact_zero, 0.0, levels) if k == 0 else levels

    return draw


def plainly(scene: Scene, levels: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """The subject sharp, lights as discs."""
    return render(scene, levels)


@dataclass(frozen=True, kw_only=True)
class Shoot:
    """Pictures to be rendered: how many scenes, and how each is shown."""

    scenes: int
    renders: int = 1
    """Pictures of each scene."""
    draw: LevelDraw
    show: Show = plainly
    size_px: int
    crowded: float = 0.0
    """As in `sample_specs`."""
    chunk: int = 512
    """Scenes at a time."""


def rendered(shoot: Shoot, generator: torch.Generator) -> Iterator[tuple[SceneSpec, int, Tensor, Tensor]]:
    """Yield (specs, k, levels [b], images [b, 3, S, S] in 0-1) for k < renders, chunk scenes at a time."""
    for start in range(0, shoot.scenes, shoot.chunk):
        count = min(shoot.chunk, shoot.scenes - start)
        spec = sample_specs(count, generator, crowded=shoot.crowded)
        scene = build_scenes(spec, shoot.size_px, generator, generator.device)
        for k in range(shoot.renders):
            levels = shoot.draw(count, k, generator)
            yield spec, k, levels, shoot.show(scene, levels, k, generator)


@dataclass(frozen=True, kw_only=True)
class LatentPool:
    """Latents of S scenes at R levels, with captions as token ids; everything on the training device."""

    latents: Tensor
    """[S, R, N, 64] packed model latents."""
    levels: Tensor
    """[S, R] blur of each, 0-30."""
    t5_ids: Tensor
    """[S, T]"""
    clip_ids: Tensor
    """[S, T]"""

    @property
    def num_scenes(self) -> int:
        return self.latents.shape[0]


@torch.no_grad()
def latent_pool(
    vae: AutoencoderKL, tokenize: Tokenize, shoot: Shoot, generator: torch.Generator
) -> LatentPool:
    """Render, caption and encode. Stored in bfloat16 on a GPU."""
    rng = random.Random(generator.initial_seed())
    device = generator.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows: list[list[Tensor]] = [[] for _ in range(shoot.renders)]
    levels: list[list[Tensor]] = [[] for _ in range(shoot.renders)]
    texts: list[str] = []
    for spec, k, level, images in rendered(shoot, generator):
        if k == 0:
            on_host = spec.to("cpu")
            texts += [captions.caption(on_host, i, rng) for i in range(len(level))]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            encoded = torch.cat([vae.encode(part * 2 - 1) for part in images.split(256)])
        rows[k].append(pack(encoded).to(dtype))
        levels[k].append(level)
    t5_ids, clip_ids = tokenize(texts)
    return LatentPool(
        latents=torch.stack([torch.cat(r) for r in rows], dim=1),
        levels=torch.stack([torch.cat(r) for r in levels], dim=1),
        t5_ids=t5_ids.to(device),
        clip_ids=clip_ids.to(device),
    )
