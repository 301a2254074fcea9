"""What a control adapter must show on captions kept out of its training, beside nano's renderer.

Every figure is one of pictures alone, and the renderer's own pictures of another scene, through the model's
autoencoder, are judged by the same ones: what they score is as much as the figure can tell.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bokehflux.aperture import DISC, Anamorphic, Aperture, Donut, Polygon
from bokehflux.evaluation.figures import Figure, floats
from bokehflux.evaluation.renderer import OTHER_SEED, SEED, through_vae
from bokehflux.lens import unit_level
from bokehflux.metrics import (
    blur_matched_psnr,
    blur_radius,
    contrast,
    luma,
    lvcorr_to,
    psnr,
    sharpness,
    spearman,
)
from bokehflux.models.adapter import BokehCondition
from bokehflux.models.controls import FEATURES, Controls, shape_picture, token_features
from bokehflux.models.vae import to_uint8
from bokehflux.nano.captions import held_out
from bokehflux.nano.scenes import RADIUS_AT_30, Scene, build_scenes, gaps, render
from bokehflux.pictures import plot
from bokehflux.pictures.sheet import Tile, contact_sheet
from bokehflux.pipeline.pipeline import Pipeline
from bokehflux.rendering.photo import GAMMA
from bokehflux.sampling.denoise import Grounding, denoiser
from bokehflux.sampling.latents import LatentGrid, noise, pack, unpack
from bokehflux.sampling.samplers import euler
from bokehflux.sampling.schedule import sigmas

PIVOT, WEAK, STRONG = 15.0, 8.0, 28.0
LEVELS = (0.0, 4.0, WEAK, 12.0, 18.0, STRONG)
PLANES = (0.0, 0.25, 0.4, 0.95)
"""The subject's, two on the table behind it, the background's."""
SHAPES: tuple[Aperture, ...] = (
    DISC, Polygon(3), Polygon(4, rotation_deg=45), Donut(0.5), Anamorphic(2), Anamorphic(0.5)
)  # fmt: skip
NAMES = ("disc", "triangle", "square", "ring", "upright", "lying")
FIRST_SEED = 1000
BESIDE = (0.0, 0.22, 0.78, 1.0)
REGIONS = (
    (0.74, 0.92, (0.3, 0.7)), (0.75, 0.80, BESIDE), (0.69, 0.73, BESIDE), (0.0, 0.6, (0.0, 0.25, 0.75, 1.0))
)  # fmt: skip
"""Where, in nano's pictures, each of PLANES lies: rows from, to, and columns, as shares of the side."""
LIGHT_ROWS = 0.55
"""Lights are looked for above."""
MAX_LIGHTS = 16


