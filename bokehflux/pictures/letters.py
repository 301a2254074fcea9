"""One line of text in any script: Latin, Greek and Cyrillic from our own font, the rest from the system's.

`fonts/NotoSans.ttf` is Noto Sans 2.015 (licence: fonts/OFL.txt), cut down with fontTools 4: `varLib.instancer
wght=400 wdth=100`, then `pyftsubset --no-hinting --notdef-outline --layout-features=kern,mark,mkmk,ccmp
--unicodes=U+20-7E,U+A0-52F,U+1E00-209F,U+20A0-20C0,U+2100-22FF,U+25A0-25FF,U+FB00-FB06,U+FFFD`.
A letter that no font has is drawn as the box that this font has for it.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
import os
import sys
import unicodedata
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

OWN = Path(__file__).with_name("fonts") / "NotoSans.ttf"
USUAL = (
    "NotoSansCJK-Regular.ttc", "DroidSansFallbackFull.ttf", "wqy-microhei.ttc", "wqy-zenhei.ttc",
    "NotoColorEmoji.ttf", "DejaVuSans.ttf",  # Linux
    "Hiragino Sans GB.ttc", "PingFang.ttc", "AppleSDGothicNeo.ttc", "Apple Color Emoji.ttc",
    "Arial Unicode.ttf", "Apple Symbols.ttf",  # macOS
    "YuGothR.ttc", "msgothic.ttc", "msyh.ttc", "malgun.ttf", "seguiemj.ttf", "seguisym.ttf",  # Windows
)  # fmt: skip
"""Files that are asked first, before all others in the order of their names."""
STRIKES = (109, 136, 128, 160, 96, 72, 64)
"""Sizes of fonts that consist of pictures, as those with coloured emoji do. They open in no other."""
UNASSIGNED = "\uffff"
"""A code point that never gets a letter: what a font draws for it stands for letters it lacks."""

_FOUND: dict[str, Path] = {}


def fit(text: str, size: int, width: int) -> str:
    """The text on one line, cut with an ellipsis where it is wider than `width` pixels."""
    line = _one_line(text)
    if length(line[:width], size) <= width and len(line) <= width:
        return line
    fits = bisect.bisect(
        range(1, min(len(line), width)), width, key=lambda n: math.ceil(length(line[:n] + "…", size))
    )
    return line[:fits].rstrip() + "…"


def length(text: str, size: int) -> float:
    """Width in pixels of a line of letters of `size` pixels."""
    return sum(font.getlength(run) * size / font.size for font, run in _runs(_one_line(text), size))


def draw(
    image: Image.Image, place: tuple[float, float], text: str, size: int, ink: str, anchor: str = "ls"
) -> None:
    """Write a line on an RGB picture, whose colour at `place` is the paper.

    anchor: "ls" when `place` is the left end of the baseline, "ms" for its middle.
    """
    x, baseline = place
    if anchor == "ms":
        x -= length(text, size) / 2
    for font, run in _runs(_one_line(text), size):
        if font.size == size:
            ImageDraw.Draw(image).text((x, baseline), run, ink, font, anchor="ls", embedded_color=True)
        else:
            _draw_strike(image, (round(x), round(baseline)), run, font, size, ink)
        x += font.getlength(run) * size / font.size


def _draw_strike(
    image: Image.Image,
    place: tuple[int, int],
    text: str,
    font: ImageFont.FreeTypeFont,
    size: int,
    ink: str,
) -> None:
    """Write with a font that has one size only, reduced to the size that is wanted."""
    left, top, right, bottom = (math.ceil(edge) for edge in font.getbbox(text, anchor="ls"))
    paper = image.getpixel((min(max(place[0], 0), image.width - 1), min(max(place[1], 0), image.height - 1)))
    large = Image.new("RGB", (right - left, bottom - top), paper)
    ImageDraw.Draw(large).text((-left, -top), text, ink, font, anchor="ls", embedded_color=True)
    scale = size / font.size
    small = large.resize((max(round(large.width * scale), 1), max(round(large.height * scale), 1)))
    image.paste(small, (place[0] + round(left * scale), place[1] + round(top * scale)))


def _one_line(text: str) -> str:
    """Composed letters, single spaces; what cannot be drawn is marked, and what is not seen left out."""

    def seen(letter: str) -> str:
        kind = unicodedata.category(letter)
        if kind in ("Cc", "Cs"):  # control characters, halves of a surrogate pair
            return "\ufffd"
        variation = "\ufe00" <= letter <= "\ufe0f" or "\U000e0100" <= letter <= "\U000e01ef"
        return "" if kind == "Cf" or variation else letter

    return "".join(map(seen, unicodedata.normalize("NFC", " ".join(text.split()))))


def _runs(line: str, size: int) -> list[tuple[ImageFont.FreeTypeFont, str]]:
    """The line in pieces of one font each.

    A space between words of one font belongs to them, since they may run from right to left.
    """
    _find(set(line) - _FOUND.keys())
    files = [_FOUND[letter] for letter in line]
    for i in range(1, len(line) - 1):
        if line[i] == " " and files[i - 1] == files[i + 1]:
            files[i] = files[i - 1]
    pairs = itertools.groupby(zip(files, line, strict=True), key=lambda pair: pair[0])
    return [(_font(file, size), "".join(letter for _, letter in run)) for file, run in pairs]


def _find(letters: set[str]) -> None:
    """Note the font of each letter, in one pass over them."""
    for file in (OWN, *_system_fonts()):
        if not letters:
            return
        try:
            font = _font(file, 20)
            here = {letter for letter in letters if letter == " " or _has(font, letter)}
        except (OSError, ValueError):  # not a font, or a broken one
            continue
        _FOUND.update(dict.fromkeys(here, file))
        letters = letters - here
    _FOUND.update(dict.fromkeys(letters, OWN))


def _has(font: ImageFont.FreeTypeFont, letter: str) -> bool:
    """Whether the font draws something for the letter other than for those it lacks."""
    drawn, lacking = font.getmask(letter), font.getmask(UNASSIGNED)
    return drawn.getbbox() is not None and (drawn.size, bytes(drawn)) != (lacking.size, bytes(lacking))


@functools.lru_cache(maxsize=64)
def _font(file: Path, size: int) -> ImageFont.FreeTypeFont:
    """Raises OSError for a file that is not a font."""
    for pixels in (size, *STRIKES):
        try:
            return ImageFont.truetype(str(file), pixels)
        except OSError as error:
            failed = error
    raise failed


def _folders() -> list[str]:
    """Where this system keeps its fonts."""
    if sys.platform == "win32":
        return [r"%WINDIR%\Fonts", r"%LOCALAPPDATA%\Microsoft\Windows\Fonts"]
    if sys.platform == "darwin":
        return ["/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts"]
    data = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
    return [f"{folder}/fonts" for folder in ("~/.local/share", *data.split(":"))] + ["~/.fonts"]


@functools.cache
def _system_fonts() -> tuple[Path, ...]:
    """All fonts of the system, the usual ones first, then regular ones."""
    files = [
        Path(folder, name)
        for each in _folders()
        for folder, _, names in os.walk(os.path.expandvars(os.path.expanduser(each)))
        for name in names
        if name.lower().endswith((".ttf", ".ttc", ".otf", ".otc"))
    ]

    def place(file: Path) -> tuple[int, bool, str]:
        usual = USUAL.index(file.name) if file.name in USUAL else len(USUAL)
        return usual, "regular" not in file.name.lower(), file.name

    return tuple(sorted(files, key=place))
