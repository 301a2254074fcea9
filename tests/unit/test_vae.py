"""The autoencoder by itself: names, shapes, the affine map of latents, sampling, training, 8-bit output."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import needs_shared, shared, vae_configs
from hypothesis import given, settings
from hypothesis import strategies as st

from bokehflux.configs import FLUX_VAE, VAEConfig
from bokehflux.models.vae import AutoencoderKL, GroupNorm, to_uint8

TINY = VAEConfig(
    channels=(8, 16), layers_per_block=1, latent_channels=4, norm_groups=4, scale=0.36, shift=0.12
)


@needs_shared
def test_names_and_shapes_are_those_of_the_official_file() -> None:
    with torch.device("meta"):
        vae = AutoencoderKL(FLUX_VAE)
    ours = {name: list(tensor.shape) for name, tensor in vae.state_dict().items()}
    official = json.loads(shared("manifests/ae.bfl.json").read_text())["tensors"]
    assert ours == {name: entry["shape"] for name, entry in official.items()}


@settings(max_examples=15)
@given(config=vae_configs, rows=st.integers(1, 3), columns=st.integers(1, 3))
def test_shapes_of_any_config(config: VAEConfig, rows: int, columns: int) -> None:
    vae = AutoencoderKL(config)
    x = torch.randn(2, 3, rows * config.downscale, columns * config.downscale)
    with torch.no_grad():
        mean, logvar = vae.moments(x)
        assert mean.shape == logvar.shape == (2, config.latent_channels, rows, columns)
        torch.testing.assert_close(vae.encode(x), (mean - config.shift) * config.scale)
        assert vae.decode(mean).shape == x.shape
        assert all(len(stage.block) == config.layers_per_block for stage in vae.encoder.down)
        assert all(len(stage.block) == config.layers_per_block + 1 for stage in vae.decoder.up)


def test_decode_undoes_scale_and_shift() -> None:
    vae = AutoencoderKL(TINY)
    z = torch.randn(1, 4, 3, 5)
    torch.testing.assert_close(vae.decode((z - TINY.shift) * TINY.scale), vae.decoder(z))


def test_a_draw_is_mean_plus_deviation_times_noise() -> None:
    vae, x = AutoencoderKL(TINY), torch.randn(2, 3, 8, 6)
    mean, logvar = vae.moments(x)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    draw = vae.encode(x, torch.Generator().manual_seed(3))
    torch.testing.assert_close(draw, (mean + torch.exp(logvar / 2) * noise - TINY.shift) * TINY.scale)
    assert not torch.equal(draw, vae.encode(x, torch.Generator().manual_seed(4)))


def test_log_variance_is_clamped() -> None:
    vae = AutoencoderKL(TINY)
    with torch.no_grad():
        vae.encoder.conv_out.weight.zero_()
        vae.encoder.conv_out.bias.copy_(torch.tensor([99.0, -99, 0, 0, 99, -99, 20, 1]))
    mean, logvar = vae.moments(torch.randn(1, 3, 2, 2))
    assert mean.flatten().tolist() == [99, -99, 0, 0]
    assert logvar.flatten().tolist() == [20, -30, 20, 1]


@pytest.mark.parametrize("shape", [(1, 3, 7, 8), (1, 3, 8, 9), (1, 4, 8, 8), (3, 8, 8)])
def test_images_of_a_wrong_shape_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="multiples of 2") as error:
        AutoencoderKL(TINY).encode(torch.zeros(shape))
    assert str(shape) in str(error.value)


@pytest.mark.parametrize("shape", [(1, 3, 4, 4), (4, 4, 4), (1, 16, 4)])
def test_latents_of_a_wrong_shape_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[B,4,h,w\]") as error:
        AutoencoderKL(TINY).decode(torch.zeros(shape))
    assert str(shape) in str(error.value)


def test_every_parameter_learns_under_autocast() -> None:
    vae, x = AutoencoderKL(TINY), torch.randn(2, 3, 8, 8)
    exact = vae.decode(vae.encode(x))
    with torch.autocast("cpu", torch.bfloat16):
        out = vae.decode(vae.encode(x, torch.Generator().manual_seed(0)))
        mean_out = vae.decode(vae.encode(x))
    assert out.dtype == torch.bfloat16
    assert (mean_out.float() - exact).abs().max() < 0.05 * exact.abs().max()
    out.float().square().mean().backward()
    # k.bias adds the same to all of a query's scores, which the softmax ignores.
    idle = [name for name, p in vae.named_parameters() if p.grad is None or not p.grad.any()]
    assert all(name.endswith("attn_1.k.bias") for name in idle), idle
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in vae.parameters())


def test_group_norm_keeps_bf16_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    norm, x = GroupNorm(8, 2), (3 + torch.randn(2, 8, 5, 5)).bfloat16()
    autocast_at_kernel, kernel = [], F.group_norm

    def watched(*args: Any) -> torch.Tensor:
        autocast_at_kernel.append(torch.is_autocast_enabled("cpu"))
        return kernel(*args)

    monkeypatch.setattr(F, "group_norm", watched)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x).dtype == torch.bfloat16
    assert autocast_at_kernel == [False]  # on CUDA it would ask for float32 here
    assert (norm(x).float() - norm(x.float())).abs().max() < 0.02


def test_channels_last_changes_nothing() -> None:
    vae, x = AutoencoderKL(TINY), torch.randn(1, 3, 12, 8)
    latents = vae.encode(x)
    image = vae.decode(latents)
    vae = vae.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(vae.encode(x), latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(vae.decode(latents), image, atol=1e-5, rtol=1e-5)


def test_traces_as_one_graph() -> None:
    vae = AutoencoderKL(TINY).eval().requires_grad_(False)
    x, latents = torch.randn(1, 3, 8, 8), torch.randn(1, 4, 4, 4)
    for method, argument in ((vae.encode, x), (vae.decode, latents)):
        traced = torch.compile(method, backend="eager", fullgraph=True)
        torch.testing.assert_close(traced(argument), method(argument))


def test_to_uint8_rounds_half_to_even_and_clamps() -> None:
    levels = torch.tensor([-9.0, -1.0, 1.0, 9.0, 0.0, 1 / 255, 3 / 255])
    x = levels.reshape(1, 1, 1, -1).expand(2, 3, 4, -1)
    out = to_uint8(x)
    assert out.dtype == torch.uint8 and out.shape == (2, 4, 7, 3)
    assert out[0, 0, :, 0].tolist() == [0, 0, 255, 255, 128, 128, 129]  # 127.5 -> 128 (even)


def test_to_uint8_keeps_channels_apart() -> None:
    x = torch.stack([torch.full((2, 5), v) for v in (-1.0, 0.2, 1.0)])[None]
    assert to_uint8(x)[0, 1, 4].tolist() == [0, 153, 255]


def test_channels_that_no_groups_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"channels \[12, 20\] are not divisible by norm_groups 8"):
        dataclasses.replace(FLUX_VAE, channels=(12, 16, 20), norm_groups=8)
