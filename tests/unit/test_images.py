"""Files on disk: names, metadata, atomicity, and what the contact sheet shows."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bokehflux import images
from bokehflux.images import Picture, Tile, contact_sheet, distinct, level_stem, read_settings, save_pictures

levels = st.floats(0, 30) | st.sampled_from([0.0, -0.0, 4.2, 4.25, 4.4, 1e-5, 30.0])


def solid(color: str, size: tuple[int, int] = (32, 16)) -> Image.Image:
    return Image.new("RGB", size, color)


def picture(stem: str, color: str = "red", **settings: object) -> Picture:
    return Picture(stem=stem, image=solid(color), settings=settings)


def test_level_stems_are_readable() -> None:
    assert [level_stem(x) for x in (0, 4.2, 4.4, 15, 28.0)] == [
        "bokeh-00.0", "bokeh-04.2", "bokeh-04.4", "bokeh-15.0", "bokeh-28.0",
    ]  # fmt: skip


@given(levels, levels)
def test_level_stems_never_collide(a: float, b: float) -> None:
    assert (level_stem(a) == level_stem(b)) == (a == b)


@given(st.lists(levels, min_size=1, max_size=8))
def test_distinct_stems_are_distinct(asked: list[float]) -> None:
    stems = distinct([level_stem(level) for level in asked])
    assert len(set(stems)) == len(asked)


def test_settings_survive_in_the_file(tmp_path: Path) -> None:
    settings = {
        "prompt": 'a "café" 夜\n\U0001f33c',
        "bokeh_targets": [0.0, 4.2],
        "bokeh_pivot": None,
        "seed": 65578,
    }
    (path,) = save_pictures([picture("one", **settings)], tmp_path)
    assert read_settings(path) == settings
    with Image.open(path) as image:
        assert image.format == "PNG" and "AI generated" in image.info["Software"]
        assert image.convert("RGB").tobytes() == solid("red").tobytes()


def test_other_pictures_have_no_settings(tmp_path: Path) -> None:
    solid("red").save(tmp_path / "x.png")
    with pytest.raises(ValueError, match="holds no bokehflux settings"):
        read_settings(tmp_path / "x.png")


def test_earlier_runs_are_kept_and_a_run_shares_one_suffix(tmp_path: Path) -> None:
    save_pictures([picture("a", "red"), picture("sheet", "red")], tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    # "b" alone would be free; it must still carry the run that its sheet belongs to.
    second = save_pictures([picture("b", "blue"), picture("sheet", "blue")], tmp_path)
    third = save_pictures([picture("a", "green"), picture("sheet", "green")], tmp_path)
    assert [path.name for path in second] == ["b-run2.png", "sheet-run2.png"]
    assert [path.name for path in third] == ["a-run3.png", "sheet-run3.png"]
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failed_write_leaves_only_complete_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    real, calls = images.os.replace, []

    def replace(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == failing + 1:
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(images.os, "replace", replace)
    with pytest.raises(OSError, match="No space"):
        save_pictures([picture("a"), picture("b")], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"][:failing]
    for path in tmp_path.iterdir():
        read_settings(path)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write to output folder"):
        images.check_folder(tmp_path / "file")
    with pytest.raises(ValueError, match="cannot write to output folder"):
        images.check_folder(tmp_path / "file" / "below")
    images.check_folder(tmp_path / "new" / "below")
    assert list((tmp_path / "new" / "below").iterdir()) == []


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


def test_a_long_title_is_cut_as_late_as_possible() -> None:
    font = images.ImageFont.load_default(20)
    text = "a picture of " + "i" * 300
    cut = images._fit(text, font, 300)
    kept = len(cut) - 3
    assert cut == text[:kept] + "..." and font.getlength(cut) <= 300 < font.getlength(
        text[: kept + 1] + "..."
    )
