"""What people look at: the labelled contact sheet and the frames of an animation, from images and labels.

Knows nothing about models or files. Pictures are never smoothed upwards, since that would look like blur.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One picture on a contact sheet."""

    image: Image.Image
    label: str
    is_pivot: bool = False
    """Drawn with a frame: the others are anchored on this one."""


_MARGIN, _GAP, _LABEL = 28, 10, 44
_PAPER, _INK, _FAINT, _ACCENT = "#141416", "#f2f2f0", "#8e8e93", "#ffb340"
_MIN_TILE, _MAX_TILE, _MAX_COLUMNS = 160, 512, 8


def contact_sheet(tiles: Sequence[Tile], title: str, footer: str, columns: int | None = None) -> Image.Image:
    """All tiles, equally large, on one labelled sheet.

    columns: pictures in a row; None makes at most 8, with rows as even as possible. Small pictures are
    enlarged by whole pixels, large ones reduced to 512 pixels.
    """
    images = [_tile_size(tile.image) for tile in tiles]
    width, height = (max(image.size[axis] for image in images) for axis in (0, 1))
    columns = columns or math.ceil(len(tiles) / math.ceil(len(tiles) / _MAX_COLUMNS))
    rows = math.ceil(len(tiles) / columns)
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


def up_and_down(tiles: Sequence[Tile]) -> list[Image.Image]:
    """Frames, with their labels below, that run through the tiles and back without showing an end twice."""
    frames = [_captioned(tile) for tile in tiles]
    return frames + frames[-2:0:-1]


def _captioned(tile: Tile) -> Image.Image:
    image = _tile_size(tile.image)
    frame = Image.new("RGB", (image.width, image.height + _LABEL), _PAPER)
    frame.paste(image, (0, 0))
    font = ImageFont.load_default(20)
    place = (image.width // 2, image.height + _LABEL // 2)
    ImageDraw.Draw(frame).text(place, tile.label, _INK, font, anchor="mm")
    return frame


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
