"""What the bundled model must show on captions kept out of its training, beside the renderer it learned from.

    python -m benchmarks.bench_nano [--captions 32] [--out benchmarks/results]

Prints one table of figures, targets and verdicts; writes it as JSON with the pictures that go with it.
`--captions 4` suits a CPU; with few captions the means are noisier, those of the base model above all.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import bokehflux
from benchmarks.timing import environment
from bokehflux.metrics import blur_matched_psnr, pearson, psnr, sharpness, spearman
from bokehflux.models.vae import to_uint8
from bokehflux.nano.captions import held_out
from bokehflux.nano.colors import dominant_color
from bokehflux.nano.scenes import SceneSpec, build_scenes, render, sample_specs
from bokehflux.pictures.sheet import Tile, contact_sheet
from bokehflux.pipeline.generate import Pipeline
from bokehflux.sampling.denoise import denoiser
from bokehflux.sampling.latents import LatentGrid, noise, pack, unpack
from bokehflux.sampling.samplers import euler
from bokehflux.sampling.schedule import sigmas
from bokehflux.weights.files.write import replacing, write_json

CURVE = tuple(torch.linspace(0, 30, 8).tolist())
"""Levels of a sharpness curve."""
MEASURED = (*CURVE, 28.0)
PIVOT = 15.0
SHEET = (0.0, 4.0, 8.0, 12.0, 18.0, 28.0)
LEVELS = (*MEASURED, *(level for level in SHEET if level not in MEASURED))
"""Every level that is generated; figures use the first ones, MEASURED, only."""
FIRST_SEED = 1000
UNSEEN_PER_CAPTION = 4
SHEET_CAPTIONS = 6
PLOTTED = {
    "renderer through VAE": "#1f6fb4",
    "grounded": "#d62728",
    "unbounded": "#2a9d3a",
    "base without adapter": "#888888",
}
"""Lines of the plot and their inks."""
SUBJECT_ROWS, SUBJECT_COLUMNS = (0.62, 0.78), (0.44, 0.56)
"""Shares of the picture's height and width that lie within nearly every subject."""

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
class Series:
    """Pictures of N captions at K levels from one source, as a viewer gets them."""

    images: Tensor
    """uint8 [N, K, H, W, 3] at MEASURED, or 8 seeds in place of CURVE; further ones are not measured."""
    pivots: Tensor
    """uint8 [N, H, W, 3]: what every picture of the caption must show the scene of."""

    def measure(self, figure: Callable[[Tensor], Tensor]) -> Tensor:
        """`figure` ([K, 3, H, W] in 0 ... 1 -> [K]) of the measured pictures of every caption: [N, K]."""
        return torch.stack([figure(floats(images[: len(MEASURED)])) for images in self.images])


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    figure: str
    of: str
    value: float

    @property
    def target(self) -> tuple[float, float | None] | None:
        return TARGETS.get((self.figure, self.of))

    @property
    def passed(self) -> bool | None:
        """None without a target; NaN fails."""
        if self.target is None:
            return None
        low, high = self.target
        return low <= self.value and (high is None or self.value <= high)

    def __str__(self) -> str:
        line = f"{self.figure:<44} {self.of:<30} {self.value:>8.3f}"
        if self.target is None:
            return line
        low, high = self.target
        wanted = f">= {low:g}" if high is None else f"{low:g} to {high:g}"
        return f"{line}  {wanted:<12} {'pass' if self.passed else 'FAIL'}"


def floats(images: Tensor) -> Tensor:
    """uint8 [..., H, W, 3] -> float [..., 3, H, W] in 0 ... 1."""
    return images.movedim(-1, -3).float() / 255


def rank_correlation(curves: Tensor) -> float:
    """Mean Spearman correlation of -sharpness [N, 8] with the level."""
    return float(spearman(-curves, torch.tensor(CURVE, device=curves.device).expand_as(curves)).mean())


def curve_match(curves: Tensor, reference: Tensor) -> float:
    """Mean Pearson correlation of sharpness curves [N, 8] with the mean of the curves `reference` [M, 8]."""
    return float(pearson(curves, reference.mean(0).expand_as(curves)).mean())


def fall(values: Tensor) -> Tensor:
    """Mean of [N, 9] at level 0 less its mean at level 28."""
    return (values[:, 0] - values[:, MEASURED.index(28.0)]).mean()


