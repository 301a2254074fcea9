"""How well a map of blur is found on real photographs: scikit-image's, blurred with a depth that is known.

    python scripts/probed.py [FOLDER]

The motorcycle comes with the disparity that a stereo pair measured; for the others a near subject before a
slope is drawn. Each is blurred at level 28 through its true map. From that picture and the photograph the
map is found again (`LensMap.from_pictures`), and the photograph is blurred through both at every level.
Needs `scikit-image`, of which only the pictures are read. probed.json and probed.jpg go into FOLDER.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from motorcycle import depth_of_motorcycle, pictures
from PIL import Image, ImageOps
from torch import Tensor

from bokehflux.focus import Slab
from bokehflux.metrics import pearson, psnr
from bokehflux.photos.read import within
from bokehflux.pictures.sheet import Tile, contact_sheet
from bokehflux.rendering import bokehme
from bokehflux.rendering.lens_map import LensMap
from bokehflux.rendering.photo import GAMMA

PHOTOS = ("motorcycle_left.png", "astronaut.png", "chelsea.png", "coffee.png")
LEVELS, PROBED = (8.0, 15.0, 28.0), 28.0
LONG_SIDE_PX, NEAREST_M, FARTHEST_M = 400, 1.0, 8.0
NOISE = 2 / 255
"""Standard deviation of the noise that a camera adds."""


def photographs() -> dict[str, tuple[Tensor, LensMap]]:
    """Name -> picture [3, H, W], and its map, focused on what is nearest. ValueError without scikit-image."""
    found = {}
    for name in PHOTOS:
        image = Image.open(pictures() / name).convert("RGB")
        if name.startswith("motorcycle"):
            depth = torch.from_numpy(depth_of_motorcycle())
            nearest, small = float(np.nanquantile(depth, 0.01)), within(image, LONG_SIDE_PX)
        else:
            small = ImageOps.fit(image, (LONG_SIDE_PX, LONG_SIDE_PX * 27 // 40), centering=(0.5, 0))
            depth, nearest = drawn_depth(small.height, small.width), NEAREST_M
        lens = LensMap.from_depth(depth, unify="range").focused_at(Slab(nearest / 2, nearest))
        pixels = torch.from_numpy(np.array(small)).movedim(-1, 0) / 255
        found[name.partition(".")[0]] = pixels, lens.resized(small.height, small.width)
    return found


def drawn_depth(height: int, width: int) -> Tensor:
    """Metres [H, W]: a round subject, a floor that leads away from it, a wall."""
    y, x = torch.arange(height)[:, None] / height, torch.arange(width) / height
    disparity = (y - 0.35).clamp(0, 0.5) * 2 * (1 / NEAREST_M - 1 / FARTHEST_M) + 1 / FARTHEST_M
    subject = ((x - width / height / 2) / 0.28) ** 2 + ((y - 0.6) / 0.4) ** 2 < 1
    return torch.where(subject, NEAREST_M, 1 / disparity.expand(-1, width))


def scattered(picture: Tensor, radius: Tensor) -> Tensor:
    """Blurred by another program's rule: BokehMe's scatter."""
    return bokehme.classical(picture[None], radius[None] / bokehme.PX_PER_UNIT, GAMMA)[0].clamp(0, 1)


def eight_bits(picture: Tensor) -> Tensor:
    return (picture * 255).round() / 255


def measured(
    picture: Tensor, true: LensMap, truths: Sequence[Tensor], shown: Tensor
) -> tuple[dict[str, float], LensMap]:
    """Errors of the map that `shown`, the picture at PROBED, leads to. truths: the picture at LEVELS."""
    lens = LensMap.from_pictures(picture, shown, PROBED)
    wanted, found = true.radius_px(PROBED), lens.radius_px(PROBED)
    row = {
        "largest radius, px": float(wanted.abs().max()),
        "error, px": float((wanted - found).abs().mean()),
        "correlation": float(pearson(wanted.flatten(), found.flatten())),
    }
    for level, truth in zip(LEVELS, truths, strict=True):
        pairs = {"as it is": picture, "refocused": lens.render(picture, level)}
        row |= {f"{what}, {level:g}, dB": float(psnr(one[None], truth[None])) for what, one in pairs.items()}
    return row, lens


def tile(picture: Tensor, label: str) -> Tile:
    pixels = (picture.expand(3, -1, -1).movedim(0, -1) * 255).round().byte().numpy()
    return Tile(image=within(Image.fromarray(pixels), 256), label=label)


def main() -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("outputs/probed"), metavar="FOLDER")
    args = parser.parse_args()
    try:
        photos = photographs()
    except ValueError as error:
        print(f"probed: error: {error}", file=sys.stderr)
        return 1
    print("columns: photograph, blurred by, largest radius in px, error in px, correlation;")
    print("then at levels 8, 15, 28 the photograph left as it is and refocused, in dB")
    draw, rows, tiles = torch.Generator().manual_seed(0), [], []
    for name, (picture, true) in photos.items():
        radius = true.radius_px(PROBED)
        truths = [eight_bits(true.render(picture, level)) for level in LEVELS]
        shown = truths[LEVELS.index(PROBED)]
        ways: dict[str, Callable[[], Tensor]] = {
            "layers": lambda shown=shown: shown,
            "with noise": lambda shown=shown: eight_bits(
                (shown + NOISE * torch.randn(shown.shape, generator=draw)).clamp(0, 1)
            ),
            "scatter": lambda picture=picture, radius=radius: eight_bits(scattered(picture, radius)),
        }
        maps = []
        for way, made in ways.items():
            row, lens = measured(picture, true, truths, made())
            rows.append({"photograph": name, "blurred by": way} | row)
            maps.append(-lens.radius_px(PROBED))
        for row in rows[-len(ways) :]:
            print(
                *(f"{value:>6.2f}" if isinstance(value, float) else f"{value:<16}" for value in row.values())
            )
        tiles += [
            tile(picture, name),
            tile(shown, f"level {PROBED:g}"),
            tile((radius / radius.min())[None], "true map"),
            tile((maps[0] / -radius.min()).clamp(0, 1)[None], "found"),
        ]
    args.folder.mkdir(parents=True, exist_ok=True)
    (args.folder / "probed.json").write_text(json.dumps(rows, indent=1))
    title = "Maps of blur found again in real photographs"
    footer = "Photographs: scikit-image; motorcycle: Middlebury Stereo 2014"
    contact_sheet(tiles, title, footer, columns=4).save(args.folder / "probed.jpg", quality=82, optimize=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
