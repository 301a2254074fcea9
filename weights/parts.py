"""The networks in an opened checkpoint: which there are, under which prefixes, with or without quantisation.

A file may be one network (names as its table says) or all of a model in one ("all-in-one": every network
under its prefix). Networks are recognised by their tables' markers, never by file names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

from .codec import Shapes
from .files.checkpoint import (
    Checkpoint,
    CheckpointError,
    fold,
    holds_checkpoint,
    open_checkpoint,
    open_pickle,
)
from .files.pickled import pickle_in
from .mapping import Entry, Shape, Table, plan, recognise, renamed
from .networks import NETWORKS, C, N, Network
from .precision import separate
from .relatives import stranger
from .tables import adapter

_LEFT_OVER = frozenset(
    network.prefixes[-1] + name
    for network in NETWORKS
    if network.tokenizer is not None
    for name in ("logit_scale", "text_projection", "text_projection.weight")
)
_AVERAGES = ("model_ema.", "ema_model.", "ema.")
"""What the names of a running average start with, where it is saved beside the weights."""


@dataclass(frozen=True, kw_only=True)
class Part(Generic[C, N]):
    """One network in an opened checkpoint."""

    network: Network[C, N]
    table: Table
    prefix: str
    checkpoint: Checkpoint
    """Its weights and biases, under the table's names."""
    scales: Mapping[str, str]
    """Weight -> name of its scale, which `checkpoint.read` finds."""

    @property
    def num_bytes(self) -> int:
        """Bytes that loading it reads."""
        tensors = self.checkpoint.tensors.items()
        return sum(info.num_bytes for name, info in tensors if not self.table.ignores(name))

    def config(self) -> C:
        """From its `config.json` or, without one, from its shapes. Raises CheckpointError."""
        codec, checkpoint = self.network.codec, self.checkpoint
        stated = checkpoint.config()
        if stated is not None and not codec.owns(stated):
            stated = None
        if codec.tensors_rule:
            return codec.from_both(stated or {}, shapes_of(checkpoint, self.network))
        if stated is not None:
            return codec.from_json(stated, checkpoint.config_path)
        if self.table.needs_config:
            problem = "no config.json beside it: add the official one, or pass a config"
            raise CheckpointError(checkpoint.path, problem)
        return codec.from_shapes(shapes_of(checkpoint, self.network))

    def plan(self, ours: Mapping[str, Shape]) -> list[Entry]:
        """How it makes the parameters `ours`, exactly, as `mapping.plan`; all must be stored as numbers."""
        checkpoint = self.checkpoint
        entries = plan(self.table, ours, checkpoint.shapes, checkpoint.path)
        used = {name: checkpoint.tensors[name] for entry in entries for name in entry.src}
        odd = [
            (name, f"is stored as {str(info.dtype).removeprefix('torch.')}, whose meaning is unknown")
            for name, info in used.items()
            if info.packing is None and not info.dtype.is_floating_point
        ]
        if odd:
            raise CheckpointError(f"{checkpoint.path} ({self.table.name})", *fold(odd))
        return entries


def prefixes(checkpoint: Checkpoint) -> dict[str, str]:
    """Name of each network of a model that the checkpoint holds -> the prefix of its names."""
    found = {}
    for network in NETWORKS:
        for prefix in ("", *network.prefixes):
            if any(table.marks(checkpoint.tensors, prefix) for table in network.tables):
                found[network.name] = prefix
                break
    return found


def is_left_over(name: str) -> bool:
    """Whether files hold a tensor of this name beside the networks, and no picture needs it."""
    return name in _LEFT_OVER or name.startswith(_AVERAGES)


def strangers(checkpoint: Checkpoint, found: Mapping[str, str]) -> list[str]:
    """Names in an all-in-one file that belong to none of its networks."""
    starts = tuple(found.values())
    return [n for n in checkpoint.tensors if not n.startswith(starts) and not is_left_over(n)]


def shapes_of(checkpoint: Checkpoint, network: Network[Any, Any]) -> Shapes:
    """The shapes of a checkpoint by our names. Raises CheckpointError without the network's marker."""
    table = recognise(network.tables, checkpoint.tensors, checkpoint.path, network.codec.what)
    return Shapes(renamed(table, checkpoint.shapes), network.codec.what, checkpoint.path)


def open_any(path: str | Path) -> Checkpoint:
    """As `open_checkpoint`, but bokeh adapters may be pickles: BokehDepth's are (`.bin`).

    Raises CheckpointError for every other pickle.
    """
    path = Path(path)
    pickle = None if holds_checkpoint(path) else pickle_in(path)
    if pickle is None:
        return open_checkpoint(path)
    checkpoint = open_pickle(pickle)
    if adapter.LEVEL not in checkpoint.tensors:
        some = ", ".join(sorted(checkpoint.tensors)[:3])
        problem = f"a PyTorch pickle, but not a bokeh adapter (it holds {some}): convert it to .safetensors"
        raise CheckpointError(pickle, problem)
    return checkpoint


def open_part(path: str | Path, network: Network[C, N]) -> Part[C, N]:
    """The network of a file, index or folder.

    Raises CheckpointError when it is not there, or when the file holds tensors that belong to nothing.
    """
    return part_of(open_any(path) if network.pickled else open_checkpoint(path), network)


def part_of(checkpoint: Checkpoint, network: Network[C, N]) -> Part[C, N]:
    """As `open_part`, of an opened checkpoint."""
    if problem := stranger(checkpoint):
        raise CheckpointError(checkpoint.path, problem)
    found = prefixes(checkpoint)
    prefix = found.get(network.name, "")
    if prefix and (odd := strangers(checkpoint, found)):
        lines = fold((name, str(list(checkpoint.tensors[name].shape))) for name in odd)
        raise CheckpointError(checkpoint.path, *(f"unexpected: {line}" for line in lines))
    checkpoint = checkpoint.without([name for name in checkpoint.tensors if name.startswith(_AVERAGES)])
    bare, scales = separate(checkpoint.under(prefix))
    table = recognise(network.tables, bare.tensors, bare.path, network.codec.what)
    return Part(network=network, table=table, prefix=prefix, checkpoint=bare, scales=scales)
