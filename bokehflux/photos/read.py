"""The one door through which photographs come in: files of cameras become upright pictures in sRGB."""

from __future__ import annotations

import io
import logging
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageCms, ImageOps

from bokehflux.fingerprint import fingerprint, fingerprint_of_bytes
from bokehflux.photos.exif import Exif
from bokehflux.pictures.metadata import READABLE, UNREADABLE

logger = logging.getLogger(__name__)

MIN_SIDE_PX = 16
EXPORT = {
    "HEIC or AVIF": (b"ftypheic", b"ftypheix", b"ftyphevc", b"ftypmif1", b"ftypmsf1", b"ftypavif"),
    "TIFF, or a raw file of a camera": (
        b"II*\0",
        b"MM\0*",
        b"IIU\0",
        b"IIRO",
        b"FUJIFILMCCD-RAW",
        b"ftypcrx ",
    ),
    "Photoshop": (b"8BPS",),
    "JPEG XL": (b"\xff\x0a", b"\0\0\0\x0cJXL "),
    "JPEG 2000": (b"\0\0\0\x0cjP  ",),
    "BMP": (b"BM",),
}
"""Formats that are not read, and how their files begin ("ftyp" from the fifth byte)."""


TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""What turns stored pixels upright, by EXIF orientation."""


@dataclass(frozen=True, kw_only=True)
class Photo:
    """A photograph, and which file it was."""

    image: Image.Image
    """Upright RGB in sRGB, 8 bits a channel."""
    exif: Exif
    """What the file says of its camera. `orientation` is the turn that `image` has had."""
    name: str
    """The file's name, without its folder."""
    fingerprint: str


def read_photo(path: Path) -> Photo:
    """The photograph in a file, as `upright_rgb` makes it.

    Raises ValueError, with the file's name and what to do, for one that cannot be read.
    """
    try:
        if not path.is_file():
            raise ValueError("it is not there" if not path.exists() else "it is not a regular file")
        with path.open("rb") as file:
            image, exif = _decoded(file, None)
        return Photo(image=image, exif=exif, name=path.name, fingerprint=fingerprint([path]))
    except UNREADABLE as error:
        raise ValueError(_refusal(str(path), error)) from error


def photo_from_bytes(data: bytes, name: str, orientation: int | None = None) -> Photo:
    """The same for a file that lies inside another one.

    orientation: the turn where the file says nothing itself, because it was written again without its EXIF.
    """
    try:
        image, exif = _decoded(io.BytesIO(data), orientation)
    except UNREADABLE as error:
        raise ValueError(_refusal(name, error)) from error
    return Photo(image=image, exif=exif, name=name, fingerprint=fingerprint_of_bytes(data))


def _decoded(file: BinaryIO, orientation: int | None) -> tuple[Image.Image, Exif]:
    _refuse_other_formats(file.read(32))
    file.seek(0)
    # Pillow's notice about large pictures speaks of attacks; its limit, twice as high, holds.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", "Corrupt EXIF data|Truncated File Read", UserWarning)
        with Image.open(file, formats=READABLE) as stored:
            stored.load()
            exif = Exif.of(stored)
            image = upright_rgb(stored)
    if exif.orientation is None and orientation is not None:
        image, exif = turned(image, orientation), replace(exif, orientation=orientation)
    return image, exif


def _refusal(name: str, error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        said = f"it has more than {most} million pixels; scale it down first"
    else:
        said = f"{error}; expected one of {', '.join(READABLE)}"
    return f"cannot read the photograph {name}: {said}"


def turned(image: Image.Image, orientation: int | None) -> Image.Image:
    """Stored pixels turned upright; what lies over a photograph (mask, depth) must turn with it."""
    method = TRANSPOSE.get(orientation or 1)
    return image if method is None else image.transpose(method)


def upright_rgb(photo: Image.Image) -> Image.Image:
    """The photograph turned as its EXIF says, in sRGB with 8 bits a channel, over white where transparent.

    16-bit and floating-point (0 to 1) tones are scaled, not cut. Raises ValueError for a side below 16 pixels
    and for floating-point values outside 0 to 255.
    """
    if not isinstance(photo, Image.Image):
        raise ValueError(f"expected a picture that Pillow has opened, got {photo!r:.80}: see PIL.Image.open")
    if min(photo.size) < MIN_SIDE_PX:
        raise ValueError(
            f"it has {photo.width} x {photo.height} pixels, and each side needs at least {MIN_SIDE_PX}"
        )
    profile = photo.info.get("icc_profile")
    image = _eight_bits(ImageOps.exif_transpose(photo))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(paper, image).convert("RGB")
    if image.mode in ("P", "1", "HSV", "YCbCr", "RGBX"):
        image = image.convert("RGB")
    if profile:
        image = _in_srgb(image, profile)
    return image.convert("RGB")


def within(image: Image.Image, long_side_px: int) -> Image.Image:
    """The picture itself, or scaled down to a long side; no side of it vanishes."""
    scale = long_side_px / max(image.size)
    if scale >= 1:
        return image
    width, height = (max(1, round(scale * side)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _refuse_other_formats(start: bytes) -> None:
    for name, beginnings in EXPORT.items():
        for beginning in beginnings:
            where = start[4:] if beginning.startswith(b"ftyp") else start
            if where.startswith(beginning):
                raise ValueError(f"{name} is not read here: export it as JPEG or PNG")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Tones of more than 8 bits scaled to 0-255."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        low, high = float(values.min()), float(values.max())
        if not (low >= 0 and high <= 255):
            raise ValueError(f"its floating-point values run from {low:g} to {high:g}, expected 0 to 1")
        values = values * 255 if high <= 1 else values
    else:  # a mode "I" picture with 8-bit values is told by its largest one
        values = values / 257 if image.mode.startswith("I;16") or values.max() > 255 else values
    return Image.fromarray(values.clip(0, 255).round().astype(np.uint8))


def _changes_nothing(to_srgb: ImageCms.ImageCmsTransform) -> bool:
    """Whether a profile is sRGB, whose pixels stay bit by bit: its colours tell, its name may not."""
    colors = np.indices((16, 16, 16), np.uint8).reshape(3, 64, 64).transpose(1, 2, 0) * 17
    seen = np.asarray(ImageCms.applyTransform(Image.fromarray(colors), to_srgb))
    return int(np.abs(seen.astype(int) - colors).max()) <= 2


def _in_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Colours of an ICC profile in sRGB; as they are, with a notice, where the profile does not fit."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        target = ImageCms.createProfile("sRGB")
        to_srgb = ImageCms.buildTransform(source, target, image.mode, "RGB")
        if image.mode == "RGB" and _changes_nothing(to_srgb):
            return image
        converted = ImageCms.applyTransform(image, to_srgb)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        logger.warning(
            "the photograph's colour profile cannot be used (%s): colours are taken as sRGB", error
        )
        return image
    return image if converted is None else converted
