"""What each part of an adapter's training is for: short trainings of the bundled model, each without one.

All see the same scenes, rendered by nano's own renderer, which knows the blur of every point. Groups are
scenes at several levels; "photographs" are one picture a scene, and have a level in both meanings of the
number: the radius across the scene's depth, which is also what groups mean, and K in px m, which depends on
how far away the subject stood. Pictures are of captions kept out of all training.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import multiprocessing
import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor

import bokehflux
from bokehflux.evaluation.figures import floats
from bokehflux.fingerprint import fingerprint_of_bytes
from bokehflux.lens import MAX_LEVEL
from bokehflux.metrics import blur_matched_psnr, lvcorr, lvcorr_to, sharpness
from bokehflux.models.embeddings import rope_table
from bokehflux.nano.captions import caption, held_out
from bokehflux.nano.pool import LevelDraw, Shoot, mostly_sharp_levels, rendered, stratified_levels
from bokehflux.nano.scenes import build_scenes, render
from bokehflux.pipeline.pipeline import Pipeline
from bokehflux.sampling.latents import position_ids
from bokehflux.training.latents import INDEX, Entry, LatentFolder, write_entries
from bokehflux.training.log import Log
from bokehflux.training.looks import HELD_OUT, HeldOut
from bokehflux.training.recipes.adapter import AdapterRecipe
from bokehflux.training.recipes.named import NANO
from bokehflux.training.recipes.run import RECIPE, STATE, train_adapter

LEVELS = (0.0, 4.0, 8.0, 12.0, 18.0, 28.0)
PIVOT = 15.0
FIRST_SEED = 1000
NEAREST_M, FARTHEST_M = 0.5, 4.0
"""Where subjects of photographs stand, evenly in the logarithm."""
SINGLE_BLOCKS = 3
"""nano's first single-stream block."""

