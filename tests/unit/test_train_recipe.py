"""The adapter recipe and its command, on the bundled model: configuration, data, run, resume, cost."""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import errno
import functools
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor

from bokehflux.app import train as command
from bokehflux.conditioning import Conditioning
from bokehflux.configs import FLUX_DEV, BokehConfig
from bokehflux.models.mmdit import MMDiT
from bokehflux.pipeline.pipeline import Pipeline
from bokehflux.sampling.latents import pack
from bokehflux.training import guard
from bokehflux.training.batches import Draws
from bokehflux.training.estimate import estimate
from bokehflux.training.latents import INDEX, LatentFolder, write_latents
from bokehflux.training.looks import HeldOut
from bokehflux.training.loop import Loss
from bokehflux.training.recipes import run as recipes
from bokehflux.training.recipes.adapter import AdapterRecipe
from bokehflux.training.recipes.named import NAMED
from bokehflux.training.state import Saves
from bokehflux.weights import load
from bokehflux.weights.files.checkpoint import CheckpointError, NotFoundError, open_checkpoint
from bokehflux.weights.files.write import save
from bokehflux.weights.find.resolve import resolve_model
from bokehflux.weights.load import load_components
from tests.faults.child import needs_linux, trained

CPU = torch.device("cpu")


def draws(count: int) -> Draws:
    return Draws.of_step(0, 0, count, CPU)


# --- latents on disk


def toy_latents(scenes: int = 5, renders: int = 4, side: int = 4) -> tuple[Tensor, Tensor, list[list[str]]]:
    some = draws(scenes)
    captions = [[f"a {i} on a table", f"the number {i}"] for i in range(scenes)]
    return some.normal("x0", renders, 16, side, side), some.uniform("levels", renders) * 30, captions


def spoken(prompts: list[str]) -> Conditioning:
    """Texts as their lengths."""
    lengths = torch.tensor([float(len(prompt)) for prompt in prompts])
    return Conditioning(txt=lengths[:, None, None], pooled=lengths[:, None])


def test_latents_are_read_by_index(tmp_path: Path) -> None:
    x0, levels, captions = toy_latents()
    write_latents(tmp_path, x0.bfloat16(), levels, captions, shard_scenes=2)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    folder = LatentFolder(tmp_path, spoken)  # type: ignore[arg-type]
    assert (folder.num_scenes, folder.num_renders, folder.channels, folder.grid.num_tokens) == (5, 4, 16, 4)
    scene, render = torch.tensor([4, 0, 1, 3, 4]), torch.tensor([0, 3, 1, 2, 2])
    expected = pack(x0.bfloat16().float()[scene, render])
    assert torch.equal(folder.latents(scene, render), expected)
    assert torch.equal(folder.levels(scene, render), levels[scene, render])


def test_a_scene_without_a_level_takes_everything_of_it_along(tmp_path: Path) -> None:
    x0, levels, captions = toy_latents()
    write_latents(tmp_path, x0, levels, captions, shard_scenes=2)
    told = json.loads((tmp_path / INDEX).read_text())
    for number in (0, 3):
        told["scenes"][number]["levels"]["range"][1] = None
    (tmp_path / INDEX).write_text(json.dumps(told))
    said: list[str] = []
    folder = LatentFolder(tmp_path, lambda prompts: (said.extend(prompts), spoken(list(prompts)))[1])
    assert (folder.num_scenes, folder.left_out, folder.names) == (3, 2, ["scene 1", "scene 2", "scene 4"])
    scene, render = torch.arange(3), torch.tensor([3, 0, 2])
    assert torch.equal(folder.latents(scene, render), pack(x0[[1, 2, 4], render]))
    assert torch.equal(folder.levels(scene, render), levels[[1, 2, 4], render])
    folder.text(scene, torch.zeros(3, dtype=torch.bool), draws(3))
    assert all(text in captions[i] for i, text in zip((1, 2, 4), said, strict=True))


