"""Every flag of every command changes what comes out, shown with a whole (tiny, random) pipeline."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bokehflux.app import cli
from bokehflux.app.arguments import parse, parsers
from bokehflux.app.fetch import TOKENIZERS_ONLY
from bokehflux.models.fp8 import quantize_mmdit
from bokehflux.models.tiny_decoder import TinyDecoder
from bokehflux.pictures.metadata import read_recipe
from bokehflux.pipeline.pipeline import Pipeline
from bokehflux.weights.files.write import save as write
from bokehflux.weights.find.resolve import ModelFiles
from tests.tiny import NamedSource, tiny_pipeline
from tests.unit.test_controls import adapter

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BASE = {
    "generate": ["--prompt", "a cup", "--bokeh-targets", "0", "20", "--bokeh-pivot", "10"],
    "sweep": ["--prompt", "a cup", "--bokeh-targets", "0", "20", "--num-inference-steps", "2"],
    "refocus": ["photo.jpg", "--prompt", "a cup", "--bokeh-targets", "0", "20", "--method", "inversion"],
}
COMMON: dict[str, list[str]] = {
    "--prompt": ["a dog"],
    "--bokeh-targets": ["0", "30"],
    "--bokeh-pivot": ["25"],
    "--num-grounding-steps": ["1"],
    "--num-inference-steps": ["3"],
    "--guidance-scale": ["5"],
    "--true-cfg": ["2.5"],
    "--negative-prompt": ["a cat"],
    "--height": ["48"],
    "--width": ["64"],
    "--max-sequence-length": ["3"],
    "--reuse": ["2"],
    "--pivot-steps": ["grounded"],
    "--controls": ["focus=far", "aperture=donut"],
    "--max-rows": ["1"],
    "--vae-tiling": ["on"],
    "--model": ["other"],
    "--vae": ["ae.safetensors"],
    "--clip": ["clip_l.safetensors"],
    "--t5": ["t5xxl.safetensors"],
    "--tokenizers": ["snapshot"],
    "--adapter": ["ada"],
    "--lora": ["style.safetensors", "0.5"],
    "--schedule": ["schnell"],
    "--memory": ["stream"],
    "--device": ["cpu:0"],
    "--dtype": ["bfloat16"],
    "--compute": ["fp8"],
    "--output": ["elsewhere"],
    "--format": ["webp"],
    "--c2pa": ["chain.pem", "leaf.key"],
    "--preview": ["preview.png"],
    "--preview-every": ["5"],
    "--preview-vae": ["taef1_decoder.safetensors"],
    "--config-from": ["earlier.png"],
}
REFOCUS = (
    "--prompt", "--bokeh-targets", "--num-grounding-steps", "--num-inference-steps", "--guidance-scale",
    "--max-rows", "--vae-tiling", "--model", "--vae", "--clip", "--t5", "--tokenizers", "--adapter", "--lora",
    "--memory", "--device", "--dtype", "--compute", "--output", "--format", "--max-sequence-length", "--c2pa",
    "--schedule", "--reuse",
)  # fmt: skip
LENS = {"--focus": ["40,5", "far"], "--aperture": ["donut"], "--highlights": ["20"]}
FLAGS = {
    "refocus": {flag: COMMON[flag] for flag in REFOCUS}
    | LENS
    | {"--method": ["render"], "--long-side": ["64"], "--probe": ["reference"]}
    | {"--photo-level": ["9"], "--height": ["48", "--width", "48"], "--width": ["64", "--height", "32"]},
    "generate": COMMON | LENS | {"--seed": ["3"]},
    "sweep": COMMON
    | LENS
    | {"--seeds": ["3", "4"], "--prompts-file": ["prompts.txt"], "--shard": ["1/2", "--seeds", "1", "2"]},
}
CASES = [(command, flag) for command, flags in FLAGS.items() for flag in flags]
# What a flag needs beside it to have a meaning at all.
NEEDS = {
    "--negative-prompt": ["--true-cfg", "2"],
    "--preview-every": ["--preview", "preview.png"],
    "--preview-vae": ["--preview", "preview.png"],
    "--reuse": ["--num-inference-steps", "8"],
    "--long-side": ["--method", "render"],
    "--probe": ["--method", "render"],
}
TINY = {
    kind: dataclasses.replace(tiny_pipeline(dtype=dtype), controls=adapter().to(dtype))
    for kind, dtype in (DTYPES | {"fp8": torch.float32}).items()
}
quantize_mmdit(TINY["fp8"].transformer)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """A folder of its own, the tiny pipeline for a model, and what `load` was asked for."""
    loaded: dict[str, Any] = {}

    def load(
        model: str | ModelFiles, *, adapter: Any, loras: Any, device: Any, dtype: Any, compute: str,
        memory: str, schedule: Any, on_found: Any, on_progress: Any,
    ) -> Pipeline:  # fmt: skip
        loaded.update(model=model, adapter=adapter, loras=loras, device=device, dtype=dtype, memory=memory)
        loaded.update(compute=compute, schedule=schedule)
        parts = {}
        if isinstance(model, ModelFiles):
            parts = {name: str(path) for name, path in model.files.items()}
        name = parts.pop("transformer", str(model))
        source = NamedSource(model=name, parts=parts, adapter=adapter, loras=tuple(loras))
        return dataclasses.replace(TINY[compute if compute == "fp8" else dtype or "float32"], source=source)

    monkeypatch.setattr("bokehflux.pipeline.load.load", load)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    write("taef1_decoder.safetensors", TinyDecoder(16).state_dict())
    texture = np.random.default_rng(0).integers(0, 256, (48, 72, 3), np.uint8)  # that shows blur
    Image.fromarray(texture).save("photo.jpg", quality=95)
    Path("prompts.txt").write_text("a cup\n# no prompt\n\na tree\n")
    assert cli.main(["generate", "--prompt", "a boat", "--bokeh-targets", "7", "--output", "."]) == 0
    Path("bokeh-07.0.png").rename("earlier.png")
    Path("sheet.png").unlink()
    return loaded


def outcome(argv: list[str], world: dict[str, Any]) -> dict[str, Any]:
    """All that a run leaves: the pixels of its pictures by path, and what was loaded."""
    before = set(Path().rglob("*"))
    assert cli.main(argv) == 0
    made = sorted(path for path in set(Path().rglob("*")) - before if path.is_file())
    left: dict[str, Any] = {"loaded": dict(world)}
    for path in made:
        if path.suffix in (".png", ".webp", ".jpg"):
            with Image.open(path) as image:
                left[str(path)] = (image.size, image.convert("RGB").tobytes())
        path.unlink()
    return left


@pytest.mark.parametrize(("command", "flag"), CASES)
def test_a_flag_changes_what_comes_out(
    world: dict[str, Any], command: str, flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = [command, *BASE[command], *NEEDS.get(flag, [])]
    if flag in LENS:
        own = [] if flag == "--highlights" else ["--aperture", "polygon:3"]
        base += ["--method", "render"] if command == "refocus" else ["--pivot", "0", *own]
    if flag in ("--prompt", "--config-from", "--prompts-file"):  # these replace the prompt
        base = [command, *base[3:]] if flag == "--prompts-file" else base
    if flag == "--config-from":
        with_flag = outcome([command, flag, *FLAGS[command][flag]], world)
        assert with_flag != outcome(base, world)
        return
    if flag == "--max-rows":
        batches = rows_of(base), rows_of([*base, flag, *FLAGS[command][flag]])
        assert batches[0] > batches[1] == 1
        return
    if flag == "--vae-tiling":  # pictures are the same: what it is for is memory
        made = 2 if command == "refocus" else 3  # a photograph is not decoded
        assert [bands_of([*base, flag, how]) for how in ("auto", "off", "on")] == [0, 0, made]
        return
    if flag == "--c2pa":  # `test_credentials` looks into the files
        signed: list[str] = []
        monkeypatch.setattr(
            "bokehflux.pictures.credentials.signer", lambda *_: lambda data, kind: signed.append(kind) or data
        )
        assert cli.main(base) == 0 and not signed
        assert cli.main([*base, "--output", "other", flag, *FLAGS[command][flag]]) == 0 and signed
        return
    if flag == "--probe":  # `test_refocus` has a model that can look
        assert cli.main([*base, flag, *FLAGS[command][flag]]) == 2
        return
    if flag == "--preview-every":
        assert previews_of([*base, flag, "2"]) < previews_of(base)
        return
    reference = [*base, "--prompt", "a cup"] if flag == "--prompts-file" else base
    assert outcome([*base, flag, *FLAGS[command][flag]], world) != outcome(reference, world)


@pytest.mark.parametrize("command", BASE)
def test_no_flag_is_left_out_above(command: str) -> None:
    """A new flag needs a line in the table, and a difference that it makes."""
    actions = parsers()[1][command]._actions
    flags = [a.option_strings for a in actions if not isinstance(a, argparse._HelpAction)]
    known = {strings[0] for strings in flags if strings}
    started = {"--gpus", "--split"} if command != "refocus" else set()  # in test_processes
    assert known - started == set(FLAGS[command]) and started <= known


@pytest.mark.parametrize("command", BASE)
def test_the_same_flags_give_the_same(world: dict[str, Any], command: str) -> None:
    """Without this the test above would prove nothing."""
    assert outcome([command, *BASE[command]], world) == outcome([command, *BASE[command]], world)


@pytest.mark.parametrize("command", BASE)
def test_a_recipe_too_long_for_jpeg_is_refused_before_the_model_is_loaded(
    world: dict[str, Any], command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    world.clear()
    argv = [command, *BASE[command], "--prompt", "猫" * 15_000]
    assert cli.main([*argv, "--format", "jpeg"]) == 2 and not world
    assert "the recipe is too long for a JPEG file" in capsys.readouterr().err
    assert cli.main([*argv, "--format", "webp"]) == 0


@pytest.mark.parametrize("command", BASE)
@pytest.mark.parametrize("word", ["", ","])
def test_levels_that_are_none_are_refused(
    world: dict[str, Any], command: str, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An empty variable of a shell is not a wish for the usual levels."""
    assert cli.main([command, *BASE[command], "--bokeh-targets", word]) == 2
    assert "bokeh_targets must be a sequence of 1 to 1000 levels" in capsys.readouterr().err


