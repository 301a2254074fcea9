"""What nano must show on captions kept out of its training, beside the renderer that it learned from."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bokehflux.evaluation.figures import (
    CURVE,
    MEASURED,
    Figure,
    Series,
    curve_match,
    fall,
    floats,
    rank_correlation,
    scene_psnr,
)
from bokehflux.evaluation.renderer import SUBJECT_COLUMNS, SUBJECT_ROWS, through_vae
from bokehflux.lens import MAX_LEVEL
from bokehflux.metrics import psnr, sharpness
from bokehflux.models.vae import to_uint8
from bokehflux.nano.captions import held_out
from bokehflux.nano.colors import dominant_color
from bokehflux.nano.scenes import SceneSpec, build_scenes, render, sample_specs
from bokehflux.pictures import plot
from bokehflux.pictures.sheet import Tile, contact_sheet
from bokehflux.pipeline.pipeline import Pipeline
from bokehflux.sampling.denoise import denoiser
from bokehflux.sampling.latents import LatentGrid, noise, pack, unpack
from bokehflux.sampling.samplers import euler
from bokehflux.sampling.schedule import sigmas

PIVOT = 15.0
SHEET = (0.0, 4.0, 8.0, 12.0, 18.0, 28.0)
LEVELS = (*MEASURED, *(level for level in SHEET if level not in MEASURED))
"""Every level that is generated; the first ones are MEASURED."""
FIRST_SEED = 1000
UNSEEN_PER_CAPTION = 4
SHEET_CAPTIONS = 6
PLOTTED = ("renderer through VAE", "grounded", "unbounded", "base without adapter")

RANKS = "blur follows level, Spearman"
SHAPE = "sharpness curve as rendered, Pearson"
DROP = "sharpness lost 0 to 28 / renderer's via VAE"
SCENE = "scene stays, blur-matched PSNR [dB]"
COLOR = "subject's colour as asked"
FOCUS = "subject's log sharpness, 28 less 0"
DECODED = "VAE on unseen renders, PSNR [dB]"
TARGETS = {
    (DECODED, "random levels"): (31.0, None),
    (RANKS, "unbounded"): (0.97, None),
    (RANKS, "grounded"): (0.97, None),
    (RANKS, "base without adapter"): (-0.2, 0.2),
    (SHAPE, "unbounded"): (0.97, None),
    (SHAPE, "grounded"): (0.97, None),
    (SHAPE, "base without adapter"): (-0.2, 0.2),
    (DROP, "unbounded"): (0.80, None),
    (DROP, "grounded"): (0.80, None),
    (SCENE, "grounded"): (37.0, None),
    (SCENE, "grounded less unbounded"): (2.0, None),
    (COLOR, "grounded"): (0.88, None),
    (COLOR, "base without adapter"): (0.88, None),
}
"""(figure, source) -> least and most; other lines of the table are there to compare with."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was found, and the pictures that it was found on."""

    figures: list[Figure]
    series: dict[str, Series]
    prompts: list[str]

    def curves(self) -> dict[str, list[float]]:
        """Mean sharpness over the captions at the levels of CURVE, by source."""
        return {
            of: one.measure(sharpness)[:, : len(CURVE)].mean(0).tolist() for of, one in self.series.items()
        }


def evaluate(pipe: Pipeline, *, captions: int = 32, steps: int = 20, guidance: float = 3.0) -> Report:
    """Generate pictures of the first captions (at most 32), render the same scenes, and judge.

    Raises ValueError for more captions than there are.
    """
    spec, prompts = held_out(captions)
    size_px = pipe.defaults.height_px
    generated = generated_series(pipe, prompts, steps, guidance)
    series = reference_series(pipe, spec, size_px) | generated
    figures = vae_figures(pipe, UNSEEN_PER_CAPTION * len(prompts), size_px) + judge(series, spec.color)
    return Report(figures=figures, series=series, prompts=prompts)


def color_share(series: Series, colors: Tensor) -> float:
    """Share of the pictures whose subject has the colour that its caption names; colors [N] index COLORS."""
    return float((series.measure(dominant_color) == colors.to(series.images.device)[:, None]).float().mean())


def subject_sharpness(images: Tensor) -> Tensor:
    """Log standard deviation of the Laplacian within the subject: [B] of [B, 3, H, W]."""
    height, width = images.shape[-2:]
    rows, columns = (round(height * y) for y in SUBJECT_ROWS), (round(width * x) for x in SUBJECT_COLUMNS)
    return sharpness(images[:, :, slice(*rows), slice(*columns)]) / 2


def judge(series: Mapping[str, Series], colors: Tensor) -> list[Figure]:
    """Every figure but those of the autoencoder; needs every source named here.

    colors [N]: the subjects' colours that were asked for.
    """
    sharp = {of: one.measure(sharpness) for of, one in series.items()}
    curves = {of: values[:, : len(CURVE)] for of, values in sharp.items()}
    decoded = "renderer through VAE"
    generated = ("unbounded", "grounded")
    five = ("renderer", decoded, *generated, "base without adapter")
    scene = {of: scene_psnr(series[of]) for of in ("renderer", "renderer, another scene", *generated)}
    scene["grounded less unbounded"] = scene["grounded"] - scene["unbounded"]
    table = {
        RANKS: {of: rank_correlation(curves[of]) for of in five},
        SHAPE: {of: curve_match(curves[of], curves[decoded]) for of in five},
        DROP: {of: float(fall(sharp[of]) / fall(sharp[decoded])) for of in ("renderer", *generated)},
        SCENE: scene,
        COLOR: {of: color_share(series[of], colors) for of in five},
        FOCUS: {of: -float(fall(series[of].measure(subject_sharpness))) for of in (decoded, *generated)},
    }
    return [figure(name, of, value) for name, line in table.items() for of, value in line.items()]


