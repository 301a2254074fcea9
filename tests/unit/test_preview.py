"""Previews: the fitted map, the clean picture that a noisy latent implies, and when the file is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from bokehflux.app.preview import Preview, check_preview, fit_rgb_map
from bokehflux.pictures.metadata import read_recipe
from bokehflux.sampling.latents import LatentGrid, pack
from bokehflux.sampling.samplers import StepInfo, euler
from tests.tiny import VAE, tiny_pipeline

SIZE = LatentGrid(height_px=64, width_px=96)


class LinearVAE(nn.Module):
    """Latents that are a known affine function of the 8 x 8 mean colour."""

    config = VAE

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(16, 3))

    def encode(self, img: Tensor) -> Tensor:
        return torch.einsum("zc,bchw->bzhw", self.mix, F.avg_pool2d(img, 8)) + 0.3


def picture() -> Tensor:
    """[1, 3, 64, 96] in [-1, 1], constant in blocks of 8 x 8."""
    return (torch.rand(1, 3, 8, 12) * 2 - 1).repeat_interleave(8, 2).repeat_interleave(8, 3)


def test_the_map_inverts_an_affine_encoder() -> None:
    vae = LinearVAE()
    rgb_map = fit_rgb_map(vae)  # type: ignore[arg-type]
    img = picture()
    torch.testing.assert_close(rgb_map(vae.encode(img).detach()), img[:, :, ::8, ::8], atol=1e-3, rtol=1e-3)


def test_the_noise_of_the_current_level_is_not_shown(tmp_path: Path) -> None:
    """On a straight path from noise to a picture, every preview is that picture."""
    vae, img = LinearVAE(), picture()
    clean = pack(vae.encode(img).detach())
    noise = torch.randn_like(clean)
    path, seen = tmp_path / "p.png", []
    preview = Preview(fit_rgb_map(vae), SIZE, path, 1)  # type: ignore[arg-type]

    def watch(info: StepInfo) -> None:
        preview(info)
        if path.exists():
            with Image.open(path) as file:
                seen.append(np.asarray(file).astype(int))

    euler(lambda x, sigma, step: noise - clean, noise, torch.linspace(1, 0, 6), watch)
    exact = ((img / 2 + 0.5) * 255).round()[0].movedim(0, -1).numpy().astype(int)
    scale = seen[0].shape[0] // 8
    assert len(seen) == 4, "the first step alone tells no velocity"
    for shown in seen:
        assert np.abs(shown[::scale, ::scale] - exact[::8, ::8]).max() <= 2


@pytest.mark.parametrize(("every", "steps"), [(1, [2, 3, 4, 5]), (2, [2, 4, 5]), (3, [3, 5]), (9, [5])])
def test_when_it_is_written(tmp_path: Path, every: int, steps: list[int]) -> None:
    pipe, path, seen = tiny_pipeline(), tmp_path / "p.webp", []
    preview = Preview(fit_rgb_map(pipe.vae), LatentGrid(height_px=32, width_px=48), path, every)

    def watch(info: StepInfo) -> None:
        preview(info)
        if path.exists():
            seen.append(read_recipe(path)["step"])
            with Image.open(path) as image:
                assert image.width == 3 * image.height * 48 // 32, "three rows side by side"
            path.unlink()

    pipe.generate("p", [0, 30], bokeh_pivot=10, on_step=watch)
    assert seen == steps


def test_one_step_is_shown_too(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    preview = Preview(fit_rgb_map(pipe.vae), LatentGrid(height_px=32, width_px=48), tmp_path / "p.jpg", 1)
    pipe.generate("p", [0], num_inference_steps=1, on_step=preview)
    assert (tmp_path / "p.jpg").is_file()


def test_a_second_batch_begins_afresh(tmp_path: Path) -> None:
    """The last latents of one batch and the first of the next make no velocity."""
    pipe = tiny_pipeline()
    path, written = tmp_path / "p.png", []
    preview = Preview(fit_rgb_map(pipe.vae), LatentGrid(height_px=32, width_px=48), path, 1)

    def watch(info: StepInfo) -> None:
        preview(info)
        written.append(path.exists())
        path.unlink(missing_ok=True)

    for targets in ([0], [0, 30]):
        pipe.generate("p", targets, num_inference_steps=3, on_step=watch)
    assert written == [False, True, True] * 2


@pytest.mark.parametrize(("name", "every", "says"), [
    (None, 2, "needs --preview"), ("x.txt", 1, "ends in"), ("no/x.png", 1, "no folder"),
    ("d.png", 1, "is a folder"), ("x.png", 0, "at least 1"),
])  # fmt: skip
def test_what_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str | None, every: int, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("d.png").mkdir()
    with pytest.raises(ValueError, match=says):
        check_preview(name, every)
