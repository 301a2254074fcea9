"""What lies in a folder: the candidates for every part of a model, in any of the layouts people keep.

- Official snapshot: `transformer/ vae/ text_encoder/ text_encoder_2/ tokenizer/ tokenizer_2/ scheduler/`.
- Files in the folder itself: BFL's `flux1-dev.safetensors` and `ae.safetensors`, text encoders, all-in-ones.
- ComfyUI tree: the same files below `unet/ diffusion_models/ checkpoints/ vae/ clip/ text_encoders/`, in the
  folder or in `models/` below it.

They mix. Files are recognised by their headers, never by their names; only headers are read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bokehflux.configs import MMDiTConfig

from ..codec import Shapes
from ..files.checkpoint import FILE_SUFFIXES, Checkpoint, CheckpointError, Shelf, holds_checkpoint
from ..networks import NETWORKS, Network
from ..parts import prefixes, shapes_of
from ..relatives import ENGINES, stranger

COMFYUI = ("unet", "diffusion_models", "checkpoints", "vae", "clip", "text_encoders")
"""Folders of a ComfyUI tree that hold parts of a model."""
TOKENIZERS = tuple(network.tokenizer for network in NETWORKS if network.tokenizer is not None)
PARTS = {row.name: row.files for row in NETWORKS} | {row.name: row.files for row in TOKENIZERS}
"""Every part of a model -> how errors name its files."""
_TAKE = "take a .safetensors or .gguf file"
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A file or folder that may serve as one part."""

    path: Path
    shelf: Shelf
    prefix: str | None = None
    """What the network's names start with in the file. None: not looked into, its place says what it is."""

    @property
    def checkpoint(self) -> Checkpoint:
        """Opened when it is first asked for."""
        return self.shelf.open(self.path)

    def shapes(self, network: Network[Any, Any]) -> Shapes:
        """The shapes of the network in it, by our names."""
        return shapes_of(self.checkpoint.under(self.prefix or ""), network)


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What a folder offers."""

    root: Path
    parts: Mapping[str, tuple[Candidate, ...]]
    """Keys: those of `PARTS`."""
    unreadable: tuple[str, ...] = ()
    """Files that look like checkpoints but cannot be opened, with the reason."""
    passed_over: tuple[tuple[Path, str], ...] = ()
    """Files that no network can come from, with the reason: other models, formats that cannot be read."""


def scan(root: Path, shelf: Shelf) -> Findings:
    """Look through a folder. Raises CheckpointError when it cannot be listed."""
    try:
        return _scan(root, shelf)
    except OSError as error:
        raise CheckpointError(root, f"cannot be looked through: {error}") from error


def _scan(root: Path, shelf: Shelf) -> Findings:
    parts: dict[str, tuple[Candidate, ...]] = {}
    tree = [base / name for base in (root, root / "models") for name in COMFYUI if (base / name).is_dir()]
    # A lone `vae/` is the official one; ComfyUI's has others beside it.
    comfyui = any(folder.name != "vae" for folder in tree)
    if not comfyui:
        parts = {
            row.name: (Candidate(path=root / row.folder, shelf=shelf),)
            for row in NETWORKS
            if holds_checkpoint(root / row.folder)
        }
    homes = [root, root / "models", *(f for f in tree if comfyui and f.name in ("clip", "text_encoders"))]
    for tokenizer in TOKENIZERS:
        folders = [home / tokenizer.folder for home in homes if (home / tokenizer.folder).is_dir()]
        parts[tokenizer.name] = tuple(Candidate(path=folder, shelf=shelf) for folder in folders)
    endings = {*FILE_SUFFIXES, *ENGINES}
    files = sorted(p for p in root.iterdir() if p.suffix in endings)
    for folder in tree if comfyui else ():
        files += sorted(p for p in folder.rglob("*") if p.suffix in endings)
    unreadable: list[str] = []
    passed_over: list[tuple[Path, str]] = []
    official = set(parts)
    loose: dict[str, list[Candidate]] = {}
    for file in files:
        if _SHARD.search(file.name):
            continue
        if file.suffix in ENGINES:
            passed_over.append((file, f"is {ENGINES[file.suffix]}, which cannot be read: {_TAKE}"))
            continue
        try:
            checkpoint = shelf.open(file)
            problem = stranger(checkpoint)
            found = {} if problem else candidates(file, shelf)
        except CheckpointError as error:
            unreadable.append(str(error))
            continue
        if not found:
            some = ", ".join(list(checkpoint.tensors)[:3]) or "nothing"
            passed_over.append((file, problem or f"holds no network of a model, but tensors such as {some}"))
        for name, candidate in found.items():
            loose.setdefault(name, []).append(candidate)
    parts |= {name: tuple(found) for name, found in loose.items() if name not in official}
    return Findings(root=root, parts=parts, unreadable=tuple(unreadable), passed_over=tuple(passed_over))


def candidates(file: Path, shelf: Shelf) -> dict[str, Candidate]:
    """The networks that one file, index or component folder holds. Raises CheckpointError."""
    found = prefixes(shelf.open(file))
    return {name: Candidate(path=file, shelf=shelf, prefix=prefix) for name, prefix in found.items()}


def misfit(
    candidate: Candidate, network: Network[Any, Any], transformer: MMDiTConfig | None = None
) -> str | None:
    """Why a file is not the network but a relative (UMT5), or does not meet the transformer (CLIP-G)."""
    if candidate.prefix is None:
        return None
    try:
        shapes = candidate.shapes(network)
        if not network.is_ours(shapes):
            return f"is a {network.codec.what} of another model"
        if network.seam is not None and transformer is not None:
            ours, its = network.seam.width(shapes), network.seam.wanted(transformer)
            if ours != its:
                return f"does not fit: {network.seam.what} {ours} channels, the transformer expects {its}"
        config = candidate.checkpoint.config()
        if config is not None and network.codec.owns(config) and (faults := network.codec.faults(config)):
            return f"does not fit: {'; '.join(faults)}"
    except CheckpointError as error:
        return f"does not fit: {error.problems[0]}"
    return None
