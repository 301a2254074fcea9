"""What a lens makes of one photograph whose depth is known: levels, apertures and planes of focus on a sheet.

    python scripts/photo.py [FOLDER] [--nano]

`make photo` runs it. The photograph is the motorcycle of scikit-image, with its measured depth, where that
package is installed; else, or with --nano, a scene of the bundled model's world, with its exact depth and the
mask of its subject. That scene has small lamps, which show the shape of an aperture best, so it always serves
for them. Every picture is made by `bokehflux render` and holds its settings.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import time
from pathlib import Path

import numpy as np
import torch
from motorcycle import write_photograph
from PIL import Image

from bokehflux.app import cli
from bokehflux.nano.scenes import build_scenes, render, sample_specs
from bokehflux.pictures.sheet import Tile, contact_sheet

LEVELS = ("0", "8", "15", "22", "30")
APERTURES = ("polygon:5", "polygon:6@30", "donut:0.5", "anamorphic:2", "cats-eye:0.7")
HIGHLIGHTS = "8"
LONG_SIDE = "400"
SEED, SIZE_PX = 16, 256
"""nano's scene: lamps behind a subject."""


def write_scene(folder: Path) -> Path:
    """scene.png, and scene.npz with depth in metres and mask, the subject 1 m away."""
    draw = torch.Generator().manual_seed(SEED)
    scene = build_scenes(sample_specs(1, draw), SIZE_PX, draw, "cpu")
    pad = (scene.background.shape[-1] - SIZE_PX) // 2
    gap = scene.background_gap.view(1, 1).expand(scene.background.shape[-2:])
    for layer, its_gap in (
        (scene.table, scene.table_gap * scene.table_depth[0].abs()),
        (scene.mid, scene.mid_gap),
        (scene.subject, torch.zeros(())),
    ):
        gap = torch.where(layer[0, 3] > 0.5, its_gap, gap)
    inner = slice(pad, pad + SIZE_PX)
    depth, mask = 1 / (1 - gap[inner, inner]), scene.subject[0, 3, inner, inner]
    pixels = (render(scene, torch.zeros(1))[0].permute(1, 2, 0) * 255).round().byte().numpy()
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(folder / "scene.png")
    np.savez_compressed(folder / "scene.npz", depth=depth.float().numpy(), mask=mask.numpy())
    return folder / "scene.npz"


def focuses(depth_m: np.ndarray) -> list[str]:
    """Near, in the middle, far; from near to the middle; on the plane through a low and two high points."""
    height, width = depth_m.shape
    ends = np.quantile(depth_m[np.isfinite(depth_m)], (0.05, 0.95))
    near, middle, far = (f"{d:.2f}m" for d in (ends[0], 2 / sum(1 / ends), ends[1]))
    x, y = width // 6, height // 6
    return [near, middle, far, f"{near}-{middle}", f"{width // 2},{5 * y}/{x},{y}/{5 * x},{y}"]


def rendered(photo: Path, depth: Path, folder: Path, *words: str) -> list[Image.Image]:
    """Pictures that `bokehflux render` makes, in order. Raises ValueError where it refuses."""
    argv = ["render", str(photo), "--depth", str(depth), "--long-side", LONG_SIDE, "--output", str(folder)]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        if cli.main([*argv, *words]):
            raise ValueError(f"bokehflux {' '.join(argv)} failed")
    paths = [line for line in printed.getvalue().splitlines() if "sheet" not in Path(line).name]
    return [Image.open(path).convert("RGB") for path in paths]


def sheet(photo: Path, depth: Path, folder: Path) -> Image.Image:
    """Three rows: levels, apertures on nano's scene, planes of focus."""
    with np.load(depth) as maps:
        planes = focuses(maps["depth"])
        mask = ["--mask", str(depth)] if "mask" in maps else []
    usual = [*mask, "--focus", "mask"] if mask else ["--focus", planes[0]]
    strong = ["--levels", LEVELS[-1], "--highlights", HIGHLIGHTS]
    tiles = [
        Tile(image=image, label=f"level {level}")
        for level, image in zip(
            LEVELS, rendered(photo, depth, folder, *usual, "--levels", *LEVELS), strict=True
        )
    ]
    lamps = write_scene(folder)
    behind = ["--mask", str(lamps), "--focus", "mask", *strong]
    for aperture in APERTURES:
        (image,) = rendered(
            lamps.with_suffix(".png"), lamps, folder / "apertures", *behind, "--aperture", aperture
        )
        width, height = tiles[0].image.size
        image = image.resize((width, width), Image.Resampling.BICUBIC).crop((0, 0, width, height))
        tiles.append(Tile(image=image, label=aperture))
    for i, plane in enumerate(planes):
        (image,) = rendered(photo, depth, folder / "focus", "--focus", plane, *strong)
        tiles.append(Tile(image=image, label="tilted" if i == len(planes) - 1 else plane))
    title = f"{photo.name} at levels and planes of focus; between them apertures on a drawn scene"
    foot = f"from the second row on level {LEVELS[-1]}, clipped lights x {HIGHLIGHTS}"
    return contact_sheet(tiles, title, foot, len(LEVELS))


def main() -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("outputs/photo"), metavar="FOLDER")
    parser.add_argument("--nano", action="store_true", help="the bundled model's scene")
    args = parser.parse_args()
    began = time.monotonic()
    try:
        if not args.nano:
            write_photograph(args.folder)
            photo, depth = args.folder / "motorcycle.jpg", args.folder / "labels/maps/motorcycle.jpg.npz"
            if not depth.is_file():  # labelled by scripts/motorcycle.py --picture, it has a mask as well
                depth = args.folder / "motorcycle.depth.npz"
    except ValueError as error:
        print(f"photo: {error}; a scene of the bundled model's stands in", file=sys.stderr)
        args.nano = True
    if args.nano:
        depth = write_scene(args.folder)
        photo = depth.with_suffix(".png")
    cli.main(["exif", str(photo)])
    path = args.folder / "all.jpg"
    sheet(photo, depth, args.folder).save(path, quality=82, optimize=True)
    print(f"{path}: {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
