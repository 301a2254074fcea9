"""Read GGUF files through the optional package `gguf`: names, shapes, types, and raw blocks.

Tensors in plain types are read as they are; those in block formats (Q8_0, Q4_K, ...) as raw bytes, one row of
blocks per row of the matrix, which `unpack.py` turns into numbers. The package maps the file and parses its
header; the data is read when asked for. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

PLAIN = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class GgufError(ValueError):
    """A GGUF file cannot be read, or there is nothing to read it with."""


class GgufTensor(NamedTuple):
    """One tensor, as the header describes it."""

    name: str
    shape: tuple[int, ...]
    """As PyTorch counts: rows first."""
    dtype: torch.dtype
    packing: str | None
    """Name of the block format; None for the plain types."""


class GgufFile:
    """An opened GGUF file. Raises GgufError."""

    def __init__(self, path: Path) -> None:
        package = _package()
        try:
            reader = package.GGUFReader(path)
        except OSError as error:
            raise GgufError(f"cannot be opened: {error}") from error
        # Damage shows as whatever the parser stumbles over, and some of numpy's errors are MemoryError.
        except Exception as error:
            raise GgufError(f"not a complete GGUF file ({error}); download it again") from error
        if reader.byte_order == "S":
            raise GgufError("is written for machines of the other byte order")
        self._entries = {entry.name: entry for entry in reader.tensors}
        self.tensors = [_described(entry) for entry in reader.tensors]

    def get_tensor(self, name: str) -> Tensor:
        """A CPU view of the mapped file: the numbers, or uint8 [rows, bytes] of a packed tensor."""
        entry = self._entries[name]
        raw = np.ascontiguousarray(entry.data).view(np.uint8)
        described = _described(entry)
        # Copied into memory that PyTorch may write to: the mapping is read-only.
        data = torch.from_numpy(raw.reshape(-1).copy())
        if described.packing is None:
            return data.view(described.dtype).reshape(described.shape)
        return data.reshape(described.shape[0] if len(described.shape) > 1 else 1, -1)


def widened(raw: Tensor, packing: str, shape: tuple[int, ...]) -> Tensor:
    """Packed bytes as float32 of `shape`, by the package's own decoder: any format it knows, slowly."""
    package = _package()
    kind = package.GGMLQuantizationType[packing]
    try:
        numbers = package.quants.dequantize(raw.cpu().numpy(), kind)
    except NotImplementedError as error:
        raise GgufError(f"no decoder for GGUF tensors of type {packing}") from error
    return torch.from_numpy(np.array(numbers, dtype=np.float32)).reshape(shape)


def _described(entry: Any) -> GgufTensor:
    kind = entry.tensor_type.name
    shape = tuple(int(n) for n in reversed(entry.shape.tolist()))
    return GgufTensor(entry.name, shape, PLAIN.get(kind, torch.uint8), None if kind in PLAIN else kind)


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        problem = "reading GGUF files needs the package `gguf`: pip install 'bokehflux[gguf]'"
        raise GgufError(problem) from None
    return gguf
