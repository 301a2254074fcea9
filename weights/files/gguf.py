"""Read GGUF files: names, shapes and types from the header, raw blocks from the mapped file.

Tensors in plain types are read as they are; those in block formats (Q8_0, Q4_K, ...) as raw bytes, one row of
blocks per row of the matrix, which `unpack.py` turns into numbers at use. Formats that it does not know are
decoded at load by the optional package `gguf` (extra `gguf`). The header is walked by our own few lines, so
that no number in it can make us allocate or loop beyond the size of the file.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .mapped import MappedFile

PLAIN = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip
TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1),
    25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
}  # fmt: skip
"""Number of a type -> (name, numbers per block, bytes per block)."""
MAX_HEADER_BYTES = 100_000_000
"""Far above any: T5's holds a vocabulary of 1 MB."""
_VALUE_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY, _UINT32 = 8, 9, 4
_MAX_NAME, _MAX_DIMS = 65535, 4
_AGAIN = "download it again"


class GgufError(ValueError):
    """A GGUF file cannot be read, or no decoder for it is installed."""


class GgufTensor(NamedTuple):
    """One tensor, as the header describes it."""

    name: str
    shape: tuple[int, ...]
    """As PyTorch counts: rows first."""
    dtype: torch.dtype
    packing: str | None
    """Name of the block format; None for the plain types."""
    offset: int
    """Position of its first byte in the file."""
    num_bytes: int


class GgufFile:
    """An opened GGUF file. Raises GgufError, and OSError when it cannot be opened."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as file:
            self.tensors = _Header(file).tensors()
        self._entries = {entry.name: entry for entry in self.tensors}
        if len(self._entries) != len(self.tensors):
            raise GgufError(f"damaged: two tensors of one name; {_AGAIN}")
        self._file: MappedFile | None = None

    def get_tensor(self, name: str) -> Tensor:
        """A CPU view of the mapped file: the numbers, or uint8 [rows, bytes] of a packed tensor."""
        if self._file is None:
            self._file = MappedFile(self._path)
        entry = self._entries[name]
        if entry.packing is None:
            return self._file.tensor(entry.offset, entry.dtype, entry.shape)
        rows = math.prod(entry.shape[:-1])
        return self._file.tensor(entry.offset, torch.uint8, (rows, entry.num_bytes // rows))


def check_decoder(packing: str) -> None:
    """Raise GgufError unless the package `gguf` can decode a format."""
    if packing not in {kind.name for kind in _package(packing).quants._type_traits}:
        raise GgufError(f"no decoder for GGUF tensors of type {packing}")


def widened(raw: Tensor, packing: str) -> Tensor:
    """Packed bytes as float32 [rows, columns], by the decoder of the package `gguf`: every format, slowly."""
    package = _package(packing)
    kind = package.GGMLQuantizationType[packing]
    return torch.from_numpy(np.array(package.quants.dequantize(raw.numpy(), kind), dtype=np.float32))


def _package(packing: str) -> Any:
    try:
        import gguf
    except ImportError:
        problem = f"GGUF tensors of type {packing} need the package `gguf`: pip install gguf"
        raise GgufError(problem) from None
    return gguf


class _Header:
    """A walk through the header; every length is checked against the rest of the file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._size = os.fstat(file.fileno()).st_size
        self._at = 0
        self._alignment = 32

    def tensors(self) -> list[GgufTensor]:
        magic, version = self._take(4), self._number("I")
        if magic != b"GGUF":
            raise GgufError(f"not a GGUF file; {_AGAIN}")
        if version not in (2, 3):
            raise GgufError(f"GGUF version {version} is not supported (2 and 3 are); or {_AGAIN}")
        num_tensors, num_values = self._number("Q"), self._number("Q")
        for _ in range(num_values):
            key, kind = self._string(), self._number("I")
            if key == "general.alignment" and kind == _UINT32:
                self._alignment = self._number("I")
                if self._alignment < 8 or self._alignment & (self._alignment - 1):
                    raise GgufError(f"damaged: alignment {self._alignment}; {_AGAIN}")
            else:
                self._skip_value(kind)
        found = [self._described() for _ in range(num_tensors)]
        start = self._at + -self._at % self._alignment
        placed = [entry._replace(offset=entry.offset + start) for entry in found]
        ends = [entry.offset + entry.num_bytes for entry in placed]
        cut = sum(end > self._size for end in ends)
        if cut:
            raise GgufError(
                f"truncated: {max(ends)} bytes expected, the file holds {self._size}; {cut} of {len(ends)} "
                f"tensors are incomplete; {_AGAIN}"
            )
        return sorted(placed, key=lambda entry: entry.offset)

    def _described(self) -> GgufTensor:
        name, num_dims = self._string(), self._number("I")
        if not 1 <= num_dims <= _MAX_DIMS:
            raise GgufError(f"damaged: tensor {name!r:.80} has {num_dims} dimensions; {_AGAIN}")
        # Stored with the fastest dimension first.
        shape = tuple(reversed([self._number("Q") for _ in range(num_dims)]))
        number, offset = self._number("I"), self._number("Q")
        if number not in TYPES:
            raise GgufError(f"tensor {name!r:.80} has the unknown type {number}; or {_AGAIN}")
        kind, block, size = TYPES[number]
        if not all(shape) or shape[-1] % block or offset % self._alignment:
            raise GgufError(f"damaged: tensor {name!r:.80} {kind} {list(shape)} at {offset}; {_AGAIN}")
        packing = None if kind in PLAIN else kind
        num_bytes = math.prod(shape) // block * size
        return GgufTensor(name, shape, PLAIN.get(kind, torch.uint8), packing, offset, num_bytes)

    def _skip_value(self, kind: int) -> None:
        if kind == _STRING:
            self._skip(self._number("Q"))
        elif kind == _ARRAY:
            inner, length = self._number("I"), self._number("Q")
            if inner in _VALUE_BYTES:
                self._skip(length * _VALUE_BYTES[inner])
            elif inner == _STRING:
                for _ in range(length):
                    self._skip(self._number("Q"))
            else:
                raise GgufError(f"damaged: an array of type {inner}; {_AGAIN}")
        elif kind in _VALUE_BYTES:
            self._skip(_VALUE_BYTES[kind])
        else:
            raise GgufError(f"damaged: a value of type {kind}; {_AGAIN}")

    def _number(self, code: str) -> int:
        return int(struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0])

    def _string(self) -> str:
        length = self._number("Q")
        if length > _MAX_NAME:
            raise GgufError(f"damaged: a name of {length} bytes; {_AGAIN}")
        return self._take(length).decode("utf-8", errors="replace")

    def _take(self, count: int) -> bytes:
        self._check(count)
        return self._file.read(count)

    def _skip(self, count: int) -> None:
        self._check(count)
        self._file.seek(self._at)

    def _check(self, count: int) -> None:
        self._at += count
        if self._at > min(self._size, MAX_HEADER_BYTES):
            raise GgufError(f"truncated: its header goes beyond the {self._size} bytes it holds; {_AGAIN}")
