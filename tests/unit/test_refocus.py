"""Photographs at other levels: the way to noise and back, and what is grounded on it."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from bokehflux.app import cli
from bokehflux.attention import OnReference
from bokehflux.configs import ReferenceConfig
from bokehflux.models.adapter import BokehCondition
from bokehflux.models.reference import ReferenceAdapter
from bokehflux.models.vae import to_uint8
from bokehflux.photos.read import read_photo, upright_rgb
from bokehflux.pictures.metadata import read_recipe
from bokehflux.pipeline.decode import Decoded, decode_pictures
from bokehflux.pipeline.lens import Lens
from bokehflux.pipeline.pipeline import Pipeline
from bokehflux.pipeline.refocus import grid_of, plan_refocus
from bokehflux.pipeline.run import Options, Result, Stopped, execute
from bokehflux.record import Record
from bokehflux.rendering.lens_map import LensMap
from bokehflux.sampling.denoise import denoiser
from bokehflux.sampling.diagnose import NonFiniteError
from bokehflux.sampling.inversion import followed, invert, straight
from bokehflux.sampling.latents import LatentGrid, noise, pack
from bokehflux.sampling.reference import read_reference, reference_rope
from bokehflux.sampling.samplers import StepInfo, euler
from bokehflux.sampling.schedule import sigmas
from bokehflux.settings import DEFAULT_SEED, RefocusSettings
from tests.tiny import MMDIT, TXT_LENGTH, tiny_pipeline

SIGMAS = torch.linspace(1, 0, 21)


def field(x: Tensor, sigma: Tensor, _: int) -> Tensor:
    """A smooth velocity that depends on place and noise level."""
    return torch.sin(x + sigma) - 0.5 * x


def photo(width: int = 48, height: int = 32) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height))


def test_the_way_to_noise_is_the_samplers_way() -> None:
    """With one evaluation a step, and closer than by the velocity at the step's end (0.2)."""
    x = torch.randn(2, 5, 4)
    evaluations: list[int] = []

    def counted(x: Tensor, sigma: Tensor, step: int) -> Tensor:
        evaluations.append(step)
        return field(x, sigma, step)

    states = invert(counted, x, SIGMAS)
    assert len(states) == len(SIGMAS) and states[-1] is x
    assert evaluations == list(reversed(range(len(SIGMAS) - 1)))
    seen: list[StepInfo] = []
    back = euler(field, states[0], SIGMAS, seen.append)
    error = (back - x).abs().max()
    assert 0 < error < 0.01
    for state, info in zip(states[1:], seen, strict=True):
        assert (state - info.latents).abs().max() < 0.01


def test_a_straight_path_needs_no_inversion() -> None:
    """Whatever the network predicts, a target at the picture's own level comes back as the picture."""
    x, noise = torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    states = straight(x, noise, SIGMAS)
    assert torch.equal(states[0], noise) and torch.equal(states[-1], x)
    back = euler(followed(field, states, SIGMAS), noise.expand(2, -1, -1), SIGMAS)
    torch.testing.assert_close(back, x.expand(2, -1, -1))


def test_inversion_tells_its_steps() -> None:
    seen: list[StepInfo] = []
    states = invert(field, torch.randn(1, 3, 4), SIGMAS[::5], seen.append)
    assert [info.step for info in seen] == [0, 1, 2, 3] and {info.num_steps for info in seen} == {4}
    assert [info.sigma for info in seen] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert torch.equal(seen[-1].latents, states[0])


def test_the_first_row_follows_its_path_whatever_is_predicted() -> None:
    """And the others get the difference."""
    x = torch.randn(1, 3, 4)
    states = [torch.randn(1, 3, 4) for _ in SIGMAS[:-1]] + [x]
    asked: list[Tensor] = []

    def wild(x: Tensor, sigma: Tensor, step: int) -> Tensor:
        asked.append(x[:1])
        return torch.full_like(x, step) + torch.arange(3.0)[:, None, None]

    out = euler(followed(wild, states, SIGMAS), states[0].expand(3, -1, -1), SIGMAS)
    torch.testing.assert_close(out, x - torch.arange(3.0)[:, None, None], atol=1e-4, rtol=0)
    assert all(torch.equal(given, state) for given, state in zip(asked, states[:-1], strict=True))


