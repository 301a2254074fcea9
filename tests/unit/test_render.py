"""`bokehflux render`: files in, pictures out; what it is told, and what it refuses."""

from __future__ import annotations

import argparse
import contextlib
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bokehflux.app import cli
from bokehflux.app.arguments import parsers
from bokehflux.focus import Point
from bokehflux.lens import Camera
from bokehflux.photos.maps import read_map
from bokehflux.pictures.metadata import RENDERED_TYPE, read_recipe
from bokehflux.pipeline import render
from bokehflux.rendering.bokehme_networks import ARNet, IUNet
from bokehflux.rendering.lens_map import LensMap
from bokehflux.settings import RenderSettings
from bokehflux.weights.files.write import save as write

WIDTH, HEIGHT = 90, 60
BASE = ["render", "a.jpg", "--depth", "a.npz", "--focus", "20,30", "--levels", "30"]
LENS = {0x829D: 1.4, 0x920A: 50.0, 0xA405: 50}


@pytest.fixture(autouse=True)
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A square 1 m away before a wall, 5 m away, which recedes to the right."""
    monkeypatch.chdir(tmp_path)
    x = np.arange(WIDTH) + np.zeros((HEIGHT, 1))
    inside = (abs(x - 20) < 14) & (abs(np.arange(HEIGHT)[:, None] - 30) < 14)
    depth = np.where(inside, 1.0, 5 + x / 30).astype(np.float32)
    noise = np.random.default_rng(0).integers(0, 255, (HEIGHT // 4, WIDTH // 3, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((WIDTH, HEIGHT), Image.Resampling.NEAREST)
    exif = Image.Exif()
    exif.get_ifd(0x8769).update(LENS)
    image.save("a.jpg", quality=95, subsampling=0, exif=exif)
    image.save("plain.png")
    np.savez_compressed("a.npz", depth=depth, mask=inside)
    np.save("a.npy", depth.astype(np.float64))
    Image.fromarray((depth * 1000).round().astype(np.uint16)).save("a.depth.png")
    Image.fromarray(inside).save("a.mask.png")
    Image.fromarray(((abs(x[:, :60] - 30) < 9) * 255).astype(np.uint8)).save("bars.png")
    for name, kind in (("arnet", ARNet), ("iunet", IUNet)):
        torch.manual_seed(0)
        write(f"{name}.safetensors", kind(8).state_dict())


def made(*words: str, output: str = "out") -> dict[str, np.ndarray]:
    """Pictures by name."""
    assert cli.main([*words, "--output", output]) == 0
    return {path.name: np.asarray(Image.open(path).convert("RGB")) for path in sorted(Path(output).iterdir())}


def test_it_is_the_lens_map_in_files(capsys: pytest.CaptureFixture[str]) -> None:
    found = made(*BASE, "0")
    assert capsys.readouterr().out.split() == [
        f"out/{name}" for name in ("bokeh-30.0.png", "bokeh-00.0.png", "sheet.png")
    ]
    photo = np.asarray(Image.open("a.jpg"))
    assert np.abs(found["bokeh-00.0.png"].astype(int) - photo).max() <= 1
    lens = LensMap.from_depth(torch.from_numpy(np.load("a.npz")["depth"])).focused_at(Point(20, 30))
    expected = lens.render(torch.from_numpy(np.array(photo)).permute(2, 0, 1) / 255, 30.0)
    assert np.array_equal(found["bokeh-30.0.png"], (expected.permute(1, 2, 0) * 255).round().byte().numpy())
    recipe = read_recipe("out/bokeh-30.0.png")
    assert recipe["focus"] == ["20,30"] and recipe["bokeh_level"] == 30 and "model" not in recipe
    data = Path("out/bokeh-30.0.png").read_bytes()
    assert RENDERED_TYPE.encode() in data and b"AI" not in data, "no model made it"


@pytest.mark.parametrize("depth", ["a.npy", "a.depth.png"])
def test_kinds_of_depth(depth: str) -> None:
    found, same = made(*BASE), made(*BASE, "--depth", depth, output="same")
    assert np.abs(found["bokeh-30.0.png"].astype(int) - same["bokeh-30.0.png"]).max() <= 1


def test_levels_come_from_the_photograph(capsys: pytest.CaptureFixture[str]) -> None:
    camera = Camera(focal_mm=50, f_number=1.4, focal_35mm=50, width_px=WIDTH, height_px=HEIGHT)
    k = round(camera.k_px_m(focus_m=2.5, short_side_px=512), 1)
    assert set(made(*BASE[:-2])) == {f"bokeh-{k}.png", "sheet.png"}
    assert f"a.jpg: level {k}, by its EXIF data" in capsys.readouterr().err
    over_range = made(*BASE[:-2], "--unify", "range", output="range")
    gap = np.ptp(1 / np.load("a.npz")["depth"])
    assert f"bokeh-{round(k * gap, 1)}.png" in over_range
    raw, same = (next(iter(found.values())).astype(int) for found in (made(*BASE[:-2]), over_range))
    assert np.abs(raw - same).max() <= 4, "one lens, two numbers"
    assert len(made("render", "plain.png", *BASE[2:-2], output="dial")) == 8
    assert "its EXIF data tells no level" in capsys.readouterr().err


FLAGS = {
    "--bokeh-targets": ["20"], "--focus": ["2m"], "--aperture": ["donut:0.6"], "--highlights": ["9"],
    "--depth": ["flat.npy"], "--mask": ["soft.npy"], "--unify": ["range"], "--renderer": ["scatter"],
    "--long-side": ["70"], "--format": ["webp"],
}  # fmt: skip
ELSEWHERE = {"--config-from", "--device", "--arnet", "--iunet", "--output"}
"""Other tests of this file show what these do."""


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_changes_what_comes_out(flag: str) -> None:
    np.save("flat.npy", np.full((HEIGHT, WIDTH), 3.0) + np.eye(HEIGHT, WIDTH))
    soft = np.clip((20 - abs(np.arange(WIDTH) - 20)) / 10, 0, 1) + np.zeros((HEIGHT, 1))
    np.save("soft.npy", soft)

    plain, other = made(*BASE), made(*BASE, flag, *FLAGS[flag], output="other")
    assert any(not np.array_equal(picture, other.get(name)) for name, picture in plain.items())


def test_no_flag_is_left_out() -> None:
    actions = [a for a in parsers()[1]["render"]._actions if not isinstance(a, argparse._HelpAction)]
    assert {a.option_strings[0] for a in actions if a.option_strings} == {*FLAGS, *ELSEWHERE}


def test_a_mask_is_the_focus_where_nothing_else_is_said() -> None:
    by_mask = made("render", "a.jpg", "--depth", "a.npz", "--mask", "a.npz", "--levels", "30")
    assert np.array_equal(by_mask["bokeh-30.0.png"], made(*BASE, output="point")["bokeh-30.0.png"])


def test_memory_that_runs_out_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_large(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    for place in ("blur_photo", "LensMap.from_depth"):
        with monkeypatch.context() as patch:
            patch.setattr(f"bokehflux.pipeline.render.{place}", too_large)
            assert cli.main(BASE) == 2
        said = capsys.readouterr().err
        assert "a photograph's long_side): CUDA out" in said, place


def test_replay_is_bit_equal(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    first = made(*BASE, "7.5", "--aperture", "bars.png", "--focus", "mask", "--mask", "a.mask.png")
    again = made("render", "--config-from", "out/sheet.png", output="again")
    assert first.keys() == again.keys() and all(np.array_equal(first[n], again[n]) for n in first)
    for name in first:
        assert read_recipe(f"out/{name}") == read_recipe(f"again/{name}")
    assert not caplog.text
    Image.open("a.jpg").save("a.jpg", quality=50)
    assert made("render", "--config-from", "out/sheet.png", output="other").keys() == first.keys()
    assert "was made with the photo" in caplog.text and "the picture may differ" in caplog.text
    assert cli.main(["generate", "--config-from", "out/sheet.png"]) == 2
    assert "was made by `bokehflux render`, which makes it again" in capsys.readouterr().err


@pytest.mark.parametrize("orientation", [6, 5, 3])
def test_maps_lie_over_the_upright_photograph(orientation: int) -> None:
    """Those of the stored pixels' shape turn with them."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    turns = {6: Image.Transpose.ROTATE_90, 5: Image.Transpose.TRANSPOSE, 3: Image.Transpose.ROTATE_180}
    stored = Image.open("plain.png").transpose(turns[orientation])
    stored.save("turned.png", exif=exif)
    depth = np.load("a.npy").astype(np.float32)
    np.save("stored.npy", np.asarray(Image.fromarray(depth).transpose(turns[orientation])))
    expected = made("render", "plain.png", *BASE[2:])["bokeh-30.0.png"]
    for name in ("a.npy", "stored.npy")[: 1 if orientation == 3 else 2]:
        found = made("render", "turned.png", *BASE[2:], "--depth", name, output=name[:-4])
        assert np.array_equal(found["bokeh-30.0.png"], expected)


