"""Latents to pictures: one by one, the pivot first, since the others take its colours.

In one piece, or in bands (`models/tiling.py`) where a picture is large or memory runs out.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from bokehflux.models import tiling
from bokehflux.models.vae import AutoencoderKL, to_uint8
from bokehflux.pipeline.color import lab_mean, shift_to_lab_mean
from bokehflux.pipeline.memory import MemoryMode, ran_out
from bokehflux.sampling.latents import LatentGrid, unpack
from bokehflux.sampling.ranks import ALONE, Ranks

logger = logging.getLogger(__name__)

WHOLE_PIXELS: dict[MemoryMode, int] = {"resident": 1024 * 1024, "offload": 1024 * 1024, "stream": 512 * 512}
"""By default, larger pictures are decoded in bands."""


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """Pictures of one run."""

    images: list[Image.Image]
    """One RGB picture per target, in order; fewer when it was stopped."""
    pivot: Image.Image | None
    tiled: bool
    """Whether the last one was made in bands."""
    stop: KeyboardInterrupt | None
    """Ctrl-C, where some but not all pictures were made."""


def wants_tiling(mode: MemoryMode, grid: LatentGrid) -> bool:
    """Whether pictures of this size are decoded in bands in a memory mode."""
    return grid.height_px * grid.width_px > WHOLE_PIXELS[mode]


def decode_pictures(
    vae: AutoencoderKL,
    latents: Tensor,
    pivot: Tensor | None,
    grid: LatentGrid,
    *,
    tiled: bool,
    ranks: Ranks = ALONE,
) -> Decoded:
    """latents: [N, L, 64] packed, of the targets. pivot: [L, 64]; with it, targets take its mean Lab colour.

    ranks: processes that take turns with the pictures, and all get all of them. Where memory runs out, it
    goes on in bands and says so. Ctrl-C after the first picture ends it early.
    """
    images: list[Tensor] = []
    base = mean = None
    stop = None
    rows = list(latents) if pivot is None else [pivot, *latents]

    def decode(i: int) -> Tensor:
        nonlocal tiled
        pixels, tiled = _pixels(vae, rows[i], grid, tiled)
        return pixels

    try:
        for pixels in ranks.each(decode, len(rows), (grid.height_px, grid.width_px, 3)):
            if pivot is not None and base is None:
                base, mean = pixels, lab_mean(pixels)
            else:
                images.append(pixels if mean is None else shift_to_lab_mean(pixels, mean))
    except KeyboardInterrupt as pressed:
        if base is None and not images:
            raise
        stop = pressed
    return Decoded(
        images=[Image.fromarray(image.cpu().numpy()) for image in images],
        pivot=None if base is None else Image.fromarray(base.cpu().numpy()),
        tiled=tiled,
        stop=stop,
    )


def _pixels(vae: AutoencoderKL, latents: Tensor, grid: LatentGrid, tiled: bool) -> tuple[Tensor, bool]:
    """[L, 64] packed latents -> [H, W, 3] uint8, and whether it was made in bands."""
    z = unpack(latents[None], grid)
    if not tiled:
        try:
            return to_uint8(vae.decode(z))[0], False
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
        # Retry outside the handler: the caught exception keeps the failed attempt's tensors alive.
        logger.warning("out of memory while decoding: going on in bands (VAE tiling)")
    return to_uint8(tiling.decode(vae, z))[0], True
