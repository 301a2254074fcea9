"""Weights in storage precision: fp8 with or without scales, GGUF's blocks, kept as they are and cast at use.

Scaled fp8 stores W / s beside s. Two spellings are in use: `.scale_weight` with a tensor `scaled_fp8` as the
mark of the file, and `.weight_scale` with a `.comfy_quant` beside each layer or `_quantization_metadata` in
the header. Both may carry scales of activations (`.scale_input`, `.input_scale`), which are for products in
fp8: a cast at use does not need them.

Only the weights of linear layers stay narrow: norms, biases, embeddings and convolutions are cast at load.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bokehflux.models.linear import NARROW, Dequantize

from .files.checkpoint import Checkpoint, CheckpointError, fold
from .files.gguf import GgufError, check_decoder, widened
from .files.unpack import FORMATS, Packed, unpack
from .mapping import Entry

MARK = "scaled_fp8"
WEIGHT_SCALES = (".scale_weight", ".weight_scale")
INPUT_SCALES = (".scale_input", ".input_scale")
FORMAT = ".comfy_quant"
METADATA = "_quantization_metadata"
FP8_FORMATS = ("float8_e4m3fn", "float8_e5m2")
_MAX_FORMAT_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class TensorScaled:
    """`Linear.dequantize` for a weight with one scale."""

    scale: float

    def __call__(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """[out, in] as stored -> [out, in]: the float32 product, rounded once."""
        # A product with a Python number is computed in float32; fp8 values are exact in every dtype.
        return weight.to(dtype, copy=True).mul_(self.scale)


@dataclass(frozen=True, kw_only=True, eq=False)
class RowScaled:
    """`Linear.dequantize` for a weight whose rows have scales of their own, such as fused projections."""

    scale: Tensor
    """[out, 1] float32"""

    def __call__(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """[out, in] as stored -> [out, in]: the float32 product, rounded once."""
        return weight.float().mul_(self.scale.to(weight.device)).to(dtype)


class Stored(NamedTuple):
    """A parameter as it is kept."""

    tensor: Tensor
    dequantize: Dequantize | None = None
    scale: Tensor | None = None
    """[out] float32, of a weight that multiplies in fp8."""


def separate(checkpoint: Checkpoint) -> tuple[Checkpoint, dict[str, str]]:
    """A network's checkpoint without its quantisation tensors, and the scale of each scaled weight.

    Raises CheckpointError for scales without a weight and formats that cannot be used. Reads no scales yet.
    """
    names = checkpoint.tensors
    scales: dict[str, str] = {}
    aside: set[str] = {MARK} & set(names)
    problems: list[str] = []
    orphans: list[tuple[str, str]] = []
    for name, info in names.items():
        end = next((e for e in (*WEIGHT_SCALES, *INPUT_SCALES, FORMAT) if name.endswith(e)), None)
        if end is None:
            continue
        aside.add(name)
        weight = name.removesuffix(end) + ".weight"
        if weight not in names:
            orphans.append((name, "has no weight beside it"))
        elif end in WEIGHT_SCALES:
            if weight in scales:
                problems.append(f"{scales[weight]} and {name} scale the same weight")
            if math.prod(info.shape) not in (1, *names[weight].shape[:1]) or not info.dtype.is_floating_point:
                problems.append(
                    f"{name} is {info.dtype} {list(info.shape)}, expected one number, or one per row of "
                    f"{weight} {list(names[weight].shape)}"
                )
            scales[weight] = name
    problems += fold(orphans)
    for packing in sorted({info.packing for info in names.values() if info.packing} - set(FORMATS)):
        try:
            check_decoder(packing)
        except GgufError as error:
            problems.append(str(error))
    problems += _strange_formats(checkpoint, [n for n in names if n.endswith(FORMAT)])
    if problems:
        raise CheckpointError(f"{checkpoint.path} (quantised)", *problems)
    return checkpoint.without(aside) if aside else checkpoint, scales


def _strange_formats(checkpoint: Checkpoint, markers: Sequence[str]) -> list[str]:
    """One line for each format that the newer spelling declares and we cannot compute."""
    declared: dict[str, str] = {}
    for name in markers:
        info = checkpoint.tensors[name]
        if info.dtype != torch.uint8 or math.prod(info.shape) > _MAX_FORMAT_BYTES:
            return [f"{name} is {info.dtype} {list(info.shape)}, a few bytes of JSON were expected"]
        declared[name] = _format_of(_json(bytes(checkpoint.read(name).tolist())))
    layers = _json(checkpoint.metadata.get(METADATA, "{}"))
    layers = layers.get("layers", {}) if isinstance(layers, dict) else layers
    if not isinstance(layers, dict):
        return [f"{METADATA} is not a JSON object with layers"]
    declared |= {name: _format_of(entry) for name, entry in layers.items()}
    strange: dict[str, list[str]] = {}
    for name, kind in declared.items():
        if kind not in FP8_FORMATS:
            strange.setdefault(kind, []).append(name)
    return [
        f"{len(names)} layers such as {names[0]} are stored as {kind}, which cannot be used: take a file in "
        "bf16, fp16, fp8 or GGUF"
        for kind, names in strange.items()
    ]


def _json(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _format_of(entry: Any) -> str:
    kind = entry.get("format") if isinstance(entry, dict) else entry
    # Rotated weights need rotated activations, which the name of the format does not say.
    extra = entry.get("convrot") if isinstance(entry, dict) else None
    return f"{kind!s:.40}{' (rotated)' if extra else ''}"


def store(
    entry: Entry,
    checkpoint: Checkpoint,
    scales: Mapping[str, str],
    device: torch.device,
    dtype: torch.dtype,
    *,
    keep: bool,
) -> Stored:
    """Make one parameter: as stored if `keep` and the file's type is narrow, else in `dtype`."""
    infos = [checkpoint.tensors[name] for name in entry.src]
    lone = len(entry.src) == 1
    alike = len({(info.dtype, info.packing) for info in infos}) == 1
    packing = infos[0].packing
    if keep and alike and (packing in FORMATS or infos[0].dtype in NARROW):
        narrow = entry.transform.join([checkpoint.read(name).to(device, copy=lone) for name in entry.src])
        if packing is not None:
            return Stored(narrow, Packed(packing=packing))
        return Stored(narrow, _scaling(entry, checkpoint, scales, device))
    # A lone source is copied, so that no parameter is a view of the mapped file; joining copies anyway.
    wide = [_wide(name, checkpoint, scales, device, dtype, copy=lone) for name in entry.src]
    return Stored(entry.transform.join(wide))


