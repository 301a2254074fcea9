"""What is printed: notices on stderr, results on stdout. Neither ends a run whose result is files."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO


def prepare() -> None:
    """Let both streams escape letters that they cannot show (Windows consoles, `LANG=C`)."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """A notice for the person at the terminal; nothing where stderr is closed."""
    with contextlib.suppress(OSError, ValueError):
        if sys.stderr is not None:
            print(f"bokehflux: {text}", file=sys.stderr, flush=True)


def finish() -> None:
    """What stderr did not take is given up, or Python's own flush at its end would change the exit code."""
    try:
        if sys.stderr is not None:
            sys.stderr.flush()
    except (OSError, ValueError):
        _silence(sys.stderr)


def show(lines: Iterable[str]) -> None:
    """The result of a command. A reader that has gone away ends it quietly; OSError for a full disk."""
    try:
        _print(lines)
    except OSError as error:
        _silence(sys.stdout)
        if error.errno not in (errno.EPIPE, errno.EINVAL):  # EINVAL: a closed pipe on Windows
            raise OSError(error.errno, f"cannot write to standard output: {error.strerror}") from error


def show_files(paths: Iterable[Path]) -> None:
    """Files that were written, a line each. They are there whether or not anybody reads their names."""
    with contextlib.suppress(OSError):
        show(map(str, paths))


def plain(text: str) -> str:
    """With control characters spelled out: what strangers wrote into a file must not rule the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _print(lines: Iterable[str]) -> None:
    if sys.stdout is None:  # closed before the program began
        return
    for line in lines:
        print(line, flush=True)


def _silence(stream: TextIO) -> None:
    """Nothing that is printed from here on, nor Python's flush at its end, may fail again."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
