"""The one door through which photographs come in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from bokehflux.fingerprint import fingerprint
from bokehflux.pictures.metadata import READABLE, UNREADABLE


@dataclass(frozen=True, kw_only=True)
class Photo:
    """A photograph, and which file it was."""

    image: Image.Image
    name: str
    """The file's name, without its folder."""
    fingerprint: str


def read_photo(path: Path) -> Photo:
    """The photograph in a file. Raises ValueError unless it is a picture of a known format."""
    try:
        if not path.is_file():
            raise ValueError("it is not there" if not path.exists() else "it is not a regular file")
        with Image.open(path, formats=READABLE) as file:
            file.load()
            image = file.copy()
        return Photo(image=image, name=path.name, fingerprint=fingerprint([path]))
    except UNREADABLE as error:
        raise ValueError(
            f"cannot read the photograph {path}: {error}; expected one of {', '.join(READABLE)}"
        ) from error
