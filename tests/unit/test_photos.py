"""Photographs as cameras, phones, scanners and editors write them."""

from __future__ import annotations

import io
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from bokehflux.photos.read import MIN_SIDE_PX, read_photo, upright_rgb

RAMP = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(32, 0)
GREEN = (60, 200, 60)


def display_p3(name: bytes = b"D\0P\0/\x003") -> bytes:
    """The profile of phones: sRGB's, with the primaries of Display P3 and (in UTF-16) another name."""
    icc = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    primaries = {
        b"rXYZ": (0.51512, 0.24120, -0.00105), b"gXYZ": (0.29198, 0.69225, 0.04189),
        b"bXYZ": (0.15710, 0.06657, 0.78407),
    }  # fmt: skip
    for tag, xyz in primaries.items():
        (offset,) = struct.unpack(">I", icc[(at := icc.index(tag, 128)) + 4 : at + 8])
        icc[offset + 8 : offset + 20] = struct.pack(">3i", *(round(v * 65536) for v in xyz))
    return bytes(icc).replace(b"s\0R\0G\0B", name)


def saved(tmp_path: Path, image: Image.Image, name: str, **options: object) -> Image.Image:
    image.save(tmp_path / name, **options)  # type: ignore[arg-type]
    photo = read_photo(tmp_path / name)
    assert photo.image.mode == "RGB" and photo.name == name
    return photo.image


def test_sixteen_bits_keep_their_tones(tmp_path: Path) -> None:
    got = np.asarray(saved(tmp_path, Image.fromarray(RAMP), "scan.png"))[..., 0].astype(int)
    assert np.abs(got - RAMP / 257).max() <= 0.5


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I", "F"])
def test_deep_pictures_handed_over_in_python(mode: str) -> None:
    if mode == "F":
        picture = Image.fromarray((RAMP / 65535).astype(np.float32))
    elif mode == "I":
        picture = Image.fromarray(RAMP.astype(np.int32))
    else:
        picture = Image.frombytes(
            mode, RAMP.shape[::-1], RAMP.astype(">u2" if mode == "I;16B" else "<u2").tobytes()
        )
    assert picture.mode == mode
    got = np.asarray(upright_rgb(picture))[..., 1].astype(float)
    assert np.abs(got - RAMP / 257).max() <= 0.5


@pytest.mark.parametrize("low", [-1.0, 0.0])
def test_floating_point_pictures_outside_their_range_are_refused(low: float) -> None:
    values = np.full((32, 32), 900.0, np.float32)
    values[0, 0] = low
    with pytest.raises(ValueError, match=f"run from {low:g} to 900, expected 0 to 1"):
        upright_rgb(Image.fromarray(values))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_are_white(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 16, 32))
    got = saved(tmp_path, image.convert(mode), "cut.png")
    assert got.getpixel((4, 4)) == (255, 255, 255) and got.getpixel((28, 4)) == (0, 0, 0)


@pytest.mark.parametrize("icc", [display_p3(), display_p3(b"s\0R\0G\0B")], ids=["named", "named sRGB"])
@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
def test_other_primaries_become_srgb(tmp_path: Path, kind: str, icc: bytes) -> None:
    image = Image.new("RGB", (32, 32), GREEN)
    source = ImageCms.ImageCmsProfile(io.BytesIO(icc))
    wanted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert wanted is not None and wanted.getpixel((9, 9)) != GREEN
    got = saved(tmp_path, image, f"phone.{kind}", icc_profile=icc)
    assert max(abs(a - b) for a, b in zip(got.getpixel((9, 9)), wanted.getpixel((9, 9)), strict=True)) < 8


