"""Whole steps and a run of what ours is measured against: plain diffusers and the published formulation.

Needs diffusers 0.32.2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from diffusers.models.transformers import transformer_flux
from torch import Tensor, nn

from bokehflux.lens import MAX_LEVEL
from bokehflux.models.mmdit import MMDiT
from bokehflux.models.vae import to_uint8
from bokehflux.pipeline.color import match_lab_means
from bokehflux.pipeline.model import Model
from bokehflux.sampling.denoise import model_sigma
from bokehflux.sampling.latents import LatentGrid, noise, pack, position_ids, unpack
from bokehflux.sampling.samplers import euler
from bokehflux.sampling.schedule import sigmas
from bokehflux.settings import GenerateSettings
from tests.oracle.published import Published, build_diffusers, build_published

# There is no LoRA here. With the switch on, diffusers imports peft in every call, and the newest does not go
# with the transformers it was released with.
transformer_flux.USE_PEFT_BACKEND = False


class Batch(Protocol):
    """One step's inputs; `benchmarks.networks.Batch` has their shapes."""

    img: Tensor
    txt: Tensor
    pooled: Tensor
    ids: Tensor
    levels: tuple[float, ...] | None
    sigma: float
    guidance: float


def diffusers_model(mmdit: MMDiT, *, compile: bool) -> nn.Module:
    """diffusers' transformer on the weights of `mmdit`, without adapter."""
    model = build_diffusers(mmdit)
    if compile:
        compile_blocks(model)
    return model


def published_model(mmdit: MMDiT, *, compile: bool) -> Published:
    """The published formulation on the weights of `mmdit`, adapter included."""
    model = build_published(mmdit)
    if compile:
        compile_blocks(model.transformer)
    return model


def compile_blocks(transformer: nn.Module) -> None:
    """As `MMDiT.compile_blocks`."""
    for blocks in (transformer.transformer_blocks, transformer.single_transformer_blocks):
        for block in blocks:  # type: ignore[union-attr]
            block.compile(dynamic=False)


def diffusers_step(model: nn.Module, batch: Batch) -> Callable[[], Tensor]:
    """[1, N, 64]."""
    device, dtype, text = batch.img.device, torch.bfloat16, batch.txt.shape[1]
    inputs = {
        "hidden_states": batch.img.to(dtype),
        "encoder_hidden_states": batch.txt.to(dtype),
        "pooled_projections": batch.pooled.to(dtype),
        "timestep": torch.full((1,), batch.sigma, device=device),
        "guidance": torch.full((1,), batch.guidance, device=device),
        "txt_ids": batch.ids[:text],
        "img_ids": batch.ids[text:],
        "return_dict": False,
    }
    return lambda: model(**inputs)[0]


def published_step(model: Published, batch: Batch) -> Callable[[], Tensor]:
    """Rows as in the batch; with targets one call of two rows for each, as the published script runs them."""
    assert batch.levels is not None
    if len(batch.levels) == 1:
        return published_rows(model, batch, batch.levels, grounded=False)
    pivot, *targets = batch.levels
    calls = [published_rows(model, batch, (level, pivot), grounded=True) for level in targets]

    def run() -> Tensor:
        pairs = [call() for call in calls]
        return torch.cat([pairs[0][1:], *(pair[:1] for pair in pairs)])

    return run


KINDS = {"published": (published_model, published_step), "diffusers": (diffusers_model, diffusers_step)}
"""How a model is built on our weights, and how it makes a step."""


def published_rows(
    model: Published, batch: Batch, levels: tuple[float, ...], *, grounded: bool
) -> Callable[[], Tensor]:
    """Rows of these levels; grounded: on the last of them."""
    rows, device, dtype, text = len(levels), batch.img.device, torch.bfloat16, batch.txt.shape[1]
    img, txt, pooled = (
        x.to(dtype).repeat(rows, *[1] * (x.ndim - 1)) for x in (batch.img, batch.txt, batch.pooled)
    )
    sigma, guidance = (torch.full((rows,), value, device=device) for value in (batch.sigma, batch.guidance))
    annotation = (torch.tensor(levels, dtype=torch.float64) / MAX_LEVEL)[:, None].to(device, dtype)
    ids = [rows - 1] * rows if grounded else None
    return lambda: model(
        img, txt, pooled, sigma, guidance, batch.ids[:text], batch.ids[text:], annotation, ids
    )


def published_run(model: Model, asked: GenerateSettings) -> None:
    """Text to pictures of the first target and the pivot, which is the last row while it runs.

    The published script makes such a run for each target. model: ours but for the network.
    """
    device, dtype, network = model.device, torch.bfloat16, model.transformer
    assert asked.bokeh_targets is not None and asked.bokeh_pivot is not None and asked.seed is not None
    num_steps, num_grounded, height, width = asked.numbers()
    text, grid = model.defaults.txt_length, LatentGrid(height_px=height, width_px=width)
    ids = position_ids(grid, text, device)
    levels = torch.tensor([asked.bokeh_targets[0], asked.bokeh_pivot], dtype=torch.float64) / MAX_LEVEL
    annotation = levels[:, None].to(device, dtype)
    guidance = torch.full((2,), asked.guidance_scale, device=device)

    def velocity(x: Tensor, sigma: Tensor, step: int) -> Tensor:
        sigma = model_sigma(sigma, dtype).to(device).expand(2)
        pivots = [1, 1] if step < num_grounded else None
        return network(x, txt, pooled, sigma, guidance, ids[:text], ids[text:], annotation, pivots)

    with model.memory.phase("text"):
        model.text.encode([asked.negative_prompt])  # made whether used or not
        conditioning = model.text.encode([asked.prompt])
    with model.memory.phase("denoise"):
        txt, pooled = conditioning.txt.repeat(2, 1, 1), conditioning.pooled.repeat(2, 1)
        steps = sigmas(model.schedule, num_steps, grid.num_tokens)
        latents = euler(velocity, pack(noise(grid, asked.seed, dtype)).to(device).repeat(2, 1, 1), steps)
    with model.memory.phase("decode"):
        target, pivot = (to_uint8(model.vae.decode(unpack(row[None], grid)))[0] for row in latents)
        match_lab_means(target, pivot).cpu().numpy()
