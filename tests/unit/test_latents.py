"""From labelled photographs to latents: what becomes of each, what is kept, what a level means."""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bokehflux.app import cli, train
from bokehflux.conditioning import Conditioning
from bokehflux.photos.labels import labelled
from bokehflux.photos.readers import Row, open_rows
from bokehflux.pictures import files
from bokehflux.sampling.latents import unpack
from bokehflux.training import latents, prepare
from bokehflux.training.latents import INDEX, Entry, LatentFolder
from bokehflux.training.prepare import Preparation, cropped
from tests.unit.test_labels import Eye, label_all, photographs
from tests.unit.test_photo_focus import BACKGROUND_M, SUBJECT_M, scene
from tests.unit.test_readers import jpeg

SIZE = (192, 128)


def photo(seed: int = 0) -> bytes:
    """The scene of test_photo_focus, with a corner that tells one from the other."""
    image = scene("subject")[0].copy()
    image.paste(Image.new("RGB", (32, 32), (seed * 40, 90, 200)), (0, 0))
    return jpeg(None, image)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Two sharp photographs, one blurred one, one without a caption; with labels in `labels`."""
    place = photographs(tmp_path / "in", a=photo(1), b=photo(2), c=photo(3), d=photo(4))
    for name, sharp in (("a", True), ("b", True), ("c", False), ("d", True)):
        told = {"suitable_for_synthetic": sharp, "captions": [] if name == "d" else [f"photograph {name}"]}
        (place / f"{name}.json").write_text(json.dumps(told))
    label_all(place, tmp_path / "labels", Eye())
    return place


def run(place: Path, *more: str) -> int:
    home = place.parent
    words = ["latents", str(place), "--labels", str(home / "labels"), "--output", str(home / "latents")]
    return cli.main([*words, "--model", "nano", "--size", "32", "--renders", "4", "--device", "cpu", *more])


def folder(place: Path, kind: str, unify: str = "range") -> LatentFolder:
    def silent(prompts: object) -> Conditioning:
        raise AssertionError(prompts)

    return LatentFolder(place.parent / "latents" / kind, silent, unify)  # type: ignore[arg-type]


def test_photographs_become_latents(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(place) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [str(place.parent / "latents" / kind) for kind in ("groups", "photographs")]
    num_bytes = (2 * 4 + 1) * 16 * 4 * 4 * 2
    assert f"2 sharp ones in groups of 4, 1 others; latents take {num_bytes / 1e9:.3g} GB" in err
    assert "left out: it has no caption: 1" in err
    files = [p for p in (place.parent / "latents").rglob("*.safetensors")]
    assert sum(len(p.read_bytes()) for p in files) == pytest.approx(num_bytes, abs=1000)
    groups, alone = folder(place, "groups"), folder(place, "photographs")
    assert (groups.num_scenes, groups.num_renders, alone.num_scenes, alone.num_renders) == (2, 4, 1, 1)
    assert groups.captions == [["photograph a"], ["photograph b"]]
    levels = groups.levels(torch.tensor([[0], [1]]), torch.arange(4))
    assert (levels.diff(dim=1) > 0)[:, 1:].all() and (levels[:, 1:] >= 1).all() and levels.max() <= 30
    assert not torch.equal(levels[0], levels[1]), "every scene has its own"
    (left_out,) = (place.parent / "latents" / "left-out.jsonl").read_text().splitlines()
    assert json.loads(left_out) == {"key": "d.jpg", "reason": "it has no caption"}


def test_renders_are_blurred_more_at_higher_levels_and_around_their_subject(place: Path) -> None:
    import bokehflux
    from bokehflux.metrics import sharpness

    assert run(place, "--size", "128") == 0
    groups = folder(place, "groups")
    x0 = groups.latents(torch.zeros(4, dtype=torch.int64), torch.arange(4))
    pipe = bokehflux.load("nano", device="cpu", dtype="float32")
    with torch.no_grad():
        pictures = (pipe.vae.decode(unpack(x0, groups.grid)) / 2 + 0.5).clamp(0, 1)
    middle, side = pictures[..., 40:88, 52:76], pictures[..., 40:, :24]
    assert (sharpness(side).diff() < -0.2).all(), sharpness(side)
    assert (sharpness(middle)[1:] - sharpness(middle)[0]).abs().max() < 0.7
    assert sharpness(side)[0] - sharpness(side)[-1] > 1.5


def test_a_changed_photograph_is_made_again_alone(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(place) == 0
    before = folder(place, "groups").latents(torch.tensor([0, 1]), torch.tensor([2, 2]))
    times = {p: p.stat().st_mtime_ns for p in (place.parent / "latents").rglob("*.safetensors")}
    capsys.readouterr()
    assert run(place) == 0
    assert capsys.readouterr().err.count(" 0 made, the others were there") == 2
    assert {p: p.stat().st_mtime_ns for p in (place.parent / "latents").rglob("*.safetensors")} == times
    (place / "b.jpg").write_bytes(photo(6))
    assert run(place) == 0
    err = capsys.readouterr().err
    assert (
        "groups: b.jpg has changed, its latents were made again" in err and "groups: 2 scenes, 1 made" in err
    )
    after = folder(place, "groups").latents(torch.tensor([0, 1]), torch.tensor([2, 2]))
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])
    assert len(list((place.parent / "latents" / "groups").glob("*.safetensors"))) == 1, "the old one is gone"
    assert run(place, "--flip") == 0
    assert "groups: 4 scenes, 2 made" in capsys.readouterr().err
    mirrored = folder(place, "groups").latents(torch.tensor([0, 1]), torch.tensor([0, 0]))
    assert not torch.equal(mirrored[0], mirrored[1])
    for flags in (["--seed", "1"], ["--renders", "3"], ["--size", "48"]):
        assert run(place, *flags) == 0
        assert "groups: 2 scenes, 2 made" in capsys.readouterr().err, flags


def watch(monkeypatch: pytest.MonkeyPatch, made: Callable[[str], None]) -> None:
    """Hear the name of every scene whose latents are made, before they are."""
    whole = prepare._entry

    def entry(*args: Any) -> Entry:
        found = whole(*args)
        return dataclasses.replace(found, make=lambda: (made(found.name), found.make())[1])

    monkeypatch.setattr(prepare, "_entry", entry)


def test_a_photograph_is_read_once_and_room_is_asked_for_what_is_missing(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its mirror image is made of the same pixels; what a run that goes on finds there takes no more room."""
    opened, asked = [], []
    photo, check = Row.photo, files.check_folder
    monkeypatch.setattr(Row, "photo", lambda row: (opened.append(row.key), photo(row))[1])
    monkeypatch.setattr(
        files, "check_folder", lambda where, size: (asked.append(size), check(where, size))[1]
    )
    assert run(place, "--flip") == run(place, "--flip") == 0
    assert opened == ["a.jpg", "b.jpg", "c.jpg"] * 2
    assert asked == [2 * (2 * 4 + 1) * 16 * 4 * 4 * 2, 0]


