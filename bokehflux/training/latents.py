"""Scenes as latents on disk: shards of .safetensors, mapped and read by index, and their captions.

A folder holds `latents.json` and the shards it names. Every scene has the same number of pictures and every
picture the same size, so that a scene is one row of one tensor and any order costs the same.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bokehflux.conditioning import Conditioning
from bokehflux.lens import check_level
from bokehflux.sampling.latents import LatentGrid, pack
from bokehflux.training.batches import Draws
from bokehflux.weights.files.checkpoint import CheckpointError, NotFoundError, open_checkpoint, read_json
from bokehflux.weights.files.write import save, write_json

INDEX = "latents.json"
SCHEMA = 1
Encode = Callable[[Sequence[str]], Conditioning]


def write_latents(
    folder: Path, latents: Tensor, levels: Tensor, captions: Sequence[Sequence[str]], shard_scenes: int = 512
) -> None:
    """Write S scenes: latents [S, R, C, h, w] as the model takes them, levels [S, R] 0-30, captions of each.

    h and w are even. The index is written last: a folder without one is not whole. Raises ValueError for
    what is not so.
    """
    if latents.dim() != 5 or levels.shape != latents.shape[:2]:
        raise ValueError(
            "expected latents [S, R, C, h, w] and levels [S, R], "
            f"got {list(latents.shape)} and {list(levels.shape)}"
        )
    if len(captions) != len(latents) or not all(captions):
        raise ValueError("latents, levels and captions must be of the same scenes, each with a caption")
    if any(isinstance(texts, str) for texts in captions):
        raise ValueError("captions: expected a list of texts for each scene, found a bare text")
    for level in levels.flatten().tolist():
        check_level(level)
    _grid(latents.shape)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX).unlink(missing_ok=True)
    shards: list[dict[str, Any]] = []
    for i, (x0, level) in enumerate(
        zip(latents.split(shard_scenes), levels.split(shard_scenes), strict=True)
    ):
        name = f"latents-{i:05d}.safetensors"
        save(folder / name, {"latents": x0, "levels": level.float()})
        shards.append({"file": name, "scenes": len(x0)})
    index = {"schema": SCHEMA, "shape": list(latents.shape[1:]), "shards": shards, "captions": list(captions)}
    write_json(folder / INDEX, index)


def _grid(shape: Sequence[int]) -> LatentGrid:
    """The grid of latents [..., h, w]. Raises ValueError for an odd side."""
    return LatentGrid(height_px=8 * shape[-2], width_px=8 * shape[-1])


class LatentFolder:
    """A folder that `write_latents` wrote, as `Scenes`. Opening reads headers and captions.

    encode: prompts -> what the network is told of them. Raises CheckpointError for a folder with holes.
    """

    device = torch.device("cpu")

    def __init__(self, folder: Path, encode: Encode) -> None:
        if not (folder / INDEX).is_file():
            raise NotFoundError(f"{folder}: no {INDEX} in it", "latents are written by `write_latents`")
        index = read_json(folder / INDEX)
        if index.get("schema") != SCHEMA:
            raise CheckpointError(folder / INDEX, f"expected schema {SCHEMA}, found {index.get('schema')!r}")
        self.num_renders, self.channels, *_ = shape = tuple(index["shape"])
        self.grid = _grid(shape)
        self.captions: list[list[str]] = index["captions"]
        self.num_scenes = len(self.captions)
        self._encode = encode
        self._shards = [open_checkpoint(folder / shard["file"]) for shard in index["shards"]]
        counts = [shard["scenes"] for shard in index["shards"]]
        problems = [
            f"{shard.path.name}: expected {count} scenes of {index['shape']}, found {shard.shapes}"
            for shard, count in zip(self._shards, counts, strict=True)
            if shard.shapes != {"latents": (count, *shape), "levels": (count, self.num_renders)}
        ]
        if sum(counts) != self.num_scenes:
            problems.append(f"{self.num_scenes} captions for {sum(counts)} scenes")
        if problems:
            raise CheckpointError(folder, *problems)
        self._starts = [0, *itertools.accumulate(counts)]

    @property
    def num_bytes(self) -> int:
        return sum(info.num_bytes for shard in self._shards for info in shard.tensors.values())

    def _rows(self, name: str, scene: Tensor, render: Tensor) -> Tensor:
        rows = []
        for number, which in zip(scene.tolist(), render.tolist(), strict=True):
            shard = bisect.bisect_right(self._starts, number) - 1
            rows.append(self._shards[shard].read(name)[number - self._starts[shard], which])
        return torch.stack(rows).float()

    def latents(self, scene: Tensor, render: Tensor) -> Tensor:
        return pack(self._rows("latents", scene, render))

    def levels(self, scene: Tensor, render: Tensor) -> Tensor:
        return self._rows("levels", scene, render)

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
