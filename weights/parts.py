"""What a checkpoint holds: which networks, under which prefixes, with or without quantisation.

A file may be one network (names as its table says) or all of a model in one ("all-in-one": every network
under its prefix). Networks are recognised by their tables' markers, never by file names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .checkpoint import Checkpoint, CheckpointError, fold, open_checkpoint
from .mapping import Entry, Shape, Table, plan, recognise
from .precision import separate
from .tables import flux, text, vae


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A network of a model, and how files hold it."""

    name: str
    """As in the names of `Snapshot`'s fields."""
    tables: tuple[Table, ...]
    prefixes: tuple[str, ...]
    """What its names start with in files that hold more than this network; ComfyUI's and Forge's."""


TRANSFORMER = Kind(
    name="transformer", tables=flux.TABLES, prefixes=("model.diffusion_model.", "diffusion_model.")
)
VAE = Kind(name="vae", tables=vae.TABLES, prefixes=("first_stage_model.", "vae."))
CLIP = Kind(
    name="clip",
    tables=text.CLIP_TABLES,
    prefixes=("text_encoders.clip_l.transformer.", "text_encoders.clip_l."),
)
T5 = Kind(
    name="t5",
    tables=text.T5_TABLES,
    prefixes=("text_encoders.t5xxl.transformer.", "text_encoders.t5xxl."),
)
KINDS = (TRANSFORMER, VAE, CLIP, T5)
"""What a model is made of."""

LEFT_OVER = frozenset(
    f"text_encoders.{encoder}.{name}"
    for encoder in ("clip_l", "t5xxl")
    for name in ("logit_scale", "text_projection", "text_projection.weight")
)
"""What all-in-one files hold beside the networks; nothing of it takes part in making a picture."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One network in an opened checkpoint."""

    kind: Kind
    table: Table
    prefix: str
    checkpoint: Checkpoint
    """Its weights and biases, under the table's names."""
    scales: Mapping[str, str]
    """Weight -> name of its scale, which `checkpoint.read` finds."""


def prefixes(checkpoint: Checkpoint) -> dict[str, str]:
    """Name of each network that the checkpoint holds -> the prefix of its names."""
    found = {}
    for kind in KINDS:
        for prefix in ("", *kind.prefixes):
            if any(prefix + table.marker in checkpoint.tensors for table in kind.tables):
                found[kind.name] = prefix
                break
    return found


def strangers(checkpoint: Checkpoint, found: Mapping[str, str]) -> list[str]:
    """Names in an all-in-one file that belong to no network of it."""
    starts = tuple(found.values())
    return [n for n in checkpoint.tensors if not n.startswith(starts) and n not in LEFT_OVER]


def open_part(path: str | Path, kind: Kind) -> Part:
    """The network `kind` of a file, index or folder.

    Raises CheckpointError when the checkpoint does not hold it, or holds tensors that belong to nothing.
    """
    return part_of(open_checkpoint(path), kind)


def plan_part(part: Part, ours: Mapping[str, Shape]) -> list[Entry]:
    """How the part makes the parameters `ours`, exactly, as `mapping.plan`; all must be numbers."""
    checkpoint = part.checkpoint
    entries = plan(part.table, ours, checkpoint.shapes, checkpoint.path)
    used = {name: checkpoint.tensors[name] for entry in entries for name in entry.src}
    odd = [
        (name, f"is stored as {str(info.dtype).removeprefix('torch.')}, whose meaning nothing tells")
        for name, info in used.items()
        if info.packing is None and not info.dtype.is_floating_point
    ]
    if odd:
        raise CheckpointError(f"{checkpoint.path} ({part.table.name})", *fold(odd))
    return entries


def part_of(checkpoint: Checkpoint, kind: Kind) -> Part:
    """As `open_part`, of an opened checkpoint."""
    found = prefixes(checkpoint)
    prefix = found.get(kind.name, "")
    if prefix and (odd := strangers(checkpoint, found)):
        lines = fold((name, str(list(checkpoint.tensors[name].shape))) for name in odd)
        raise CheckpointError(checkpoint.path, *(f"unexpected: {line}" for line in lines))
    bare, scales = separate(checkpoint.under(prefix))
    table = recognise(kind.tables, bare.tensors, bare.path)
    return Part(kind=kind, table=table, prefix=prefix, checkpoint=bare, scales=scales)
