"""Pictures from strangers: their recipes are looked at, never trusted, never cost more than their file."""

from __future__ import annotations

import io
import json
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bokehflux.app import arguments
from bokehflux.pictures import metadata
from bokehflux.pictures.metadata import NoRecipe, read_recipe
from bokehflux.record import Record
from bokehflux.settings import GenerateSettings
from tests.fuzz.hostile import JSON, assert_one_message, command

FIELDS = list(GenerateSettings.fields())
RECIPE: dict[str, Any] = {
    "prompt": "a cup",
    "bokeh_targets": [0.0, 9.0],
    "bokeh_pivot": 12.0,
    "num_inference_steps": 2,
    "num_grounding_steps": 1,
    "guidance_scale": 3.0,
    "true_cfg": 1.0,
    "negative_prompt": "",
    "height": 32,
    "width": 32,
    "seed": 1,
    "model": "nano",
    "adapter": None,
    "device": "cpu",
    "dtype": "float32",
    "loras": [],
}
CONTROL = st.text(
    st.sampled_from("a\x1b]0;\x07\x9b2J\n\r\t\0\u202e\u2028\U0001f33c\x7f "), min_size=1, max_size=12
)


def picture(folder: Path, recipe: object, name: str = "x.png") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(metadata.encode(Image.new("RGB", (16, 16)), recipe))  # type: ignore[arg-type]
    return folder / name


def png(*chunks: tuple[bytes, bytes], size: tuple[int, int] = (1, 1), rows: bytes | None = None) -> bytes:
    """A PNG of grey pixels with chunks before its data."""
    header = struct.pack(">IIBBBBB", *size, 8, 0, 0, 0, 0)
    data = zlib.compress(b"\0" * (size[1] * (size[0] + 1)) if rows is None else rows)
    every = [(b"IHDR", header), *chunks, (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in every
    )


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@settings(max_examples=80)
@given(st.sampled_from([b"tEXt", b"zTXt", b"iTXt", b"eXIf"]), st.binary(max_size=60), JSON, st.booleans())
def test_any_chunk_holds_a_recipe_or_none(tmp_path_factory, kind, junk, value, named):
    text = json.dumps(value).encode() if named else junk
    prefix = {
        b"tEXt": b"bokehflux\0",
        b"zTXt": b"bokehflux\0\0",
        b"iTXt": b"bokehflux\0\0\0\0\0",
        b"eXIf": b"II*\0\x08\0\0\0",
    }
    body = prefix[kind] + (zlib.compress(text) if kind == b"zTXt" else text)
    path = tmp_path_factory.mktemp("chunk") / "x.png"
    path.write_bytes(png((kind, body)))
    try:
        assert isinstance(read_recipe(path), dict)
    except NoRecipe as error:
        assert str(path) in str(error)


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=80)
@given(st.lists(st.tuples(st.sampled_from([0x8769, 0x9286, 0x10E, 0xA005, 0x8825]), st.integers(0, 13),
                          st.sampled_from([0, 1, 2, 8, 2**31, 2**32 - 1]),
                          st.sampled_from([0, 8, 9, 26, 2**31, 2**32 - 1])), max_size=5))  # fmt: skip
def test_any_exif_directory_is_walked_to_an_end(tmp_path_factory, entries):
    """Offsets that point back, outside, or to a directory of four billion entries."""
    directory = b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries))
    directory += b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    folder = tmp_path_factory.mktemp("exif")
    (folder / "x.png").write_bytes(png((b"eXIf", directory)))
    Image.new("RGB", (8, 8)).save(folder / "x.jpg", exif=b"Exif\0\0" + directory)
    for path in folder.iterdir():
        with pytest.raises(NoRecipe):
            read_recipe(path)


