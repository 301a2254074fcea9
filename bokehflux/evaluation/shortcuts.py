"""What the shortcuts of a sweep save and change: their pictures beside the exact sweep's from the same noise.

Prompts are captions kept out of nano's training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bokehflux.evaluation.figures import floats
from bokehflux.metrics import blur_matched_psnr, lvcorr, psnr
from bokehflux.nano.captions import held_out
from bokehflux.pipeline.pipeline import Pipeline

LEVELS = (0.0, 4.0, 8.0, 12.0, 18.0, 28.0)
PIVOT = 15.0
FIRST_SEED = 1000
EXACT = "exact"


@dataclass(frozen=True, kw_only=True)
class Score:
    """One way, over all captions; changes are against the exact sweep."""

    way: str
    rows_saved: float
    """Share of the network's row evaluations."""
    psnr: float
    """From a target to the exact one, mean in dB."""
    worst: float
    """The least of them, in dB."""
    pivot: float
    """The least of the pivots' PSNR, in dB; 100 is equal."""
    lvcorr: float
    """Change of the mean correlation of blur with level."""
    scene: float
    """Change of how near targets are to their pivot, both strongly blurred first, in dB."""


def ways(pipe: Pipeline, steps: int) -> dict[str, dict[str, Any]]:
    """Settings by name, the exact sweep first; half of the steps are there to compare with."""
    return {
        EXACT: {},
        **{f"reuse {every}": {"reuse": every} for every in (2, 3, 4)},
        "half of the T5 tokens": {"max_sequence_length": pipe.defaults.txt_length // 2},
        "half of the steps": {"num_inference_steps": steps // 2},
    }


def evaluate(pipe: Pipeline, *, captions: int = 32, steps: int = 20) -> list[Score]:
    """A score a way, over the first captions (at most 32). Raises ValueError for more than there are."""
    _, prompts = held_out(captions)
    asked = ways(pipe, steps)
    found: dict[str, list[list[float]]] = {way: [] for way in asked}
    for i, prompt in enumerate(prompts):
        shown: dict[str, Tensor] = {}
        for way, settings in asked.items():
            options = {"bokeh_pivot": PIVOT, "num_inference_steps": steps, "seed": FIRST_SEED + i} | settings
            with counted(pipe) as rows:
                made = pipe.generate(prompt, LEVELS, **options)
            images = np.stack([np.asarray(image) for image in [*made.images, made.pivot_image]])
            shown[way] = floats(torch.from_numpy(images).to(pipe.device))  # [7, 3, H, W], the pivot last
            found[way].append([sum(rows), *figures(shown[way], shown[EXACT])])
    exact = np.array(found[EXACT]).mean(0)
    return [score(way, np.array(lines), exact) for way, lines in found.items() if way != EXACT]


def figures(shown: Tensor, exact: Tensor) -> tuple[float, ...]:
    """LVCorr, scene, and the PSNR of every picture, of [K + 1, 3, H, W] with the pivot last."""
    targets, pivot = shown[:-1], shown[-1:].expand_as(shown[:-1])
    return (
        float(lvcorr(torch.tensor(LEVELS), targets)),
        float(blur_matched_psnr(targets, pivot).mean()),
        *psnr(shown, exact).tolist(),
    )


def score(way: str, found: np.ndarray, exact: np.ndarray) -> Score:
    """found: a line a caption: rows, LVCorr, scene, PSNR [7]. exact: the mean of the exact sweep's lines."""
    rows, level, scene = found[:, :3].mean(0) - exact[:3]
    targets, pivots = found[:, 3:-1], found[:, -1]
    return Score(
        way=way,
        rows_saved=float(0 - rows / exact[0]),
        psnr=float(targets.mean()),
        worst=float(targets.min()),
        pivot=float(pivots.min()),
        lvcorr=float(level),
        scene=float(scene),
    )


@contextmanager
def counted(pipe: Pipeline) -> Iterator[list[int]]:
    """Filled inside: the rows of every evaluation of the network."""
    rows: list[int] = []
    hook = pipe.transformer.img_in.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    try:
        yield rows
    finally:
        hook.remove()


TARGETS: Mapping[str, Mapping[str, float]] = {"reuse 3": {"psnr": 40.0, "worst": 35.0}}
"""Way -> what it must reach at the least, in dB."""
MOST = {"lvcorr": 0.005, "scene": 0.3}
"""The largest change that these ways may make."""


def missed(scores: list[Score]) -> list[str]:
    """A line for every target that was missed."""
    lines = []
    for one in scores:
        if (least := TARGETS.get(one.way)) is not None:
            lines += [f"{one.way}: {name} {getattr(one, name):.1f} dB, wanted {value:g}"
                      for name, value in least.items() if not getattr(one, name) >= value]  # fmt: skip
            lines += [f"{one.way}: {name} changes by {getattr(one, name):.3f}, wanted at most {value:g}"
                      for name, value in MOST.items() if not abs(getattr(one, name)) <= value]  # fmt: skip
    return lines
