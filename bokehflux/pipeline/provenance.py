"""Which model made a picture, and where it ran: the `Provenance` of a run."""

from __future__ import annotations

import dataclasses
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
from bokehflux.weights.networks import TRANSFORMER

if TYPE_CHECKING:
    from bokehflux.pipeline.model import Model


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a model came from: the names it was asked for by, and the files that were found."""

    model: str
    parts: Mapping[str, str] = field(default_factory=dict)
    """Parts that were given by themselves: "vae", "clip", "t5", "tokenizers" -> path."""
    adapter: str | None = None
    """As given; None where there was none, or the model brought its own."""
    loras: tuple[tuple[str, float], ...] = ()
    """File and strength of each, as given."""
    schedule: str | None = None
    """As given; None: the model's own."""
    snapshot: Snapshot | None = None
    """None for a model that was not loaded from files."""

    @classmethod
    def of(
        cls,
        model: str | Path | ModelFiles,
        adapter: str | Path | None,
        loras: Sequence[tuple[str | Path, float]],
        snapshot: Snapshot,
        schedule: str | None = None,
    ) -> Source:
        """What `bokehflux.load` was given, and what it found."""
        given = model.files if isinstance(model, ModelFiles) else {TRANSFORMER.name: model}
        parts = {name: str(path) for name, path in given.items()}
        return cls(
            model=parts.pop(TRANSFORMER.name),
            parts=parts,
            adapter=None if adapter is None else str(adapter),
            loras=tuple((str(path), float(strength)) for path, strength in loras),
            schedule=schedule,
            snapshot=snapshot,
        )

    @cached_property
    def hashes(self) -> tuple[str | None, str | None, tuple[tuple[str, float], ...]]:
        """Fingerprints of the model, the adapter and each LoRA (with its strength), read once when they are
        first asked for. Raises OSError for a file that is gone."""
        found = self.snapshot
        if found is None:
            return None, None, ()
        return (
            fingerprint(found.files),
            None if found.adapter is None else fingerprint([found.adapter]),
            tuple((fingerprint([path]), strength) for path, strength in found.loras),
        )


def provenance_of(model: Model, backend: str = "auto") -> Provenance:
    """What makes the pictures of this model now. backend: of attention, as in `run.Options`."""
    source, device = model.source, model.device
    model_hash, adapter_hash, lora_hashes = source.hashes
    return dataclasses.replace(
        provenance_here(device),
        model=source.model,
        adapter=source.adapter,
        loras=source.loras,
        schedule=source.schedule,
        model_hash=model_hash,
        adapter_hash=adapter_hash,
        lora_hashes=lora_hashes,
        dtype=str(model.dtype).removeprefix("torch."),
        compute=model.compute,
        attention=attention(model, backend),
        memory=model.memory.mode,
        vae=source.parts.get("vae"),
        clip=source.parts.get("clip"),
        t5=source.parts.get("t5"),
        tokenizers=source.parts.get("tokenizers"),
    )


def provenance_here(device: torch.device) -> Provenance:
    """Where pictures are made now."""
    return Provenance(
        device=device.type,
        device_name=device_name(device),
        threads=torch.get_num_threads() if device.type == "cpu" else None,
        torch=torch.__version__,
        triton=_triton_version() if device.type == "cuda" else None,
        version=__version__,
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
    head_dim = model.transformer.config.head_dim
    choices = [select.choose(model.device, model.dtype, head_dim, grounded=g) for g in (False, True)]
    return " + ".join(dict.fromkeys(choice.backend for choice in choices))


def _triton_version() -> str | None:
    """The version of the package that compiles our kernels, read without importing it."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None
