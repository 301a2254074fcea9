"""Scenes in a folder: pictures that say themselves what they are, or pictures that a manifest tells of.

Pictures of ours hold their level, prompt, role and mask. For others a line of JSON each does:
{"file": "a.png", "level": 5, "scene": "mug", "prompt": ..., "role": "pivot", "mask": ..., "truth": ...}.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bokehflux.evaluation.figures import pixels
from bokehflux.evaluation.scores import Shots
from bokehflux.fingerprint import fingerprint
from bokehflux.lens import check_level
from bokehflux.photos.maps import read_map
from bokehflux.photos.read import read_photo
from bokehflux.pictures.metadata import SUFFIXES, NoRecipe, read_recipe
from bokehflux.pipeline.render import fits, map_over, resized
from bokehflux.record import Record

logger = logging.getLogger(__name__)
MANIFEST = {
    "file": str,
    "level": int | float,
    "scene": str,
    "prompt": str,
    "role": str,
    "mask": str,
    "truth": str,
}
"""What a line of a manifest may tell; file and level it must."""
ROLES = ("target", "pivot")


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One file."""

    path: Path
    level: float
    role: str = "target"
    mask: Path | None = None
    """White where the subject is."""
    photo: Path | None = None
    """The photograph that the mask lies over, which may be stored turned, and the mask with it."""
    truth: Path | None = None
    """The true picture of this level."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """The files of one scene."""

    name: str
    prompt: str | None
    model: str | None
    pictures: tuple[Picture, ...]
    """Targets, by ascending level."""
    pivot: Picture | None
    """The pivot, or the target that stands for it."""
    photo_hash: str | None = None
    """The fingerprint of the photograph that all was made from."""

    @property
    def levels(self) -> tuple[float, ...]:
        return tuple(picture.level for picture in self.pictures)

    def with_truth(self, others: Sequence[Found]) -> Found:
        """With the pictures of the scene among others that shows the same.

        That is one made from the same photograph or from one of these pictures, else the only one of this
        prompt, else the only one there is. Raises ValueError where there is none, or a level lacks in it.
        """
        hashes = {self.photo_hash, *(fingerprint([each.path]) for each in self.pictures)} - {None}
        alike = [other for other in others if other.photo_hash in hashes] or [
            other for other in others if other.prompt == self.prompt or len(others) == 1
        ]
        if len(alike) != 1:
            raise ValueError(
                f"{self.name}: expected one scene of the reference to be like it, got {len(alike)}"
            )
        truths = {picture.level: picture.path for picture in alike[0].pictures}
        if lacking := [f"{level:g}" for level in self.levels if level not in truths]:
            raise ValueError(f"{self.name}: the reference has no picture of level {', '.join(lacking)}")
        pictures = [dataclasses.replace(each, truth=truths[each.level]) for each in self.pictures]
        return dataclasses.replace(self, pictures=tuple(pictures))

    def read(self) -> Shots:
        """The pixels. Raises ValueError for files that cannot be read and for unequal sizes."""
        images = torch.stack(_alike([each.path for each in self.pictures]))
        pivot = None if self.pivot is None else _alike([self.pictures[0].path, self.pivot.path])[1]
        masks = [(each.mask, each.photo) for each in self.pictures if each.mask is not None]
        truths = [each.truth for each in self.pictures if each.truth is not None]
        subject = None
        if masks:
            subject = _mask(*masks[0], images.shape[-2], images.shape[-1])
        reference = None
        if len(truths) == len(self.pictures):
            reference = torch.stack(_alike([self.pictures[0].path, *truths])[1:])
        return Shots(
            levels=self.levels, images=images, pivot=pivot, subject=subject, reference=reference,
            is_truth=reference is not None,
        )  # fmt: skip


def find_scenes(place: Path, among: Iterable[Path] | None = None) -> list[Found]:
    """The scenes of two or more levels in a folder, or in a .jsonl manifest. Pictures are not read yet.

    among: subfolders to look in, in place of all. Raises ValueError, with what is needed, for none.
    """
    if place.is_file() and place.suffix == ".jsonl":
        groups = _told(place)
    elif place.is_dir():
        groups = _recipes([place] if among is None else among)
    else:
        there = "is none of these" if place.exists() else "is not there"
        raise ValueError(f"expected a folder with pictures or a .jsonl manifest; {place} {there}")
    scenes = [scene for scene in map(_scene, groups) if len(scene.pictures) > 1]
    if not scenes:
        raise ValueError(
            f"{place} holds no scene that can be judged: expected two or more levels of one scene, made by "
            "`bokehflux generate`, `sweep`, `refocus` or `render`, with the recipes still in the pictures; "
            'for other pictures give a .jsonl manifest, a line for each: {"file": "a.png", "level": 5}'
        )
    return scenes


@dataclass(frozen=True)
class _Group:
    name: str
    prompt: str | None
    model: str | None
    pivot_level: float | None
    photo_hash: str | None
    pictures: list[Picture]


def _scene(group: _Group) -> Found:
    targets = {p.level: p for p in reversed(group.pictures) if p.role == "target"}  # the first of a level
    pictures = tuple(targets[level] for level in sorted(targets))
    pivots = [p for p in group.pictures if p.role == "pivot"]
    pivot = next(iter(pivots), None) or targets.get(-1.0 if group.pivot_level is None else group.pivot_level)
    if pivot is None and pictures:
        pivot = pictures[len(pictures) // 2]
    return Found(
        name=group.name, prompt=group.prompt, model=group.model, pictures=pictures, pivot=pivot,
        photo_hash=group.photo_hash,
    )  # fmt: skip


def _recipes(folders: Iterable[Path]) -> list[_Group]:
    """Pictures of ours by what decides them, their level apart."""
    groups: dict[str, _Group] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.suffix not in SUFFIXES.values() or path.name.startswith("."):
                continue
            try:
                recipe = read_recipe(path)
                record = Record.from_recipe(recipe)
            except NoRecipe:
                continue
            except ValueError as error:
                raise ValueError(f"{path} holds a recipe that cannot be used: {error}") from error
            if record.role not in ROLES or record.bokeh_level is None:
                continue
            key = json.dumps([str(path.parent), record.decides()], sort_keys=True, default=str)
            prompt, model = recipe.get("prompt"), recipe.get("model")
            hashes = dict(getattr(record.settings, "file_hashes", None) or ())
            photo_hash = recipe.get("photo_hash", hashes.get("photo"))
            group = _Group(
                prompt or str(recipe.get("photo", path.parent.name)), prompt, model,
                recipe.get("bokeh_pivot"), photo_hash, [],
            )  # fmt: skip
            mask = _near(named := recipe.get("mask"), path.parent)
            if named and mask is None and key not in groups:
                logger.warning("%s was made with the mask %s, which is not there: no subject", path, named)
            photo = None if mask is None else _near(recipe.get("photo"), path.parent)
            picture = Picture(path=path, level=record.bokeh_level, role=record.role, mask=mask, photo=photo)
            groups.setdefault(key, group).pictures.append(picture)
    return list(groups.values())


def _near(name: object, folder: Path) -> Path | None:
    """A file that a recipe names, where it was or beside the picture."""
    if not isinstance(name, str):
        return None
    places = (Path(name), folder / Path(name).name)
    return next((place for place in places if place.is_file()), None)


def _told(manifest: Path) -> list[_Group]:
    groups: dict[str, _Group] = {}
    for number, line in _lines(manifest):
        where = f"{manifest}, line {number}"
        _check(line, where)
        files = {key: manifest.parent / line[key] for key in ("file", "mask", "truth") if key in line}
        if absent := [str(path) for path in files.values() if not path.is_file()]:
            raise ValueError(f"{where}: not there: {', '.join(absent)}")
        prompt = line.get("prompt")
        name = line.get("scene", prompt or manifest.stem)
        picture = Picture(
            path=files["file"], level=float(line["level"]), role=line.get("role", "target"),
            mask=files.get("mask"), truth=files.get("truth"),
        )  # fmt: skip
        groups.setdefault(name, _Group(name, prompt, None, None, None, [])).pictures.append(picture)
    for group in groups.values():
        targets = [picture for picture in group.pictures if picture.role == "target"]
        if len({picture.level for picture in targets}) < len(targets):
            raise ValueError(
                f"{manifest}: scene {group.name!r:.80} has two pictures of one level; "
                'name each scene by "scene"'
            )
        if len({picture.truth is None for picture in targets}) > 1:
            raise ValueError(
                f"{manifest}: scene {group.name!r:.80} needs a truth for every level, or for none"
            )
    return list(groups.values())


def _lines(manifest: Path) -> Iterator[tuple[int, Any]]:
    try:
        lines = manifest.read_text(encoding="utf-8-sig").split("\n")  # JSON may hold other ends of lines
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {manifest}: {error}") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                raise ValueError(f"{manifest}, line {number}: it is not JSON") from None


def _check(line: Any, where: str) -> None:
    if not isinstance(line, Mapping) or not {"file", "level"} <= set(line):
        raise ValueError(f'{where}: expected an object with "file" and "level", got {line!r:.80}')
    for key, value in line.items():
        if key not in MANIFEST or not isinstance(value, MANIFEST[key]) or isinstance(value, bool):
            raise ValueError(f"{where}: expected {', '.join(MANIFEST)}, got {key!r:.40}: {value!r:.40}")
    if line.get("role", "target") not in ROLES:
        raise ValueError(f"{where}: role must be one of {', '.join(ROLES)}, got {line['role']!r:.40}")
    try:
        check_level(line["level"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _mask(path: Path, photo: Path | None, height: int, width: int) -> Tensor:
    """Bool [H, W] of a mask that may be larger or smaller, or turned, as that of `bokehflux render` may."""
    values = torch.from_numpy(read_map(path, "mask"))
    if not fits(values, width, height) and photo is not None:
        values = map_over(read_photo(photo), path, "mask")
    if not fits(values, width, height):
        high, wide = values.shape
        raise ValueError(
            f"the mask {path} has {wide} x {high} points and its pictures {width} x {height}: expected one "
            "shape; a manifest can name another mask"
        )
    return resized(values, height, width) > 0.5


def _alike(paths: Sequence[Path]) -> list[Tensor]:
    """Float [3, H, W] in 0 ... 1 of every file."""
    images = [read_photo(path).image for path in paths]
    for path, image in zip(paths, images, strict=True):
        if image.size != images[0].size:
            sizes = [f"{one.width} x {one.height}" for one in (images[0], image)]
            raise ValueError(f"{paths[0]} has {sizes[0]} pixels and {path} has {sizes[1]}: expected one size")
    return [pixels(image) for image in images]
