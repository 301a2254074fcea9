"""Download models through `huggingface_hub`: the only module of the library with a network.

Files land in the Hugging Face cache, where the resolver (`weights/find/resolve.py`) and other programs find
them; an interrupted download goes on where it stopped. Each repository is asked for what this library reads
and no more: FLUX.1-dev holds its transformer twice, 24 GB each.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bokehflux.weights.find.resolve import ADAPTER_REPO, DEV, NAMES, REPO, SCHNELL

_SHARED = ("text_encoder/*", "text_encoder_2/*", "tokenizer/*", "tokenizer_2/*", "scheduler/*")
PATTERNS: dict[str, tuple[str, ...]] = {
    DEV: ("flux1-dev.safetensors", "ae.safetensors", *_SHARED),
    SCHNELL: ("flux1-schnell.safetensors", "ae.safetensors", *_SHARED),
    ADAPTER_REPO: ("config.json", "*.safetensors"),
}
"""Files of the repositories that this library knows."""
OTHERS = ("*.safetensors", "*.sft", "*.gguf", "*.json", "*.txt", "*.model")
"""Files of all other repositories: weights, configs, tokenizers; never pickles."""
TOKENIZERS_ONLY = ("tokenizer/*", "tokenizer_2/*")


class FetchError(ValueError):
    """Nothing, or not all, could be downloaded; says why and what to do."""


def fetch(
    name: str = DEV,
    patterns: tuple[str, ...] | None = None,
    *,
    revision: str = "main",
    env: Mapping[str, str] | None = None,
) -> Path:
    """Download a repository into the Hugging Face cache and return its folder there.

    name: a repository id such as "atfortes/BokehDiffusion", or a short name such as "flux-dev".
    patterns: which files; None takes those of `PATTERNS` (or `OTHERS`), `TOKENIZERS_ONLY` is 3 MB.
    revision: branch, tag or commit. env: stands in for the environment; `HF_TOKEN` is the login that gated
    repositories ask for. Progress is shown by huggingface_hub.
    Raises FetchError.
    """
    env = os.environ if env is None else env
    hub = _hub()
    repo = NAMES.get(name, name)
    if not REPO.fullmatch(repo):
        known = ", ".join(sorted(NAMES))
        raise FetchError(f"{name!r} is not a repository: expected owner/name, or one of {known}")
    if env.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise FetchError(f"HF_HUB_OFFLINE is set: unset it to download {repo}")
    chosen = PATTERNS.get(repo, OTHERS) if patterns is None else patterns
    try:
        folder = hub.snapshot_download(
            repo_id=repo, revision=revision, allow_patterns=list(chosen), token=env.get("HF_TOKEN") or None
        )
    except Exception as error:  # requests, httpx, hub and the file system each have their own classes
        raise FetchError(_explained(error, hub, repo, revision)) from error
    found = Path(folder)
    if not any(p.is_file() for p in found.rglob("*")):
        raise FetchError(f"{repo} has none of the files {', '.join(chosen)}")
    return found


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        problem = "downloading needs the package `huggingface_hub`: pip install huggingface_hub"
        raise FetchError(problem) from None
    return huggingface_hub


def _explained(error: Exception, hub: Any, repo: str, revision: str) -> str:
    page = f"https://huggingface.co/{repo}"
    errors = hub.errors
    # A gated repository is also "not found" to the hub: the order matters.
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{repo} is gated: accept its licence at {page} with your account, make a token at "
            "https://huggingface.co/settings/tokens and set it as HF_TOKEN (or run `hf auth login`)"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no repository {repo}, or it is private and HF_TOKEN may not read it ({page})"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no revision {revision!r} ({page})"
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return f"{repo} could not be written: {error}"
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"{repo} could not be downloaded: {reason:.400}. What has arrived is kept: run the command again"