def figure(name: str, of: str, value: float) -> Figure:
    return Figure(figure=name, of=of, value=value, target=TARGETS.get((name, of)))


def vae_figures(pipe: Pipeline, count: int, size_px: int) -> list[Figure]:
    """How well the autoencoder returns `count` random renders that no training run drew."""
    generator = torch.Generator().manual_seed(90_001)
    scene = build_scenes(sample_specs(count, generator), size_px, generator, pipe.device)
    levels = torch.rand(count, generator=generator) * MAX_LEVEL
    found = []
    for of, drawn in (("random levels", levels), ("level 0", levels * 0), ("level 28", levels * 0 + 28)):
        pictures = render(scene, drawn.to(pipe.device))
        value = psnr(floats(through_vae(pipe.vae, pictures)), floats(to_uint8(pictures * 2 - 1))).mean()
        found.append(figure(DECODED, of, float(value)))
    return found


def rendered(spec: SceneSpec, size_px: int, seed: int, device: torch.device) -> Tensor:
    """float [N, K + 1, 3, H, W]: one scene of every caption at MEASURED, then at the pivot's level."""
    scene = build_scenes(spec, size_px, torch.Generator().manual_seed(seed), device)
    at = [render(scene, torch.full((len(spec),), level, device=device)) for level in (*MEASURED, PIVOT)]
    return torch.stack(at, dim=1)


def reference_series(pipe: Pipeline, spec: SceneSpec, size_px: int) -> dict[str, Series]:
    """The renderer's own pictures: as they are, through the autoencoder, against another scene's pivot."""
    scenes, others = (rendered(spec, size_px, seed, pipe.device) for seed in (90_002, 90_003))
    shown, other = (torch.stack([to_uint8(one * 2 - 1) for one in both]) for both in (scenes, others))
    decoded = torch.stack([through_vae(pipe.vae, one) for one in scenes])
    return {
        "renderer": Series(images=shown, pivots=shown[:, -1]),
        "renderer through VAE": Series(images=decoded, pivots=decoded[:, -1]),
        "renderer, another scene": Series(images=other, pivots=shown[:, -1]),
    }


def generated_series(pipe: Pipeline, prompts: list[str], steps: int, guidance: float) -> dict[str, Series]:
    """Grounded and unbounded from the same noise, one seed a caption, and the base model from 8 seeds."""

    def shown(prompt: str, seed: int, levels: tuple[float, ...], pivot: float | None) -> Tensor:
        result = pipe.generate(
            prompt, levels, bokeh_pivot=pivot, num_inference_steps=steps, guidance_scale=guidance, seed=seed
        )
        images = result.images if result.pivot_image is None else [*result.images, result.pivot_image]
        return torch.from_numpy(np.stack([np.asarray(image) for image in images])).to(pipe.device)

    pictures: dict[str, list[Tensor]] = {"unbounded": [], "grounded": [], "base without adapter": []}
    for i, prompt in enumerate(prompts):
        seed = FIRST_SEED + i
        pictures["unbounded"].append(shown(prompt, seed, (*LEVELS, PIVOT), None))
        pictures["grounded"].append(shown(prompt, seed, LEVELS, PIVOT))
        seeds = [seed + 100 * k for k in range(len(CURVE))]
        pictures["base without adapter"].append(base_images(pipe, prompt, seeds, steps, guidance))
        print(f"\r{i + 1} of {len(prompts)} captions", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    stacks = {of: torch.stack(images) for of, images in pictures.items()}
    return {of: Series(images=images, pivots=images[:, -1]) for of, images in stacks.items()}


@torch.inference_mode()
def base_images(pipe: Pipeline, prompt: str, seeds: list[int], steps: int, guidance: float) -> Tensor:
    """uint8 [B, H, W, 3] without the adapter: `Pipeline.generate` for many seeds in one batch."""
    grid = LatentGrid.floored(pipe.defaults.height_px, pipe.defaults.width_px)
    velocity = denoiser(pipe.transformer, pipe.text.encode([prompt]), grid, guidance=guidance)
    x = torch.cat([pack(noise(grid, seed, pipe.dtype)) for seed in seeds]).to(pipe.device)
    x = euler(velocity, x, sigmas(pipe.schedule, steps, grid.num_tokens))
    return to_uint8(pipe.vae.decode(unpack(x, grid)))


def sheet(report: Report, source: str) -> Image.Image:
    """The first captions at the levels of SHEET, one row each."""
    strips = []
    for i, prompt in enumerate(report.prompts[:SHEET_CAPTIONS]):
        images = report.series[source].images[i].cpu().numpy()
        tiles = [
            Tile(image=Image.fromarray(images[LEVELS.index(level)]), label=f"{level:g}") for level in SHEET
        ]
        strips.append(contact_sheet(tiles, prompt, f"{source}, seed {FIRST_SEED + i}"))
    return plot.joined(strips, "down")


def curve_plot(curves: Mapping[str, list[float]]) -> Image.Image:
    """curves: as `Report.curves` gives them."""
    return plot.lines(
        {of: list(zip(CURVE, curves[of], strict=True)) for of in PLOTTED},
        title="sharpness: log variance of the Laplacian, mean over captions",
        x="bokeh level",
    )
