"""Files mapped into memory: pages come from the disk when they are touched, and may leave again.

The mapping is private: writing to a tensor does not change the file. Linux counts a private mapping as memory
that may be needed later, and refuses one of 24 GB on a machine of 16, unless told not to.
"""

from __future__ import annotations

import json
import math
import mmap
import sys
from pathlib import Path

import torch
from torch import Tensor

_NO_RESERVE = 0x4000
"""Linux's MAP_NORESERVE, which Python's `mmap` does not name before 3.13."""


class MappedFile:
    """An opened file of at least one byte. Raises OSError and ValueError (empty) as `open` and `mmap` do."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            if sys.platform == "linux":
                flags, rights = mmap.MAP_PRIVATE | _NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE
                self._map = mmap.mmap(file.fileno(), 0, flags=flags, prot=rights)
            else:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def __getitem__(self, span: slice) -> bytes:
        return self._map[span]

    def tensor(self, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """A CPU view of the bytes from `start` on."""
        count = math.prod(shape)
        if not count:
            return torch.empty(shape, dtype=dtype)
        # Reading a page behind the end of the file would kill the process (SIGBUS).
        if start + count * dtype.itemsize > self._map.size():
            raise ValueError(f"the file was cut to {self._map.size()} bytes")
        if start % dtype.itemsize:  # in old files; some kernels need aligned numbers
            copied = bytearray(self._map[start : start + count * dtype.itemsize])
            return torch.frombuffer(copied, dtype=dtype).reshape(shape)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=start).reshape(shape)


class SafetensorsFile:
    """The data of a .safetensors file whose header was checked before (`checkpoint.read_header`)."""

    def __init__(self, path: Path, dtypes: dict[str, torch.dtype]) -> None:
        self._file = MappedFile(path)
        self._start = 8 + int.from_bytes(self._file[:8], "little")
        self._header = json.loads(self._file[8 : self._start])
        self._dtypes = dtypes

    def get_tensor(self, name: str) -> Tensor:
        """A CPU view of one tensor."""
        entry = self._header[name]
        start = self._start + entry["data_offsets"][0]
        return self._file.tensor(start, self._dtypes[entry["dtype"]], tuple(entry["shape"]))
