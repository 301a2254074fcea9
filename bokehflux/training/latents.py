"""Scenes as latents on disk: shards of .safetensors, mapped and read by index; levels and captions beside.

A folder holds `latents.json` and the shards it names. Every scene has the same number of pictures and every
picture the same size, so that a scene is one row of one tensor and any order costs the same. A shard is
called after the keys of its scenes, and a scene's key after all that decides its latents: what was made once
is found again, whatever else has changed, and a folder that was written to and left is as it was before.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bokehflux.conditioning import Conditioning
from bokehflux.fingerprint import fingerprint_of_bytes
from bokehflux.lens import Unify, check_level
from bokehflux.sampling.latents import LatentGrid, pack
from bokehflux.training.batches import Draws
from bokehflux.weights.files.checkpoint import CheckpointError, NotFoundError, open_checkpoint, read_json
from bokehflux.weights.files.write import save, write_json

INDEX = "latents.json"
SCHEMA = 2
SHARDS = "latents-{}.safetensors"
AGAIN = "make its latents again: `bokehflux latents` keeps what is whole"
KEYS = "keys"
"""In a shard's metadata: the keys of its scenes, as JSON."""
Encode = Callable[[Sequence[str]], Conditioning]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A scene that a folder shall hold."""

    name: str
    """What messages call it."""
    key: str
    """A hash of everything that decides its latents: another key means that they are made again."""
    captions: Sequence[str]
    levels: Mapping[Unify, Sequence[float | None]]
    """Those of its R pictures under both meanings of the number, None where it is not known."""
    make: Callable[[], Tensor]
    """Latents [R, C, h, w] as the model takes them; h and w are even."""


class Written(NamedTuple):
    """Names of the scenes whose latents were made: those that the folder did not have, and those it had."""

    added: list[str]
    changed: list[str]


def write_entries(folder: Path, entries: Iterable[Entry], shard_scenes: int = 64) -> Written:
    """Bring a folder to these scenes, of one shape. Latents that are there already are kept.

    A scene is made before the next one is taken, so that entries may come from a generator. The index is
    replaced when everything it names is there; what it no longer names is then removed. Raises ValueError
    for a scene without a caption or with levels outside 0-30, and for latents of another shape.
    """
    before = _index(folder)["scenes"] if (folder / INDEX).is_file() else []
    known = {scene["name"] for scene in before}
    there = dict(_rows_there(folder))
    whole = {path.name for path, _ in there.values()}
    written = Written([], [])
    shape: tuple[int, ...] | None = None

    def taken() -> Iterator[tuple[dict[str, Any], Tensor]]:
        """What the index says of each scene, and its latents."""
        nonlocal shape
        for entry in entries:
            _check_told(entry)
            if entry.key in there:
                path, number = there[entry.key]
                x0 = open_checkpoint(path).read("latents")[number]
            else:
                x0 = entry.make().cpu()
                (written.changed if entry.name in known else written.added).append(entry.name)
            _check(entry, x0, shape)
            shape = tuple(x0.shape)
            told = {"captions": list(entry.captions), "levels": {**entry.levels}}
            yield {"name": entry.name, "key": entry.key, **told}, x0

    shards: list[dict[str, Any]] = []
    scenes: list[dict[str, Any]] = []
    rows = taken()
    while part := list(itertools.islice(rows, shard_scenes)):
        keys = json.dumps([scene["key"] for scene, _ in part])
        name = SHARDS.format(fingerprint_of_bytes(keys.encode()))
        shards.append({"file": name, "scenes": len(part)})
        scenes += [scene for scene, _ in part]
        if name not in whole:
            save(folder / name, {"latents": torch.stack([x0 for _, x0 in part])}, {KEYS: keys})
    write_json(
        folder / INDEX, {"schema": SCHEMA, "shape": list(shape or ()), "shards": shards, "scenes": scenes}
    )
    for path in set(folder.glob(SHARDS.format("*"))) - {folder / shard["file"] for shard in shards}:
        path.unlink()
    return written


def write_latents(
    folder: Path, latents: Tensor, levels: Tensor, captions: Sequence[Sequence[str]], shard_scenes: int = 64
) -> None:
    """Write S scenes: latents [S, R, C, h, w] as the model takes them, levels [S, R] 0-30, captions of each.

    As `write_entries`, for latents that are at hand and levels that mean the same in every picture.
    """
    if latents.dim() != 5 or levels.shape != latents.shape[:2]:
        raise ValueError(
            "expected latents [S, R, C, h, w] and levels [S, R], "
            f"got {list(latents.shape)} and {list(levels.shape)}"
        )
    if len(captions) != len(latents):
        raise ValueError(f"expected captions of {len(latents)} scenes, got those of {len(captions)}")
    _grid(latents.shape)
    entries = [
        Entry(
            name=f"scene {i}",
            key=fingerprint_of_bytes(x0.contiguous().view(torch.uint8).numpy(force=True).tobytes()),
            captions=texts,
            levels={"raw": level, "range": level},
            make=functools.partial(torch.clone, x0),
        )
        for i, (x0, level, texts) in enumerate(zip(latents, levels.float().tolist(), captions, strict=True))
    ]
    write_entries(folder, entries, shard_scenes)


def _check_told(entry: Entry) -> None:
    if isinstance(entry.captions, str) or not entry.captions:
        raise ValueError(f"{entry.name}: expected a list of captions, found {entry.captions!r}")
    for level in itertools.chain(*entry.levels.values()):
        check_level(0 if level is None else level, f"a level of {entry.name}")


def _check(entry: Entry, x0: Tensor, shape: Sequence[int] | None) -> None:
    if x0.dim() != 4 or (shape is not None and x0.shape != shape):
        expected = "[R, C, h, w]" if shape is None else f"{list(shape)} like those before"
        raise ValueError(f"{entry.name}: expected latents {expected}, got {list(x0.shape)}")
    _grid(x0.shape)
    counts = {meaning: len(levels) for meaning, levels in entry.levels.items()}
    if counts != {"raw": len(x0), "range": len(x0)}:
        raise ValueError(f"{entry.name}: expected {len(x0)} levels of raw and range, got {counts}")


def _grid(shape: Sequence[int]) -> LatentGrid:
    """The grid of latents [..., h, w]. Raises ValueError for an odd side."""
    return LatentGrid(height_px=8 * shape[-2], width_px=8 * shape[-1])


def _rows_there(folder: Path) -> Iterator[tuple[str, tuple[Path, int]]]:
    """Key -> shard and row of every scene whose latents a folder holds, named by an index or not."""
    for path in sorted(folder.glob(SHARDS.format("*"))):
        try:
            keys = json.loads(open_checkpoint(path).metadata[KEYS])
        except (CheckpointError, KeyError):  # cut off, or not ours: it is made again
            continue
        yield from ((key, (path, number)) for number, key in enumerate(keys))


def _index(folder: Path) -> dict[str, Any]:
    """`latents.json`. Raises CheckpointError for one of another schema."""
    index = read_json(folder / INDEX)
    if index.get("schema") != SCHEMA:
        raise CheckpointError(
            folder / INDEX,
            f"expected schema {SCHEMA}, found {index.get('schema')!r}: write the latents to another folder",
        )
    return index


class LatentFolder:
    """A folder of latents, as `Scenes`. Opening reads headers, levels and captions.

    encode: prompts -> what the network is told of them. unify: what the number means; scenes without a level
    of that meaning are left out. Raises CheckpointError for a folder with holes.
    """

    device = torch.device("cpu")

    def __init__(self, folder: Path, encode: Encode, unify: Unify = "range") -> None:
        if not (folder / INDEX).is_file():
            raise NotFoundError(f"{folder}: no {INDEX} in it", "make latents with `bokehflux latents`")
        index = _index(folder)
        self.num_renders, self.channels, *_ = shape = tuple(index["shape"])
        self.grid = _grid(shape)
        self._encode = encode
        paths = [folder / shard["file"] for shard in index["shards"]]
        if missing := [f"{path.name}: no such file" for path in paths if not path.is_file()]:
            raise CheckpointError(folder, *missing, AGAIN)
        self._shards = [open_checkpoint(path) for path in paths]
        counts = [shard["scenes"] for shard in index["shards"]]
        self._starts = [0, *itertools.accumulate(counts)]
        keys = [scene["key"] for scene in index["scenes"]]
        problems = []
        for shard, (start, end) in zip(self._shards, itertools.pairwise(self._starts), strict=True):
            expected = {"latents": (end - start, *shape)}
            if shard.shapes != expected:
                problems.append(f"{shard.path.name}: expected {expected}, found {shard.shapes}")
            if shard.metadata.get(KEYS) != json.dumps(keys[start:end]):
                problems.append(f"{shard.path.name}: holds other scenes than {INDEX} says")
        if self._starts[-1] != len(keys):
            problems.append(f"{INDEX} names {len(keys)} scenes, shards hold {self._starts[-1]}")
        if problems:
            raise CheckpointError(folder, *problems, AGAIN)
        levels = [scene["levels"][unify] for scene in index["scenes"]]
        self._places = [i for i, known in enumerate(levels) if None not in known]
        """Where the scenes lie that have a level."""
        self.left_out = len(levels) - len(self._places)
        """How many have none."""
        if not self._places:
            raise CheckpointError(folder, f"none of its {len(levels)} scenes has a level under {unify!r}")
        self._levels = torch.tensor([levels[i] for i in self._places])
        self.captions: list[list[str]] = [index["scenes"][i]["captions"] for i in self._places]
        self.names: list[str] = [index["scenes"][i]["name"] for i in self._places]
        self.num_scenes = len(self._places)

    def latents(self, scene: Tensor, render: Tensor) -> Tensor:
        rows = []
        for number, which in zip(scene.tolist(), render.tolist(), strict=True):
            place = self._places[number]
            shard = bisect.bisect_right(self._starts, place) - 1
            rows.append(self._shards[shard].read("latents")[place - self._starts[shard], which])
        return pack(torch.stack(rows).float())

    def levels(self, scene: Tensor, render: Tensor) -> Tensor:
        return self._levels[scene, render]

    def text(self, scene: Tensor, drop: Tensor, draws: Draws) -> Conditioning:
        which = draws.uniform("choice of a caption").tolist()
        chosen = [
            self.captions[number][math.floor(share * len(self.captions[number]))]
            for number, share in zip(scene.tolist(), which, strict=True)
        ]
        dropped = drop.tolist()
        return self._encode(["" if gone else text for gone, text in zip(dropped, chosen, strict=True)])

    def null_text(self) -> Conditioning:
        return self._encode([""])