class Shot(NamedTuple):
    """A picture that is asked for."""

    level: float
    focus: float | None = None
    aperture: Aperture | None = None
    circles: Tensor | None = None
    """[S, S] signed circles of confusion, 1 for the largest."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """Pictures of one caption from one source, each [K, 3, S, S] in 0 ... 1."""

    pivot: Tensor
    """[3, S, S]: level 15, nothing else asked."""
    planes: Tensor
    """[P, L, 3, S, S]: LEVELS on each of PLANES."""
    shapes: Tensor
    """STRONG through each of SHAPES."""
    plain: Tensor
    """[3, S, S]: STRONG, nothing else asked."""
    maps: Tensor
    """The level 0, WEAK and STRONG on three of PLANES, then WEAK to the left and STRONG to the right, all by
    maps."""
    gaps: Tensor
    """[S, S] of the scene whose maps they are."""


MAPPED = (0.0, 0.5, 0.95)
"""Planes that maps ask for."""
BY_MAP = ((0.0, 0.0), *((level, plane) for plane in MAPPED for level in (WEAK, STRONG)))
"""Level and plane of `Shown.maps`, but the last."""
PLANE_SHOTS = tuple(Shot(level, focus=plane) for plane in PLANES for level in LEVELS)
OTHER_SHOTS = (*(Shot(STRONG, focus=0.0, aperture=aperture) for aperture in SHAPES), Shot(STRONG))


def map_shots(behind: Tensor) -> list[Shot]:
    """What `Shown.maps` are asked for by. behind [S, S]: gaps."""
    shots = [Shot(level, circles=unit_level(level) * (behind - plane)) for level, plane in BY_MAP]
    half = torch.where(left_half(behind), unit_level(WEAK), unit_level(STRONG)) * behind
    return [*shots, Shot(STRONG, circles=half)]


def left_half(picture: Tensor) -> Tensor:
    """bool [S] of [..., S]"""
    side = picture.shape[-1]
    return torch.arange(side, device=picture.device) < side // 2


def evaluate(
    pipe: Pipeline, *, captions: int = 32, steps: int = 20, guidance: float = 3.0
) -> tuple[list[Figure], Image.Image]:
    """Figures, and a sheet of the first captions. Raises ValueError for a model without a control adapter."""
    if pipe.controls is None:
        raise ValueError(
            "this model has no control adapter, whose folder bokehflux.json names: "
            "docs/controls.md says how one is trained"
        )
    spec, prompts = held_out(captions)
    size_px = pipe.defaults.height_px
    scenes, others = (
        build_scenes(spec, size_px, torch.Generator().manual_seed(seed), pipe.device)
        for seed in (SEED, OTHER_SEED)
    )
    sources: dict[str, list[Shown]] = {"renderer through VAE": [], "model": []}
    references, strips = [], []
    for i, prompt in enumerate(prompts):
        one, other = slice(i, i + 1), scenes.select(slice(i, i + 1))
        planes = floats(through_vae(pipe.vae, drawn(other, PLANE_SHOTS)))
        references.append(planes.unflatten(0, (len(PLANES), len(LEVELS))))
        sources["renderer through VAE"].append(rendered(pipe, others.select(one)))
        sources["model"].append(generated(pipe, prompt, FIRST_SEED + i, gaps(other)[0], steps, guidance))
        if i < 6:
            strips.append(strip(sources["model"][-1], prompt))
        print(f"\r{i + 1} of {captions} captions", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    figures = [figure for of, shown in sources.items() for figure in judge(shown, references, of)]
    renderer, model = (torch.stack([subject_fall(one) for one in shown]) for shown in sources.values())
    share = float(model.mean() / renderer.mean())
    figures.append(Figure(figure=SUBJECT, of="model / renderer", value=share, target=(0.8, None)))
    return figures, plot.joined(strips, "down")


HIT = "asked plane the sharpest"
LVCORR = "LVCorr on plane"
SCENE = "scene stays, blur-matched PSNR [dB]"
SUBJECT = "subject's sharpness lost, background sharp"
HALVES = "half/half map off each half's dial"
RADII = "asked and measured radius, Spearman"
SHAPE = "aperture told from lights"
NONE = "focus 0 and a disc, to nothing asked [dB]"


def judge(shown: Sequence[Shown], references: Sequence[Tensor], of: str) -> list[Figure]:
    """The figures of one source. references: `Shown.planes` of the same captions, rendered."""
    targets = {
        HIT: (0.95, None), LVCORR: (0.95, None), SCENE: (37.0, None), HALVES: (0.0, 0.15),
        RADII: (0.95, None), SHAPE: (0.9, None),
    }  # fmt: skip

    def figure(name: str, value: Tensor | float, kind: str | None = None) -> Figure:
        target = targets.get(kind or name) if of == "model" else None
        return Figure(figure=name, of=of, value=float(value), target=target)

    def mean(measure: Callable[[Shown], Tensor]) -> Tensor:
        return torch.stack([measure(one).float().cpu() for one in shown]).nanmean(0)

    hits, shapes = mean(plane_hits), mean(shape_hits)
    pairs = list(zip(references, shown, strict=True))
    correlations = [
        torch.stack([lvcorr_to(rendering[p], one.planes[p]) for rendering, one in pairs]).mean()
        for p in range(len(PLANES))
    ]
    return [
        figure(HIT, hits.mean()),
        *(figure(f"{HIT}, {plane:g}", hit) for plane, hit in zip(PLANES, hits, strict=True)),
        *(
            figure(f"{LVCORR} {plane:g}", value, LVCORR)
            for plane, value in zip(PLANES, correlations, strict=True)
        ),
        figure(SCENE, mean(scene_kept)),
        figure(HALVES, mean(halves).mean()),
        figure(RADII, mean(radii)),
        figure(SHAPE, shapes.nanmean()),
        *(figure(f"{SHAPE}, {name}", share) for name, share in zip(NAMES, shapes, strict=True)),
        figure(NONE, mean(lambda one: psnr(one.planes[0, -1][None], one.plain[None])[0])),
    ]


def region(picture: Tensor, place: tuple[float, float, tuple[float, ...]]) -> Tensor:
    """bool [S, S]: one of REGIONS."""
    side = picture.shape[-1]
    first, last, columns = place
    inside = torch.zeros(side, side, dtype=torch.bool, device=picture.device)
    for start, stop in zip(columns[::2], columns[1::2], strict=True):
        inside[round(first * side) : round(last * side), round(start * side) : round(stop * side)] = True
    return inside


def plane_hits(shown: Shown) -> Tensor:
    """[P]: whether each plane's region is sharper where it is asked for than on the other planes."""
    strong = shown.planes[:, -1]
    best = [int(contrast(strong, region(strong, place)).argmax()) for place in REGIONS]
    return torch.tensor(best) == torch.arange(len(PLANES))


