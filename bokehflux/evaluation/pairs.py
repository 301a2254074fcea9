"""Public sets of pairs: one view through a small aperture and through a wide one, and how near we come.

The photograph left as it is stands beside every result: in sets of little blur it scores high. A level that
is searched with the true picture in sight flatters, so its range is stated, beside one level for all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from bokehflux.evaluation.figures import pixels
from bokehflux.metrics import psnr, ssim
from bokehflux.photos.read import read_photo, within
from bokehflux.pictures import plot
from bokehflux.pictures.metadata import SUFFIXES
from bokehflux.pictures.sheet import Tile, contact_sheet
from bokehflux.pipeline.pipeline import Pipeline
from bokehflux.rendering.lens_map import LensMap

FOLDERS = (
    ("original", "bokeh"),
    ("in", "gt"),
    ("target", "source"),
    ("sharp", "blurred"),
)
"""Sharp and blurred pictures of equal names: EBB! as published, its Val294 and EBB400, RealDOF and DPDD
(which are for sharpening: their target is sharp), and anybody's own."""
METADATA, SOURCE, TARGETS, STOPS = "metadata", "source_image", "target_images", "target_avs"
"""RealBokeh: a JSON file a scene, which names one photograph and several wider apertures of it."""
SEARCHED = (4.0, 8.0, 12.0, 16.0, 20.0, 24.0, 28.0)
OWN_MAP = 28.0
"""The level that a pair's own map is found and rendered at; any would do."""
SHEET_ROWS = 3
PICTURES = (*SUFFIXES.values(), ".jpeg")
AS_IT_IS, OF_PAIR = "left as it is", "map of the pair itself"
Figures = Mapping[str, float]
Perceptual = Callable[[Tensor, Tensor], Figures]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Files of one view."""

    name: str
    sharp: Path
    blurred: Path
    f_number: float | None = None
    """That of the wide aperture, where the set tells."""

    def read(self, long_side_px: int) -> tuple[Image.Image, Image.Image]:
        """Both, upright, scaled down to a long side. Raises ValueError for unequal sizes."""
        images = [read_photo(path).image for path in (self.sharp, self.blurred)]
        sizes = [f"{image.width} x {image.height}" for image in images]
        if images[0].size != images[1].size:
            raise ValueError(
                f"{self.sharp} has {sizes[0]} pixels and {self.blurred} {sizes[1]}: expected one size"
            )
        sharp, blurred = (within(image, long_side_px) for image in images)
        return sharp, blurred


def find_pairs(folder: Path) -> list[Pair]:
    """The pairs in a folder, by name. Pictures are not read yet.

    Raises ValueError for a folder of another layout, and for pictures without a partner.
    """
    if (folder / METADATA).is_dir():
        pairs = list(_told(folder))
    else:
        names = [names for names in FOLDERS if all((folder / name).is_dir() for name in names)]
        if not names:
            there = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
            raise ValueError(
                f"{folder} holds no set of pairs: expected the folders "
                f"{', '.join(map(' and '.join, FOLDERS))}, or {METADATA} (RealBokeh), found "
                f"{', '.join(there[:8]) or 'none'}; give the folder of one split"
            )
        pairs = _named(*(folder / name for name in names[0]))
    if not pairs:
        raise ValueError(f"{folder} holds folders for pairs, and no picture in them")
    return pairs


def _named(sharp: Path, blurred: Path) -> list[Pair]:
    """Pictures of both folders whose names are equal but for the suffix."""
    both = []
    for folder in (sharp, blurred):
        files = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in PICTURES]
        found = {path.stem: path for path in files}
        if len(found) < len(files):
            twice = next(path for path in files if found[path.stem] != path)
            raise ValueError(f"{folder} holds two pictures of the name {twice.stem}: expected one")
        both.append(found)
    alone = sorted(both[0].keys() ^ both[1].keys(), key=_order)
    if alone:
        lacking = blurred if alone[0] in both[0] else sharp
        raise ValueError(
            f"{len(alone)} pictures of {sharp.parent} have no partner: {lacking.name} lacks {alone[0]}; "
            "expected equal names"
        )
    names = sorted(both[0], key=_order)
    return [Pair(name=name, sharp=both[0][name], blurred=both[1][name]) for name in names]


def _order(name: str) -> tuple[int, str]:
    """2 before 10."""
    return (int(name) if name.isdecimal() else -1, name)


def _told(folder: Path) -> Iterator[Pair]:
    """RealBokeh: every scene's photograph with each of its wider apertures."""
    for file in sorted((folder / METADATA).glob("*.json"), key=lambda path: _order(path.stem)):
        try:
            scene = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"cannot read {file}: {error}") from error
        if not isinstance(scene, dict) or not isinstance(scene.get(SOURCE), str):
            raise ValueError(f"{file}: expected an object with {SOURCE}, {TARGETS} and {STOPS}")
        targets, stops = scene.get(TARGETS), scene.get(STOPS)
        if not isinstance(targets, list) or not isinstance(stops, list) or len(targets) != len(stops):
            raise ValueError(f"{file}: expected as many {TARGETS} as {STOPS}")
        for target, stop in zip(targets, stops, strict=True):
            paths = [folder / str(name) for name in (scene[SOURCE], target)]
            if lacking := [str(path) for path in paths if not path.is_file()]:
                raise ValueError(f"{file} names {lacking[0]}, which is not there")
            if not isinstance(stop, int | float):
                raise ValueError(f"{file}: expected numbers as {STOPS}, got {stop!r:.40}")
            yield Pair(name=paths[1].stem, sharp=paths[0], blurred=paths[1], f_number=float(stop))


