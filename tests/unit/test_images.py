"""What the contact sheet and the animation show."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bokehflux.pictures import letters, metadata
from bokehflux.pictures.sheet import Tile, contact_sheet, up_and_down

FONTS = Path(__file__).parents[1] / "data" / "fonts"


def solid(color: str, size: tuple[int, int] = (32, 16)) -> Image.Image:
    return Image.new("RGB", size, color)


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 17])
def test_sheet_shows_every_tile_once(count: int) -> None:
    colors = [(10 * i + 40, 255 - 10 * i, 7) for i in range(count)]
    tiles = [
        Tile(image=Image.new("RGB", (160, 160), color), label=f"bokeh {i}") for i, color in enumerate(colors)
    ]
    sheet = contact_sheet(tiles, "title", "footer")
    pixels = dict((color, n) for n, color in sheet.getcolors(sheet.width * sheet.height))
    assert [pixels[color] for color in colors] == [160 * 160] * count


def test_sheet_labels_are_drawn_and_the_pivot_is_framed() -> None:
    def sheet(label: str, is_pivot: bool = False, title: str = "t") -> Image.Image:
        return contact_sheet(
            [Tile(image=solid("red", (200, 200)), label=label, is_pivot=is_pivot)], title, "f"
        )

    assert sheet("bokeh 4").tobytes() != sheet("bokeh 8").tobytes()
    assert sheet("x", title="one").tobytes() != sheet("x", title="two").tobytes()
    accent = (0xFF, 0xB3, 0x40)
    for is_pivot in (True, False):
        colors = {color for _, color in sheet("x", is_pivot).getcolors(1 << 20)}
        assert (accent in colors) == is_pivot


def test_sheet_never_smooths_upwards_and_bounds_large_pictures() -> None:
    small = Image.new("RGB", (16, 16), "white")
    small.putpixel((3, 3), (1, 2, 3))
    sheet = contact_sheet([Tile(image=small, label="")], "", "")
    exact = {color: n for n, color in sheet.getcolors(1 << 20)}
    assert exact[(1, 2, 3)] == 10 * 10
    wide = contact_sheet([Tile(image=solid("red", (4096, 1024)), label="")] * 2, "", "")
    assert wide.width < 2 * 512 + 100


@pytest.mark.parametrize("title", ["", "x" * 5000, "word " * 900, "line\nbreak", "夜 \U0001f33c"])
def test_any_title_fits(title: str) -> None:
    tile = Tile(image=solid("red"), label="bokeh 0")
    assert contact_sheet([tile], title, title).size == contact_sheet([tile], "short", "short").size


@pytest.mark.parametrize("text", ["a picture of " + "i" * 300, "Ein Käfer – 5 € – auf dem Café-Tisch " * 20])
def test_a_long_title_is_cut_as_late_as_possible(text: str) -> None:
    cut = letters.fit(text, 20, 300)
    kept = len(cut) - 1
    assert cut == text[:kept] + "…"
    assert letters.length(cut, 20) <= 300 < letters.length(text[: kept + 2] + "…", 20)


@given(title=st.text(st.characters(), max_size=60), label=st.text(st.characters(), max_size=12))
@settings(max_examples=60, deadline=None)
def test_any_letters_can_be_drawn(title: str, label: str) -> None:
    """Surrogates, control characters, marks without a letter, scripts that nobody has a font for."""
    tile = Tile(image=solid("red"), label=label)
    assert contact_sheet([tile], title, title).size == contact_sheet([tile], "short", "short").size
    assert up_and_down([tile])[0].size == (160, 80 + 44)


def test_a_grid_has_the_columns_it_was_asked_for() -> None:
    tiles = [Tile(image=solid("red", (160, 160)), label="") for _ in range(12)]
    free, grid = contact_sheet(tiles, "", ""), contact_sheet(tiles, "", "", columns=4)
    assert free.width > grid.width and free.height < grid.height


@pytest.mark.parametrize(("count", "frames"), [(1, 1), (2, 2), (3, 4), (5, 8)])
def test_frames_run_up_and_down_without_a_pause(count: int, frames: int) -> None:
    tiles = [Tile(image=solid("red"), label=f"bokeh {i}") for i in range(count)]
    run = [frame.tobytes() for frame in up_and_down(tiles)]
    assert len(run) == frames and len(set(run)) == count, "labels differ, so frames do"
    assert run[count:] == run[1 : count - 1][::-1], "the way back shows neither end again"


@pytest.fixture
def with_fonts(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes these files the fonts of the system."""

    def install(*files: Path) -> None:
        monkeypatch.setattr(letters, "_system_fonts", lambda: files)
        monkeypatch.setattr(letters, "_FOUND", {})

    return install


def drawn(text: str) -> np.ndarray:
    """The pixels of a line."""
    image = Image.new("RGB", (400, 40), "black")
    letters.draw(image, (10, 30), text, 22, "white")
    return np.asarray(image)


@pytest.mark.parametrize("letter", ["ä", "é", "–", "€", "Ω", "ή", "Ж", "ё", "ẵ", "e\u0301", "½", "\ufffd"])
def test_our_own_font_has_latin_greek_and_cyrillic(letter: str, with_fonts: Callable[..., None]) -> None:
    with_fonts()
    assert drawn(letter).max() == 255 and (drawn(letter) != drawn("\uffff")).any()


