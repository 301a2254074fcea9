"""Other bokeh levels of a photograph: its own path from noise serves as the pivot.

The photograph's latents are followed back to noise along the model's own velocity, at the level that the
photograph has (`sampling.inversion`). From that noise the targets are sampled at their levels, grounded on
the photograph's path as they would be on a pivot's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from bokehflux.models import tiling
from bokehflux.models.adapter import BokehCondition
from bokehflux.pictures.metadata import READABLE, UNREADABLE
from bokehflux.pipeline.decode import decode_pictures, wants_tiling
from bokehflux.pipeline.generate import Pipeline, Result, Stopped, levels_of
from bokehflux.pipeline.provenance import fingerprint
from bokehflux.sampling.denoise import Denoiser, Grounding, denoiser
from bokehflux.sampling.diagnose import explain_nonfinite
from bokehflux.sampling.inversion import followed, invert
from bokehflux.sampling.latents import TOKEN_PX, LatentGrid, pack
from bokehflux.sampling.samplers import OnStep, euler
from bokehflux.sampling.schedule import sigmas


@torch.inference_mode()
def refocus(
    pipe: Pipeline,
    photo: Image.Image,
    prompt: str,
    bokeh_targets: Sequence[float],
    *,
    photo_level: float = 0.0,
    num_inference_steps: int | None = None,
    num_grounding_steps: int | None = None,
    guidance_scale: float = 1.0,
    height: int | None = None,
    width: int | None = None,
    on_step: OnStep | None = None,
    max_rows: int | None = None,
    vae_tiling: bool | None = None,
) -> Result:
    """The photograph at other levels, one picture each, in one batch.

    prompt: what the photograph shows. bokeh_targets: levels, 0 (all sharp) to 30. photo_level: that of the
        photograph; 0 for one that is sharp throughout.
    guidance_scale: distilled guidance. At 1 the photograph is kept best; more pulls towards the prompt.
    height, width [pixels, floored to multiples of 16]: by default the photograph's shape with about as many
        pixels as the model is made for. It is scaled and cropped around its middle to fill them.
    Other arguments, and errors, are those of `Pipeline.generate`. on_step is called for the way to noise,
    then for the way back. The result's pivot_image and pivot_latents are the photograph's, as it was used.
    """
    num_steps = pipe.defaults.num_inference_steps if num_inference_steps is None else num_inference_steps
    targets = levels_of(bokeh_targets)
    num_grounded = pipe.check(prompt, targets, photo_level, num_steps, num_grounding_steps)
    assert targets is not None  # a level of the photograph without targets was refused
    grid = grid_of(photo, pipe, height, width)
    fitted = ImageOps.fit(
        ImageOps.exif_transpose(photo).convert("RGB"),
        (grid.width_px, grid.height_px),
        Image.Resampling.LANCZOS,
    )
    tiled = wants_tiling(pipe.memory.mode, grid) if vae_tiling is None else vae_tiling
    with pipe.memory.phase("text"):
        conditioning = pipe.text.encode([prompt])
    with pipe.memory.phase("decode"):
        z = _latents(pipe, fitted, tiled)
    steps = sigmas(pipe.schedule, num_steps, grid.num_tokens)

    def velocity(levels: Sequence[float], grounding: Grounding | None) -> Denoiser:
        return denoiser(
            pipe.mmdit,
            conditioning,
            grid,
            guidance=guidance_scale,
            bokeh=BokehCondition.of(levels),
            grounding=grounding,
            sigmas=steps,
            max_rows=max_rows,
            cuda_graphs=pipe.memory.mode == "resident",
            backend=pipe.backend,
        )

    with pipe.memory.phase("denoise"):
        alone = velocity([photo_level], None)
        states = invert(alone, z, steps, on_step)
        if not states[0].isfinite().all():
            raise explain_nonfinite(pipe.mmdit, alone, z, steps)
        del alone
        grounding = Grounding(pivot_row=0, num_steps=num_grounded) if num_grounded else None
        follow = followed(velocity([photo_level, *targets], grounding), states, steps)
        start = states[0].expand(1 + len(targets), -1, -1)
        x = euler(follow, start, steps, on_step)[1:]
        if not x.isfinite().all():
            raise explain_nonfinite(pipe.mmdit, follow, start, steps)
        del follow  # and with it the memory of its CUDA graphs
    with pipe.memory.phase("decode"):
        made = decode_pictures(pipe.vae, x, z[0], grid, tiled=tiled)
    result = Result(
        images=made.images,
        pivot_image=fitted,
        latents=x,
        pivot_latents=z[0],
        settings={
            "prompt": prompt,
            "bokeh_targets": targets,
            "bokeh_pivot": float(photo_level),
            "num_inference_steps": num_steps,
            "num_grounding_steps": num_grounded,
            "guidance_scale": guidance_scale,
            "height": grid.height_px,
            "width": grid.width_px,
            **pipe.facts,
            "memory": pipe.memory.mode,
            "max_rows": max_rows,
            "vae_tiling": made.tiled,
        },
    )
    if made.stop is not None:
        raise Stopped(result) from made.stop
    return result


def read_photo(path: Path) -> tuple[Image.Image, dict[str, str]]:
    """A photograph, and what a recipe says of it: the file's name and fingerprint.

    Raises ValueError, naming the file, for one that is not there or no picture of a known format.
    """
    try:
        if not path.is_file():
            raise ValueError("it is not there" if not path.exists() else "it is no regular file")
        with Image.open(path, formats=READABLE) as file:
            file.load()
            photo = file.copy()
        return photo, {"photo": path.name, "photo_hash": fingerprint([path])}
    except UNREADABLE as error:
        raise ValueError(
            f"cannot read the photograph {path}: {error}; expected one of {', '.join(READABLE)}"
        ) from error


def grid_of(photo: Image.Image, pipe: Pipeline, height: int | None, width: int | None) -> LatentGrid:
    """The size that was asked for, or the photograph's shape at the model's area."""
    if height is not None and width is not None:
        return LatentGrid.floored(height, width)
    if height is not None or width is not None:
        raise ValueError("give both height and width, or neither for the photograph's own shape")
    upright = ImageOps.exif_transpose(photo)
    scale = math.sqrt(pipe.defaults.height_px * pipe.defaults.width_px / (upright.width * upright.height))
    high, wide = (max(1, round(scale * side / TOKEN_PX)) * TOKEN_PX for side in upright.size[::-1])
    return LatentGrid(height_px=high, width_px=wide)


def _latents(pipe: Pipeline, picture: Image.Image, tiled: bool) -> Tensor:
    """[1, L, 64] of an RGB picture."""
    pixels = torch.from_numpy(np.array(picture)).to(pipe.device).movedim(-1, 0)[None]
    x = (pixels.float() / 127.5 - 1).to(pipe.dtype)
    return pack(pipe.vae.draw(*tiling.moments(pipe.vae, x)) if tiled else pipe.vae.encode(x))
