"""What lies in a folder: the candidates for every part of a model, in any of the layouts people keep.

- Official snapshot: `transformer/ vae/ text_encoder/ text_encoder_2/ tokenizer/ tokenizer_2/ scheduler/`.
- Files in the folder itself: BFL's `flux1-dev.safetensors` and `ae.safetensors`, text encoders, all-in-ones.
- ComfyUI tree: the same files below `unet/ diffusion_models/ checkpoints/ vae/ clip/ text_encoders/`, in the
  folder or in `models/` below it.

They mix. Files are recognised by their headers, never by their names; only headers are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from bokehflux.configs import MMDiTConfig

from .checkpoint import FILE_SUFFIXES, Checkpoint, CheckpointError, holds_checkpoint, open_checkpoint
from .mapping import renamed
from .parts import CLIP, KINDS, T5, TRANSFORMER, VAE, prefixes

OFFICIAL = {
    TRANSFORMER.name: "transformer",
    VAE.name: "vae",
    CLIP.name: "text_encoder",
    T5.name: "text_encoder_2",
}
TOKENIZERS = {"clip_tokenizer": "tokenizer", "t5_tokenizer": "tokenizer_2"}
COMFYUI = ("unet", "diffusion_models", "checkpoints", "vae", "clip", "text_encoders")
"""Folders of a ComfyUI tree that hold parts of a model."""
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A file or folder that may serve as one part."""

    path: Path
    checkpoint: Checkpoint | None = None
    """Header of a file that was recognised; None for what its place alone says."""
    prefix: str = ""
    """Not empty in an all-in-one file."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What a folder offers."""

    root: Path
    parts: Mapping[str, tuple[Candidate, ...]]
    """Keys: the kinds of network, `clip_tokenizer` and `t5_tokenizer`."""
    unreadable: tuple[str, ...] = ()
    """Files that look like checkpoints and are none, with the reason."""


def scan(root: Path) -> Findings:
    """Look through a folder. Raises CheckpointError when it cannot be listed."""
    try:
        return _scan(root)
    except OSError as error:
        raise CheckpointError(root, f"cannot be looked through: {error}") from error


def _scan(root: Path) -> Findings:
    parts: dict[str, tuple[Candidate, ...]] = {}
    tree = [base / name for base in (root, root / "models") for name in COMFYUI if (base / name).is_dir()]
    # A lone `vae/` is the official one; ComfyUI's has others beside it.
    comfyui = any(folder.name != "vae" for folder in tree)
    if not comfyui:
        parts = {
            kind: (Candidate(path=root / name),)
            for kind, name in OFFICIAL.items()
            if holds_checkpoint(root / name)
        }
    homes = [root, root / "models", *(f for f in tree if comfyui and f.name in ("clip", "text_encoders"))]
    for kind, name in TOKENIZERS.items():
        parts[kind] = tuple(Candidate(path=home / name) for home in homes if (home / name).is_dir())
    files = sorted(p for p in root.iterdir() if p.suffix in FILE_SUFFIXES)
    for folder in tree if comfyui else ():
        files += sorted(p for p in folder.rglob("*") if p.suffix in FILE_SUFFIXES)
    unreadable = []
    official = set(parts)
    loose: dict[str, list[Candidate]] = {}
    for file in files:
        if _SHARD.search(file.name):
            continue
        try:
            found = candidates(file)
        except CheckpointError as error:
            unreadable.append(str(error))
            continue
        for kind, candidate in found:
            loose.setdefault(kind, []).append(candidate)
    parts |= {kind: tuple(found) for kind, found in loose.items() if kind not in official}
    return Findings(root=root, parts=parts, unreadable=tuple(unreadable))


def candidates(file: Path) -> Iterator[tuple[str, Candidate]]:
    """The networks that one file, index or component folder holds. Raises CheckpointError."""
    checkpoint = open_checkpoint(file)
    return iter(
        [
            (kind, Candidate(path=file, checkpoint=checkpoint, prefix=prefix))
            for kind, prefix in prefixes(checkpoint).items()
        ]
    )


def is_flux(candidate: Candidate, guided: bool | None = None) -> bool:
    """Whether a recognised transformer is FLUX.1 (SD3 and others share its last layer); dev or schnell."""
    if candidate.checkpoint is None:
        return True
    names = candidate.checkpoint.under(candidate.prefix).tensors
    guidance = ("guidance_in.in_layer.weight", "time_text_embed.guidance_embedder.linear_1.weight")
    return any(name in names for name in ("txt_in.weight", "context_embedder.weight")) and (
        guided is None or guided == any(name in names for name in guidance)
    )


def fits(kind: str, candidate: Candidate, mmdit: MMDiTConfig) -> bool:
    """Whether a recognised file has the width that the transformer asks for: CLIP-L and not CLIP-G, ..."""
    if candidate.checkpoint is None:
        return True
    part = candidate.checkpoint.under(candidate.prefix)
    tables = next(k.tables for k in KINDS if k.name == kind)
    table = next(table for table in tables if table.marker in part.tensors)
    shapes = renamed(table, part.shapes)
    if kind == VAE.name:
        return 4 * shapes.get("decoder.conv_in.weight", (0, 0))[1] == mmdit.in_channels
    if kind == CLIP.name:
        return shapes[CLIP.tables[0].marker] == (mmdit.pooled_dim,)
    # UMT5 has T5-XXL's width and a position bias in every block.
    umt5 = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight" in shapes
    return shapes[T5.tables[0].marker] == (mmdit.txt_dim,) and not umt5