def test_bokehme_with_its_networks() -> None:
    words = [*BASE, "--renderer", "bokehme", "--arnet", "arnet.safetensors", "--iunet", "iunet.safetensors"]
    both = made(*words, "--aperture", "polygon:5")
    assert set(dict(read_recipe("out/bokeh-30.0.png")["file_hashes"])) == {"photo", "depth", "arnet", "iunet"}
    scattered = made(*BASE, "--renderer", "scatter", "--aperture", "polygon:5", output="scattered")
    assert not np.array_equal(both["bokeh-30.0.png"], scattered["bokeh-30.0.png"])


def test_ctrl_c_keeps_what_is_finished(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = render.Rendering.picture

    def stopped(self: render.Rendering, level: float, focus: str) -> Image.Image:
        if level == 9:
            raise KeyboardInterrupt
        return real(self, level, focus)

    monkeypatch.setattr(render.Rendering, "picture", stopped)
    assert cli.main([*BASE, "3", "9", "12", "--output", "out"]) == 130
    said = capsys.readouterr()
    assert "interrupted; 2 of 4 pictures are finished and kept in out" in said.err
    assert said.out.split() == ["out/bokeh-30.0.png", "out/bokeh-03.0.png"]
    assert cli.main([*BASE[:-1], "9", "--output", "none"]) == 130
    assert "interrupted; no picture is finished" in capsys.readouterr().err


def test_a_full_disk_is_noticed_before_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(render.Rendering, "picture", lambda *_: pytest.fail("rendered"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: argparse.Namespace(free=10_000))
    assert cli.main(BASE) == 2
    assert "has 0 MB free, and up to 0 MB are expected" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["render"], "a photo is needed: PHOTO"),
        (["render", "a.jpg"], "a depth is needed: --depth FILE"),
        (["render", "a.jpg", "--depth", "a.npz"], "say what is in focus: --focus X,Y"),
        ([*BASE, "--focus", "90,3"], "expected a pixel of 90 x 60, got 90,3"),
        ([*BASE, "--focus", "here"], "focus: expected a point X,Y in pixels"),
        ([*BASE, "--aperture", "heart"], "aperture: expected disc, polygon:BLADES"),
        ([*BASE, "--aperture", "heart.png"], "cannot read the photograph heart.png: it is not there"),
        (
            [*BASE, "--aperture", "donut", "--renderer", "scatter"],
            "knows Disc and Polygon, got Donut",
        ),
        ([*BASE, "--renderer", "bokehme"], "needs its networks: --arnet FILE and --iunet FILE"),
        (
            [*BASE, "--renderer", "bokehme", "--arnet", "x", "--iunet", "x"],
            "x: expected a file of one of BokehMe",
        ),
        ([*BASE, "--arnet", "x"], "are for --renderer bokehme, and it is layers"),
        ([*BASE, "--renderer", "scatter", "--highlights", "3"], "are raised by the renderer layers"),
        ([*BASE, "--arnet", "arnet.safetensors"], "are for --renderer bokehme, and it is layers"),
        ([*BASE, "--renderer", "fast"], "renderer must be layers or scatter or bokehme, got 'fast'"),
        ([*BASE, "--unify", "both"], "unify must be raw or range, got 'both'"),
        ([*BASE, "--highlights", "0.5"], "highlights must be at least 1"),
        ([*BASE, "--levels", "31"], "must be between 0 (all sharp) and 30, got 31"),
        ([*BASE, "--depth", "none.npy"], "cannot read the depth none.npy: it is not there"),
        ([*BASE, "--depth", "arnet.safetensors"], "cannot read arnet.safetensors"),
        ([*BASE, "--depth", "text.npy"], "not an array of numbers, or not all of one"),
        ([*BASE, "--depth", "objects.npy"], "pickles are never read"),
        ([*BASE, "--depth", "claims.npy"], "not an array of numbers, or not all of one"),
        ([*BASE, "--depth", "complex.npy"], "type complex128, expected [H, W], floats"),
        ([*BASE, "--depth", "switch.npy"], "type bool, expected [H, W], floats"),
        ([*BASE, "--depth", "empty.npy"], "has shape (0, 0) and type"),
        ([*BASE, "--depth", "text.npz"], "not an array of numbers"),
        ([*BASE, "--depth", "brace.npy"], "not an array of numbers"),
        ([*BASE, "--depth", "other.npz"], "it has no array called depth, but radius, mask"),
        ([*BASE, "--depth", "bars.png"], "(60, 60) and type uint8, expected [H, W], floats or uint16"),
        ([*BASE, "--mask", "bars.png"], "has 60 x 60 points and the photograph 90 x 60"),
        ([*BASE, "--device", "tpu"], "unknown device 'tpu'"),
        (["render", "--config-from", "a.jpg"], "a.jpg holds no bokehflux recipe"),
    ],
)
def test_what_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    odd_maps()
    assert cli.main(words) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and not said.out
    assert not Path("results").exists()


