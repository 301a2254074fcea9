"""Files on disk: names that never collide, and writes of which all or nothing is seen.

A file is written under a hidden temporary name, flushed, and only then given its name. Whoever is killed in
between leaves a hidden `.bokehflux-*.tmp` and nothing else.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import secrets
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from bokehflux.pictures import metadata
from bokehflux.pictures.credentials import Sign


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


def focus_stem(focus: str | None) -> str:
    """What a focus adds to it: far -> "-focus-far", 120,80 -> "-focus-120-80"."""
    return "" if focus is None else "-focus-" + re.sub(r"[^0-9a-z.]+", "-", focus)


def distinct(stems: Sequence[str]) -> list[str]:
    """The same stems, repeated ones numbered: a level that was asked for twice is two files."""
    counts = [list(stems[: i + 1]).count(stem) for i, stem in enumerate(stems)]
    return [stem if count == 1 else f"{stem}-{count}" for stem, count in zip(stems, counts, strict=True)]


def check_place(folder: Path) -> None:
    """Raise ValueError unless a folder is there that can be written to, or could be made. Makes nothing."""
    try:
        for place in (folder, *folder.parents):
            if place.is_symlink() and not place.exists():
                raise OSError(f"{place} is a link to {os.readlink(place)}, which is not there")
            if place.exists() and not place.is_dir():
                raise OSError(f"{place} is a file, and a folder was expected")
        here = next(place for place in (folder, *folder.parents) if place.exists())
        if not os.access(here, os.W_OK | os.X_OK):
            raise OSError(f"{here} is closed to you, or on a disk that is only read")
    except OSError as error:
        raise ValueError(f"cannot write to output folder {folder}: {error.strerror or error}") from error


def check_folder(folder: Path, num_bytes: int = 0) -> None:
    """Make the output folder and raise ValueError unless `num_bytes` of files can be written there."""
    check_place(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        free = shutil.disk_usage(folder).free
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        said = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot write to output folder {folder}: {said}") from error
    if free < num_bytes:
        raise ValueError(
            f"output folder {folder} has {free / 1e6:.0f} MB free, and up to {num_bytes / 1e6:.0f} MB are "
            "expected: make room, or give another folder"
        )


def save_pictures(
    pictures: Sequence[Picture], folder: Path, kind: str = "png", sign: Sign | None = None
) -> list[Path]:
    """Write one file each and return their paths, in order. Stems must be distinct; kind as in `metadata`.

    No file that exists is ever touched: if any name is taken, all get the suffix of a further run ("-run2").
    sign: adds a signature to each (`credentials.signer`).
    A full disk keeps the files that fit, each of them whole, and raises OSError, which names the folder.
    """
    temporary: list[Path] = []
    full: OSError | None = None
    try:
        for picture in pictures:
            try:
                data = metadata.encode(picture.image, picture.recipe, kind)
                temporary.append(_temporary(folder, data if sign is None else sign(data, kind)))
            except OSError as error:
                full = error
                break
        stems = [picture.stem for picture in pictures[: len(temporary)]]
        paths = _publish_all(temporary, [folder / f"{stem}{metadata.SUFFIXES[kind]}" for stem in stems])
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)
    if full is not None:
        kept = f"{len(paths)} of {len(pictures)} files are kept"
        raise OSError(full.errno, f"{full.strerror} in {folder}; {kept}") from full
    return paths


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C, and other signals that a program handles, wait for the end of the block: what is finished gets
    onto the disk."""
    if threading.current_thread() is not threading.main_thread():  # only that one hears of them
        yield
        return
    came: list[int] = []
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: handler for number in numbers if callable(handler := signal.getsignal(number))}
    for number in before:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        before[came[0]](came[0], None)


def replace_file(path: Path, data: bytes) -> None:
    """Write a file in place of the one of that name, if any. Raises OSError; then the old one is whole."""
    if path.exists() and not path.is_file():
        kind = "folder" if path.is_dir() else "device"
        raise FileExistsError(f"{path} is a {kind}, and a file of that name is to be written: move it away")
    try:
        temporary = _temporary(path.parent, data)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}: cannot write {path}") from error
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


def _publish_all(temporary: Sequence[Path], paths: Sequence[Path]) -> list[Path]:
    """Give every file its name, or all the name of a further run where one is taken."""
    for run in itertools.count(1):
        named = (
            paths if run == 1 else [path.with_name(f"{path.stem}-run{run}{path.suffix}") for path in paths]
        )
        if (done := _publish(temporary, named)) is not None:
            return done
    raise AssertionError("unreachable")


def _publish(temporary: Sequence[Path], paths: Sequence[Path]) -> list[Path] | None:
    """Give every file its name, or none of them (None) when one is taken, even by a run at the same time."""
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
    """Like os.replace, but FileExistsError for a name that is taken. Works without hard links, too (FAT)."""
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
