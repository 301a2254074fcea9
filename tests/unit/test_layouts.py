"""Every layout that people keep FLUX in loads to the same model, and what does not belong is refused."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
import torch

from bokehflux.app import cli, fetch
from bokehflux.configs import CLIP_L, FLUX_BOKEH, FLUX_DEV, FLUX_SCHEDULE, T5_XXL
from bokehflux.models.clip import CLIPTextEncoder
from bokehflux.weights import load, manifests
from bokehflux.weights.describe import describe
from bokehflux.weights.files import write
from bokehflux.weights.files.checkpoint import Checkpoint, CheckpointError, Shelf
from bokehflux.weights.find import layouts, resolve
from bokehflux.weights.find.resolve import ModelFiles, resolve_model
from bokehflux.weights.find.snapshot import open_snapshot
from bokehflux.weights.mapping import to_official
from bokehflux.weights.tables import adapter, clip, t5, vae
from tests import model_files as files

STATES = files.states()


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """A machine without any models."""
    return {"HOME": str(tmp_path / "home")}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    return folder


def assert_loads(model: object, env: dict[str, str]) -> None:
    parts = load.load_components(model, dtype=torch.float32, env=env)  # type: ignore[arg-type]
    files.assert_holds(parts.transformer, STATES["transformer"])
    files.assert_holds(parts.vae, STATES["vae"])
    files.assert_holds(parts.text.clip, STATES["clip"])
    files.assert_holds(parts.text.t5, STATES["t5"])
    assert (parts.transformer.config, parts.vae.config) == (files.MMDIT, files.VAE)
    assert (parts.text.clip.config, parts.text.t5.config) == (files.CLIP, files.T5)
    assert parts.snapshot.schedule == FLUX_SCHEDULE
    encoded = parts.text.encode(["a red cup"])
    assert encoded.txt.shape == (1, 512, 32) and encoded.pooled.shape == (1, 64)


def problems(call, *args, **kwargs) -> str:
    with pytest.raises(CheckpointError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


# --- layouts


def test_official_snapshot(home, env):
    files.write_official(home, STATES)
    files.write_tokenizers(home)
    assert_loads(home, env)
    # The transformer's own folder means the model around it.
    assert_loads(home / "transformer", env)


@pytest.mark.parametrize("suffix", [".safetensors", ".sft"])
def test_bare_files_in_one_folder(home, env, suffix):
    paths = files.write_flat(home, STATES, suffix)
    files.write_tokenizers(home)
    assert_loads(home, env)
    assert_loads(paths["transformer"], env)


def test_files_given_one_by_one(tmp_path, env):
    paths = {}
    for part, state in STATES.items():
        paths[part] = tmp_path / f"{part}-here" / "weights.safetensors"
        write.save(paths[part], {**state})
    files.write_tokenizers(tmp_path / "tok")
    paths["tokenizers"] = tmp_path / "tok"
    assert_loads(ModelFiles(paths), env)
    absent = ModelFiles(paths | {"t5": tmp_path / "absent.safetensors"})
    assert "t5: " in problems(resolve_model, absent, env) and "absent" in problems(resolve_model, absent, env)
    swapped = ModelFiles(paths | {"t5": paths["clip"]})
    assert "layout not recognised" in problems(load.load_components, swapped, env=env)
    message = problems(resolve_model, ModelFiles(paths | {"tokenizers": tmp_path}), env)
    assert f"clip_tokenizer: {tmp_path / 'tokenizer'} does not exist" in message
    with pytest.raises(ValueError, match="no part 'unet': expected some of transformer, vae"):
        ModelFiles({"transformer": paths["clip"], "unet": paths["clip"]})
    with pytest.raises(ValueError, match="need a transformer, got vae"):
        ModelFiles({"vae": paths["vae"]})


def test_one_part_of_any_model_may_be_another(home, env, monkeypatch):
    """An explicit file wins over the model's own, in whatever way the model was named."""
    files.write_flat(home, STATES)
    files.write_tokenizers(home)
    own = home.parent / "own.safetensors"
    write.save(own, STATES["t5"])
    for name in (home, str(home), home / "flux1-dev.safetensors", "flux-dev"):
        model = ModelFiles({"transformer": name, "t5": own})
        snapshot = resolve_model(model, env | {"BOKEHFLUX_MODELS": str(home)})
        assert snapshot.paths["t5"] == own and snapshot.paths["transformer"] == home / "flux1-dev.safetensors"
        assert snapshot.paths["vae"] == home / "ae.safetensors"
    monkeypatch.setitem(resolve.BUNDLED, "own", home)
    assert resolve_model(ModelFiles({"transformer": "own", "t5": own}), env).paths["t5"] == own
    assert str(ModelFiles({"transformer": "flux-dev", "t5": own})) == f"flux-dev + {own}"
    assert "no complete model" in problems(resolve_model, ModelFiles({"transformer": home / "absent"}), env)


