"""The commands about photographs: what level one has, and what many of them are worth as training data.

Nothing that needs numpy, Pillow or torch at the top: --help and mistyped flags must not wait for it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from bokehflux.app.terminal import plain, say, show
from bokehflux.lens import MAX_LEVEL, TRAINING_SIDE_PX

DEPTH_KIND, MASK_KIND = "depth-pro", "birefnet"
"""Kinds of networks, where nothing else is said."""
SAID_EVERY_S = 10
"""Between two lines about the progress."""

if TYPE_CHECKING:
    from bokehflux.photos.exif import PhotoLevel


def add_commands(
    command: Callable[[str, str], argparse.ArgumentParser], shard: Callable[[str], tuple[int, int]]
) -> None:
    """Both commands with their flags. command: makes a parser from name and summary. shard: reads "I/N"."""
    # fmt: off
    exif = command("exif", "show the bokeh level of a photograph, and how it follows from its EXIF data")
    exif.add_argument("photo", metavar="PHOTO", help="the photograph: JPEG, PNG or WebP")
    exif.add_argument("--focus-distance", type=float, metavar="M",
        help="metres from the camera to what is in focus (default: as the EXIF data says, or assumed)")
    exif.add_argument("--short-side", type=int, default=TRAINING_SIDE_PX, metavar="PX",
        help="shorter side at which the level is told (default: %(default)s, the adapter's training size)")
    exif.add_argument("--json", action="store_true", help="as one JSON object")

    annotate = command("annotate", "label photographs: depth, mask, where they are in focus, their level")
    add = annotate.add_argument
    add("place", metavar="PLACE",
        help="a folder of photographs or of tar shards, a .jsonl manifest, or the dataset's .parquet")
    add("--output", default="labels", metavar="FOLDER", help="where labels go (default: %(default)s)")
    add("--depth", metavar="PATH",
        help="folder or file of a depth network, for photographs that bring no depth")
    add("--depth-kind", default=DEPTH_KIND, metavar="KIND",
        help="what it is: depth-pro (a folder), moge-2 or da3metric (ONNX files), or a .json that describes "
             "another ONNX file (default: %(default)s)")
    add("--mask", metavar="PATH", help="folder or file of a mask network, for photographs that bring no mask")
    add("--mask-kind", default=MASK_KIND, metavar="KIND",
        help="what it is: birefnet, rmbg-2.0 or isnet (ONNX files), sam (a folder), or a .json "
             "(default: %(default)s)")
    add("--focus-source", choices=("mask", "mask+sharpest", "sharpest"), default="mask+sharpest",
        help="what tells the distance in focus (default: %(default)s)")
    add("--exif", metavar="FILE", help="EXIF data by photo id, as scripts/ask_exif.py keeps it")
    add("--long-side", type=int, default=1024, metavar="PX",
        help="larger photographs are scaled down to it first (default: %(default)s)")
    add("--shard", type=shard, default=(1, 1), metavar="I/N",
        help="label only the Ith of N stretches: for N processes (default: all)")
    add("--device", default="cpu", metavar="DEVICE", help="of networks: cpu or cuda (default: %(default)s)")
    # fmt: on


def exif(args: argparse.Namespace) -> int:
    """The level of a photograph, step by step."""
    if args.short_side < 1:
        raise ValueError(f"--short-side must be at least 1 pixel, got {args.short_side}")
    found = level_in_file(Path(args.photo), args.focus_distance, args.short_side)
    if args.json:
        show([json.dumps(_plain({"photo": args.photo, **dataclasses.asdict(found)}), indent=2)])
    else:
        show(plain(line) for line in _lines(found))
    return 0


def annotate(args: argparse.Namespace) -> int:
    """Labels of many photographs; prints the labels' file."""
    from bokehflux.photos import annotate as models
    from bokehflux.photos.labels import LABELS, Labeller, expected_bytes
    from bokehflux.photos.readers import open_rows, read_answers
    from bokehflux.pictures.files import check_folder

    if args.long_side < 64:
        raise ValueError(f"--long-side must be at least 64 pixels, got {args.long_side}")
    for flag, path, kind, usual in (
        ("--depth", args.depth, args.depth_kind, DEPTH_KIND),
        ("--mask", args.mask, args.mask_kind, MASK_KIND),
    ):
        if path is None and kind != usual:
            raise ValueError(f"{flag}-kind needs {flag} PATH: it says what kind of network that is")
    answers = None if args.exif is None else read_answers(Path(args.exif))
    rows, output, (part, total) = open_rows(Path(args.place), answers), Path(args.output), args.shard
    num_bytes = expected_bytes(len(rows), args.long_side)
    say(f"photographs: {len(rows)}; depth and masks take up to {num_bytes / 1e9:.3g} GB in {output}")
    check_folder(output, num_bytes // total)
    labeller = Labeller(
        output=output,
        depth=None
        if args.depth is None
        else models.open_depth(Path(args.depth), args.depth_kind, args.device),
        mask=None if args.mask is None else models.open_mask(Path(args.mask), args.mask_kind, args.device),
        focus_source=args.focus_source,
        long_side_px=args.long_side,
    )
    said = began = time.monotonic()

    def on_row(done: int, count: int) -> None:
        nonlocal said
        if time.monotonic() - said > SAID_EVERY_S:
            said = time.monotonic()
            say(f"photographs done: {done} of {count}, {(said - began) / done:.2g} s each")

    try:
        counts = labeller.run(rows, args.shard, on_row)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"; what is finished is kept in {output}; the same command goes on") from stop
    for what, count in counts.most_common():
        say(f"{what}: {count}")
    show([str(output / LABELS.format("" if total == 1 else f"-{part}of{total}"))])
    return 0


