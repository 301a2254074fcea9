"""Judging folders: the truth must score best, and every kind of wrong pictures must be seen."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bokehflux.app import cli
from bokehflux.evaluation.folder import Found, find_scenes
from bokehflux.evaluation.judge import Report, Verdict, judge
from bokehflux.evaluation.perceptual import WEIGHTS
from bokehflux.evaluation.renderer import Renderer
from bokehflux.evaluation.scores import METRICS, Scores, Shots, mean, score
from bokehflux.metrics import disc_blur, lvcorr, lvcorr_to
from bokehflux.models.vae import to_uint8
from bokehflux.nano.captions import held_out
from bokehflux.nano.scenes import build_scenes, render
from bokehflux.pictures.metadata import encode
from bokehflux.record import Provenance, Record
from bokehflux.settings import GenerateSettings

LEVELS = (0.0, 5.0, 10.0, 20.0, 30.0)
PIVOT = 15.0
SIZE = 128
NUM = 3
SPEC, PROMPTS = held_out(NUM)
ROUNDING = {"scene_psnr_db": 0.01, "truth_psnr_db": 0.01}


@cache
def scene(seed: int = 5) -> object:
    return build_scenes(SPEC, SIZE, torch.Generator().manual_seed(seed), "cpu")


def pictures(levels: tuple[float, ...], seed: int = 5) -> torch.Tensor:
    """[N, K, 3, H, W], 8 bits, of nano's scenes with their exact layers."""
    shown = [render(scene(seed), torch.full((NUM,), level)) for level in levels]  # type: ignore[arg-type]
    return torch.stack([(each * 255).round() / 255 for each in shown], 1)


@cache
def truth() -> torch.Tensor:
    return pictures(LEVELS)


@cache
def subjects() -> torch.Tensor:
    """Bool [N, H, W]."""
    matte = scene().subject[:, 3]  # type: ignore[attr-defined]
    pad = (matte.shape[-1] - SIZE) // 2
    return matte[:, pad : pad + SIZE, pad : pad + SIZE] > 0.999


def scored(images: torch.Tensor) -> dict[str, float]:
    """Mean figures of [N, K, 3, H, W], with the truth beside them."""
    pivots, found = pictures((PIVOT,))[:, 0], []
    for i in range(NUM):
        shots = Shots(
            levels=LEVELS, images=images[i], pivot=pivots[i], subject=subjects()[i], reference=truth()[i],
            is_truth=True,
        )  # fmt: skip
        found.append(score(shots).figures)
    return mean(found)


@cache
def own() -> dict[str, float]:
    return scored(truth())


WRONG = {
    "constant": lambda: truth()[:, [2] * 5],
    "permuted": lambda: truth()[:, [3, 0, 4, 1, 2]],
    "reversed": lambda: truth().flip(1),
    "unblurred": lambda: truth()[:, [0] * 5],
    "too blurred": lambda: pictures((0.0, 9.0, 18.0, 30.0, 30.0)),
    "blurred too little": lambda: pictures((0.0, 2.5, 5.0, 10.0, 15.0)),
    "blurred from the start": lambda: pictures((6.0, 10.0, 14.0, 22.0, 30.0)),
    "another scene": lambda: pictures(LEVELS, seed=6),
    "another colour": lambda: truth() * torch.tensor([1.0, 0.85, 0.7]).view(3, 1, 1),
    "brighter": lambda: (truth() + 0.1).clamp(0, 1),
    "all over": lambda: torch.stack([blurred_all_over(one) for one in truth()]),
    "sharpened": lambda: (2 * truth() - torch.nn.functional.avg_pool2d(
        truth().flatten(0, 1), 3, 1, 1, count_include_pad=False).view_as(truth())).clamp(0, 1),
    "noisy": lambda: (truth() + 0.02 * torch.randn(truth().shape, generator=torch.Generator().manual_seed(0))
        ).clamp(0, 1),
}  # fmt: skip
SEEN_BY = {
    "constant": "monotonicity", "permuted": "monotonicity", "reversed": "lvcorr_reference",
    "unblurred": "monotonicity", "too blurred": "blur_px_per_level",
    "blurred too little": "blur_px_per_level",
    "blurred from the start": "blur_px_per_level", "another scene": "scene_psnr_db",
    "another colour": "scene_psnr_db", "brighter": "scene_psnr_db", "all over": "subject_blur_px",
    "sharpened": "truth_psnr_db", "noisy": "truth_ssim",
}  # fmt: skip
"""A figure that must tell it from the truth, even where no true picture is at hand but for the last two."""


