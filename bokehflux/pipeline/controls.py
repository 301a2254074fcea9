"""What settings ask of a control adapter, as tensors: a plane of focus, an aperture, a map of blur."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bokehflux.aperture import DISC
from bokehflux.controls import parse_controls
from bokehflux.fingerprint import fingerprint
from bokehflux.lens import unit_level
from bokehflux.models.adapter import BokehCondition
from bokehflux.models.controls import FEATURES, PATCH_PX, Controls, shape_picture, token_features
from bokehflux.photos.maps import read_map
from bokehflux.pipeline.model import Model
from bokehflux.pipeline.render import read_aperture
from bokehflux.settings import GenerateSettings


def with_files(model: Model, settings: GenerateSettings) -> GenerateSettings:
    """The same settings, with fingerprints of the control adapter and the files that it is asked with.

    Raises ValueError for files that cannot be read.
    """
    if settings.controls is None:
        return settings
    asked, hashes = parse_controls(settings.controls), []
    if (found := model.source.snapshot) is not None and found.controls is not None:
        hashes.append(("controls", fingerprint([found.controls])))
    if asked.aperture is not None:
        hashes += read_aperture(asked.aperture)[1]
    if asked.map is not None:
        level_map(Path(asked.map), 16, 16)
        hashes.append(("map", fingerprint([Path(asked.map)])))
    return dataclasses.replace(settings, file_hashes=tuple(hashes) or None)


def with_controls(
    model: Model, settings: GenerateSettings, rows: BokehCondition, num_pivots: int
) -> BokehCondition:
    """The same levels, and what the settings ask of rows beside them.

    num_pivots: rows at the beginning with neither focus nor aperture. An aperture without focus or map is the
    subject's: training has none without either. The map is every row's: it shows where things are.
    """
    assert model.controls is not None and settings.controls is not None
    asked, numbers, count = parse_controls(settings.controls), settings.numbers(), len(rows.levels)
    size = (numbers.height_px, numbers.width_px)
    features = torch.full((count, math.prod(size) // PATCH_PX**2, FEATURES), math.nan)
    if asked.map is not None:
        shares = level_map(Path(asked.map), *size)
        features = token_features(unit_level(rows.levels.float()).view(-1, 1, 1) * shares)
    plane = 0.0 if asked.focus is None and asked.map is None else asked.focus
    focus = torch.full((count,), math.nan if plane is None else plane)
    shape = shape_picture(DISC if asked.aperture is None else read_aperture(asked.aperture)[0])
    shapes = shape.repeat(count, 1)
    focus[:num_pivots], shapes[:num_pivots] = math.nan, 0
    controls = Controls(adapter=model.controls, focus=focus, shape=shapes, features=features)
    return dataclasses.replace(rows, controls=controls)


def level_map(path: Path, height_px: int, width_px: int) -> Tensor:
    """[H, W], -1 ... 1 of a file, brought to this size. Raises ValueError for other numbers."""
    values = torch.from_numpy(read_map(path, "level map"))
    if not (values.isfinite().all() and values.abs().max() <= 1):
        raise ValueError(f"the level map {path} has numbers outside -1 to 1: expected shares of the level")
    size = (height_px, width_px)
    return F.interpolate(values[None, None], size, mode="bilinear", antialias=True)[0, 0].clamp(-1, 1)
