"""What lies in a folder: the candidates for every part of a model, in any of the layouts people keep.

- Official snapshot: `transformer/ vae/ text_encoder/ text_encoder_2/ tokenizer/ tokenizer_2/ scheduler/`.
- Files in the folder itself: BFL's `flux1-dev.safetensors` and `ae.safetensors`, text encoders, all-in-ones.
- Tree of a program: the same files below `unet/ diffusion_models/ checkpoints/ vae/ clip/ text_encoders/`
  (ComfyUI) or `Stable-diffusion/ VAE/ text_encoder/` (Forge, A1111), in the folder or in `models/` below it;
  InvokeAI's `models/`. Links are followed.

They mix. Files are recognised by their headers, never by their names; only headers are read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bokehflux.configs import MMDiTConfig

from ..codec import Shapes
from ..files.checkpoint import (
    CLOSED_SUFFIXES,
    FILE_SUFFIXES,
    SUFFIXES,
    Checkpoint,
    CheckpointError,
    Shelf,
    is_index,
    located,
    read_json,
)
from ..networks import NETWORKS, VAE, Network
from ..parts import prefixes, shapes_of
from ..relatives import like_autoencoder, stranger

TREE = frozenset({
    "unet", "diffusionmodels", "checkpoints", "stablediffusion", "vae", "clip", "textencoder", "textencoders",
})  # fmt: skip
"""Folders of a tree of ComfyUI, Forge, A1111 and their like that hold parts of a model, spelled plainly."""
TOKENIZERS = tuple(network.tokenizer for network in NETWORKS if network.tokenizer is not None)
PARTS = {row.name: row.files for row in NETWORKS} | {row.name: row.files for row in TOKENIZERS}
"""Every part of a model -> how errors name its files."""
_OFFICIAL = ("vae", "text_encoder")
_TAKE = "take a .safetensors or .gguf file"
_MISNAMED = re.compile(
    r"\.(?:safetensors|sft|gguf)(?:\.(?:part|partial|crdownload|download|incomplete|tmp|\d+))?$",
    re.IGNORECASE,
)
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


def tree_of(path: Path) -> Path | None:
    """The tree of a program that a file lies in, as deep as may be."""
    parents = path.absolute().parents
    named = (folder.parent for folder in parents if _plain(folder.name) in TREE)
    return next(named, None) or next((folder for folder in parents if _is_invokeai(folder)), None)


def scan(root: Path, shelf: Shelf) -> Findings:
    """Look through a folder. What in it cannot be read is noted, and keeps nothing else from being found."""
    parts: dict[str, tuple[Candidate, ...]] = {}
    seen = _Sorted(shelf)
    tree = _tree(root, seen)
    # Alone, these are folders of the official layout; a program's tree has others beside them.
    if all(folder.name in _OFFICIAL for folder in tree):
        tree = []
        parts = {
            row.name: (Candidate(path=root / row.folder, shelf=shelf),)
            for row in NETWORKS
            if any(path.suffix in SUFFIXES for path in seen.listed(root / row.folder))
        }
    official = set(parts)
    for file in seen.listed(root):
        seen.add(file)
    for folder in tree:
        seen.walk(folder)
    homes = [
        root,
        root / "models",
        *(f for f in tree if _plain(f.name) in ("clip", "textencoder", "textencoders")),
    ]
    for tokenizer in TOKENIZERS:
        folders = [home / tokenizer.folder for home in homes if os.path.isdir(home / tokenizer.folder)]
        folders = folders or seen.tokenizers.get(tokenizer.name, [])[:1]
        parts[tokenizer.name] = tuple(Candidate(path=folder, shelf=shelf) for folder in folders)
    parts |= {name: tuple(found) for name, found in seen.parts.items() if name not in official}
    return Findings(
        root=root, parts=parts, unreadable=tuple(seen.unreadable), passed_over=tuple(seen.passed_over)
    )


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name.lower())


def _tree(root: Path, seen: _Sorted) -> list[Path]:
    """The folders of a program's tree that hold parts of a model."""
    bases = [root, *(path for path in seen.listed(root) if path.name.lower() == "models")]
    tree = [path for base in bases for path in seen.listed(base) if _plain(path.name) in TREE]
    if _is_invokeai(root):
        tree.append(root / "models" if os.path.isdir(root / "models") else root)
    return [path for path in tree if os.path.isdir(path)]