def scene_psnr(series: Series) -> float:
    """Mean PSNR in dB of every picture with its caption's pivot, both strongly blurred first."""
    pairs = zip(series.images[:, : len(MEASURED)], series.pivots, strict=True)
    values = [blur_matched_psnr(floats(shown), floats(pivot.expand_as(shown))) for shown, pivot in pairs]
    return float(torch.stack(values).mean())


def color_share(series: Series, colors: Tensor) -> float:
    """Share of the pictures whose subject has the colour that its caption names; colors [N] index COLORS."""
    return float((series.measure(dominant_color) == colors.to(series.images.device)[:, None]).float().mean())


def subject_sharpness(images: Tensor) -> Tensor:
    """Log standard deviation of the Laplacian within the subject: [B] of [B, 3, H, W]."""
    height, width = images.shape[-2:]
    rows, columns = (round(height * y) for y in SUBJECT_ROWS), (round(width * x) for x in SUBJECT_COLUMNS)
    return sharpness(images[:, :, slice(*rows), slice(*columns)]) / 2


def judge(series: Mapping[str, Series], colors: Tensor) -> list[Row]:
    """The table but for the autoencoder; needs every source named here. colors [N]: what was asked for."""
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
    return [
        Row(figure=figure, of=of, value=value) for figure, line in table.items() for of, value in line.items()
    ]


@torch.inference_mode()
def through_vae(pipe: Pipeline, images: Tensor) -> Tensor:
    """[B, 3, H, W] in 0 ... 1 -> uint8 [B, H, W, 3] after encoding and decoding."""
    parts = (images * 2 - 1).to(pipe.device, pipe.dtype).split(32)
    return torch.cat([to_uint8(pipe.vae.decode(pipe.vae.encode(part))) for part in parts])


def vae_rows(pipe: Pipeline, count: int, size_px: int) -> list[Row]:
    """How well the autoencoder returns `count` random renders that no training run drew."""
    generator = torch.Generator().manual_seed(90_001)
    scene = build_scenes(sample_specs(count, generator), size_px, generator, pipe.device)
    levels = torch.rand(count, generator=generator) * 30
    rows = []
    for of, drawn in (("random levels", levels), ("level 0", levels * 0), ("level 28", levels * 0 + 28)):
        pictures = render(scene, drawn.to(pipe.device))
        value = psnr(floats(through_vae(pipe, pictures)), floats(to_uint8(pictures * 2 - 1))).mean()
        rows.append(Row(figure=DECODED, of=of, value=float(value)))
    return rows


def rendered(spec: SceneSpec, size_px: int, seed: int, device: torch.device) -> Tensor:
    """float [N, K + 1, 3, H, W]: one scene of every caption at MEASURED, then at the pivot's level."""
    scene = build_scenes(spec, size_px, torch.Generator().manual_seed(seed), device)
    at = [render(scene, torch.full((len(spec),), level, device=device)) for level in (*MEASURED, PIVOT)]
    return torch.stack(at, dim=1)


def reference_series(pipe: Pipeline, spec: SceneSpec, size_px: int) -> dict[str, Series]:
    """The renderer's own pictures: as they are, through the autoencoder, against another scene's pivot."""
    scenes, others = (rendered(spec, size_px, seed, pipe.device) for seed in (90_002, 90_003))
    shown, other = (torch.stack([to_uint8(one * 2 - 1) for one in both]) for both in (scenes, others))
    decoded = torch.stack([through_vae(pipe, one) for one in scenes])
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
    velocity = denoiser(pipe.mmdit, pipe.text.encode([prompt]), grid, guidance=guidance)
    x = torch.cat([pack(noise(grid, seed, pipe.dtype)) for seed in seeds]).to(pipe.device)
    x = euler(velocity, x, sigmas(pipe.schedule, steps, grid.num_tokens))
    return to_uint8(pipe.vae.decode(unpack(x, grid)))


def sheet(series: Series, prompts: list[str], name: str) -> Image.Image:
    """The first captions at the levels of SHEET, one row each."""
    strips = []
    for i, prompt in enumerate(prompts[:SHEET_CAPTIONS]):
        pictures = [Image.fromarray(series.images[i, LEVELS.index(level)].cpu().numpy()) for level in SHEET]
        tiles = [Tile(image=image, label=f"{level:g}") for image, level in zip(pictures, SHEET, strict=True)]
        strips.append(contact_sheet(tiles, prompt, f"{name}, seed {FIRST_SEED + i}"))
    return Image.fromarray(np.concatenate([np.asarray(strip) for strip in strips]))


