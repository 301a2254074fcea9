"""Photographs in bulk: four kinds of places, and what travels with every row."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bokehflux.photos.exif import Exif, photo_level
from bokehflux.photos.readers import PHOTO_ID, Row, Rows, open_rows, read_answers
from tests.unit.test_photos import GREEN, display_p3

STORED = {1: (), 2: (0,), 3: (3,), 4: (1,), 5: (5,), 6: (2,), 7: (6,), 8: (4,)}
"""Orientation -> the turns that make stored pixels of upright ones."""
UPRIGHT_MASK = np.zeros((32, 48), np.float32)
UPRIGHT_MASK[:8, :12] = 1
UPRIGHT_DEPTH = (1 + np.arange(32 * 48).reshape(32, 48) / 1000).astype(np.float32)


def stored(upright: Image.Image, orientation: int) -> Image.Image:
    for method in STORED[orientation]:
        upright = upright.transpose(Image.Transpose(method))
    return upright


def upright_photo() -> Image.Image:
    return Image.fromarray((UPRIGHT_MASK * 255).astype(np.uint8)).convert("RGB")


def jpeg(orientation: int | None = None, image: Image.Image | None = None, **tags: Any) -> bytes:
    """A file with EXIF data; its pixels turned away by the orientation."""
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    exif.get_ifd(0x8769).update({0x829D: 2.8, 0x920A: 50.0, 0xA405: 75, **tags})
    buffer = io.BytesIO()
    image = upright_photo() if image is None else image
    stored(image, orientation or 1).save(buffer, "JPEG", quality=95, exif=exif)
    return buffer.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def png(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def turned_away(values: np.ndarray, orientation: int) -> np.ndarray:
    return np.asarray(stored(Image.fromarray(values), orientation))


def only(place: Path, **how: Any) -> Row:
    rows = open_rows(place, **how)
    assert len(rows) == 1
    return rows[0]


def shard(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


# Orientation


@pytest.mark.parametrize("place", ["folder", "manifest", "tar"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_image_mask_depth_and_level_turn_together(tmp_path: Path, orientation: int, place: str) -> None:
    mask = png((turned_away(UPRIGHT_MASK, orientation) * 255).astype(np.uint8))
    depth = npz(depth=turned_away(UPRIGHT_DEPTH, orientation))
    files = {"a.jpg": jpeg(orientation), "a.mask.png": mask, "a.depth.npz": depth}
    if place == "tar":
        shard(tmp_path / "0.tar", files)
    else:
        for name, data in files.items():
            (tmp_path / name).write_bytes(data)
    where = tmp_path
    if place == "manifest":
        where = tmp_path / "rows.jsonl"
        where.write_text(json.dumps(
            {"input_image_path": "a.jpg", "fg_mask_path": "a.mask.png", "depth_map_path": "a.depth.npz"}
        ))  # fmt: skip
    row = only(where)
    photo = row.photo()
    assert photo.image.size == (48, 32)
    assert np.abs(np.asarray(photo.image)[..., 0] - 255.0 * UPRIGHT_MASK)[:6, :10].max() < 40
    assert np.asarray(photo.image)[10:, 14:].max() < 60
    got_mask, got_depth = row.mask(photo), row.depth_m(photo)
    assert got_mask is not None and got_depth is not None
    np.testing.assert_array_equal(got_mask, UPRIGHT_MASK)
    np.testing.assert_array_equal(got_depth, UPRIGHT_DEPTH)
    assert photo_level(photo.exif, *photo.image.size, 2.0).level == pytest.approx(14.65, abs=0.01)


def test_maps_that_are_upright_already(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(6))
    (tmp_path / "a.depth.npy").write_bytes(b"")
    np.save(tmp_path / "a.depth.npy", UPRIGHT_DEPTH)
    row = only(tmp_path)
    with pytest.raises(
        ValueError, match="depth map of a.jpg has 32 x 48 .* `maps_upright` is false by mistake"
    ):
        row.depth_m(row.photo())
    (tmp_path / "a.json").write_text('{"maps_upright": true}')
    row = only(tmp_path)
    np.testing.assert_array_equal(row.depth_m(row.photo()), UPRIGHT_DEPTH)  # type: ignore[arg-type]


def test_a_picture_that_was_written_again_without_its_exif(tmp_path: Path) -> None:
    """img2dataset with re-encoding: pixels as stored, orientation only in the JSON beside them."""
    bare = io.BytesIO()
    stored(upright_photo(), 6).save(bare, "JPEG", quality=95)
    notes = {"exif": json.dumps({"Image Orientation": "Rotated 90 CW", "EXIF FNumber": "14/5",
                                 "EXIF FocalLength": "50", "EXIF FocalLengthIn35mmFilm": "75"})}  # fmt: skip
    files = {"0.jpg": bare.getvalue(), "0.json": json.dumps(notes).encode()}
    row = only(shard(tmp_path / "00000.tar", files).parent)
    photo = row.photo()
    assert photo.image.size == (48, 32) and photo.exif.f_number == 2.8 and photo.exif.orientation == 6
    assert np.asarray(photo.image)[:6, :10].min() > 200
    kept = {"0.jpg": jpeg(6), "0.json": json.dumps(notes).encode()}  # with --disable_all_reencoding
    photo = only(shard(tmp_path / "00000.tar", kept).parent).photo()
    assert photo.image.size == (48, 32) and np.asarray(photo.image)[:6, :10].min() > 200


def test_the_orientation_of_an_original_turns_nothing_here(tmp_path: Path) -> None:
    """Flickr's copies are upright, and the EXIF data that it tells is the original's."""
    (tmp_path / "a.jpg").write_bytes(jpeg())
    np.save(tmp_path / "a.depth.npy", UPRIGHT_DEPTH)
    answer = [{"tag": "Orientation", "raw": {"_content": "Rotate 90 CW"}}]
    (tmp_path / "a.json").write_text(json.dumps({"flickr_exif": answer}))
    row = only(tmp_path)
    photo = row.photo()
    np.testing.assert_array_equal(row.depth_m(photo), UPRIGHT_DEPTH)  # type: ignore[arg-type]
    assert photo.image.size == (48, 32) and photo.exif.orientation is None


def test_profiles_are_converted_everywhere(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), GREEN).save(buffer, "PNG", icc_profile=display_p3())
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    shard(tmp_path / "tars.tar", {"a.png": buffer.getvalue()}).rename(tmp_path / "x.moved")
    seen = [only(tmp_path).photo().image.getpixel((9, 9))]
    (tmp_path / "in").mkdir()
    (tmp_path / "x.moved").rename(tmp_path / "in" / "x.tar")
    seen.append(only(tmp_path / "in").photo().image.getpixel((9, 9)))
    assert seen[0] == seen[1] != GREEN


# The places


def test_a_folder(tmp_path: Path) -> None:
    for name in ("b/c d.JPG", "a.jpeg", ".hidden/x.jpg", "a.mask.png", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(jpeg())
    (tmp_path / "a.txt").write_text("a cat \n")
    (tmp_path / "a.json").write_text(
        '{"license": "CC0", "source": "https://example.org/a", "focal_length": 85}'
    )
    first, second = list(open_rows(tmp_path))
    assert (first.key, second.key) == ("a.jpeg", "b/c_d.JPG")
    assert first.captions == ("a cat",) and first.licence == "CC0" and first.source == "https://example.org/a"
    assert (
        second.licence is None and second.source == str(tmp_path / "b/c d.JPG") and second.read_mask is None
    )
    exif = first.photo().exif
    assert (exif.focal_mm, exif.f_number) == (85, 2.8), "what stands beside the picture comes first"


def test_a_manifest_of_the_published_kind(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg())
    line = {
        "photo_id": 123, "input_image_path": "a.jpg", "captions": ["one", "two"], "depth_map_path": None,
        "camera_anns": {"dof-cond": 12.3, "N": 1.8, "fmm": 35, "f35mm": 52, "s1": 1.5},
        "suitable_for_synthetic": True, "licence": "PD",
    }  # fmt: skip
    (tmp_path / "rows.jsonl").write_text(
        json.dumps(line) + "\n\nnonsense\n" + json.dumps({"photo_id": 1}) + "\n"
    )
    rows = open_rows(tmp_path / "rows.jsonl")
    assert len(rows) == 3
    row = rows[0]
    assert (row.key, row.photo_id, row.licence, row.captions) == ("rows-0000000", "123", "PD", ("one", "two"))
    assert row.all_in_focus is True and row.exif.subject_distance_m == 1.5
    assert row.photo().exif.f_number == 1.8
    for index in (1, 2):
        with pytest.raises(
            ValueError, match=f"photograph {index + 1}: expected a JSON object with input_image_path"
        ):
            rows[index]


def test_the_published_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow (extra data)")
    from pyarrow import parquet

    answer = {"photo": {"exif": [{"tag": "Model", "raw": {"_content": "EOS 6D"}},
                                 {"tag": "Orientation", "raw": {"_content": "Rotate 90 CW"}}]}}  # fmt: skip
    rows = [{
        "image": {"bytes": jpeg(), "path": f"{n}.jpg"}, "captions": ["x"] * 4, "f_number": 1.8 + n,
        "focal_length": 55.0, "focal_length_35": 82.0, "pseudo_aif": n == 1,
        "flickr_photo_id": 52000000000 + n, "flickr_exif": json.dumps(answer), "flickr_url": f"https://www.flickr.com/photos/p/{n}/",
        "image_license": "CC0 1.0",
    } for n in range(5)]  # fmt: skip
    rows[4]["image"] = None
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet", row_group_size=2)
    found = open_rows(tmp_path / "train.parquet")
    assert [row.key for row in found] == [f"train-000000{n}" for n in range(5)]
    for n in (3, 0, 1):
        row = found[n]
        photo = row.photo()
        assert photo.exif.f_number == pytest.approx(1.8 + n) and photo.exif.model == "EOS 6D"
        assert photo.image.size == (48, 32), "the orientation of the original is not this file's"
        assert row.photo_id == str(52000000000 + n) and row.licence == "CC0 1.0" and len(row.captions) == 4
        assert row.all_in_focus is (n == 1) and row.source.endswith(f"/{n}/")
    with pytest.raises(ValueError, match="no picture, but NoneType"):
        found[4].photo()
    parquet.write_table(pyarrow.Table.from_pylist([{"a": 1}]), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="has no column `image`, but a"):
        open_rows(tmp_path / "other.parquet")


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.parquet").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ValueError, match="pip install pyarrow"):
        open_rows(tmp_path / "x.parquet")


@pytest.mark.parametrize("data", [b"", b"PAR1garbagePAR1", b"not one"])
def test_parquet_that_is_none(tmp_path: Path, data: bytes) -> None:
    pytest.importorskip("pyarrow", reason="needs pyarrow (extra data)")
    (tmp_path / "x.parquet").write_bytes(data)
    with pytest.raises(ValueError, match="x.parquet cannot be read as a parquet file"):
        open_rows(tmp_path / "x.parquet")


@pytest.mark.parametrize("index", ["00000.parquet", "index.parquet"])
def test_tar_shards_with_an_index(tmp_path: Path, index: str) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow (extra data)")
    from pyarrow import parquet

    names = ["000000000", "000000002"]
    shard(tmp_path / "00000.tar", {f"{n}.jpg": jpeg() for n in names} | {"000000000.txt": b"a dog"})
    link = "https://live.staticflickr.com/65535/5300000000{}_ab_b.jpg"
    columns = [
        {"key": f"00000000{n}", "url": link.format(n), "caption": f"no. {n}", "license": "PD"}
        for n in range(3)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(columns), tmp_path / index)
    rows = open_rows(tmp_path)
    assert [row.key for row in rows] == ["00000/000000000", "00000/000000002"], "one was never downloaded"
    assert [row.captions for row in rows] == [("no. 0",), ("no. 2",)]
    assert [row.photo_id for row in rows] == ["53000000000", "53000000002"]
    assert rows[1].licence == "PD" and rows[1].photo().exif.f_number == 2.8


def test_keys_cannot_leave_their_folder(tmp_path: Path) -> None:
    shard(tmp_path / "x.tar", {"../../../evil.jpg": jpeg(), "/abs/a:b.jpg": jpeg()})
    assert [row.key for row in open_rows(tmp_path)] == ["x/evil", "x/abs/a_b"]


def test_names_that_differ_have_keys_that_differ(tmp_path: Path) -> None:
    """Keys name the maps: two photographs of one key would overwrite each other's."""
    for name in ("a b.jpg", "a_b.jpg", "a+b.jpg", "c d.jpg"):
        (tmp_path / name).write_bytes(jpeg())
    keys = {row.source: row.key for row in open_rows(tmp_path)}
    assert keys[str(tmp_path / "a_b.jpg")] == "a_b.jpg" and keys[str(tmp_path / "c d.jpg")] == "c_d.jpg"
    assert len(set(keys.values())) == 4 and all(key.startswith(("a_b.jpg", "c_d")) for key in keys.values())
    shard(tmp_path / "x.tar", {"evil.jpg": jpeg(), "../evil.jpg": jpeg()})
    assert len({row.key for row in open_rows(tmp_path)}) == 2


