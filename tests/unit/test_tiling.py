"""The autoencoder in bands against itself in one piece: the same pictures, without seams, in less memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_within_2x, vae_configs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bokehflux.configs import VAEConfig
from bokehflux.models import tiling
from bokehflux.models.vae import AutoencoderKL, to_uint8

CONFIG = VAEConfig(
    channels=(16, 24, 32, 32), layers_per_block=2, latent_channels=16, norm_groups=8, scale=0.36, shift=0.12
)
SMALL_BAND = 6000


@pytest.fixture(autouse=True)
def small_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows at a time, so that small pictures have many bands."""
    monkeypatch.setattr(tiling, "BAND_ELEMENTS", SMALL_BAND)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def random_vae(config: VAEConfig = CONFIG) -> AutoencoderKL:
    """Far from the initial values: norms away from one and zero, attention far from uniform."""
    torch.manual_seed(0)
    vae = AutoencoderKL(config).eval()
    for name, p in vae.named_parameters():
        p.add_((0.5 if "attn" in name else 0.1) * torch.randn_like(p))
    return vae


def smooth(height: int, width: int) -> Tensor:
    """[1,16,height,width] latents of a broad gradient, whose ends differ much: the worst case for seams."""
    corners = torch.randn(1, 16, 2, 2, generator=torch.Generator().manual_seed(3)) * 2
    return F.interpolate(corners, (height, width), mode="bilinear", align_corners=True)


def assert_same(ours: Tensor, whole: Tensor) -> None:
    assert ours.shape == whole.shape and ours.dtype == whole.dtype
    torch.testing.assert_close(ours, whole, atol=1e-5 * max(1.0, whole.abs().max().item()), rtol=0)


@settings(max_examples=12)
@given(
    config=vae_configs, rows=st.integers(2, 6), columns=st.integers(2, 5),
    band=st.sampled_from((1, 700, 5000)), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_config_any_size_any_band(
    config: VAEConfig, rows: int, columns: int, band: int, seed: int
) -> None:
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(tiling, "BAND_ELEMENTS", band)
        vae = random_vae(config)
        torch.manual_seed(seed)
        x = torch.rand(2, 3, rows * config.downscale, columns * config.downscale) * 2 - 1
        mean, logvar = vae.moments(x)
        for ours, whole in zip(tiling.moments(vae, x), (mean, logvar), strict=True):
            assert_same(ours, whole)
        latents = torch.randn_like(mean)
        assert_same(tiling.decode(vae, latents), vae.decode(latents))


@pytest.mark.parametrize("size", [(13, 9), (8, 31), (1, 5), (24, 1)])
@pytest.mark.parametrize("kind", ["noise", "smooth"])
def test_pictures_are_the_same(size: tuple[int, int], kind: str) -> None:
    """In 8 bits: equal but for values that lie on the border between two levels."""
    vae = random_vae()
    latents = torch.randn(1, 16, *size) if kind == "noise" else smooth(*size)
    ours, whole = tiling.decode(vae, latents), vae.decode(latents)
    assert_same(ours, whole)
    difference = (to_uint8(ours).int() - to_uint8(whole).int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3


def test_no_seam_where_separate_pieces_have_one() -> None:
    """Decoding a piece by itself, even with 8 latents of overlap, is off by levels that people see."""
    vae, latents = random_vae(), smooth(48, 8)
    whole = vae.decode(latents)
    piece = vae.decode(latents[:, :, :32])[:, :, : 24 * 8]
    assert (to_uint8(piece).int() - to_uint8(whole)[:, : 24 * 8].int()).abs().max() > 8
    ours = tiling.decode(vae, latents)
    assert (to_uint8(ours).int() - to_uint8(whole).int()).abs().max() <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    exact = random_vae()
    latents, x = torch.randn(1, 16, 9, 6), torch.rand(1, 3, 40, 48) * 2 - 1
    image, (mean, _) = exact.decode(latents), exact.moments(x)
    vae = random_vae().to(dtype)
    latents, x = latents.to(dtype), x.to(dtype)
    ours = tiling.decode(vae, latents)
    assert ours.dtype == dtype
    assert_within_2x(ours, vae.decode(latents), image)
    assert_within_2x(tiling.moments(vae, x)[0], vae.moments(x)[0], mean)


class Largest(TorchDispatchMode):
    """The most numbers that any operation put out, maps that are merely allocated left out."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and func is not torch.ops.aten.empty.memory_format and not out._is_view():
            self.numel = max(self.numel, out.numel())
        return out


@pytest.mark.parametrize("rows", [16, 64])
def test_what_is_at_work_does_not_grow_with_the_picture(rows: int) -> None:
    """Attention's keys and values apart, and the picture itself."""
    vae, latents = random_vae(), torch.randn(1, 16, rows, 4)
    with Largest() as whole:
        vae.decode(latents)
    with Largest() as ours:
        tiling.decode(vae, latents)
    picture, keys = 3 * rows * 4 * 64, 32 * rows * 4
    assert whole.numel == 24 * rows * 4 * 64, "the widest map at full size"
    # A band and the rows around it that a convolution reaches, two columns of zeros included.
    assert ours.numel <= max(picture, keys, SMALL_BAND + 4 * 32 * 34)


@pytest.mark.parametrize(("limit", "home"), [(1 << 40, "device"), (0, "cpu")])
def test_where_maps_are_kept(limit: int, home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "DEVICE_MAP_BYTES", limit)
    x = torch.empty(1, 16, 128, 128, device="meta", dtype=torch.bfloat16)
    bands = tiling.Bands.for_images(random_vae(), x, 1024**2)
    assert bands.device == x.device
    assert bands.home == (x.device if home == "device" else torch.device("cpu"))


def test_a_flux_picture_of_1024_stays_on_the_device() -> None:
    from bokehflux.configs import FLUX_VAE

    with torch.device("meta"):
        vae = AutoencoderKL(FLUX_VAE)
        x = torch.empty(1, 16, 128, 128, dtype=torch.bfloat16)
    assert tiling.Bands.for_images(vae, x, 1024 * 1024).home == x.device
    assert tiling.Bands.for_images(vae, x, 1024 * 1280).home == torch.device("cpu")


@pytest.mark.parametrize("shape", [(1, 3, 12, 8), (1, 4, 8, 8)])
def test_images_of_a_wrong_shape_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="multiples of 8"):
        tiling.moments(random_vae(), torch.zeros(shape))
    with pytest.raises(ValueError, match=r"\[B,16,h,w\]"):
        tiling.decode(random_vae(), torch.zeros(shape))


def test_a_draw_from_tiled_moments_is_a_draw() -> None:
    vae, x = random_vae(), torch.rand(1, 3, 40, 16) * 2 - 1
    draw = vae.draw(*tiling.moments(vae, x), torch.Generator().manual_seed(5))
    assert_same(draw, vae.encode(x, torch.Generator().manual_seed(5)))
    assert_same(vae.draw(*tiling.moments(vae, x)), vae.encode(x))
