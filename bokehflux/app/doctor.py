"""What `bokehflux doctor` says: versions, devices, memory, attention, models, and what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from PIL import features

from bokehflux.kernels import dispatch
from bokehflux.kernels.attention import select
from bokehflux.kernels.fp8.interface import why_not
from bokehflux.models.precision import default_dtype
from bokehflux.pipeline.provenance import device_name
from bokehflux.version import __version__
from bokehflux.weights.files.checkpoint import NotFoundError
from bokehflux.weights.find.resolve import (
    ADAPTER_REPO,
    BUNDLED,
    DEV,
    SCHNELL,
    hub_cache,
    resolve_adapter,
    resolve_model,
)
from bokehflux.weights.find.snapshot import Snapshot

REQUIRED = ("torch", "einops", "safetensors", "sentencepiece", "tokenizers", "numpy", "pillow")
OPTIONAL = {
    "triton": "fused kernels on NVIDIA GPUs",
    "flash_attn": "FlashAttention, extra `flash`",
    "gguf": "GGUF checkpoints",
    "huggingface_hub": "downloads",
}
"""Import name -> what it is for."""


def report(environment: Mapping[str, str] = os.environ) -> Iterator[str]:
    """The lines, one by one: looking into a large cache may take a moment."""
    yield f"bokehflux {__version__}, Python {platform.python_version()}, {platform.platform()}"
    # With what it was built for, which the package's own record does not say.
    versions = {name: _version(name) for name in REQUIRED} | {"torch": torch.__version__}
    yield "packages: " + ", ".join(f"{name} {version}" for name, version in versions.items())
    for name, purpose in OPTIONAL.items():
        if importlib.util.find_spec(name) is None:
            yield f"optional package missing: {name} ({purpose})"
        else:
            yield f"optional package found: {name} {_version(name)}"
    if not features.check("webp"):
        yield "missing: this Pillow cannot write WebP, which `sweep` and --format webp need"
    yield from _devices()
    yield from _models(environment)


def _devices() -> Iterator[str]:
    cpu = torch.device("cpu")
    free = (
        f"{_free_host_memory() / 2**30:.1f} GiB of memory free" if _free_host_memory() else "memory unknown"
    )
    yield f"device cpu: {device_name(cpu)}, {torch.get_num_threads()} threads, {free}"
    yield from _attention(cpu)
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        free_bytes, total = torch.cuda.mem_get_info(device)
        major, minor = torch.cuda.get_device_capability(device)
        memory = f"{free_bytes / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        yield f"device cuda:{index}: {device_name(device)}, compute capability {major}.{minor}, {memory}"
        yield from _attention(device)
        reason = dispatch.why_not(device)
        yield f"  fused kernels: {'yes' if reason is None else f'OFF, {reason}'}"
        yield f"  fp8 compute: {why_not(device, torch.bfloat16) or 'yes'}"
    if torch.backends.mps.is_available():
        yield "device mps: Apple GPU, memory shared with the CPU; no fp8 (cast at load), no memory modes"
        yield from _attention(torch.device("mps"))
    if not torch.cuda.is_available():
        why = "this PyTorch is a CPU build" if torch.version.cuda is None else "no NVIDIA driver or GPU"
        yield f"device cuda: none, {why}"


def _attention(device: torch.device) -> Iterator[str]:
    """What FLUX's attention runs on, in the device's default dtype, and why."""
    dtype = default_dtype(device)
    plain, grounded = (select.choose(device, dtype, 128, grounded=grounded) for grounded in (False, True))
    yield f"  attention: {_path(device, plain)}"
    if grounded != plain:
        yield f"  attention on a pivot: {_path(device, grounded)}"
    if plain.off is not None:
        yield f"  SLOWER THAN IT COULD BE: the attention kernels for this GPU are off, {plain.off}"


def _path(device: torch.device, choice: select.Choice) -> str:
    if choice.backend != "sdpa":
        return f"{choice.backend} ({choice.reason})"
    if device.type != "cuda":
        return f"sdpa, PyTorch's own: the fused kernels need an NVIDIA GPU, this is {device.type}"
    fused = {
        "flash": torch.backends.cuda.flash_sdp_enabled()
        and torch.cuda.get_device_capability(device) >= (8, 0),
        "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
        "memory-efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
    }
    kernels = ", ".join(name for name, on in fused.items() if on) or "math only"
    return f"sdpa with PyTorch's kernels ({kernels}): {choice.reason}"


def _models(environment: Mapping[str, str]) -> Iterator[str]:
    """Models that load by name, those in BOKEHFLUX_MODELS (a tree, or folders in it) and in the Hugging Face
    cache; at the end, what to do next."""
    for variable in ("BOKEHFLUX_MODELS", "FLUX_MODEL", "FLUX_AE", "FLUX_DEV", "FLUX_SCHNELL", "AE"):
        if environment.get(variable):
            paths = [Path(os.path.expanduser(entry)) for entry in environment[variable].split(os.pathsep)]
            there = ", ".join("exists" if path.exists() else "does not exist" for path in paths)
            yield f"{variable}={environment[variable]}: {there}"
    own = [
        Path(os.path.expanduser(entry))
        for entry in environment.get("BOKEHFLUX_MODELS", "").split(os.pathsep)
        if entry
    ]
    folders = [folder for root in own if root.is_dir() for folder in _trees(root, environment)]
    folders += sorted(
        path
        for path in hub_cache(environment).glob("models--*/snapshots/*")
        if "flux" in path.parts[-3].lower()
    )
    models: list[str | Path] = [*BUNDLED, DEV, SCHNELL, *folders]
    usable: list[tuple[str, bool]] = []
    for model in models:
        found = _usable(model, environment)
        if isinstance(found, str):
            yield f"model {model}: not usable: {found or 'no part of it was found'}"
            continue
        config, adapter = found.config, "with" if found.adapter else "without"
        shape = f"{config.num_double} + {config.num_single} blocks of width {config.hidden_size}"
        yield f"model {model}: complete, {shape}, {adapter} its own adapter"
        if model not in BUNDLED:
            usable.append((str(model), found.adapter is not None))
    try:
        yield f"adapter {ADAPTER_REPO}: {resolve_adapter(ADAPTER_REPO, environment)}"
        adapter_found = True
    except ValueError:
        yield f"adapter {ADAPTER_REPO}: not found"
        adapter_found = False
    yield f"disk: {shutil.disk_usage('.').free / 2**30:.0f} GiB free in {Path.cwd()}"
    yield f"next: {_next_step(usable, adapter_found)}"


def _trees(root: Path, environment: Mapping[str, str]) -> list[Path]:
    """The folder itself where it is a model or cannot be listed, otherwise its folders."""
    if not isinstance(_usable(root, environment), str) or not os.access(root, os.R_OK | os.X_OK):
        return [root]
    return sorted(path for path in root.iterdir() if path.is_dir())


def _usable(model: str | Path, environment: Mapping[str, str]) -> Snapshot | str:
    """The files of a model, or what is wrong with it: not where it was looked for, the line names it."""
    try:
        return resolve_model(model, environment)
    except NotFoundError as error:
        lacks = [f"lacks {', '.join(error.missing)}"] if error.missing else []
        return "; ".join([*lacks, *error.refused])
    except (ValueError, OSError) as error:
        return " ".join(str(error).split())


def _next_step(usable: Sequence[tuple[str, bool]], adapter_found: bool) -> str:
    """The command that gets furthest with models (and whether each has its adapter) that were found."""
    make = 'bokehflux generate --prompt "a red ball" --bokeh-targets 0 8 28 --bokeh-pivot 15'
    for model, has_adapter in sorted(usable, key=lambda one: not one[1]):
        if has_adapter or adapter_found:
            adapter = "" if has_adapter else f" --adapter {ADAPTER_REPO}"
            return f"{make} --model {shlex.quote(model)}{adapter}"
    if usable:
        return f"bokehflux fetch {ADAPTER_REPO}, the adapter that gives FLUX its levels"
    return f"{make}, with the small model that is bundled; for FLUX, --model PATH or `bokehflux fetch`"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "(no version)"


def _free_host_memory() -> int:
    """Bytes, or 0 where the system does not say."""
    if sys.platform != "linux":
        return 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0