@pytest.mark.parametrize("max_rows", [None, 1])
@pytest.mark.parametrize("grounded", [None, 0])
def test_a_photo_at_its_own_level_comes_back(max_rows: int | None, grounded: int | None) -> None:
    pipe = tiny_pipeline()
    errors = []
    for steps in (10, 40):
        made = pipe.refocus(
            photo(), "a mug", [7, 30], photo_level=7, method="inversion", height=32, width=48,
            max_rows=max_rows, num_inference_steps=steps, num_grounding_steps=grounded,
        )  # fmt: skip
        own = pipe.vae.encode(torch.from_numpy(np.array(photo())).movedim(-1, 0)[None] / 127.5 - 1)
        latents = pack(own)[0]
        same, other = ((row - latents).abs().mean() for row in made.latents)
        errors.append(same / latents.std())
        assert same < other / 2
    assert errors[1] < 0.03 and errors[1] < errors[0] / 2
    assert [image.size for image in made.images] == [(48, 32)] * 2
    assert np.array_equal(np.asarray(made.pivot_image), np.asarray(photo()))
    decoded = to_uint8(pipe.vae.decode(own))[0].numpy().astype(int)
    assert np.abs(np.asarray(made.images[0]).astype(int) - decoded).mean() < 1
    assert made.record.settings.bokeh_pivot == 7.0 and made.record.settings.bokeh_targets == (7.0, 30.0)


def test_an_overflow_on_the_way_to_noise_is_named_by_layer_and_step() -> None:
    """Two steps have two evaluations there: the second is that of step 0, the noisiest."""
    pipe, calls = tiny_pipeline(), []

    def overflow(_: torch.nn.Module, __: object, out: Tensor) -> Tensor | None:
        calls.append(1)
        return out * torch.inf if len(calls) % 2 == 0 else None

    pipe.transformer.single_blocks[0].linear2.register_forward_hook(overflow)
    with pytest.raises(NonFiniteError, match="^single_blocks.0.linear2 .* at step 0, from finite weights"):
        pipe.refocus(photo(), "a mug", [30], num_inference_steps=2, method="inversion")


def test_every_argument_counts() -> None:
    pipe = tiny_pipeline()

    def latents(**changed: object) -> Tensor:
        options = {"prompt": "a mug", "bokeh_targets": [30], "num_inference_steps": 4, "method": "inversion"}
        options |= changed
        return pipe.refocus(photo(), **options).latents  # type: ignore[arg-type]

    plain = latents()
    assert torch.equal(plain, latents()), "nothing is drawn"
    for change in (
        {"prompt": "a dog"}, {"bokeh_targets": [10]}, {"photo_level": 9}, {"num_inference_steps": 5},
        {"num_grounding_steps": 1}, {"guidance_scale": 4.0}, {"height": 64, "width": 64},
    ):  # fmt: skip
        other = latents(**change)
        assert other.shape != plain.shape or not torch.allclose(other, plain, atol=1e-4), change


@pytest.mark.parametrize(
    ("size", "orientation", "tokens"),
    [
        ((640, 480), 1, (28, 37)),
        ((640, 480), 6, (37, 28)),
        ((99, 99), 1, (32, 32)),
        ((9000, 16), 1, (1, 759)),
        ((100, 20_000), 6, (2, 453)),
    ],
)
def test_the_photos_own_shape(size: tuple[int, int], orientation: int, tokens: tuple[int, int]) -> None:
    """About as many pixels as the model is made for, upright."""
    pipe = tiny_pipeline()
    pipe = dataclasses.replace(pipe, defaults=dataclasses.replace(pipe.defaults, height_px=512, width_px=512))
    picture = Image.new("RGB", size)
    picture.getexif()[0x0112] = orientation
    upright = upright_rgb(picture)
    assert grid_of(upright, pipe, None, None).token_hw == tokens
    assert grid_of(upright, pipe, 70, 100).token_hw == (4, 6)


