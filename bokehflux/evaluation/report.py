"""What reports share: which code made them, and where in a document they are written."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from bokehflux.version import __version__

COMMIT_VARIABLE = "BOKEHFLUX_COMMIT"
"""Names the commit where the code is a copy without its history."""


def commit() -> str:
    """The commit of this checkout, as git describes it; the package's version where there is none."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    if named := os.environ.get(COMMIT_VARIABLE):
        return named
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return f"version {__version__}"
    return found.stdout.strip()


def replace_between(document: Path, markers: tuple[str, str], text: str) -> None:
    """Replace what lies between the markers. Raises ValueError where a document has not one pair of them."""
    begin, end = markers
    old = document.read_text(encoding="utf-8")
    if old.count(begin) != 1 or old.count(end) != 1 or old.index(begin) > old.index(end):
        raise ValueError(f"{document}: expected one line {begin!r} and after it one line {end!r}")
    before, after = old[: old.index(begin)], old[old.index(end) :]
    document.write_text(f"{before}{begin}\n{text}\n{after}", encoding="utf-8")