@pytest.mark.parametrize("below", ["", "models"])
def test_comfyui_tree(home, env, below):
    paths = files.write_comfyui(home / below, STATES)
    files.write_tokenizers(home / below)
    assert_loads(home, env)
    # A file of the tree finds the rest of the tree.
    assert_loads(paths["transformer"], env)
    snapshot = open_snapshot(home)
    assert snapshot.paths.items() >= paths.items()


@pytest.mark.parametrize(
    "prefixes",
    [
        files.PREFIXES,
        files.PREFIXES | {"vae": "first_stage_model.", "transformer": "diffusion_model."},
        files.PREFIXES | {"clip": "text_encoders.clip_l.", "t5": "text_encoders.t5xxl."},
    ],
)
def test_all_in_one(home, env, prefixes):
    path = home / "checkpoints" / "flux1-dev-all.safetensors"
    write.save(path, files.all_in_one(STATES, prefixes))
    files.write_tokenizers(home)
    assert_loads(path, env)
    assert_loads(home, env)


def test_all_in_one_without_text_encoders(home, env):
    some = {part: STATES[part] for part in ("transformer", "vae")}
    write.save(home / "checkpoints" / "flux.safetensors", files.all_in_one(some))
    files.write_comfyui(home, {part: STATES[part] for part in ("clip", "t5")})
    files.write_tokenizers(home / "text_encoders")
    assert_loads(home, env)


def test_a_file_of_its_own_goes_before_an_all_in_one(home, env):
    other = {part: {n: t + 1 for n, t in state.items()} for part, state in STATES.items()}
    paths = files.write_comfyui(home, STATES)
    write.save(home / "checkpoints" / "all.safetensors", files.all_in_one(other))
    files.write_tokenizers(home)
    assert "several transformer files (all.safetensors, flux1-dev.safetensors)" in problems(
        resolve_model, home, env
    )
    assert_loads(paths["transformer"], env)
    # But what comes in one file belongs together.
    snapshot = resolve_model(home / "checkpoints" / "all.safetensors", env)
    assert {snapshot.paths[part] for part in STATES} == {home / "checkpoints" / "all.safetensors"}


# --- other models' files beside ours


def test_files_of_other_models_are_passed_over(home, env):
    files.write_comfyui(home, STATES)
    files.write_tokenizers(home)
    sdxl_vae = dict(STATES["vae"]) | {"decoder.conv_in.weight": torch.ones(32, 4, 3, 3)}
    write.save(home / "vae" / "sdxl_vae.safetensors", sdxl_vae)
    write.save(home / "vae" / "sdxl_vae_diffusers.safetensors", to_official(vae.DIFFUSERS, sdxl_vae))
    wide = dataclasses.replace(files.CLIP, width=128)
    write.save(home / "clip" / "clip_g.safetensors", files.random_state(CLIPTextEncoder(wide)))
    bias = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
    write.save(home / "clip" / "umt5_xxl.safetensors", {**STATES["t5"], bias: torch.ones(8, 2)})
    sd3 = {"model.diffusion_model.final_layer.adaLN_modulation.1.weight": torch.ones(4, 2)}
    write.save(home / "checkpoints" / "sd3.safetensors", sd3)
    (home / "checkpoints" / "old.ckpt").write_bytes(b"\x80\x02")
    (home / "unet" / "half.safetensors").write_bytes(b"<html>")
    assert_loads(home, env)


def test_unreadable_files_are_named_when_something_lacks(home, env):
    files.write_comfyui(home, {part: STATES[part] for part in ("clip", "t5", "vae")})
    (home / "unet").mkdir()
    (home / "unet" / "flux.safetensors").write_bytes(b"<!DOCTYPE html>")
    message = problems(resolve_model, home, env)
    assert "not found: transformer/" in message and "it is a web page" in message


