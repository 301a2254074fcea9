"""Where models are looked for: the order of places, the Hugging Face cache, and errors that name them all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from bokehflux.weights import load, networks, save
from bokehflux.weights.files import write
from bokehflux.weights.files.checkpoint import CheckpointError
from bokehflux.weights.find.resolve import (
    ADAPTER_REPO,
    DEV,
    SCHNELL,
    ModelFiles,
    cached_snapshot,
    hub_cache,
    resolve_adapter,
    resolve_lora,
    resolve_model,
)
from tests import model_files as files

STATES = files.states()
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return {"HOME": str(tmp_path / "home")}


def put_in_cache(hub: Path, repo: str, parts: dict, *, ref: bool = True, commit: str = COMMIT) -> Path:
    """As huggingface_hub leaves a repository: files are links into blobs/."""
    base = hub / f"models--{repo.replace('/', '--')}"
    snapshot = base / "snapshots" / commit
    source = base / "made"
    files.write_flat(source, parts)
    if "clip" in parts:
        files.write_tokenizers(source)
    (base / "blobs").mkdir(exist_ok=True)
    for i, path in enumerate(sorted(p for p in source.rglob("*") if p.is_file())):
        link = snapshot / path.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = base / "blobs" / f"{commit[:8]}{i}"
        path.rename(blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    if ref:
        (base / "refs").mkdir(exist_ok=True)
        (base / "refs" / "main").write_text(commit + "\n")
    return snapshot


def problems(call, *args, **kwargs) -> str:
    with pytest.raises(CheckpointError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


# --- the cache


def test_where_the_cache_is():
    home = {"HOME": "/h"}
    assert hub_cache(home) == Path("/h/.cache/huggingface/hub")
    assert hub_cache(home | {"XDG_CACHE_HOME": "/x"}) == Path("/x/huggingface/hub")
    assert hub_cache(home | {"HF_HOME": "/hf"}) == Path("/hf/hub")
    assert hub_cache(home | {"HF_HOME": "/hf", "HF_HUB_CACHE": "/c"}) == Path("/c")
    assert hub_cache(home | {"HF_HOME": ""}) == Path("/h/.cache/huggingface/hub")


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HF_HOME", "HOME"])
def test_cached_models_are_found(tmp_path, env, variable):
    hub = {"HF_HUB_CACHE": tmp_path, "HF_HOME": tmp_path / "hub", "HOME": tmp_path / ".cache/huggingface/hub"}
    snapshot = put_in_cache(hub[variable], DEV, STATES)
    env = env | {variable: str(tmp_path)}
    for name in (DEV, "FLUX.1-dev", "flux-dev"):
        assert resolve_model(name, env).paths["transformer"] == snapshot / "flux1-dev.safetensors"
    parts = load.load_components(DEV, dtype=torch.float32, env=env)
    files.assert_holds(parts.transformer, STATES["transformer"])
    assert "not found: transformer" in problems(resolve_model, SCHNELL, env)


def test_refs_say_which_snapshot(tmp_path, env):
    env = env | {"HF_HUB_CACHE": str(tmp_path)}
    older = put_in_cache(tmp_path, DEV, STATES, commit="a" * 40)
    assert cached_snapshot(DEV, env) == older
    newer = put_in_cache(tmp_path, DEV, STATES, commit="b" * 40)
    assert cached_snapshot(DEV, env) == newer
    refs = older.parents[1] / "refs"
    (refs / "main").unlink()
    assert cached_snapshot(DEV, env) is None  # two, and nothing says which
    for bad in ("../../../elsewhere", "", "c" * 40, "/etc"):
        (refs / "main").write_text(bad)
        assert cached_snapshot(DEV, env) is None


def test_a_lone_snapshot_needs_no_ref(tmp_path, env):
    snapshot = put_in_cache(tmp_path, DEV, STATES, ref=False)
    assert cached_snapshot(DEV, env | {"HF_HUB_CACHE": str(tmp_path)}) == snapshot


def test_an_unfinished_download_is_not_a_model(tmp_path, env):
    snapshot = put_in_cache(tmp_path, DEV, STATES)
    (snapshot / "flux1-dev.safetensors").resolve().unlink()
    message = problems(resolve_model, DEV, env | {"HF_HUB_CACHE": str(tmp_path)})
    assert "flux1-dev.safetensors: no such file" in message
    assert "not found: transformer" in message


# --- the order


def test_each_place_yields_to_the_one_before(tmp_path, env):
    env = env | {"HF_HUB_CACHE": str(tmp_path / "hub")}
    cached = put_in_cache(tmp_path / "hub", DEV, STATES)
    places = [cached / "flux1-dev.safetensors"]

    def found() -> Path:
        return resolve_model("flux-dev", env).paths["transformer"]

    assert found() == places[-1]
    for variable in ("FLUX_DEV", "FLUX_MODEL"):
        path = tmp_path / f"{variable}.safetensors"
        write.save(path, STATES["transformer"])
        env[variable] = str(path)
        assert found() == path
    own = tmp_path / "own"
    files.write_flat(own, {"transformer": STATES["transformer"]})
    env["BOKEHFLUX_MODELS"] = str(own)
    assert found() == own / "flux1-dev.safetensors"
    named = own / "FLUX.1-dev"
    files.write_flat(named, {"transformer": STATES["transformer"]})
    assert found() == named / "flux1-dev.safetensors"
    explicit = tmp_path / "explicit.safetensors"
    write.save(explicit, STATES["transformer"])
    snapshot = resolve_model(explicit, env)
    # All the rest is shared, and comes from the only place that has it.
    shared = {"t5": cached / "t5xxl_fp16.safetensors", "clip_tokenizer": cached / "tokenizer"}
    assert snapshot.paths.items() >= {"transformer": explicit, **shared}.items()


@pytest.mark.parametrize(("newer", "older"), [("FLUX_MODEL", "FLUX_DEV"), ("FLUX_AE", "AE")])
def test_bfl_variables(tmp_path, env, newer, older):
    env = env | {"HF_HUB_CACHE": str(tmp_path / "hub")}
    put_in_cache(tmp_path / "hub", DEV, STATES)
    part = "vae" if "AE" in newer else "transformer"
    for variable in (older, newer):
        path = tmp_path / f"{variable}.sft"
        write.save(path, STATES[part])
        env[variable] = str(path)
        assert resolve_model(DEV, env).paths[part] == path
    env[newer] = str(tmp_path / "absent.sft")
    message = problems(resolve_model, DEV, env)
    assert f"{newer} names this file, which does not exist" in message and "absent.sft" in message


def test_schnell_has_its_own_variable(tmp_path, env):
    schnell = without_guidance()
    write.save(tmp_path / "s.safetensors", schnell)
    write.save(tmp_path / "d.safetensors", STATES["transformer"])
    put_in_cache(tmp_path / "hub", DEV, STATES)
    env |= {"HF_HUB_CACHE": str(tmp_path / "hub"), "FLUX_SCHNELL": str(tmp_path / "s.safetensors"),
            "FLUX_DEV": str(tmp_path / "d.safetensors")}  # fmt: skip
    assert resolve_model("flux-schnell", env).config == files.SCHNELL
    assert resolve_model("flux-dev", env).config == files.MMDIT


def without_guidance() -> dict[str, torch.Tensor]:
    return {n: t for n, t in STATES["transformer"].items() if not n.startswith("guidance_in")}


@pytest.mark.parametrize("place", ["FLUX_MODEL", "named folder", "own folder", "cache"])
@pytest.mark.parametrize("asked", ["flux-dev", "flux-schnell"])
def test_a_name_gets_its_own_model_or_none(tmp_path, env, place, asked):
    """Wherever the other one lies: variables and folders are mixed up easily, and pictures would be bad."""
    right, wrong = STATES["transformer"], without_guidance()
    repo, says = DEV, "has no guidance embedding, so it is not dev"
    if asked == "flux-schnell":
        right, wrong, repo = wrong, right, SCHNELL
        says = "has a guidance embedding, so it is not schnell"
    parts, own = STATES | {"transformer": wrong}, tmp_path / "own"
    if place == "FLUX_MODEL":
        write.save(tmp_path / "some.safetensors", wrong)
        env["FLUX_MODEL"] = str(tmp_path / "some.safetensors")
    elif place == "cache":
        put_in_cache(tmp_path / "hub", repo, parts)
        env["HF_HUB_CACHE"] = str(tmp_path / "hub")
    else:
        folder = own / repo.split("/")[1] if place == "named folder" else own
        (files.write_official if place == "own folder" else files.write_flat)(
            folder, STATES if place == "own folder" else parts
        )
        if place == "own folder":
            config = files.SCHNELL if repo == DEV else files.MMDIT
            save.save_network(networks.TRANSFORMER, folder / "transformer", config, wrong)
        env["BOKEHFLUX_MODELS"] = str(own)
    message = problems(resolve_model, asked, env)
    assert says in message and "pass its path to use it" in message
    later = tmp_path / "later.safetensors"
    write.save(later, right)
    env["FLUX_DEV" if repo == DEV else "FLUX_SCHNELL"] = str(later)
    if place != "cache":  # which comes last
        env["HF_HUB_CACHE"] = str(tmp_path / "hub")
        put_in_cache(tmp_path / "hub", DEV, STATES)
        assert resolve_model(asked, env).paths["transformer"] == later


def test_one_folder_of_many_models(tmp_path, env):
    """In a ComfyUI tree the guidance embedding tells dev from schnell, as the names need not."""
    schnell = without_guidance()
    files.write_comfyui(tmp_path / "comfy", STATES)
    files.write_tokenizers(tmp_path / "comfy")
    write.save(tmp_path / "comfy" / "unet" / "another.safetensors", schnell)
    env["BOKEHFLUX_MODELS"] = os.pathsep.join(["", str(tmp_path / "comfy")])
    assert resolve_model("flux-schnell", env).paths["transformer"].name == "another.safetensors"
    assert resolve_model("flux-dev", env).paths["transformer"].name == "flux1-dev.safetensors"
    # Of a model that only its name tells from others, nothing there can be known to be it.
    assert "not found: transformer" in problems(resolve_model, "someone/FLUX.1-Kontext", env)


def test_an_explicit_model_is_never_replaced(tmp_path, env):
    """A folder without a transformer does not silently become the one of the cache."""
    put_in_cache(tmp_path / "hub", DEV, STATES)
    env["HF_HUB_CACHE"] = str(tmp_path / "hub")
    some = tmp_path / "some"
    files.write_flat(some, {"vae": STATES["vae"]})
    assert "not found: transformer" in problems(resolve_model, some, env)
    with pytest.raises(CheckpointError, match="layout not recognised"):
        load.load_components(some / "ae.safetensors", env=env)


def test_a_missing_folder_of_models_is_said(tmp_path, env):
    env["BOKEHFLUX_MODELS"] = str(tmp_path / "gone")
    message = problems(resolve_model, DEV, env)
    assert "BOKEHFLUX_MODELS names this folder, which does not exist" in message


def test_the_error_names_every_place(tmp_path, env):
    own = tmp_path / "own"
    own.mkdir()
    write.save(tmp_path / "ae.sft", STATES["vae"])
    env |= {
        "BOKEHFLUX_MODELS": str(own),
        "FLUX_AE": str(tmp_path / "ae.sft"),
        "HF_HOME": str(tmp_path / "hf"),
    }
    message = problems(resolve_model, DEV, env)
    for part in (f"{own} (BOKEHFLUX_MODELS)", "FLUX_MODEL and FLUX_AE", "FLUX_DEV and AE",
                 str(tmp_path / "hf" / "hub"), f"looked in {DEV}: nothing there", "bokehflux fetch",
                 "not found: transformer", "docs/files.md"):  # fmt: skip
        assert part in message, part
    assert message.startswith(f"no complete model {DEV} found; bundled with bokehflux: nano\n  - not found:")
    # What can only be a path is not looked for by name.
    assert "hugging" not in problems(resolve_model, tmp_path / "nowhere", env).split("get what")[0].lower()


def test_the_environment_is_read_at_the_call(tmp_path, env, monkeypatch):
    put_in_cache(tmp_path, DEV, STATES)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for name in ("BOKEHFLUX_MODELS", "FLUX_MODEL", "FLUX_AE", "FLUX_DEV", "AE"):
        monkeypatch.delenv(name, raising=False)
    assert resolve_model(DEV).paths["transformer"].name == "flux1-dev.safetensors"
    monkeypatch.setenv("FLUX_MODEL", "/nowhere/at/all")
    assert "/nowhere/at/all" in problems(resolve_model, DEV).replace("\\", "/")
    # A given mapping stands in for all of it.
    assert resolve_model(DEV, env | {"HF_HUB_CACHE": str(tmp_path)}).paths["transformer"].is_file()


# --- adapters and LoRAs


def test_adapters_by_path_and_by_name(tmp_path, env):
    env |= {"HF_HUB_CACHE": str(tmp_path / "hub")}
    path = tmp_path / "adapter.safetensors"
    path.touch()
    assert resolve_adapter(path, env) == path
    message = problems(resolve_adapter, ADAPTER_REPO, env)
    assert "Hugging Face cache" in message and f"bokehflux fetch {ADAPTER_REPO}" in message
    cached = put_in_cache(tmp_path / "hub", ADAPTER_REPO, {"vae": STATES["vae"]})
    assert resolve_adapter(ADAPTER_REPO, env) == cached
    env["BOKEHFLUX_MODELS"] = str(tmp_path / "own")
    (tmp_path / "own" / "BokehDiffusion").mkdir(parents=True)
    assert resolve_adapter(ADAPTER_REPO, env) == tmp_path / "own" / "BokehDiffusion"
    assert "no such file or folder" in problems(resolve_adapter, "./absent", env)


def test_loras_by_path_and_by_name(tmp_path, env):
    env["BOKEHFLUX_MODELS"] = str(tmp_path / "comfy")
    folder = tmp_path / "comfy" / "models" / "loras"
    folder.mkdir(parents=True)
    (folder / "style.safetensors").touch()
    for name in ("style", "style.safetensors", folder / "style.safetensors"):
        assert resolve_lora(name, env) == folder / "style.safetensors"
    message = problems(resolve_lora, "other", env)
    assert str(folder) in message and str(tmp_path / "comfy" / "loras") in message
    assert str(folder) not in problems(resolve_lora, "../style", env)


def test_model_files_need_a_transformer_only(tmp_path, env):
    put_in_cache(tmp_path / "hub", DEV, STATES)
    env["HF_HUB_CACHE"] = str(tmp_path / "hub")
    path = tmp_path / "x" / "t.safetensors"
    write.save(path, STATES["transformer"])
    snapshot = resolve_model(ModelFiles({"transformer": path}), env)
    assert snapshot.paths["transformer"] == path and snapshot.paths["vae"].name == "ae.safetensors"