def _scaling(
    entry: Entry, checkpoint: Checkpoint, scales: Mapping[str, str], device: torch.device
) -> Dequantize | None:
    """The scales of a parameter: rows are rearranged together with them, by the same rule."""
    if not any(name in scales for name in entry.src):
        return None
    columns = [_scale(name, checkpoint, scales) for name in entry.src]
    scale = entry.transform.join(columns)
    first = scale[0].item()
    if bool((scale == first).all()):
        return TensorScaled(scale=first)
    return RowScaled(scale=scale.to(device))


def _scale(name: str, checkpoint: Checkpoint, scales: Mapping[str, str]) -> Tensor:
    """The scale of every row, [rows, 1] float32; ones for a weight without scales."""
    rows = checkpoint.tensors[name].shape[0]
    if name not in scales:
        return torch.ones(rows, 1)
    # Copied, since a layer may keep it.
    scale = checkpoint.read(scales[name]).to(torch.float32, copy=True).reshape(-1, 1)
    if not bool(scale.isfinite().all()):
        raise CheckpointError(checkpoint.path, f"{scales[name]} is not finite")
    return scale.expand(rows, 1)


def _wide(
    name: str,
    checkpoint: Checkpoint,
    scales: Mapping[str, str],
    device: torch.device,
    dtype: torch.dtype,
    *,
    copy: bool,
) -> Tensor:
    info, tensor = checkpoint.tensors[name], checkpoint.read(name)
    if info.packing is not None:
        known = info.packing in FORMATS
        tensor = unpack(tensor, info.packing) if known else widened(tensor, info.packing)
        tensor = tensor.reshape(info.shape)
    elif name in scales:
        scale = _scale(name, checkpoint, scales)
        tensor = tensor.float() * scale.reshape(-1, *[1] * (tensor.ndim - 1))
    return tensor.to(device, dtype, copy=copy)
