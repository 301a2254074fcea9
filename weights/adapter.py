"""Bokeh adapters: the published one, and its sibling BokehDepth with other names for the same tensors.

BokehDepth comes as .safetensors or as a pickle, `pytorch_model.bin` or `bokeh_lora.bin`. That is the only
kind of pickle that is opened at all, and never executed (`pickled.py`).
"""

from __future__ import annotations

from pathlib import Path

from .checkpoint import Checkpoint, CheckpointError, TensorInfo, holds_checkpoint, open_checkpoint
from .parts import Kind, Part, part_of
from .pickled import PICKLE_SUFFIX, PickledFile
from .tables import bokeh

PICKLES = ("pytorch_model.bin", "bokeh_lora.bin")
"""Names that are known; a lone .bin of any other name will do as well."""


def open_adapter(path: str | Path) -> Part:
    """The adapter of a file or folder. Raises CheckpointError when there is none."""
    return adapter_part(open_any(path))


def adapter_part(checkpoint: Checkpoint) -> Part:
    """The adapter in an opened checkpoint, under whichever of its names."""
    table = bokeh.layout(checkpoint.tensors)
    if table.marker not in checkpoint.tensors:
        some = ", ".join(sorted(checkpoint.tensors)[:3]) or "nothing"
        problem = f"not a bokeh adapter: expected {table.marker!r} and 'adapter_modules.*', found {some}"
        raise CheckpointError(checkpoint.path, problem)
    return part_of(checkpoint, Kind(name="adapter", tables=(table,), prefixes=()))


def open_any(path: str | Path) -> Checkpoint:
    """As `open_checkpoint`, and pickled adapters. Raises CheckpointError for every other pickle."""
    path = Path(path)
    file = pickle_in(path) or path
    if file.suffix != PICKLE_SUFFIX or not file.is_file():
        return open_checkpoint(path)
    try:
        tensors = PickledFile(file).tensors
    except (OSError, ValueError) as error:
        raise CheckpointError(file, str(error)) from None
    if bokeh.ADAPTER.marker not in tensors:
        some = ", ".join(sorted(tensors)[:3])
        problem = f"a PyTorch pickle, and no bokeh adapter (it holds {some}): convert it to .safetensors"
        raise CheckpointError(file, problem)
    infos = {
        name: TensorInfo(file, tensor.dtype, tuple(tensor.shape), i, name)
        for i, (name, tensor) in enumerate(tensors.items())
    }
    return Checkpoint(file, infos, {})


def pickle_in(folder: Path) -> Path | None:
    """The .bin file of a folder without .safetensors; None when there is none, or several."""
    if not folder.is_dir() or holds_checkpoint(folder):
        return None
    found = sorted(p for p in folder.iterdir() if p.suffix == PICKLE_SUFFIX)
    known = [p for p in found if p.name in PICKLES]
    choice = known or found
    return choice[0] if len(choice) == 1 else None