def plot(lines: Mapping[str, Tensor]) -> Image.Image:
    """Mean sharpness [8] over CURVE, one line for every source in PLOTTED."""
    left, top, width, height = 80, 40, 620, 400
    image = Image.new("RGB", (left + width + 40, top + height + 70), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(16)
    every = torch.stack(list(lines.values()))
    low, high = float(every.min()) - 0.1, float(every.max()) + 0.1

    def at(level: float, value: float) -> tuple[float, float]:
        return left + level / 30 * width, top + (high - value) / (high - low) * height

    draw.rectangle((left, top, left + width, top + height), outline="#888888")
    for level in range(0, 31, 5):
        draw.text((at(level, low)[0], top + height + 8), str(level), "black", font, anchor="mt")
    for value in range(int(-(-low // 1)), int(high // 1) + 1):
        draw.line([at(0, value), at(30, value)], "#dddddd")
        draw.text((left - 8, at(0, value)[1]), str(value), "black", font, anchor="rm")
    draw.text((left, 12), "sharpness: log variance of the Laplacian, mean over captions", "black", font)
    draw.text((left + width / 2, top + height + 36), "bokeh level", "black", font, anchor="mt")
    for k, (name, line) in enumerate(lines.items()):
        draw.line([at(*point) for point in zip(CURVE, line.tolist(), strict=True)], PLOTTED[name], 3)
        draw.text((left + width - 12, top + 10 + 22 * k), name, PLOTTED[name], font, anchor="rt")
    return image


def main() -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="bench_nano", description=__doc__, formatter_class=formatter)
    parser.add_argument("--model", default="nano", help="bundled model, or folder of a model with an adapter")
    parser.add_argument("--captions", type=int, default=32, help="how many of the 32")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--device", help="default: CUDA, MPS or CPU, what there is")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--check", action="store_true", help="exit with 1 when a target is missed")
    args = parser.parse_args()
    try:
        spec, prompts = held_out(args.captions)
        pipe = bokehflux.load(args.model, device=args.device)
    except ValueError as error:
        parser.error(str(error))
    args.out.mkdir(parents=True, exist_ok=True)
    start, size_px = time.perf_counter(), pipe.defaults.height_px
    generated = generated_series(pipe, prompts, args.steps, args.guidance)
    series = reference_series(pipe, spec, size_px) | generated
    rows = vae_rows(pipe, UNSEEN_PER_CAPTION * len(prompts), size_px) + judge(series, spec.color)
    seconds = time.perf_counter() - start
    print(*rows, sep="\n")
    device = torch.cuda.get_device_name(pipe.device) if pipe.device.type == "cuda" else pipe.device.type
    print(f"{len(prompts)} captions, {args.steps} steps: {seconds:.0f} s on {device}")
    lines = {of: one.measure(sharpness)[:, : len(CURVE)].mean(0).cpu() for of, one in series.items()}
    record = {
        "model": pipe.name,
        "device": device,
        "dtype": str(pipe.dtype),
        "torch": torch.__version__,
        "commit": environment(pipe.device)["commit"],
        "command": " ".join(["python -m benchmarks.bench_nano", *sys.argv[1:]]),
        "captions": len(prompts),
        "steps": args.steps,
        "guidance": args.guidance,
        "size_px": size_px,
        "seconds": round(seconds, 1),
        "rows": [asdict(row) | {"target": row.target, "passed": row.passed} for row in rows],
        "curves": {"level": CURVE} | {of: line.tolist() for of, line in lines.items()},
    }
    write_json(args.out / "nano.json", record)
    with replacing(args.out / "nano-curves.png") as temporary:
        plot({of: lines[of] for of in PLOTTED}).save(temporary, "PNG")
    for name in ("grounded", "unbounded"):
        with replacing(args.out / f"nano-{name}.jpg") as temporary:
            sheet(generated[name], prompts, name).save(temporary, "JPEG", quality=90)
    missed = [row for row in rows if row.passed is False]
    print(f"{len(missed)} target(s) missed; pictures and nano.json are in {args.out}")
    return 1 if args.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
