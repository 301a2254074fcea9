"""Labels of many photographs: what they say, what is kept, what is left out, and the command."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bokehflux.app import cli
from bokehflux.lens import Blur
from bokehflux.photos.annotate import open_depth
from bokehflux.photos.labels import Labeller, blur_of, expected_bytes, labelled, level_seen, read_labels
from bokehflux.photos.readers import open_rows
from tests.unit.test_annotate import save
from tests.unit.test_photo_focus import BACKGROUND_M, SUBJECT_M, motorcycle, scene
from tests.unit.test_readers import jpeg, npz, stored

SIZE = (192, 128)


class Eye:
    """In place of networks: knows the scene of `test_photo_focus`, and counts how often it is asked."""

    ran_by = "a test"

    def __init__(self, name: str = "eye") -> None:
        self.about = {"name": name}
        self.seen: list[tuple[int, int]] = []
        self.focal_px: list[float | None] = []

    def depth_m(self, image: Image.Image, focal_px: float | None) -> np.ndarray:
        self.seen.append(image.size)
        self.focal_px.append(focal_px)
        return np.asarray(Image.fromarray(scene("subject")[1]).resize(image.size, Image.Resampling.NEAREST))

    def mask(self, image: Image.Image) -> np.ndarray:
        return np.asarray(Image.fromarray(scene("subject")[2]).resize(image.size, Image.Resampling.NEAREST))


def photographs(folder: Path, **named: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    for name, data in named.items():
        (folder / f"{name}.jpg").write_bytes(data)
    return folder


def sharp(subject: str = "subject", **tags: Any) -> bytes:
    return jpeg(None, scene(subject)[0], **tags)


def label_all(place: Path, output: Path, eye: Eye | None = None, **how: Any) -> dict[str, dict[str, Any]]:
    output.mkdir(exist_ok=True)
    shard = how.pop("shard", (1, 1))
    Labeller(output=output, depth=eye, mask=eye, **how).run(open_rows(place), shard)
    return read_labels(output)


def left_out(output: Path, name: str = "left-out.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / name).read_text().splitlines()]


def test_a_label(tmp_path: Path) -> None:
    place = photographs(tmp_path / "in", a=sharp())
    (place / "a.json").write_text(
        '{"license": "CC0", "source": "https://example.org/1", "captions": ["a square"]}'
    )
    (label,) = label_all(place, tmp_path / "out", Eye()).values()
    assert (label["key"], label["licence"], label["source"]) == ("a.jpg", "CC0", "https://example.org/1")
    assert label["captions"] == ["a square"] and label["maps"] == "maps/a.jpg.npz"
    assert label["focus_distance_m"] == pytest.approx(SUBJECT_M, rel=1e-3)
    assert label["focus_distance_from"] == "mask+sharpest" and label["flags"] == []
    # By hand: 50 mm f/2.8 on 28.8 mm of diagonal, 192 x 128 px, focus at 2 m, on a short side of 512.
    k_px_m = 0.05**2 * 2 / (2 * 2.8 * 1.95) * 1000 * np.hypot(192, 128) / (43.27 / 1.5) * 512 / 128
    assert label["K_px_m_short_side"] == pytest.approx(k_px_m, rel=1e-3)
    assert label["range_px"] == pytest.approx(k_px_m * (1 / SUBJECT_M - 1 / BACKGROUND_M), rel=2e-3)
    assert label["largest_radius_px"] == pytest.approx(label["range_px"])
    assert level_seen(label, "raw") == pytest.approx(k_px_m, rel=1e-3)
    assert level_seen(label, "range") == pytest.approx(0.4 * k_px_m, rel=2e-3)
    with np.load(tmp_path / "out" / label["maps"]) as maps:
        assert maps["depth"].dtype == np.float16 and maps["mask"].dtype == np.uint8
        about = json.loads(str(maps["about"]))
    assert (
        about["depth"] == {"name": "eye"}
        and about["photo"] == label["photo"]
        and about["ran_by"]["mask"] == "a test"
    )


def test_the_two_meanings() -> None:
    """A subject at 2.5 m before the horizon: the radii of one number differ 2.5-fold; unified they agree."""
    blur = Blur(k_px_m=20, focus_m=2.5, nearest_m=2.5, farthest_m=float("inf"))
    assert blur.largest_radius_px == pytest.approx(8) and blur.range_px == pytest.approx(8)
    assert 20 / blur.range_px == pytest.approx(2.5)
    assert (blur.level("raw"), blur.level("range")) == (20, pytest.approx(8))
    middle = Blur(k_px_m=60, focus_m=2, nearest_m=1, farthest_m=4)
    assert middle.range_px == pytest.approx(45) and middle.largest_radius_px == pytest.approx(30)
    assert middle.level("raw") == middle.level("range") == 30, "clipped"
    assert Blur(k_px_m=20, focus_m=2, nearest_m=1, farthest_m=4).level("range") == pytest.approx(15)
    with pytest.raises(ValueError, match="unify must be one of raw, range, got 'both'"):
        blur.level("both")  # type: ignore[arg-type]


def test_without_depth_only_the_published_meaning_is_left(tmp_path: Path) -> None:
    place = photographs(tmp_path / "in", a=sharp())
    (label,) = label_all(place, tmp_path / "out").values()
    assert label["maps"] is None and blur_of(label) is None and label["range_px"] is None
    assert label["focus_distance_from"] == "assumed"
    assert level_seen(label, "raw") == pytest.approx(label["K_px_m_short_side"])
    assert level_seen(label, "range") is None


def test_what_is_there_is_kept(tmp_path: Path) -> None:
    place, out, eye = photographs(tmp_path / "in", a=sharp(), b=sharp()), tmp_path / "out", Eye()
    first = label_all(place, out, eye)
    assert len(eye.seen) == 2
    assert label_all(place, out, eye) == first and len(eye.seen) == 2
    label_all(place, out, eye, focus_source="sharpest")
    assert len(eye.seen) == 2, "another focus needs no new maps"
    (place / "b.jpg").write_bytes(sharp("wall"))
    label_all(place, out, eye, focus_source="sharpest")
    assert len(eye.seen) == 3, "another photograph of that name does"
    (out / "maps" / "a.jpg.npz").write_bytes(b"PK half a file")
    label_all(place, out, eye)
    assert len(eye.seen) == 4
    label_all(place, out, Eye("another"))
    label_all(place, out, eye)
    assert len(eye.seen) == 6, "another network's maps are not taken for this one's"
    label_all(place, out, eye, long_side_px=96)
    assert eye.seen[-1] == (96, 64)


def test_nobody_is_lost(tmp_path: Path) -> None:
    place = photographs(tmp_path / "in", a=sharp(), b=b"not a picture", c=sharp("wall"), d=sharp())
    (place / "d.depth.npz").write_bytes(npz(depth=np.ones((7, 5), np.float32)))
    out = tmp_path / "out"
    out.mkdir()
    counts = Labeller(output=out, depth=Eye(), mask=Eye()).run(open_rows(place))
    assert list(read_labels(out)) == ["a.jpg"]
    reasons = {line["key"]: line["reason"] for line in left_out(out)}
    assert reasons.keys() == {"b.jpg", "c.jpg", "d.jpg"} and "cannot identify" in reasons["b.jpg"]
    assert "the mask is not where the photograph is sharp" == reasons["c.jpg"]
    assert counts["labelled"] == 1 and counts["left out: cannot be read"] == 2
    assert counts["left out: the mask is not where the photograph is sharp"] == 1
    (place / "rows.jsonl").write_text('{"input_image_path": "a.jpg"}\nnonsense\n')
    label_all(place / "rows.jsonl", tmp_path / "two", Eye())
    assert [line["row"] for line in left_out(tmp_path / "two")] == [1]


def test_a_network_that_needs_a_focal_length_is_counted_by_that(tmp_path: Path) -> None:
    """Not as a file that cannot be read."""
    buffer = io.BytesIO()
    scene("subject")[0].save(buffer, "JPEG", quality=95)
    place = photographs(tmp_path / "in", a=buffer.getvalue())
    network = save(tmp_path / "d.onnx", 32, {"depth": ("Exp", [1, 1, 32, 32])})
    (tmp_path / "d.json").write_text('{"gives": "canonical metres"}')
    out = tmp_path / "out"
    out.mkdir()
    depth = open_depth(network, str(tmp_path / "d.json"), "cpu")
    counts = Labeller(output=out, depth=depth).run(open_rows(place))
    reason = "this network needs the focal length, and the EXIF does not tell it"
    assert counts == {f"left out: {reason}": 1}


def test_a_mask_that_holds_no_number_is_no_mask(tmp_path: Path) -> None:
    class Blind(Eye):
        def mask(self, image: Image.Image) -> np.ndarray:
            return np.full_like(super().mask(image), np.nan)

    place = photographs(tmp_path / "in", a=sharp())
    (tmp_path / "out").mkdir()
    counts = Labeller(output=tmp_path / "out", depth=Eye(), mask=Blind()).run(open_rows(place))
    assert counts == {"left out: the mask holds what is not a number": 1}


def test_shards_share_a_folder(tmp_path: Path) -> None:
    place, out = photographs(tmp_path / "in", **{name: sharp() for name in "abcde"}), tmp_path / "out"
    eyes = [Eye() for _ in range(3)]
    for part, eye in enumerate(eyes, 1):
        label_all(place, out, eye, shard=(part, 3))
    assert [len(eye.seen) for eye in eyes] == [1, 2, 2]
    assert sorted(path.name for path in out.glob("labels*")) == [f"labels-{n}of3.jsonl" for n in (1, 2, 3)]
    together = read_labels(out)
    assert sorted(together) == [f"{name}.jpg" for name in "abcde"]
    assert label_all(place, tmp_path / "alone", Eye()) == together
    with pytest.raises(ValueError, match=r"two labels for a.jpg: delete earlier labels\*.jsonl"):
        label_all(place, out, Eye())
    with pytest.raises(ValueError, match="holds no labels"):
        read_labels(place)


def test_rows_that_bring_their_own_maps(tmp_path: Path) -> None:
    """Turned with the photograph, and before what a network would say."""
    image, depth, mask = scene("subject")
    place, eye = photographs(tmp_path / "in", a=jpeg(6, image)), Eye()
    (place / "a.depth.npz").write_bytes(npz(depth=np.asarray(stored(Image.fromarray(depth * 2), 6))))
    out = tmp_path / "out"
    (label,) = label_all(place, out, eye).values()
    assert not eye.seen and label["focus_distance_m"] == pytest.approx(2 * SUBJECT_M, rel=1e-3)
    assert label["width_px"] == 192, "upright"
    (place / "a.depth.npz").write_bytes(npz(depth=np.asarray(stored(Image.fromarray(depth * 3), 6))))
    (label,) = label_all(place, out, eye).values()
    assert label["focus_distance_m"] == pytest.approx(3 * SUBJECT_M, rel=1e-3), "not an older copy"
    ((row, again),) = labelled(open_rows(place), out)
    photo = row.photo()
    got_depth, got_mask = row.depth_m(photo), row.mask(photo)
    assert again == label and got_depth is not None and got_mask is not None
    np.testing.assert_allclose(got_depth, 3 * depth, rtol=1e-3)
    np.testing.assert_array_equal(got_mask, mask)


def test_all_in_focus_photographs_keep_their_mask(tmp_path: Path) -> None:
    place = photographs(tmp_path / "in", a=sharp("wall"))
    (place / "a.json").write_text('{"pseudo_aif": true}')
    (label,) = label_all(place, tmp_path / "out", Eye()).values()
    assert label["focus_distance_m"] == pytest.approx(SUBJECT_M, rel=1e-3)
    assert label["focus_distance_from"] == "mask" and label["all_in_focus"] is True


def test_the_focal_length_reaches_the_depth_network(tmp_path: Path) -> None:
    """In pixels of the scaled picture; a 35 mm equivalent that is only assumed is not passed on."""
    place = photographs(tmp_path / "in", a=sharp(), b=sharp(**{}))
    bare = Image.Exif()
    bare.get_ifd(0x8769).update({0x829D: 2.8, 0x920A: 50.0})
    scene("subject")[0].save(place / "b.jpg", exif=bare)
    eye = Eye()
    label_all(place, tmp_path / "out", eye, long_side_px=96)
    assert eye.focal_px == [pytest.approx(75 / 43.27 * np.hypot(96, 64)), None]


def test_the_sky_is_far_but_not_unknown(tmp_path: Path) -> None:
    place = photographs(tmp_path / "in", a=sharp())
    _, depth, mask = scene("subject")
    (place / "a.depth.npz").write_bytes(npz(depth=np.where(depth > 5, np.inf, depth).astype(np.float32)))
    (place / "a.mask.npz").write_bytes(npz(mask=mask))
    (label,) = label_all(place, tmp_path / "out").values()
    assert label["farthest_m"] == 10_000
    blur = blur_of(label)
    assert blur is not None and blur.range_px == pytest.approx(blur.k_px_m / SUBJECT_M, rel=1e-3)
    far = {"FNumber": 2, "FocalLength": 50, "SubjectDistance": "Infinity"}
    (place / "a.json").write_text(json.dumps({"exif": far}))
    (place / "a.depth.npz").unlink()
    (label,) = label_all(place, tmp_path / "out", focus_source="mask").values()
    assert label["focus_distance_m"] == "infinity" and label["focus_distance_from"] == "exif"
    assert blur_of({**label, "nearest_m": 2.0, "farthest_m": 9.0}).largest_radius_px == pytest.approx(  # type: ignore[union-attr]
        label["K_px_m_short_side"] / 2
    )


# The command


def test_annotate_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = photographs(tmp_path / "in", a=sharp(), b=b"nothing")
    answers = {"photo_id": "1", "stat": "ok", "flickr_exif": {"FNumber": "1.4"}}
    (tmp_path / "exif.jsonl").write_text(json.dumps(answers) + "\n")
    recipe = {"gives": "metres"}
    (tmp_path / "depth.json").write_text(json.dumps(recipe))
    depth = save(tmp_path / "depth.onnx", 32, {"metres": ("Exp", [1, 1, 32, 32])})
    mask = save(tmp_path / "mask.onnx", 32, {"mask": ("Abs", [1, 1, 32, 32])})
    out = tmp_path / "labels"
    words = ["annotate", str(place), "--output", str(out), "--depth", str(depth), "--mask", str(mask),
             "--depth-kind", str(tmp_path / "depth.json"), "--mask-kind", "isnet", "--focus-source",
             "sharpest", "--exif", str(tmp_path / "exif.jsonl"), "--long-side", "96"]  # fmt: skip
    assert cli.main(words) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{out / 'labels.jsonl'}\n"
    assert "photographs: 2; depth and masks take up to 2.46e-05 GB in" in printed.err
    assert "labelled: 1" in printed.err and "left out: cannot be read: 1" in printed.err
    (label,) = read_labels(out).values()
    assert label["maps"] and label["focus_distance_from"] == "sharpest"
    assert cli.main([*words, "--shard", "2/2"]) == 0
    assert capsys.readouterr().out == f"{out / 'labels-2of2.jsonl'}\n"


def test_a_shard_needs_room_for_its_share_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place, free = photographs(tmp_path / "in", a=sharp(), b=sharp()), expected_bytes(2, 96) // 2
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    words = ["annotate", str(place), "--output", str(tmp_path / "labels"), "--long-side", "96"]
    assert cli.main([*words, "--shard", "1/2"]) == 0
    assert cli.main(words) == 2
    assert "make room" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "says"), [
    (["nowhere"], "nowhere is not there"), (["in", "--long-side", "10"], "at least 64 pixels"),
    (["in", "--depth", "x", "--depth-kind", "zoe"], "expected one of depth-pro, moge-2, da3metric"),
    (["in", "--exif", "gone.jsonl"], "cannot read answers from gone.jsonl"),
    (["in", "--long-side", "10000000"], "make room"),
    (["in", "--depth-kind", "moge-2"], "--depth-kind needs --depth PATH"),
    (["in", "--mask-kind", "isnet", "--depth", "x"], "--mask-kind needs --mask PATH"),
])  # fmt: skip
def test_annotate_refuses(
    tmp_path: Path, words: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    photographs(tmp_path / "in", a=sharp())
    monkeypatch.chdir(tmp_path)
    assert cli.main(["annotate", *words]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("line", ['{"key": 3', "[]", "3", '{"source": "x"}', "[" * 100_000])
def test_a_line_that_is_no_label_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "labels.jsonl").write_text('{"key": "a\u2028"}\n' + line)
    with pytest.raises(ValueError, match="labels.jsonl, line 2: not a label"):
        read_labels(tmp_path)


HELD_UP = """
import signal, sys, time
from bokehflux.app import cli
from bokehflux.photos.labels import Labeller