def odd_maps() -> None:
    """Files that are called as maps are."""
    for name in ("text.npy", "text.npz"):
        Path(name).write_text("3 4")
    np.save("objects.npy", np.array([{}], object), allow_pickle=True)
    np.save("complex.npy", np.ones((HEIGHT, WIDTH), complex))
    np.save("switch.npy", np.ones((HEIGHT, WIDTH), bool))
    np.save("empty.npy", np.ones((0, 0)))
    np.savez("other.npz", radius=np.ones(3), mask=np.ones(3))
    np.save("claims.npy", np.ones((2, 2)))
    data = Path("claims.npy").read_bytes()
    Path("brace.npy").write_bytes(data.replace(b"}", b" "))
    Path("claims.npy").write_bytes(data.replace(b"(2, 2), }      ", b"(99999, 999), }")[:-4])


@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
def test_damaged_arrays_are_read_or_refused(name: str) -> None:
    """NumPy has many ways to say that it cannot."""
    data, draw = Path(name).read_bytes(), np.random.default_rng(7)
    for _ in range(400):
        changed = bytearray(data)
        for at in draw.integers(0, min(len(data), 300), 3):
            changed[-at if draw.integers(4) == 0 else at] = draw.integers(256)
        Path(f"x{name[1:]}").write_bytes(changed[: draw.integers(1, len(data) * 2)])
        with contextlib.suppress(ValueError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read_map(Path(f"x{name[1:]}"), "depth")


def test_from_python(tmp_path: Path) -> None:
    asked = RenderSettings(photo="a.jpg", depth="a.npz", focus="20,30", bokeh_targets=(30,))
    found = render.open_rendering(asked, torch.device("cpu")).picture(30.0, "20,30")
    assert np.array_equal(np.asarray(found), made(*BASE)["bokeh-30.0.png"])


@pytest.mark.parametrize("wrong", [[["photo"]], ["ab"], [["photo", "0", "1"]], "ab"])
def test_fingerprints_come_in_pairs(wrong: object) -> None:
    with pytest.raises(ValueError, match="file_hashes must be pairs of text"):
        RenderSettings(photo="a.png", depth="a.npy", file_hashes=wrong)  # type: ignore[arg-type]


def test_a_mask_counts_in_a_smaller_picture() -> None:
    soft = np.clip((20 - abs(np.arange(WIDTH) - 20)) / 10, 0, 1) + np.zeros((HEIGHT, 1))
    np.save("soft.npy", soft)
    small = ["--long-side", "70"]
    without, with_it = made(*BASE, *small), made(*BASE, *small, "--mask", "soft.npy", output="masked")
    assert with_it["bokeh-30.0.png"].shape == without["bokeh-30.0.png"].shape == (47, 70, 3)
    assert not np.array_equal(with_it["bokeh-30.0.png"], without["bokeh-30.0.png"])