def test_loras_that_are_given_replace_those_of_a_recipe(world: dict[str, Any]) -> None:
    made = ["generate", "--prompt", "a cup", "--lora", "old", "0.5", "--lora", "more", "--output", "first"]
    assert cli.main(made) == 0
    again = ["generate", "--config-from", "first/plain.png", "--output", "second"]
    assert cli.main(again) == 0 and world["loras"] == [("old", 0.5), ("more", 1.0)]
    assert cli.main([*again, "--lora", "new", "--lora", "newer", "2"]) == 0
    assert world["loras"] == [("new", 1.0), ("newer", 2.0)]


FETCH = {"--tokenizers-only": [], "--revision": ["v2"]}


@pytest.mark.parametrize("flag", FETCH)
def test_flags_of_fetch_change_what_is_asked_for(monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr("bokehflux.app.fetch.fetch", lambda name, **how: asked.append(how))
    assert cli.main(["fetch", "flux-dev"]) == cli.main(["fetch", "flux-dev", flag, *FETCH[flag]]) == 0
    plain = {"patterns": None, "revision": "main"}
    changed = {"--tokenizers-only": {"patterns": TOKENIZERS_ONLY}, "--revision": {"revision": "v2"}}
    assert asked == [plain, plain | changed[flag]]


OTHERS = ["render", "eval", "info", "doctor", "inspect", "fetch", "exif", "annotate", "latents", "train"]


def test_no_command_is_left_out_here() -> None:
    assert parsers()[1].keys() == cli.COMMANDS.keys() == {*BASE, *OTHERS}
    assert {word for action in parsers()[0]._actions for word in action.option_strings} == {
        "-h", "--help", "--version",
    }  # fmt: skip


def test_training_refuses_a_device_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bokehflux.training.recipes.adapter.AdapterRecipe.read", lambda *_: None)
    monkeypatch.setattr("bokehflux.training.recipes.run.dry_run", lambda *_, **__: [])
    for device in ("foo", "cuda:99"):
        assert cli.main(["train", "--config", "x.toml", "--output", "out", "--device", device]) == 2
        assert f"error: --device {device} cannot be used: " in capsys.readouterr().err


@pytest.mark.parametrize("command", OTHERS)
def test_the_other_commands_have_no_other_flags(command: str) -> None:
    flags = {word for action in parsers()[1][command]._actions for word in action.option_strings}
    own = {
        "train": {"--config", "--set", "--output", "--resume", "--dry-run", "--device", "--on-full"},
        "fetch": set(FETCH), "info": {"--json"}, "exif": {"--focus-distance", "--short-side", "--json"},
        "render": flags,  # tests/unit/test_render.py
        "eval": flags,  # tests/unit/test_judge.py
        "latents": {"--labels", "--model", "--output", "--width", "--height", "--renders", "--sharp-below",
                    "--flip", "--seed", "--bokehme", "--device"},
        "annotate": {"--output", "--depth", "--depth-kind", "--mask", "--mask-kind", "--focus-source",
                     "--exif", "--long-side", "--shard", "--device"},
    }  # fmt: skip
    assert flags == {"-h", "--help"} | own.get(command, set())


def rows_of(argv: list[str]) -> int:
    """The largest batch that goes through the network."""
    seen: list[int] = []
    img_in = TINY["float32"].transformer.img_in
    hook = img_in.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    try:
        assert cli.main([*argv, "--output", f"rows{len(argv)}"]) == 0
    finally:
        hook.remove()
    return max(seen)


def bands_of(argv: list[str]) -> int:
    """How many pictures are decoded in bands."""
    from bokehflux.pipeline import decode

    made: list[torch.Size] = []
    real = decode.tiling.decode

    def count(vae: Any, latents: torch.Tensor) -> torch.Tensor:
        made.append(latents.shape)
        return real(vae, latents)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode.tiling, "decode", count)
        assert cli.main([*argv, "--output", f"bands-{argv[-1]}"]) == 0
    (picture,) = Path(f"bands-{argv[-1]}").rglob("bokeh-20.0.png")
    assert read_recipe(picture)["vae_tiling"] is bool(made)
    return len(made)


