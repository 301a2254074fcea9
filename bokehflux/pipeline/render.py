"""A photograph with depth through a lens: from files to pictures at the levels asked for."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from bokehflux.aperture import Aperture, Picture, parse_aperture
from bokehflux.fingerprint import fingerprint
from bokehflux.focus import Subject, parse_focus
from bokehflux.lens import MAX_LEVEL, TRAINING_SIDE_PX
from bokehflux.photos.exif import photo_level
from bokehflux.photos.maps import Kind, read_map
from bokehflux.photos.read import Photo, read_photo, turned, within
from bokehflux.pipeline.memory import room_to_blur
from bokehflux.pipeline.provenance import provenance_here
from bokehflux.record import Record
from bokehflux.rendering import bokehme
from bokehflux.rendering.bokehme_networks import Networks, load_networks
from bokehflux.rendering.lens_map import LensMap
from bokehflux.rendering.photo import GAMMA, blur_photo
from bokehflux.settings import DEFAULT_LEVELS, RenderSettings

FILES = ("photo", "depth", "mask", "arnet", "iunet")
"""Settings that name files."""
Blur = Callable[[Tensor], Tensor]
"""Radii [H, W] -> the picture [3, H, W], blurred by them."""


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """A photograph that is ready to be blurred."""

    settings: RenderSettings
    """Complete."""
    device: torch.device
    lenses: Mapping[str, LensMap]
    """One for every focus that was asked for."""
    blur: Blur
    own_level: float | None
    """The photograph's, in the meaning that the settings ask for; None where its EXIF data does not tell."""

    @property
    def size(self) -> torch.Size:
        """Height and width of the pictures."""
        return next(iter(self.lenses.values())).blur.shape

    @property
    def record(self) -> Record:
        return Record(settings=self.settings, provenance=provenance_here(self.device))

    @torch.inference_mode()
    @room_to_blur()
    def picture(self, level: float | None, focus: str | None) -> Image.Image:
        """One of `settings.shots`. Raises ValueError for a level outside 0 to 30."""
        assert level is not None and focus is not None
        out = self.blur(self.lenses[focus].radius_px(level))
        return Image.fromarray((out.permute(1, 2, 0) * 255).round().byte().cpu().numpy())


@room_to_blur()
def open_rendering(asked: RenderSettings, device: torch.device) -> Rendering:
    """Reads all files. Raises ValueError for those that cannot be used, or do not belong together."""
    photo = read_photo(Path(asked.photo))
    width, height = photo.image.size
    lens = LensMap.from_depth(map_over(photo, asked.depth, "depth").to(device), asked.unify)
    lens = lens.resized(height, width)
    matte, foci = None, {text: parse_focus(text) for text in asked.focus}
    if asked.mask is not None:
        matte = resized(map_over(photo, asked.mask, "mask").to(device), height, width)
    elif any(isinstance(focus, Subject) for focus in foci.values()):
        raise ValueError("say what is in focus: --focus X,Y or --focus 2.5m, or --mask with the subject's")
    subject = None if matte is None else matte > 0.5
    lenses = {text: lens.focused_at(focus, subject) for text, focus in foci.items()}

    image = within(photo.image, asked.long_side)
    if image.size != photo.image.size:
        lens = lens.resized(image.height, image.width)
        lenses = {text: one.resized(image.height, image.width) for text, one in lenses.items()}
        matte = None if matte is None else resized(matte, image.height, image.width)
    own = photo_level(photo.exif, width, height).K_px_m_short_side
    assert lens.px_m is not None
    if own is not None:  # a radius by 1/m, in the map's own units
        own = round(min(own * min(image.size) / TRAINING_SIDE_PX / lens.px_m, MAX_LEVEL), 1)
    levels = asked.bokeh_targets or (DEFAULT_LEVELS if own is None else (own,))
    files = {name: path for name in FILES if (path := getattr(asked, name)) is not None}
    aperture, hashes = read_aperture(asked.aperture)
    picture = torch.from_numpy(np.array(image)).to(device).permute(2, 0, 1) / 255
    blur = _blur(asked, picture, aperture, matte)
    hashes = (*((name, fingerprint([Path(path)])) for name, path in files.items()), *hashes)
    return Rendering(
        settings=dataclasses.replace(asked, bokeh_targets=levels, file_hashes=hashes),
        device=device,
        lenses=lenses,
        blur=blur,
        own_level=own,
    )