def test_a_recipe_is_read_without_decoding_the_picture(tmp_path, monkeypatch):
    """8192 x 8192 pixels in 60 KB: 64 MB that looking for a recipe must not cost."""
    bomb = png(size=(8192, 8192))
    assert len(bomb) < 100_000
    (tmp_path / "without.png").write_bytes(bomb)
    (tmp_path / "with.png").write_bytes(
        png((b"tEXt", b"bokehflux\0" + json.dumps(RECIPE).encode()), size=(8192, 8192))
    )
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("the picture was decoded"))
    assert read_recipe(tmp_path / "with.png") == RECIPE
    with pytest.raises(NoRecipe):
        read_recipe(tmp_path / "without.png")


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt"])
def test_texts_that_grow_a_thousandfold_are_refused(tmp_path, kind):
    text = zlib.compress(b'{"prompt": "' + b"x" * 30_000_000 + b'"}')
    prefix = b"bokehflux\0\0" if kind == b"zTXt" else b"bokehflux\0\1\0\0\0"
    (tmp_path / "x.png").write_bytes(png((kind, prefix + text)))
    tracemalloc.start()
    try:
        with pytest.raises(NoRecipe):
            read_recipe(tmp_path / "x.png")
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("format", ["TIFF", "BMP", "EPS", "PCX", "PPM", "PDF"])
def test_formats_that_we_do_not_write_are_not_even_opened(tmp_path, monkeypatch, format):
    """EPS is a program that Pillow has another program run; the others are parsers that nobody needs here."""
    path = tmp_path / "x.png"
    Image.new("RGB", (8, 8)).save(path, format)
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a program was run"))
    with pytest.raises(NoRecipe, match="not a picture that can be read"):
        read_recipe(path)


@settings(max_examples=60)
@given(st.dictionaries(CONTROL, CONTROL | JSON, min_size=1, max_size=4))
def test_no_recipe_rules_the_terminal(tmp_path_factory, recipe):
    path = picture(tmp_path_factory.mktemp("info"), recipe)
    code, out, err = command("info", str(path))
    assert code == 0 and err == ""
    lines = out.split("\n")
    assert len(lines) == len(json.loads(json.dumps(recipe))) + 1 and all(line.isprintable() for line in lines)


@settings(max_examples=100)
@given(
    st.dictionaries(
        st.sampled_from([*FIELDS, "model", "adapter", "device", "dtype", "loras", "max_rows"]),
        JSON | CONTROL | st.lists(st.tuples(CONTROL, JSON), max_size=2),
        max_size=3,
    )
)
def test_any_recipe_gives_arguments_or_one_message(tmp_path_factory, changes):
    """--config-from of a stranger's picture: what is taken from it is text and numbers, checked."""
    recipe = json.loads(json.dumps({**RECIPE, **changes}))
    path = picture(tmp_path_factory.mktemp("from"), recipe)
    try:
        args = arguments.parse(["generate", "--config-from", str(path)])
        arguments.loras_from(args)
        asked = arguments.settings_from(args, GenerateSettings)
    except ValueError as error:
        assert str(error)
    else:
        assert asked.prompt == recipe["prompt"] and asked.seed == recipe["seed"]
        # Where to write, and what to show, is never taken from a picture.
        assert args.output == "results" and args.preview is None


@pytest.mark.parametrize("lies", [
    {"seed": 10**400}, {"guidance_scale": 10**400}, {"height": 2**62}, {"num_inference_steps": 10**12},
    {"bokeh_targets": [10**400]}, {"prompt": "\ud800"}, {"bokeh_targets": [0.0] * 2000}, {"dtype": "int8"},
    {"device": "\x1b[2J"}, {"model": "\x1b]0;owned\x07"}, {"model": "x" * 200}, {"loras": [["a", 10**400]]},
    {"adapter": "/dev/zero"}, {"max_rows": 10**400, "model": "absent"},
], ids=str)  # fmt: skip
def test_lies_in_a_recipe_end_in_one_message(tmp_path, monkeypatch, lies):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "none"))
    path = picture(tmp_path, {**RECIPE, "model": "absent", **lies})
    code, _, err = command("generate", "--config-from", str(path))
    assert code == 2
    assert_one_message(err)


def test_a_picture_that_lies_about_being_finished_is_made_again(tmp_path, monkeypatch):
    """A sweep trusts what can be decoded; other formats under our names are not even tried."""
    from bokehflux.app.sweep import finished

    wanted = Record.from_recipe(RECIPE)
    recipe = wanted.of("target", 0.0).recipe()
    with Image.open(io.BytesIO(metadata.encode(Image.new("RGB", (8, 8)), recipe))) as image:
        image.save(tmp_path / "x.tiff", exif=image.getexif())
    (tmp_path / "x.tiff").rename(tmp_path / "bokeh-00.0.png")
    assert finished(tmp_path, wanted) == {}
    data = metadata.encode(Image.new("RGB", (8, 8)), {**recipe, "in_focus": ["far"]})
    (tmp_path / "bokeh-00.0-focus-far.png").write_bytes(data)
    assert finished(tmp_path, wanted) == {}
    monkeypatch.setattr(metadata, "READABLE", (*metadata.READABLE, "TIFF"))
    assert finished(tmp_path, wanted).keys() == {("target", 0.0, None)}, "all else would do"
