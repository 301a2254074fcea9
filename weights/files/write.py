"""Write .safetensors checkpoints and JSON files, each whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .checkpoint import DTYPES, INDEX_SUFFIX

UNFINISHED = re.compile(r"\..+\.\d+\.tmp")
"""Names of files that are not whole: name and process."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`: takes its place when the block succeeds, vanishes when it does not.

    Raises FileExistsError for a folder or a device.
    """
    if path.exists() and not path.is_file():  # a device would be replaced, too
        kind = "folder" if path.is_dir() else "device"
        raise FileExistsError(f"{path} is a {kind}, and a file of that name is to be written")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def unfinished(folder: Path) -> dict[Path, int]:
    """What processes that were killed have left of files that they were writing in a folder or below, and its
    bytes. One that a living process finishes meanwhile is left out."""
    found = {}
    for path in folder.rglob(".*.tmp"):
        if UNFINISHED.fullmatch(path.name):
            with contextlib.suppress(FileNotFoundError):
                found[path] = path.stat().st_size
    return found


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object as the official tools do (sorted, two spaces), whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write one .safetensors file, whole or not at all. Tensors on another device are all copied to the CPU.

    Raises ValueError for a tensor that `open_checkpoint` would refuse. `metadata` is free text;
    `format: pt`, which transformers insists on, is always there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        _write(temporary, tensors, metadata or {})


def save_sharded(
    folder: str | Path, tensors: Mapping[str, Tensor], stem: str, max_shard_bytes: int = 5 * 10**9
) -> Path:
    """Write a component folder: `{stem}.safetensors`, or shards with their index above max_shard_bytes.

    Files of an earlier save under the same stem are removed. One shard at a time is copied to the CPU.
    Returns the path to open.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards = _shards(tensors, max_shard_bytes)
    single = len(shards) == 1
    names = [f"{stem}.safetensors"] if single else [
        f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
    ]  # fmt: skip
    # Contexts close in reverse, so the index is replaced last, once every shard is complete.
    with contextlib.ExitStack() as stack:
        index_path = folder / f"{stem}{INDEX_SUFFIX}"
        temporary_index = None if single else stack.enter_context(replacing(index_path))
        for name, shard in zip(names, shards, strict=True):
            _write(stack.enter_context(replacing(folder / name)), {n: tensors[n] for n in shard}, {})
        if temporary_index is not None:
            index = {
                "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
                "weight_map": {n: name for name, shard in zip(names, shards, strict=True) for n in shard},
            }
            temporary_index.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            # A save that is killed between two shards must not leave an old index over some of the new ones.
            index_path.unlink(missing_ok=True)
    ours = {*names} if single else {*names, index_path.name}
    pattern = re.compile(re.escape(stem) + r"(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
    for stale in [p for p in folder.iterdir() if pattern.fullmatch(p.name) and p.name not in ours]:
        stale.unlink()
    return folder / names[0] if single else index_path


def _shards(tensors: Mapping[str, Tensor], max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name in sorted(tensors):
        if shards[-1] and size + tensors[name].nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensors[name].nbytes
    return shards


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    plain: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values() or name == "__metadata__" or tensor.is_meta:
            raise ValueError(f"cannot save tensor {name!r} of {tensor.dtype} on {tensor.device}")
        tensor = tensor.detach().cpu().contiguous()
        # The library refuses tensors that share memory, such as parts of a tied or split weight.
        storage = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    # The library's files are private to the user; ours get the rights of any new file in this place.
    path.touch()
    rights = path.stat().st_mode
    try:
        save_file(plain, path, {"format": "pt", **metadata})
    except SafetensorError as error:  # only the disk can still fail
        raise OSError(f"cannot write {path}: {error}") from error
    path.chmod(rights)
    with path.open("r+b") as file:
        os.fsync(file.fileno())