def previews_of(argv: list[str]) -> int:
    """How often the preview file is written."""
    from bokehflux.app import preview

    written: list[Path] = []
    real = preview.replace_file

    def count(path: Path, data: bytes) -> None:
        written.append(path)
        real(path, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preview, "replace_file", count)
        assert cli.main([*argv, "--num-inference-steps", "5", "--output", f"previews{len(argv)}"]) == 0
    return len(written)


def test_replay_is_bit_equal(
    world: dict[str, Any], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Even from the pivot and from the sheet, for every level of the batch, and without a word of warning."""
    argv = ["generate", "--prompt", "a fox", "--bokeh-targets", "0", "4.5", "30", "--bokeh-pivot", "12.5"]
    argv += ["--seed", "77", "--guidance-scale", "4.25", "--true-cfg", "1.5", "--negative-prompt", "fog"]
    argv += ["--num-inference-steps", "4", "--num-grounding-steps", "2", "--height", "48", "--width", "32"]
    assert (
        cli.main([*argv, "--max-rows", "2", "--lora", "l", "0.5", "--output", "first", "--dtype", "bfloat16"])
        == 0
    )
    first = [Path(line) for line in capsys.readouterr().out.split()]
    assert len(first) == 5
    for number, source in enumerate((first[1], first[3], first[4])):
        assert cli.main(["generate", "--config-from", str(source), "--output", f"again{number}"]) == 0
        out = capsys.readouterr().out
        assert "may differ" not in caplog.text
        for old, line in zip(first, out.split(), strict=True):
            with Image.open(old) as a, Image.open(line) as b:
                assert a.tobytes() == b.tobytes() and Path(line).name == old.name
            assert read_recipe(old) == read_recipe(line)


def test_a_replay_loads_and_decodes_as_its_picture_was_made(world: dict[str, Any]) -> None:
    argv = ["generate", "--prompt", "a fox", "--compute", "fp8", "--vae-tiling", "on", "--output", "first"]
    assert cli.main([*argv, "--device", "cpu", "--num-inference-steps", "2"]) == 0
    world.clear()
    assert cli.main(["generate", "--config-from", "first/plain.png", "--output", "second"]) == 0
    assert (world["compute"], world["device"]) == ("fp8", "cpu")
    assert read_recipe("second/plain.png")["vae_tiling"] is True


def test_flags_override_a_replay(world: dict[str, Any]) -> None:
    argv = ["generate", "--config-from", "earlier.png", "--seed", "9", "--output", "out"]
    assert cli.main(argv) == 0
    recipe, earlier = read_recipe("out/bokeh-07.0.png"), read_recipe("earlier.png")
    assert {key for key in recipe if recipe[key] != earlier[key]} == {"seed"} and recipe["seed"] == 9


def test_a_pivot_and_steps_override_a_replay(world: dict[str, Any]) -> None:
    """What followed from defaults follows from what is given now."""
    assert cli.main(["generate", "--prompt", "a boat", "--output", "first"]) == 0
    plain = read_recipe("first/plain.png")
    assert plain["num_grounding_steps"] == 0 and plain["bokeh_pivot"] is None
    flags = ["--bokeh-targets", "0", "20", "--bokeh-pivot", "15", "--num-inference-steps", "10"]
    assert cli.main(["generate", "--config-from", "first/plain.png", *flags, "--output", "second"]) == 0
    grounded = read_recipe("second/pivot-bokeh-15.0.png")
    assert (grounded["num_inference_steps"], grounded["num_grounding_steps"]) == (10, 8)
    again = ["generate", "--config-from", "second/bokeh-20.0.png", "--output", "third"]
    assert cli.main([*again, "--num-inference-steps", "5"]) == 0
    assert read_recipe("third/bokeh-20.0.png")["num_grounding_steps"] == 4
    asked = ["generate", "--config-from", "third/bokeh-20.0.png", "--num-grounding-steps", "1"]
    assert cli.main([*asked, "--output", "fourth"]) == 0
    assert cli.main(["generate", "--config-from", "fourth/bokeh-20.0.png", "--output", "fifth"]) == 0
    assert read_recipe("fifth/bokeh-20.0.png")["num_grounding_steps"] == 1


def test_a_replay_uses_the_threads_of_its_recipe(
    world: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    assert cli.main(["generate", "--prompt", "a boat", "--output", "first"]) == 0
    recipe = read_recipe("first/plain.png")
    assert recipe["threads"] == torch.get_num_threads() and not used
    assert cli.main(["generate", "--config-from", "first/plain.png", "--output", "second"]) == 0
    assert used == [recipe["threads"]]


@pytest.mark.parametrize("flag", ["model", "adapter", "vae", "clip", "t5", "tokenizers", "output"])
def test_an_empty_path_is_refused(world: dict[str, Any], flag: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["generate", "--prompt", "a boat", f"--{flag}", ""]) == 2
    assert capsys.readouterr().err == f"bokehflux: error: --{flag} is empty: give a path, or leave it out\n"


def test_a_negative_prompt_that_does_nothing_is_named(
    world: dict[str, Any], capsys: pytest.CaptureFixture
) -> None:
    argv = ["generate", "--prompt", "a boat", "--negative-prompt", "fog"]
    assert cli.main(argv) == 0
    assert "--negative-prompt does nothing without --true-cfg above 1" in capsys.readouterr().err
    assert cli.main([*argv, "--true-cfg", "1.4"]) == 0
    assert "does nothing" not in capsys.readouterr().err


def test_a_replay_with_another_model_says_so(world: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    assert cli.main(["generate", "--config-from", "earlier.png", "--model", "other"]) == 0
    assert "model_hash nano, here it is other: the picture may differ" in caplog.text


def test_parts_that_were_given_are_replayed(world: dict[str, Any]) -> None:
    parts = {"vae": "ae.sft", "clip": "clip_l.sft", "t5": "t5.sft", "tokenizers": "some"}
    argv = ["generate", "--prompt", "a boat", "--model", "flux.sft", "--output", "first"]
    assert cli.main([*argv, *(word for part, path in parts.items() for word in (f"--{part}", path))]) == 0
    given = world["model"]
    assert given == ModelFiles(
        {"transformer": "flux.sft", **{part: Path(path) for part, path in parts.items()}}
    )
    recipe = read_recipe("first/plain.png")
    assert {name: recipe[name] for name in ("model", *parts)} == {"model": "flux.sft", **parts}
    world.clear()
    assert cli.main(["generate", "--config-from", "first/plain.png", "--t5", "other", "--output", "two"]) == 0
    assert world["model"] == ModelFiles({**given.files, "t5": Path("other")})


def test_a_sweep_replays_too(world: dict[str, Any]) -> None:
    assert cli.main(["sweep", "--config-from", "earlier.png", "--output", "swept"]) == 0
    (path,) = Path("swept").glob("a-boat-seed65578-*/bokeh-07.0.png")
    assert read_recipe(path)["prompt"] == "a boat"


def test_a_home_folder_is_one_wherever_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells write out `--output ~/out`, but not `--output=~/out`."""
    monkeypatch.setenv("HOME", "/home/me")
    args = parse(["generate", "--prompt=~", "--output=~/out", "--results-dir=~/out", "--model=~/a/~/b"])
    assert (args.output, args.model, args.prompt) == ("/home/me/out", "/home/me/a/~/b", "~")
