"""Which model made a picture, and where it ran: the `Provenance` of a run."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bokehflux.fingerprint import fingerprint
from bokehflux.kernels.attention import select
from bokehflux.record import Provenance
from bokehflux.version import __version__
from bokehflux.weights.find.resolve import ModelFiles
from bokehflux.weights.find.snapshot import Snapshot

if TYPE_CHECKING:
    from bokehflux.pipeline.model import Model


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a model came from: the names it was asked for by, and the files that decide what it computes."""

    model: str
    parts: Mapping[str, str] = field(default_factory=dict)
    """Parts that were given by themselves: "vae", "clip", "t5", "tokenizers" -> path."""
    adapter: str | None = None
    """As given; None where there was none, or the model brought its own."""
    loras: tuple[tuple[str, float], ...] = ()
    """File and strength of each, as given."""
    files: tuple[Path, ...] = ()
    adapter_file: Path | None = None
    lora_files: tuple[Path, ...] = ()

    @cached_property
    def hashes(self) -> tuple[str | None, str | None, tuple[tuple[str, float], ...]]:
        """Fingerprints of the model, the adapter and each LoRA (with its strength), read once when they are
        first asked for; None for what has no files. Raises OSError for a file that is gone."""
        strengths = [strength for _, strength in self.loras]
        loras = [fingerprint([file]) for file in self.lora_files]
        return (
            fingerprint(self.files) if self.files else None,
            None if self.adapter_file is None else fingerprint([self.adapter_file]),
            tuple(zip(loras, strengths, strict=True)),
        )


def source_of(
    snapshot: Snapshot,
    model: str | Path | ModelFiles,
    adapter: str | Path | None,
    loras: Sequence[tuple[str | Path, float]],
) -> Source:
    """The source of a model that was found as `snapshot` for these arguments of `bokehflux.load`."""
    parts = {}
    if isinstance(model, ModelFiles):
        parts = {name: str(path) for name, path in model.files.items()}
    return Source(
        model=parts.pop("transformer", str(model)),
        parts=parts,
        adapter=None if adapter is None else str(adapter),
        loras=tuple((str(path), float(strength)) for path, strength in loras),
        files=tuple(snapshot.files),
        adapter_file=snapshot.adapter,
        lora_files=tuple(path for path, _ in snapshot.loras),
    )


def provenance_of(model: Model, backend: str = "auto") -> Provenance:
    """What makes the pictures of this model now. backend: of attention, as in `run.Options`."""
    source, device = model.source, model.device
    model_hash, adapter_hash, lora_hashes = source.hashes
    return Provenance(
        model=source.model,
        adapter=source.adapter,
        loras=source.loras,
        model_hash=model_hash,
        adapter_hash=adapter_hash,
        lora_hashes=lora_hashes,
        dtype=str(model.dtype).removeprefix("torch."),
        compute=model.compute,
        device=device.type,
        device_name=device_name(device),
        threads=torch.get_num_threads() if device.type == "cpu" else None,
        torch=torch.__version__,
        triton=_triton_version() if device.type == "cuda" else None,
        version=__version__,
        attention=attention(model, backend),
        memory=model.memory.mode,
        vae=source.parts.get("vae"),
        clip=source.parts.get("clip"),
        t5=source.parts.get("t5"),
        tokenizers=source.parts.get("tokenizers"),
    )


def device_name(device: torch.device) -> str:
    """Devices of one name compute alike, a CPU with as many threads: the GPU's product name, or the CPU's
    kind and vector unit."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return f"{device.type} {platform.machine()}"


def attention(model: Model, backend: str) -> str:
    """The attention backends of a model's runs: without a pivot, then with one where that is another."""
    if backend != "auto":
        return backend
    head_dim = model.mmdit.config.head_dim
    choices = [select.choose(model.device, model.dtype, head_dim, grounded=g) for g in (False, True)]
    return " + ".join(dict.fromkeys(choice.backend for choice in choices))


def _triton_version() -> str | None:
    """The version of the package that compiles our kernels, read without importing it."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None
