"""How well the bundled model refocuses photographs, where the truth is known: renders of unseen scenes.

    python -m benchmarks.bench_refocus [--captions 8] [--photo-level 0]

The photograph is a render at one level; its refocused pictures are compared with renders of the same scene
at theirs. Beside them the photograph itself, left as it is: what no model at all would score. Writes
refocus.json and a sheet.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import bokehflux
from benchmarks.report import RESULTS, table
from benchmarks.timing import environment
from bokehflux.metrics import blur_matched_psnr, psnr
from bokehflux.models.vae import to_uint8
from bokehflux.nano.captions import held_out
from bokehflux.nano.scenes import build_scenes, render
from bokehflux.pictures.sheet import Tile, contact_sheet
from bokehflux.pipeline.refocus import refocus
from bokehflux.weights.files.write import replacing, write_json

LEVELS = (0.0, 8.0, 15.0, 28.0)
SEED = 5
"""Of what the captions leave open."""
SHEET_ROWS = 3
COLUMNS = {"level": ".0f", "psnr": ".1f", "photo": ".1f", "scene": ".1f"}


def picture(pixels: Tensor) -> Image.Image:
    """[3, H, W] in 0-1 -> RGB."""
    return Image.fromarray(to_uint8(pixels[None] * 2 - 1)[0].numpy())


def pixels(image: Image.Image) -> Tensor:
    """RGB -> [1, 3, H, W] in 0-1."""
    return torch.from_numpy(np.array(image)).movedim(-1, 0)[None] / 255


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nano", help="bundled model, or folder of a model with an adapter")
    parser.add_argument("--captions", type=int, default=8, help="how many of the 32 kept out of training")
    parser.add_argument("--photo-level", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", help="default: CUDA, MPS or CPU, what there is")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    try:
        spec, prompts = held_out(args.captions)
        pipe = bokehflux.load(args.model, device=args.device)
    except ValueError as error:
        parser.error(str(error))
    scene = build_scenes(spec, pipe.defaults.height_px, torch.Generator().manual_seed(SEED), "cpu")
    truth = {level: render(scene, torch.full((len(prompts),), level)) for level in LEVELS}
    photos = render(scene, torch.full((len(prompts),), args.photo_level))
    begin, scores, rows = time.perf_counter(), [], []
    for i, prompt in enumerate(prompts):
        photo = picture(photos[i])
        made = refocus(
            pipe, photo, prompt, LEVELS, photo_level=args.photo_level, num_inference_steps=args.steps
        ).images
        for level, image in zip(LEVELS, made, strict=True):
            true, shown = truth[level][i : i + 1], pixels(image)
            scores.append(
                [
                    level,
                    float(psnr(shown, true)),
                    float(psnr(pixels(photo), true)),
                    float(blur_matched_psnr(shown, pixels(photo))),
                ]
            )
        if i < SHEET_ROWS:
            rows.append((prompt, photo, made, [picture(truth[level][i]) for level in LEVELS]))
    means = torch.tensor(scores).view(len(prompts), len(LEVELS), 4).mean(0).tolist()
    found = [dict(zip(COLUMNS, row, strict=True)) for row in means]
    print(f"{len(prompts)} photos; dB: to the true render, the photograph to it, scene to the photograph's")
    print(table(found, COLUMNS))
    args.out.mkdir(parents=True, exist_ok=True)
    record = {"environment": environment(pipe.device), "rows": found, "seconds": time.perf_counter() - begin}
    options = {"captions": len(prompts), "photo_level": args.photo_level, "steps": args.steps}
    write_json(args.out / "refocus.json", record | options)
    sheets = []
    for prompt, photo, made, true in rows:
        for images, what in ((made, "refocused"), (true, "rendered")):
            tiles = [Tile(image=photo, label=f"photo {args.photo_level:g}", is_pivot=True)]
            tiles += [
                Tile(image=image, label=f"bokeh {level:g}")
                for level, image in zip(LEVELS, images, strict=True)
            ]
            sheets.append(contact_sheet(tiles, prompt, what))
    whole = Image.new("RGB", (max(s.width for s in sheets), sum(s.height for s in sheets)))
    for i, sheet in enumerate(sheets):
        whole.paste(sheet, (0, sum(above.height for above in sheets[:i])))
    with replacing(args.out / "refocus.jpg") as temporary:
        whole.save(temporary, "JPEG", quality=88)
    return 0


if __name__ == "__main__":
    sys.exit(main())