@pytest.mark.parametrize("method", ["render", "inversion"])
def test_the_network_sees_the_upright_photograph_from_minus_one_to_one(method: str) -> None:
    """A grey ramp, stored on its side."""
    ramp = np.broadcast_to(np.arange(0, 256, 4, np.uint8)[:, None, None], (64, 64, 3))  # darker above
    stored = Image.fromarray(np.ascontiguousarray(ramp)).transpose(Image.Transpose.ROTATE_90)
    stored.getexif()[0x0112] = 6  # what turns it back, by 270 degrees
    pipe, seen = tiny_pipeline(), []
    pipe.vae.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    options = {"num_inference_steps": 2, "method": method, "height": 64, "width": 64}
    made = pipe.refocus(stored, "a mug", [9], **options)  # type: ignore[arg-type]
    assert made.pivot_image is not None and np.array_equal(np.asarray(made.pivot_image), ramp)
    expected = torch.from_numpy(ramp.copy()).movedim(-1, 0)[None] / 127.5 - 1
    torch.testing.assert_close(seen[0].float(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("changed", "says"), [
    ({"photo_level": 31}, "bokeh level must be between 0"), ({"bokeh_targets": []}, "bokeh_targets must be"),
    ({"prompt": 3}, "prompt must be text"), ({"height": 64}, "both height and width"),
    ({"num_grounding_steps": 99}, "at most the 8 steps"),
    ({"bokeh_targets": [5, 20], "photo_level": 9}, "only methods inversion and reference lessen blur"),
    ({"photo_level": 29}, "below level 28"), ({"reuse": 3}, "reuse is for method inversion"),
    ({"method": "inversion", "aperture": "donut"}, "aperture needs method render"),
    ({"method": "inversion", "long_side": 512}, "long_side needs method render"),
    ({"method": "reference"}, "needs a reference adapter, whose folder bokehflux.json"),
    ({"method": "reference", "reuse": 3}, "reuse are for paths to noise"),
    ({"method": "reference", "num_grounding_steps": 1}, "reuse are for paths to noise"),
    ({"method": "inversion", "probe": "straight"}, "probe needs method render"),
    ({"probe": "reference"}, "needs a reference adapter"),
    ({"method": "reference", "focus": "4,4"}, "focus needs method render"),
    ({"method": "magic"}, "method must be"), ({"focus": "48,3"}, "a pixel of 48 x 32"),
    ({"focus": "2m"}, "distances are not known"), ({"focus": "mask"}, "expected a mask"),
    ({"aperture": "none.png"}, "cannot read the photograph none.png"),
    ({"num_inference_steps": 0}, "at least 1"),
])  # fmt: skip
def test_bad_arguments(changed: dict[str, object], says: str) -> None:
    options = {"prompt": "a mug", "bokeh_targets": [30]} | changed
    with pytest.raises(ValueError, match=says):
        tiny_pipeline().refocus(photo(), **options)  # type: ignore[arg-type]


def test_numbers_that_are_none_are_named() -> None:
    pipe = tiny_pipeline()
    pipe.transformer.singles[1].linear2.weight.data[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="single_blocks.1"):
        pipe.refocus(photo(), "a mug", [30], num_inference_steps=2)


def test_photos_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    photo().save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:99])
    for name, says in (
        ("none.png", "it is not there"),
        ("text.png", "cannot"),
        ("half.png", ""),
        (".", "regular"),
    ):
        with pytest.raises(ValueError, match=f"cannot read the photograph .*{says}.*expected one of PNG"):
            read_photo(tmp_path / name)
    whole = read_photo(tmp_path / "whole.png")
    assert whole.image.size == (48, 32) and whole.name == "whole.png" and len(whole.fingerprint) == 32


