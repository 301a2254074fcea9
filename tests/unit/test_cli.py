"""The command line, with a stand-in for the pipeline: flags, files, messages and exit codes."""

from __future__ import annotations

import dataclasses
import inspect
import io
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import bokehflux
from bokehflux.app import cli
from bokehflux.configs import Defaults
from bokehflux.pictures.metadata import encode, read_recipe
from bokehflux.pipeline.load import load
from bokehflux.pipeline.memory import Placement
from bokehflux.pipeline.pipeline import Pipeline
from bokehflux.pipeline.provenance import provenance_of
from bokehflux.pipeline.run import Options, Plan, Result
from bokehflux.record import Record
from bokehflux.sampling.samplers import StepInfo
from bokehflux.settings import GenerateSettings, Settings
from tests.tiny import FakeText, NamedSource, tiny_pipeline
from tests.unit.test_load import write_snapshot

ROOT = Path(__file__).resolve().parents[2]
SWEEP = ["generate", "--prompt", "a dog", "--bokeh-targets", "0", "4.2", "4.4", "--bokeh-pivot", "15"]


class Fake:
    """Stands in for loading and for executing: answers with solid pictures, and keeps what was asked."""

    def __init__(self) -> None:
        self.loaded: dict[str, Any] = {}
        self.asked: Settings | None = None
        self.options = Options()
        self.during: Callable[[], None] = lambda: None
        self.pipe = tiny_pipeline()

    def load(self, *args: Any, **kwargs: Any) -> Pipeline:
        self.loaded = inspect.signature(load).bind(*args, **kwargs).arguments
        source = NamedSource(model=str(self.loaded["model"]), adapter=self.loaded["adapter"])
        return dataclasses.replace(self.pipe, source=source)

    def execute(self, model: Pipeline, plan: Plan, options: Options) -> Result:
        self.asked, self.options = plan.settings, options
        self.during()
        assert options.on_step is not None
        for step in range(3):
            options.on_step(
                StepInfo(step=step, num_steps=3, sigma=1 - (step + 1) / 3, latents=torch.zeros(1, 1, 64))
            )
        targets = plan.settings.bokeh_targets or (0.0,)
        for _ in range(plan.settings.num_rows):
            model.vae.decoder.conv_in(torch.zeros(1, 16, 1, 1))
        return Result(
            images=[Image.new("RGB", (32, 32), (0, int(8 * level), 0)) for level in targets],
            pivot_image=Image.new("RGB", (32, 32), "blue") if plan.settings.makes_pivot else None,
            latents=torch.zeros(1, 4, 64),
            pivot_latents=None,
            record=Record(settings=plan.settings, provenance=provenance_of(model)),
        )


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fake:
    stand_in = Fake()
    monkeypatch.setattr("bokehflux.pipeline.load.load", stand_in.load)
    monkeypatch.setattr("bokehflux.app.watched.execute", stand_in.execute)
    monkeypatch.chdir(tmp_path)
    return stand_in