def blurred_all_over(images: torch.Tensor) -> torch.Tensor:
    return torch.cat([disc_blur(images[:1], 0.2 * level) for level in LEVELS])


def test_the_truth_scores_one_where_one_is_best() -> None:
    found = own()
    assert set(found) == set(METRICS) - {"lpips", "dists", "lpips_pivot", "dists_pivot"}
    assert found["lvcorr_reference"] >= 0.99 and found["lvcorr_reference_without_0"] >= 0.99
    for name in ("monotonicity", "subject_kept", "truth_ssim"):
        assert found[name] == pytest.approx(1, abs=2e-3), name
    assert found["subject_blur_px"] < 0.05 and found["truth_psnr_db"] > 99


@pytest.mark.parametrize("wrong", WRONG)
def test_no_wrong_pictures_beat_the_truth(wrong: str) -> None:
    found = scored(WRONG[wrong]())
    short = {name: METRICS[name].shortfall(value, own()[name]) for name, value in found.items()}
    better = {name: value for name, value in short.items() if value < -ROUNDING.get(name, 1e-4)}
    assert not better, "a metric that wrong pictures win"
    seen_by = SEEN_BY[wrong]
    assert short[seen_by] > 0.02 * abs(own()[seen_by]) + ROUNDING.get(seen_by, 1e-3), short


def test_what_the_caps_are_for() -> None:
    """Without them these would win: why the table has the truth's own beside them."""
    still, weak = scored(WRONG["constant"]()), scored(WRONG["blurred too little"]())
    assert still["scene_psnr_db"] > own()["scene_psnr_db"] + 2
    assert weak["lvcorr_level"] > own()["lvcorr_level"] + 0.03


def test_figures_need_what_they_compare_with() -> None:
    alone = score(Shots(levels=LEVELS[1:], images=truth()[0, 1:])).figures
    assert set(alone) == {"lvcorr_level", "monotonicity", "blur_px_per_level"}, "no level 0: one grid"
    with pytest.raises(ValueError, match="two or more ascending levels"):
        score(Shots(levels=(5.0, 5.0), images=truth()[0, :2]))
    assert mean([{"lpips": 1.0}, {"lpips": 3.0, "dists": 1.0}]) == {"lpips": 2.0, "dists": 1.0}


def test_blur_is_measured_behind_the_subject_and_beyond_level_0() -> None:
    """The left half is blurred by 0.2 pixels a level, the right one is the subject and stays."""
    light = torch.rand(1, 3, 24, 24).repeat_interleave(4, 2).repeat_interleave(4, 3)
    images = torch.cat([disc_blur(light, 0.2 * level).clamp(0, 1) for level in LEVELS]) ** (1 / 2.2)
    subject = torch.arange(96).expand(96, 96) >= 48
    shots = Shots(
        levels=LEVELS, images=torch.where(subject, images[:1], images), subject=subject, reference=images
    )
    found = score(shots).figures
    assert found["blur_px_per_level"] == pytest.approx(0.2, rel=0.05)
    assert found["subject_blur_px"] == 0 and found["subject_kept"] == pytest.approx(1, abs=1e-4)
    later = dataclasses.replace(shots, levels=LEVELS[1:], images=shots.images[1:], reference=images[1:])
    for name in ("lvcorr_level", "lvcorr_reference"):
        assert found[f"{name}_without_0"] == score(later).figures[name] != found[name]
    assert found["lvcorr_level"] == lvcorr(torch.tensor(LEVELS), shots.images)
    assert found["lvcorr_reference"] == lvcorr_to(images, shots.images)


# Folders