def test_captions_are_chosen_among_those_of_the_scene(tmp_path: Path) -> None:
    write_latents(tmp_path, *toy_latents())
    said: list[str] = []
    folder = LatentFolder(tmp_path, lambda prompts: (said.extend(prompts), spoken(list(prompts)))[1])
    scene, drop = torch.arange(200) % 5, torch.arange(200) % 4 == 0
    text = folder.text(scene, drop, draws(200))
    assert [text == "" for text in said] == drop.tolist() and len(text.txt) == 200
    kept = [(int(i), text) for i, text in zip(scene, said, strict=True) if text]
    assert all(text in (f"a {i} on a table", f"the number {i}") for i, text in kept)
    assert 0.35 < sum(text[:1] == "a" for _, text in kept) / len(kept) < 0.65


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / INDEX).unlink(), "no latents.json"),
        (lambda folder: shard(folder, 1).unlink(), "latents-.*safetensors: no such file"),
        (lambda folder: change(folder, schema=9), "expected schema 2, found 9"),
        (lambda folder: change(folder, shape=[4, 16, 8, 8]), r"expected .'latents': \(2, 4, 16, 8, 8\)"),
        (lambda folder: save(shard(folder, 1), {"latents": torch.zeros(1)}), "expected .'latents'"),
        (lambda folder: change(folder, scenes=[]), "names 0 scenes, shards hold 5"),
        (lambda folder: shard(folder, 1).write_bytes(shard(folder, 0).read_bytes()), "holds other scenes"),
    ],
)  # fmt: skip
def test_a_folder_with_holes_is_refused(tmp_path: Path, spoil, said: str) -> None:
    write_latents(tmp_path, *toy_latents(), shard_scenes=2)
    spoil(tmp_path)
    with pytest.raises(CheckpointError, match=said) as error:
        LatentFolder(tmp_path, spoken)  # type: ignore[arg-type]
    assert ("bokehflux latents" in str(error.value)) == ("schema" not in said)


def shard(folder: Path, number: int) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["shards"][number]["file"]


def change(folder: Path, **values: object) -> None:
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(index | values))


def test_latents_that_no_run_could_take_are_not_written(tmp_path: Path) -> None:
    x0, levels, captions = toy_latents()
    for wrong, said in (
        ((x0[:, 0], levels, captions), r"got \[5, 16, 4, 4\] and \[5, 4\]"),
        ((x0, levels[:, 0], captions), r"got \[5, 4, 16, 4, 4\] and \[5\]"),
        ((x0, levels * 10, captions), "a level of scene 0 must be between 0"),
        ((x0, levels * float("nan"), captions), "a level of scene 0 must be between 0"),
        ((x0[..., :3], levels, captions), "width_px must be a positive multiple of 16, got 24"),
        ((x0, levels, [texts[0] for texts in captions]), "expected a list of captions, found 'a 0 on"),
    ):
        with pytest.raises(ValueError, match=said):
            write_latents(tmp_path, *wrong)
    assert not list(tmp_path.iterdir())


def test_scenes_without_captions_are_not_written(tmp_path: Path) -> None:
    x0, levels, captions = toy_latents()
    for wrong in (captions[:-1], [*captions[:-1], []]):
        with pytest.raises(ValueError, match="expected captions of 5 scenes|expected a list of captions"):
            write_latents(tmp_path, x0, levels, wrong)
    assert not list(tmp_path.iterdir())


# --- the configuration

RECIPE = AdapterRecipe(
    model="nano", groups="set by a fixture", rank=4, blocks=(0, 3, 10), batch=4, group=2, steps=6, lr=3e-3,
    warmup_steps=1, save_every=2, log_every=4, max_guidance=3.0, activations=1.0,
)  # fmt: skip


def test_a_recipe_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    for recipe in (RECIPE, AdapterRecipe(model='m "quoted" é', groups="g", sigma="logit-normal", lr=1e-5)):
        recipe.write(path)
        assert AdapterRecipe.read(path) == recipe
    path.write_text('model = "nano" # a comment\ngroups = "g"\nlr = 1\nblocks = [1, 2]\n')
    assert AdapterRecipe.read(path) == AdapterRecipe(model="nano", groups="g", lr=1, blocks=(1, 2))


