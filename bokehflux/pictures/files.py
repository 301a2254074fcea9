"""Files on disk: names that never collide, and writes of which all or nothing is seen.

A file is written under a hidden temporary name, flushed, and only then given its name. Whoever is killed in
between leaves a hidden `.bokehflux-*.tmp` and nothing else.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from bokehflux.pictures import metadata


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture to be written."""

    stem: str
    """File name without its ending."""
    image: Image.Image
    recipe: dict[str, Any]
    """JSON-able; everything needed to make the picture again."""


def level_stem(level: float) -> str:
    """File stem of a bokeh level: 4.2 -> "bokeh-04.2". Different levels give different stems."""
    whole, point, fraction = repr(abs(float(level))).partition(".")
    return f"bokeh-{whole:0>2}{point}{fraction}"


def distinct(stems: Sequence[str]) -> list[str]:
    """The same stems, repeated ones numbered: a level that was asked for twice is two files."""
    counts = [list(stems[: i + 1]).count(stem) for i, stem in enumerate(stems)]
    return [stem if count == 1 else f"{stem}-{count}" for stem, count in zip(stems, counts, strict=True)]


def check_folder(folder: Path) -> None:
    """Make the output folder and raise ValueError unless files can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"cannot write to output folder {folder}: {error.strerror or error}") from error


def save_pictures(pictures: Sequence[Picture], folder: Path, kind: str = "png") -> list[Path]:
    """Write one file each and return their paths, in order. Stems must be distinct; kind as in `metadata`.

    No file that exists is ever touched: if any name is taken, all get the suffix of a further run ("-run2").
    Everything is on the disk before the first name appears, so a full disk leaves nothing (OSError).
    """
    temporary: list[Path] = []
    try:
        for picture in pictures:
            temporary.append(_temporary(folder, metadata.encode(picture.image, picture.recipe, kind)))
        stems = [picture.stem for picture in pictures]
        for run in itertools.count(1):
            end = ("" if run == 1 else f"-run{run}") + metadata.SUFFIXES[kind]
            if (paths := _publish(temporary, [folder / f"{stem}{end}" for stem in stems])) is not None:
                return paths
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)
    raise AssertionError("unreachable")


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the end of the block, and is then raised: what is finished gets onto the disk."""
    if threading.current_thread() is not threading.main_thread():  # only that one hears of it
        yield
        return
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
    if pressed:
        raise KeyboardInterrupt


def replace_file(path: Path, data: bytes) -> None:
    """Write a file in place of the one of that name, if any. Raises OSError; then the old one is whole."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, and a file of that name is to be written: move it away")
    temporary = _temporary(path.parent, data)
    try:
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(folder: Path, data: bytes) -> Path:
    path = folder / f".bokehflux-{os.getpid()}-{secrets.token_hex(6)}.tmp"
    try:
        with open(path, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path


def _publish(temporary: Sequence[Path], paths: Sequence[Path]) -> list[Path] | None:
    """Give every file its name, or none of them (None) when one is taken, also by a run at the same time."""
    # Looked at first, so that as a rule no name appears only to vanish again.
    if any(path.exists() for path in paths):
        return None
    done: list[Path] = []
    try:
        for source, path in zip(temporary, paths, strict=True):
            _rename_to_free(source, path)
            done.append(path)
    except FileExistsError:
        for path in done:
            path.unlink()
        return None
    return done


def _rename_to_free(source: Path, path: Path) -> None:
    """Like os.replace, but FileExistsError for a name that is taken; also where links are unknown (FAT)."""
    try:
        os.link(source, path)
    except FileExistsError:
        raise
    except OSError:
        path.touch(exist_ok=False)
        try:
            os.replace(source, path)
        except BaseException:
            path.unlink()
            raise