@pytest.mark.parametrize(
    "closed",
    ["models", "models/vae", "models/loras", "models/unet/private", "models/unet/locked.safetensors"],
)
def test_what_cannot_be_read_hides_nothing_else(tmp_path, env, monkeypatch, closed):
    """Folders of another user, and lost+found: they are noted, the rest of the tree is found."""
    files.write_comfyui(tmp_path / "tree" / "models", STATES)
    files.write_tokenizers(tmp_path / "tree" / "models")
    shut = tmp_path / "tree" / closed
    shut.parent.mkdir(parents=True, exist_ok=True)
    if shut.suffix:
        write.save(shut, STATES["transformer"])
    else:
        shut.mkdir(exist_ok=True)
    shut_to(monkeypatch, shut)
    tree, needed = tmp_path / "tree", closed in ("models", "models/vae")
    if needed:
        message = problems(resolve_model, tree, env)
        assert f"{shut}: cannot be looked through: Permission denied" in message
        assert ("not found: transformer" in message) is (closed == "models")
    else:
        assert resolve_model(tree, env).paths["transformer"].name == "flux1-dev.safetensors"
    if closed != "models/loras":  # nobody looks there
        assert f"unreadable: {shut}: cannot be" in describe(tree)


def shut_to(monkeypatch, shut: Path) -> None:
    """As to a user without permissions, which tests that run as root do not know."""
    listed, opened = Path.iterdir, layouts.Shelf.open

    def denied(path: Path) -> None:
        if path == shut:
            raise PermissionError(13, "Permission denied", str(shut))

    monkeypatch.setattr(Path, "iterdir", lambda path: denied(path) or listed(path))
    monkeypatch.setattr(layouts.Shelf, "open", lambda shelf, path: denied(path) or opened(shelf, path))


def test_two_files_for_one_part_are_a_question(home, env):
    paths = files.write_flat(home, STATES)
    files.write_tokenizers(home)
    write.save(home / "t5xxl_fp8.safetensors", STATES["t5"])
    message = problems(resolve_model, home, env)
    assert "several t5 files (t5xxl_fp16.safetensors, t5xxl_fp8.safetensors)" in message
    assert_loads(ModelFiles({"transformer": paths["transformer"], "t5": paths["t5"]}), env)


def test_a_config_of_another_class_is_not_ours(home, env):
    files.write_flat(home, STATES)
    files.write_tokenizers(home)
    write.write_json(home / "config.json", {"model_type": "llama", "_class_name": "Other"})
    assert_loads(home, env)
    write.write_json(home / "config.json", clip.CONFIG.to_json(files.CLIP) | {"hidden_act": "gelu"})
    assert "hidden_act = 'gelu'" in problems(load.load_components, home, env=env)


@pytest.mark.parametrize("together", [False, True])
def test_the_config_of_an_adapter_is_no_others(home, env, together):
    """The published one names no class, and people put all their files into one folder."""
    if together:
        write.save(home / "all.safetensors", files.all_in_one(STATES))
    else:
        files.write_flat(home, STATES)
    files.write_tokenizers(home)
    write.write_json(home / "config.json", adapter.codec(FLUX_DEV).to_json(FLUX_BOKEH))
    assert_loads(home, env)
    assert "use: --model with this folder" in describe(home)


# --- missing parts, and too many


def test_missing_tokenizers_say_what_and_where_from(home, env):
    files.write_flat(home, STATES)
    message = problems(resolve_model, home, env)
    for part in ("tokenizer/ with vocab.json", "tokenizer_2/ with tokenizer_config.json", "bokehflux fetch",
                 "huggingface.co/black-forest-labs/FLUX.1-dev", str(home), "Hugging Face cache"):  # fmt: skip
        assert part in message, part
    assert "not found: vae" not in message
    files.write_tokenizers(home.parent / "tok")
    assert_loads(home, env | {"BOKEHFLUX_MODELS": str(home.parent / "tok")})


def test_a_whole_folder_is_strict(home):
    files.write_flat(home, STATES)
    assert "tokenizer/" in problems(open_snapshot, home)


