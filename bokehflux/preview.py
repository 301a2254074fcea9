"""Pictures while they are being made: a linear map from latents to colours, fitted to the autoencoder.

No table of numbers for one model: on a few smooth random pictures the best affine map from latents to colours
is found by least squares, which costs one call of the encoder and holds for any autoencoder. What is shown is
the clean picture that the last step implies, x - sigma * velocity, with the velocity taken from two
consecutive latents; so the noise of the current level is not in it, and the network is not called again.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bokehflux import metadata
from bokehflux.models.vae import AutoencoderKL, to_uint8
from bokehflux.output import replace_file
from bokehflux.request import Request
from bokehflux.sampling.latents import LatentGrid, unpack
from bokehflux.sampling.samplers import StepInfo

MAX_SIDE = 256
"""Pixels of one preview's longer side."""


@torch.inference_mode()
def fit_rgb_map(vae: AutoencoderKL) -> Tensor:
    """[z + 1, 3]: latents with a one appended, times this, are colours in [-1, 1]. Float32 on the CPU."""
    side = 16 * vae.config.downscale
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(8, 3, 4, 4, generator=generator) * 2 - 1
    img = F.interpolate(coarse, (side, side), mode="bicubic").clamp(-1, 1)
    weight = next(vae.parameters())
    latents = vae.encode(img.to(weight.device, weight.dtype)).float().cpu()
    colors = F.avg_pool2d(img, vae.config.downscale)
    return torch.linalg.lstsq(_with_one(latents), colors.movedim(1, -1).reshape(-1, 3)).solution


class Preview:
    """An `on_step` that writes all rows side by side to one file, every `every` steps and after the last.

    request: completed, since its size is needed. Path and every: as `check_preview` wants them.
    """

    def __init__(self, vae: AutoencoderKL, request: Request, path: Path, every: int) -> None:
        self._map = fit_rgb_map(vae)
        self._grid = LatentGrid(height_px=request.height or 0, width_px=request.width or 0)
        self._path = path
        self._every = every
        self._before: StepInfo | None = None

    def __call__(self, info: StepInfo) -> None:
        before, self._before = self._before, info
        last = info.step + 1 == info.num_steps
        if before is None or info.step != before.step + 1:
            if not last:
                return  # one latent tells no velocity
            before = None
        if not last and (info.step + 1) % self._every:
            return
        latents = info.latents.float()
        if before is not None:
            velocity = (latents - before.latents.float()) / (info.sigma - before.sigma)
            latents = latents - info.sigma * velocity
        strip = self._strip(unpack(latents, self._grid).cpu())
        recipe = {"role": "preview", "step": info.step + 1, "num_inference_steps": info.num_steps}
        replace_file(self._path, metadata.encode(strip, recipe, _kind(self._path)))

    def _strip(self, latents: Tensor) -> Image.Image:
        """[B, z, h, w] -> B pictures side by side."""
        b, _, h, w = latents.shape
        colors = (_with_one(latents) @ self._map).view(b, h, w, 3)
        scale = max(1, MAX_SIDE // max(h, w))
        pixels = to_uint8(colors.movedim(-1, 1)).repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        return Image.fromarray(torch.cat(list(pixels), 1).numpy())


def check_preview(file: str | None, every: int) -> None:
    """Raise ValueError for the arguments of a preview that could not be written."""
    if file is None:
        raise ValueError("--preview-every needs --preview FILE: how often that file is written")
    path = Path(file)
    _kind(path)
    if not path.parent.is_dir():
        raise ValueError(f"--preview {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise ValueError(f"--preview {path}: is a folder, a file name was expected")
    if every < 1:
        raise ValueError(f"--preview-every must be at least 1, got {every}")


def _kind(path: Path) -> str:
    kinds = {".jpeg": "jpeg", **{suffix: kind for kind, suffix in metadata.SUFFIXES.items()}}
    if path.suffix.lower() not in kinds:
        raise ValueError(f"--preview {path}: expected a name that ends in {', '.join(sorted(kinds))}")
    return kinds[path.suffix.lower()]


def _with_one(latents: Tensor) -> Tensor:
    """[B, z, h, w] -> [B * h * w, z + 1]"""
    flat = latents.movedim(1, -1).reshape(-1, latents.shape[1])
    return torch.cat([flat, torch.ones(len(flat), 1)], 1)