def error_of(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The message of a run that must fail with code 2, one line and nothing on stdout."""
    try:
        code = cli.main(argv)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("bokehflux: error: ") and err.count("\n") == 1, err
    return err


def test_a_sweep_writes_every_picture_and_reports_it(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*SWEEP, "--output", "out"]) == 0
    printed = capsys.readouterr().out.split()
    names = ["bokeh-00.0", "bokeh-04.2", "bokeh-04.4", "pivot-bokeh-15.0", "sheet"]
    assert printed == [str(Path("out", f"{name}.png")) for name in names]
    assert sorted(printed) == sorted(str(path) for path in Path("out").iterdir())
    with Image.open(printed[1]) as image:
        assert image.getpixel((0, 0)) == (0, 33, 0)


def test_every_file_holds_the_settings_of_the_run(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*SWEEP, "--adapter", "ada"]) == 0
    found = [read_recipe(path) for path in capsys.readouterr().out.split()]
    assert [(s["role"], s.get("bokeh_level")) for s in found] == [
        ("target", 0.0), ("target", 4.2), ("target", 4.4), ("pivot", 15.0), ("sheet", None),
    ]  # fmt: skip
    for settings in found:
        assert settings["bokeh_targets"] == [0.0, 4.2, 4.4] and settings["prompt"] == "a dog"
        assert (
            settings["seed"] == 65578
            and settings["adapter"] == "ada"
            and settings["num_inference_steps"] == 5
        )


def test_published_defaults(fake: Fake) -> None:
    assert cli.main(["generate", "--prompt", "p", "--bokeh_targets", "15.0"]) == 0
    published = GenerateSettings(
        prompt="p", bokeh_targets=(15.0,), guidance_scale=3.0, true_cfg=1.0,
        negative_prompt="bad quality, low resolution", seed=65578,
    )  # fmt: skip
    assert fake.asked == published.completed(fake.pipe.defaults)
    assert (fake.options.max_rows, fake.options.vae_tiling) == (None, None)
    assert callable(fake.loaded.pop("on_progress")) and callable(fake.loaded.pop("on_found"))
    assert fake.loaded == {
        "model": "nano", "adapter": None, "loras": [], "device": None, "dtype": None, "memory": "auto",
        "compute": "dtype", "schedule": None,
    }  # fmt: skip
    assert Path("results/bokeh-15.0.png").is_file()


FLAGS = {
    "bokeh_pivot": ("10", 10.0), "num_grounding_steps": ("3", 3), "num_inference_steps": ("7", 7),
    "guidance_scale": ("4.5", 4.5), "true_cfg": ("2.5", 2.5), "negative_prompt": ("a_b", "a_b"),
    "height": ("48", 48), "width": ("64", 64), "seed": ("7", 7),
}  # fmt: skip


@pytest.mark.parametrize("spelling", ["hyphens", "underscores", "equals"])
def test_every_flag_reaches_the_pipeline(fake: Fake, spelling: str) -> None:
    argv = ["generate", "--prompt=--not_a_flag", "--bokeh_target", "0.0", "28"]
    for name, (text, _) in FLAGS.items():
        flag = f"--{name}" if spelling == "underscores" else "--" + name.replace("_", "-")
        argv += [f"{flag}={text}"] if spelling == "equals" else [flag, text]
    assert cli.main(argv) == 0
    assert {name: getattr(fake.asked, name) for name in FLAGS} == {
        n: value for n, (_, value) in FLAGS.items()
    }
    assert fake.asked is not None
    assert fake.asked.prompt == "--not_a_flag" and fake.asked.bokeh_targets == (0.0, 28.0)


def test_model_flags_reach_load(fake: Fake) -> None:
    argv = ["--model", "m_1", "--adapter", "a", "--device", "cpu", "--dtype", "float32", "--memory", "stream"]
    argv += ["--compute", "fp8", "--schedule", "dev"]
    assert cli.main([*SWEEP, *argv, "--lora", "x_1", "--lora", "y", "0.5"]) == 0
    assert callable(fake.loaded.pop("on_progress")) and callable(fake.loaded.pop("on_found"))
    assert fake.loaded == {
        "model": "m_1", "adapter": "a", "loras": [("x_1", 1.0), ("y", 0.5)], "device": "cpu",
        "dtype": "float32", "compute": "fp8", "memory": "stream", "schedule": "dev",
    }  # fmt: skip


@pytest.mark.parametrize("flag", ["--output", "--output_dir", "--output-dir", "--results_dir"])
def test_output_flag_has_the_names_people_know(fake: Fake, flag: str) -> None:
    assert cli.main([*SWEEP, flag, "here_it_is"]) == 0
    assert Path("here_it_is/sheet.png").is_file()


def test_without_levels_one_plain_picture(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "--prompt", "p"]) == 0
    assert fake.asked is not None and fake.asked.bokeh_targets is None
    assert [Path(line).name for line in capsys.readouterr().out.split()] == ["plain.png", "sheet.png"]


def test_a_level_asked_for_twice_is_two_files_and_a_second_run_two_more(fake: Fake) -> None:
    argv = ["generate", "--prompt", "p", "--bokeh-targets", "4", "4", "--output", "out"]
    assert cli.main(argv) == cli.main(argv) == 0
    assert {path.name for path in Path("out").iterdir()} == {
        "bokeh-04.0.png", "bokeh-04.0-2.png", "sheet.png",
        "bokeh-04.0-run2.png", "bokeh-04.0-2-run2.png", "sheet-run2.png",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["generate"], "--prompt"),
        (["generate", "--prompt"], "--prompt"),
        (["generate", "--prompt", "p", "--bokeh-targets"], "--bokeh-targets"),
        (["generate", "--prompt", "p", "--bokeh-targets", "blurry"], "blurry"),
        (["generate", "--prompt", "p", "--bokeh-targets", "4", "31"], "31"),
        (["generate", "--prompt", "p", "--bokeh-targets", "-1"], "-1"),
        (["generate", "--prompt", "p", "--bokeh-targets", "nan"], "nan"),
        (["generate", "--prompt", "p", "--bokeh-targets", "4", "--bokeh-pivot", "30.1"], "30.1"),
        (
            ["generate", "--prompt", "p", "--bokeh-targets", "4", "--num_grounding_steps", "24"],
            "bokeh_pivot",
        ),
        (["generate", "--prompt", "p", "--height", "15"], "16"),
        (["generate", "--prompt", "p", "--width", "-512"], "16"),
        (["generate", "--prompt", "p", "--dtype", "int8"], "int8"),
        (["generate", "--prompt", "p", "--seed", str(2**64)], "seed must be at least"),
        (["generate", "--prompt", "p", "--seed", "-1"], "`random` on the command line"),
        (["generate", "--prompt", "x" * 20_001], "20001 characters"),
        (["generate", "--prompt", "caf\udce9"], "not valid Unicode"),
        (["generate", "--prompt", "p", "--output", "nul\0"], "embedded null"),
        (["generate", "--prompt", "p", "--guidance-scale", "inf"], "guidance_scale"),
        (["generate", "--prompt", "p", "--num-inference-steps", "0"], "num_inference_steps"),
        (["generate", "--prompt", "p", "--bokeh-pivot", "3"], "bokeh_targets"),
        (["generate", "--prompt", "p", "--lora", "a", "b"], "'b'"),
        (["generate", "--prompt", "p", "--lora", "a", "nan"], "finite"),
        (["generate", "--prompt", "p", "--lora", "a", "1", "b", "2"], "repeat the flag"),
        (["generate", "--prompt", "p", "--memory", "small"], "small"),
        (["generate", "--prompt", "p", "--max-rows", "0"], "max_rows must be at least 1"),
        (["generate", "--prompt", "p", "--format", "tiff"], "tiff"),
        (["generate", "--prompt", "p", "--preview", "x.txt"], "ends in"),
        (["generate", "--prompt", "p", "--preview", "no/x.png"], "no folder no"),
        (["generate", "--prompt", "p", "--preview", "x.png", "--preview-every", "0"], "--preview-every"),
        (["generate", "--prompt", "p", "--preview-every", "3"], "needs --preview"),
        (["generate", "--config-from", "no.png"], "cannot read no.png"),
        (["sweep"], "--prompt"),
        (["sweep", "--prompt", "p", "--prompts-file", "f"], "not allowed with"),
        (["sweep", "--prompts-file", "no.txt"], "cannot read prompts from no.txt"),
        (["sweep", "--prompt", "p", "--seeds", "1", "x"], "'x'"),
        (["sweep", "--prompt", "p", "--bokeh-targets", "3", "33"], "33"),
        (["info"], "IMAGE"),
        (["info", "no.png"], "cannot read no.png"),
        (["doctor", "--fast"], "--fast"),
        (["generate", "--prompt", "p", "--unknown", "1"], "--unknown"),
        (["generate", "--prompt", "p", "--bokeh-targts", "1"], "did you mean --bokeh-targets?"),
        (["refocus", "p.png", "--true-cfg", "2"], "--true-cfg 2 (a flag of generate, sweep, eval)"),
        (["genrate"], "did you mean generate?"),
        (["generate", "--prompt", "p", "--size", "48x15"], "height must be at least 16"),
        (["generate", "--prompt", "p", "--size", "48x"], "--size: expected 768x512"),
        (["generate", "--prompt", "p", "--size=x48"], "--size: expected 768x512"),
        (["generate", "--prompt", "p", "--size"], "or one number, got ''"),
        (["generate", "--prompt", "p", "--size", "4.5"], "or one number, got '4.5'"),
        (["train", "--config", "gone.toml", "--output", "x"], "cannot read settings from gone.toml: No such"),
        (["sweep", "--prompt", "p", "--shard", "5/4"], "expected I/N"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_loaded(
    fake: Fake, capsys: pytest.CaptureFixture[str], argv: list[str], says: str
) -> None:
    assert says in error_of(argv, capsys)
    assert fake.loaded == {} and list(Path().iterdir()) == []


def test_an_unwritable_output_is_found_before_the_model_is_loaded(
    fake: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").write_text("")
    assert "cannot write to output folder file" in error_of([*SWEEP, "--output", "file"], capsys)
    assert fake.loaded == {}


@pytest.mark.parametrize(("argv", "says"), [
    (["--levels", "3"], "bokeh_targets need an adapter"),
    (["--levels", "3", "--pivot", "9", "--grounding-steps", "9"], "num_grounding_steps must be at most the"),
])  # fmt: skip
def test_what_the_model_cannot_serve_is_refused_before_its_weights_are_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    says: str,
) -> None:
    with_adapter = "adapter" not in says
    write_snapshot(
        tmp_path / "model", card=Defaults(num_inference_steps=5, height_px=32, width_px=32, txt_length=8)
    )
    if not with_adapter:
        shutil.rmtree(tmp_path / "model" / "adapter")
        path = tmp_path / "model" / "bokehflux.json"
        kept = {name: value for name, value in json.loads(path.read_text()).items() if name != "adapter"}
        path.write_text(json.dumps(kept))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bokehflux.weights.files.checkpoint.Checkpoint.read", lambda *_: pytest.fail("read"))
    assert cli.main(["generate", "--prompt", "p", "--model", "model", *argv]) == 2
    assert says in capsys.readouterr().err


def test_what_the_pipeline_refuses_is_one_line(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse() -> None:
        raise ValueError("first line\n  second line")

    fake.during = refuse
    assert "first line second line" in error_of(SWEEP, capsys)


@pytest.mark.parametrize("device", ["cuda:99", "toaster"])
def test_devices_that_are_not_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert device in error_of([*SWEEP, "--device", device], capsys)


@pytest.mark.parametrize(("model", "lacks"), [("no", False), ("some/no", False), (".", True)])
def test_a_model_that_is_not_there_is_one_line_and_one_for_each_place(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    model: str, lacks: bool,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", "hub")
    monkeypatch.delenv("BOKEHFLUX_MODELS", raising=False)
    assert cli.main([*SWEEP, "--model", model]) == 2
    out, err = capsys.readouterr()
    first, *listed = err.splitlines()
    assert out == ""
    assert first == f"bokehflux: error: no complete model {model} found; bundled with bokehflux: nano"
    assert all(line.startswith("  - ") for line in listed)
    assert any(line.startswith(f"  - looked in {model}") for line in listed)
    assert any(line == "  - looked in hub, the Hugging Face cache, for some/no: nothing there"
               for line in listed) == (model == "some/no")  # fmt: skip
    assert any("not found:" in line for line in listed) == lacks, "where nothing is, all lacks"


def test_a_list_cannot_hide_what_rules_a_terminal(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse() -> None:
        raise ValueError("two\nthings\n  - a\x1b[2J\n  b\n  - c")

    fake.during = refuse
    assert cli.main(SWEEP) == 2
    assert capsys.readouterr().err == "bokehflux: error: two things\n  - a\\x1b[2J b\n  - c\n"


class UnknownWords(FakeText):
    """Text encoders that lack some words."""

    def __init__(self, words: list[str]) -> None:
        super().__init__(torch.float32)
        object.__setattr__(self, "words", words)

    def unknown_words(self, prompt: str) -> list[str]:
        return self.words


@pytest.mark.parametrize(
    ("unknown", "says"),
    [
        ([], []),
        (["Mars"], ["nano draws a few things, and does not know 'Mars': expect a picture without them"]),
        (
            ["a\x1bb", *"ABCDEFGHI"],
            ["nano draws a few things, and does not know 'a\\x1bb', 'A', 'B', 'C', 'D', 'E', 'F', 'G' "
             "and 2 more: expect a picture without them"],
        ),
    ],
)  # fmt: skip
def test_words_that_the_model_does_not_know_are_named_once_a_prompt(
    fake: Fake, caplog: pytest.LogCaptureFixture, unknown: list[str], says: list[str]
) -> None:
    fake.pipe = dataclasses.replace(fake.pipe, text=UnknownWords(unknown))
    assert cli.main([*SWEEP]) == 0
    assert [record.getMessage() for record in caplog.records] == says
    caplog.clear()
    assert cli.main(["sweep", "--prompt", "p", "--seeds", "1", "2", "--bokeh-targets", "3"]) == 0
    assert [record.getMessage() for record in caplog.records] == says


def test_a_size_that_is_not_the_models_own_is_said_once(fake: Fake, caplog: pytest.LogCaptureFixture) -> None:
    own = fake.pipe.defaults
    for width, says in ((own.width_px, 0), (own.width_px + 16, 1)):
        caplog.clear()
        size = ["--size", f"{width}x{own.height_px}"]
        assert cli.main(["sweep", "--prompt", "p", "--seeds", "1", "2", "--bokeh-targets", "3", *size]) == 0
        said = [record.getMessage() for record in caplog.records]
        assert said == [f"nano knows pictures of {own.width_px} x {own.height_px} only: "
                        f"expect less of {width} x {own.height_px}"] * says  # fmt: skip


def test_broken_weights_are_one_line(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    def nan() -> None:
        raise FloatingPointError("NaN in step 3\n of double_blocks.7")

    fake.during = nan
    assert cli.main(SWEEP) == 1
    assert capsys.readouterr().err == "bokehflux: error: NaN in step 3 of double_blocks.7\n"


def test_info_shows_the_recipe(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*SWEEP, "--output", "out"]) == 0
    capsys.readouterr()
    assert cli.main(["info", "out/bokeh-04.2.png"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"prompt: a dog", "bokeh_level: 4.2", "model: nano", "torch: " + torch.__version__} <= set(lines)


def test_inspect_describes_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert "no_such_file" in error_of(["inspect", str(tmp_path / "no_such_file.safetensors")], capsys)
    monkeypatch.setattr("bokehflux.weights.describe.describe", lambda path: f"{path} is a file")
    assert cli.main(["inspect", "x.safetensors"]) == 0
    assert capsys.readouterr().out == "x.safetensors is a file\n"


def test_fetch_downloads_a_revision_and_prints_its_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "bokehflux.app.fetch.fetch", lambda name, *, patterns, revision: Path("cache", name, revision)
    )
    assert cli.main(["fetch", "flux-dev"]) == cli.main(["fetch", "flux-dev", "--revision", "v2"]) == 0
    assert capsys.readouterr().out.split() == ["cache/flux-dev/main", "cache/flux-dev/v2"]


def test_a_full_disk_is_one_line(
    fake: Fake, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bokehflux.pictures.files.os.fsync", full)
    assert cli.main([*SWEEP, "--output", "out"]) == 1
    said = "bokehflux: error: [Errno 28] No space left on device in out; 0 of 5 files are kept\n"
    assert capsys.readouterr().err == said and list(Path("out").iterdir()) == []


def test_a_disk_that_fills_up_keeps_what_fits(
    fake: Fake, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, written = os.fsync, []

    def full(descriptor: int) -> None:
        written.append(1)
        if len(written) > 2:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr("bokehflux.pictures.files.os.fsync", full)
    assert cli.main([*SWEEP, "--output", "out"]) == 1
    assert "; 2 of 5 files are kept" in capsys.readouterr().err
    assert sorted(path.name for path in Path("out").iterdir()) == ["bokeh-00.0.png", "bokeh-04.2.png"]


@pytest.mark.parametrize(("name", "says"), [
    ("file", "file is a file, and a folder was expected"), ("file/below", "file is a file, and a folder"),
    ("dangling", "dangling is a link to nowhere, which is not there"),
])  # fmt: skip
def test_an_output_that_is_not_a_folder_is_named(
    fake: Fake, capsys: pytest.CaptureFixture[str], name: str, says: str
) -> None:
    Path("file").write_text("x")
    Path("dangling").symlink_to("nowhere")
    assert says in error_of([*SWEEP, "--output", name], capsys)


def test_a_disk_without_room_is_found_before_the_model_is_loaded(
    fake: Fake, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
    assert "output folder out has 0 MB free" in error_of([*SWEEP, "--output", "out"], capsys)
    assert fake.loaded == {}


def test_ctrl_c_ends_in_one_line(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    fake.during = interrupt
    assert cli.main([*SWEEP, "--output", "out"]) == 130
    out, err = capsys.readouterr()
    assert (out, err) == ("", "bokehflux: interrupted\n") and list(Path("out").iterdir()) == []


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_other_signals_end_like_ctrl_c(fake: Fake, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_DFL)
    fake.during = lambda: os.kill(os.getpid(), number)
    try:
        assert cli.main([*SWEEP, "--output", "out"]) == 128 + number
        assert signal.getsignal(number) is signal.SIG_DFL
        assert capsys.readouterr().err == "bokehflux: interrupted\n"
        signal.signal(number, signal.SIG_IGN)
        assert cli.main([*SWEEP, "--output", "out"]) == 0, "nohup"
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize(("spelling", "wanted"), [
    (["--steps", "7"], {"num_inference_steps": 7}), (["--guidance", "4"], {"guidance_scale": 4.0}),
    (["--pivot", "9"], {"bokeh_pivot": 9.0}), (["--size", "64x48"], {"width": 64, "height": 48}),
    (["--size=48"], {"width": 48, "height": 48}), (["--size", "64\u00d748"], {"width": 64, "height": 48}),
    (["--levels", "3,8", "28"], {"bokeh_targets": (3.0, 8.0, 28.0)}),
    (["--bokeh-targets", "0,8,28"], {"bokeh_targets": (0.0, 8.0, 28.0)}),
])  # fmt: skip
def test_flags_as_people_type_them(fake: Fake, spelling: list[str], wanted: dict[str, Any]) -> None:
    assert cli.main([*SWEEP, *spelling]) == 0
    assert {name: getattr(fake.asked, name) for name in wanted} == wanted


def test_a_seed_may_be_random(fake: Fake) -> None:
    seeds = []
    for _ in range(2):
        assert cli.main([*SWEEP, "--seed", "random"]) == 0
        assert isinstance(fake.asked, GenerateSettings)
        seeds.append(fake.asked.seed)
    assert seeds[0] != seeds[1]


@pytest.mark.parametrize(("prompt", "says"), [
    ("a ball <lora:style:0.8>", "<lora:style:0.8> is read as words; a LoRA is loaded by --lora style 0.8"),
    ("a (red:1.3) ball", "(red:1.3) is read as words: prompts have no weights here"),
    ("a ball (red) at 3:20", None),
])  # fmt: skip
def test_what_other_programs_read_in_prompts_gets_a_hint(
    fake: Fake, caplog: pytest.LogCaptureFixture, prompt: str, says: str | None
) -> None:
    assert cli.main(["generate", "--prompt", prompt]) == 0
    assert [record.getMessage() for record in caplog.records] == ([] if says is None else [says])


@pytest.mark.parametrize("argv", [[], ["help"], ["help", "sweep"]])
def test_help_without_dashes(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 0
    assert ("prompts.jsonl" if argv[1:] else "refocus") in capsys.readouterr().out


MODULE = [sys.executable, "-m", "bokehflux"]
QUICK = [
    "generate",
    "--prompt",
    "a red ball",
    "--num-inference-steps",
    "1",
    "--size",
    "32",
    "--output",
    "out",
]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("lost", ["stdout=/dev/full", "stderr=/dev/full", "stdout=pipe", "both closed"])
def test_streams_that_are_lost_do_not_end_the_work(tmp_path: Path, lost: str) -> None:
    """Pictures are made whoever reads their names."""
    shell = {
        "stdout=/dev/full": 'exec "$@" >/dev/full',
        "stderr=/dev/full": 'exec "$@" 2>/dev/full >/dev/null',
        "stdout=pipe": '"$@" | true; exit ${PIPESTATUS[0]}',
        "both closed": 'exec "$@" >&- 2>&-',
    }[lost]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", shell, "bash", *MODULE, *QUICK], cwd=tmp_path, env=env)
    assert done.returncode == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"plain.png", "sheet.png"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_what_stderr_did_not_take_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or Python 3.14 ends with 120, whatever `main` returned: its own flush at the end fails again."""
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert cli.main(["info", "no.png"]) == 2
        full.flush()


@pytest.mark.parametrize("encoding", ["cp1252", "cp932", "ascii"])
def test_letters_that_a_stream_cannot_show_are_escaped(tmp_path: Path, encoding: str) -> None:
    settings = GenerateSettings(prompt="a mug \U0001f37a \u0444")
    path = tmp_path / "x.png"
    path.write_bytes(encode(Image.new("RGB", (8, 8)), settings.recipe()))
    env = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*MODULE, "info", str(path)], env=env, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"prompt: a mug \\U0001f37a" in done.stdout


