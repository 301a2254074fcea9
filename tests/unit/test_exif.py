"""The level of a photograph from its EXIF data: the recorded table, forms of tags, flags, the command."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bokehflux.app import cli
from bokehflux.lens import unit_level
from bokehflux.photos.exif import Exif, photo_level
from bokehflux.photos.read import read_photo
from tests.helpers import SHARED, needs_shared, shared

ROWS: list[dict[str, Any]] = (
    [] if SHARED is None else json.loads(shared("golden/exif/table.json").read_text())["rows"]
)


def written(
    path: Path, size: tuple[int, int] = (96, 64), orientation: int | None = None, **tags: Any
) -> Path:
    """A photograph with these tags of the Exif block, by their numbers."""
    exif = Image.Exif()
    exif[0x010F], exif[0x0110] = "Maker", "Model 1"
    if orientation is not None:
        exif[0x0112] = orientation
    exif.get_ifd(0x8769).update({int(name[1:], 16): value for name, value in tags.items()})
    Image.new("RGB", size, "gray").save(path, exif=exif)
    return path


F_NUMBER, FOCAL, FOCAL_35, DISTANCE = "x829D", "x920A", "xA405", "x9206"


@needs_shared
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])
@pytest.mark.parametrize("side", [512, 1024])
def test_recorded_rows(row: dict[str, Any], side: int) -> None:
    if row.get("file") is None:
        exif = Exif.from_tags(
            {name: row[name] for name in ("FNumber", "FocalLength", "FocalLengthIn35mmFilm")}
        )
        size = tuple(row["upright_size"])
    else:
        photo = read_photo(shared(f"golden/exif/{row['file']}"))
        exif, size = photo.exif, photo.image.size
        assert exif.orientation == row["orientation"]
    assert list(size) == row["upright_size"]
    got = photo_level(exif, *size, focus_m=row["focus_distance_m"], short_side_px=side)
    flags = {flag for flag in row["flags"] if not flag.startswith("clipped") or flag.endswith(f"_{side}")}
    assert set(got.flags) == flags
    assert got.focal_length_35_from == row["focal_length_35_from"]
    if row["K_px_m"] is None:
        assert got.K_px_m is None and got.level is None
        return
    near = lambda value: pytest.approx(value, rel=1e-6)  # noqa: E731
    assert got.f_number == near(row["f_number"]) and got.focal_length_mm == near(row["focal_length_mm"])
    assert got.focal_length_35_mm == near(row["focal_length_35_mm"])
    assert got.sensor_width_mm == near(row["sensor_width_mm"]) and got.px_per_mm == near(row["px_per_mm"])
    assert got.K_px_m == near(row["K_px_m"])
    assert got.K_px_m_short_side == near(row[f"K_px_m_crop_{side}"])
    assert got.level == near(row[f"level_crop_{side}"])
    assert unit_level(got.level) == near(row[f"model_input_crop_{side}"])
    change = "K_change_if_focus_distance_20_percent_longer"
    assert getattr(got, change) == pytest.approx(row[change], abs=1e-9)


@needs_shared
@pytest.mark.parametrize("row", [row for row in ROWS if row.get("file")], ids=lambda row: row["name"])
def test_recorded_files_stand_upright(row: dict[str, Any]) -> None:
    image = read_photo(shared(f"golden/exif/{row['file']}")).image
    corners = {"top_left": (4, 4), "top_right": (-5, 4), "bottom_left": (4, -5), "bottom_right": (-5, -5)}
    wanted = json.loads(shared("golden/exif/table.json").read_text())["corners_upright_rgb"]
    for name, (x, y) in corners.items():
        got = image.getpixel((x % image.width, y % image.height))
        assert max(abs(a - b) for a, b in zip(got, wanted[name], strict=True)) < 40, name


@needs_shared
def test_the_files_own_distance_is_taken() -> None:
    (row,) = (row for row in ROWS if row["name"] == "14_pillow_writer")
    photo = read_photo(shared(f"golden/exif/{row['file']}"))
    got = photo_level(photo.exif, *photo.image.size)
    assert got.focus_distance_from == "exif" and got.K_px_m == pytest.approx(row["K_px_m"], rel=1e-6)


@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
def test_the_level_is_the_same_whichever_way_the_camera_was_held(
    tmp_path: Path, orientation: int | None
) -> None:
    tags = {F_NUMBER: 2.8, FOCAL: 50.0, FOCAL_35: 75, DISTANCE: 2.0}
    photo = read_photo(written(tmp_path / "x.jpg", orientation=orientation, **tags))
    assert photo.image.size == ((64, 96) if (orientation or 1) > 4 else (96, 64))
    assert photo_level(photo.exif, *photo.image.size).level == pytest.approx(14.65, abs=0.01)


@pytest.mark.parametrize(("text", "number"), [
    ("14/5", 2.8), ("f/2.8", 2.8), ("2.8", 2.8), ("50.0 mm", 50), ((28, 10), 2.8),
    (Fraction(14, 5), 2.8), (2, 2), ("", None), ("0", None), ((0, 0), None), (math.nan, None), ("0/0", None),
    (-3, None), ("n/a", None), (None, None), (math.inf, None), ({}, None), ("1/0", None),
    ("-3", None), (" -14/5", None), ("2.8e+00", 2.8), ("1e-05", 1e-5),
])  # fmt: skip
def test_forms_of_numbers(text: Any, number: float | None) -> None:
    assert Exif.from_tags({"FNumber": text}).f_number == (None if number is None else pytest.approx(number))


@pytest.mark.parametrize(("word", "metres"), [
    ("1.5 m", 1.5), ("Infinity", math.inf), ("undefined", None), (0, None), ("3/2", 1.5),
])  # fmt: skip
def test_distances(word: Any, metres: float | None) -> None:
    exif = Exif.from_tags({"SubjectDistance": word, "FocalLength": 50, "FNumber": 2})
    assert exif.subject_distance_m == metres
    got = photo_level(exif, 96, 64)
    assert (got.focus_distance_m, got.focus_distance_from) == (
        (2.5, "assumed") if metres is None else (metres, "exif")
    )
    assert got.K_px_m is not None and math.isfinite(got.K_px_m)


@pytest.mark.parametrize(("words", "orientation"), [
    ("Horizontal (normal)", 1), ("Mirrored horizontal", 2), ("Rotated 180", 3), ("Mirrored vertical", 4),
    ("Mirrored horizontal then rotated 90 CCW", 5), ("Rotated 90 CW", 6),
    ("Mirrored horizontal then rotated 90 CW", 7), ("Rotated 90 CCW", 8),
    ("Mirror horizontal and rotate 270 CW", 5), ("Rotate 270 CW", 8), ("6", 6), (3, 3),
    (0, None), (9, None), ("", None), ("upside down", None),
])  # fmt: skip
def test_orientations_in_words(words: str | int, orientation: int | None) -> None:
    """The first eight are exifread's words, the next two ExifTool's."""
    assert Exif.from_tags({"Image Orientation": words}).orientation == orientation


def test_forms_of_tags() -> None:
    wanted = Exif(make="Canon", model="EOS", focal_mm=50, f_number=1.8, focal_35mm=80, subject_distance_m=2)
    plain = {"Make": "Canon", "Model": "EOS", "FocalLength": "50.0 mm", "FNumber": "1.8",
             "FocalLengthIn35mmFormat": "80 mm", "SubjectDistance": "2 m"}  # fmt: skip
    grouped = {"Image Make": "Canon", "Image Model": "EOS", "EXIF FocalLength": "50", "EXIF FNumber": "9/5",
               "EXIF FocalLengthIn35mmFilm": "80", "EXIF SubjectDistance": "2"}  # fmt: skip
    listed = [{"tag": name, "label": name, "raw": {"_content": value}} for name, value in plain.items()]
    answer = {"photo": {"id": "1", "exif": listed}, "stat": "ok"}
    for given_tags in (plain, grouped, listed, answer, json.dumps(answer), json.dumps(grouped)):
        assert Exif.from_tags(given_tags) == wanted
    for empty in (None, "", "{}", "null", [], {}, {"photo": {}, "stat": "fail"}, 7):
        assert Exif.from_tags(empty) == Exif()
    with pytest.raises(ValueError, match="not JSON: '{'"):
        Exif.from_tags("{")


json_like = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
names = st.sampled_from(
    ["FNumber", "FocalLength", "FocalLengthIn35mmFilm", "SubjectDistance", "Orientation", "Make", "photo",
     "exif", "FocalPlaneXResolution", "FocalPlaneResolutionUnit", "PixelXDimension", "PixelYDimension", "tag"]
)  # fmt: skip


@given(st.dictionaries(names, json_like) | json_like)
def test_whatever_strangers_wrote_gives_a_level_or_none(tags: Any) -> None:
    if isinstance(tags, str):
        return
    got = photo_level(Exif.from_tags(tags), 96, 64)
    assert got.level is None or 0 <= got.level <= 30


def test_the_focal_plane_stands_in_for_a_missing_or_idle_equivalent() -> None:
    """A Canon APS-C body: 5184 x 3456 pixels at 5728.18 per inch, so 22.99 mm wide."""
    plane = {"FocalPlaneXResolution": "5728.176796", "FocalPlaneResolutionUnit": "inches",
             "ExifImageWidth": "5184", "ExifImageHeight": "3456"}  # fmt: skip
    lens = {"FNumber": 2.8, "FocalLength": 50}
    for more in ({}, {"FocalLengthIn35mmFilm": 50}):
        got = photo_level(Exif.from_tags({**lens, **plane, **more}), 1024, 683)
        assert got.sensor_width_mm == pytest.approx(22.99, abs=0.02)
        assert got.focal_length_35_from == "computed from the resolution of the focal plane"
        assert "f35_equals_focal_length" not in got.flags
    other = photo_level(Exif.from_tags({**lens, **plane, "FocalLengthIn35mmFilm": 75}), 1024, 683)
    assert other.focal_length_35_from == "exif" and other.focal_length_35_mm == 75


def test_a_distance_within_the_lens_is_not_believed() -> None:
    got = photo_level(Exif(focal_mm=100, f_number=2, focal_35mm=150, subject_distance_m=0.09), 96, 64)
    assert (got.focus_distance_m, got.focus_distance_from) == (5.0, "assumed")
    with pytest.raises(ValueError, match="beyond the focal length"):
        photo_level(Exif(focal_mm=100, f_number=2, focal_35mm=150), 96, 64, focus_m=0.1)


def test_broken_exif_counts_as_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for cut in range(8, 80, 3):
        exif = Image.Exif()
        exif.get_ifd(0x8769)[0x829D] = 2.8
        Image.new("RGB", (96, 64)).save(tmp_path / "x.png", exif=exif.tobytes()[:cut])
        photo = read_photo(tmp_path / "x.png")
        assert photo.exif.f_number in (None, 2.8)


# The command


def test_exif_command_explains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "x.jpg", **{F_NUMBER: 2.8, FOCAL: 100.0, FOCAL_35: 100})
    assert cli.main(["exif", str(path), "--focus-distance", "0.4"]) == 0
    said = capsys.readouterr().out
    for part in ("camera: Maker Model 1", "f-number: 2.8", "focus distance: 0.4 m (given)", "level: 30.0",
                 "only repeats the focal length", "close-up", "lies above 30", "px per mm"):  # fmt: skip
        assert part in said
    assert cli.main(["exif", str(path)]) == 0
    assert "focus distance: 5 m (assumed)" in capsys.readouterr().out


def test_exif_command_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "x.jpg", **{F_NUMBER: 4.0, FOCAL: 50.0, FOCAL_35: 75, DISTANCE: 4294967295})
    assert cli.main(["exif", str(path), "--json", "--short-side", "1024"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["photo"] == str(path) and facts["short_side_px"] == 1024 and facts["flags"] == []
    assert facts["level"] == pytest.approx(facts["K_px_m"] * 1024 / 64)


def test_exif_command_without_exif(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "x.png")
    assert cli.main(["exif", str(tmp_path / "x.png")]) == 0
    assert "level: none" in (said := capsys.readouterr().out)
    assert "lacks a focal length and an f-number" in said


@pytest.mark.parametrize(("flags", "says"), [
    (("--focus-distance", "0"), "must be above 0 metres"), (("--short-side", "0"), "at least 1 pixel"),
    (("--focus-distance", "0.05"), "beyond the focal length"),
])  # fmt: skip
def test_exif_command_refuses(
    tmp_path: Path, flags: Any, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "x.jpg", **{F_NUMBER: 2.8, FOCAL: 100.0})
    assert cli.main(["exif", str(path), *flags]) == 2
    assert says in capsys.readouterr().err


def test_refocus_takes_the_photographs_own_level(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "x.jpg", **{F_NUMBER: 2.8, FOCAL: 50.0, FOCAL_35: 75, DISTANCE: 2.0})
    asked: list[float] = []

    def plan(pipe: Any, image: Any, settings: Any) -> None:
        asked.append(settings.bokeh_pivot)
        raise ValueError("enough")

    monkeypatch.setattr("bokehflux.pipeline.refocus.plan_refocus", plan)
    words = ["refocus", str(path), "--prompt", "a mug", "--output", str(tmp_path / "out")]
    assert cli.main([*words, "--photo-level", "auto"]) == 2
    assert asked == [pytest.approx(14.65, abs=0.01)]
    assert "--photo-level 14.7, from the EXIF data of x.jpg\n" in capsys.readouterr().err
    assert cli.main([*words, "--photo-level", "7"]) == 2 and asked[-1] == 7
    capsys.readouterr()
    bare = written(tmp_path / "y.jpg")
    assert cli.main(["refocus", str(bare), "--prompt", "a mug", "--photo-level", "auto"]) == 2
    assert "y.jpg does not tell its level (the EXIF lacks" in capsys.readouterr().err


@pytest.mark.parametrize("told", ["Canon", "Canon\0", " Canon\0 \0\0", "\0Canon "])
def test_names_end_where_cameras_fill_them_up(told: str) -> None:
    assert Exif.from_tags({"Make": told, "Model": "\0\0 "}).make == "Canon"
    assert Exif.from_tags({"Make": told, "Model": "\0\0 "}).model is None
