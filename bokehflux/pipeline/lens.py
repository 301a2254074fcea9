"""One sharp picture through a lens: a second one, blurred strongly by the model, tells where and how much.

The two go through the network together, whatever is asked for. Any number of pictures is then rendered from
the sharp one: at any level, focused anywhere, by any aperture.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bokehflux.focus import parse_focus
from bokehflux.lens import MAX_LEVEL
from bokehflux.pictures.series import BlurMap
from bokehflux.pipeline.memory import room_to_blur
from bokehflux.pipeline.render import read_aperture
from bokehflux.rendering.lens_map import LensMap
from bokehflux.rendering.photo import glow_shown
from bokehflux.settings import PROBE_LEVEL, LensSettings

logger = logging.getLogger(__name__)
Asked = TypeVar("Asked", bound=LensSettings)
POOR = 0.1
"""A residual from which two pictures hardly show one scene: the blur of nano's leaves 0.03 to 0.05."""


def with_hashes(asked: Asked) -> Asked:
    """The same settings, with the fingerprint of an aperture's picture. Raises ValueError where that cannot
    be read."""
    hashes = () if asked.aperture is None else read_aperture(asked.aperture)[1]
    both = dict(asked.file_hashes or ()) | dict(hashes)
    return dataclasses.replace(asked, file_hashes=tuple(both.items())) if hashes else asked


class Lens:
    """A lens, waiting for the map of a picture's blur."""

    def __init__(
        self, size: tuple[int, int], asked: LensSettings, own_level: float = 0.0, *, shows_glow: bool = False
    ) -> None:
        """size: width and height of the picture. own_level: the picture's; less blur is not to be had.
        shows_glow: whether the model's blurred picture tells how bright lights are.

        Raises ValueError for a focus that such a picture lacks, and for an aperture's picture that cannot be
        read.
        """
        self.shots, self.highlights, self.own_level = asked.shots, asked.highlights, own_level
        self.shows_glow = shows_glow
        self.foci = {text: parse_focus(text) for text in asked.focus or ()}
        for focus in self.foci.values():
            LensMap(blur=torch.zeros(size[::-1])).focused_at(focus)
        self.aperture = read_aperture(asked.aperture or "disc")[0]

    @room_to_blur()
    def found(self, sharp: Image.Image, blurred: Image.Image, device: torch.device) -> LensMap:
        """The map that `blurred` shows: the sharp picture at `PROBE_LEVEL`, maybe smaller."""
        picture, probe = _pixels(sharp, device), _pixels(blurred, device)
        found = LensMap.from_pictures(picture, probe, PROBE_LEVEL, self.own_level, loose=True)
        if self.shows_glow:
            radius = found.radius_px(math.sqrt(PROBE_LEVEL**2 - self.own_level**2))
            found = dataclasses.replace(found, glow=glow_shown(picture, radius, probe))
        logger.info("the map of blur leaves a residual of %.3f", found.residual)
        if found.residual > POOR:
            logger.warning(
                "the model changed the picture where it should only blur it (residual %.2f): its blur may be "
                "wrong; bokehflux render takes a depth map in its place",
                found.residual,
            )
        return found

    def pictures(self, picture: Image.Image, found: LensMap) -> Iterator[Image.Image]:
        """Every shot, through the map."""
        with room_to_blur():
            sharp = _pixels(picture, found.blur.device)
            lenses: dict[str | None, LensMap] = {None: found}
            lenses |= {text: found.focused_at(focus) for text, focus in self.foci.items()}
            for level, focus in self.shots:
                # The picture's own blur is there already; blurs add up as squares do.
                added = math.sqrt((level or 0.0) ** 2 - self.own_level**2)
                if not added:
                    yield picture
                    continue
                out = lenses[focus].render(sharp, min(added, MAX_LEVEL), self.aperture, self.highlights)
                yield Image.fromarray((out.movedim(0, -1) * 255).round().byte().cpu().numpy())


def drawn(lens: LensMap) -> BlurMap:
    """The map as a picture."""
    far, near = (float(end) for end in lens.blur.aminmax())
    grey = (lens.blur - far) / max(near - far, 1e-9) * 255
    return BlurMap(image=Image.fromarray(grey.round().byte().cpu().numpy()), ends=(far, near), glow=lens.glow)


def _pixels(picture: Image.Image, device: torch.device) -> Tensor:
    """[3, H, W], 0 ... 1."""
    return torch.from_numpy(np.array(picture)).to(device).movedim(-1, 0) / 255
