"""How well a model refocuses photographs whose truth is known: renders of nano's unseen scenes.

The photograph is a render at one level; its refocused pictures are compared with renders of the same scene
at theirs. Beside them the photograph itself, left as it is: what no model at all would score; and the true
render through the model's autoencoder: what this one could score at most.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bokehflux.evaluation.figures import floats, pixels
from bokehflux.evaluation.renderer import through_vae
from bokehflux.metrics import psnr, sharpness
from bokehflux.models.vae import to_uint8
from bokehflux.nano.captions import held_out
from bokehflux.nano.scenes import build_scenes, render
from bokehflux.pictures import plot
from bokehflux.pictures.sheet import Tile, contact_sheet
from bokehflux.pipeline.pipeline import Pipeline
from bokehflux.rendering.photo import GAMMA

LEVELS = (0.0, 8.0, 15.0, 28.0)
SEED = 5
"""Decides what captions leave open, where no other seed is asked for."""
SHEET_ROWS = 3
LIGHT = 0.02
"""By so much, in display values, a place is brighter for a light that the photograph shows clipped."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Means over the photographs at one level, in dB."""

    level: float
    psnr: float
    """From the refocused picture to the true render."""
    photo: float
    """From the photograph, left as it is, to the true render."""
    decoded: float
    """From the true render, through the model's autoencoder, to the true render."""
    subject: float
    """As `psnr`, over the subject alone."""
    sharpness: float
    """Log variance of the Laplacian: of the refocused picture, less the true render's."""
    lights: float
    """What clipped lights add to the picture, as a share of what they add to the true render."""


def evaluate(
    pipe: Pipeline,
    *,
    captions: int = 8,
    photo_level: float = 0.0,
    method: str = "render",
    probe: str | None = None,
    steps: int | None = None,
    seed: int = SEED,
) -> tuple[list[Scores], Image.Image]:
    """Scores by level, and a sheet of the first photographs, each refocused and rendered.

    Method "render" only adds blur: levels below the photograph's are left out. steps: None: its own.
    """
    spec, prompts = held_out(captions)
    scene = build_scenes(spec, pipe.defaults.height_px, torch.Generator().manual_seed(seed), "cpu")
    levels = [level for level in LEVELS if method != "render" or level >= photo_level]
    truth = [render(scene, torch.full((captions,), level)) for level in levels]
    photos = render(scene, torch.full((captions,), photo_level))
    white = dataclasses.replace(scene, background=torch.minimum(scene.background, 1 / scene.exposure))
    dim = [render(white, torch.full((captions,), level)) for level in levels]
    pad = (scene.subject.shape[-1] - scene.size_px) // 2
    subject = F.pad(scene.subject[:, 3:], [-pad] * 4) > 0.5  # [B, 1, S, S]
    found, strips = [], []
    for i, prompt in enumerate(prompts):
        photo, true = picture(photos[i]), [renders[i : i + 1] for renders in truth]
        asked: dict[str, Any] = {"method": method, "probe": probe, "num_inference_steps": steps}
        result = pipe.refocus(photo, prompt, levels, photo_level=photo_level, **asked)
        made = result.images
        for image, expected, without in zip(made, true, dim, strict=True):
            shown, given = pixels(image)[None], pixels(photo)[None]
            decoded = floats(through_vae(pipe.vae, expected)).cpu()
            inside = subject[i].expand(3, -1, -1)
            parts = (shown[0][inside], expected[0][inside])
            found.append(
                [
                    *(psnr(each, expected) for each in (shown, given, decoded)),
                    psnr(parts[0].view(1, 3, 1, -1), parts[1].view(1, 3, 1, -1)),
                    sharpness(shown) - sharpness(expected),
                    *added(shown[0], expected[0], without[i]),
                ]
            )
        if i < SHEET_ROWS:
            for images, what in ((made, "refocused"), ([picture(one[0]) for one in true], "rendered")):
                tiles = [Tile(image=photo, label=f"photo {photo_level:g}", is_pivot=True)]
                tiles += [
                    Tile(image=image, label=f"bokeh {level:g}")
                    for level, image in zip(levels, images, strict=True)
                ]
                strips.append(contact_sheet(tiles, prompt, what))
    means = torch.tensor(found).view(captions, len(levels), 7).mean(0).tolist()
    scores = [
        Scores(
            level=level, psnr=shown, photo=given, decoded=decoded, subject=part, sharpness=sharp,
            lights=ours / true_light,
        )
        for level, (shown, given, decoded, part, sharp, ours, true_light) in zip(levels, means, strict=True)
    ]  # fmt: skip
    return scores, plot.joined(strips, "down")


def added(shown: Tensor, expected: Tensor, without: Tensor) -> tuple[float, float]:
    """Linear light that is in two pictures, and not in the one without bright lights, where the second has
    more; all [3, H, W] display values."""
    discs = expected - without > LIGHT
    less = without**GAMMA
    return tuple(float(((each**GAMMA - less) * discs).sum()) for each in (shown, expected))  # type: ignore[return-value]


def picture(pixels: Tensor) -> Image.Image:
    """[3, H, W] in 0-1 -> RGB."""
    return Image.fromarray(to_uint8(pixels[None] * 2 - 1)[0].numpy())