def test_each_letter_is_drawn_as_itself(with_fonts: Callable[..., None]) -> None:
    with_fonts()
    alphabet = "äàâéêñøšžőťßþđαβγδλωάέБДЖЛЯЮЎЄҐ–—€£…“”«»"
    assert len({drawn(letter).tobytes() for letter in alphabet}) == len(alphabet)


def test_a_letter_that_no_font_has_is_a_box(with_fonts: Callable[..., None]) -> None:
    with_fonts()
    box = drawn("猫")
    assert box.max() == 255 and (box == drawn("\U00013000")).all(), "seen, and the same for all"
    assert (drawn("a猫b") != drawn("ab")).any()


def test_the_systems_fonts_have_the_rest(with_fonts: Callable[..., None], tmp_path: Path) -> None:
    with_fonts()
    box, latin = drawn("猫"), drawn("a cat")
    broken, text = tmp_path / "broken.ttf", tmp_path / "text.ttf"
    broken.write_bytes((FONTS / "cat.ttf").read_bytes()[:100])
    text.write_text("no font")
    with_fonts(broken, text, tmp_path / "gone.ttf", FONTS / "cat.ttf")
    assert (drawn("猫") != box).any() and drawn("猫").max() == 255
    assert (drawn("a cat") == latin).all()
    assert (drawn("犬") == box).all(), "a glyph that shows nothing is none"
    assert letters.length("猫", 22) == 22 and letters.length("a猫b", 22) > 22 + letters.length("a", 22)


def test_spaces_between_words_of_one_font_belong_to_them(with_fonts: Callable[..., None]) -> None:
    """All others are of our own font: beside another script, at an end, or several in a row."""
    with_fonts(FONTS / "cat.ttf")

    def runs(line: str) -> list[tuple[str, str]]:
        return [(Path(str(font.path)).name, run) for font, run in letters._runs(line, 22)]

    own, cat = letters.OWN.name, "cat.ttf"
    assert runs("a猫 猫 b 猫") == [(own, "a"), (cat, "猫 猫"), (own, " b "), (cat, "猫")]
    assert runs(" 猫 猫 猫 ") == [(own, " "), (cat, "猫 猫 猫"), (own, " ")]
    assert runs("猫  猫") == [(cat, "猫"), (own, "  "), (cat, "猫")]
    assert runs("猫 ") == [(cat, "猫"), (own, " ")] and runs(" ") == [(own, " ")] and runs("") == []


def test_fonts_of_one_size_are_reduced_and_keep_their_colours(with_fonts: Callable[..., None]) -> None:
    with_fonts(FONTS / "emoji.ttf")
    face = drawn("\U0001f600").astype(int)
    yellow = (face[..., 0] > 200) & (face[..., 1] > 130) & (face[..., 2] < 100)
    assert yellow.sum() > 100
    rows, columns = np.nonzero(face.max(-1))
    assert 18 < np.ptp(rows) < 30 and 18 < np.ptp(columns) < 32
    assert 22 < letters.length("\U0001f600", 22) < 30


def test_what_is_not_seen_takes_no_room(with_fonts: Callable[..., None]) -> None:
    with_fonts(FONTS / "emoji.ttf")
    assert (drawn("a\u200db\ufe0fc\u2060") == drawn("abc")).all()
    assert (drawn("\U0001f600\ufe0f") == drawn("\U0001f600")).all()
    assert (drawn(" a \n b\tc ") == drawn("a b c")).all()
    assert (drawn("\ud800\x07") == drawn("\ufffd\ufffd")).all()


def test_fonts_are_looked_for_where_the_system_keeps_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "fonts" / "deep"
    folder.mkdir(parents=True)
    for name in ("Bold.ttf", "Z-Regular.OTF", "DejaVuSans.ttf", "notes.txt"):
        (folder / name).touch()
    monkeypatch.setattr(letters.sys, "platform", "linux")
    monkeypatch.setenv("XDG_DATA_DIRS", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    letters._system_fonts.cache_clear()
    try:
        found = letters._system_fonts()
    finally:
        letters._system_fonts.cache_clear()
    assert [file.name for file in found] == ["DejaVuSans.ttf", "Z-Regular.OTF", "Bold.ttf"]


def test_letters_are_on_sheet_grid_and_animation(with_fonts: Callable[..., None]) -> None:
    """The same picture with and without a font for the letter."""

    def made() -> list[bytes]:
        tiles = [Tile(image=solid("red", (200, 200)), label=f"{letter} 4") for letter in "猫ä"]
        gif = metadata.encode_animation(up_and_down(tiles), {}, "gif")
        with Image.open(io.BytesIO(gif)) as animation:
            frame = animation.convert("RGB").tobytes()
        return [
            contact_sheet(tiles[1:], "猫", "").tobytes(),
            contact_sheet(tiles[1:], "", "猫").tobytes(),
            contact_sheet(tiles, "", "", columns=1).tobytes(),
            frame,
        ]

    with_fonts()
    boxes = made()
    with_fonts(FONTS / "cat.ttf")
    assert all(box != cat for box, cat in zip(boxes, made(), strict=True))


@pytest.mark.parametrize("side", [1, 40, 100, 140, 170, 190, 250])
def test_small_pictures_are_as_large_as_can_be_seen(side: int) -> None:
    """By a whole number of times, so that pixels stay squares: never below the least size of a tile."""
    drawn = np.asarray(contact_sheet([Tile(image=Image.new("RGB", (side, side), "red"), label="a")], "", ""))
    seen = (drawn == (255, 0, 0)).all(-1).sum() ** 0.5
    assert seen >= 160 and seen % side == 0
