"""Other bokeh levels of a photograph: its own path from noise serves as the pivot.

The photograph's latents are followed back to noise along the model's own velocity, at the level that the
photograph has (`sampling.inversion`). From that noise the targets are sampled at their levels, grounded on
the photograph's path as they would be on a pivot's.
"""

from __future__ import annotations

import dataclasses
import math

from PIL import Image, ImageOps
from torch import Tensor

from bokehflux.configs import MAX_SIDE_PX
from bokehflux.photos.read import upright_rgb
from bokehflux.pipeline.model import Model
from bokehflux.pipeline.run import End, Plan, Stage, Start, check_finite, check_levels
from bokehflux.record import RefocusSettings
from bokehflux.sampling.denoise import Grounding
from bokehflux.sampling.inversion import followed, invert, path
from bokehflux.sampling.latents import TOKEN_PX, LatentGrid
from bokehflux.sampling.shortcuts import reused


def plan_refocus(model: Model, photo: Image.Image, asked: RefocusSettings) -> Plan:
    """The run that shows a photograph at the levels asked for.

    The photograph is turned upright, scaled and cropped around its middle to fill the run's size. Raises
    ValueError for settings that the model cannot serve.
    """
    check_levels(asked, has_adapter=model.transformer.bokeh is not None)
    upright = upright_rgb(photo)
    grid = grid_of(upright, model, asked.height, asked.width)
    settings = dataclasses.replace(asked, height=grid.height_px, width=grid.width_px)
    settings = settings.completed(model.defaults)
    fitted = ImageOps.fit(upright, (grid.width_px, grid.height_px), Image.Resampling.LANCZOS)

    def begin(stage: Stage) -> Start:
        photo, sigmas = stage.photo, stage.sigmas
        assert photo is not None
        alone = stage.velocity([settings.bokeh_pivot], None)
        states = invert(alone, photo, sigmas, stage.on_step)
        check_finite(model, states[0], alone, lambda velocity: invert(velocity, photo, sigmas))
        del alone  # and with it the memory of its CUDA graphs
        grounding = None
        if settings.makes_pivot:
            grounding = Grounding(pivot_row=0, num_steps=settings.numbers().grounded_steps)
        velocity = followed(
            stage.velocity([settings.bokeh_pivot, *settings.bokeh_targets], grounding), states, sigmas
        )
        if settings.reuse is not None:
            velocity = reused(velocity, path(states, sigmas), settings.reuse, len(sigmas) - 1)
        return Start(states[0].expand(1 + len(settings.bokeh_targets), -1, -1), velocity)

    def end(x: Tensor, photo: Tensor | None) -> End:
        assert photo is not None
        return End(x[1:], photo[0])

    return Plan(settings=settings, begin=begin, end=end, photo=fitted)


def grid_of(photo: Image.Image, model: Model, height: int | None, width: int | None) -> LatentGrid:
    """The size that was asked for, or the upright photograph's shape at the model's area."""
    if height is not None and width is not None:
        return LatentGrid.floored(height, width)
    if height is not None or width is not None:
        raise ValueError("give both height and width, or neither for the photograph's own shape")
    scale = math.sqrt(model.defaults.height_px * model.defaults.width_px / (photo.width * photo.height))
    most = MAX_SIDE_PX // TOKEN_PX
    high, wide = (min(max(1, round(scale * s / TOKEN_PX)), most) * TOKEN_PX for s in photo.size[::-1])
    return LatentGrid(height_px=high, width_px=wide)