@pytest.fixture
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder with mug.jpg, where commands load a tiny model."""
    monkeypatch.setattr("bokehflux.pipeline.load.load", lambda *_, **__: tiny_pipeline())
    monkeypatch.chdir(tmp_path)
    photo().save("mug.jpg")


@pytest.mark.usefixtures("at_home")
def test_the_command(capsys: pytest.CaptureFixture) -> None:
    argv = ["refocus", "mug.jpg", "--method", "inversion", "--prompt", "a mug", "--photo-level", "4"]
    assert cli.main([*argv, "--bokeh-targets", "0", "20", "--output", "out"]) == 0
    paths = capsys.readouterr().out.split()
    assert paths == ["out/bokeh-00.0.png", "out/bokeh-20.0.png", "out/sheet.png"], (
        "the photo is not an output"
    )
    recipe = read_recipe(paths[1])
    assert (recipe["photo"], recipe["bokeh_pivot"], recipe["bokeh_level"]) == ("mug.jpg", 4.0, 20.0)
    assert cli.main(["generate", "--config-from", paths[0]]) == 2
    assert "was made by `bokehflux refocus`, which makes it again" in capsys.readouterr().err
    for wrong, says in (
        (["refocus", "none.jpg", "--prompt", "a"], "cannot read the photograph none.jpg: it is not there"),
        (["refocus", "mug.jpg"], "a prompt is needed"),
        ([*argv[:-1], "31"], "a bokeh level must be between 0"),
    ):
        assert cli.main(wrong) == 2
        assert says in (err := capsys.readouterr().err) and err.count("\n") == 1


@pytest.mark.usefixtures("at_home")
def test_a_photograph_is_not_asked_for_less_blur_than_it_has(capsys: pytest.CaptureFixture) -> None:
    argv = ["refocus", "mug.jpg", "--prompt", "a mug", "--photo-level", "21", "--num-inference-steps", "1"]
    assert cli.main(argv) == 0
    names = [Path(line).name for line in capsys.readouterr().out.split()]
    assert names == ["bokeh-25.0.png", "bokeh-30.0.png", "sheet.png"]


@pytest.mark.usefixtures("at_home")
def test_a_disk_needs_room_for_every_level_of_the_photograph(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Not for the two pictures that the model draws at its own size."""
    photo(2048, 2048).save("large.jpg")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=50_000_000))
    monkeypatch.setattr("bokehflux.pipeline.load.load", lambda *_, **__: pytest.fail("it loads"))
    argv = ["refocus", "large.jpg", "--prompt", "a mug", "--bokeh-targets", "8", "20", "28"]
    assert cli.main(argv) == 2
    assert "has 50 MB free, and up to 75 MB are expected" in capsys.readouterr().err


@pytest.mark.usefixtures("at_home")
@pytest.mark.parametrize(("words", "says"), [
    (["--focus", "48,3"], "expected a pixel of 48 x 32, got 48,3"), (["--focus", "2m"], "give a point"),
    (["--focus", "0,0/1,40/9,9"], "expected a pixel of 48 x 32"), (["--focus", "mask"], "expected a mask"),
    (["--focus", "70,3", "--long-side", "64"], "expected a pixel of 64 x 43"),
    (["--long-side", "10"], "at least 64"), (["--aperture", "gone.png"], "cannot read the photograph gone"),
    (["--aperture", "mug.jpg/x.png"], "cannot read"), (["--height", "64"], "both height and width"),
    (["--width", "64", "--method", "inversion"], "both height and width"),
    (["--max-rows", "0"], "max_rows must be at least 1"),
    (["--height", "64", "--width", "64", "--focus", "70,3"], "expected a pixel of 64 x 64"),
])  # fmt: skip
def test_what_a_photograph_lacks_is_said_before_the_model_loads(
    words: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("bokehflux.pipeline.load.load", lambda *_, **__: pytest.fail("it loads"))
    if "--long-side" in words:
        photo(96, 64).save("mug.jpg")
    argv = ["refocus", "mug.jpg", "--prompt", "a mug", "--bokeh-targets", "20", *words]
    assert cli.main(argv) == 2
    assert says in (err := capsys.readouterr().err) and err.count("\n") == 1


def test_a_backend_that_cannot_run_is_refused_before_text_is_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_pipeline()
    monkeypatch.setattr(type(pipe.text), "encode", lambda *_: pytest.fail("it encodes"))
    with pytest.raises(ValueError, match="the Triton attention kernels cannot run: "):
        pipe.generate("a mug", backend="triton")


@pytest.mark.parametrize("level", [27.5, 27.99])
def test_a_photograph_that_is_nearly_as_blurred_as_the_probe(level: float) -> None:
    made = tiny_pipeline().refocus(photo(96, 64), "a mug", [30], photo_level=level, num_inference_steps=1)
    assert len(made.images) == 1


@pytest.mark.parametrize("given", ["mug.jpg", Path("mug.jpg"), None, np.zeros((64, 64, 3), np.uint8), b"0"])
def test_what_is_no_picture_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match="expected a picture that Pillow has opened, got"):
        tiny_pipeline().refocus(given, "a mug", [30])