def _is_invokeai(folder: Path) -> bool:
    # Its models lie in folders by base and kind, or by numbers, and say for themselves what they are.
    marks = ("invokeai.yaml", "databases/invokeai.db", "flux/main", "models/flux/main")
    return any(os.path.exists(folder / mark) for mark in marks)


class _Sorted:
    """Files by the parts of a model that they hold."""

    def __init__(self, shelf: Shelf) -> None:
        self.parts: dict[str, list[Candidate]] = {}
        self.tokenizers: dict[str, list[Path]] = {}
        self.unreadable: list[str] = []
        self.passed_over: list[tuple[Path, str]] = []
        self._shelf = shelf
        self._seen: set[str] = set()

    def walk(self, top: Path) -> None:
        """All below a folder, through links; what two links lead to counts once."""
        if not self._is_new(top):
            return
        for tokenizer in TOKENIZERS:
            if top.name == tokenizer.folder and any(os.path.isfile(top / mark) for mark in tokenizer.marks):
                self.tokenizers.setdefault(tokenizer.name, []).append(top)
        if (kind := _pipeline(top)) is not None:
            self.passed_over.append((top, f"is a snapshot for {kind}, not for FLUX.1"))
            return
        inside = self.listed(top)
        if top / "config.json" in inside and (component := _component(top)) is not None:
            self.add(component)
            inside = [path for path in inside if os.path.isdir(path)]
        for path in inside:
            if os.path.isdir(path):
                if not path.name.startswith("."):
                    self.walk(path)
            else:
                self.add(path)

    def listed(self, folder: Path) -> list[Path]:
        """What a folder holds: nothing where there is none, and where it cannot be listed, which is noted."""
        try:
            return sorted(folder.iterdir()) if os.path.isdir(folder) else []
        except OSError as error:
            note = f"{folder}: cannot be looked through: {error.strerror}"
            self.unreadable += [] if note in self.unreadable else [note]
            return []

    def add(self, file: Path) -> None:
        """One file, or the index of one checkpoint."""
        known = file.suffix in FILE_SUFFIXES or file.suffix in CLOSED_SUFFIXES or is_index(file)
        if not known and _MISNAMED.search(file.name) and not file.name.startswith("."):
            reason = (
                f"ends in {file.suffix}, as unfinished downloads do: {' or '.join(FILE_SUFFIXES)} is needed"
            )
            self.passed_over.append((file, reason))
        if not known or _SHARD.search(file.name) or not self._is_new(file):
            return
        if file.suffix in CLOSED_SUFFIXES:
            self.passed_over.append(
                (file, f"is {CLOSED_SUFFIXES[file.suffix]}, which cannot be read: {_TAKE}")
            )
            return
        try:
            checkpoint = self._shelf.open(file)
            problem = stranger(checkpoint)
            found = {} if problem else candidates(file, self._shelf)
        except CheckpointError as error:
            self.unreadable.append(str(error))
            return
        except OSError as error:
            self.unreadable.append(f"{file}: cannot be read: {error.strerror}")
            return
        if not found:
            some = ", ".join(list(checkpoint.tensors)[:3]) or "nothing"
            reason = problem or f"holds no network of a model, but tensors such as {some}"
            self.passed_over.append((file, reason))
        for name, candidate in found.items():
            self.parts.setdefault(name, []).append(candidate)

    def _is_new(self, path: Path) -> bool:
        real = os.path.realpath(path)
        new = real not in self._seen
        self._seen.add(real)
        return new


def _component(folder: Path) -> Path | None:
    """The checkpoint of a folder that holds one, whatever its variants."""
    try:
        return located(folder)
    except (CheckpointError, OSError):
        return None


def _pipeline(folder: Path) -> str | None:
    """The class of a snapshot of another model."""
    index = folder / "model_index.json"
    try:
        kind = str(read_json(index).get("_class_name", "")) if os.path.isfile(index) else ""
    except (CheckpointError, OSError):
        return None
    return kind if kind and not re.match(r"Flux(?!2)", kind) else None


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
            if problem := network.seam.problem(shapes, transformer):
                return f"does not fit: {problem}"
        config = candidate.checkpoint.config()
        if config is not None and network.codec.owns(config) and (faults := network.codec.faults(config)):
            return f"does not fit: {'; '.join(faults)}"
        if network is VAE and (alike := like_autoencoder(candidate.checkpoint)):
            return f"{alike}: --vae with its path uses it all the same"
    except CheckpointError as error:
        return f"does not fit: {error.problems[0]}"
    return None
