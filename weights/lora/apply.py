"""A LoRA on networks: attached beside the weights, or merged into them and taken out again."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bokehflux.models.linear import Linear, LowRankTerm
from bokehflux.models.units import Network

from .read import Lora

Networks = Mapping[str, nn.Module]
"""The networks of a model by the registry's names (`weights/networks.py`)."""
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Merged:
    """What `merge` changed, and how it was: holds one CPU copy of every changed weight."""

    def __init__(self) -> None:
        self._saved: list[_Saved] | None = []

    @property
    def num_bytes(self) -> int:
        """Host memory that the originals take."""
        return sum(saved.original.nbytes for saved in self._saved or ())

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the weights back, bit by bit. After several merges into one layer, undo the last one first.

        Raises ValueError, and changes nothing, when a weight is no longer what the merge left.
        """
        if self._saved is None:
            raise ValueError("this LoRA was unmerged already")
        changed = [s.name for s in self._saved if _fingerprint(s.layer.weight) != s.merged]
        if changed:
            raise ValueError(
                f"{len(changed)} weights such as {changed[0]} changed after this LoRA was merged: undo what "
                "was done later (another LoRA, training, another dtype) first"
            )
        self._restore()

    def _restore(self) -> None:
        for saved in self._saved or ():
            saved.layer.weight.copy_(saved.original)
        self._saved = None

    def _add(self, name: str, layer: Linear, weight: Tensor) -> None:
        assert self._saved is not None
        original = layer.weight.detach().to("cpu", copy=True)
        # Listed before the weight changes, so that an interrupted merge can be undone.
        self._saved.append(_Saved(name, layer, original, _fingerprint(weight)))
        # In place: aliases and captured CUDA graphs see the new weight.
        layer.weight.copy_(weight)


class _Saved(NamedTuple):
    name: str
    layer: Linear
    original: Tensor
    merged: tuple[torch.dtype, int]


def attach(networks: Networks, lora: Lora, strength: float = 1.0) -> None:
    """Add the LoRA beside the weights, which stay as they are, in any storage type; several add up.

    Costs two thin products per changed layer and call. `detach` takes it away.
    Raises ValueError, and changes nothing, when the LoRA does not fit the networks.
    """
    for _, layer, terms in _fitting(networks, lora, strength):
        # Narrow weights compute in the dtype of their input: the term follows it, call by call.
        dtype = layer.weight.dtype if layer.is_dense else None
        layer.terms += tuple(
            dataclasses.replace(
                t, down=t.down.to(layer.weight.device, dtype), up=t.up.to(layer.weight.device, dtype)
            )
            for t in terms
        )


def detach(networks: Networks) -> None:
    """Take away every attached LoRA."""
    for network in networks.values():
        for module in network.modules():
            if isinstance(module, Linear):
                module.terms = ()


@torch.no_grad()
def merge(networks: Networks, lora: Lora, strength: float = 1.0) -> Merged:
    """Add the LoRA into the weights, in float32 with one rounding to their dtype: no cost per call.

    `Merged.unmerge` restores them exactly, from a copy on the CPU of every changed weight (at most the
    networks' own size; `Merged.num_bytes`).
    Raises ValueError, and changes nothing, when the LoRA does not fit or a weight is quantised.
    """
    fitting = _fitting(networks, lora, strength)
    narrow = [name for name, layer, _ in fitting if not layer.is_dense]
    if narrow:
        raise ValueError(
            f"{lora.path}: {len(narrow)} of the {len(fitting)} weights to merge into, such as {narrow[0]}, "
            "are stored quantised and would lose the LoRA in rounding: attach it instead"
        )
    merged = Merged()
    try:
        for name, layer, terms in fitting:
            weight = layer.weight.to(torch.promote_types(layer.weight.dtype, torch.float32), copy=True)
            for term in terms:
                down, up = term.down.to(weight), term.up.to(weight)
                weight[term.first : term.first + len(up)] += term.strength * (up @ down)
            merged._add(name, layer, weight.to(layer.weight.dtype))
    except BaseException:
        merged._restore()
        raise
    return merged


def _fitting(
    networks: Networks, lora: Lora, strength: float
) -> list[tuple[str, Linear, tuple[LowRankTerm, ...]]]:
    """(name, layer, terms with the strength in them) of everything that changes; nothing at strength 0."""
    if not math.isfinite(strength):
        raise ValueError(f"the strength of a LoRA must be a finite number, got {strength}")
    found = []
    for network, modules in lora.terms.items():
        if network not in networks:
            raise ValueError(f"{lora.path} changes {network}, but only {', '.join(networks)} were given")
        if _is_folded(networks[network]):
            raise ValueError(f"{lora.path}: the bokeh adapter is folded into these weights; undo that first")
        own = dict(networks[network].named_modules())
        for name, terms in modules.items():
            layer = own.get(name)
            if not isinstance(layer, Linear) or not all(_fits(layer, term) for term in terms):
                raise ValueError(f"{lora.path} was read for another model: {network} {name} does not fit it")
            scaled = tuple(dataclasses.replace(t, strength=strength * t.strength) for t in terms)
            found.append((f"{network} {name}", layer, scaled))
    return found if strength else []


def _is_folded(network: nn.Module) -> bool:
    # The adapter multiplies what the LoRA adds: folded before it, the product would lack the LoRA.
    return isinstance(network, Network) and network.units().folded


def _fits(layer: Linear, term: LowRankTerm) -> bool:
    return term.down.shape[1] == layer.in_features and term.first + len(term.up) <= layer.out_features


def _fingerprint(weight: Tensor) -> tuple[torch.dtype, int]:
    """Dtype and sum of the bit patterns: tells a changed weight at the cost of one pass, without a copy."""
    return weight.dtype, int(weight.detach().view(_BITS[weight.itemsize]).sum(dtype=torch.int64))