@pytest.mark.parametrize("options", [{"max_rows": 0}, {"max_rows": -1}, {"max_rows": 1.5}, {"max_rows": True},
                                     {"backend": "cudnn"}, {"backend": ""}, {"vae_tiling": 1},
                                     {"backend": ["auto"]}, {"backend": None}, {"on_step": 3}])  # fmt: skip
def test_options_that_cannot_be_are_refused_where_they_are_made(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Options(**options)
    with pytest.raises(ValueError, match=next(iter(options))):
        tiny_pipeline().generate("a mug", **options)


@pytest.mark.usefixtures("at_home")
def test_memory_that_runs_out_in_the_lens_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Fewer rows do not help there: nothing is tried again, and the photograph is to become smaller."""

    def too_large(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("bokehflux.rendering.lens_map.LensMap.render", too_large)
    argv = ["refocus", "mug.jpg", "--prompt", "a mug", "--bokeh-targets", "20", "--num-inference-steps", "1"]
    assert cli.main(argv) == 2
    said = capsys.readouterr().err
    assert "a photograph's long_side): CUDA out of memory" in said
    assert "even one picture" not in said and "trying again" not in said


def test_a_photograph_that_is_blurred_tells_how_far_it_is(capsys: pytest.CaptureFixture) -> None:
    told: list[tuple[int, int]] = []
    pipe = tiny_pipeline()
    plan = plan_refocus(pipe, photo(), RefocusSettings(prompt="a mug", bokeh_targets=(5.0, 20.0)))
    made = execute(pipe, plan, Options(on_picture=lambda done, total: told.append((done, total))))
    assert told == [(0, 2), (1, 2)] and len(made.images) == 2
    steps: list[int] = []
    pipe.refocus(photo(), "a mug", [20], progress=True, on_step=lambda info: steps.append(info.step))
    assert "\rblurring 0/1 " in capsys.readouterr().err and steps == list(range(8))


@pytest.mark.usefixtures("at_home")
def test_ctrl_c_keeps_the_levels_that_are_blurred(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    real, calls = LensMap.render, []

    def pressed(*given: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(LensMap, "render", pressed)
    argv = ["refocus", "mug.jpg", "--prompt", "a mug", "--num-inference-steps", "1", "--bokeh-targets"]
    assert cli.main([*argv, "5", "15", "25"]) == 130
    said = capsys.readouterr()
    assert said.out.split() == ["results/bokeh-05.0.png", "results/bokeh-15.0.png"]
    assert "; 2 of 3 pictures are finished and kept in results" in said.err
    calls[:] = [1, 1]
    assert cli.main([*argv, "5"]) == 130
    assert "no picture is finished, step 1 of 1 was done" in capsys.readouterr().err


@pytest.mark.usefixtures("at_home")
def test_the_picture_of_an_aperture_is_fingerprinted() -> None:
    """Another picture under the same name is another aperture."""
    argv = ["refocus", "mug.jpg", "--prompt", "a mug", "--num-inference-steps", "1", "--bokeh-targets", "20"]
    hashes = []
    for side in (20, 24):
        photo(side, side).save("iris.png")
        assert cli.main([*argv, "--aperture", "iris.png", "--output", f"out{side}"]) == 0
        recipe = read_recipe(f"out{side}/bokeh-20.0.png")
        assert recipe["file_hashes"] == [["aperture", read_photo(Path("iris.png")).fingerprint]]
        assert Record.from_recipe(recipe).recipe() == recipe
        hashes.append(recipe["file_hashes"])
    assert hashes[0] != hashes[1]
    assert cli.main([*argv, "--output", "plain"]) == 0
    assert read_recipe("plain/bokeh-20.0.png")["file_hashes"] == []


@pytest.mark.usefixtures("at_home")
def test_the_command_goes_on_with_fewer_rows(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried: list[int | None] = []

    def run(model: Any, plan: Any, options: Options) -> Result:
        tried.append(options.max_rows)
        if options.max_rows != 1:
            raise MemoryError("too small")
        return execute(model, plan, options)

    monkeypatch.setattr("bokehflux.app.watched.execute", run)
    argv = ["refocus", "mug.jpg", "--method", "inversion", "--prompt", "a mug", "--bokeh-targets", "0", "20"]
    assert cli.main([*argv, "--num-inference-steps", "2"]) == 0
    assert tried == [None, 1] and read_recipe("results/bokeh-20.0.png")["max_rows"] == 1
    assert "trying again with 1 pictures at a time" in caplog.text


@pytest.mark.usefixtures("at_home")
def test_the_command_keeps_what_is_finished(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def stopped(*args: Any) -> Result:
        made = execute(*args)
        raise Stopped(dataclasses.replace(made, images=made.images[:1]))

    monkeypatch.setattr("bokehflux.app.watched.execute", stopped)
    argv = ["refocus", "mug.jpg", "--method", "inversion", "--prompt", "a mug", "--bokeh-targets", "0", "20"]
    assert cli.main([*argv, "--num-inference-steps", "2"]) == 130
    said = capsys.readouterr()
    assert said.out.split() == ["results/bokeh-00.0.png"]
    assert "; 1 of 2 pictures are finished and kept in results" in said.err


def test_an_early_end_leaves_no_picture_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it decodes for the map of blur is at none of the levels."""

    def stopped(*args: Any, **options: Any) -> Decoded:
        return dataclasses.replace(decode_pictures(*args, **options), stop=KeyboardInterrupt())

    monkeypatch.setattr("bokehflux.pipeline.run.decode_pictures", stopped)
    with pytest.raises(Stopped) as end:
        tiny_pipeline().refocus(photo(), "a mug", [9], num_inference_steps=2)
    assert end.value.result.images == []


def test_rendered_pictures_are_the_photographs_own() -> None:
    """At its own size; at its own level, bit for bit. Two rows go through the network, whatever is asked."""
    pipe, rows = tiny_pipeline(), []

    def count(_: torch.nn.Module, args: tuple[Any, ...]) -> None:
        rows.append(len(args[0]))

    pipe.transformer.img_in.register_forward_pre_hook(count)
    wide = photo(112, 80)
    made = pipe.refocus(wide, "a mug", [4, 9, 20, 30], photo_level=4, aperture="polygon:6", focus="9,9")
    assert sum(rows) == 16 and made.latents.shape[0] == 1
    assert [image.size for image in made.images] == [(112, 80)] * 4
    assert made.pivot_image is not None and made.pivot_image.size == (112, 80)
    assert np.array_equal(np.asarray(made.images[0]), np.asarray(wide))
    assert made.record.settings.numbers()[:2] == (8, 8)
    small = pipe.refocus(wide, "a mug", [9], long_side=64).images[0]
    assert small.size == (64, 46)
    assert pipe.refocus(photo(9000, 16), "a mug", [9], long_side=64).images[0].size == (64, 1)
    assert pipe.refocus(wide, "a mug", [9], height=32, width=48).images[0].size == (48, 32)


@pytest.mark.parametrize(("own", "labels"), [
    (0.0, ["photo 0", "bokeh 8", "bokeh 20"]),
    (12.0, ["bokeh 8", "photo 12", "bokeh 20"]),
    (25.0, ["bokeh 8", "bokeh 20", "photo 25"]),
])  # fmt: skip
def test_the_photograph_has_its_place_on_the_sheet(own: float, labels: list[str]) -> None:
    options: dict[str, Any] = {"photo_level": own, "num_inference_steps": 2, "method": "inversion"}
    tiles = tiny_pipeline().refocus(photo(), "a mug", [8, 20], **options).scene().tiles()
    assert [tile.label for tile in tiles] == labels
    assert [tile.is_pivot for tile in tiles] == [label.startswith("photo") for label in labels]


def through(lens: Lens, blurred: Image.Image) -> list[Image.Image]:
    sharp = photo(96, 64)
    return list(lens.pictures(sharp, lens.found(sharp, blurred, torch.device("cpu"))))


def test_blur_of_the_photograph_and_of_the_lens_add_up_as_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    added: list[float] = []

    def render(_: LensMap, sharp: Tensor, level: float, *__: object) -> Tensor:
        added.append(level)
        return sharp

    monkeypatch.setattr(LensMap, "render", render)
    asked = RefocusSettings(prompt="a mug", bokeh_targets=(5.0, 13.0, 30.0), bokeh_pivot=5.0)
    assert len(through(Lens((96, 64), asked, 5.0), photo(96, 64))) == 3
    assert added == pytest.approx([12.0, math.sqrt(875)]), "nothing at its own level"


def test_the_lens_counts() -> None:
    pipe = tiny_pipeline()

    def pixels(**changed: object) -> np.ndarray:
        return np.asarray(pipe.refocus(photo(96, 64), "a mug", [30], **changed).images[0])  # type: ignore[arg-type]

    plain = pixels()
    assert np.array_equal(plain, pixels())
    for change in ({"focus": "80,10"}, {"aperture": "donut"}, {"highlights": 20.0}, {"photo_level": 20}):
        assert not np.array_equal(plain, pixels(**change)), change


def test_a_scene_that_changed_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """The tiny network draws noise."""
    lens = Lens((96, 64), RefocusSettings(prompt="a mug", bokeh_targets=(20.0,)))
    through(lens, photo(96, 64).transpose(Image.Transpose.ROTATE_180))
    assert "takes a depth map in its place" in caplog.text
    caplog.clear()
    through(lens, photo(96, 64))
    assert not caplog.text


def looking() -> Pipeline:
    """A tiny model with a reference adapter."""
    pipe = tiny_pipeline()
    torch.manual_seed(3)
    return dataclasses.replace(pipe, reference=ReferenceAdapter(ReferenceConfig(rank=4), MMDIT))


def test_a_cpu_in_bfloat16_looks_with_wide_and_narrow_steps() -> None:
    exact = looking()
    narrow = tiny_pipeline(dtype=torch.bfloat16)
    assert exact.reference is not None
    narrow = dataclasses.replace(narrow, reference=copy.deepcopy(exact.reference).bfloat16())
    options = {"method": "reference", "num_inference_steps": 4}
    a, b = (pipe.refocus(photo(), "a mug", [9, 30], **options).latents for pipe in (narrow, exact))  # type: ignore[arg-type]
    assert a.dtype == torch.float32 and 0 < (a - b).norm() / b.norm() < 0.05


@pytest.mark.parametrize("max_rows", [None, 1])
def test_targets_look_at_the_photograph(max_rows: int | None) -> None:
    """It passes the network once, and every step of every level, its own among them, reads what it left."""
    pipe, levels, steps = looking(), (3.0, 9.0, 30.0), 3
    passes: list[int] = []
    pipe.transformer.double_blocks[0].register_forward_pre_hook(lambda _, args: passes.append(len(args[0].x)))
    made = pipe.refocus(
        photo(), "a mug", levels, photo_level=9, method="reference", num_inference_steps=steps,
        guidance_scale=2.0, max_rows=max_rows,
    )  # fmt: skip
    assert passes == [1] + steps * ([4] if max_rows is None else [1, 1, 1, 1])
    usual = RefocusSettings(prompt="a mug", bokeh_targets=levels, method="reference").completed(pipe.defaults)
    assert usual.num_inference_steps == 2 and usual.num_rows == 4
    assert made.pivot_latents is None and made.record.settings.num_grounding_steps == 0
    assert np.array_equal(np.asarray(made.pivot_image), np.asarray(photo()))

    mmdit, text, grid = pipe.transformer, pipe.text.encode(["a mug"]), LatentGrid(height_px=32, width_px=48)
    assert pipe.reference is not None
    pixels = torch.from_numpy(np.array(photo())).movedim(-1, 0)[None] / 127.5 - 1
    guidance, rope = torch.full((1,), 2.0), reference_rope(mmdit, grid, TXT_LENGTH)
    with torch.inference_mode():
        shown = pack(pipe.vae.encode(pixels))
        keys = read_reference(mmdit, pipe.reference, shown, text, BokehCondition.of([9.0]), rope, guidance)
        x = pack(noise(grid, DEFAULT_SEED, torch.float32))
        velocity = denoiser(
            mmdit, text, grid, guidance=2.0, bokeh=BokehCondition.of((9.0, *levels)),
            attention=lambda rows, step: OnReference(keys=keys),
        )  # fmt: skip
        schedule = sigmas(pipe.schedule, steps, grid.num_tokens)
        beside = followed(velocity, straight(shown, x, schedule), schedule)
        expected = euler(beside, x.expand(4, -1, -1), schedule)[1:]
    torch.testing.assert_close(made.latents, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(made.latents[1:2], shown, atol=1e-4, rtol=1e-4)  # its own level
    own = decode_pictures(pipe.vae, made.latents, None, grid, tiled=False).images
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(made.images, own, strict=True))


def test_a_model_that_looks_is_asked_for_the_map_so() -> None:
    """One row beside its own, and lights as bright as its picture shows them; paths to noise on demand."""
    pipe, passes = looking(), list[int]()
    pipe.transformer.double_blocks[0].register_forward_pre_hook(lambda _, args: passes.append(len(args[0].x)))
    made = pipe.refocus(photo(), "a mug", [9, 20])
    settings = made.record.settings
    assert passes == [1, 2, 2] and settings.num_rows == 2 and settings.numbers().grounded_steps == 0
    assert isinstance(settings, RefocusSettings) and settings.probe == "reference"
    assert [image.size for image in made.images] == [photo().size] * 2
    passes.clear()
    for asked in ({"probe": "straight"}, {"num_grounding_steps": 8}):
        straight = pipe.refocus(photo(), "a mug", [9, 20], **asked)  # type: ignore[arg-type]
        assert np.array_equal(straight.images[1], tiny_pipeline().refocus(photo(), "a mug", [20]).images[0])
    assert set(passes) == {2}
    recipe = made.record.recipe()
    assert RefocusSettings.from_recipe(recipe) == settings
    del recipe["probe"]
    assert RefocusSettings.from_recipe(recipe).probe == "straight", "early recipes name none"


def test_everything_about_the_photograph_counts() -> None:
    pipe = looking()

    def latents(shown: Image.Image, **changed: object) -> Tensor:
        options = {"bokeh_targets": [10], "num_inference_steps": 2, "method": "reference"} | changed
        return pipe.refocus(shown, "a mug", **options).latents  # type: ignore[arg-type]

    plain = latents(photo())
    assert torch.equal(plain, latents(photo())), "nothing is drawn"
    others = (
        latents(photo(), bokeh_targets=[20]), latents(photo(), photo_level=12), latents(photo().rotate(180)),
        latents(photo(), guidance_scale=4.0),
    )  # fmt: skip
    assert all(not torch.allclose(plain, other, atol=1e-4) for other in others)


def test_early_recipes_of_refocus_mean_inversion() -> None:
    made = tiny_pipeline().refocus(photo(), "a mug", [9, 30], num_inference_steps=2, focus="9,9")
    recipe = made.record.recipe()
    assert Record.from_recipe(recipe).settings == made.record.settings
    early = {
        key: value for key, value in recipe.items() if key not in ("method", "probe", "focus", "aperture")
    }
    settings = Record.from_recipe(early).settings
    assert isinstance(settings, RefocusSettings) and settings.method == "inversion"
