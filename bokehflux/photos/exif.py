"""The level of a photograph, from what its camera wrote into it: every step, and what had to be assumed."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from PIL import ExifTags, Image

from bokehflux.lens import FULL_FRAME_DIAGONAL_MM, MAX_LEVEL, TRAINING_SIDE_PX, Camera, radius_px
from bokehflux.pictures.metadata import UNREADABLE

logger = logging.getLogger(__name__)

ASSUMED_FOCUS_M = 2.5
"""Where nothing tells the distance, and at least 50 focal lengths. Close up the distance matters, elsewhere K
changes by a few percent."""
CLOSE_UP = 1 / 20
"""From this ratio of focal length to focus distance on, the distance decides the level, too."""
ASSUMED_FULL_FRAME = "assumed equal to the focal length"
SAME = 0.02
"""Focal lengths that differ by less are the same: makers round."""
OTHER_NAMES = {
    "FocalLengthIn35mmFormat": "FocalLengthIn35mmFilm",
    "ExifImageWidth": "PixelXDimension", "ExifImageLength": "PixelYDimension",
    "ExifImageHeight": "PixelYDimension",
}  # fmt: skip
"""Names of tags in ExifTool, exifread and Pillow -> the standard's."""
UNITS_MM = {"2": 25.4, "inch": 25.4, "3": 10.0, "cm": 10.0, "centimeter": 10.0, "4": 1.0, "mm": 1.0}
"""FocalPlaneResolutionUnit as a number and in words (a plural is cut)."""
TURNS = {
    (0, False): 1, (0, True): 2, (180, False): 3, (180, True): 4,
    (270, True): 5, (90, False): 6, (90, True): 7, (270, False): 8,
}  # fmt: skip
"""(degrees clockwise, mirrored horizontally before it) -> orientation."""


@dataclass(frozen=True, kw_only=True)
class Exif:
    """What EXIF tells about camera and lens; None where it tells nothing usable (0, 0/0)."""

    make: str | None = None
    model: str | None = None
    focal_mm: float | None = None
    f_number: float | None = None
    focal_35mm: float | None = None
    """The "35 mm equivalent" focal length."""
    subject_distance_m: float | None = None
    """May be infinite."""
    sensor_diagonal_mm: float | None = None
    """From the resolution of the focal plane; Canon writes it in place of the 35 mm equivalent."""
    orientation: int | None = None
    """1 to 8: how the stored pixels are to be turned."""

    @classmethod
    def of(cls, image: Image.Image) -> Self:
        """The EXIF data inside an opened file. What is broken counts as not there."""
        try:
            data = image.getexif()
            tags = {**data, **data.get_ifd(ExifTags.IFD.Exif)}
        except UNREADABLE as error:
            logger.warning("the photograph's EXIF data is broken (%s) and left out", error)
            return cls()
        return cls.from_tags({ExifTags.TAGS.get(number, ""): value for number, value in tags.items()})

    @classmethod
    def from_tags(cls, given: Any) -> Self:
        """From tags beside a picture: a mapping, the list in a Flickr answer, or JSON text of either.

        Names may have a group in front ("EXIF FNumber"); values may be text ("14/5", "50.0 mm", "f/2.8").
        Raises ValueError for text that is not JSON.
        """
        tags: dict[str, Any] = {}
        for name, value in _pairs(given):
            name = name.split(" ")[-1].split(":")[-1]
            tags.setdefault(OTHER_NAMES.get(name, name), value)
        return cls(
            make=_text(tags.get("Make")),
            model=_text(tags.get("Model")),
            focal_mm=_finite(tags.get("FocalLength")),
            f_number=_finite(tags.get("FNumber")),
            focal_35mm=_finite(tags.get("FocalLengthIn35mmFilm")),
            subject_distance_m=_number(tags.get("SubjectDistance")),
            sensor_diagonal_mm=_diagonal_mm(tags),
            orientation=_orientation(tags.get("Orientation")),
        )


