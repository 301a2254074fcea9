"""Photographs in bulk, from four kinds of places, each a sequence of the same rows.

A folder of files, a manifest (JSONL), the published dataset's parquet, and tar shards with a parquet index,
as img2dataset writes them. A row is light: pixels are read when they are asked for. Parquet needs `pyarrow`
(extra `data`).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bokehflux.fingerprint import fingerprint_of_bytes
from bokehflux.photos.exif import Exif
from bokehflux.photos.maps import Kind, map_reader
from bokehflux.photos.read import Photo, photo_from_bytes, turned

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
DEPTH_SUFFIXES = (".depth.npz", ".depth.npy", ".depth.png")
MASK_SUFFIXES = (".mask.npz", ".mask.npy", ".mask.png", ".mask.jpg")
PHOTO_ID = re.compile(r"static\.?flickr\.com/(?:\d+/)*(\d+)_|flickr\.com/photos/[^/]+/(\d+)")
FIELDS = {
    "licence": ("image_license", "license", "licence"),
    "source": ("flickr_url", "source", "url"),
    "captions": ("captions", "caption"),
    "photo_id": ("flickr_photo_id", "photo_id"),
    "all_in_focus": ("pseudo_aif", "suitable_for_synthetic"),
    "exif": ("flickr_exif", "exif"),
}
"""What a row tells -> its names in the published parquet and manifest, and in img2dataset's index."""
LENS = {
    "f_number": ("f_number", "N"), "focal_mm": ("focal_length", "fmm"),
    "focal_35mm": ("focal_length_35", "f35mm"), "subject_distance_m": ("subject_distance", "s1"),
}  # fmt: skip
"""Values of `Exif` -> their columns, and their names under "camera_anns" of a manifest."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A photograph, what lies over it, and what is known of it."""

    key: str
    """Names its files: unique in its place, with letters that every file system takes; may have folders."""
    source: str
    """Where the picture comes from: the page or link that the place names, or the file."""
    licence: str | None
    captions: tuple[str, ...] = ()
    photo_id: str | None = None
    """The photo service's number."""
    all_in_focus: bool | None = None
    """Whether nearly everything is sharp, where somebody has said so."""
    exif: Exif = Exif()
    """What stands beside the picture. It comes before what the file holds, the orientation apart."""
    maps_upright: bool = False
    """Whether depth and mask lie over the upright picture already, and not over its stored pixels."""
    read_photo: Callable[[], Photo]
    read_depth: Callable[[], NDArray[np.float32]] | None = None
    read_mask: Callable[[], NDArray[np.float32]] | None = None

    def photo(self) -> Photo:
        """The upright photograph, its EXIF completed by what stands beside it. Raises ValueError."""
        photo = self.read_photo()
        beside = {name: value for name, value in vars(self.exif).items() if value is not None}
        beside.pop("orientation", None)
        return dataclasses.replace(photo, exif=dataclasses.replace(photo.exif, **beside))

    def depth_m(self, photo: Photo) -> NDArray[np.float32] | None:
        """[H, W] metres over the upright photograph. Raises ValueError for another shape."""
        return None if self.read_depth is None else self._upright(self.read_depth(), photo, "depth map")

    def mask(self, photo: Photo) -> NDArray[np.float32] | None:
        """[H, W], 0 to 1, over the upright photograph. Raises ValueError for another shape."""
        return None if self.read_mask is None else self._upright(self.read_mask(), photo, "mask")

    def _upright(self, values: NDArray[np.float32], photo: Photo, name: str) -> NDArray[np.float32]:
        if not self.maps_upright:
            values = np.asarray(turned(Image.fromarray(values), photo.exif.orientation))
        height, width = values.shape
        wide, high = photo.image.size
        if abs(width * high - height * wide) > max(width, height, wide, high):
            stands = "upright" if self.maps_upright else "turned as the photograph is"
            raise ValueError(
                f"the {name} of {self.key} has {width} x {height} points when {stands}, and the upright "
                f"photograph {wide} x {high}: if `maps_upright` is {str(self.maps_upright).lower()} by "
                "mistake, change it"
            )
        return values


