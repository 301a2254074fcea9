"""Which model made a picture: a fingerprint of its files, and where they were run.

A fingerprint is not a checksum of every byte: reading 34 GB would take longer than making a picture. Of files
up to 64 MB everything is hashed; of larger ones the size, the first and last megabyte (all of a safetensors
header, as a rule) and 256 blocks of 4 KB at equal distances. Other weights give other fingerprints, whatever
the files are called; a file that was tampered with on purpose can escape.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from bokehflux.version import __version__

if TYPE_CHECKING:
    import torch

    from bokehflux.pipeline.generate import Pipeline
    from bokehflux.weights.find.resolve import ModelFiles

WHOLE = 64 << 20
EDGE, BLOCK, NUM_BLOCKS = 1 << 20, 4 << 10, 256
SUFFIXES = (".safetensors", ".sft", ".bin", ".gguf", ".json", ".txt", ".model")
"""Endings of files that decide what a model folder computes: weights, configs, tokenizers."""


def fingerprint(paths: Iterable[Path]) -> str:
    """32 hexadecimal digits for a set of files and folders (their files, not those below). Names don't count.

    Raises OSError for a file that cannot be read.
    """
    files = {
        file
        for path in paths
        for file in (path.iterdir() if path.is_dir() else [path])
        if file == path or (file.suffix in SUFFIXES and file.is_file())
    }
    digests = sorted(_digest(file) for file in files)
    return hashlib.sha256(b"".join(digests)).hexdigest()[:32]


def model_facts(
    pipe: Pipeline, adapter: str | Path | None, loras: Sequence[tuple[str | Path, float]] = ()
) -> dict[str, Any]:
    """`model_hash`, `adapter_hash`, `lora_hashes` and the paths, the latter as given to `bokehflux.load`.

    Empty for a pipeline that was not loaded from files. Raises OSError when a file cannot be read.
    """
    snapshot = pipe.snapshot
    if snapshot is None:
        return {}
    return {
        "model_hash": fingerprint(snapshot.files),
        "adapter": None if adapter is None else str(adapter),
        "adapter_hash": None if snapshot.adapter is None else fingerprint([snapshot.adapter]),
        "loras": [[str(path), strength] for path, strength in loras],
        "lora_hashes": [[fingerprint([path]), strength] for path, strength in snapshot.loras],
    }


def facts(
    pipe: Pipeline,
    model: str | Path | ModelFiles,
    adapter: str | Path | None,
    loras: Sequence[tuple[str | Path, float]] = (),
) -> dict[str, Any]:
    """The part of a recipe that does not depend on the request: which model, and where it runs.

    Of `ModelFiles` all parts that were given, each by its name. Of the place, what can change the bits of a
    picture. Errors as `model_facts`.
    """
    import torch

    from bokehflux.weights.find.resolve import ModelFiles

    named: dict[str, str] = {"model": pipe.name}
    if isinstance(model, ModelFiles):
        given = {name: str(path) for name, path in model.files.items()}
        named = {"model": given.pop("transformer"), **given}
    return {
        **named,
        **model_facts(pipe, adapter, loras),
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "compute": pipe.compute,
        "version": __version__,
        "torch": torch.__version__,
        "triton": _triton_version() if pipe.device.type == "cuda" else None,
        "threads": torch.get_num_threads() if pipe.device.type == "cpu" else None,
        "device": pipe.device.type,
        "device_name": device_name(pipe.device),
        "attention": attention_choice(pipe.device, pipe.dtype, pipe.mmdit.config.head_dim)[0],
    }


def _triton_version() -> str | None:
    """Of the package that compiles our kernels; read without importing it."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    """Devices of one name compute alike, a CPU with as many threads: the GPU's product name, or the CPU's
    kind and vector unit."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return f"{device.type} {platform.machine()}"


def attention_choice(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, str]:
    """The attention backend that "auto" takes for such queries, and why."""
    from bokehflux.kernels.attention import interface

    return interface.choose(device, dtype, head_dim)


def _digest(path: Path) -> bytes:
    sha, size = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE:
            while block := file.read(EDGE):
                sha.update(block)
        else:
            sha.update(size.to_bytes(8, "little"))
            for start, length in [(0, EDGE), *_places(size), (size - EDGE, EDGE)]:
                sha.update(_read(file, start, length))
    return sha.digest()


def _places(size: int) -> list[tuple[int, int]]:
    return [(i * (size - BLOCK) // NUM_BLOCKS, BLOCK) for i in range(NUM_BLOCKS)]


def _read(file: BinaryIO, start: int, length: int) -> bytes:
    file.seek(start)
    return file.read(length)