def save(folder: Path, images: torch.Tensor, prompt: str, model: str = "nano", **changes: object) -> None:
    """Pictures as `sweep` leaves them: [K + 1, 3, H, W], the pivot at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = GenerateSettings(
        prompt=prompt, bokeh_targets=LEVELS, bokeh_pivot=PIVOT, num_inference_steps=4, num_grounding_steps=3,
        height=SIZE, width=SIZE, **changes,
    )  # type: ignore[arg-type] # fmt: skip
    record = Record(settings=settings, provenance=Provenance(model=model))
    for i, image in enumerate(to_uint8(images * 2 - 1).numpy()):
        is_pivot = i == len(LEVELS)
        one = record.of("pivot" if is_pivot else "target", PIVOT if is_pivot else LEVELS[i])
        data = encode(Image.fromarray(image), one.recipe())
        (folder / f"{'pivot' if is_pivot else 'bokeh'}-{i}.png").write_bytes(data)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """True pictures of two captions, as if nano had made them, and a sheet, which is not a picture."""
    root = tmp_path_factory.mktemp("swept")
    both = torch.cat([truth(), pictures((PIVOT,))], 1)
    for i in range(2):
        save(root / f"scene-{i}", both[i], PROMPTS[i])
    Image.new("RGB", (40, 30)).save(root / "sheet.png")
    return root


def test_scenes_are_told_apart_by_what_made_them(swept: Path, tmp_path: Path) -> None:
    scenes = find_scenes(swept)
    assert [scene.prompt for scene in scenes] == PROMPTS[:2]
    assert scenes[0].levels == LEVELS and scenes[0].pivot is not None and scenes[0].pivot.level == PIVOT
    assert len(find_scenes(swept, [swept / "scene-1"])) == 1
    both = torch.cat([truth(), pictures((PIVOT,))], 1)
    save(tmp_path / "one", both[0], PROMPTS[0], seed=1)
    for path in (tmp_path / "one").glob("*.png"):
        path.rename(tmp_path / f"first-{path.name}")
    save(tmp_path / "one", both[0], PROMPTS[0], seed=2)
    for path in (tmp_path / "one").glob("*.png"):
        path.rename(tmp_path / path.name)
    assert len(find_scenes(tmp_path)) == 2, "two seeds in one folder"


def test_captions_of_nano_are_measured_by_the_renderer(
    swept: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bokehflux.evaluation.renderer.through_vae", lambda vae, x: to_uint8(x * 2 - 1))
    monkeypatch.setattr(Renderer, "vae", None)
    assert cli.main(["eval", str(swept)]) == 0
    out = capsys.readouterr().out
    for text in ("levels 0, 5, 10, 20, 30", "mean, renderer, through the VAE", "-Pearson", "ref, >0"):
        assert text in out
    found = json.loads((swept / "eval.json").read_text())
    assert set(found["mean"]) == {"pictures", "renderer", "renderer, through the VAE"}
    # Scenes of one caption differ: the renderer's own row says what can be reached.
    assert found["mean"]["pictures"]["lvcorr_reference"] >= 0.97
    assert 0.97 <= found["mean"]["renderer"]["lvcorr_reference"] < 1 - 1e-6
    assert abs(found["shortfall"]["blur_px_per_level"]) < 0.1
    assert [each["prompt"] for each in found["scenes"]] == PROMPTS[:2]
    with Image.open(swept / "eval.png") as image:
        assert image.width == 960


def test_another_models_pictures_have_no_renderer(swept: Path, tmp_path: Path) -> None:
    both = torch.cat([truth(), pictures((PIVOT,))], 1)
    save(tmp_path, both[0], PROMPTS[0], model="FLUX.1-dev")
    report = judge(find_scenes(tmp_path))
    assert report.sources == ["pictures"] and report.shortfalls() == {}
    assert "lvcorr_reference" not in report.means()["pictures"]


def test_a_reference_is_the_truth(swept: Path, tmp_path: Path) -> None:
    both = torch.cat([truth(), pictures((PIVOT,))], 1)
    save(tmp_path, both[0], PROMPTS[0], model="another")
    (found,) = (one.with_truth(find_scenes(swept)) for one in find_scenes(tmp_path))
    report = judge([found])
    assert report.sources == ["pictures", "truth"]
    assert max(report.shortfalls().values()) < 1e-6 and report.means()["truth"]["truth_psnr_db"] > 99
    save(tmp_path / "still", both[0, [4, 4, 4, 4, 4, 5]], PROMPTS[0], model="another")
    (still,) = (one.with_truth(find_scenes(swept)) for one in find_scenes(tmp_path / "still"))
    means = judge([still]).means()
    assert means["truth"] == report.means()["truth"] and means["pictures"]["truth_psnr_db"] < 50
    short = dataclasses.replace(find_scenes(swept)[0], pictures=find_scenes(swept)[0].pictures[1:])
    with pytest.raises(ValueError, match="has no picture of level 0"):
        found.with_truth([short])
    with pytest.raises(ValueError, match="expected one scene"):
        found.with_truth([])


def rendered(photo: Path, folder: Path, *words: str) -> Path:
    """What `render` makes of a photograph: all of it 4 m away, the subject of PROMPTS[0] 1 m."""
    folder.parent.mkdir(exist_ok=True)
    maps = folder.parent / f"{folder.name}.npz"
    np.savez(maps, depth=np.where(subjects()[0], 1, 4).astype(np.float32), mask=subjects()[0].numpy())
    argv = ["render", str(photo), "--depth", str(maps), "--mask", str(maps), "--output", str(folder)]
    assert cli.main([*argv, "--levels", "0", "30", *words]) == 0
    return folder


def test_the_mask_of_a_render_is_read_as_render_reads_it(swept: Path, tmp_path: Path) -> None:
    """From an array, and over a picture that was made smaller."""
    folder = rendered(swept / "scene-0" / "bokeh-0.png", tmp_path / "out", "--long-side", "96")
    assert cli.main(["eval", str(folder)]) == 0
    (found,) = find_scenes(folder)
    shots = found.read()
    assert shots.subject is not None and shots.subject.shape == (96, 96)
    share = shots.subject.float().mean()
    assert share == pytest.approx(float(subjects()[0].float().mean()), rel=0.02)
    assert score(shots).figures["subject_kept"] > 0.95
    np.savez(tmp_path / "out.npz", mask=np.ones((40, 90), bool))
    with pytest.raises(ValueError, match="has 90 x 40 points and the photograph 128 x 128"):
        found.read()


@pytest.mark.parametrize("orientation", [6, 5, 8])
def test_a_mask_that_is_stored_turned_is_read_as_render_reads_it(
    swept: Path, tmp_path: Path, orientation: int
) -> None:
    """With the photograph, whose EXIF data says how."""
    way = {6: Image.Transpose.ROTATE_90, 5: Image.Transpose.TRANSPOSE, 8: Image.Transpose.ROTATE_270}
    upright = Image.open(swept / "scene-0" / "bokeh-0.png").crop((0, 0, 96, 128))
    mask = subjects()[0].numpy()[:128, :96]
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright.transpose(way[orientation]).save(tmp_path / "turned.png", exif=exif)
    stored = Image.fromarray(mask).convert("L").transpose(way[orientation])
    stored.save(tmp_path / "mask.png")
    np.save(tmp_path / "depth.npy", np.where(np.asarray(stored) > 0, 1, 4).astype(np.float32))
    argv = ["render", str(tmp_path / "turned.png"), "--depth", str(tmp_path / "depth.npy"), "--levels", "0"]
    argv += ["30", "--mask", str(tmp_path / "mask.png"), "--output", str(tmp_path / "out")]
    assert cli.main(argv) == 0
    (found,) = find_scenes(tmp_path / "out")
    subject = found.read().subject
    assert subject is not None and np.array_equal(subject.numpy(), mask)
    (tmp_path / "turned.png").unlink()
    (found,) = find_scenes(tmp_path / "out")
    with pytest.raises(ValueError, match="has 128 x 96 points and its pictures 96 x 128"):
        found.read()


def test_a_mask_that_is_gone_is_said_once(
    swept: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = rendered(swept / "scene-0" / "bokeh-0.png", tmp_path / "out")
    (tmp_path / "out.npz").unlink()
    (found,) = find_scenes(folder)
    assert found.read().subject is None
    assert caplog.text.count("out.npz, which is not there: no subject") == 1


def test_the_reference_is_the_one_of_the_same_photograph(swept: Path, tmp_path: Path) -> None:
    photos = [swept / f"scene-{i}" / "bokeh-0.png" for i in range(2)]
    for i, photo in enumerate(photos):
        rendered(photo, tmp_path / "true" / str(i))
        rendered(photo, tmp_path / "shown" / str(i), "--aperture", "polygon:5")
    truths = find_scenes(tmp_path / "true")
    for i, shown in enumerate(find_scenes(tmp_path / "shown")):
        found = shown.with_truth(truths)
        assert [each.truth for each in found.pictures] == [each.path for each in truths[i].pictures], i
    for i in range(2):  # rendered from one of the pictures themselves
        (drawn,) = find_scenes(swept / f"scene-{i}")
        ends = dataclasses.replace(drawn, pictures=(drawn.pictures[0], drawn.pictures[-1]))
        assert ends.with_truth(truths).pictures[1].truth == truths[i].pictures[1].path


def test_a_manifest_tells_of_foreign_pictures(tmp_path: Path) -> None:
    lines = []
    for i, level in enumerate(LEVELS):
        for folder, images in (("shown", truth()[0]), ("true", truth()[0])):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(to_uint8(images[i : i + 1] * 2 - 1)[0].numpy()).save(
                tmp_path / folder / f"{i}.png"
            )
        lines.append({"file": f"shown/{i}.png", "level": level, "truth": f"true/{i}.png", "mask": "mask.png"})
    Image.fromarray(subjects()[0].numpy()).convert("L").save(tmp_path / "mask.png")
    manifest = tmp_path / "pictures.jsonl"
    manifest.write_text("\n".join(map(json.dumps, lines)))
    assert cli.main(["eval", str(manifest)]) == 0
    (scene,) = json.loads((tmp_path / "eval.json").read_text())["scenes"]
    assert scene["sources"]["pictures"]["figures"]["subject_kept"] == pytest.approx(1, abs=1e-3)
    assert scene["sources"]["pictures"]["figures"]["truth_psnr_db"] > 99


def test_scenes_without_a_yardstick_do_not_count_against_it() -> None:
    """Whatever they score, and whatever could be measured on one side alone."""
    found = Found(name="mug", prompt=None, model=None, pictures=(), pivot=None)
    ours, own = Scores(figures={"monotonicity": 0.5, "lpips": 3.0}), Scores(figures={"monotonicity": 0.75})
    both = Verdict(found=found, sources={"pictures": ours, "truth": own})
    alone = Verdict(found=found, sources={"pictures": Scores(figures={"monotonicity": 0.0})})
    for verdicts in ([both], [both, alone], [alone, both]):
        assert Report(verdicts=verdicts).shortfalls() == {"monotonicity": 0.25}
    assert Report(verdicts=[alone]).shortfalls() == {}


def test_a_table_has_straight_columns() -> None:
    """Whatever the names: one that is too long is cut, and nothing else moves."""
    figures = {"monotonicity": 0.5, "lvcorr_level": 0.25}
    verdicts = [
        Verdict(
            found=Found(name=name, prompt=None, model=None, pictures=(), pivot=None),
            sources={"pictures": Scores(figures=figures if name != "b" else {"monotonicity": 1.0})},
        )
        for name in ("a", "b", "a very long name of a scene, " * 4)
    ]
    _, heading, *rows = Report(verdicts=verdicts).lines()
    rows = rows[: len(verdicts) + 1]
    assert {len(row) for row in rows} == {len(heading)} and rows[-1].startswith("mean, pictures")
    assert rows[1].split() == ["2", "b", "-", "1.000"] and rows[2].count("...") == 1


def test_a_level_whose_blur_cannot_be_measured_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def radius(images: torch.Tensor, sharp: torch.Tensor, region: torch.Tensor) -> torch.Tensor:
        return torch.tensor([math.nan, *(0.5 * level for level in LEVELS[2:])])

    monkeypatch.setattr("bokehflux.evaluation.scores.blur_radius", radius)
    assert score(Shots(levels=LEVELS, images=truth()[0])).figures["blur_px_per_level"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([(0, {}), (5, {}), (5, {})], "has two pictures of one level"),
        ([(0, {"truth": "a.png"}), (5, {})], "needs a truth for every level"),
    ],
)
def test_a_manifest_is_not_read_in_part(
    tmp_path: Path, lines: list[tuple[float, dict[str, str]]], said: str
) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    told = [{"file": "a.png", "level": level, "scene": "mug", **more} for level, more in lines]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, told)))
    with pytest.raises(ValueError, match=f"scene 'mug' {said}"):
        find_scenes(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 1: it is not JSON"),
        ('{"file": "a.png"}', 'with "file" and "level"'),
        ('{"file": "a.png", "level": 45}', "between 0"),
        ('{"file": "a.png", "level": true}', "'level': True"),
        ('{"file": "a.png", "level": 5, "blur": 1}', "'blur': 1"),
        ('{"file": "a.png", "level": 5, "role": "sheet"}', "role must be one of"),
        ('{"file": "a.png", "level": 5}', "not there"),
        ("", "holds no scene"),
    ],
)
def test_a_wrong_manifest_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, said: str
) -> None:
    (tmp_path / "wrong.jsonl").write_text(line)
    assert cli.main(["eval", str(tmp_path / "wrong.jsonl")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "eval.json").exists()


def test_one_level_is_no_scene(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "one.jsonl").write_text('{"file": "a.png", "level": 5}')
    with pytest.raises(ValueError, match="two or more levels of one scene"):
        find_scenes(tmp_path / "one.jsonl")


def test_hidden_files_are_nobodys_pictures(swept: Path, tmp_path: Path) -> None:
    shutil.copytree(swept / "scene-0", tmp_path / "a")
    found = find_scenes(tmp_path / "a")
    shutil.copy(tmp_path / "a" / "bokeh-1.png", tmp_path / "a" / "._bokeh-1.png")
    assert find_scenes(tmp_path / "a") == found


def test_what_cannot_be_judged_is_said_first(
    swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "holiday.png")
    both = torch.cat([truth(), pictures((PIVOT,))], 1)
    save(tmp_path / "sizes", both[0], PROMPTS[0])
    Image.new("RGB", (64, 64)).save(tmp_path / "mask.png")
    for words, said in (
        ([str(tmp_path / "holiday.png")], "expected a folder with pictures or a .jsonl manifest"),
        ([str(tmp_path / "nowhere")], "is not there"),
        ([str(swept), "--seeds", "3"], "--seeds would do nothing"),
        ([str(swept), "--model", "other"], "--model would do nothing"),
        ([str(swept), "--perceptual", str(tmp_path)], WEIGHTS["lpips"]),
        (["--bokeh-targets", ""], "a sequence of 1 to 1000 levels"),
        ([str(swept), "--reference", str(tmp_path / "nowhere")], "is not there"),
        (["--perceptual", str(tmp_path), "--model", str(tmp_path / "nowhere")], WEIGHTS["dists"]),
    ):
        assert cli.main(["eval", *words]) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1, err


def test_perceptual_figures_go_to_the_truth_or_to_the_pivot() -> None:
    def distances(a: torch.Tensor, b: torch.Tensor) -> dict[str, float]:
        return {"lpips": float((a - b).abs().mean()), "dists": 0.5}

    shots = Shots(levels=LEVELS, images=truth()[0], pivot=truth()[0, 2], reference=truth()[0], is_truth=True)
    figures = score(shots, distances).figures
    assert figures["lpips"] == 0 and figures["dists"] == 0.5 and "lpips_pivot" not in figures
    figures = score(dataclasses.replace(shots, is_truth=False), distances).figures
    assert figures["lpips_pivot"] > 0 and "lpips" not in figures


def test_the_command_measures_perceptual_distances(
    swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Weights:
        def __init__(self, hub: Path) -> None:
            assert hub == tmp_path

        def __call__(self, a: torch.Tensor, b: torch.Tensor) -> dict[str, float]:
            return {"lpips": 0.25}

    monkeypatch.setattr("bokehflux.evaluation.perceptual.HubPerceptual", Weights)
    (tmp_path / "one").symlink_to(swept / "scene-0")
    assert cli.main(["eval", str(tmp_path / "one"), "--perceptual", str(tmp_path)]) == 0
    (scene,) = json.loads((tmp_path / "one" / "eval.json").read_text())["scenes"]
    assert scene["sources"]["pictures"]["figures"]["lpips_pivot"] == 0.25


def test_a_model_makes_the_protocol_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.tiny import tiny_pipeline

    pipe = tiny_pipeline()
    monkeypatch.setattr("bokehflux.pipeline.load.load", lambda *_, **__: pipe)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a mug\na vase\n")
    words = ["eval", "--prompts-file", str(prompts), "--output", str(tmp_path / "out"), "--steps", "1"]
    assert cli.main(words) == 0
    found = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert [each["prompt"] for each in found["scenes"]] == ["a mug", "a vase"]
    assert found["scenes"][0]["levels"] == [0, 5, 10, 20, 30] and found["scenes"][0]["pivot_level"] == 15
    capsys.readouterr()
    assert cli.main(words) == 0
    assert "scene 2: 6 pictures were there already" in capsys.readouterr().err