def test_everything_wrong_with_a_recipe_is_said_at_once(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(
        'model = 3\nstep = 5\nbatch = 2.5\ncompile = "yes"\nsigma = "even"\nblocks = ["a"]\nsteps = true\n'
    )
    names = ", ".join(field.name for field in dataclasses.fields(AdapterRecipe))
    with pytest.raises(ValueError) as error:
        AdapterRecipe.read(path)
    assert str(error.value) == (
        f"{path}: unknown setting 'step'; there are {names}; model must be text, got 3; "
        "batch must be a whole number, got 2.5; "
        "compile must be true or false, got 'yes'; sigma must be one of uniform, logit-normal, got 'even'; "
        "blocks must be a list of whole numbers, got ('a',); steps must be a whole number, got True; "
        "groups is missing"
    )
    path.write_text("steps = ")
    with pytest.raises(ValueError, match="not a TOML file"):
        AdapterRecipe.read(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"seed": 2**63}, r"seed must be between 0 and 2\^63 - 1"),
        ({"batch": 5}, "batch must hold whole groups of 2, got 5"),
        ({"level_dropout": 1.5}, "level_dropout must be between 0 and 1"),
        ({"lr": float("inf")}, "lr must be above 0, got inf"),
        ({"sigma_shift": 0.0}, "sigma_shift must be above 0"),
        ({"noise_offset": -0.1}, "noise_offset must be at least 0"),
        ({"max_guidance": 0.5}, "max_guidance must be at least 1"),
        ({"sigma_mean": 1.0}, 'sigma_mean and sigma_std count with sigma = "logit-normal" only'),
        ({"max_guidance": 1.0, "level_guidance": 0.2}, "level_guidance counts with a max_guidance above 1"),
        ({"sigma": "logit-normal", "sigma_mean": float("nan")}, "sigma_mean must be finite, got nan"),
        ({"warmup_steps": 6}, "warmup_steps must be below steps, 6, got 6"),
        ({"activations": 0.5}, "activations must be 0 or 1, or between them with compile = true"),
        *(
            ({"memory": "stream", "activations": 0.0} | more, 'memory = "stream" needs activations = 0')
            for more in ({"activations": 1.0}, {"compile": True}, {"graphs": True})
        ),
        *(
            ({"memory": "sharded"} | more, 'memory = "sharded"')
            for more in ({"graphs": True}, {"storage": "fp8"}, {"held_out": "x"}, {"prompts": ("x",)})
        ),
        *(({"rows": rows}, "rows must be whole groups of 2 and divide batch") for rows in (-2, 0, 1, 8)),
        *(
            ({"best": best}, f'best = "{best}" needs {needed}')
            for best, needed in (("held-out", "held_out"), ("LVCorr", "prompts"), ("consistency", "prompts"))
        ),
        *(
            ({name: 0}, f"{name} must be at least 1")
            for name in ("batch", "rank", "group", "save_every", "log_every", "look_every")
        ),
        *(({name: 0.0}, f"{name} must be above 0") for name in ("lr", "clip")),
        *(({name: -1}, f"{name} must be at least 0") for name in ("weight_decay", "first_grounded_block")),
        *(
            ({name: value}, f"{name} must be between 0 and 1, got {value}")
            for name in ("grouped", "swap_probability", "caption_dropout", "level_guidance", "ema_rate")
            for value in (-0.1, 1.1)
        ),
        ({"optimizer": "prodigy"}, "usually 1, and must be between 0.1 and 10, got 0.003"),
        ({"optimizer": "prodigy", "lr": 1.0, "memory": "sharded"}, '"prodigy" is known to hang under FSDP'),
    ],
)
def test_values_that_no_run_can_have(change: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(RECIPE, **change)  # type: ignore[arg-type]


# --- the run


@pytest.fixture
def recipe(tmp_path: Path) -> AdapterRecipe:
    write_latents(tmp_path / "groups", *toy_latents(renders=3))
    write_latents(tmp_path / "photographs", *toy_latents(renders=1))
    where = {"groups": str(tmp_path / "groups"), "photographs": str(tmp_path / "photographs")}
    return dataclasses.replace(RECIPE, **where)


def written(out: Path) -> dict[str, Tensor]:
    file = open_checkpoint(out / "adapter" / "model.safetensors")
    return {name: file.read(name).clone() for name in file.tensors}


def test_an_adapter_is_trained_and_loads(recipe: AdapterRecipe, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    mine, left = (tmp_path / "out" / name for name in (".mine.tmp", ".model.safetensors.321.tmp"))
    mine.touch(), left.touch()
    recipes.train_adapter(recipe, tmp_path / "out", CPU)
    assert mine.exists() and not left.exists(), "what a killed run was writing goes, and nothing else"
    assert AdapterRecipe.read(tmp_path / "out" / "recipe.toml") == recipe
    log = json.loads((tmp_path / "out" / "log.json").read_text())
    assert log["notes"]["recipe"]["lr"] == recipe.lr and {"plain", "grounded"} <= log["points"][0].keys()
    loaded = load_components("nano", adapter=tmp_path / "out" / "adapter", dtype=torch.float32).transformer
    assert loaded.bokeh is not None and loaded.bokeh.config.blocks == (0, 3, 10)
    moved = written(tmp_path / "out")
    assert moved["adapter_modules.3.to_v_bokeh.up.weight"].abs().max() > 0
    assert not moved["adapter_modules.3.to_k_bokeh.up.weight"].any(), "what changes nothing is not trained"
    with pytest.raises(CheckpointError, match="an earlier run made it: choose another folder"):
        recipes.train_adapter(recipe, tmp_path / "out", CPU)


@pytest.fixture
def quick_sheets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps of two steps."""
    generate = Pipeline.generate

    def quick(self: Pipeline, *args: Any, **how: Any) -> Any:
        return generate(self, *args, **how | {"num_inference_steps": 2})

    monkeypatch.setattr(Pipeline, "generate", quick)


@pytest.mark.usefixtures("quick_sheets")
def test_looks_see_the_average_and_leave_the_run_as_it_is(
    recipe: AdapterRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held-out loss, sheets and the best adapter, at steps 3 and 6; rows go together as in a step."""
    look, rows = HeldOut.__call__, set()
    monkeypatch.setattr(HeldOut, "__call__", lambda self, state: (rows.add(self.rows), look(self, state))[1])
    recipe = dataclasses.replace(recipe, rows=2)
    recipes.train_adapter(recipe, tmp_path / "plain", CPU)
    seen = dataclasses.replace(
        recipe, held_out=recipe.photographs, look_every=3, prompts=("a red ball", "a cup"), best="LVCorr"
    )
    recipes.train_adapter(seen, tmp_path / "seen", CPU)
    plain, looked = written(tmp_path / "plain"), written(tmp_path / "seen")
    assert all(torch.equal(plain[name], looked[name]) for name in plain)
    assert rows == {2} and recipe.batch > 2
    sheets = sorted(path.name for path in (tmp_path / "seen" / "sheets").iterdir())
    assert sheets == ["0000003-00.jpg", "0000003-01.jpg", "0000006-00.jpg", "0000006-01.jpg"]
    table = list(csv.DictReader((tmp_path / "seen" / "log.csv").open()))
    assert [row["step"] for row in table] == ["3", "4", "6"]
    losses = [float(row["held-out"]) for row in table if row["held-out"]]
    assert len(losses) == 2 and all(0.1 < loss < 10 for loss in losses) and losses[0] != losses[1]
    found = [float(row["LVCorr"]) for row in table if row["LVCorr"]]
    assert len(found) == 2 and all(-1 <= value <= 1 for value in found)
    best = open_checkpoint(tmp_path / "seen" / "best" / "model.safetensors")
    same = all(torch.equal(best.read(name), looked[name]) for name in looked)
    assert same == (found[1] > found[0]), "the last adapter is the best if its figure is"


@pytest.mark.usefixtures("quick_sheets")
def test_a_full_disk_ends_no_run(
    recipe: AdapterRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A sheet, the best adapter and the adapter each find no room once; what was killed before has gone."""
    recipe = dataclasses.replace(
        recipe, held_out=recipe.photographs, prompts=("a cup",), best="held-out", steps=2, warmup_steps=0
    )
    names, replace = ["sheets/0000002-00.jpg", "best/config.json", "adapter/config.json"], os.replace
    missing, out = list(names), tmp_path / "out"
    left = out / "best" / ".model.safetensors.123.tmp"
    left.parent.mkdir(parents=True)
    left.touch()

    def full(source: Path, target: Path) -> None:
        if (name := Path(target).relative_to(tmp_path / "out").as_posix()) in missing:
            missing.remove(name)
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(guard, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr("os.replace", full)
    recipes.train_adapter(recipe, out, CPU)
    assert not missing and all((out / name).is_file() for name in names)
    for what in ("sheet .*0000002-00.jpg", "best adapter", "adapter"):
        assert len(re.findall(f"the {what} waits for room", caplog.text)) == 1
    assert not list(tmp_path.rglob(".*.tmp"))


def test_a_run_that_stops_goes_on(
    recipe: AdapterRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes.train_adapter(recipe, tmp_path / "whole", CPU)
    step, count = torch.optim.AdamW.step, [0]

    def deadly(self: torch.optim.AdamW, *args: object) -> None:
        count[0] += 1
        if count[0] == 4:
            raise KeyboardInterrupt
        step(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.optim.AdamW, "step", deadly)
    with pytest.raises(KeyboardInterrupt):
        recipes.train_adapter(recipe, tmp_path / "stopped", CPU)
    with pytest.raises(CheckpointError, match="lr was 0.003 when the run was saved and is 0.1 now"):
        recipes.train_adapter(dataclasses.replace(recipe, lr=0.1), tmp_path / "stopped", CPU, resume=True)
    with pytest.raises(CheckpointError, match="a stopped run left it: --resume goes on"):
        recipes.train_adapter(recipe, tmp_path / "stopped", CPU)
    recipes.train_adapter(recipe, tmp_path / "stopped", CPU, resume=True)
    assert not (tmp_path / "stopped" / "state.safetensors").exists()
    whole, stopped = written(tmp_path / "whole"), written(tmp_path / "stopped")
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    with pytest.raises(NotFoundError, match="no saved run to resume"):
        recipes.train_adapter(recipe, tmp_path / "new", CPU, resume=True)


def test_recomputed_and_muon_runs_take_their_own_way(recipe: AdapterRecipe, tmp_path: Path) -> None:
    recipes.train_adapter(recipe, tmp_path / "kept", CPU)
    recipes.train_adapter(dataclasses.replace(recipe, activations=0.0), tmp_path / "recomputed", CPU)
    recipes.train_adapter(dataclasses.replace(recipe, optimizer="muon"), tmp_path / "muon", CPU)
    streamed = dataclasses.replace(recipe, activations=0.0, memory="stream")
    recipes.train_adapter(streamed, tmp_path / "streamed", CPU)
    recipes.train_adapter(dataclasses.replace(recipe, storage="fp8"), tmp_path / "fp8", CPU)
    kept, recomputed, muon, streamed_too, fp8 = (
        written(tmp_path / name) for name in ("kept", "recomputed", "muon", "streamed", "fp8")
    )
    for name, tensor in kept.items():
        torch.testing.assert_close(recomputed[name], tensor, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(streamed_too[name], recomputed[name], rtol=0, atol=0)
    name = "adapter_modules.3.to_q_adp.up.weight"
    assert (muon[name] - kept[name]).abs().max() > 1e-4
    assert 0 < (fp8[name] - kept[name]).norm() < 0.5 * kept[name].norm()


def test_data_that_does_not_fit(
    recipe: AdapterRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mmdit = resolve_model("nano").config
    folders = [LatentFolder(Path(path), spoken) for path in (recipe.groups, recipe.photographs)]  # type: ignore
    recipes.check_data(recipe, mmdit, *folders)
    with pytest.raises(ValueError, match="a group takes 4 renders of a scene, .* has 3"):
        recipes.check_data(dataclasses.replace(recipe, group=4), mmdit, *folders)
    with pytest.raises(ValueError, match="the model takes latents of 4 channels, got 16"):
        recipes.check_data(recipe, dataclasses.replace(mmdit, in_channels=16), *folders)
    with pytest.raises(ValueError, match="first_grounded_block must be below the model's 11 blocks, got 11"):
        recipes.check_data(dataclasses.replace(recipe, first_grounded_block=11), mmdit, *folders)
    write_latents(tmp_path / "large", *toy_latents(side=8))
    with pytest.raises(ValueError, match="differ in size"):
        recipes.check_data(recipe, mmdit, folders[0], LatentFolder(tmp_path / "large", spoken))  # type: ignore
    monkeypatch.setattr(recipes, "rank_and_world", lambda: (1, 3))
    with pytest.raises(ValueError, match=f"whole groups of {recipe.group} for each of 3 processes"):
        recipes.check_data(recipe, mmdit, *folders)


def test_an_adapter_to_begin_with_decides_its_shape(recipe: AdapterRecipe, tmp_path: Path) -> None:
    recipes.train_adapter(recipe, tmp_path / "first", CPU)
    further = dataclasses.replace(recipe, adapter=str(tmp_path / "first" / "adapter"), blocks=None, lr=1e-12)
    assert "rank 4 in 3 blocks" in recipes.dry_run(further, tmp_path, CPU)[1]
    recipes.train_adapter(further, tmp_path / "second", CPU)
    first, second = written(tmp_path / "first"), written(tmp_path / "second")
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=1e-9)
    for change, said in (
        ({"rank": 8}, "rank is 8, but the adapter .* has 4"),
        ({"blocks": (0, 3)}, r"blocks is \[0, 3\], but the adapter .* has \[0, 3, 10\]"),
        ({"adapter": str(tmp_path / "none")}, "adapter .*none not found"),
    ):
        with pytest.raises(ValueError, match=said):
            recipes.dry_run(dataclasses.replace(further, **change), tmp_path, CPU)  # type: ignore[arg-type]


def test_a_dry_run_looks_at_the_output(recipe: AdapterRecipe, tmp_path: Path) -> None:
    """As the run does, and makes nothing there."""
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    (tmp_path / "done" / "adapter").mkdir(parents=True)
    (tmp_path / "stopped").mkdir()
    (tmp_path / "stopped" / "state.safetensors").write_bytes(b"0")
    there = sorted(tmp_path.rglob("*"))
    for out, resume, said in (
        ("file", False, "file is a file, and a folder was expected"), ("file/x", False, "is a file"),
        ("link", False, "link is a link to .*gone, which is not there"),
        ("done", False, "adapter: an earlier run made it"), ("new", True, "no saved run to resume"),
        ("stopped", False, "--resume goes on with that run"), ("stopped", True, "not a .safetensors file"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            recipes.dry_run(recipe, tmp_path / out, CPU, resume=resume)
        with pytest.raises(ValueError, match=said):
            recipes.train_adapter(recipe, tmp_path / out, CPU, resume=resume)
    assert recipes.dry_run(recipe, tmp_path / "new" / "er", CPU)
    assert sorted(tmp_path.rglob("*")) == there


def test_what_does_not_fit_is_said_before_weights_are_read(
    recipe: AdapterRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unread(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(load, "load_network", unread)
    with pytest.raises(ValueError, match="a group takes 4 renders"):
        recipes.train_adapter(dataclasses.replace(recipe, group=4), tmp_path / "out", CPU)
    with pytest.raises(ValueError, match="adapter .*none not found"):
        recipes.train_adapter(
            dataclasses.replace(recipe, adapter=str(tmp_path / "none")), tmp_path / "out", CPU
        )
    write_latents(tmp_path / "large", *toy_latents(side=8))
    for folder, said in (("none", "no latents.json"), ("large", "groups and held_out differ in size")):
        seen = dataclasses.replace(recipe, held_out=str(tmp_path / folder))
        with pytest.raises(ValueError, match=said):
            recipes.train_adapter(seen, tmp_path / "out", CPU)
        with pytest.raises(ValueError, match=said):
            recipes.dry_run(seen, tmp_path / "out", CPU)
    with pytest.raises(NotFoundError, match="no saved run to resume"):
        recipes.train_adapter(recipe, tmp_path / "out", CPU, resume=True)
    with pytest.raises(AssertionError, match="weights were read"):
        recipes.train_adapter(recipe, tmp_path / "out", CPU)


@pytest.mark.parametrize(
    ("package", "change", "extra"),
    [
        ("prodigyopt", {"optimizer": "prodigy", "lr": 1.0}, "prodigy"),
        ("tensorboard", {"tensorboard": True}, "train"),
    ],
)
def test_a_missing_package_is_said_first(
    recipe: AdapterRecipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    package: str,
    change: dict[str, Any],
    extra: str,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # what an import of it then finds
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    needy, said = dataclasses.replace(recipe, **change), rf"needs the package {package}: .*\[{extra}\]"
    with pytest.raises(ValueError, match=said):
        recipes.dry_run(needy, tmp_path / "out", CPU)
    with pytest.raises(ValueError, match=said):
        recipes.train_adapter(needy, tmp_path / "out", CPU)
    assert not (tmp_path / "out").exists()


def test_prodigy_trains_an_adapter(
    recipe: AdapterRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("prodigyopt")
    recipe = dataclasses.replace(recipe, optimizer="prodigy", lr=1.0)
    assert recipes.dry_run(recipe, tmp_path / "out", CPU)
    recipes.train_adapter(recipe, tmp_path / "out", CPU)
    assert written(tmp_path / "out")["adapter_modules.3.to_v_bokeh.up.weight"].abs().max() > 0
    assert not capsys.readouterr().out, "what it prints is not ours to print"


def test_the_curve_for_tensorboard(recipe: AdapterRecipe, tmp_path: Path) -> None:
    """Every point of the log, as TensorBoard itself reads them."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = dataclasses.replace(recipe, tensorboard=True, log_every=2)
    recipes.train_adapter(recipe, tmp_path / "out", CPU)
    board = EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload()
    points = json.loads((tmp_path / "out" / "log.json").read_text())["points"]
    names = {name for point in points for name in point} - {"step", "seconds"}
    assert set(board.Tags()["scalars"]) == names == {"plain", "grounded"}
    for name in names:
        expected = [(point["step"], point[name]) for point in points if name in point]
        assert [(e.step, pytest.approx(e.value)) for e in board.Scalars(name)] == expected


# --- the cost, and the command


def test_the_cost_of_flux_is_what_was_measured() -> None:
    """On an H100, rank 128 on 57 blocks, groups of 4 at 512 px, blocks compiled: 0.460 s and 69.3 GB, or
    0.674 s and 28.8 GB with recomputed blocks; one plain row at 1024 px 0.376 s and 50.1 GB."""
    bokeh = BokehConfig(blocks=tuple(range(57)), rank=128)
    for rows, img_tokens, activations, seconds, gigabytes in (
        (4, 1024, 1.0, 0.460, 69.3), (4, 1024, 0.0, 0.674, 28.8), (1, 4096, 1.0, 0.376, 50.1),
    ):  # fmt: skip
        cost = estimate(
            FLUX_DEV, bokeh, rows=rows, txt_tokens=512, img_tokens=img_tokens, activations=activations
        )
        assert cost.seconds == pytest.approx(seconds, rel=0.1)
        assert cost.gpu_bytes / 1e9 == pytest.approx(gigabytes, rel=0.15)
        assert cost.base == 11_901_408_320 and cost.trained == 117_719_936


def test_what_adds_to_the_cost() -> None:
    bokeh = BokehConfig(blocks=tuple(range(57)), rank=128)
    cost = functools.partial(estimate, FLUX_DEV, bokeh, rows=4, txt_tokens=512, img_tokens=1024)
    plain, recorded = cost(activations=1.0), cost(activations=1.0, graphs=2)
    assert recorded.gpu_bytes - plain.gpu_bytes == 2 * 4 * plain.trained
    assert cost(activations=1.0, guided=True).flops == pytest.approx(1.5 * plain.flops)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"compile": True}, "on one H100, compiled$"),
        ({}, "on one H100, if compiled, half as long again as it is$"),
        ({"memory": "stream", "activations": 0.0}, "as it is, and what streaming takes$"),
    ],
)
def test_a_dry_run_says_what_its_time_is_of(
    recipe: AdapterRecipe, tmp_path: Path, change: dict[str, object], said: str
) -> None:
    lines = recipes.dry_run(dataclasses.replace(recipe, **change), tmp_path, CPU)  # type: ignore[arg-type]
    assert re.search(said, lines[-1])
    assert ("text encoders visit it" in lines[-2]) == ("memory" in change)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"graphs": True}, "graphs = true needs a CUDA GPU, the device is cpu"),
        ({"memory": "sharded", "activations": 0.0}, "needs several processes: start it with torchrun"),
    ],
)
def test_what_this_machine_lacks_is_refused(
    recipe: AdapterRecipe, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    for begin in (recipes.dry_run, recipes.train_adapter):
        with pytest.raises(ValueError, match=said):
            begin(dataclasses.replace(recipe, **change), tmp_path / "out", CPU)  # type: ignore[operator]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("optimizer", "least"), [("adamw", 0.99), ("muon", 0.75)])
def test_a_dry_run_looks_for_room(
    recipe: AdapterRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, least: float
) -> None:
    """For as much as the run asks for: two states."""
    recipe, out = dataclasses.replace(recipe, optimizer=optimizer), tmp_path / "out"  # type: ignore[arg-type]
    sizes: list[int] = []
    check = Saves.check_room
    monkeypatch.setattr(Saves, "check_room", lambda saves, size: (sizes.append(size), check(saves, size))[1])
    recipes.dry_run(recipe, out, CPU)
    recipes.train_adapter(recipe, out, CPU)
    assert least * sizes[1] < sizes[0] <= sizes[1]
    disk = shutil.disk_usage(tmp_path)
    for free, room in ((2 * sizes[0] - 1, False), (2 * sizes[0], True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: disk._replace(free=free))
        with contextlib.nullcontext() if room else pytest.raises(CheckpointError, match="are needed"):
            recipes.dry_run(recipe, tmp_path / "other", CPU)


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_flags(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    ("words", "taken"),
    [((), "cuda:1"), (("--device", "cuda"), "cuda:1"), (("--device", "cuda:0"), "cuda:0"),
     (("--device", "cpu"), "cpu")],
)  # fmt: skip
def test_a_process_takes_memory_on_its_own_gpu_alone(
    monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], taken: str
) -> None:
    """Under torchrun, on a machine with GPUs: what is looked at first, and made the current one."""
    current: list[str] = []

    def looked_at(name: str | None) -> torch.device:
        raise KeyError(name)

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(str(device)))
    monkeypatch.setattr(command, "_device", looked_at)
    with pytest.raises(KeyError, match=f"'{taken}'"):
        command.train(arguments("--config", "nano", "--output", "out", *words))
    assert current == ["cuda:1"] * (taken == "cuda:1")


