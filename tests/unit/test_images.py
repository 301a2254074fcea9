"""What the contact sheet and the animation show."""

from __future__ import annotations

import pytest
from PIL import Image

from bokehflux.pictures import sheet as images
from bokehflux.pictures.sheet import Tile, contact_sheet, up_and_down


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


def test_a_long_title_is_cut_as_late_as_possible() -> None:
    font = images.ImageFont.load_default(20)
    text = "a picture of " + "i" * 300
    cut = images._fit(text, font, 300)
    kept = len(cut) - 3
    assert cut == text[:kept] + "..." and font.getlength(cut) <= 300 < font.getlength(
        text[: kept + 1] + "..."
    )


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
