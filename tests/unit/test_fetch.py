"""Downloading, with a stand-in for huggingface_hub: what is asked for, and what every failure says."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from bokehflux.app import fetch as module
from bokehflux.app.fetch import FetchError, fetch
from bokehflux.weights.find.resolve import ADAPTER_REPO, DEV, SCHNELL


class NotThere(OSError):
    """As the hub's errors, which are OSErrors by way of `requests`."""


class Gated(NotThere):
    pass


class NoRevision(OSError):
    pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Records the calls; `raises` is what the next one raises, `files` what it leaves."""
    fake = types.ModuleType("huggingface_hub")
    state = types.SimpleNamespace(calls=[], raises=None, files=["model.safetensors"], folder=tmp_path / "got")

    def snapshot_download(**arguments: Any) -> str:
        state.calls.append(arguments)
        if state.raises is not None:
            raise state.raises
        for name in state.files:
            (state.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (state.folder / name).touch()
        state.folder.mkdir(exist_ok=True)
        return str(state.folder)

    fake.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    fake.errors = types.SimpleNamespace(  # type: ignore[attr-defined]
        GatedRepoError=Gated, RepositoryNotFoundError=NotThere, RevisionNotFoundError=NoRevision
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    return state


def failure(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(FetchError) as caught:
        fetch(*args, **kwargs)
    return str(caught.value)


def test_the_hub_is_asked_once_for_what_we_read(hub):
    assert fetch(env={}) == hub.folder
    (call,) = hub.calls
    assert (call["repo_id"], call["revision"], call["token"]) == (DEV, "main", None)
    # The transformer is there twice, 24 GB each; one is enough.
    assert "flux1-dev.safetensors" in call["allow_patterns"]
    assert not any(pattern.startswith("transformer") for pattern in call["allow_patterns"])
    for part in ("ae.safetensors", "text_encoder_2/*", "tokenizer/*", "tokenizer_2/*"):
        assert part in call["allow_patterns"]


@pytest.mark.parametrize(
    ("name", "repo"), [("flux-schnell", SCHNELL), (ADAPTER_REPO, ADAPTER_REPO), ("a/b", "a/b")]
)
def test_names(hub, name, repo):
    fetch(name, env={})
    assert hub.calls[0]["repo_id"] == repo
    assert not any(p.endswith((".bin", ".pt", ".ckpt")) or p == "*" for p in hub.calls[0]["allow_patterns"])


def test_some_files_of_some_revision(hub):
    fetch(DEV, module.TOKENIZERS_ONLY, revision="abc", env={"HF_TOKEN": "hf_x"})
    (call,) = hub.calls
    assert call["allow_patterns"] == ["tokenizer/*", "tokenizer_2/*"]
    assert (call["revision"], call["token"]) == ("abc", "hf_x")


def test_gated_repositories_say_what_to_do(hub):
    hub.raises = Gated("401 Client Error")
    message = failure(env={})
    for part in ("gated", f"https://huggingface.co/{DEV}", "HF_TOKEN", "accept its licence"):
        assert part in message
    assert "\n" not in message


def test_failures_are_explained(hub):
    hub.raises = NotThere("404")
    assert "there is no repository a/b" in failure("a/b", env={})
    hub.raises = NoRevision("404")
    assert "no revision 'v9'" in failure(DEV, revision="v9", env={})
    hub.raises = OSError(28, "No space left on device", "/cache/blobs/x")
    assert "could not be written" in failure(env={}) and "No space left" in failure(env={})
    hub.raises = ConnectionError("broken\n  pipe")
    message = failure(env={})
    assert "broken pipe" in message and "run the command again" in message
    hub.raises, hub.files = None, []
    assert "has none of the files" in failure("a/b", env={})


@pytest.mark.parametrize("name", ["", "flux", "a/b/c", "/b", "a/", "../x", "a b/c", "a/-b", "a/b\n"])
def test_names_that_are_no_repository(hub, name):
    assert "is not a repository" in failure(name, env={})
    assert not hub.calls


@pytest.mark.parametrize("value", ["1", "true", "ON"])
def test_offline_means_offline(hub, value):
    assert "HF_HUB_OFFLINE" in failure(env={"HF_HUB_OFFLINE": value})
    assert not hub.calls
    fetch(env={"HF_HUB_OFFLINE": "0"})


def test_without_the_package_one_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install huggingface_hub" in failure(env={})


def test_interruption_passes_through(hub):
    hub.raises = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        fetch(env={})


def test_the_errors_we_tell_apart_exist_in_the_real_package():
    errors = pytest.importorskip("huggingface_hub.errors")
    assert issubclass(errors.GatedRepoError, errors.RepositoryNotFoundError)
    assert errors.RevisionNotFoundError
