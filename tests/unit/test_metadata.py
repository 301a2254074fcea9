"""Recipes inside pictures: every format, every place, the AI mark, and files from strangers."""

from __future__ import annotations

import io
import json
import random
import zlib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from bokehflux.pictures import metadata
from bokehflux.pictures.metadata import NoRecipe, encode, encode_animation, read_recipe, shown

RECIPE: dict[str, Any] = {
    "prompt": 'a "café" 夜\n\U0001f33c </script>', "bokeh_targets": [0.0, 4.2], "bokeh_pivot": None,
    "seed": 65578, "version": "1.2",
}  # fmt: skip
STILLS = list(metadata.FORMATS)


def solid(color: str = "red") -> Image.Image:
    return Image.new("RGB", (32, 16), color)


def encoded(kind: str, recipe: dict[str, Any] = RECIPE) -> bytes:
    if kind == "gif" or kind.startswith("animated-"):
        return encode_animation([solid("red"), solid("blue")], recipe, kind.removeprefix("animated-"))
    return encode(solid(), recipe, kind)


@pytest.mark.parametrize("kind", [*STILLS, "gif", "animated-webp"])
def test_recipe_survives(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a_file_of_another_name.bin"
    path.write_bytes(encoded(kind))
    assert read_recipe(path) == RECIPE


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_lossless_formats_keep_every_pixel(kind: str) -> None:
    noise = Image.frombytes("RGB", (32, 16), random.Random(0).randbytes(32 * 16 * 3))
    with Image.open(io.BytesIO(encode(noise, RECIPE, kind))) as image:
        assert image.convert("RGB").tobytes() == noise.tobytes()


@pytest.mark.parametrize("kind", STILLS)
def test_every_still_says_in_exif_and_xmp_that_a_model_made_it(kind: str) -> None:
    data = encode(solid(), RECIPE, kind)
    with Image.open(io.BytesIO(data)) as image:
        exif = image.getexif()
        assert exif[0x0131] == "bokehflux 1.2 (AI generated)" and "AI-generated" in exif[0x010E]
        comment = exif.get_ifd(0x8769)[0x9286]
        assert json.loads(comment.removeprefix(b"ASCII\0\0\0")) == RECIPE
        packet = ElementTree.fromstring(image.info["xmp"].strip())
    marks = [value for node in packet.iter() for name, value in node.items() if "DigitalSource" in name]
    assert marks == ["http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"]


def test_png_text_is_plain() -> None:
    """Tools without an EXIF reader see it too: uncompressed ASCII in the file."""
    data = encode(solid(), RECIPE)
    assert b"tEXtbokehflux\0" + json.dumps(RECIPE).encode() in data
    assert b"tEXtSoftware\0bokehflux 1.2 (AI generated)" in data


def test_exif_alone_is_enough(tmp_path: Path) -> None:
    """Some sites keep EXIF and drop PNG text."""
    with Image.open(io.BytesIO(encode(solid(), RECIPE))) as image:
        image.save(tmp_path / "x.png", exif=image.getexif(), pnginfo=PngInfo())
    assert b"tEXtbokehflux" not in (tmp_path / "x.png").read_bytes()
    assert read_recipe(tmp_path / "x.png") == RECIPE


@pytest.mark.parametrize("kind", ["tiff", "gif", ""])
def test_unknown_formats(kind: str) -> None:
    with pytest.raises(ValueError, match="unknown picture format"):
        encode(solid(), RECIPE, kind)
    with pytest.raises(ValueError, match="expected frames"):
        encode_animation([], RECIPE, kind or "gif")


def test_a_recipe_too_long_for_jpeg_is_refused_and_fits_elsewhere(tmp_path: Path) -> None:
    recipe = {"prompt": "x" * 70_000}
    with pytest.raises(ValueError, match="too long for a JPEG"):
        encode(solid(), recipe, "jpeg")
    (tmp_path / "x").write_bytes(encode(solid(), recipe, "webp"))
    assert read_recipe(tmp_path / "x") == recipe


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ({"adapter": None, "adapter_hash": "0253"}, "the model's own"),
        ({"adapter": None, "adapter_hash": None}, None),
        ({"adapter": None}, None),
        ({"adapter": "ada", "adapter_hash": "0253"}, "ada"),
    ],
)
def test_an_adapter_that_the_model_brought_is_said(recipe: dict[str, Any], says: str | None) -> None:
    assert shown(recipe) == {**recipe, "adapter": says}
    assert shown(RECIPE) == RECIPE


def test_files_without_a_recipe(tmp_path: Path) -> None:
    solid().save(tmp_path / "plain.png")
    with pytest.raises(NoRecipe, match="holds no bokehflux recipe"):
        read_recipe(tmp_path / "plain.png")
    (tmp_path / "text").write_text("hello")
    for name, says in (("text", "not a picture"), ("absent", "cannot read"), (".", "cannot read")):
        with pytest.raises(NoRecipe, match=says):
            read_recipe(tmp_path / name)


@pytest.mark.parametrize(
    "text", ["{", "[1]", "3", "null", "[" * 100_000, "{" + " " * (1 << 20) + "}", "\xff"]
)
def test_texts_that_are_no_recipe(tmp_path: Path, text: str) -> None:
    info = PngInfo()
    info.add_text("bokehflux", text)
    solid().save(tmp_path / "x.png", pnginfo=info)
    with pytest.raises(NoRecipe):
        read_recipe(tmp_path / "x.png")


def test_a_picture_of_absurd_size_is_not_opened(tmp_path: Path) -> None:
    data = bytearray(encode(solid(), RECIPE))
    data[16:24] = (200_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(data)
    with pytest.raises(NoRecipe, match="decompression bomb"):
        read_recipe(tmp_path / "bomb.png")


@given(kind=st.sampled_from([*STILLS, "gif", "animated-webp"]), data=st.data())
def test_damaged_files_never_crash(tmp_path_factory: pytest.TempPathFactory, kind: str, data: Any) -> None:
    content = bytearray(encoded(kind))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "x"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        assert isinstance(read_recipe(path), dict)
    except NoRecipe:
        pass


@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_animations_are_endless_and_as_slow_as_asked(kind: str) -> None:
    data = encode_animation([solid("red"), solid("blue")], RECIPE, kind, frame_ms=320)
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        assert (image.info["loop"], image.n_frames) == (0, 2)
        image.seek(1)
        image.load()
        assert image.info["duration"] == 320