def subject_fall(shown: Shown) -> Tensor:
    """Log contrast that the subject loses where the background is sharp."""
    pictures = torch.stack([shown.planes[0, 0], shown.planes[-1, -1]])
    sharp, strong = contrast(pictures, region(shown.pivot, REGIONS[0]))
    return (sharp - strong).cpu()


def scene_kept(shown: Shown) -> Tensor:
    """Mean over planes and levels."""
    images = shown.planes.flatten(0, 1)
    return blur_matched_psnr(images, shown.pivot.expand_as(images)).mean()


def halves(shown: Shown) -> Tensor:
    """[2]: how far each half's sharpness is from its own dial's, as a share of the dial's range."""
    side = shown.maps.shape[-1]
    rows = slice(round(0.35 * side))
    parts = slice(0, round(0.46 * side)), slice(round(0.54 * side), side)
    off = []
    for part, dial in zip(parts, (1, 2), strict=True):
        s = sharpness(shown.maps[:, :, rows, part])
        off.append((s[-1] - s[dial]).abs() / (s[0] - s[2]).abs().clamp(min=1e-3))
    return torch.stack(off)


def radii(shown: Shown) -> Tensor:
    """Spearman of the radius that maps ask for in a region, and the one that is measured there."""
    behind = shown.gaps
    even = F.max_pool2d(behind[None], 9, 1, 4)[0] + F.max_pool2d(-behind[None], 9, 1, 4)[0] < 0.12
    asked, measured = [], []
    scale = RADIUS_AT_30 * behind.shape[-1] / 256
    for low, high in ((-0.05, 0.05), (0.15, 0.3), (0.3, 0.5), (0.8, 1.0)):
        inside = even & (behind > low) & (behind < high)
        if inside.sum() < 300 * (behind.shape[-1] / 256) ** 2:
            continue
        gap = behind[inside].mean()
        asked += [
            (gap - plane).abs() * unit_level(level) * scale for plane in MAPPED for level in (WEAK, STRONG)
        ]
        measured += list(blur_radius(shown.maps[1:-1], shown.maps[0], inside).nan_to_num(1.5 * scale))
    return spearman(torch.stack(asked).cpu(), torch.stack(measured).float().cpu())


def shape_hits(shown: Shown) -> Tensor:
    """[A]: whether each of SHAPES is told from the lights behind; NaN where there are none."""
    places = lights(shown.planes[0, 0])
    if not places:
        return torch.full((len(SHAPES),), math.nan)
    light = luma(shown.shapes.float()) ** GAMMA
    best = [int(scores(image, places).argmax()) for image in light]
    return (torch.tensor(best) == torch.arange(len(SHAPES))).float()


def lights(sharp: Tensor) -> list[tuple[int, int]]:
    """Rows and columns of the points of light of [3, S, S], the brightest first."""
    y = luma(sharp[None].float())
    side = y.shape[-1]
    reach = round(18 * side / 256)
    ring = [(round(6 * math.sin(i * math.pi / 8)), round(6 * math.cos(i * math.pi / 8))) for i in range(16)]
    around = torch.stack([y.roll(shift, (1, 2)) for shift in ring]).amax(0)
    peak = (y == F.max_pool2d(y, 9, 1, 4)) & (y > 0.7) & (y - around > 0.15)
    peak[:, round(LIGHT_ROWS * side) :] = False
    peak[:, :reach], peak[:, :, :reach], peak[:, :, side - reach :] = False, False, False
    order = (y - around)[peak].argsort(descending=True)[:MAX_LIGHTS]
    return [(int(row), int(column)) for row, column in peak[0].nonzero()[order.cpu()].tolist()]


def scores(light: Tensor, places: Sequence[tuple[int, int]]) -> Tensor:
    """[A]: correlation of the mean light [S, S] around points with each shape, at the best of three radii."""
    reach = round(18 * light.shape[-1] / 256)
    patches = torch.stack(
        [light[r - reach : r + reach + 1, c - reach : c + reach + 1] for r, c in places]
    )  # fmt: skip
    mean = (patches - patches.flatten(1).median(1).values[:, None, None]).median(0).values
    mean = mean - mean.mean()
    place = torch.arange(-reach, reach + 1, device=light.device).to(mean)
    found = []
    for aperture in SHAPES:
        best = -1.0
        for share in (0.85, 0.95, 1.05):
            rim = torch.tensor(share * unit_level(STRONG) * RADIUS_AT_30 * light.shape[-1] / 256).to(mean)
            kernel = aperture.spread(place, place[:, None], rim, 1 + 0.1 * rim)
            kernel = kernel - kernel.mean()
            best = max(best, float((mean * kernel).sum() / (mean.norm() * kernel.norm()).clamp(min=1e-9)))
        found.append(best)
    return torch.tensor(found)


