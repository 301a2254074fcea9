"""Pictures on disk: names that never collide, the settings inside every PNG, and the labelled contact sheet.

Knows nothing about models: `cli.py` hands it PIL images, levels and a settings dictionary.
"""

from __future__ import annotations

import bisect
import io
import itertools
import json
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

SETTINGS_KEY = "bokehflux"
"""Keyword of the PNG text chunk that holds the settings as JSON."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One file to be written."""

    stem: str
    """File name without its ending."""
    image: Image.Image
    settings: dict[str, Any]
    """JSON-able; everything needed to make the picture again."""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One picture on a contact sheet."""

    image: Image.Image
    label: str
    is_pivot: bool = False
    """Drawn with a frame: the others are anchored on this one."""


def level_stem(level: float) -> str:
    """File stem of a bokeh level: 4.2 -> "bokeh-04.2". Different levels give different stems."""
    whole, point, fraction = repr(abs(float(level))).partition(".")
    return f"bokeh-{whole:0>2}{point}{fraction}"


def distinct(stems: Sequence[str]) -> list[str]:
    """The same stems, repeated ones numbered: a level that was asked for twice is two files."""
    counts = [list(stems[: i + 1]).count(stem) for i, stem in enumerate(stems)]
    return [stem if count == 1 else f"{stem}-{count}" for stem, count in zip(stems, counts, strict=True)]


def check_folder(folder: Path) -> None:
    """Make the output folder and raise ValueError unless files can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"cannot write to output folder {folder}: {error.strerror or error}") from error


def save_pictures(pictures: Sequence[Picture], folder: Path) -> list[Path]:
    """Write one PNG each and return their paths, in order.

    No file that exists is ever touched: if any name is taken, all get the suffix of a further run ("-run2").
    Each file appears under its name complete. Stems must be distinct. Raises OSError, leaving no empty file.
    """
    paths = _claim(folder, [picture.stem for picture in pictures])
    try:
        for path, picture in zip(paths, pictures, strict=True):
            _write(path, _encode(picture))
    except BaseException:
        for path in paths:
            if path.exists() and path.stat().st_size == 0:
                path.unlink()
        raise
    return paths


def read_settings(path: str | Path) -> dict[str, Any]:
    """Settings of a picture that bokehflux wrote. Raises ValueError for any other picture."""
    with Image.open(path) as image:
        text = image.info.get(SETTINGS_KEY)
    if text is None:
        raise ValueError(f"{path} holds no bokehflux settings: not written by bokehflux, or edited since")
    settings: dict[str, Any] = json.loads(text)
    return settings


def _claim(folder: Path, stems: Sequence[str]) -> list[Path]:
    """Reserve a set of names that belong together with empty files, so that two runs never share one."""
    for run in itertools.count(1):
        suffix = "" if run == 1 else f"-run{run}"
        claimed: list[Path] = []
        try:
            for stem in stems:
                path = folder / f"{stem}{suffix}.png"
                path.touch(exist_ok=False)
                claimed.append(path)
            return claimed
        except OSError as error:
            for path in claimed:
                path.unlink()
            if not isinstance(error, FileExistsError):
                raise
    raise AssertionError("unreachable")


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _encode(picture: Picture) -> bytes:
    info = PngInfo()
    # Some jurisdictions, and the FLUX licence, ask that generated pictures say so.
    info.add_text("Software", f"bokehflux {picture.settings.get('version', '')} (AI generated)")
    info.add_text(SETTINGS_KEY, json.dumps(picture.settings))
    buffer = io.BytesIO()
    picture.image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


_MARGIN, _GAP, _LABEL = 28, 10, 44
_PAPER, _INK, _FAINT, _ACCENT = "#141416", "#f2f2f0", "#8e8e93", "#ffb340"
_MIN_TILE, _MAX_TILE, _MAX_COLUMNS = 160, 512, 8


def contact_sheet(tiles: Sequence[Tile], title: str, footer: str) -> Image.Image:
    """All tiles, equally large, on one labelled sheet; rows are as even as possible.

    Pictures are never smoothed upwards, since that would look like blur: small ones are enlarged by whole
    pixels, large ones reduced to 512 pixels.
    """
    images = [_tile_size(tile.image) for tile in tiles]
    width, height = (max(image.size[axis] for image in images) for axis in (0, 1))
    rows = math.ceil(len(tiles) / _MAX_COLUMNS)
    columns = math.ceil(len(tiles) / rows)
    inner = max(columns * (width + _GAP) - _GAP, 3 * _MIN_TILE)

    title_font, label_font, footer_font = (ImageFont.load_default(size) for size in (22, 20, 15))
    title = _fit(title, title_font, inner)
    footer = _fit(footer, footer_font, inner)
    top = _MARGIN + 44
    bottom = top + rows * (height + _LABEL + _GAP)
    sheet = Image.new("RGB", (inner + 2 * _MARGIN, bottom + 16 + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN), title, _INK, title_font, anchor="lt")
    draw.text((_MARGIN, bottom + 8), footer, _FAINT, footer_font, anchor="lt")
    for i, (tile, image) in enumerate(zip(tiles, images, strict=True)):
        x = _MARGIN + i % columns * (width + _GAP)
        y = top + i // columns * (height + _LABEL + _GAP)
        sheet.paste(image, (x, y))
        right, below = x + image.width, y + image.height
        if tile.is_pivot:
            draw.rectangle((x - 4, y - 4, right + 3, below + 3), outline=_ACCENT, width=3)
        ink = _ACCENT if tile.is_pivot else _INK
        draw.text(((x + right) // 2, below + _LABEL // 2), tile.label, ink, label_font, anchor="mm")
    return sheet


def _tile_size(image: Image.Image) -> Image.Image:
    image = image.convert("RGB")
    if max(image.size) > _MAX_TILE:
        image.thumbnail((_MAX_TILE, _MAX_TILE), Image.Resampling.LANCZOS)
        return image
    factor = math.ceil(_MIN_TILE / max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _fit(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The text on one line, cut with an ellipsis where it is too long."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    fits = bisect.bisect(
        range(1, len(text)), width, key=lambda n: math.ceil(font.getlength(text[:n] + "..."))
    )
    return text[:fits].rstrip() + "..."
