"""Pictures while they are being made: latents to colours by a linear map, or by a tiny autoencoder (TAEF1).

No table of numbers for one model: on a few smooth random pictures the best affine map from latents to colours
is found by least squares, which costs one call of the encoder and holds for any autoencoder. It knows colours
and places; detail takes a decoder, and `models/tiny_decoder.py` is one that costs little. What is shown is
the clean picture that the last step implies, x - sigma * velocity, with the velocity taken from two
consecutive latents; so the noise of the current level is not in it, and the network is not called again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bokehflux.models.vae import AutoencoderKL, to_uint8
from bokehflux.pictures import metadata
from bokehflux.pictures.files import replace_file
from bokehflux.sampling.latents import LatentGrid, unpack
from bokehflux.sampling.samplers import StepInfo

MIN_SIDE, MAX_SIDE = 256, 512
"""Pixels of one preview's longer side: enlarged by whole pixels below, averaged above."""
ToRGB = Callable[[Tensor], Tensor]
"""Model latents [1,z,h,w] -> [1,3,H,W] in [-1, 1], of any size."""


@torch.inference_mode()
def fit_rgb_map(vae: AutoencoderKL) -> ToRGB:
    """A map from latents to the colour of each, fitted to the autoencoder."""
    side = 16 * vae.config.downscale
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(8, 3, 4, 4, generator=generator) * 2 - 1
    img = F.interpolate(coarse, (side, side), mode="bicubic").clamp(-1, 1)
    weight = next(vae.parameters())
    latents = vae.encode(img.to(weight.device, weight.dtype)).float().cpu()
    colors = F.avg_pool2d(img, vae.config.downscale)
    fitted = torch.linalg.lstsq(_with_one(latents), colors.movedim(1, -1).reshape(-1, 3)).solution

    def to_rgb(latents: Tensor) -> Tensor:
        b, _, h, w = latents.shape
        return (_with_one(latents.float().cpu()) @ fitted).view(b, h, w, 3).movedim(-1, 1)

    return to_rgb


class Preview:
    """An `on_step` that writes all rows side by side to one file, every `every` steps and after the last.

    grid: the pictures' size. Path and every: as `check_preview` wants them.
    """

    def __init__(self, to_rgb: ToRGB, grid: LatentGrid, path: Path, every: int) -> None:
        self._to_rgb = to_rgb
        self._grid = grid
        self._path = path
        self._every = every
        self._before: StepInfo | None = None
        self._now: StepInfo | None = None

    def __call__(self, info: StepInfo) -> None:
        follows = self._now is not None and info.step == self._now.step + 1
        self._before, self._now = self._now if follows else None, info
        if info.step + 1 == info.num_steps or (info.step + 1) % self._every == 0:
            self.write()

    @torch.inference_mode()
    def write(self) -> bool:
        """Show the newest step. Writes nothing (False) after the first: one latent tells no velocity."""
        before, info = self._before, self._now
        if info is None or (before is None and info.step + 1 < info.num_steps):
            return False
        latents = info.latents.float()
        if before is not None:
            velocity = (latents - before.latents.float()) / (info.sigma - before.sigma)
            latents = latents - info.sigma * velocity
        strip = self._strip(unpack(latents, self._grid))
        recipe = {"role": "preview", "step": info.step + 1, "num_inference_steps": info.num_steps}
        replace_file(self._path, metadata.encode(strip, recipe, _kind(self._path)))
        return True

    def _strip(self, latents: Tensor) -> Image.Image:
        """[B, z, h, w] -> B pictures side by side."""
        # One by one: a decoder would need memory for all of them.
        colors = torch.cat([self._to_rgb(row[None]).float().cpu() for row in latents])
        side = max(colors.shape[-2:])
        colors = F.avg_pool2d(colors, max(1, math.ceil(side / MAX_SIDE)))
        scale = max(1, MIN_SIDE // side)
        pixels = to_uint8(colors).repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        return Image.fromarray(torch.cat(list(pixels), 1).numpy())


def check_preview(file: str | None, every: int, tiny_vae: str | None = None) -> None:
    """Raise ValueError for the arguments of a preview that could not be written."""
    if file is None:
        flag, what = ("--preview-vae", "how") if tiny_vae is not None else ("--preview-every", "how often")
        raise ValueError(f"{flag} needs --preview FILE: {what} that file is written")
    if tiny_vae is not None and not Path(tiny_vae).exists():
        raise ValueError(
            f"--preview-vae {tiny_vae}: no such file or folder; the weights of TAEF1 were expected"
        )
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