def test_a_full_disk_says_that_what_is_finished_is_kept(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write, sync, calls = latents.write_entries, os.fsync, [0]
    monkeypatch.setattr(latents, "write_entries", functools.partial(write, shard_scenes=1))

    def full(file: int) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(file)

    monkeypatch.setattr("os.fsync", full)
    assert run(place) == 1
    said = capsys.readouterr().err
    assert "what is finished is kept" in said and "the same command goes on when there is room" in said
    assert run(place) == 0 and "groups: 2 scenes, 1 made" in capsys.readouterr().err


def test_an_interrupted_run_keeps_its_shards(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write, made = latents.write_entries, []
    monkeypatch.setattr(latents, "write_entries", functools.partial(write, shard_scenes=1))

    def stopped(key: str) -> None:
        if key == "b.jpg" and made == ["a.jpg"]:
            made.append("stop")
            raise KeyboardInterrupt
        made.append(key)

    watch(monkeypatch, stopped)
    monkeypatch.setattr(train, "SAID_EVERY_S", -1)
    assert run(place) == 130
    said = capsys.readouterr().err
    assert "; the same command goes on" in said and "groups: 1 of 2" in said
    assert not (place.parent / "latents" / "groups" / INDEX).exists()
    assert run(place) == 0 and made == ["a.jpg", "stop", "b.jpg", "c.jpg"]


def test_a_kind_that_is_empty_now_is_not_left_behind(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(place) == 0
    (place / "c.json").write_text('{"suitable_for_synthetic": true, "captions": ["x"]}')
    assert run(place) == 2
    assert "photographs holds those of an earlier run: delete it" in capsys.readouterr().err


def test_a_folder_stays_whole_while_it_is_written_to(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, or an end between shard and index, leaves what was there; the next run finds the rest."""
    assert run(place) == 0
    index = (place.parent / "latents" / "groups" / INDEX).read_bytes()
    (place / "b.jpg").write_bytes(photo(6))
    with monkeypatch.context() as patch:
        patch.setattr(latents, "write_json", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        assert run(place) == 1
    assert (place.parent / "latents" / "groups" / INDEX).read_bytes() == index
    assert folder(place, "groups").num_scenes == 2
    made: list[str] = []
    watch(monkeypatch, made.append)
    assert run(place) == 0 and made == []


def test_both_meanings_of_a_level_lie_side_by_side(place: Path) -> None:
    assert run(place) == 0
    (label,) = (
        one for _, one in labelled(open_rows(place), place.parent / "labels") if one["key"] == "c.jpg"
    )
    raw, spread = (folder(place, "photographs", unify) for unify in ("raw", "range"))
    first = torch.tensor([0]), torch.tensor([0])
    k_px_m = label["K_px_m_short_side"]
    assert raw.levels(*first).item() == pytest.approx(min(k_px_m, 30))
    assert spread.levels(*first).item() == pytest.approx(
        k_px_m * (1 / SUBJECT_M - 1 / BACKGROUND_M), rel=1e-3
    )
    index = place.parent / "latents" / "photographs" / INDEX
    told = json.loads(index.read_text())
    told["scenes"][0]["levels"]["range"] = [None]
    index.write_text(json.dumps(told))
    assert folder(place, "photographs", "raw").num_scenes == 1
    with pytest.raises(ValueError, match="none of its 1 scenes has a level under 'range'"):
        folder(place, "photographs")


def test_cropping_the_shorter_side_raises_the_level(place: Path) -> None:
    """What is left of a 192 x 128 photograph at 32 x 64: scaled to 96 x 64, of which 32 px are a third."""
    row, label = next(labelled(open_rows(place), place.parent / "labels"))
    tall = cropped(row, label, Preparation(width_px=32, height_px=64))
    square = cropped(row, label, Preparation(width_px=64, height_px=64))
    assert tall.image.shape == (64, 32, 3) and tall.depth_m is not None and tall.depth_m.shape == (64, 32)
    assert square.k_px_m == pytest.approx(label["K_px_m_short_side"])
    assert tall.k_px_m == pytest.approx(2 * label["K_px_m_short_side"])
    mirrored = square.mirrored()
    assert np.array_equal(mirrored.image, square.image[:, ::-1])
    assert mirrored.depth_m is not None and np.array_equal(mirrored.depth_m, square.depth_m[:, ::-1])


def test_what_cannot_be_blurred_is_no_group(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """BokehDepth takes such photographs: sharp targets, labelled as blurred."""
    Image.new("L", SIZE, 255).save(place / "a.mask.png")
    np.savez_compressed(place / "b.depth.npz", depth=np.full(SIZE[::-1], 3.0))
    label_all(place, place.parent / "labels", Eye())
    assert run(place) == 2
    assert "none of 2 photographs can be used; left out: its mask or depth leaves nothing to blur" in (
        capsys.readouterr().err
    )
    for flags, said in ((["--size", "60"], "width_px must be a positive multiple of 16, got 60"),
                        (["--renders", "1"], "renders must be at least 2")):  # fmt: skip
        assert run(place, *flags) == 2 and said in capsys.readouterr().err
    for name in "abd":
        (place / f"{name}.json").write_text('{"suitable_for_synthetic": false, "captions": ["x"]}')
    assert run(place) == 2
    assert "is sharp throughout and has depth, and groups are made of such" in capsys.readouterr().err


def test_the_shorter_side_of_a_training_picture_sets_its_renders_blur(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []

    def drawn(image: torch.Tensor, depth: Any, mask: Any, level: float, networks: Any) -> torch.Tensor:
        seen.append(level)
        return image

    monkeypatch.setattr(prepare, "add_bokeh", drawn)
    assert run(place, "--size", "64x32") == 0
    groups = folder(place, "groups")
    scenes = torch.arange(2).repeat_interleave(3)
    told = groups.levels(scenes, torch.arange(1, 4).repeat(2))
    torch.testing.assert_close(torch.tensor(seen), told * 32 / prepare.TRAINING_SIDE_PX, atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize(("shape", "count", "says"), [
    ((2, 16, 4, 4), 1, "expected 2 levels"), ((2, 16, 4, 4), 3, "expected 2 levels"),
    ((2, 16, 4, 6), 2, r"like those before, got \[2, 16, 4, 6\]"), ((16, 4, 4), 16, "like those before"),
])  # fmt: skip
def test_scenes_that_do_not_fit_a_folder(
    tmp_path: Path, shape: tuple[int, ...], count: int, says: str
) -> None:
    def entry(name: str, shape: tuple[int, ...], count: int) -> latents.Entry:
        levels = [float(i) for i in range(count)]
        return latents.Entry(
            name=name, key=name, captions=["a cup"], levels={"raw": levels, "range": levels},
            make=lambda: torch.zeros(shape),
        )  # fmt: skip

    with pytest.raises(ValueError, match=f"^b: .*{says}"):
        latents.write_entries(tmp_path / "x", [entry("a", (2, 16, 4, 4), 2), entry("b", shape, count)])
    assert not (tmp_path / "x" / INDEX).exists()
