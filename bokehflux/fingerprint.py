"""Which files they were: a fingerprint of their contents.

A fingerprint is not a checksum of every byte: reading 34 GB would take longer than making a picture. Files up
to 64 MB are hashed whole; of larger ones the size, the first and last megabyte (all of a safetensors header,
as a rule) and 256 blocks of 4 KB at equal distances. Other weights give other fingerprints, whatever the
files are called; a file that was tampered with on purpose can escape.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

WHOLE = 64 << 20
EDGE, BLOCK, NUM_BLOCKS = 1 << 20, 4 << 10, 256
SUFFIXES = (".safetensors", ".sft", ".bin", ".gguf", ".json", ".txt", ".model")
"""Endings of files that decide what a model folder computes: weights, configs, tokenizers."""


def fingerprint(paths: Iterable[Path]) -> str:
    """32 hexadecimal digits for a set of files and folders (their files, not those below). Names don't count.

    Raises OSError for a file that cannot be read.
    """
    files = {
        file
        for path in paths
        for file in (path.iterdir() if path.is_dir() else [path])
        if file == path or (file.suffix in SUFFIXES and file.is_file())
    }
    digests = sorted(_digest(file) for file in files)
    return hashlib.sha256(b"".join(digests)).hexdigest()[:32]


def fingerprint_of_bytes(data: bytes) -> str:
    """The fingerprint of a file of these bytes, where it is not larger than 64 MB."""
    return hashlib.sha256(hashlib.sha256(data).digest()).hexdigest()[:32]


def _digest(path: Path) -> bytes:
    sha, size = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE:
            while block := file.read(EDGE):
                sha.update(block)
        else:
            sha.update(size.to_bytes(8, "little"))
            for start, length in [(0, EDGE), *_places(size), (size - EDGE, EDGE)]:
                sha.update(_read(file, start, length))
    return sha.digest()


def _places(size: int) -> list[tuple[int, int]]:
    return [(i * (size - BLOCK) // NUM_BLOCKS, BLOCK) for i in range(NUM_BLOCKS)]


def _read(file: BinaryIO, start: int, length: int) -> bytes:
    file.seek(start)
    return file.read(length)
