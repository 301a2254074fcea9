"""Training data made on the fly: scenes to images, images to a pool of latents with token ids and levels."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bokehflux.models.vae import AutoencoderKL
from bokehflux.nano import captions
from bokehflux.nano.scenes import SceneSpec, build_scenes, render, sample_specs
from bokehflux.sampling.latents import pack

LevelDraw = Callable[[int, int], Tensor]
"""(count, k) -> [count] levels in 0-30 for the k-th render of each scene."""
Tokenize = Callable[[list[str]], tuple[Tensor, Tensor]]
"""Captions -> (T5 ids [B, T], CLIP ids [B, T])."""

CHUNK = 512


def rendered(
    count: int,
    renders: int,
    draw: LevelDraw,
    generator: torch.Generator,
    size_px: int,
    chunk: int = CHUNK,
    crowded: float = 0.0,
) -> Iterator[tuple[SceneSpec, int, Tensor, Tensor]]:
    """Yield (specs, k, levels [b], images [b, 3, S, S] in 0-1) for k < renders, chunk scenes at a time.

    crowded: as in `sample_specs`.
    """
    for start in range(0, count, chunk):
        spec = sample_specs(min(chunk, count - start), generator, crowded=crowded)
        scene = build_scenes(spec, size_px, generator, generator.device)
        for k in range(renders):
            levels = draw(min(chunk, count - start), k)
            yield spec, k, levels, render(scene, levels)


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
    vae: AutoencoderKL,
    tokenize: Tokenize,
    scenes: int,
    renders: int,
    draw: LevelDraw,
    generator: torch.Generator,
    size_px: int,
    chunk: int = CHUNK,
    crowded: float = 0.0,
) -> LatentPool:
    """Render, caption and encode `scenes` scenes at `renders` levels each. Stored in bfloat16 on a GPU."""
    rng = random.Random(generator.initial_seed())
    device = generator.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows: list[list[Tensor]] = [[] for _ in range(renders)]
    levels: list[list[Tensor]] = [[] for _ in range(renders)]
    texts: list[str] = []
    for spec, k, level, images in rendered(scenes, renders, draw, generator, size_px, chunk, crowded):
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