label, seen = Labeller.label, []

def held_up(self, row):
    seen.append(row)
    if len(seen) == 4:
        print("three are done", flush=True)
        time.sleep(60)
    return label(self, row)

Labeller.label = held_up
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background has it ignored
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_ended_keeps_the_maps(tmp_path: Path, number: int) -> None:
    """Whole files, and no labels of a part; the same command finishes them."""
    place = photographs(tmp_path / "in", **{f"n{n}": sharp() for n in range(6)})
    for n in range(6):
        (place / f"n{n}.depth.npz").write_bytes(npz(depth=scene("subject")[1]))
        (place / f"n{n}.mask.npz").write_bytes(npz(mask=scene("subject")[2]))
    out = tmp_path / "out"
    words = ["annotate", str(place), "--output", str(out)]
    command = [sys.executable, "-c", HELD_UP, *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None and run.stdout.readline() == "three are done\n"
        run.send_signal(number)
        said = run.communicate(timeout=30)[1]
    assert run.returncode == 128 + number and "the same command goes on" in said
    assert not (out / "labels.jsonl").exists() and not list(out.rglob(".*"))
    kept = {path: path.stat().st_mtime_ns for path in out.glob("maps/*.npz")}
    assert len(kept) == 3
    for path in kept:
        with np.load(path) as maps:
            assert maps["depth"].shape == (128, 192)
    assert cli.main(words) == 0
    assert len(read_labels(out)) == 6
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_a_real_photograph_with_a_real_mask(tmp_path: Path) -> None:
    """docs/photos.md: the motorcycle, its depth from stereo, and its mask by ISNet."""
    image, depth = motorcycle()
    isnet = os.environ.get("BOKEHFLUX_ISNET")
    if isnet is None:
        pytest.skip("needs BOKEHFLUX_ISNET=isnet.onnx, which docs/photos.md tells how to get")
    place = tmp_path / "in"
    place.mkdir()
    exif = Image.Exif()
    exif.get_ifd(0x8769).update({0x829D: 2.8, 0x920A: 50.0, 0xA405: 50})
    image.save(place / "motorcycle.jpg", quality=95, exif=exif)
    (place / "motorcycle.depth.npz").write_bytes(npz(depth=depth))
    out = tmp_path / "out"
    assert (
        cli.main(["annotate", str(place), "--output", str(out), "--mask", isnet, "--mask-kind", "isnet"]) == 0
    )
    (label,) = read_labels(out).values()
    assert 2.1 < label["focus_distance_m"] < 2.9, "the motorcycle, not the wall at 5 m"
    with np.load(out / label["maps"]) as maps:
        mask = maps["mask"] > 127
    known = np.isfinite(depth)
    assert 0.2 < mask.mean() < 0.6
    assert np.median(depth[mask & known]) < 0.8 * np.median(depth[~mask & known])


def test_a_mask_that_was_refined_is_flagged(tmp_path: Path) -> None:
    class Leaking(Eye):
        def mask(self, image: Image.Image) -> np.ndarray:
            leaking = scene("subject")[2].copy()
            leaking[:, 128:] = leaking[:, :40] = 1
            return np.asarray(Image.fromarray(leaking).resize(image.size, Image.Resampling.NEAREST))

    place = photographs(tmp_path / "in", a=sharp())
    (label,) = label_all(place, tmp_path / "out", Leaking()).values()
    assert label["flags"] == ["focus_refined"]