@dataclass(frozen=True)
class Rows:
    """A place with photographs: `len`, and a row by its number. A row may raise ValueError, alone."""

    count: int
    at: Callable[[int], Row]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return self.at(index)


def open_rows(place: Path, answers: Mapping[str, Exif] | None = None) -> Rows:
    """The photographs in a folder, a .jsonl file, a .parquet file, or a folder with .tar files.

    answers: EXIF data by photo id, as `read_answers` reads them; joined to rows that lack an f-number. Raises
    ValueError for a place that is none of these or holds no photograph.
    """
    if place.is_dir():
        tars = sorted(place.glob("*.tar"))
        rows = _tars(tars) if tars else _folder(place)
    elif place.suffix == ".jsonl" and place.is_file():
        rows = _manifest(place)
    elif place.suffix == ".parquet" and place.is_file():
        rows = _parquet(place)
    else:
        there = "is none of these" if place.exists() else "is not there"
        raise ValueError(f"expected a folder, a .jsonl or a .parquet file with photographs; {place} {there}")
    if not rows.count:
        raise ValueError(f"{place} holds no photograph")
    if answers is None:
        return rows

    def joined(index: int) -> Row:
        row = rows[index]
        found = None if row.photo_id is None else answers.get(row.photo_id)
        return row if found is None or row.exif.f_number is not None else dataclasses.replace(row, exif=found)

    return Rows(rows.count, joined)


def read_answers(path: Path) -> dict[str, Exif]:
    """Photo id -> EXIF data, from the answers that `scripts/ask_exif.py` keeps.

    Raises ValueError for a file that cannot be read and for another line; a last line that was cut off is
    left out.
    """
    found: dict[str, Exif] = {}
    try:
        whole_lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read answers from {path}: {error}") from error
    for number, line in enumerate(whole_lines, 1):
        try:
            if line.strip():
                answer = json.loads(line)
                found[str(answer["photo_id"])] = Exif.from_tags(answer.get("flickr_exif"))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}, is not an answer about a photograph: {error}") from None
    return found


# The four places


def _folder(place: Path) -> Rows:
    """Photographs below a folder; beside a.jpg may lie a.json, a.txt, a.depth.npz and a.mask.png."""
    paths = sorted(
        path
        for path in place.rglob("*")
        if path.suffix.lower() in PHOTO_SUFFIXES
        and path.is_file()
        and not path.name.endswith((*DEPTH_SUFFIXES, *MASK_SUFFIXES))
        and not any(part.startswith(".") for part in path.relative_to(place).parts)
    )
    names = _told_apart([path.relative_to(place).as_posix() for path in paths])

    def at(index: int) -> Row:
        path = paths[index]

        def beside(suffix: str) -> Callable[[], bytes] | None:
            other = path.with_name(path.stem + suffix)
            return other.read_bytes if other.is_file() else None

        return _row_of_files(names[index], str(path), _opened(path.read_bytes, path), beside, {})

    return Rows(len(paths), at)


def _tars(tars: list[Path]) -> Rows:
    """Files of one name belong together; NAME.parquet beside NAME.tar, or index.parquet, adds columns."""
    groups: list[tuple[Path, str, dict[str, tuple[int, int]]]] = []  # suffix -> where the file lies, its size
    broken: list[str] = []
    for path in tars:
        try:
            with tarfile.open(path, "r:") as tar:
                named: dict[str, dict[str, tuple[int, int]]] = {}
                for member in tar:
                    folder, _, name = member.name.rpartition("/")
                    stem, dot, suffix = name.partition(".")
                    if member.isfile():
                        files = named.setdefault(f"{folder}/{stem}".strip("/"), {})
                        files[dot + suffix.lower()] = member.offset_data, member.size
        except (tarfile.TarError, OSError) as error:
            broken.append(f"{path} cannot be read as a tar file: {error}")
            continue
        groups += [(path, key, files) for key, files in named.items() if any(map(files.get, PHOTO_SUFFIXES))]
    if broken:
        raise ValueError(f"{'; '.join(broken)}: fetch again what is cut off, or move it out of the folder")
    names = _told_apart([f"{path.stem}/{key}" for path, key, _ in groups])
    columns = functools.lru_cache(maxsize=2)(_columns)  # one shard after the other is read

    def at(index: int) -> Row:
        path, key, files = groups[index]

        def beside(suffix: str) -> Callable[[], bytes] | None:
            if suffix not in files:
                return None
            offset, size = files[suffix]

            def read() -> bytes:
                with path.open("rb") as file:
                    file.seek(offset)
                    return file.read(size)

            return read

        suffix, read = next((s, read) for s in PHOTO_SUFFIXES if (read := beside(s)) is not None)
        indices = (path.with_suffix(".parquet"), path.with_name("index.parquet"))
        told = next((columns(one).get(key, {}) for one in indices if one.is_file()), {})
        return _row_of_files(names[index], f"{path}:{key}{suffix}", read, beside, told)

    return Rows(len(groups), at)


