"""Read LoRA files, in any of the six key families.

Every name of a file is resolved to one of our linear layers and to the rows of it that the LoRA changes (the
names: `tables/lora.py`; the rows: the same rules by which checkpoints are loaded). A LoRA says
W + strength * alpha / rank * up @ down; `lora_apply.py` does it.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bokehflux.configs import CLIP_L, T5_XXL, CLIPConfig, MMDiTConfig, T5Config
from bokehflux.models.clip import CLIPTextEncoder
from bokehflux.models.linear import Linear, LowRankTerm
from bokehflux.models.mmdit import MMDiT
from bokehflux.models.t5 import T5Encoder

from .checkpoint import Checkpoint, CheckpointError, fold, open_checkpoint
from .lora_alpha import Alphas
from .mapping import SAME, Table, Transform, resolve
from .tables import bokeh, flux, text
from .tables import lora as names


@dataclass(frozen=True, kw_only=True, eq=False)
class Lora:
    """What one file adds, in the names of our networks: CPU copies in the precision of the file."""

    path: Path
    terms: Mapping[str, Mapping[str, tuple[LowRankTerm, ...]]]
    """Network ("mmdit", "clip", "t5") -> linear layer -> its terms; their strength is alpha / rank."""


class _Place(NamedTuple):
    """Where a name of a file belongs."""

    network: str
    module: str
    first: int
    rows: int
    columns: int
    transform: Transform
    """For a name that stands for the whole layer: order of its rows."""


def read_lora(path: str | Path, mmdit: MMDiTConfig, clip: CLIPConfig = CLIP_L, t5: T5Config = T5_XXL) -> Lora:
    """A LoRA file (or a folder with one) for a model of these configs.

    The scale of a module is alpha / rank: alpha from its tensor, else as `lora_alpha.py` says, else the rank.
    Raises CheckpointError with every name that has no place in the model, every incomplete pair, every wrong
    shape; and one that names the type for adapters that are not a pair of matrices per layer.
    """
    checkpoint = open_checkpoint(path)
    match = match_layers(checkpoint, mmdit, clip, t5)
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
        raise CheckpointError(f"{checkpoint.path} (LoRA)", *problems)
    alphas.check_patterns(match.layers)
    return Lora(
        path=checkpoint.path,
        terms={network: {m: tuple(t) for m, t in modules.items()} for network, modules in terms.items()},
    )


class Match(NamedTuple):
    """How a file fits a model, by names and shapes."""

    layers: dict[str, dict[str, str]]
    """Name of a layer, as the file spells it -> role ("down", "up", "alpha") -> name of the tensor."""
    fitting: dict[str, _Place]
    problems: list[str]
    """One line for all that does not fit."""


def match_layers(
    checkpoint: Checkpoint, mmdit: MMDiTConfig, clip: CLIPConfig = CLIP_L, t5: T5Config = T5_XXL
) -> Match:
    """Read headers only. Raises CheckpointError when the file is no LoRA, or none of the plain kind."""
    layers = _layers(checkpoint)
    places = {
        "mmdit": _places("mmdit", MMDiT, mmdit, names.TRANSFORMER),
        "clip": _places("clip", CLIPTextEncoder, clip, (text.CLIP,)),
        "t5": _places("t5", T5Encoder, t5, (text.T5,)),
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
    hints = {
        bokeh.ADAPTER.marker: "a bokeh adapter: pass it as the adapter",
        **{table.marker: "a whole transformer: pass it as the model" for table in flux.TABLES},
    }
    for marker, what in hints.items():
        if marker in checkpoint.tensors:
            raise CheckpointError(checkpoint.path, f"is not a LoRA but {what}")
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
        ends = [(end, role) for end, role in names.ROLES if name.endswith(end) and name != end]
        if not ends:
            odd.append((name, ""))
            continue
        end, role = max(ends, key=lambda item: len(item[0]))
        layer = layers.setdefault(name.removesuffix(end), {})
        if role in layer:
            problem = f"{layer[role]} and {name} are the same matrix of one layer"
            raise CheckpointError(checkpoint.path, problem)
        layer[role] = name
    if not layers:
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
def _places(network: str, kind: Any, config: Any, tables: tuple[Table, ...]) -> Mapping[str, _Place]:
    """Every name under which a file may change a layer, with dots and with underscores."""
    with torch.device("meta"):
        modules = kind(config).named_modules()
    weights = {f"{n}.weight": (m.out_features, m.in_features) for n, m in modules if isinstance(m, Linear)}
    places: dict[str, _Place] = {}
    for table in tables:
        for entry in resolve(table, weights):
            shape = weights[entry.dst]
            try:
                parts = entry.transform.split(torch.empty(shape, device="meta"))
            except ValueError:
                continue  # a layer that does not exist in this layout, for its MLP ratio
            first = 0
            for source, part in zip(entry.src, parts, strict=True):
                name = source.removesuffix(".weight")
                whole = len(parts) == 1
                places[name] = places[name.replace(".", "_")] = _Place(
                    network, entry.dst.removesuffix(".weight"), first, part.shape[0], shape[1],
                    entry.transform if whole else SAME,
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
    return ((stem[len(prefix) :], part) for prefix, part in names.PREFIXES if stem.startswith(prefix))


def _complaint(checkpoint: Checkpoint, roles: Mapping[str, str], place: _Place) -> str | None:
    """What is wrong with the tensors of one layer."""
    missing = [role for role in ("down", "up") if role not in roles]
    if missing:
        return f"has no {' and no '.join(missing)} matrix"
    down, up = (checkpoint.tensors[roles[role]] for role in ("down", "up"))
    if len(down.shape) != 2 or len(up.shape) != 2 or not down.shape[0] or down.shape[0] != up.shape[1]:
        return f"down {list(down.shape)} and up {list(up.shape)} are no [rank, in] and [out, rank]"
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
