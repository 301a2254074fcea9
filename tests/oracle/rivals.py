"""Whole steps of what ours is measured against: plain diffusers and the published formulation.

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