def _columns(index: Path) -> dict[str, dict[str, Any]]:
    """Rows of an index by their key."""
    table = _opened_parquet(index).read()
    return {str(row["key"]): row for row in table.to_pylist() if "key" in row}


def _manifest(path: Path) -> Rows:
    """A JSON object a line, names as in the published manifest; paths are relative to it."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path} as a manifest in UTF-8: {error}") from error

    def at(index: int) -> Row:
        where = f"{path.name}, photograph {index + 1}"
        try:
            given = json.loads(lines[index])
            photo = path.parent / given["input_image_path"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{where}: expected a JSON object with input_image_path: {error!r}") from None

        def beside(name: str, kind: Kind) -> Callable[[], NDArray[np.float32]] | None:
            file = given.get(name)
            if not isinstance(file, str | None):
                raise ValueError(f"{where}: {name} must be a path, got {file!r:.80}")
            return map_reader((path.parent / file).read_bytes, file, kind) if file else None

        return _row(
            f"{path.stem}-{index:07d}", str(photo), _opened(photo.read_bytes, photo), given,
            beside("depth_map_path", "depth"), beside("fg_mask_path", "mask"),
        )  # fmt: skip

    return Rows(len(lines), at)


def _parquet(path: Path) -> Rows:
    """A row a photograph, its file's bytes in the column `image`. Read a row group at a time."""
    file = _opened_parquet(path)
    if "image" not in file.schema_arrow.names:
        raise ValueError(f"{path} has no column `image`, but {', '.join(file.schema_arrow.names)}")
    starts = np.cumsum([0, *(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))])
    others = [name for name in file.schema_arrow.names if name != "image"]
    kept: dict[bool, tuple[int, Any]] = {}

    def table(group: int, images: bool) -> Any:
        if images not in kept or kept[images][0] != group:
            kept[images] = group, file.read_row_group(group, columns=["image"] if images else others)
        return kept[images][1]

    def at(index: int) -> Row:
        group = int(np.searchsorted(starts, index, side="right")) - 1
        place = index - int(starts[group])

        def read() -> bytes:
            image = table(group, images=True)["image"][place].as_py()
            data = image.get("bytes") if isinstance(image, dict) else image
            if not isinstance(data, bytes):
                raise ValueError(f"the row has no picture, but {type(data).__name__}")
            return data

        given = {name: values[0] for name, values in table(group, False).slice(place, 1).to_pydict().items()}
        return _row(f"{path.stem}-{index:07d}", f"{path}:{index}", read, given)

    return Rows(file.metadata.num_rows, at)


