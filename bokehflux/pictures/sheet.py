"""What people look at: the labelled contact sheet and the frames of an animation, from images and labels.

Knows nothing about models or files. Pictures are never smoothed upwards, since that would look like blur.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from bokehflux.pictures import letters


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
_TITLE_PX, _LABEL_PX, _FOOTER_PX = 22, 20, 15


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

    top = _MARGIN + 44
    bottom = top + rows * (height + _LABEL + _GAP)
    sheet = Image.new("RGB", (inner + 2 * _MARGIN, bottom + 16 + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(sheet)
    letters.draw(sheet, (_MARGIN, _MARGIN + 18), letters.fit(title, _TITLE_PX, inner), _TITLE_PX, _INK)
    letters.draw(sheet, (_MARGIN, bottom + 20), letters.fit(footer, _FOOTER_PX, inner), _FOOTER_PX, _FAINT)
    for i, (tile, image) in enumerate(zip(tiles, images, strict=True)):
        x = _MARGIN + i % columns * (width + _GAP)
        y = top + i // columns * (height + _LABEL + _GAP)
        sheet.paste(image, (x, y))
        right, below = x + image.width, y + image.height
        if tile.is_pivot:
            draw.rectangle((x - 4, y - 4, right + 3, below + 3), outline=_ACCENT, width=3)
        _label(sheet, (x, right, below), tile)
    return sheet


def up_and_down(tiles: Sequence[Tile]) -> list[Image.Image]:
    """Frames, with their labels below, that run through the tiles and back without showing an end twice."""
    frames = [_captioned(tile) for tile in tiles]
    return frames + frames[-2:0:-1]


def _captioned(tile: Tile) -> Image.Image:
    image = _tile_size(tile.image)
    frame = Image.new("RGB", (image.width, image.height + _LABEL), _PAPER)
    frame.paste(image, (0, 0))
    _label(frame, (0, image.width, image.height), tile)
    return frame


def _label(sheet: Image.Image, below: tuple[int, int, int], tile: Tile) -> None:
    """Write the label of a picture in the middle of its left and right edge, under its lower edge."""
    left, right, bottom = below
    text = letters.fit(tile.label, _LABEL_PX, right - left + _GAP)
    ink = _ACCENT if tile.is_pivot else _INK
    letters.draw(sheet, ((left + right) / 2, bottom + _LABEL / 2 + 7), text, _LABEL_PX, ink, anchor="ms")


def _tile_size(image: Image.Image) -> Image.Image:
    image = image.convert("RGB")
    if max(image.size) > _MAX_TILE:
        image.thumbnail((_MAX_TILE, _MAX_TILE), Image.Resampling.LANCZOS)
        return image
    factor = math.ceil(_MIN_TILE / max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