def read_aperture(text: str) -> tuple[Aperture, tuple[tuple[str, str], ...]]:
    """The aperture that a setting names, and its fingerprint where that is a picture, as `file_hashes`.

    A picture is bright where light passes, and black sides square it. Raises ValueError for one that cannot
    be read.
    """
    found = parse_aperture(text)
    if not isinstance(found, Path):
        return found, ()
    photo = read_photo(found)
    gray = np.asarray(photo.image.convert("L"), np.float32) / 255
    light = torch.from_numpy(gray)
    height, width = light.shape
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    picture = Picture(F.pad(light, (left, side - width - left, top, side - height - top)))
    return picture, (("aperture", photo.fingerprint),)


def _blur(asked: RenderSettings, picture: Tensor, aperture: Aperture, matte: Tensor | None) -> Blur:
    """The renderer that was asked for. Raises ValueError for what it lacks, or would leave aside."""
    if asked.renderer != "bokehme" and (asked.arnet or asked.iunet):
        raise ValueError(f"--arnet and --iunet are for --renderer bokehme, and it is {asked.renderer}")
    if asked.renderer == "layers":
        return lambda radius: blur_photo(picture, radius, aperture, matte, asked.highlights)
    if asked.highlights != 1:
        raise ValueError(f"highlights are raised by the renderer layers, and it is {asked.renderer}")
    iris = bokehme.iris_of(aperture)
    if asked.renderer == "scatter":
        scattered = functools.partial(bokehme.classical, picture[None], gamma=GAMMA, iris=iris)
        return lambda radius: scattered(radius[None] / bokehme.PX_PER_UNIT)[0].clamp(0, 1)
    if asked.arnet is None or asked.iunet is None:
        raise ValueError("the renderer bokehme needs its networks: --arnet FILE and --iunet FILE")
    arnet, iunet = load_networks(Path(asked.arnet), Path(asked.iunet))
    networks = Networks(arnet.to(picture.device), iunet.to(picture.device))
    both = functools.partial(bokehme.render, picture[None], gamma=GAMMA, networks=networks, iris=iris)
    return lambda radius: both(radius[None] / bokehme.PX_PER_UNIT).result[0]


def map_over(photo: Photo, path: str | Path, kind: Kind) -> Tensor:
    """[H, W] over the upright photograph: a map that fits only the stored pixels is turned with them.

    Raises ValueError for one that cannot be read, and for one of another picture.
    """
    values = read_map(Path(path), kind)
    if not fits(values, *photo.image.size):
        stored = np.asarray(turned(Image.fromarray(values), photo.exif.orientation))
        if not fits(stored, *photo.image.size):
            high, wide = values.shape
            raise ValueError(
                f"the {kind} {path} has {wide} x {high} points and the photograph "
                f"{photo.image.width} x {photo.image.height}: they are not of one picture"
            )
        values = stored
    return torch.from_numpy(values.copy())


def fits(values: NDArray[np.float32] | Tensor, width: int, height: int) -> bool:
    """Whether a map [H, W] lies over a picture, which may have another number of pixels."""
    high, wide = values.shape
    return abs(width * high - height * wide) <= max(high, wide, width, height)


def resized(values: Tensor, height: int, width: int) -> Tensor:
    """A mask [H, W] of 0 ... 1, at another size."""
    size = (height, width)
    return F.interpolate(values[None, None], size, mode="bilinear", antialias=True)[0, 0].clamp(0, 1)