def _opened_parquet(path: Path) -> Any:
    """A `pyarrow.parquet.ParquetFile`. Raises ValueError without pyarrow and for a file that is none."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError("parquet needs the package `pyarrow`: pip install pyarrow") from None
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow's own are among them
        raise ValueError(f"{path} cannot be read as a parquet file: {error}") from error


# What they share


def _row_of_files(
    key: str,
    name: str,
    read: Callable[[], bytes],
    beside: Callable[[str], Callable[[], bytes] | None],
    columns: Mapping[str, Any],
) -> Row:
    """A row from files of one name. beside: suffix -> what reads that file, or None."""
    given = dict(columns)
    if (notes := beside(".json")) is not None:
        try:
            given |= json.loads(notes())
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{key}.json is not a JSON object: {error}") from None
    if (caption := beside(".txt")) is not None and _first(given, FIELDS["captions"]) is None:
        given["captions"] = [caption().decode("utf-8", "replace").strip()]

    def found(suffixes: Iterable[str], kind: Kind) -> Callable[[], NDArray[np.float32]] | None:
        readers = ((suffix, beside(suffix)) for suffix in suffixes)
        return next((map_reader(r, key + suffix, kind) for suffix, r in readers if r is not None), None)

    return _row(key, name, read, given, found(DEPTH_SUFFIXES, "depth"), found(MASK_SUFFIXES, "mask"))


def _row(
    key: str,
    name: str,
    read: Callable[[], bytes],
    given: Mapping[str, Any],
    depth: Callable[[], NDArray[np.float32]] | None = None,
    mask: Callable[[], NDArray[np.float32]] | None = None,
) -> Row:
    """A row from its file and what is told beside it, under any of the published names."""
    told = {field: _first(given, names) for field, names in FIELDS.items()}
    beside = Exif.from_tags(told["exif"])
    camera, captions = given.get("camera_anns") or {}, told["captions"] or []
    if not isinstance(camera, Mapping):
        raise ValueError(f"{name}: camera_anns must be an object, got {camera!r:.80}")
    if not isinstance(captions, str | list):
        raise ValueError(f"{name}: captions must be text or a list of texts, got {captions!r:.80}")
    captions = [captions] if isinstance(captions, str) else captions
    lens = {**given, **camera}
    numbers = Exif.from_tags({
        "FNumber": _first(lens, LENS["f_number"]), "FocalLength": _first(lens, LENS["focal_mm"]),
        "FocalLengthIn35mmFilm": _first(lens, LENS["focal_35mm"]),
        "SubjectDistance": _first(lens, LENS["subject_distance_m"]),
    })  # fmt: skip
    known = {field: value for field, value in vars(numbers).items() if value is not None}
    source = str(told["source"] or name)
    photo_id = told["photo_id"]
    if photo_id is None and (match := PHOTO_ID.search(source)):
        photo_id = match[1] or match[2]
    # A tool that wrote the picture again left the orientation beside it, where the file has none.
    orientation = beside.orientation if told["exif"] is given.get("exif") else None
    return Row(
        key=_safe(key), source=source, licence=None if told["licence"] is None else str(told["licence"]),
        captions=tuple(map(str, captions)), photo_id=None if photo_id is None else str(photo_id),
        all_in_focus=None if told["all_in_focus"] is None else bool(told["all_in_focus"]),
        exif=dataclasses.replace(beside, **known), maps_upright=bool(given.get("maps_upright", False)),
        read_photo=lambda: photo_from_bytes(read(), name, orientation), read_depth=depth, read_mask=mask,
    )  # fmt: skip


def _first(given: Mapping[str, Any], names: Iterable[str]) -> Any:
    return next((given[name] for name in names if given.get(name) is not None), None)


def _safe(key: str) -> str:
    """Letters that every file system takes, and no way out of the folder."""
    parts = [re.sub(r"[^\w.-]", "_", part) for part in PurePosixPath(key).parts]
    return "/".join(part for part in parts if part not in (".", "..", "_"))


def _told_apart(names: Sequence[str]) -> list[str]:
    """The names. Those that would get one key end with part of their hash, but for one that is that key."""
    counts = Counter(map(_safe, names))
    return [
        name
        if counts[_safe(name)] == 1 or _safe(name) == name
        else f"{name}-{fingerprint_of_bytes(name.encode(errors='surrogatepass'))[:8]}"
        for name in names
    ]


def _opened(read: Callable[[], bytes], path: Path) -> Callable[[], bytes]:
    def opened() -> bytes:
        try:
            return read()
        except OSError as error:
            raise ValueError(f"cannot read the photograph {path}: {error.strerror}") from error

    return opened
