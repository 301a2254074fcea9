"""Memory modes on a GPU: the same bits, less memory, weights back home."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bokehflux.pipeline.memory import place
from tests.tiny import tiny_pipeline


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_mode_makes_the_same_picture(dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    made = {}
    for mode in ("resident", "offload", "stream"):
        pipe = tiny_pipeline(dtype=dtype)
        text = dataclasses.replace(pipe.text, device="cuda")  # type: ignore[type-var]
        pipe = dataclasses.replace(
            pipe, text=text, memory=place(pipe.transformer, (), pipe.vae, mode, device)
        )
        for _ in range(2):
            made[mode] = pipe.generate("a mug", [0, 28], bokeh_pivot=15)
        parameters = pipe.transformer.named_parameters()
        away = [p for name, p in parameters if p.device.type == "cpu" and "to_k_bokeh" not in name]
        assert bool(away) == (mode != "resident") and all(p.is_pinned() for p in away)
    for mode in ("offload", "stream"):
        assert torch.equal(made[mode].latents, made["resident"].latents)
