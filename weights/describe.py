"""Say what a file or folder is: its networks, how they are stored, what is missing, and how we load it.

Only headers are read, so a 24 GB file takes as long as a small one.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bokehflux.configs import FLUX_DEV, FLUX_VAE, BokehConfig, MMDiTConfig
from bokehflux.models.linear import NARROW, Linear
from bokehflux.text.tokenizers import TokenizerError

from .files.checkpoint import Checkpoint, CheckpointError, Shelf, TensorInfo, fold, holds_checkpoint
from .files.pickled import pickle_in
from .files.unpack import FORMATS
from .find.layouts import PARTS, TOKENIZERS, Candidate, Findings, misfit, scan
from .find.snapshot import check_own_files, likely
from .lora.read import PREFIXES, check_alphas, made_for, match_layers
from .networks import NETWORKS, TINY_DECODER, TRANSFORMER, VAE, Network, adapter_for
from .parts import is_left_over, open_any, part_of, prefixes, shapes_of, strangers
from .relatives import like_autoencoder, stranger, task
from .tables import adapter
from .tables import lora as lora_names

_SHOWN = 12
_DTYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64",
    torch.float8_e4m3fn: "fp8 e4m3", torch.float8_e5m2: "fp8 e5m2",
}  # fmt: skip


def describe(path: str | Path) -> str:
    """Several lines about a checkpoint file, a shard index, or a folder in any layout.

    Raises CheckpointError for what cannot be read at all: missing or damaged files, pickles other than bokeh
    adapters, GGUF without `gguf`.
    """
    path = Path(path)
    if path.is_dir():
        findings = scan(path, Shelf())
        networks = [network for network in NETWORKS if findings.parts.get(network.name)]
        if networks or not (holds_checkpoint(path) or pickle_in(path)):
            return "\n".join([str(path), *_folder(findings)])
    checkpoint = open_any(path)
    return "\n".join([str(checkpoint.path), *_indented(_checkpoint(checkpoint))])


def _checkpoint(checkpoint: Checkpoint) -> list[str]:
    size = sum(file.stat().st_size for file in {info.file for info in checkpoint.tensors.values()})
    facts = f"{_bytes(size)}, {len(checkpoint.tensors)} tensors"
    if (problem := stranger(checkpoint)) and not _lora(checkpoint):
        precision = _precision(checkpoint.tensors.values(), False)
        return [f"{problem.removeprefix('is ')}, {facts}", f"precision: {precision}", "use: none"]
    found = prefixes(checkpoint)
    if found:
        return _networks(checkpoint, found, facts)
    if adapter.LEVEL in checkpoint.tensors:
        lines = _network(checkpoint, adapter_for(FLUX_DEV), fault="not for FLUX.1-dev")
        use = "--adapter"
        if any(line.startswith("not for ") for line in lines):
            lacks = _lacks(checkpoint)
            lines, use = [*lines, *lacks], "none as it is" if lacks else "--adapter, with its own model"
        return [f"bokeh adapter, {facts}", *lines, f"use: {use}"]
    if any(table.marks(checkpoint.tensors) for table in TINY_DECODER.tables):
        lines = _network(checkpoint, TINY_DECODER, FLUX_VAE.latent_channels)
        wrong = any(line.startswith("problem: ") for line in lines)
        use = "none, it does not decode FLUX.1's latents" if wrong else "--preview-vae"
        return [f"{TINY_DECODER.codec.what}, {facts}", *lines, f"use: {use}"]
    if lora := _lora(checkpoint):
        return [f"{lora[0]}, {facts}", *lora[1:]]
    some = ", ".join(sorted(checkpoint.tensors)[:3]) or "nothing"
    return [
        f"unknown: {facts} such as {some}",
        f"precision: {_precision(checkpoint.tensors.values(), False)}",
        "use: none; a FLUX.1 transformer, autoencoder, CLIP-L, T5, adapter, LoRA or TAEF1 was looked for",
    ]


def _lacks(checkpoint: Checkpoint) -> list[str]:
    """What a bokeh adapter lacks for any transformer: its own shapes tell the width, and blocks enough."""
    try:
        shapes = shapes_of(checkpoint, adapter_for(FLUX_DEV))
        up = next((name for name in shapes if name.endswith(".to_v_bokeh.up.weight")), "to_v_bokeh.up.weight")
        width, blocks = shapes.size(up), shapes.count("adapter_modules")
        host = replace(FLUX_DEV, hidden_size=width, num_heads=1, axes_dim=(width,), num_single=blocks)
        network = adapter_for(host)
        lines = _network(checkpoint, network, network.codec.from_shapes(shapes))
    except CheckpointError as error:
        return [f"problem: {problem}" for problem in error.problems[:_SHOWN]]
    return [line for line in lines if line.startswith("problem: ")]


def _networks(checkpoint: Checkpoint, found: dict[str, str], facts: str) -> list[str]:
    held = [network for network in NETWORKS if network.name in found]
    if len(held) == 1 and not any(found.values()):
        return [
            f"{held[0].codec.what}, {facts}",
            *(lines := _network(checkpoint, held[0])),
            _use(held[0], lines),
        ]
    lines = [f"all-in-one checkpoint, {facts}"]
    for network in held:
        lines.append(f"{network.codec.what}, under {found[network.name]!r}")
        # Alone: strangers are reported once, not as the fault of every network.
        lines += _indented(_network(checkpoint.under(found[network.name]), network))
    lines += [f"unexpected: {name}" for name in strangers(checkpoint, found)[:_SHOWN]]
    left = fold((name, "") for name in checkpoint.tensors if is_left_over(name))
    lines += [f"ignored: {', '.join(left)}"] if left else []
    lacking = [network.codec.what for network in NETWORKS if network not in held]
    if lacking:
        lines.append(f"not in this file: {', '.join(lacking)}")
    return [*lines, _use(held[0], lines)]


def _network(
    checkpoint: Checkpoint, network: Network[Any, Any], config: Any = None, fault: str = "problem"
) -> list[str]:
    """Layout, model, precision, memory and faults of one network, which the whole checkpoint is."""
    lines: list[str] = []
    try:
        part = part_of(checkpoint, network)
        infos = [i for name, i in part.checkpoint.tensors.items() if not part.table.ignores(name)]
        lines = [
            f"layout: {part.table.name}",
            f"parameters: {_count(sum(math.prod(info.shape) for info in infos))}",
            f"precision: {_precision(infos, bool(part.scales))}",
        ]
        config = part.config() if config is None else config
        with torch.device("meta"):
            module = network.build(config)
        entries = part.plan({n: tuple(t.shape) for n, t in module.state_dict().items()})
    except CheckpointError as error:
        return [*lines, *(f"{fault}: {problem}" for problem in error.problems[:_SHOWN])]
    except ValueError as error:
        return [*lines, f"{fault}: {error}"]
    linear = {f"{n}.weight" for n, m in module.named_modules() if isinstance(m, Linear)}
    kept = [
        info
        for entry in entries
        if entry.dst in linear
        for info in (part.checkpoint.tensors[name] for name in entry.src)
        if info.dtype in NARROW or info.packing in FORMATS
    ]
    lines.append(f"model: {_model(network, config)}")
    if network is TRANSFORMER and (kind := task(checkpoint)):
        lines.append(f"calls itself FLUX.1 {kind}, which edits a picture: used as FLUX.1-dev")
    if network is TRANSFORMER and not config.guidance_embed:
        lines.append("no guidance embedding: schnell, or a dev without distillation (--schedule dev)")
    lines += ["complete: nothing missing, nothing unexpected"]
    if network is VAE and (alike := like_autoencoder(checkpoint)):
        lines.append(f"problem: {alike}")
    how = "linear weights stay as stored and are cast at use" if kept else "cast to the compute dtype"
    return [*lines, f"loading: {how}; about {_bytes(_memory(infos, kept))} when that is bf16"]


def _model(network: Network[Any, Any], config: Any) -> str:
    if isinstance(config, BokehConfig):
        kinds = " and ".join(n for n, on in (("queries", config.adapt_q), ("keys", config.adapt_k)) if on)
        return (
            f"for FLUX.1-dev, {len(config.blocks)} of {FLUX_DEV.num_blocks} blocks, "
            f"rank {config.rank}, updates {kinds or 'neither queries nor keys'}"
        )
    return next((label for label, known in network.presets.items() if known == config), str(config))


def _memory(infos: Iterable[TensorInfo], kept: list[TensorInfo]) -> int:
    narrow = sum(info.num_bytes for info in kept)
    places = {(info.file, info.key) for info in kept}
    return narrow + sum(2 * math.prod(i.shape) for i in infos if (i.file, i.key) not in places)


def _precision(infos: Iterable[TensorInfo], scaled: bool) -> str:
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


def _lora(checkpoint: Checkpoint) -> list[str] | None:
    """Title and lines, if the names are those of a LoRA or one of its relatives."""
    relatives = [
        kind
        for pattern, kind in lora_names.OTHER_KINDS
        if any(re.search(pattern, name) for name in checkpoint.tensors)
    ]
    roles = {name: found[1] for name in checkpoint.tensors if (found := lora_names.role(name))}
    matrices = [name for name, role in roles.items() if role != "alpha"]
    downs = [name for name, role in roles.items() if role == "down"]
    if not matrices and not relatives:
        return None
    precision = f"precision: {_precision(checkpoint.tensors.values(), False)}"
    if relatives:
        return [f"{', '.join(relatives)} adapter", precision, "use: none, only plain LoRA can be used"]
    ranks = sorted({shape[0] for n in downs if (shape := checkpoint.tensors[n].shape)})
    parts: Counter[str] = Counter()
    for name in downs:
        parts[next(part for prefix, part in PREFIXES if name.startswith(prefix))] += 1
    where = ", ".join(f"{count} layer{'s'[: count > 1]} of {part}" for part, count in parts.items())
    rank = (
        f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}" if ranks else "no rank"
    )
    lines = ["LoRA", f"changes: {where or 'nothing'}, {rank}", precision]
    try:
        match = match_layers(checkpoint, {})
        if not (problems := match.problems):
            check_alphas(checkpoint, match)
    except CheckpointError as error:
        problems = list(error.problems)
    if not problems:
        kind = task(checkpoint)
        note = [f"calls itself a LoRA of FLUX.1 {kind}"] if kind else []
        return [*lines, "model: for FLUX.1, every layer has its place", *note, "use: --lora"]
    shown = [f"model: {model}"] if (model := made_for(checkpoint)) else []
    shown += [f"not for FLUX.1: {problem}" for problem in problems[:_SHOWN]]
    shown += [f"not for FLUX.1: {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
    if model or any(problem.startswith("no such layer") for problem in problems):
        return [*lines, *shown, "use: none with FLUX.1; it was made for another model"]
    return [*lines, *shown, "use: none as it is"]


def _folder(findings: Findings) -> list[str]:
    lines: list[str] = []
    missing: list[str] = []
    networks = {network.name: network for network in NETWORKS}
    passed_over = dict(findings.passed_over)
    config: MMDiTConfig | None = None
    several: list[str] = []
    for part, what in PARTS.items():
        found, network = findings.parts.get(part, ()), networks.get(part)
        if network is not None:
            reasons = {c.path: reason for c in found if (reason := misfit(c, network, config))}
            passed_over |= reasons
            found = tuple(likely([c for c in found if c.path not in reasons]))
            # A whole model in one file yields to files of single parts.
            several += [part] if len([c for c in found if network is TRANSFORMER or not c.prefix]) > 1 else []
        if network is TRANSFORMER and len(found) == 1:
            config = _config(found[0])
        if not found:
            missing.append(part)
            lines.append(f"{part}: missing; looked for {what}")
        for candidate in found:
            shown = candidate.path.relative_to(findings.root)
            lines.append(f"{part}: {shown}{' (one of several)' if len(found) > 1 else ''}")
            if network is not None:
                lines += _indented(_component(candidate, network))
    if config is not None:
        lines += _own_files(findings, config.guidance_embed)
    lines += [f"unreadable: {problem}" for problem in findings.unreadable]
    lines += [f"passed over: {path.relative_to(findings.root)} {why}" for path, why in passed_over.items()]
    if _is_faulty(lines):
        lines.append("use: none as it is, a part has a problem")
    elif several:
        lines.append(f"use: none as it is; name the {' and the '.join(several)} that you mean by its path")
    elif not missing:
        lines.append("use: --model with this folder")
    elif TRANSFORMER.name in missing:
        lines.append("use: none as a model, it has no transformer")
    else:
        lines.append(f"use: --model with this folder; {', '.join(missing)} must lie in another known place")
    return _indented(lines)


def _own_files(findings: Findings, guided: bool) -> list[str]:
    """What is wrong with the files of a folder that hold no weights: card, schedule, tokenizers."""
    problems: list[str] = []
    try:
        check_own_files(findings.root, guided)
    except CheckpointError as error:
        problems += [f"problem: {error.where}: {problem}" for problem in error.problems]
    for tokenizer in TOKENIZERS:
        for candidate in findings.parts.get(tokenizer.name, ())[:1]:
            try:
                tokenizer.read(candidate.path)
            except TokenizerError as error:
                problems.append(f"problem: {error}")
    return problems


def _config(transformer: Candidate) -> MMDiTConfig | None:
    try:
        return part_of(transformer.checkpoint, TRANSFORMER).config()
    except CheckpointError:
        return None


def _component(candidate: Candidate, network: Network[Any, Any]) -> list[str]:
    try:
        checkpoint = candidate.checkpoint
        if network.name not in prefixes(checkpoint):
            return [f"problem: not a {network.codec.what}"]
    except CheckpointError as error:
        return [f"problem: {problem}" for problem in error.problems[:_SHOWN]]
    return _network(checkpoint.under(prefixes(checkpoint)[network.name]), network)


def _is_faulty(lines: Iterable[str]) -> bool:
    return any(line.lstrip().startswith(("problem: ", "unexpected: ")) for line in lines)


def _use(network: Network[Any, Any], lines: Iterable[str]) -> str:
    if _is_faulty(lines):
        return "use: none as it is"
    if network is TRANSFORMER:
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