def photo_level_of(path: Path) -> float:
    """The level for `--photo-level auto`, said aloud. Raises ValueError where the file lacks it."""
    found = level_in_file(path)
    if found.level is None:
        raise ValueError(
            f"--photo-level auto: {path} does not tell its level ({found.notes[-1]}); give --photo-level as "
            f"a number from 0 to {MAX_LEVEL:g}"
        )
    say(
        "; ".join(
            [f"--photo-level {found.level:.1f}, from the EXIF data of {plain(path.name)}", *found.notes]
        )
    )
    return found.level


def level_in_file(
    path: Path, focus_m: float | None = None, short_side_px: int = TRAINING_SIDE_PX
) -> PhotoLevel:
    """Raises ValueError for a file that cannot be read and a focus that cannot be."""
    from bokehflux.photos.exif import photo_level
    from bokehflux.photos.read import read_photo

    if focus_m is not None and not focus_m > 0:
        raise ValueError(f"--focus-distance must be above 0 metres, got {focus_m:g}")
    photo = read_photo(path)
    return photo_level(photo.exif, *photo.image.size, focus_m, short_side_px)


def _lines(found: PhotoLevel) -> Iterator[str]:
    if camera := " ".join(filter(None, (found.make, found.model))):
        yield f"camera: {camera}"
    yield f"focal length: {_told(found.focal_length_mm, 'mm')}"
    yield f"35 mm equivalent: {_told(found.focal_length_35_mm, 'mm')} ({found.focal_length_35_from})"
    yield f"f-number: {_told(found.f_number, '')}"
    yield f"focus distance: {_told(found.focus_distance_m, 'm')} ({found.focus_distance_from})"
    yield f"picture: {found.width_px} x {found.height_px} px"
    if found.px_per_mm is not None:
        width, height = found.sensor_width_mm, found.sensor_height_mm
        yield f"sensor: {width:.2f} x {height:.2f} mm, crop factor {found.crop_factor:.3g}"
        yield f"scale: {found.px_per_mm:.4g} px per mm of sensor"
        yield f"K: {found.K_px_m:.4g} px m, a radius of so many pixels per 1/m of disparity"
        yield f"K at a shorter side of {found.short_side_px} px: {found.K_px_m_short_side:.4g} px m"
        yield f"blur of the horizon there: a radius of {found.radius_at_infinity_px:.3g} px"
    yield f"level: {'none' if found.level is None else f'{found.level:.1f}'}"
    yield from (f"note: {note}" for note in found.notes)


def _told(value: float | None, unit: str) -> str:
    return "not told" if value is None else f"{value:.4g} {unit}".strip()


def _plain(facts: dict[str, object]) -> dict[str, object]:
    """JSON has no infinity."""
    return {name: "infinity" if value == math.inf else value for name, value in facts.items()}
