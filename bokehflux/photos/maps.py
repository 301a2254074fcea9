"""Depth maps, masks and maps of a level from files: arrays of NumPy, or pictures of whole numbers."""

from __future__ import annotations

import io
import tokenize
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bokehflux.pictures.metadata import UNREADABLE

Kind = Literal["depth", "mask", "level map"]
UNREADABLE_ARRAYS = (
    MemoryError, NotImplementedError, RecursionError, RuntimeError, tokenize.TokenError, zipfile.BadZipFile,
)  # fmt: skip
"""What else `numpy.load` may raise: a header is parsed as Python, and a .npz is a zip archive."""
_ONE = {"uint8": 255, "uint16": 65535, "int32": 65535}
WHOLE = {"depth": {"uint16": 1000, "int32": 1000}, "mask": _ONE, "level map": _ONE}
"""Types of whole numbers in maps, and how many make a metre, or 1."""


def read_map(path: Path, kind: Kind) -> NDArray[np.float32]:
    """[H, W] of a file: metres, a mask from 0 to 1, or shares of a level.

    Raises ValueError for one that cannot be read.
    """
    if not path.is_file():
        there = "it is not a regular file" if path.exists() else "it is not there"
        raise ValueError(f"cannot read the {kind} {path}: {there}")
    return map_reader(path.read_bytes, str(path), kind)()


def map_reader(read: Callable[[], bytes], name: str, kind: Kind) -> Callable[[], NDArray[np.float32]]:
    """What reads a depth map or mask: an array (in .npz under its kind's name), or a PNG of whole numbers."""

    def values() -> NDArray[np.float32]:
        try:
            data = read()
            if name.endswith((".npz", ".npy")):
                array = _array(data, kind)
            else:
                with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
                    array = np.asarray(image if image.mode.startswith("I") else image.convert("L"))
        except (*UNREADABLE, zipfile.BadZipFile) as error:
            raise ValueError(f"cannot read {name}: {error}") from error
        whole = np.issubdtype(array.dtype, np.integer)
        fits = array.dtype.name in WHOLE[kind] if whole else np.issubdtype(array.dtype, np.floating)
        if array.ndim != 2 or not array.size or not (fits or (kind == "mask" and array.dtype == bool)):
            form = f"expected [H, W], floats or {' or '.join(WHOLE[kind])}"
            raise ValueError(f"{name} has shape {array.shape} and type {array.dtype}, {form}")
        return array.astype(np.float32) / np.float32(WHOLE[kind][array.dtype.name] if whole else 1)

    return values


def _array(data: bytes, kind: Kind) -> NDArray[Any]:
    """The array in a file of NumPy, in a .npz the one called after its kind. Raises ValueError for others."""
    try:
        loaded = np.load(io.BytesIO(data), allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        if kind in loaded:
            return loaded[kind]  # type: ignore[no-any-return]
        there = ", ".join(loaded) or "nothing"
    except (*UNREADABLE, *UNREADABLE_ARRAYS) as error:
        raise ValueError(
            "it is not an array of numbers, or not all of one, as NumPy saves them; pickles are never read"
        ) from error
    raise ValueError(f"it has no array called {kind}, but {there}")