ARMS: dict[str, dict[str, Any]] = {
    "hybrid": {},
    "photographs only": {"grouped": 0.0},
    "groups only": {"photographs": None},
    "no grounding in training": {"swap_probability": 0.0},
    "swap probability 0.2": {"swap_probability": 0.2},
    "grounded in single blocks only": {"first_grounded_block": SINGLE_BLOCKS},
    "unify raw": {"unify": "raw"},
}
"""Arm -> in what its recipe differs from that of "hybrid"."""


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """Folders of latents that every arm shares."""

    groups: Path
    photographs: Path
    held_out: Path

    @classmethod
    def rendered(cls, home: Path, model: str, device: torch.device, scenes: int) -> Scenes:
        """Rendered into a folder, unless it has them."""
        found = cls(groups=home / "groups", photographs=home / "photographs", held_out=home / "held-out")
        wanted = (
            (found.groups, scenes, 5, stratified_levels(5), 11),
            (found.photographs, 2 * scenes, 1, mostly_sharp_levels, 12),
            (found.held_out, max(2, scenes // 16), 5, stratified_levels(5), 13),
        )
        if not all((folder / INDEX).is_file() for folder, *_ in wanted):
            pipe = bokehflux.load(model, device=device, dtype="float32")
            for folder, count, renders, draw, seed in wanted:
                write_entries(folder, entries(pipe, count, renders, draw, seed), shard_scenes=512)
        return found


@torch.no_grad()
def entries(pipe: Pipeline, count: int, renders: int, draw: LevelDraw, seed: int) -> list[Entry]:
    """Scenes of nano's world as latents with captions."""
    size_px = pipe.defaults.height_px
    shoot = Shoot(scenes=count, renders=renders, draw=draw, size_px=size_px, chunk=128)
    generator = torch.Generator(pipe.device).manual_seed(seed)
    found: list[Entry] = []
    together: list[tuple[Tensor, Tensor]] = []
    for spec, k, levels, images in rendered(shoot, generator):
        encoded = torch.cat([pipe.vae.encode(part * 2 - 1) for part in images.split(32)])
        together.append((levels.cpu(), encoded.half().cpu()))
        if k < renders - 1:
            continue
        x0, level = (torch.stack(of, dim=1) for of in zip(*((x, at) for at, x in together), strict=True))
        together = []
        subject_m = NEAREST_M * (FARTHEST_M / NEAREST_M) ** torch.rand(
            len(x0), generator=torch.Generator().manual_seed(seed + len(found))
        )
        # A radius across the depth from the subject to infinity is K over the subject's distance.
        raw = level if renders > 1 else (level * subject_m[:, None]).clamp(max=MAX_LEVEL)
        on_host, first = spec.to("cpu"), len(found)
        chance = random.Random(seed + first)
        for i in range(len(x0)):
            name = f"scene {first + i} of {seed}"
            found.append(
                Entry(
                    name=name,
                    key=fingerprint_of_bytes(f"{name} {renders} {count}".encode()),
                    captions=[caption(on_host, i, chance)],
                    levels={"raw": raw[i].tolist(), "range": level[i].tolist()},
                    make=x0[i].clone,
                )
            )
    return found


@dataclass(frozen=True, kw_only=True)
class Found:
    """What an adapter is worth."""

    arm: str
    seed: int
    lvcorr_reference: float
    """Correlation of its sharpness with the renderer's over levels."""
    lvcorr_level: float
    """Correlation of its blur with the level."""
    strength: float
    """Sharpness lost from level 0 to 28, over what the renderer loses: 1 is right."""
    scene_db: float
    """How near pictures are to their pivot, both strongly blurred first."""
    loss: float
    """Velocity error on held-out scenes at fixed noise and noise levels, told the true level."""
    loss_untold: float
    """The same without a level: what the level is worth to the loss."""
    seconds: float


def run_arm(
    arm: str, seed: int, scenes: Scenes, home: Path, model: str, device: torch.device, steps: int, batch: int,
    captions: int,
) -> Found:  # fmt: skip
    """Train one arm and judge it; what it made stays in a folder of `home`, and is not made again.

    Raises ValueError where an arm of other settings lies there.
    """
    torch.set_num_threads(1)
    recipe = dataclasses.replace(
        NANO, model=model, groups=str(scenes.groups), photographs=str(scenes.photographs), seed=seed,
        steps=steps, batch=batch, warmup_steps=min(50, steps - 1), save_every=100, log_every=10,
    )  # fmt: skip
    recipe = dataclasses.replace(recipe, **ARMS[arm])
    out = home / f"{arm.replace(' ', '-')}-{seed}"
    kept = Log(out / f"judged-by-{captions}.json")
    if (out / RECIPE).is_file() and AdapterRecipe.read(out / RECIPE) != recipe:
        raise ValueError(f"{out} has an arm of other settings: choose another folder, or move it away")
    if kept.path.is_file():
        return Found(**json.loads(kept.path.read_text())["notes"]["found"])
    # Its state goes when adapter and log are whole.
    if (begun := (out / STATE).is_file()) or not (out / "adapter").exists():
        train_adapter(recipe, out, device, resume=begun)
    seconds = json.loads((out / "log.json").read_text())["notes"]["seconds"]
    trained = functools.partial(bokehflux.load, model, adapter=out / "adapter", device=device)
    judged = judge(trained(), captions)
    told, untold = held_out_loss(trained(dtype="float32"), scenes.held_out)
    found = Found(arm=arm, seed=seed, **judged, loss=told, loss_untold=untold, seconds=seconds)
    kept.note("found", dataclasses.asdict(found))
    kept.write()
    return found


def judge(pipe: Pipeline, captions: int, steps: int = 12) -> dict[str, float]:
    """Grounded sweeps of the first held-out captions, beside renders of the same specs."""
    spec, prompts = held_out(captions)
    size_px = pipe.defaults.height_px
    truth = build_scenes(spec, size_px, torch.Generator().manual_seed(90_002), pipe.device)
    at = [render(truth, torch.full((captions,), level, device=pipe.device)) for level in LEVELS]
    levels, rows = torch.tensor(LEVELS), []
    for i, prompt in enumerate(prompts):
        result = pipe.generate(
            prompt, LEVELS, bokeh_pivot=PIVOT, num_inference_steps=steps, guidance_scale=3.0,
            seed=FIRST_SEED + i,
        )  # fmt: skip
        assert result.pivot_image is not None
        shown = [*result.images, result.pivot_image]
        made = floats(torch.from_numpy(np.stack([np.asarray(image) for image in shown])).to(pipe.device))
        images, reference = made[:-1], torch.stack([one[i] for one in at])
        lost, due = (float(sharpness(x[:1]) - sharpness(x[-1:])) for x in (images, reference))
        pivot = made[-1:].expand_as(images)
        rows.append(
            (
                float(lvcorr_to(reference, images)), float(lvcorr(levels, images)), lost / due,
                float(blur_matched_psnr(images, pivot).mean()),
            )
        )  # fmt: skip
    names = ("lvcorr_reference", "lvcorr_level", "strength", "scene_db")
    return {name: mean(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


@torch.no_grad()
def held_out_loss(pipe: Pipeline, folder: Path) -> tuple[float, float]:
    """The loss of `HeldOut` on all pictures: told the true levels, and told none."""
    mmdit, device = pipe.transformer, pipe.device
    scenes = LatentFolder(folder, pipe.text.encode)
    rope = rope_table(
        position_ids(scenes.grid, pipe.defaults.txt_length, device), mmdit.config.axes_dim, mmdit.config.theta
    )
    pictures = scenes.num_scenes * scenes.num_renders
    look = HeldOut(every=1, mmdit=mmdit, rope=rope, scenes=scenes, rows=80, pictures=pictures)
    told, untold = (look.figures(told=told)[HELD_OUT] for told in (True, False))
    return told, untold


def evaluate(
    home: Path, *, model: str = "nano", device: torch.device, scenes: int, steps: int, batch: int,
    captions: int, seeds: Sequence[int], arms: Sequence[str], processes: int,
) -> list[Found]:  # fmt: skip
    """Every arm with every seed, `processes` at a time, each in a process of its own."""
    shared = Scenes.rendered(home / "latents", model, device, scenes)
    jobs = [(arm, seed) for seed in seeds for arm in arms]
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        running = [
            pool.submit(run_arm, arm, seed, shared, home, model, device, steps, batch, captions)
            for arm, seed in jobs
        ]
        return [one.result() for one in running]


def table(found: Sequence[Found]) -> str:
    """Markdown: means over seeds, and how far seeds lie apart."""
    lines = [
        "| training | LVCorr ref. | LVCorr level | strength | scene dB | held-out loss | without a level |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in dict.fromkeys(one.arm for one in found):
        of_arm = [one for one in found if one.arm == arm]
        cells = [
            _cell([getattr(one, name) for one in of_arm], digits)
            for name, digits in (
                ("lvcorr_reference", 3), ("lvcorr_level", 3), ("strength", 2), ("scene_db", 1), ("loss", 4),
                ("loss_untold", 4),
            )
        ]  # fmt: skip
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: Sequence[float], digits: int) -> str:
    """0.912 ± 0.004: the mean, and half the distance of the farthest two."""
    middle = f"{mean(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ± {(max(values) - min(values)) / 2:.{digits}f}"