def test_the_command(recipe: AdapterRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, out = tmp_path / "mine.toml", tmp_path / "out"
    recipe.write(config)
    assert command.train(arguments("--config", str(config), "--output", str(out), "--dry-run")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "base", "adapter", "groups", "photographs", "size", "a step", "disk", "GPU", "time",
    ]  # fmt: skip
    assert "5 scenes, 3 pictures each" in lines[2] and lines[4] == "size: 32 x 32 px" and not out.exists()
    assert "4 rows of 48 text and 4 image tokens" in lines[5]
    assert command.train(arguments("--config", str(config), "--output", str(out), "--device", "cpu")) == 0
    assert capsys.readouterr().out.strip() == str(out / "adapter")
    trained = sum(t.numel() for name, t in written(out).items() if "to_k_bokeh" not in name)
    assert f"adapter: {trained:,} parameters are trained, rank 4 in 3 blocks" in lines


def test_recipes_by_name_and_changed_on_the_command_line(tmp_path: Path) -> None:
    for name, recipe in NAMED.items():
        recipe.write(tmp_path / f"{name}.toml")
        assert AdapterRecipe.read(tmp_path / f"{name}.toml") == recipe == recipe.changed([])
    words = ["lr=2e-3", "model=my/model", "blocks=[1, 2]", 'groups="a=b"', "compile=false", "activations=1"]
    changed = NAMED["flux"].changed(words)
    assert (changed.lr, changed.model, changed.blocks, changed.groups) == (2e-3, "my/model", (1, 2), "a=b")
    assert AdapterRecipe.read(tmp_path / "flux.toml", words) == changed
    for wrong, said in (
        ("lr", "--set lr: expected NAME=VALUE"),
        ("lr=fast", "lr must be a number, got 'fast'"),
        ("speed=1", "unknown setting 'speed'"),
    ):
        with pytest.raises(ValueError, match=said):
            NAMED["nano"].changed([wrong])


def test_an_adapter_in_bokehdepths_layout_is_read_back(recipe: AdapterRecipe, tmp_path: Path) -> None:
    recipe = dataclasses.replace(recipe, steps=2)
    recipes.train_adapter(recipe, tmp_path / "ours", CPU)
    recipes.train_adapter(dataclasses.replace(recipe, layout="bokehdepth"), tmp_path / "theirs", CPU)
    ours, theirs = written(tmp_path / "ours"), written(tmp_path / "theirs")
    assert "adapter_modules.3.to_v_dof.down.weight" in theirs and not any("_bokeh" in name for name in theirs)
    both = [
        load_components("nano", adapter=tmp_path / name / "adapter", dtype=torch.float32).transformer.bokeh
        for name in ("ours", "theirs")
    ]
    for name, tensor in ours.items():
        assert torch.equal(both[1].state_dict()[name], tensor) and torch.equal(
            both[0].state_dict()[name], tensor
        )


# --- rows at a time, several processes


def test_rows_at_a_time_change_nothing_but_rounding(recipe: AdapterRecipe, tmp_path: Path) -> None:
    both = dataclasses.replace(recipe, swap_probability=0.5, spread_sigma=True, log_every=1)
    recipes.train_adapter(both, tmp_path / "all", CPU)
    recipes.train_adapter(dataclasses.replace(both, rows=2), tmp_path / "two", CPU)
    whole, parts = written(tmp_path / "all"), written(tmp_path / "two")
    assert all(nearly(parts[name], tensor) for name, tensor in whole.items())
    assert curve(tmp_path / "two") == [pytest.approx(point, rel=1e-5) for point in curve(tmp_path / "all")]
    assert len(curve(tmp_path / "all")) == both.steps
    for rows, said in ((3, "rows must be whole groups of 2 and divide batch, 4, got 3"), (8, "got 8")):
        with pytest.raises(ValueError, match=said):
            dataclasses.replace(recipe, rows=rows)


def nearly(a: Tensor, b: Tensor) -> bool:
    """As a whole: AdamW divides a gradient by its size, be it rounding, so single weights may differ more."""
    return bool((a - b).norm() <= 1e-3 * b.norm())


def curve(out: Path) -> list[dict[str, float]]:
    points = json.loads((out / "log.json").read_text())["points"]
    return [{key: value for key, value in point.items() if key != "seconds"} for point in points]


def one_of_two(recipe: AdapterRecipe, folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    whole = recipes.adapter_loss

    def looked_at(mmdit: MMDiT, *args: Any, **how: Any) -> Loss:
        held = [p.to_local() if isinstance(p, DTensor) else p for p in mmdit.double_blocks.parameters()]
        (folder / f"held{rank}").write_text(str(sum(p.numel() for p in held)))
        return whole(mmdit, *args, **how)

    recipes.adapter_loss = looked_at  # this process is the test's own
    distributed.init_process_group("gloo", f"file://{folder / 'meet'}", rank=rank, world_size=2)
    recipes.train_adapter(recipe, folder / "out", CPU)
    distributed.destroy_process_group()


@needs_linux
@pytest.mark.parametrize("memory", ["resident", "sharded"])
def test_two_processes_are_one(recipe: AdapterRecipe, tmp_path: Path, memory: str) -> None:
    """The whole base on each, or half of every block: the curve and the adapter of one process."""
    recipe = dataclasses.replace(recipe, log_every=1, activations=0.0, steps=4)
    shared = dataclasses.replace(recipe, memory=memory)  # type: ignore[arg-type]
    folder = tmp_path / "two"
    folder.mkdir()
    both = (functools.partial(one_of_two, shared, folder, rank) for rank in range(2))
    assert trained(*both) == [(0, "None")] * 2
    with torch.device("meta"):
        size = sum(p.numel() for p in MMDiT(resolve_model("nano").config).double_blocks.parameters())
    held = [int((folder / f"held{rank}").read_text()) for rank in range(2)]
    assert (sum(held) == size and abs(held[0] - held[1]) < 0.01 * size) == (memory == "sharded")
    recipes.train_adapter(recipe, tmp_path / "one", CPU)
    assert curve(folder / "out") == [pytest.approx(point, rel=1e-6) for point in curve(tmp_path / "one")]
    one, two = written(tmp_path / "one"), written(folder / "out")
    assert all(nearly(two[name], tensor) for name, tensor in one.items())


def test_a_sharded_base_is_of_the_dtype(recipe: AdapterRecipe) -> None:
    with pytest.raises(ValueError, match='memory = "sharded" needs storage = "dtype" without graphs'):
        dataclasses.replace(recipe, memory="sharded", storage="fp8")