@pytest.mark.parametrize("part", list(files.PREFIXES))
def test_all_in_one_is_covered_both_ways(home, env, part, monkeypatch):
    files.write_tokenizers(home)
    tensors = files.all_in_one(STATES)
    name = next(n for n in sorted(tensors) if n.startswith(files.PREFIXES[part]) and n.endswith("weight"))
    lost = dict(tensors)
    del lost[name]
    write.save(home / "a.safetensors", lost)
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("read a tensor"))
    loader = {
        "transformer": load.load_transformer,
        "vae": files.load_vae,
        "clip": files.load_clip,
        "t5": files.load_t5,
    }
    message = problems(loader[part], home / "a.safetensors")
    assert "missing: " in message or "not found" in message or "not a complete" in message
    write.save(home / "a.safetensors", tensors | {files.PREFIXES[part] + "extra.weight": torch.ones(2)})
    assert "unexpected: extra.weight [2]" in problems(loader[part], home / "a.safetensors")
    write.save(home / "a.safetensors", tensors | {"text_encoders.clip_g.x": torch.ones(2)})
    assert "unexpected: text_encoders.clip_g.x [2]" in problems(loader[part], home / "a.safetensors")


def test_full_size_text_encoders_need_no_config():
    assert files.told(clip.CONFIG, manifests.shapes("clip_l.hf")) == CLIP_L
    assert files.told(t5.CONFIG, manifests.shapes("t5xxl.hf")) == T5_XXL


def test_clip_files_may_hold_its_loss_scale(home):
    extra = {"logit_scale": torch.tensor(4.6), "text_projection.weight": torch.ones(64, 64)}
    write.save(home / "clip_l.safetensors", {**STATES["clip"], **extra})
    files.assert_holds(files.load_clip(home / "clip_l.safetensors", dtype=torch.float32), STATES["clip"])


def test_absurd_block_numbers_cost_nothing(home):
    far = {n.replace("encoder.block.1.", "encoder.block.999999999."): t for n, t in STATES["t5"].items()}
    write.save(home / "t5.safetensors", far)
    assert "missing: encoder.block" in problems(files.load_t5, home / "t5.safetensors")


def test_the_document(tmp_path, monkeypatch, capsys):
    """Every code block of docs/files.md runs."""
    text = (Path(__file__).parents[2] / "docs" / "files.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```(\w+)\n(.*?)```", text, re.S)
    monkeypatch.chdir(tmp_path)
    write.save("flux1-dev-fp8.safetensors", {n: t.to(torch.float8_e4m3fn) for n, t in STATES["clip"].items()})
    monkeypatch.setattr(fetch, "fetch", lambda name, **_: tmp_path / name)
    commands = [line.split("#")[0] for kind, block in blocks if kind == "bash" for line in block.split("\n")]
    ran = [cli.main(shlex.split(line)[1:]) for line in commands if line.startswith("bokehflux")]
    assert ran == [0, 0, 0]
    out = capsys.readouterr().out
    assert "precision: fp8 e4m3" in out and str(tmp_path / "atfortes" / "BokehDiffusion") in out
    for kind, block in blocks:
        if kind == "python":
            exec(compile(block, "docs/files.md", "exec"), {})


def test_files_beside_the_folders_of_a_repository_are_not_taken(home, env):
    """FLUX.1's own repository holds the transformer and the autoencoder twice: in folders and beside them."""
    files.write_official(home, STATES)
    files.write_tokenizers(home)
    files.write_flat(home, {n: {k: t + 1 for k, t in STATES[n].items()} for n in ("transformer", "vae")})
    assert_loads(home, env)


def test_shards_are_one_checkpoint_wherever_they_lie(home, env):
    files.write_comfyui(home, {part: STATES[part] for part in ("vae", "clip", "t5")})
    files.write_tokenizers(home)
    folder, names = home / "unet", list(STATES["transformer"])
    shards = [f"flux-{i}-of-00002.safetensors" for i in ("00001", "00002")]
    place = {name: shards[i % 2] for i, name in enumerate(names)}
    for shard in shards:
        write.save(folder / shard, {n: STATES["transformer"][n] for n in names if place[n] == shard})
    write.write_json(folder / "flux.safetensors.index.json", {"weight_map": place})
    assert_loads(home, env)
    found = layouts.scan(home, Shelf())
    assert len(found.parts["transformer"]) == 1 and not found.passed_over and not found.unreadable
