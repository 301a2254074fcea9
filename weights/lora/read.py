"""Read LoRA files, in any of the six key families.

Every name of a file is resolved to one of our linear layers and to the rows of it that the LoRA changes. The
names: `tables/lora.py` and `networks.py`; the rows: the same rules by which checkpoints are loaded. A LoRA
says W + strength * alpha / rank * up @ down; `apply.py` does it.
"""

from __future__ import annotations

import functools
import logging
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bokehflux.configs import FLUX_DEV
from bokehflux.models.linear import Linear, LowRankTerm

from ..files.checkpoint import Checkpoint, CheckpointError, fold, open_checkpoint
from ..mapping import SAME, Transform, resolve
from ..networks import NETWORKS, TRANSFORMER
from ..relatives import other_model, stranger, task
from ..tables import adapter
from ..tables import lora as names
from ..tables.flux import image_input
from .alpha import Alphas

log = logging.getLogger(__name__)
Configs = Mapping[str, Any]
"""The config of each network, by the registry's names; one that is left out is FLUX.1-dev's."""
PREFIXES = sorted(
    ((prefix, network.name) for network in NETWORKS for prefix in network.lora_prefixes),
    key=lambda item: -len(item[0]),
)
"""(prefix of a name, the network that the rest belongs to), in the order in which they are tried."""
_TOKEN_CHANNELS = FLUX_DEV.in_channels
"""A packed image token of FLUX.1 has as many."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Lora:
    """What one file adds, in the names of our networks: CPU copies in the precision of the file."""

    path: Path
    terms: Mapping[str, Mapping[str, tuple[LowRankTerm, ...]]]
    """Network -> linear layer -> its terms; their strength is alpha / rank."""


class _Place(NamedTuple):
    """Where a name of a file belongs."""

    network: str
    module: str
    first: int
    rows: int
    columns: int
    transform: Transform
    """Reorders the rows of a name that stands for a whole layer."""


def read_lora(path: str | Path, configs: Configs) -> Lora:
    """A LoRA file (or a folder with one) for a model of these configs.

    The scale of a layer is alpha / rank: alpha from its tensor, else as `alpha.py` says, else the rank.
    Raises CheckpointError with every name that has no place in the model, every incomplete pair and every
    wrong shape; for adapters that are not a pair of matrices per layer, one that names their kind.
    """
    checkpoint = open_checkpoint(path)
    match = match_layers(checkpoint, configs)
    problems = list(match.problems)
    alphas = Alphas(checkpoint)
    terms: dict[str, dict[str, list[LowRankTerm]]] = {}
    for stem, place in match.fitting.items():
        roles = match.layers[stem]
        down, up = (checkpoint.read(roles[role]).clone() for role in ("down", "up"))
        if not (down.float().isfinite().all() and up.float().isfinite().all()):
            problems.append(f"{stem}: holds values that are not finite")
            continue
        scale = alphas.scale(stem, place.network, roles.get("alpha"), down.shape[0])
        up = place.transform.join([up])
        term = LowRankTerm(down=down, up=up, strength=scale, first=place.first)
        terms.setdefault(place.network, {}).setdefault(place.module, []).append(term)
    if problems:
        model = made_for(checkpoint)
        raise CheckpointError(
            f"{checkpoint.path} (LoRA)", *([f"was made for {model}"] if model else []), *problems
        )
    alphas.check_patterns(match.layers)
    if kind := task(checkpoint):
        log.warning("%s calls itself a LoRA of FLUX.1 %s: other models need not gain by it", path, kind)
    return Lora(
        path=checkpoint.path,
        terms={network: {m: tuple(t) for m, t in modules.items()} for network, modules in terms.items()},
    )


def check_alphas(checkpoint: Checkpoint, match: Match) -> None:
    """Raise CheckpointError for an alpha that cannot be used. Of tensors, reads those of one number."""
    alphas = Alphas(checkpoint)
    for stem, place in match.fitting.items():
        roles = match.layers[stem]
        alphas.scale(stem, place.network, roles.get("alpha"), checkpoint.shapes[roles["down"]][0])
    alphas.check_patterns(match.layers)


def made_for(checkpoint: Checkpoint) -> str | None:
    """The model that a LoRA is for, where it tells of one that is not FLUX.1 dev or schnell."""
    if model := other_model(checkpoint):
        return model
    for name, info in checkpoint.tensors.items():
        if re.search(r"(img_in|x_embedder)\W\w*(down|lora_A)\b", name) and len(info.shape) == 2:
            if variant := image_input(info.shape[1], _TOKEN_CHANNELS):
                return variant
    found = task(checkpoint)
    return f"FLUX.1 {found}" if found else None


class Match(NamedTuple):
    """How a file fits a model, by names and shapes."""

    layers: dict[str, dict[str, str]]
    """Name of a layer, as the file spells it -> role ("down", "up", "alpha") -> name of the tensor."""
    fitting: dict[str, _Place]
    problems: list[str]
    """One line for all that does not fit."""


def match_layers(checkpoint: Checkpoint, configs: Configs) -> Match:
    """Read headers only. Raises CheckpointError unless the file is a plain LoRA."""
    layers = _layers(checkpoint)
    places = {
        network.name: places_of(network.name, configs.get(network.name, next(iter(network.presets.values()))))
        for network in NETWORKS
        if network.lora
    }
    found = {stem: _find(stem, places) for stem in layers}
    unmatched = [(stem, "") for stem, place in found.items() if place is None]
    problems = [f"no such layer in this model: {line}" for line in fold(unmatched)]
    fitting: dict[str, _Place] = {}
    sources: dict[tuple[str, str], list[tuple[range, str]]] = {}
    for stem, place in found.items():
        if place is None:
            continue
        complaint = _complaint(checkpoint, layers[stem], place)
        rows = range(place.first, place.first + place.rows)
        taken = sources.setdefault((place.network, place.module), [])
        twice = [other for span, other in taken if span.start < rows.stop and rows.start < span.stop]
        if complaint or twice:
            problems.append(f"{stem}: {complaint or f'changes the same rows as {twice[0]}'}")
            continue
        taken.append((rows, stem))
        fitting[stem] = place
    return Match(layers, fitting, problems)


def _layers(checkpoint: Checkpoint) -> dict[str, dict[str, str]]:
    """As in `Match`, with its error."""
    if adapter.LEVEL in checkpoint.tensors:
        raise CheckpointError(checkpoint.path, "is not a LoRA but a bokeh adapter: pass it as the adapter")
    if any(table.marks(checkpoint.tensors) for table in TRANSFORMER.tables):
        raise CheckpointError(checkpoint.path, "is not a LoRA but a whole transformer: pass it as the model")
    kinds: dict[str, list[str]] = {}
    for name in checkpoint.tensors:
        for pattern, kind in names.OTHER_KINDS:
            if re.search(pattern, name):
                kinds.setdefault(kind, []).append(name)
    if kinds:
        what = ", ".join(f"{kind} ({len(n)} tensors such as {n[0]})" for kind, n in kinds.items())
        problem = f"holds {what}; only plain LoRA, a down and an up matrix per layer, can be used"
        raise CheckpointError(checkpoint.path, problem)
    layers: dict[str, dict[str, str]] = {}
    odd = []
    for name in checkpoint.tensors:
        found = names.role(name)
        if found is None:
            odd.append((name, ""))
            continue
        stem, role = found
        layer = layers.setdefault(stem, {})
        if role in layer:
            problem = f"{layer[role]} and {name} are the same matrix of one layer"
            raise CheckpointError(checkpoint.path, problem)
        layer[role] = name
    if not layers:
        if reason := stranger(checkpoint):
            raise CheckpointError(checkpoint.path, f"is not a LoRA: it {reason}")
        some = ", ".join(sorted(checkpoint.tensors)[:3]) or "nothing"
        raise CheckpointError(
            checkpoint.path,
            f"is not a LoRA: expected names such as *.lora_A.weight or *.lora_down.weight, found {some}",
        )
    if odd:
        raise CheckpointError(
            f"{checkpoint.path} (LoRA)",
            *(f"neither a down nor an up matrix nor an alpha: {n}" for n in fold(odd)),
        )
    return layers


@functools.cache
def places_of(name: str, config: Any) -> Mapping[str, _Place]:
    """Every name under which a file may change a layer of a network, with dots and with underscores."""
    network = next(network for network in NETWORKS if network.name == name)
    with torch.device("meta"):
        modules = network.build(config).named_modules()
    weights = {f"{n}.weight": (m.out_features, m.in_features) for n, m in modules if isinstance(m, Linear)}
    places: dict[str, _Place] = {}
    for table in network.lora:
        for entry in resolve(table, weights):
            shape = weights[entry.dst]
            try:
                parts = entry.transform.split(torch.empty(shape, device="meta"))
            except ValueError:
                continue  # its MLP ratio has no name in this layout
            first = 0
            for source, part in zip(entry.src, parts, strict=True):
                stem = source.removesuffix(".weight")
                places[stem] = places[stem.replace(".", "_")] = _Place(
                    name, entry.dst.removesuffix(".weight"), first, part.shape[0], shape[1],
                    entry.transform if len(parts) == 1 else SAME,
                )  # fmt: skip
                first += part.shape[0]
    return places


def _find(stem: str, places: Mapping[str, Mapping[str, _Place]]) -> _Place | None:
    for name, network in _readings(stem):
        place = places[network].get(name) or places[network].get(name.replace(".", "_"))
        if place is not None:
            return place
    return None


def _readings(stem: str) -> Iterator[tuple[str, str]]:
    return ((stem[len(prefix) :], part) for prefix, part in PREFIXES if stem.startswith(prefix))


def _complaint(checkpoint: Checkpoint, roles: Mapping[str, str], place: _Place) -> str | None:
    """What is wrong with the tensors of one layer."""
    missing = [role for role in ("down", "up") if role not in roles]
    if missing:
        return f"lacks its {' and '.join(missing)} matrix"
    down, up = (checkpoint.tensors[roles[role]] for role in ("down", "up"))
    if len(down.shape) != 2 or len(up.shape) != 2 or not down.shape[0] or down.shape[0] != up.shape[1]:
        return f"down {list(down.shape)} and up {list(up.shape)} are not [rank, in] and [out, rank]"
    if (up.shape[0], down.shape[1]) != (place.rows, place.columns):
        return (
            f"changes a layer of {[up.shape[0], down.shape[1]]}, the model's is {[place.rows, place.columns]}"
        )
    if not (down.dtype.is_floating_point and up.dtype.is_floating_point):
        return f"down is {down.dtype} and up {up.dtype}, floating point was expected"
    if "alpha" in roles and math.prod(checkpoint.tensors[roles["alpha"]].shape) != 1:
        return (
            f"alpha has the shape {list(checkpoint.tensors[roles['alpha']].shape)}, one number was expected"
        )
    return None