@pytest.mark.parametrize("told", [
    {"camera_anns": [1]}, {"camera_anns": "N"}, {"captions": 5}, {"depth_map_path": 5}, {"fg_mask_path": [1]},
])  # fmt: skip
def test_what_is_told_in_another_form_is_refused(tmp_path: Path, told: dict[str, Any]) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"input_image_path": "a.jpg", **told}))
    with pytest.raises(ValueError, match=f"{next(iter(told))} must be "):
        open_rows(tmp_path / "rows.jsonl")[0]
    (tmp_path / "a.jpg").write_bytes(jpeg())
    (tmp_path / "a.json").write_text(json.dumps(told))
    if "path" not in next(iter(told)):
        with pytest.raises(ValueError, match=f"a.jpg: {next(iter(told))} must be "):
            open_rows(tmp_path)[0]


def test_places_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no photograph"):
        open_rows(tmp_path)
    with pytest.raises(ValueError, match="x.jsonl is not there"):
        open_rows(tmp_path / "x.jsonl")
    (tmp_path / "x.zip").write_bytes(b"")
    with pytest.raises(ValueError, match="x.zip is none of these"):
        open_rows(tmp_path / "x.zip")
    (tmp_path / "x.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="cannot read .*x.jsonl as a manifest in UTF-8"):
        open_rows(tmp_path / "x.jsonl")
    (tmp_path / "x.tar").write_bytes(b"not a tar file" * 100)
    said = "x.tar cannot be read as a tar file: .*: fetch again what is cut off, or move it"
    with pytest.raises(ValueError, match=said):
        open_rows(tmp_path)


def test_a_photograph_that_is_broken_or_gone(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg()[:300])
    (tmp_path / "rows.jsonl").write_text('{"input_image_path": "gone.jpg"}\n{"input_image_path": "a.jpg"}\n')
    rows = open_rows(tmp_path / "rows.jsonl")
    for row, name in zip(rows, ("gone.jpg", "a.jpg"), strict=True):
        with pytest.raises(ValueError, match=f"cannot read the photograph .*{name}"):
            row.photo()


@pytest.mark.parametrize(("name", "data", "says"), [
    ("a.depth.npz", b"PK not a zip", "cannot read"), ("a.depth.npz", npz(other=UPRIGHT_DEPTH), "cannot read"),
    ("a.depth.npz", npz(depth=np.zeros((2, 3, 4))), "has shape"),
    ("a.depth.png", png(np.zeros((32, 48), np.uint8)), "expected .H, W., floats or uint16"),
])  # fmt: skip
def test_maps_that_are_none(tmp_path: Path, name: str, data: bytes, says: str) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg())
    (tmp_path / name).write_bytes(data)
    row = only(tmp_path)
    with pytest.raises(ValueError, match=says):
        row.depth_m(row.photo())