def test_profiles_that_say_nothing_new_or_nonsense(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image = Image.new("RGB", (32, 32), GREEN)
    plain = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert saved(tmp_path, image, "a.png", icc_profile=plain).getpixel((9, 9)) == GREEN
    assert caplog.text == ""
    assert saved(tmp_path, image, "b.png", icc_profile=b"nonsense").getpixel((9, 9)) == GREEN
    assert "taken as sRGB" in caplog.text


@pytest.mark.parametrize("mode", ["CMYK", "L", "1", "P", "YCbCr"])
def test_other_modes(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGB", (32, 32), (200, 200, 200)).convert(mode)
    kind = "jpg" if mode in ("CMYK", "YCbCr") else "png"
    got = saved(tmp_path, image, f"x.{kind}").getpixel((9, 9))
    assert all(abs(value - 200) < 60 for value in got) and len(set(got)) == 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation(tmp_path: Path, orientation: int) -> None:
    upright = Image.new("RGB", (48, 32), "black")
    upright.paste("white", (0, 0, 24, 16))
    undo = {
        1: (), 2: (0,), 3: (3,), 4: (1,), 5: (5,), 6: (2,), 7: (6,), 8: (4,),
    }[orientation]  # fmt: skip
    stored = upright
    for method in undo:
        stored = stored.transpose(Image.Transpose(method))
    exif = Image.Exif()
    exif[0x0112] = orientation
    got = saved(tmp_path, stored, "x.png", exif=exif)
    assert got.size == (48, 32) and got.tobytes() == upright.tobytes()


def test_a_picture_for_two_eyes_shows_its_first(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (32, 32), "white"), Image.new("RGB", (32, 32), "black")
    got = saved(tmp_path, first, "x.jpg", format="MPO", save_all=True, append_images=[second])
    assert got.getpixel((9, 9)) == (255, 255, 255)


@pytest.mark.parametrize(("start", "says"), [
    (b"\0\0\0\x18ftypheic", "HEIC"), (b"\0\0\0\x1cftypavif", "AVIF"), (b"II*\0\x08\0\0\0", "TIFF"),
    (b"MM\0*\0\0\0\x08", "raw file"), (b"FUJIFILMCCD-RAW 0201", "raw file"), (b"8BPS\0\x01", "Photoshop"),
    (b"\0\0\0\x18ftypcrx ", "raw file"), (b"BM\x36", "BMP"),
])  # fmt: skip
def test_formats_that_are_not_read_say_what_to_do(tmp_path: Path, start: bytes, says: str) -> None:
    (tmp_path / "x").write_bytes(start + bytes(64))
    with pytest.raises(ValueError, match=f"cannot read the photograph .*{says}.*: export it as JPEG or PNG"):
        read_photo(tmp_path / "x")


def header_only(width: int, height: int) -> bytes:
    """A PNG whose header claims a size."""
    buffer = io.BytesIO()
    Image.new("L", (16, 16)).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    data[16:24] = struct.pack(">II", width, height)
    import zlib

    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def test_two_hundred_megapixels_are_refused_in_our_words(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(header_only(16320, 12240))
    with pytest.raises(ValueError, match="more than 178 million pixels; scale it down first") as caught:
        read_photo(tmp_path / "x.png")
    assert "attack" not in str(caught.value)


def test_a_hundred_megapixels_are_read_without_a_word(tmp_path: Path) -> None:
    Image.new("L", (10_000, 9_200)).save(tmp_path / "x.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_photo(tmp_path / "x.png").image.size == (10_000, 9_200)


@pytest.mark.parametrize("size", [(4000, 2), (3, 4000), (1, 1)])
def test_strips_are_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size).save(tmp_path / "x.png")
    with pytest.raises(
        ValueError, match=f"{size[0]} x {size[1]} pixels, and each side needs at least {MIN_SIDE_PX}"
    ):
        read_photo(tmp_path / "x.png")


@given(st.sampled_from(["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LA", "HSV", "I", "F", "I;16"]),
       st.integers(16, 40), st.integers(16, 40))  # fmt: skip
def test_any_mode_and_size(mode: str, width: int, height: int) -> None:
    got = upright_rgb(Image.new(mode, (width, height)))
    assert got.mode == "RGB" and got.size == (width, height)
