"""`load`: a model with its text encoders, autoencoder, adapter and LoRAs, placed where it shall run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

import torch

from bokehflux.models.fp8 import check_fp8
from bokehflux.models.precision import careful_dtype, default_dtype
from bokehflux.pipeline.memory import (
    MODES,
    MemoryMode,
    Placement,
    advised,
    choose,
    footprint,
    free_memory,
    place,
)
from bokehflux.pipeline.model import Compute
from bokehflux.pipeline.pipeline import Pipeline
from bokehflux.pipeline.provenance import Source
from bokehflux.pipeline.run import check_levels
from bokehflux.record import Provenance
from bokehflux.settings import Settings
from bokehflux.weights.find.resolve import ModelFiles
from bokehflux.weights.find.snapshot import ScheduleName, Snapshot
from bokehflux.weights.load import load_components

logger = logging.getLogger(__name__)


def load(
    model: str | Path | ModelFiles = "nano",
    *,
    adapter: str | Path | None = None,
    loras: Sequence[tuple[str | Path, float]] = (),
    schedule: ScheduleName | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    compute: Compute = "dtype",
    memory: MemoryMode | Literal["auto"] = "auto",
    on_found: Callable[[Snapshot], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Pipeline:
    """Load a model with its text encoders, autoencoder and, if given, a bokeh adapter and LoRAs.

    model: the name of a bundled model ("nano", which brings its adapter); a folder or file in any layout; a
        repository in the Hugging Face cache, such as "black-forest-labs/FLUX.1-dev"; or `ModelFiles`
        (`weights/find/resolve.py`), part by part. The pipeline's `name` is this as text.
    adapter: an adapter's folder, file or repository; None takes the model's own, if it has one.
    loras: (file, strength) of each, in any of the known key families; their effects add up.
    schedule: "dev" or "schnell": whose noise schedule, steps and text length; None takes the model's own. A
        transformer without guidance embedding is taken for schnell where no file tells, with a warning.
    device: None takes CUDA, then MPS, then the CPU. dtype: "bfloat16", "float32" or "float16"; None takes
        bfloat16 on a GPU and on a CPU that multiplies it in hardware, float32 on any other CPU.
    compute: "fp8" multiplies in e4m3 with rowwise scales in the transformer's blocks (`models/fp8.py`), which
        takes half the memory; it needs a GPU of compute capability 8.9 or higher (a CPU can, slowly, to try
        it out). "dtype": exactly in dtype.
    memory: "resident", "offload" or "stream" (`memory.py`); "auto" takes the first that fits in the GPU's
        free memory, and "resident" on other devices.
    on_found: called with the model's files when all are found and no weight is read yet; what it raises ends
        the loading.
    on_progress: called with the bytes read so far and those of the whole model, first with 0.
    Raises ValueError (`CheckpointError` for files) with everything that is wrong in one message, and
    MemoryError with what would fit.
    """
    where = pick_device(device)
    kind = _dtype(dtype, where)
    if compute not in get_args(Compute):
        raise ValueError(f"unknown compute {compute!r}: expected one of {get_args(Compute)}")
    if compute == "fp8":
        check_fp8(where, kind)
        if where.type == "cpu":
            logger.warning("compute 'fp8' on a CPU is for trying it out: it is slower than the dtype")
    if schedule not in (None, *get_args(ScheduleName)):
        raise ValueError(f"unknown schedule {schedule!r}: expected one of {get_args(ScheduleName)}")
    if memory not in (*MODES, "auto"):
        raise ValueError(f"unknown memory mode {memory!r}: expected 'auto' or one of {MODES}")
    _check_loras(loras)
    resident = memory == "resident" or where.type != "cuda"
    if resident and memory not in ("resident", "auto"):
        raise ValueError(f"memory mode {memory!r} needs a CUDA device, got {where}")
    # What will not stay on the device is never put there.
    home = where if resident else torch.device("cpu")
    with advised("resident", where if resident else None):
        parts = load_components(
            model,
            adapter=adapter,
            loras=loras,
            schedule=schedule,
            device=home,
            dtype=kind,
            text_dtype=careful_dtype(where, kind),
            fp8_on=where if compute == "fp8" else None,
            on_found=on_found,
            on_progress=on_progress,
        )
    placement = Placement()
    if where.type == "cuda":
        networks = (parts.transformer, parts.text.networks, parts.vae)
        mode: MemoryMode = "resident"
        if not resident:
            mode = choose(footprint(*networks), free_memory(where)) if memory == "auto" else memory
        logger.info("memory mode %s", mode)
        with advised(mode, where, footprint(*networks)):
            placement = place(*networks, mode, where)
    return Pipeline(
        transformer=parts.transformer,
        text=parts.text,
        vae=parts.vae,
        schedule=parts.snapshot.schedule,
        defaults=parts.snapshot.defaults,
        source=Source.of(model, adapter, loras, parts.snapshot, schedule),
        reference=None if parts.reference is None else parts.reference.to(where),
        controls=None if parts.controls is None else parts.controls.to(where),
        memory=placement,
    )


def _check_loras(loras: Sequence[tuple[str | Path, float]]) -> None:
    try:
        Provenance(loras=tuple((str(path), strength) for path, strength in loras))  # where they are recorded
    except (TypeError, ValueError) as error:
        raise ValueError(f"loras must be pairs of a file and a finite strength, got {loras!r:.80}") from error


def check_all(found: Snapshot, asked: Sequence[Settings]) -> None:
    """Raise ValueError for settings that a model cannot serve, by its files alone."""
    for settings in asked:
        check_levels(
            settings,
            has_adapter=found.adapter is not None,
            has_reference=found.reference is not None,
            has_controls=found.controls is not None,
        )
        settings.completed(found.defaults)


def pick_device(device: str | torch.device | None) -> torch.device:
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"unknown device {device!r}: expected cpu, cuda, cuda:N or mps") from error
    if where.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"unknown device {device!r}: expected cpu, cuda, cuda:N or mps")
    if where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {device} is not there: this machine shows {torch.cuda.device_count()} CUDA device(s)"
        )
    if where.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device mps is not there: this PyTorch has no Metal support")
    return where


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    known = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if dtype is None:
        return default_dtype(device)
    if isinstance(dtype, torch.dtype) and dtype in known.values():
        return dtype
    if isinstance(dtype, str) and dtype in known:
        return known[dtype]
    raise ValueError(f"unknown dtype {dtype!r}: expected one of {sorted(known)}")
