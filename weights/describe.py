"""Say what a file or folder is, from headers alone: networks, storage, what lacks, what we do with it.

A 24 GB file takes as long as a small one: no weights are read.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from bokehflux.configs import CLIP_L, FLUX_DEV, FLUX_SCHNELL, FLUX_VAE, T5_XXL
from bokehflux.models.clip import CLIPTextEncoder
from bokehflux.models.linear import NARROW, Linear
from bokehflux.models.mmdit import MMDiT
from bokehflux.models.t5 import T5Encoder
from bokehflux.models.vae import AutoencoderKL

from .adapter import adapter_part, open_any, pickle_in
from .bokeh_config import read_bokeh_config
from .checkpoint import Checkpoint, CheckpointError, TensorInfo, holds_checkpoint, open_checkpoint
from .layouts import Findings, is_flux, scan
from .lora import match_layers
from .official import read_clip_config, read_mmdit_config, read_t5_config, read_vae_config
from .parts import KINDS, LEFT_OVER, Part, part_of, plan_part, prefixes, strangers
from .snapshot import PARTS
from .tables import bokeh, tiny_decoder
from .tables import lora as lora_names
from .tiny_decoder import plan_tiny
from .unpack import FORMATS

_SHOWN = 12
_DTYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64",
    torch.float8_e4m3fn: "fp8 e4m3", torch.float8_e5m2: "fp8 e5m2",
}  # fmt: skip


class _Network(NamedTuple):
    """How a kind of part is described."""

    title: str
    read_config: Callable[[Part], Any]
    build: Callable[[Any], nn.Module]
    known: tuple[tuple[Any, str], ...]


_NETWORKS = {
    "transformer": _Network(
        "transformer", read_mmdit_config, MMDiT, ((FLUX_DEV, "FLUX.1-dev"), (FLUX_SCHNELL, "FLUX.1-schnell"))
    ),
    "vae": _Network("autoencoder", read_vae_config, AutoencoderKL, ((FLUX_VAE, "FLUX.1"),)),
    "clip": _Network("CLIP text encoder", read_clip_config, CLIPTextEncoder, ((CLIP_L, "CLIP-L"),)),
    "t5": _Network("T5 text encoder", read_t5_config, T5Encoder, ((T5_XXL, "T5-XXL"),)),
}


def describe(path: str | Path) -> str:
    """Several lines about a checkpoint file, a shard index, or a folder in any layout.

    Raises CheckpointError for what cannot be read at all: missing, damaged, a pickle that is
    no bokeh adapter, GGUF without `gguf`.
    """
    path = Path(path)
    if path.is_dir():
        findings = scan(path)
        networks = [kind.name for kind in KINDS if findings.parts.get(kind.name)]
        if networks or not (holds_checkpoint(path) or pickle_in(path)):
            return "\n".join([str(path), *_folder(findings)])
    checkpoint = open_any(path)
    return "\n".join([str(checkpoint.path), *_indented(_checkpoint(checkpoint))])


def _checkpoint(checkpoint: Checkpoint) -> list[str]:
    size = sum(file.stat().st_size for file in {info.file for info in checkpoint.tensors.values()})
    facts = f"{_bytes(size)}, {len(checkpoint.tensors)} tensors"
    found = prefixes(checkpoint)
    if found:
        return _networks(checkpoint, found, facts)
    if bokeh.ADAPTER.marker in checkpoint.tensors:
        return [f"bokeh adapter, {facts}", *_adapter(checkpoint)]
    if any(table.marker in checkpoint.tensors for table in tiny_decoder.TABLES):
        return [f"TAEF1, a tiny decoder for previews, {facts}", *_tiny(checkpoint)]
    if lora := _lora(checkpoint):
        return [f"{lora[0]}, {facts}", *lora[1:]]
    some = ", ".join(sorted(checkpoint.tensors)[:3]) or "nothing"
    return [
        f"not known: {facts} such as {some}",
        f"precision: {_precision(checkpoint.tensors.values(), False)}",
        "use: none; a FLUX.1 transformer, autoencoder, CLIP-L, T5, adapter, LoRA or TAEF1 was looked for",
    ]


def _networks(checkpoint: Checkpoint, found: dict[str, str], facts: str) -> list[str]:
    if len(found) == 1 and not any(found.values()):
        (name,) = found
        lines = _part(checkpoint, name)
        return [f"{_NETWORKS[name].title}, {facts}", *lines, _use(name)]
    lines = [f"all-in-one checkpoint, {facts}"]
    for name, prefix in found.items():
        lines += [f"{_NETWORKS[name].title}, under {prefix!r}", *_indented(_part(checkpoint, name))]
    lines += [f"unexpected: {name}" for name in strangers(checkpoint, found)[:_SHOWN]]
    left = [name for name in checkpoint.tensors if name in LEFT_OVER]
    lines += [f"ignored: {', '.join(left)}"] if left else []
    lacking = [_NETWORKS[kind.name].title for kind in KINDS if kind.name not in found]
    if lacking:
        lines.append(f"not in this file: {', '.join(lacking)}")
    return [*lines, _use("transformer" if "transformer" in found else next(iter(found)))]


def _part(checkpoint: Checkpoint, name: str) -> list[str]:
    """Layout, model, precision, memory and faults of one network."""
    network = _NETWORKS[name]
    kind = next(kind for kind in KINDS if kind.name == name)
    prefix = prefixes(checkpoint)[name]
    # Strangers of an all-in-one are reported once, not as the fault of every network in it.
    part_only = checkpoint.under(prefix)
    try:
        part = part_of(part_only, kind)
    except CheckpointError as error:
        return [f"problem: {problem}" for problem in error.problems[:_SHOWN]]
    infos = part.checkpoint.tensors.values()
    lines = [
        f"layout: {part.table.name}",
        f"parameters: {_count(sum(math.prod(info.shape) for info in infos))}",
        f"precision: {_precision(infos, bool(part.scales))}",
    ]
    try:
        config = network.read_config(part)
        with torch.device("meta"):
            module = network.build(config)
        shapes = {n: tuple(t.shape) for n, t in module.state_dict().items()}
        entries = plan_part(part, shapes)
    except CheckpointError as error:
        return [*lines, *(f"problem: {problem}" for problem in error.problems[:_SHOWN])]
    except ValueError as error:
        return [*lines, f"problem: {error}"]
    model = next((label for known, label in network.known if known == config), str(config))
    linear = {f"{n}.weight" for n, m in module.named_modules() if isinstance(m, Linear)}
    kept = [
        info
        for entry in entries
        if entry.dst in linear
        for info in (part.checkpoint.tensors[name] for name in entry.src)
        if info.dtype in NARROW or info.packing in FORMATS
    ]
    lines += [f"model: {model}", "complete: nothing missing, nothing unexpected"]
    how = "linear weights stay as stored and are cast at use" if kept else "cast to the compute dtype"
    return [*lines, f"loading: {how}; about {_bytes(_memory(infos, kept))} when that is bf16"]


def _memory(infos: Any, kept: list[TensorInfo]) -> int:
    narrow = sum(info.num_bytes for info in kept)
    places = {(info.file, info.key) for info in kept}
    return narrow + sum(2 * math.prod(i.shape) for i in infos if (i.file, i.key) not in places)


def _precision(infos: Any, scaled: bool) -> str:
    """The types of the tensors, by their share of the numbers."""
    counts: Counter[str] = Counter()
    for info in infos:
        label = info.packing or _DTYPES.get(info.dtype, str(info.dtype).removeprefix("torch."))
        if scaled and info.dtype in NARROW:
            label += " with scales"
        counts[label] += math.prod(info.shape)
    total = sum(counts.values()) or 1
    shares = [(label, 100 * n / total) for label, n in counts.most_common()]
    return ", ".join(
        label if len(shares) == 1 else f"{label} {share:.1f} %" if share >= 0.05 else f"{label} < 0.1 %"
        for label, share in shares
    )


def _adapter(checkpoint: Checkpoint) -> list[str]:
    infos = checkpoint.tensors.values()
    lines = [
        f"parameters: {_count(sum(math.prod(info.shape) for info in infos))}",
        f"precision: {_precision(infos, False)}",
    ]
    try:
        part = adapter_part(checkpoint)
        config = read_bokeh_config(part, FLUX_DEV)
    except CheckpointError as error:
        lines += [f"not for FLUX.1-dev: {problem}" for problem in error.problems[:_SHOWN]]
    else:
        lines.insert(0, f"layout: {part.table.name}")
        kinds = " and ".join(n for n, on in (("queries", config.adapt_q), ("keys", config.adapt_k)) if on)
        lines.append(
            f"model: for FLUX.1-dev, {len(config.blocks)} of {FLUX_DEV.num_blocks} blocks, "
            f"rank {config.rank}, updates {kinds or 'neither queries nor keys'}"
        )
    return [*lines, "use: --adapter"]


def _tiny(checkpoint: Checkpoint) -> list[str]:
    try:
        table, entries = plan_tiny(checkpoint)
    except CheckpointError as error:
        problems = [f"problem: {problem}" for problem in error.problems[:_SHOWN]]
        return [*problems, "use: none, it is not the decoder of FLUX.1's latents"]
    infos = [checkpoint.tensors[name] for entry in entries for name in entry.src]
    return [
        f"layout: {table.name}",
        f"parameters: {_count(sum(math.prod(info.shape) for info in infos))}",
        f"precision: {_precision(infos, False)}",
        "use: --preview-vae",
    ]


def _lora(checkpoint: Checkpoint) -> list[str] | None:
    """Title and lines, when the names are those of a LoRA or one of its relatives."""
    relatives = [
        kind
        for pattern, kind in lora_names.OTHER_KINDS
        if any(re.search(pattern, name) for name in checkpoint.tensors)
    ]
    ends = [end for end, _ in lora_names.ROLES if end != ".alpha"]
    matrices = [n for n in checkpoint.tensors if any(n.endswith(end) for end in ends)]
    downs = [n for n in matrices if any(n.endswith(end) for end, role in lora_names.ROLES if role == "down")]
    if not matrices and not relatives:
        return None
    precision = f"precision: {_precision(checkpoint.tensors.values(), False)}"
    if relatives:
        return [f"{', '.join(relatives)} adapter", precision, "use: none, only plain LoRA can be used"]
    ranks = sorted({shape[0] for n in downs if (shape := checkpoint.tensors[n].shape)})
    parts: Counter[str] = Counter()
    for name in downs:
        parts[next(part for prefix, part in lora_names.PREFIXES if name.startswith(prefix))] += 1
    where = ", ".join(f"{count} layers of {part}" for part, count in parts.items())
    rank = (
        f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}" if ranks else "no rank"
    )
    lines = ["LoRA", f"changes: {where or 'nothing'}, {rank}", precision]
    try:
        problems = match_layers(checkpoint, FLUX_DEV).problems
    except CheckpointError as error:
        problems = list(error.problems)
    if not problems:
        return [*lines, "model: for FLUX.1, every layer has its place", "use: --lora"]
    shown = [f"not for FLUX.1: {problem}" for problem in problems[:_SHOWN]]
    shown += [f"not for FLUX.1: {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
    return [*lines, *shown, "use: none with FLUX.1; it was made for another model"]


def _folder(findings: Findings) -> list[str]:
    lines = []
    for part, what in PARTS.items():
        found = findings.parts.get(part, ())
        if part == "transformer":
            found = tuple(candidate for candidate in found if is_flux(candidate))
        if not found:
            lines.append(f"{part}: missing; looked for {what}")
        for candidate in found:
            shown = candidate.path.relative_to(findings.root)
            lines.append(f"{part}: {shown}{' (one of several)' if len(found) > 1 else ''}")
            if part in _NETWORKS:
                lines += _indented(_component(candidate.path, part))
    lines += [f"unreadable: {problem}" for problem in findings.unreadable]
    missing = [part for part in PARTS if not findings.parts.get(part)]
    if not missing:
        lines.append("use: --model with this folder")
    elif "transformer" in missing:
        lines.append("use: none as a model, it has no transformer")
    else:
        lines.append(f"use: --model with this folder; {', '.join(missing)} must lie in another known place")
    return _indented(lines)


def _component(path: Path, name: str) -> list[str]:
    try:
        checkpoint = open_checkpoint(path)
        if name not in prefixes(checkpoint):
            return [f"problem: holds no {_NETWORKS[name].title}"]
        return _part(checkpoint, name)
    except CheckpointError as error:
        return [f"problem: {problem}" for problem in error.problems[:_SHOWN]]


def _use(name: str) -> str:
    if name == "transformer":
        return "use: --model; parts that are not in it are looked for beside it and in the known places"
    return "use: beside a transformer, in one folder or a ComfyUI tree, or named as a part of the model"


def _indented(lines: list[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _bytes(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def _count(count: int) -> str:
    for unit, size in (("billion", 10**9), ("million", 10**6)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return str(count)
