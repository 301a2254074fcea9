"""Looks at a run from outside, at intervals: each is one call on its state, which gives figures to log.

They see the moving average of the weights, which is what is kept in the end.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, distributed

from bokehflux.attention import Plain
from bokehflux.conditioning import Conditioning
from bokehflux.lens import MAX_LEVEL
from bokehflux.metrics import blur_matched_psnr, lvcorr
from bokehflux.models.embeddings import RopeTable
from bokehflux.models.mmdit import MMDiT
from bokehflux.pipeline.pipeline import Pipeline
from bokehflux.sampling.latents import LatentGrid
from bokehflux.training.adapter import AdapterBatch, Scenes, row_losses
from bokehflux.training.batches import Draws
from bokehflux.training.distributed import rank_and_world
from bokehflux.training.guard import OnFull, with_room
from bokehflux.training.state import State
from bokehflux.weights.files.write import replacing

HELD_OUT, LVCORR, CONSISTENCY = "held-out", "LVCorr", "consistency [dB]"
"""Figures by which a best adapter can be kept."""

SIGMAS = tuple((i + 0.5) / 8 for i in range(8))
"""The noise levels of the held-out loss."""
SEED = 0
"""For the held-out noise, in every run: curves of two runs can be compared."""
BINS = (0.0, 10.0, 20.0, MAX_LEVEL)
"""Borders of the levels that are told apart."""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The loss on scenes that are not trained on: every picture at 8 noise levels, with noise of its own.

    Plain flow matching, guidance 1. Processes share the rows out.
    """

    every: int
    mmdit: MMDiT
    rope: RopeTable
    scenes: Scenes
    rows: int
    """At a time, on each process: as many as a step has, blocks then need not be compiled anew."""
    pictures: int = 64
    """At most so many, evenly spread."""
    backend: str = "auto"
    """The attention's."""
    _chosen: list[int] = field(init=False)

    def __post_init__(self) -> None:
        count = self.scenes.num_scenes * self.scenes.num_renders
        taken = min(count, self.pictures)
        object.__setattr__(self, "_chosen", [i * count // taken for i in range(taken)])

    def __call__(self, state: State) -> dict[str, float]:
        with state.ema.shown():
            return self.figures()

    def figures(self, *, told: bool = True) -> dict[str, float]:
        """Those of the weights as they are. told: whether the network knows the levels."""
        device = self.rope.cos.device
        rank, world = rank_and_world()
        sums = torch.zeros(2, len(BINS) - 1, dtype=torch.float64, device=device)  # losses, counts
        cases = list(itertools.product(range(len(self._chosen)), range(len(SIGMAS))))
        parts = [cases[i : i + self.rows] for i in range(0, len(cases), self.rows)]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            for part in parts[rank::world]:
                # A short part takes its last row several times over, and counts it once.
                batch = self._batch((part + part[-1:] * self.rows)[: self.rows], device)
                seen = batch if told else dataclasses.replace(batch, levels=batch.levels * math.nan)
                losses = row_losses(self.mmdit, seen, self.rope)[: len(part)].detach().double()
                where = torch.bucketize(
                    batch.levels[: len(part)], torch.tensor(BINS[1:-1], device=device), right=True
                )
                sums[0].index_add_(0, where, losses)
                sums[1].index_add_(0, where, torch.ones_like(losses))
        if world > 1:
            distributed.all_reduce(sums)
        losses, counts = sums.tolist()
        figures = {HELD_OUT: sum(losses) / sum(counts)}
        for (low, high), loss, count in zip(itertools.pairwise(BINS), losses, counts, strict=True):
            if count:
                figures[f"{HELD_OUT}, levels {low:g}-{high:g}"] = loss / count
        return figures

    def _batch(self, cases: Sequence[tuple[int, int]], device: torch.device) -> AdapterBatch:
        """Rows of (place among the chosen, noise level), in order."""
        first, last = cases[0][0], cases[-1][0]
        numbers = torch.tensor(self._chosen[first : last + 1])
        of = Draws(seed=SEED, samples=range(first, last + 1), batch=len(self._chosen), device=device)
        scene = (numbers // self.scenes.num_renders).to(self.scenes.device)
        render = (numbers % self.scenes.num_renders).to(self.scenes.device)
        row = torch.tensor([picture - first for picture, _ in cases], device=device)
        x0 = self.scenes.latents(scene, render).to(device)
        kept = torch.zeros(len(scene), dtype=torch.bool, device=self.scenes.device)
        text = self.scenes.text(scene, kept, of.on(self.scenes.device))
        levels = self.scenes.levels(scene, render).to(device)[row]
        return AdapterBatch(
            x0=x0[row],
            eps=of.normal("noise", *x0.shape[1:])[row],
            sigma=torch.tensor([SIGMAS[i] for _, i in cases], device=device),
            levels=levels,
            unguided_levels=levels,
            text=Conditioning(txt=text.txt[row], pooled=text.pooled[row]),
            guidance=torch.ones(len(cases), device=device),
            attention=Plain(backend=self.backend),
        )


@dataclass(frozen=True, kw_only=True)
class Best:
    """Keeps the weights whenever a figure is better than it ever was. Comes after the look that finds it."""

    every: int
    figure: str
    keep: Callable[[], None]
    """Writes the parameters as they are, on the first process."""
    lowest: bool = True
    """Whether less is better."""

    def __call__(self, state: State) -> dict[str, float]:
        found = [point[self.figure] for point in state.log.points if self.figure in point]
        better = operator.lt if self.lowest else operator.gt
        if math.isfinite(found[-1]) and all(better(found[-1], f) for f in found[:-1] if math.isfinite(f)):
            with state.ema.shown():
                self.keep()
        return {}


@dataclass(frozen=True, kw_only=True)
class Sheets:
    """Sweeps of some prompts over levels, in a folder, and how their blur follows the level.

    LVCorr is that of `metrics.lvcorr`, consistency the PSNR to the pivot after a strong blur; means over
    prompts, which processes share out. The adapter is as it will be loaded: in the base's dtype.
    """

    every: int
    pipe: Pipeline
    prompts: Sequence[str]
    folder: Path
    grid: LatentGrid
    levels: tuple[float, ...] = (0.0, 7.5, 15.0, 22.5, 30.0)
    pivot: float = 15.0
    steps: int | None = None
    """How many a sweep takes; None: the model's own."""
    on_full: OnFull = "wait"

    def __call__(self, state: State) -> dict[str, float]:
        rank, world = rank_and_world()
        found = torch.zeros(2, dtype=torch.float64, device=state.ema.average[0].device)
        with state.ema.shown(), _as_loaded(self.pipe.transformer):
            for i in range(rank, len(self.prompts), world):
                result = self.pipe.generate(
                    self.prompts[i],
                    self.levels,
                    bokeh_pivot=self.pivot,
                    num_inference_steps=self.steps,
                    height=self.grid.height_px,
                    width=self.grid.width_px,
                    seed=i,
                )
                assert result.pivot_image is not None
                images = torch.stack([_pixels(image) for image in result.images])
                pivot = _pixels(result.pivot_image).expand_as(images)
                found[0] += lvcorr(torch.tensor(self.levels), images)
                found[1] += blur_matched_psnr(images, pivot).mean()
                path = self.folder / f"{state.step:07d}-{i:02d}.jpg"
                with_room(functools.partial(_write, result.sheet(), path), f"the sheet {path}", self.on_full)
        if world > 1:
            distributed.all_reduce(found)
        return dict(zip((LVCORR, CONSISTENCY), (found / len(self.prompts)).tolist(), strict=True))


def _write(sheet: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        sheet.save(temporary, "jpeg", quality=90)


@contextlib.contextmanager
def _as_loaded(mmdit: MMDiT) -> Iterator[None]:
    """Inside, the adapter is a copy in the base's dtype, and nothing is compiled for pictures."""
    trained = mmdit.bokeh
    assert trained is not None
    eager = getattr(torch.compiler, "set_stance", None)  # since PyTorch 2.6
    mmdit.bokeh = copy.deepcopy(trained).to(mmdit.dtype).requires_grad_(False)
    try:
        with contextlib.nullcontext() if eager is None else eager("force_eager"):
            yield
    finally:
        mmdit.bokeh = trained


def _pixels(image: Image.Image) -> Tensor:
    """[3, H, W] in 0-1."""
    flat = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, 3).permute(2, 0, 1).float() / 255
