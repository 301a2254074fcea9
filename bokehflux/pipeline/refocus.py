"""Other bokeh levels of a photograph, in one of three ways.

"render" asks the network once for the photograph at a strong level, beside the photograph on a straight path
to noise, or, where the model can, looking at it as "reference" does. Where and how much that picture is
blurred is a map, and the photograph's own pixels are blurred through it: at any level, by any aperture, at
the photograph's own size. "inversion" follows the photograph back to the noise that it would come from, and
lets the network draw every level from there. "reference" shows the photograph to the network once, and every
level is drawn looking at it (`models.reference`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from PIL import Image, ImageOps
from torch import Tensor

from bokehflux.configs import MAX_SIDE_PX
from bokehflux.fingerprint import fingerprint
from bokehflux.models.adapter import BokehCondition
from bokehflux.photos.read import upright_rgb, within
from bokehflux.pipeline.lens import Lens, with_hashes
from bokehflux.pipeline.model import Model
from bokehflux.pipeline.run import End, Plan, Stage, Start, check_finite, check_levels
from bokehflux.sampling.denoise import Grounding
from bokehflux.sampling.inversion import followed, invert, path, straight
from bokehflux.sampling.latents import TOKEN_PX, LatentGrid
from bokehflux.sampling.shortcuts import reused
from bokehflux.settings import DEFAULT_SEED, PROBE_LEVEL, RefocusSettings


def plan_refocus(model: Model, photo: Image.Image, asked: RefocusSettings) -> Plan:
    """The run that shows a photograph at the levels asked for.

    The photograph is turned upright. Where a size is asked for it is scaled and cropped around its middle to
    fill it; else "render" keeps its size, up to `long_side`, and the others make it as large as the model
    likes. Raises ValueError for settings that the model cannot serve, and a focus that the photograph lacks.
    """
    check_levels(
        asked,
        has_adapter=model.transformer.bokeh is not None,
        has_reference=model.reference is not None,
    )
    if asked.method == "render" and asked.probe is None:
        looks = model.reference is not None and not asked.num_grounding_steps
        asked = dataclasses.replace(asked, probe="reference" if looks else "straight")
    upright = upright_rgb(photo)
    grid = grid_of(upright, model, asked.height, asked.width)
    settings = dataclasses.replace(asked, height=grid.height_px, width=grid.width_px)
    settings = settings.completed(model.defaults)
    size = (grid.width_px, grid.height_px)
    if settings.looks and (found := model.source.snapshot) is not None and found.reference is not None:
        adapter = ("reference", fingerprint([found.reference]))
        settings = dataclasses.replace(settings, file_hashes=(adapter,))

    def end(x: Tensor, _: Tensor | None) -> End:
        # The photograph decides the colours on the way. To move their means afterwards, in 8-bit Lab, loses a
        # decibel and more.
        return End(x[1:], None)

    if settings.method != "render":
        fitted = ImageOps.fit(upright, size, Image.Resampling.LANCZOS)
        levels = settings.bokeh_targets
        begin = _straight(settings, *levels) if settings.looks else _inverted(model, settings)
        return Plan(settings=settings, begin=begin, end=end, photo=fitted)
    shown = shown_photo(photo, asked)
    return Plan(
        settings=with_hashes(settings),
        begin=_straight(settings, PROBE_LEVEL),
        end=end,
        # The whole photograph, so that the map lies over it: a few pixels wider or higher than it is.
        photo=shown.resize(size, Image.Resampling.LANCZOS),
        shown=shown,
        # On a straight path the model hardly draws lights' discs.
        lens=Lens(shown.size, settings, settings.bokeh_pivot, shows_glow=settings.looks),
    )


def shown_photo(photo: Image.Image, asked: RefocusSettings) -> Image.Image:
    """The photograph as "render" blurs it: upright, at the size asked for, or its own up to `long_side`."""
    upright = upright_rgb(photo)
    if asked.height is not None and asked.width is not None:
        grid = LatentGrid.floored(asked.height, asked.width)
        upright = ImageOps.fit(upright, (grid.width_px, grid.height_px), Image.Resampling.LANCZOS)
    return within(upright, asked.long_side)


def _straight(settings: RefocusSettings, *levels: float) -> Callable[[Stage], Start]:
    """The photograph on its way to noise that is always the same, and beside it a row for each level."""

    def begin(stage: Stage) -> Start:
        photo, sigmas, rows = stage.photo, stage.sigmas, (settings.bokeh_pivot, *levels)
        assert photo is not None
        states = straight(photo, stage.noise(DEFAULT_SEED), sigmas)
        beside = stage.read(settings.bokeh_pivot) if settings.looks else _grounding(settings)
        velocity = followed(stage.velocity(BokehCondition.of(rows), beside), states, sigmas)
        return Start(states[0].expand(len(rows), -1, -1), velocity)

    return begin


def _inverted(model: Model, settings: RefocusSettings) -> Callable[[Stage], Start]:
    def begin(stage: Stage) -> Start:
        photo, sigmas = stage.photo, stage.sigmas
        assert photo is not None
        alone = stage.velocity(BokehCondition.of([settings.bokeh_pivot]), None)
        states = invert(alone, photo, sigmas, stage.on_step)
        check_finite(model, states[0], alone, lambda velocity: invert(velocity, photo, sigmas))
        del alone  # and with it the memory of its CUDA graphs
        levels = [settings.bokeh_pivot, *settings.bokeh_targets]
        asked = BokehCondition.of(levels)
        velocity = followed(stage.velocity(asked, _grounding(settings)), states, sigmas)
        if settings.reuse is not None:
            grounded = settings.numbers().grounded_steps
            velocity = reused(velocity, path(states, sigmas), settings.reuse, sigmas, grounded)
        return Start(states[0].expand(len(levels), -1, -1), velocity)

    return begin


def _grounding(settings: RefocusSettings) -> Grounding | None:
    if not settings.makes_pivot:
        return None
    return Grounding(pivot_row=0, num_steps=settings.numbers().grounded_steps)


def grid_of(photo: Image.Image, model: Model, height: int | None, width: int | None) -> LatentGrid:
    """The size that was asked for, or the upright photograph's shape at the model's area."""
    if height is not None and width is not None:
        return LatentGrid.floored(height, width)
    scale = math.sqrt(model.defaults.height_px * model.defaults.width_px / (photo.width * photo.height))
    most = MAX_SIDE_PX // TOKEN_PX
    high, wide = (min(max(1, round(scale * s / TOKEN_PX)), most) * TOKEN_PX for s in photo.size[::-1])
    return LatentGrid(height_px=high, width_px=wide)
