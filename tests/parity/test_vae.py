"""The autoencoder against diffusers' AutoencoderKL with equal random weights, and against golden outputs."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as Oracle
from diffusers.image_processor import VaeImageProcessor
from helpers import assert_within_2x, needs_shared, shared, vae_configs
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from bokehflux.configs import VAEConfig
from bokehflux.models.vae import AutoencoderKL, to_uint8

# diffusers' name -> ours. `up_blocks` count from the coarsest resolution, `up` from the finest.
RENAMES = (
    (r"(down|up)_blocks\.(\d+)\.resnets\.", r"\1.\2.block."),
    (r"_blocks\.(\d+)\.(down|up)samplers\.0\.", r".\1.\2sample."),
    (r"mid_block\.resnets\.0\.", "mid.block_1."),
    (r"mid_block\.resnets\.1\.", "mid.block_2."),
    (r"mid_block\.attentions\.0\.", "mid.attn_1."),
    (r"attn_1\.group_norm\.", "attn_1.norm."),
    (r"attn_1\.to_([qkv])\.", r"attn_1.\1."),
    (r"attn_1\.to_out\.0\.", "attn_1.proj_out."),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
)


def from_diffusers(state: dict[str, Tensor], num_stages: int) -> dict[str, Tensor]:
    """Our state dict from diffusers'; attention weights become 1x1 convolutions."""
    ours = {}
    for name, tensor in state.items():
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        name = re.sub(r"\bup\.(\d+)", lambda m: f"up.{num_stages - 1 - int(m[1])}", name)
        is_linear = "attn_1" in name and tensor.ndim == 2
        ours[name] = tensor[:, :, None, None] if is_linear else tensor
    return ours


def pair(config: VAEConfig) -> tuple[AutoencoderKL, Oracle]:
    """Ours and diffusers' with equal random weights."""
    stages = len(config.channels)
    oracle = Oracle(
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        block_out_channels=config.channels,
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_groups,
        scaling_factor=config.scale,
        shift_factor=config.shift,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
    with torch.no_grad():
        for p in oracle.parameters():
            p.add_(0.1 * torch.randn_like(p))  # also moves norms away from one and zero
    ours = AutoencoderKL(config).eval()
    ours.load_state_dict(from_diffusers(oracle.state_dict(), stages))
    return ours, oracle


def oracle_decode(oracle: Oracle, latents: Tensor) -> Tensor:
    return oracle.decode(latents / oracle.config.scaling_factor + oracle.config.shift_factor).sample


CONFIG = VAEConfig(
    channels=(16, 32, 32, 64),
    layers_per_block=2,
    latent_channels=16,
    norm_groups=16,
    scale=0.3611,
    shift=0.1159,
)


def assert_same(ours: Tensor, oracle: Tensor) -> None:
    torch.testing.assert_close(ours, oracle, atol=1e-5 * max(1.0, oracle.abs().max().item()), rtol=0)


@settings(max_examples=10)
@given(config=vae_configs, rows=st.integers(2, 3), columns=st.integers(2, 4), seed=st.integers(0, 999))
@torch.no_grad()
def test_float32_of_random_configs(config: VAEConfig, rows: int, columns: int, seed: int) -> None:
    torch.manual_seed(seed)
    ours, oracle = pair(config)
    x = torch.rand(2, 3, rows * config.downscale, columns * config.downscale) * 2 - 1
    expected = oracle.encode(x).latent_dist
    mean, logvar = ours.moments(x)
    assert_same(mean, expected.mean)
    assert_same(logvar, expected.logvar)
    latents = torch.randn_like(mean)
    assert_same(ours.decode(latents), oracle_decode(oracle, latents))


@torch.no_grad()
def test_draws_are_diffusers_draws() -> None:
    ours, oracle = pair(CONFIG)
    x = torch.rand(1, 3, 16, 24) * 2 - 1
    z = oracle.encode(x).latent_dist.sample(torch.Generator().manual_seed(5))
    assert_same(ours.encode(x, torch.Generator().manual_seed(5)), (z - CONFIG.shift) * CONFIG.scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_low_precision(dtype: torch.dtype) -> None:
    ours, oracle = pair(CONFIG)
    x, latents = torch.rand(1, 3, 40, 48) * 2 - 1, torch.randn(1, 16, 5, 6)
    exact_mean, exact_image = oracle.encode(x).latent_dist.mean, oracle_decode(oracle, latents)
    ours, oracle = ours.to(dtype), oracle.to(dtype)
    x, latents = x.to(dtype), latents.to(dtype)
    assert ours.decode(latents).dtype == dtype
    assert_within_2x(ours.moments(x)[0], oracle.encode(x).latent_dist.mean, exact_mean)
    assert_within_2x(ours.decode(latents), oracle_decode(oracle, latents), exact_image)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_to_uint8_is_the_image_processor(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 32, 40).to(dtype)
    expected = VaeImageProcessor().postprocess(x, output_type="pil")
    assert np.array_equal(to_uint8(x).numpy(), np.stack([np.asarray(image) for image in expected]))


@needs_shared
@torch.no_grad()
def test_golden() -> None:
    folder = shared("golden/snapshot/vae")
    stated = json.loads((folder / "config.json").read_text())
    config = VAEConfig(
        channels=tuple(stated["block_out_channels"]),
        layers_per_block=stated["layers_per_block"],
        latent_channels=stated["latent_channels"],
        norm_groups=stated["norm_num_groups"],
        scale=stated["scaling_factor"],
        shift=stated["shift_factor"],
    )
    vae = AutoencoderKL(config).eval()
    state = load_file(next(folder.glob("*.safetensors")))
    vae.load_state_dict(from_diffusers(state, len(config.channels)))

    golden = load_file(shared("golden/vae_encode.safetensors"))
    mean, logvar = vae.moments(golden["image"])
    torch.testing.assert_close(mean, golden["mean"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logvar, golden["logvar"], atol=1e-5, rtol=1e-5)

    run = load_file(shared("golden/grounded.safetensors"))
    height, width = run["decoded"].shape[-2:]
    tokens = run["latents"][-1].unflatten(-1, (16, 2, 2)).unflatten(1, (height // 16, width // 16))
    latents = tokens.permute(0, 3, 1, 4, 2, 5).reshape(-1, 16, height // 8, width // 8)
    decoded = vae.decode(latents)
    torch.testing.assert_close(decoded, run["decoded"], atol=1e-4, rtol=1e-4)
    assert (to_uint8(decoded)[1].int() - run["image_pivot"].int()).abs().max() <= 1
