"""The autoencoder in bands on a GPU: the same pictures, from maps in host memory too, in less of the GPU."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_within_2x

from bokehflux.configs import FLUX_VAE
from bokehflux.models import tiling
from bokehflux.models.vae import AutoencoderKL

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")


def flux_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(FLUX_VAE).eval().requires_grad_(False).to(DEVICE)


@pytest.mark.parametrize("maps", ["device", "host"])
@pytest.mark.parametrize("size", [(40, 64), (37, 51)])
def test_within_rounding(maps: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "BAND_ELEMENTS", 1 << 20)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # float32 is what both are measured by
    if maps == "host":
        monkeypatch.setattr(tiling, "DEVICE_MAP_BYTES", 0)
    vae, latents = flux_vae(), torch.randn(1, 16, *size, device=DEVICE)
    image = torch.rand(1, 3, 8 * size[0], 8 * size[1], device=DEVICE) * 2 - 1
    exact, (mean, _) = vae.decode(latents), vae.moments(image)
    vae = vae.to(torch.bfloat16)
    latents, image = latents.bfloat16(), image.bfloat16()
    ours = tiling.decode(vae, latents)
    assert ours.device.type == "cuda" and ours.dtype == torch.bfloat16
    assert_within_2x(ours, vae.decode(latents), exact)
    assert_within_2x(tiling.moments(vae, image)[0], vae.moments(image)[0], mean)
    for _ in range(3):  # copies to and from the host must not overtake the work
        assert torch.equal(tiling.decode(vae, latents), ours)


@pytest.mark.parametrize(("side", "share"), [(1024, 0.95), (2048, 0.3)])
def test_memory(
    side: int, share: float, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 1024 maps stay on the GPU, at 2048 they do not."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    vae = flux_vae()
    latents = torch.randn(1, 16, side // 8, side // 8, device=DEVICE, dtype=torch.bfloat16)
    with torch.inference_mode():
        exact = vae.decode(latents.float()).cpu()
    vae = vae.to(torch.bfloat16)
    peaks, pictures, times = [], [], []
    for decode in (vae.decode, lambda z: tiling.decode(vae, z)):
        for _ in range(2):  # the second time without tuning
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            begin.record()
            with torch.inference_mode():
                out = decode(latents).cpu()
            end.record()
            torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() / 1e9)
        times.append(begin.elapsed_time(end))
        pictures.append(out)
    with capsys.disabled():
        for name, peak, took in zip(("whole", "bands"), peaks, times, strict=True):
            print(f"\n{side} px, {name}: {peak:.2f} GB, {took:.0f} ms")
    assert peaks[1] < share * peaks[0]
    assert_within_2x(pictures[1], pictures[0], exact)
