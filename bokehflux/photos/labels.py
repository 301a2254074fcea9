"""Labels of many photographs: depth and mask of each, where it is in focus, and both meanings of its level.

A folder of labels holds `maps/KEY.npz` (depth in metres, mask, and what made them) and `labels.jsonl`, an
object a photograph; photographs without a label are listed in `left-out.jsonl` with the reason. Maps that are
there and were made the same way are kept, so the same command goes on where it stopped, and labels can be
made again with another focus source at little cost.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bokehflux.fingerprint import fingerprint_of_bytes
from bokehflux.lens import Blur, Unify
from bokehflux.photos.annotate import DepthModel, MaskModel
from bokehflux.photos.exif import focal_px, photo_level
from bokehflux.photos.focus import FocusSource, Refused, disparity_per_m, find_focus
from bokehflux.photos.read import Photo, within
from bokehflux.photos.readers import Row, Rows
from bokehflux.pictures.files import replace_file
from bokehflux.pictures.metadata import UNREADABLE
from bokehflux.version import __version__

LABELS, LEFT_OUT, MAPS = "labels{}.jsonl", "left-out{}.jsonl", "maps"
LONG_SIDE_PX = 1024
BYTES_A_PIXEL = 2
"""Maps on the disk: depth as float16, somewhat compressed, and a mask, which takes next to nothing."""
FARTHEST_M = 1e4
"""Everything farther is put there, the sky too: to many programs an infinite depth is an unknown one."""
Label = dict[str, Any]
"""A label as JSON."""


@dataclass(frozen=True, kw_only=True)
class Labeller:
    """How photographs are labelled, and where their labels go."""

    output: Path
    depth: DepthModel | None = None
    """For photographs that bring no depth map; None: they stay without."""
    mask: MaskModel | None = None
    focus_source: FocusSource = "mask+sharpest"
    long_side_px: int = LONG_SIDE_PX
    """Larger photographs are scaled down to it before they are looked at; maps have that size."""

    def run(
        self, rows: Rows, shard: tuple[int, int] = (1, 1), on_row: Callable[[int, int], None] | None = None
    ) -> Counter[str]:
        """Label one of N stretches of the rows; how many came to what.

        shard: (I, N), I from 1: N processes share a folder. on_row: called with the number of rows done and
        their total. Labels are written at the end; what ends the run earlier keeps the maps that are done.
        Raises OSError for a full disk.
        """
        part, total = shard
        mine = range(len(rows) * (part - 1) // total, len(rows) * part // total)
        end = "" if total == 1 else f"-{part}of{total}"
        labels: list[Label] = []
        left_out: list[Label] = []
        counts: Counter[str] = Counter()
        for done, index in enumerate(mine, 1):
            row = None
            try:
                row = rows[index]
                label = self.label(row)
            except ValueError as error:
                who = {"row": index} if row is None else {"key": row.key, "source": row.source}
                left_out.append({**who, "reason": str(error)})
                counts[f"left out: {error if isinstance(error, Refused) else 'cannot be read'}"] += 1
            else:
                labels.append(label)
                counts.update(["labelled", *label["flags"]])
            if on_row is not None:
                on_row(done, len(mine))
        _write(self.output / LABELS.format(end), labels)
        _write(self.output / LEFT_OUT.format(end), left_out)
        return counts

    def label(self, row: Row) -> Label:
        """The label of one photograph; its maps are written. Raises ValueError where there can be none."""
        photo = row.photo()
        image = within(photo.image, self.long_side_px)
        depth, mask, maps = self._maps(row, photo, image)
        focus_m, refined = None, False
        ends: tuple[float, float] | tuple[None, None] = (None, None)
        if depth is not None:
            # Where everything is sharp the sharpest region says nothing about the focus.
            source: FocusSource = "mask" if row.all_in_focus else self.focus_source
            found = find_focus(image, depth, mask, source)
            focus_m, refined = found.distance_m, found.refined
            known = depth[disparity_per_m(depth)[1]]
            ends = (float(known.min()), float(known.max()))
        level = photo_level(photo.exif, *photo.image.size, focus_m)
        facts = dataclasses.asdict(level)
        del facts["notes"], facts["level"]
        facts["flags"] = [*level.flags, *(["focus_refined"] if refined else [])]
        if focus_m is not None:
            facts["focus_distance_from"] = self.focus_source if not row.all_in_focus else "mask"
        label: Label = {
            "key": row.key, "source": row.source, "licence": row.licence, "photo_id": row.photo_id,
            "captions": list(row.captions), "photo": photo.fingerprint, "maps": maps,
            "all_in_focus": row.all_in_focus, **facts, "nearest_m": ends[0], "farthest_m": ends[1],
        }  # fmt: skip
        blur = blur_of(label)
        label["range_px"] = None if blur is None else blur.range_px
        label["largest_radius_px"] = None if blur is None else blur.largest_radius_px
        return {name: "infinity" if value == math.inf else value for name, value in label.items()}

    def _maps(
        self, row: Row, photo: Photo, image: Image.Image
    ) -> tuple[NDArray[np.float32] | None, NDArray[np.float32] | None, str | None]:
        """Depth, mask and the name of their file; all three None where there is nothing to look with."""
        depth, mask = row.depth_m(photo), row.mask(photo)
        wanted = {
            "photo": photo.fingerprint, "size": list(image.size),
            "depth": _about(depth, self.depth), "mask": _about(mask, self.mask),
        }  # fmt: skip
        if wanted["depth"] is None and wanted["mask"] is None:
            return None, None, None
        name = f"{MAPS}/{row.key}.npz"
        maps = _kept(self.output / name, wanted)
        if maps is None:
            depth = _fitted(depth, image.size)
            if depth is None and self.depth is not None:
                depth = self.depth.depth_m(image, focal_px(photo.exif, *image.size))
            mask = _fitted(mask, image.size)
            if mask is None and self.mask is not None:
                mask = self.mask.mask(image)
            if mask is not None and np.isnan(mask).any():
                raise Refused("the mask holds what is not a number")
            made = {
                "depth": None if depth is None else np.minimum(depth, FARTHEST_M).astype(np.float16),
                "mask": None if mask is None else np.round(mask * 255).astype(np.uint8),
            }
            maps = {what: values for what, values in made.items() if values is not None}
            models = {"depth": self.depth, "mask": self.mask}
            ran_by = {what: model.ran_by for what, model in models.items() if model is not None}
            about = json.dumps({**wanted, "ran_by": ran_by, "bokehflux": __version__})
            buffer = io.BytesIO()
            np.savez_compressed(buffer, about=np.array(about), **maps)  # type: ignore[arg-type]
            (self.output / name).parent.mkdir(parents=True, exist_ok=True)
            replace_file(self.output / name, buffer.getvalue())
        return (
            maps["depth"].astype(np.float32) if "depth" in maps else None,
            maps["mask"].astype(np.float32) / np.float32(255) if "mask" in maps else None,
            name,
        )


def blur_of(label: Mapping[str, Any]) -> Blur | None:
    """K, focus and depth of a label, at its shorter side; None where it lacks one of them."""
    names = {"k_px_m": "K_px_m_short_side", "focus_m": "focus_distance_m", "nearest_m": "nearest_m",
             "farthest_m": "farthest_m"}  # fmt: skip
    if any(label[name] is None for name in names.values()):
        return None
    return Blur(**{field: float(label[name]) for field, name in names.items()})


def level_seen(label: Mapping[str, Any], unify: Unify) -> float | None:
    """The level that a trainer sees; None where the label lacks what that meaning needs."""
    blur = blur_of(label)
    if blur is not None:
        return blur.level(unify)
    k_px_m = label["K_px_m_short_side"]
    if unify == "range" or k_px_m is None:
        return None
    return Blur(k_px_m=k_px_m, focus_m=1, nearest_m=1, farthest_m=1).level(unify)


def read_labels(folder: Path) -> dict[str, Label]:
    """Labels by key. Raises ValueError where there are none, and for a photograph with two."""
    found: dict[str, Label] = {}
    paths = sorted(folder.glob(LABELS.format("*")))
    if not paths:
        raise ValueError(
            f"{folder} holds no labels ({LABELS.format('')}): make them with `bokehflux annotate`"
        )
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n"), 1):
            try:
                label = json.loads(line)
                key = str(label["key"])
            except (ValueError, LookupError, TypeError, RecursionError):
                raise ValueError(f"{path}, line {number}: not a label: {line!r:.80}") from None
            if key in found:
                earlier = LABELS.format("*")
                raise ValueError(f"{folder} has two labels for {key}: delete earlier {earlier}")
            found[key] = label
    return found


def labelled(rows: Rows, folder: Path) -> Iterator[tuple[Row, Label]]:
    """Rows that have a label, with the maps of that folder in place of their own."""
    labels = read_labels(folder)
    for index in range(len(rows)):
        row = rows[index]
        label = labels.get(row.key)
        if label is not None:
            yield with_maps(row, label, folder), label


def with_maps(row: Row, label: Label, folder: Path) -> Row:
    """The row with depth and mask from a folder of labels."""
    if label["maps"] is None:
        return row
    path = folder / label["maps"]

    def read(name: str, scale: float) -> Callable[[], NDArray[np.float32]] | None:
        def values() -> NDArray[np.float32]:
            with np.load(path, allow_pickle=False) as file:
                return file[name].astype(np.float32) / np.float32(scale)

        with np.load(path, allow_pickle=False) as file:
            return values if name in file.files else None

    return dataclasses.replace(
        row, read_depth=read("depth", 1), read_mask=read("mask", 255), maps_upright=True
    )


def expected_bytes(num_rows: int, long_side_px: int) -> int:
    """What maps take on the disk, for photographs of 3 : 2."""
    return num_rows * long_side_px**2 * 2 // 3 * BYTES_A_PIXEL


def _about(given: NDArray[np.float32] | None, model: DepthModel | MaskModel | None) -> dict[str, Any] | None:
    """What decides a map: the row's own, or the model that makes it."""
    if given is not None:
        return {"given": fingerprint_of_bytes(given.tobytes())}
    return None if model is None else model.about


def _fitted(values: NDArray[np.float32] | None, size: tuple[int, int]) -> NDArray[np.float32] | None:
    """A map brought to a size by its nearest points: averages of unknown or distant depths mean nothing."""
    if values is None:
        return None
    return np.asarray(Image.fromarray(values).resize(size, Image.Resampling.NEAREST))


def _kept(path: Path, wanted: Mapping[str, Any]) -> dict[str, NDArray[Any]] | None:
    """Maps that were made as they are wanted."""
    try:
        with np.load(path, allow_pickle=False) as file:
            about = json.loads(str(file["about"]))
            if all(about.get(name) == value for name, value in wanted.items()):
                return {name: file[name] for name in file.files if name != "about"}
    except (*UNREADABLE, zipfile.BadZipFile):  # not there, or not ours: it is made again
        pass
    return None


def _write(path: Path, lines: list[Label]) -> None:
    replace_file(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