def test_depth_in_millimetres(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg())
    (tmp_path / "a.depth.png").write_bytes(png((UPRIGHT_DEPTH * 1000).astype(np.uint16)))
    row = only(tmp_path)
    np.testing.assert_allclose(row.depth_m(row.photo()), UPRIGHT_DEPTH, atol=1e-3)  # type: ignore[arg-type]


def test_answers_are_joined_by_photo_id(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    upright_photo().save(buffer, "JPEG")
    (tmp_path / "a.jpg").write_bytes(buffer.getvalue())
    (tmp_path / "rows.jsonl").write_text("".join(
        json.dumps({"input_image_path": "a.jpg", "photo_id": n, **more}) + "\n"
        for n, more in ((1, {}), (2, {}), (3, {"camera_anns": {"N": 8, "fmm": 20}}))
    ))  # fmt: skip
    tags = [{"tag": "FNumber", "raw": "4.0"}, {"tag": "FocalLength", "raw": "50 mm"}]
    lines = [{"photo_id": str(n), "stat": "ok", "flickr_exif": tags} for n in (1, 3)]
    lines.append({"photo_id": "2", "stat": "permission denied", "flickr_exif": None})
    (tmp_path / "exif.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"photo_')
    answers = read_answers(tmp_path / "exif.jsonl")
    rows = open_rows(tmp_path / "rows.jsonl", answers)
    assert [row.photo().exif.f_number for row in rows] == [4, None, 8]
    (tmp_path / "exif.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="exif.jsonl, line 1, is not an answer"):
        read_answers(tmp_path / "exif.jsonl")


@pytest.mark.parametrize(("link", "photo_id"), [
    ("https://live.staticflickr.com/65535/51234567890_0a1b2c_b.jpg", "51234567890"),
    ("https://farm5.staticflickr.com/4321/31234567890_0a1b2c_o.jpg", "31234567890"),
    ("https://www.flickr.com/photos/some_one/41234567890/in/pool", "41234567890"),
    ("https://example.org/photos/1.jpg", None),
])  # fmt: skip
def test_ids_in_links(link: str, photo_id: str | None) -> None:
    found = PHOTO_ID.search(link)
    assert (found and (found[1] or found[2])) == photo_id


def test_rows_by_number() -> None:
    rows = Rows(2, lambda index: Row(key=str(index), source="", licence=None, read_photo=lambda: None))  # type: ignore[arg-type,return-value]
    assert [row.key for row in rows] == ["0", "1"] and rows[1].exif == Exif()
    with pytest.raises(IndexError):
        rows[2]


@pytest.mark.parametrize("source", [
    "https://www.flickr.com/photos/somebody/53000000001/", "https://live.staticflickr.com/65535/53000000001_ab_k.jpg",
    "https://farm66.static.flickr.com/65535/1/53000000001_ab.jpg",
])  # fmt: skip
def test_a_photographs_number_is_in_its_address(source: str, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(None))
    (tmp_path / "a.json").write_text(json.dumps({"source": source}))
    assert open_rows(tmp_path)[0].photo_id == "53000000001"