def drawn(scene: Scene, shots: Sequence[Shot]) -> Tensor:
    """One scene as the renderer draws it, [K, 3, S, S]; no shot is asked for by circles."""
    pictures = []
    for shot in shots:
        level = torch.full((1,), shot.level, device=scene.background.device)
        focus = torch.full_like(level, shot.focus or 0.0)
        pictures.append(render(scene, level, focus, shot.aperture or DISC))
    return torch.cat(pictures)


def rendered(pipe: Pipeline, scene: Scene) -> Shown:
    """One scene, through the autoencoder."""
    maps = drawn(scene, [Shot(level, focus=plane) for level, plane in BY_MAP])
    half = torch.where(left_half(maps), maps[1], maps[2])  # WEAK and STRONG on the subject's plane
    pictures = torch.cat([drawn(scene, [Shot(PIVOT), *PLANE_SHOTS, *OTHER_SHOTS]), maps, half[None]])
    return _shown(floats(through_vae(pipe.vae, pictures)), gaps(scene)[0])


def generated(pipe: Pipeline, prompt: str, seed: int, behind: Tensor, steps: int, guidance: float) -> Shown:
    """Two grounded runs: on a pivot that nothing is asked of, and on one with the map `behind` [S, S]."""
    planes = _run(pipe, prompt, seed, [Shot(PIVOT), *PLANE_SHOTS, *OTHER_SHOTS], steps, guidance)
    pivot = Shot(PIVOT, circles=unit_level(PIVOT) * behind)
    maps = _run(pipe, prompt, seed, [pivot, *map_shots(behind)], steps, guidance)
    return _shown(torch.cat([planes, maps[1:]]), behind)


def _shown(pictures: Tensor, behind: Tensor) -> Shown:
    """From all of them, one after the other."""
    parts = pictures.split([1, len(PLANE_SHOTS), len(SHAPES), 1, len(BY_MAP) + 1])
    pivot, planes, shapes, plain, maps = parts
    planes = planes.unflatten(0, (len(PLANES), len(LEVELS)))
    return Shown(pivot=pivot[0], planes=planes, shapes=shapes, plain=plain[0], maps=maps, gaps=behind)


@torch.inference_mode()
def _run(
    pipe: Pipeline, prompt: str, seed: int, shots: Sequence[Shot], steps: int, guidance: float
) -> Tensor:
    """[K, 3, S, S] in 0 ... 1, grounded on the first."""
    grid = LatentGrid.floored(pipe.defaults.height_px, pipe.defaults.width_px)
    assert pipe.controls is not None
    none = torch.full((grid.num_tokens, FEATURES), torch.nan, device=pipe.device)
    asked = Controls(
        adapter=pipe.controls,
        focus=torch.tensor([math.nan if shot.focus is None else shot.focus for shot in shots]),
        shape=torch.stack([shape_picture(shot.aperture or DISC) for shot in shots]),
        features=torch.stack(
            [none if shot.circles is None else token_features(shot.circles[None])[0] for shot in shots]
        ),
    )
    levels = torch.tensor([shot.level for shot in shots])
    velocity = denoiser(
        pipe.transformer,
        pipe.text.encode([prompt]),
        grid,
        guidance=guidance,
        bokeh=BokehCondition(levels=levels, controls=asked),
        grounding=Grounding(pivot_row=0, num_steps=round(0.8 * steps)),
    )
    x = pack(noise(grid, seed, pipe.latents_dtype)).to(pipe.device).expand(len(shots), -1, -1)
    x = euler(velocity, x, sigmas(pipe.schedule, steps, grid.num_tokens))
    decoded = [pipe.vae.decode(part) for part in unpack(x, grid).to(pipe.dtype).split(16)]
    return floats(to_uint8(torch.cat(decoded)))


def strip(shown: Shown, prompt: str) -> Image.Image:
    """The first lines of a sheet: planes, shapes and maps."""

    def tile(picture: Tensor, label: str) -> Tile:
        return Tile(image=Image.fromarray(to_uint8(picture[None].cpu() * 2 - 1)[0].numpy()), label=label)

    planes = [tile(shown.planes[0, 0], "0")]
    planes += [tile(shown.planes[p, -1], f"28 at {plane:g}") for p, plane in enumerate(PLANES)]
    planes.append(tile(shown.maps[-1], "map 8 | 28"))
    shapes = [tile(picture, f"28, {name}") for picture, name in zip(shown.shapes, NAMES, strict=True)]
    return plot.joined([contact_sheet(planes, prompt, ""), contact_sheet(shapes, "", "")], "down")