@dataclass(frozen=True, kw_only=True)
class Score:
    """Means over the pairs, by one way."""

    way: str
    psnr: float
    ssim: float
    perceptual: Figures


def evaluate(
    pairs: Sequence[Pair],
    pipe: Pipeline | None,
    *,
    methods: Sequence[str] = (),
    levels: Sequence[float] = SEARCHED,
    long_side_px: int = 1024,
    prompt: str = "a photograph",
    perceptual: Perceptual | None = None,
) -> tuple[list[Score], Image.Image]:
    """The photograph left as it is, the pair's own map, and by each method a level for all and one a pair.

    The second has seen the blurred picture: it says how far a map of radii and our renderer can come. pipe:
    None where no method is asked for. Raises ValueError for files that cannot be used, and for levels.
    """
    found: dict[str, list[list[Figures]]] = {way: [] for way in (AS_IT_IS, OF_PAIR, *methods)}
    strips: list[Image.Image] = []
    for pair in pairs:
        sharp, blurred = pair.read(long_side_px)
        true = pixels(blurred)
        lens = LensMap.from_pictures(pixels(sharp), true, OWN_MAP)
        made = {AS_IT_IS: [sharp], OF_PAIR: [image(lens.render(pixels(sharp), OWN_MAP, highlights=None))]}
        for method in methods:
            assert pipe is not None
            asked = pipe.refocus(sharp, prompt, list(levels), method=method)
            made[method] = [one.resize(sharp.size, Image.Resampling.LANCZOS) for one in asked.images]
        for way, images in made.items():
            found[way].append([figures(pixels(one), true, perceptual) for one in images])
        if len(strips) < SHEET_ROWS:
            tiles = [Tile(image=sharp, label="photograph"), Tile(image=blurred, label="true", is_pivot=True)]
            for way, images in made.items():
                best = max(range(len(images)), key=lambda i: found[way][-1][i]["psnr"])
                at = f" {levels[best]:g}" if len(images) > 1 else ""
                tiles += [Tile(image=images[best], label=f"{way}{at}")] * (way != AS_IT_IS)
            strips.append(contact_sheet(tiles, pair.name, f"{len(pairs)} pairs"))
    scores = [score(way, [rows[0] for rows in found.pop(way)]) for way in (AS_IT_IS, OF_PAIR)]
    span = f"{min(levels):g} to {max(levels):g} in {len(levels)}"
    for way, rows in found.items():
        means = [np.mean([row[i]["psnr"] for row in rows]) for i in range(len(levels))]
        best = int(np.argmax(means))
        each = [max(row, key=lambda one: one["psnr"]) for row in rows]
        named = {
            f"{way}, level {levels[best]:g} for all, the best of {span}": [row[best] for row in rows],
            f"{way}, a level each, searched on the truth, {span}": each,
        }
        scores += [score(name, chosen) for name, chosen in named.items()]
    return scores, plot.joined(strips, "down")


def figures(shown: Tensor, true: Tensor, perceptual: Perceptual | None) -> Figures:
    """Compare two pictures [3, H, W]."""
    a, b = shown[None], true[None]
    found = {"psnr": float(psnr(a, b)), "ssim": float(ssim(a, b))}
    return found | dict(perceptual(a, b) if perceptual is not None else {})


def score(way: str, rows: Sequence[Figures]) -> Score:
    means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    return Score(way=way, psnr=means.pop("psnr"), ssim=means.pop("ssim"), perceptual=means)


def table(scores: Sequence[Score]) -> str:
    """Lines for the terminal."""
    wide = max(len(one.way) for one in scores)
    names = list(scores[0].perceptual)
    lines = ["  ".join([" " * wide, "  PSNR", "  SSIM", *(f"{name.upper():>6}" for name in names)])]
    for one in scores:
        cells = [f"{one.psnr:6.2f}", f"{one.ssim:6.3f}", *(f"{one.perceptual[name]:6.3f}" for name in names)]
        lines.append("  ".join([one.way.ljust(wide), *cells]))
    return "\n".join(lines)


def image(picture: Tensor) -> Image.Image:
    """[3, H, W] in 0 ... 1 -> RGB."""
    return Image.fromarray((picture.movedim(0, -1) * 255).round().byte().cpu().numpy())