@dataclass(frozen=True, kw_only=True)
class PhotoLevel:
    """The level of a photograph and how it was found. Values that need what is missing are None."""

    make: str | None
    model: str | None
    focal_length_mm: float | None
    f_number: float | None
    focal_length_35_mm: float | None
    focal_length_35_from: str
    width_px: int
    """Upright, as the two sides below."""
    height_px: int
    crop_factor: float | None = None
    sensor_width_mm: float | None = None
    sensor_height_mm: float | None = None
    px_per_mm: float | None = None
    focus_distance_m: float | None = None
    focus_distance_from: str
    K_px_m: float | None = None
    """px of radius per 1/m, at the photograph's own size."""
    short_side_px: int
    K_px_m_short_side: float | None = None
    """K of the photograph scaled to that shorter side."""
    level: float | None = None
    """The same, clipped at 30."""
    radius_at_infinity_px: float | None = None
    """Blur of the horizon, at that shorter side."""
    K_change_if_focus_distance_20_percent_longer: float | None = None
    flags: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    """What was assumed and what the flags mean, in sentences."""


def photo_level(
    exif: Exif,
    width_px: int,
    height_px: int,
    focus_m: float | None = None,
    short_side_px: int = TRAINING_SIDE_PX,
) -> PhotoLevel:
    """The level of a whole frame of this size, at a training size.

    focus_m: distance of the plane of focus; None: the EXIF data's, or `ASSUMED_FOCUS_M`. Raises ValueError
    for a `focus_m` within the focal length.
    """
    flags: list[str] = []
    notes: list[str] = []

    def flag(name: str, note: str) -> None:
        flags.append(name)
        notes.append(note)

    equivalent_mm, equivalent_from = _equivalent(exif)
    if exif.focal_mm is not None and equivalent_from == "exif" and _same(equivalent_mm, exif.focal_mm):
        flag("f35_equals_focal_length", "the 35 mm equivalent only repeats the focal length; unless the "
             "camera is full frame, K is too small by the crop factor")  # fmt: skip
    if exif.focal_35mm is None:
        flag("f35_missing", "the EXIF lacks a 35 mm equivalent; it is " + equivalent_from)
    focus, focus_from = _focus(exif, focus_m)
    if focus_from == "assumed":
        notes.append(
            f"the EXIF lacks a usable focus distance: {focus:g} m is assumed; a farther one changes K by at "
            "most 2 %"
        )
    facts: dict[str, Any] = {}
    if exif.focal_mm is None or exif.f_number is None or equivalent_mm is None:
        wanted = {"a focal length": exif.focal_mm, "an f-number": exif.f_number}
        missing = " and ".join(what for what, value in wanted.items() if value is None)
        flag("no_level", f"the EXIF lacks {missing}, and without it there is no level")
    else:
        camera = Camera(
            focal_mm=exif.focal_mm, f_number=exif.f_number, focal_35mm=equivalent_mm,
            width_px=width_px, height_px=height_px,
        )  # fmt: skip
        k_px_m = camera.k_px_m(focus, short_side_px)
        change = camera.k_px_m(1.2 * focus) / camera.k_px_m(focus) - 1
        if exif.focal_mm / 1000 > CLOSE_UP * focus:
            flag("close_up", "this is a close-up: with the focus 20 % farther K changes by "
                 f"{100 * change:.1f} %, so the distance must be right")  # fmt: skip
        if k_px_m > MAX_LEVEL:
            flag(f"clipped_at_{short_side_px}", f"K of {k_px_m:.4g} lies above {MAX_LEVEL:g}, where the "
                 "training data was clipped")  # fmt: skip
        facts = {
            "crop_factor": equivalent_mm / exif.focal_mm,
            "sensor_width_mm": width_px / camera.px_per_mm,
            "sensor_height_mm": height_px / camera.px_per_mm,
            "px_per_mm": camera.px_per_mm,
            "K_px_m": camera.k_px_m(focus),
            "K_px_m_short_side": k_px_m,
            "level": min(k_px_m, MAX_LEVEL),
            "radius_at_infinity_px": radius_px(k_px_m, math.inf, focus),
            "K_change_if_focus_distance_20_percent_longer": change,
        }
    return PhotoLevel(
        make=exif.make, model=exif.model, focal_length_mm=exif.focal_mm, f_number=exif.f_number,
        focal_length_35_mm=equivalent_mm, focal_length_35_from=equivalent_from,
        width_px=width_px, height_px=height_px, focus_distance_m=focus, focus_distance_from=focus_from,
        short_side_px=short_side_px, flags=tuple(flags), notes=tuple(notes), **facts,
    )  # fmt: skip


def focal_px(exif: Exif, width_px: int, height_px: int) -> float | None:
    """The focal length in pixels of a whole frame of this size, or None where it would be a guess."""
    equivalent_mm, told_by = _equivalent(exif)
    if equivalent_mm is None or told_by == ASSUMED_FULL_FRAME:
        return None
    return math.hypot(width_px, height_px) * equivalent_mm / FULL_FRAME_DIAGONAL_MM