def test_info_as_json(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*SWEEP, "--output", "out"]) == 0
    capsys.readouterr()
    assert cli.main(["info", "--json", "out/bokeh-04.2.png"]) == 0
    assert json.loads(capsys.readouterr().out) == read_recipe("out/bokeh-04.2.png")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_only_when_somebody_watches(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(SWEEP) == 0
    assert capsys.readouterr().err == ""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert cli.main(SWEEP) == 0
    lines = [line.strip() for line in terminal.getvalue().replace("\n", "\r").split("\r") if line.strip()]
    assert lines[:2] == ["loading nano", "encoding"]
    assert [line.split()[:2] for line in lines[2:]] == [
        *(["step", f"{i}/3"] for i in (1, 2, 3)), *(["decoding", f"{i}/4"] for i in range(4)),
    ]  # fmt: skip
    assert all(line.endswith(" left") for line in [*lines[2:5], *lines[6:]])
    assert terminal.getvalue().endswith("\n"), "what is printed next begins on a line of its own"


@pytest.mark.parametrize(("memory", "says"), [
    ("auto", "bokehflux: memory mode offload, chosen from free memory\n"), ("offload", ""),
])  # fmt: skip
def test_the_memory_mode_that_was_chosen_is_said(
    fake: Fake, memory: str, says: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    placement = Placement(mode="offload", device=torch.device("cuda"))
    fake.pipe = dataclasses.replace(fake.pipe, memory=placement)
    monkeypatch.setattr("bokehflux.pipeline.provenance.device_name", lambda _: "a GPU")
    monkeypatch.setattr("bokehflux.pipeline.provenance.attention", lambda *_: "triton")
    assert cli.main([*SWEEP, "--memory", memory]) == 0
    assert capsys.readouterr().err == says


@pytest.mark.parametrize(
    ("guidance", "cfg", "said"), [("3", "4", True), ("1", "4", False), ("3", "1", False)]
)
def test_two_guidances_at_once_are_noted(
    fake: Fake, guidance: str, cfg: str, said: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*SWEEP, "--guidance-scale", guidance, "--true-cfg", cfg]) == 0
    note = "bokehflux: --guidance-scale 3 and --true-cfg 4 add up; if pictures look burnt, lower one\n"
    assert capsys.readouterr().err == (note if said else "")


@pytest.mark.parametrize("error", [MemoryError("the GPU is out of memory; try less"), MemoryError()])
def test_out_of_memory_at_loading_is_one_line(
    fake: Fake, error: MemoryError, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("bokehflux.pipeline.load.load", full)
    assert cli.main(SWEEP) == 1
    err = capsys.readouterr().err
    assert err == f"bokehflux: error: {str(error) or 'out of memory'}\n" and err.count("\n") == 1


def test_version_and_help_do_not_load_torch() -> None:
    for flag, expected in (("--version", f"bokehflux {bokehflux.__version__}"), ("--help", "generate")):
        code = (
            "import sys; from bokehflux.app.cli import main\n"
            f"try: main(['{flag}'])\n"
            "except SystemExit as stop: assert stop.code == 0\n"
            "assert 'torch' not in sys.modules"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and expected in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("argv", "targets", "grounded"),
    [
        (["--bokeh_target", "15.0"], [15.0], None),
        (
            ["--bokeh_target", "0.0", "4.0", "8.0", "--bokeh_pivot", "15.0", "--num_grounding_steps", "24"],
            [0.0, 4.0, 8.0],
            24,
        ),
    ],
)
def test_published_commands_run_unchanged(
    fake: Fake,
    monkeypatch: pytest.MonkeyPatch,
    argv: list[str],
    targets: list[float],
    grounded: int | None,
) -> None:
    monkeypatch.setattr(sys, "argv", ["inference_flux.py", "--prompt", "a well-loved book", *argv])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "scripts" / "inference_flux.py"), run_name="__main__")
    assert stop.value.code == 0
    assert fake.asked is not None and fake.asked.bokeh_targets == tuple(targets)
    assert fake.asked.numbers()[:2] == (30, grounded or 0)


WORDS = st.sampled_from([
    "generate", "sweep", "info", "doctor", "--prompt", "--seed", "--seeds", "--bokeh-targets",
    "--bokeh_pivot", "--num-grounding-steps", "--lora", "--max-rows", "--preview", "--config-from",
    "--prompts-file", "--output", "--device", "--format", "--memory", "a dog", "0", "-1", "31", "nan",
    "1e999", "9" * 400, "", "-", "--", "=", "--=", "--seed=", "x.png", "../x", "\0", "caf\u00e9", "\udce9",
    "@x", "%s", "-h",
])  # fmt: skip


@given(first=st.sampled_from(["generate", "sweep", "info"]), rest=st.lists(WORDS, max_size=7))
def test_no_command_line_ends_in_a_traceback(
    first: str, rest: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    pipeline = Fake()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("cli"))
        patch.setattr("bokehflux.pipeline.load.load", pipeline.load)
        patch.setattr("bokehflux.app.watched.execute", pipeline.execute)
        patch.setattr("bokehflux.app.doctor.report", lambda: ["well"])
        try:
            assert cli.main([first, *rest]) in (0, 1, 2)
        except SystemExit as stop:
            assert stop.code in (0, 2)
