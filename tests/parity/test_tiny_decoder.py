"""TAEF1's decoder against diffusers' AutoencoderTiny with equal random weights, from both kinds of files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny
from helpers import assert_within_2x
from safetensors.torch import save_file
from torch import Tensor

from bokehflux.weights.load import load_tiny_decoder


def oracle(latent_channels: int = 16) -> AutoencoderTiny:
    """The shape of TAEF1; random weights that keep the signal alive through all layers."""
    torch.manual_seed(0)
    tiny = AutoencoderTiny(latent_channels=latent_channels).eval()
    with torch.no_grad():
        for p in tiny.parameters():
            if p.ndim == 1:
                p.normal_(std=0.1)
    return tiny


def own_names(tiny: AutoencoderTiny) -> dict[str, Tensor]:
    """As in `taef1_decoder.safetensors`, which counts the clamp as its first layer."""
    names = {}
    for name, tensor in tiny.decoder.state_dict().items():
        _, layer, rest = name.split(".", 2)
        names[f"{int(layer) + 1}.{rest}"] = tensor.clone()
    return names


@pytest.mark.parametrize("layout", ["own file", "diffusers file", "diffusers folder"])
@torch.no_grad()
def test_float32(layout: str, tmp_path: Path) -> None:
    tiny = oracle()
    path = tmp_path / "taef1_decoder.safetensors"
    if layout == "own file":
        save_file(own_names(tiny), path)
    elif layout == "diffusers file":
        save_file(tiny.state_dict(), path)
    else:
        tiny.save_pretrained(path := tmp_path / "taef1")
    ours = load_tiny_decoder(path)
    latents = 4 * torch.randn(2, 16, 5, 3)
    expected = tiny.decode(latents).sample
    assert expected.shape == (2, 3, 40, 24) and expected.std() > 0.05
    torch.testing.assert_close(ours(latents), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_low_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    tiny = oracle()
    save_file(own_names(tiny), path := tmp_path / "taef1_decoder.safetensors")
    latents = torch.randn(1, 16, 4, 6)
    exact = tiny.decode(latents).sample
    ours = load_tiny_decoder(path, dtype=dtype)(latents)
    assert ours.dtype == dtype
    assert_within_2x(ours, tiny.to(dtype).decode(latents.to(dtype)).sample, exact)