def _equivalent(exif: Exif) -> tuple[float | None, str]:
    """The 35 mm equivalent and where it comes from. The focal plane's resolution steps in where the tag is
    missing, or repeats the focal length."""
    echo = exif.focal_35mm is not None and _same(exif.focal_35mm, exif.focal_mm)
    if exif.focal_35mm is not None and not (echo and exif.sensor_diagonal_mm):
        return exif.focal_35mm, "exif"
    if exif.focal_mm is not None and exif.sensor_diagonal_mm is not None:
        equivalent_mm = exif.focal_mm * FULL_FRAME_DIAGONAL_MM / exif.sensor_diagonal_mm
        return equivalent_mm, "computed from the resolution of the focal plane"
    return exif.focal_mm, ASSUMED_FULL_FRAME


def _focus(exif: Exif, given_m: float | None) -> tuple[float, str]:
    if given_m is not None:
        return given_m, "given"
    distance_m = exif.subject_distance_m
    if distance_m is not None and distance_m > (exif.focal_mm or 0) / 1000:
        return distance_m, "exif"
    return max(ASSUMED_FOCUS_M, 50 * (exif.focal_mm or 0) / 1000), "assumed"


def _same(one: float | None, other: float | None) -> bool:
    return one is not None and other is not None and abs(one - other) <= SAME * other


def _pairs(given: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(given, str | bytes):
        try:
            given = json.loads(given or "{}")
        except (ValueError, RecursionError):
            raise ValueError(f"the EXIF column is not JSON: {given!r:.80}") from None
    if isinstance(given, Mapping):
        answer = given.get("photo", given)
        if isinstance(answer, Mapping) and isinstance(answer.get("exif"), list):
            given = answer["exif"]
    if isinstance(given, Mapping):
        yield from ((str(name), value) for name, value in given.items())
    elif isinstance(given, list):
        for tag in given:
            if isinstance(tag, Mapping) and "tag" in tag:
                raw = tag.get("raw")
                yield str(tag["tag"]), raw.get("_content") if isinstance(raw, Mapping) else raw


def _number(value: Any) -> float | None:
    """A number above 0, or None; infinity is one."""
    try:
        if isinstance(value, str):
            word = value.strip().lower()
            if word.startswith(("inf", "undef", "-")):
                return math.inf if word.startswith("inf") else None
            found = re.search(r"(\d+(?:\.\d*)?(?:e[+-]?\d+)?)(?:\s*/\s*(\d+(?:\.\d*)?))?", word)
            if found is None:
                return None
            number = float(found[1]) / float(found[2] or 1)
        elif isinstance(value, list | tuple):
            number = float(value[0]) / float(value[1])
        else:
            number = float(value)
    except (TypeError, ValueError, ArithmeticError, IndexError):
        return None
    return number if number > 0 else None


def _finite(value: Any) -> float | None:
    number = _number(value)
    return None if number == math.inf else number


def _text(value: Any) -> str | None:
    return value.strip(" \0") or None if isinstance(value, str) else None


def _diagonal_mm(tags: Mapping[str, Any]) -> float | None:
    """The sensor's, where its resolution and the size at that resolution are told."""
    resolution = _finite(tags.get("FocalPlaneXResolution"))
    width_px, height_px = (_finite(tags.get(f"Pixel{axis}Dimension")) for axis in "XY")
    unit = str(tags.get("FocalPlaneResolutionUnit", 2)).strip().lower()
    unit_mm = UNITS_MM.get(unit.removesuffix("es").removesuffix("s"))
    if resolution is None or width_px is None or height_px is None or unit_mm is None:
        return None
    return math.hypot(width_px, height_px) * unit_mm / resolution


def _orientation(value: Any) -> int | None:
    """From its number, or from words such as "Rotated 90 CW" and "Mirror horizontal and rotate 270 CW"."""
    if isinstance(value, int):
        return value if 1 <= value <= 8 else None
    words = str(value or "").lower()
    if words.isdigit():
        return _orientation(int(words))
    if not re.search("horizontal|vertical|rotate", words):
        return None
    turn = re.search(r"rotated? (\d+)( ccw)?", words)
    degrees = int(turn[1]) * (-1 if turn[2] else 1) if turn else 0
    if mirrored := "mirror" in words:
        degrees += 180 if "vertical" in words else 0
    return TURNS.get((degrees % 360, mirrored))
