"""Draw the pictures in the documents with the bundled model, on a CPU:

    python scripts/make_pictures.py [sweep] [levels] [plain] [scenes] [shortcuts] [refocus] [lens] [pull]

Without a name, all eight: six minutes on two free cores. Prompts are captions kept out of nano's training, by
number, with the default seed. Sweeps that are finished in outputs/pictures are taken from there.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from bokehflux.app import cli
from bokehflux.models.vae import to_uint8
from bokehflux.nano.captions import held_out
from bokehflux.nano.scenes import build_scenes, render
from bokehflux.pictures.plot import joined
from bokehflux.pictures.sheet import Tile, contact_sheet

DOCS = Path(__file__).resolve().parents[1] / "docs"
WORK = Path("outputs/pictures")
LEVELS = (0, 4, 8, 12, 18, 28)
SWEPT = (4, 5, 3)
"""Captions of the sweep: city lights at night, string lights, a bookshelf."""
SCALE = 13
"""Caption of the scale of levels: string lights far away, and an object half way to them."""


def bokehflux(*words: str) -> list[Path]:
    """Run a command; the files that it names on its standard output."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = cli.main([*words, "--device", "cpu"])
    if code:
        raise SystemExit(code)
    return [Path(line) for line in printed.getvalue().splitlines() if Path(line).suffix]


def swept_sheet(prompt: str, *flags: str) -> Image.Image:
    (path,) = (
        path
        for path in bokehflux("sweep", "--prompt", prompt, "--output", str(WORK / "sweeps"), *flags)
        if path.name == "sheet.png"
    )
    return Image.open(path).convert("RGB")


def sweep(prompts: Sequence[str]) -> Image.Image:
    """What `bokehflux sweep` makes of three prompts: its sheets, below each other."""
    levels = [str(level) for level in LEVELS]
    sheets = [swept_sheet(prompts[i], "--bokeh-targets", *levels, "--bokeh-pivot", "15") for i in SWEPT]
    return joined(sheets, "down")


def levels(prompts: Sequence[str]) -> Image.Image:
    """One scene at the levels that a sweep has by default."""
    return swept_sheet(prompts[SCALE])


def shortcuts(prompts: Sequence[str]) -> Image.Image:
    """One scene exactly, and with reuse 2, 3 and 4."""
    flags = ["--bokeh-targets", "0", "8", "28", "--bokeh-pivot", "15"]
    ways = [[], *(["--reuse", str(every)] for every in (2, 3, 4))]
    return joined([swept_sheet(prompts[SWEPT[1]], *flags, *way) for way in ways], "down")


def plain(prompts: Sequence[str]) -> Image.Image:
    """The model without its adapter, and at level 0."""
    tiles = []
    for i in SWEPT:
        for label, flags in (("no level", ()), ("level 0", ("--bokeh-targets", "0"))):
            made = bokehflux("generate", "--prompt", prompts[i], "--output", str(WORK / "plain"), *flags)
            tiles.append(Tile(image=Image.open(made[0]), label=label))
    return contact_sheet(tiles, "The plain model, and level 0", "the same seed for all; no pivot")


def scenes(_: Sequence[str]) -> Image.Image:
    """What the renderer draws for the captions of the sweep: nano is trained on such pictures."""
    spec, tiles = held_out()[0], []
    for i in SWEPT:
        scene = build_scenes(spec.select(slice(i, i + 1)), 256, torch.Generator().manual_seed(1), "cpu")
        for level in LEVELS:
            pixels = to_uint8(2 * render(scene, torch.tensor([float(level)])) - 1)[0].numpy()
            tiles.append(Tile(image=Image.fromarray(pixels), label=f"level {level}"))
    title = "Renders of three captions, not the output of a model"
    return contact_sheet(tiles, title, f"held-out captions {SWEPT}", columns=len(LEVELS))


def refocused(prompts: Sequence[str], *flags: str) -> list[Path]:
    """A level-0 picture of the caption of `levels`, which stands for a photograph, refocused."""
    if not (photo := WORK / "photos" / "bokeh-00.0.png").is_file():
        bokehflux(
            "generate", "--prompt", prompts[SCALE], "--bokeh-targets", "0", "--output", str(photo.parent)
        )
    return bokehflux(
        "refocus", str(photo), "--prompt", prompts[SCALE], "--output", str(WORK / "refocus"), *flags
    )


def refocus(prompts: Sequence[str]) -> Image.Image:
    """A photograph at four levels."""
    return Image.open(refocused(prompts, "--bokeh-targets", "4", "10", "18", "28")[-1]).convert("RGB")


def lens(prompts: Sequence[str]) -> Image.Image:
    """The same photograph by other apertures, and with the far lights in focus."""
    asked = {
        "polygon:6": ["--aperture", "polygon:6"],
        "donut:0.5": ["--aperture", "donut:0.5"],
        "anamorphic:2": ["--aperture", "anamorphic:2"],
        "focus 30,60": ["--focus", "30,60"],
    }
    tiles = [
        Tile(image=Image.open(refocused(prompts, "--bokeh-targets", "28", *flags)[0]), label=label)
        for label, flags in asked.items()
    ]
    return contact_sheet(tiles, "One photograph at level 28", "nano")


def pull(prompts: Sequence[str]) -> Image.Image:
    """A generated scene through a lens: a focus pull at two levels."""
    flags = ["--bokeh-targets", "8", "28", "--focus", "near", "0.5", "far", "--aperture", "polygon:6"]
    return swept_sheet(prompts[SCALE], *flags)


PICTURES = {
    "sweep": sweep, "levels": levels, "plain": plain, "scenes": scenes, "shortcuts": shortcuts,
    "refocus": refocus, "lens": lens, "pull": pull,
}  # fmt: skip


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PICTURES)}; default: all")
    names = parser.parse_args().names
    if unknown := sorted(set(names) - set(PICTURES)):
        parser.error(f"expected names of {', '.join(PICTURES)}, got {', '.join(unknown)}")
    prompts = held_out()[1]
    for name in names or PICTURES:
        path = DOCS / f"{name}.jpg"
        PICTURES[name](prompts).save(path, quality=88, optimize=True)
        print(f"{path}: {path.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main()
