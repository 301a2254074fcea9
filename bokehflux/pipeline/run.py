"""One way to run a plan: encode, begin, sample, decode. Whatever pictures begin with builds a `Plan`.

`generate.py` begins with noise, `refocus.py` with a photograph. Each stage stands on its own: text (`text`),
schedule, velocity and sampler (`sampling`), autoencoder (`models.vae`), colour transfer (`decode`, `color`).
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bokehflux.attention import ReferenceKeys
from bokehflux.kernels.attention import select
from bokehflux.models import tiling
from bokehflux.models.adapter import BokehCondition
from bokehflux.pictures import metadata
from bokehflux.pictures.credentials import Sign
from bokehflux.pictures.files import check_folder, save_pictures
from bokehflux.pictures.series import Scene
from bokehflux.pipeline.decode import decode_pictures, wants_tiling
from bokehflux.pipeline.lens import Lens, drawn
from bokehflux.pipeline.model import Model
from bokehflux.pipeline.provenance import provenance_of
from bokehflux.record import Provenance, Record
from bokehflux.rendering.lens_map import LensMap
from bokehflux.sampling.denoise import Denoiser, Grounding, denoiser
from bokehflux.sampling.diagnose import explain_nonfinite
from bokehflux.sampling.latents import LatentGrid, noise, pack
from bokehflux.sampling.ranks import ALONE, Ranks
from bokehflux.sampling.reference import read_reference, reference_rope
from bokehflux.sampling.samplers import OnStep, Velocity, euler
from bokehflux.sampling.schedule import sigmas
from bokehflux.settings import RefocusSettings, Settings

logger = logging.getLogger(__name__)
Made = TypeVar("Made")
Watermark = Callable[[Image.Image], Image.Image]
"""Given a picture, returns the one to be written."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a run is carried out. Nothing here changes a picture by more than rounding."""

    on_step: OnStep | None = None
    """Called with a `StepInfo` after every step; a pivot is in row 0 of its latents."""
    max_rows: int | None = None
    """Pictures that go through the network together; None means all. More rows cost no more work."""
    vae_tiling: bool | None = None
    """Decode in bands: less memory, the same picture up to rounding. None: where a picture is large for the
    memory mode, and where memory runs out."""
    backend: str = "auto"
    """Attention by name (`kernels.attention.select`)."""
    ranks: Ranks = ALONE
    """The processes that share the run: each of them executes the same plan with the same options. Where they
    share its rows, the pictures are byte for byte those of one process with the `max_rows` of the recipe."""
    on_picture: Callable[[int, int], None] | None = None
    """Called with (pictures made, all of them) before a lens makes each."""

    def __post_init__(self) -> None:
        Provenance(max_rows=self.max_rows, vae_tiling=self.vae_tiling)  # where they are recorded, and checked
        select.check_name(self.backend)
        for name in ("on_step", "on_picture"):
            if (call := getattr(self, name)) is not None and not callable(call):
                raise ValueError(f"{name} must be something to call, got {call!r:.80}")


class Start(NamedTuple):
    """Where the sampler begins, and the velocity it follows."""

    x: Tensor
    """[B, L, 64] packed latents at the first noise level."""
    velocity: Velocity


class End(NamedTuple):
    """What the sampler came to."""

    targets: Tensor
    """[N, L, 64]"""
    pivot: Tensor | None
    """[L, 64]"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Stage:
    """What is known when a plan begins: text is encoded, and the transformer is on its device."""

    velocity: Callable[[BokehCondition | None, Grounding | ReferenceKeys | None], Denoiser]
    """(what each row is asked for, what the rows look at) -> the network's velocity."""
    read: Callable[[float], ReferenceKeys]
    """(the photograph's level) -> the photograph as keys and values, by the model's reference adapter."""
    sigmas: Tensor
    """[steps + 1], falling from 1 to 0."""
    photo: Tensor | None
    """[1, L, 64] latents of the plan's photograph."""
    noise: Callable[[int], Tensor]
    """A seed -> the run's noise [1, L, 64]."""
    on_step: OnStep | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """A run before it runs. Plans hold no tensors of a run and can be executed again."""

    settings: Settings
    """Complete: nothing is left to a default."""
    begin: Callable[[Stage], Start]
    end: Callable[[Tensor, Tensor | None], End]
    """(the sampler's result [B, L, 64], the photograph's latents [1, L, 64]) -> targets and pivot."""
    true_cfg: float = 1.0
    """Above 1: each step has a second pass, which steers away from `negative_prompt`."""
    negative_prompt: str = ""
    photo: Image.Image | None = None
    """A photograph of the run's size that takes the pivot's place."""
    shown: Image.Image | None = None
    """The photograph at the size of the result's pictures; None: `photo`."""
    lens: Lens | None = None
    """It blurs the photograph, or the pivot, as the one target that is decoded shows; None: pictures are as
    decoded."""

    @property
    def grid(self) -> LatentGrid:
        """Its size."""
        numbers = self.settings.numbers()
        return LatentGrid(height_px=numbers.height_px, width_px=numbers.width_px)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run made."""

    images: list[Image.Image]
    """One RGB picture per target, in order; grounded ones colour-matched to the pivot. Fewer in `Stopped`."""
    pivot_image: Image.Image | None
    """The pivot, when the run was grounded; the photograph as it was used, when it began with one."""
    latents: Tensor
    """[N, L, 64] final packed latents of the targets; through a lens [1, L, 64], of the blurred picture that
    tells its map."""
    pivot_latents: Tensor | None
    """[L, 64], when there is a pivot."""
    record: Record
    """Every setting after defaults were filled in, and what made the pictures; `record.recipe()` is JSON."""
    lens_map: LensMap | None = None
    """Where, and how strongly, a lens blurred the pivot or photograph, where one did; with it you may render
    further pictures (`LensMap.render`)."""

    def scene(self) -> Scene:
        """The pictures with their levels, and how they are laid out."""
        photo = isinstance(self.record.settings, RefocusSettings)  # the map of a photograph stays here
        blur_map = None if photo or self.lens_map is None else drawn(self.lens_map)
        return Scene.of(self.record, self.images, self.pivot_image, blur_map)

    def sheet(self) -> Image.Image:
        """All pictures, labelled, on one contact sheet."""
        return self.scene().sheet().image

    def save(
        self,
        folder: str | Path,
        kind: str = "png",
        *,
        watermark: Watermark | None = None,
        sign: Sign | None = None,
    ) -> list[Path]:
        """Write the pictures, the pivot and the sheet; returns their paths, in this order.

        Every file holds its recipe and the mark that a model made it. Files that exist are kept: further
        ones get a number. kind: "png", "jpeg" or "webp". watermark: is given each picture and returns the one
        that is written. sign: `pictures.credentials.signer`, for a signature in each file.
        Raises ValueError for a folder that cannot be written to or a watermark that returns none, OSError for
        a full disk, which keeps the files that fit.
        """
        folder = Path(os.path.expanduser(folder))
        check_folder(folder)
        scene = self.scene()
        pictures = [*scene.pictures(), scene.sheet()]
        if watermark is not None:
            pictures = [dataclasses.replace(one, image=_marked(watermark, one.image)) for one in pictures]
        return save_pictures(pictures, folder, kind, sign)

    def _repr_png_(self) -> bytes:
        """What a notebook shows."""
        sheet = self.scene().sheet()
        return metadata.encode(sheet.image, sheet.recipe)


def _marked(watermark: Watermark, image: Image.Image) -> Image.Image:
    if not isinstance(marked := watermark(image), Image.Image):
        raise ValueError(f"watermark must return the picture to be written (a PIL Image), got {marked!r:.80}")
    return marked


class Stopped(KeyboardInterrupt):
    """Ctrl-C while pictures were being decoded: `result` holds those that are finished."""

    def __init__(self, result: Result) -> None:
        super().__init__()
        self.result = result


@torch.inference_mode()
def execute(model: Model, plan: Plan, options: Options = Options()) -> Result:
    """Run a plan.

    Raises MemoryError when the GPU is too small, `NonFiniteError`, with the step and the layer, when a
    network returns NaN or infinity, and `Stopped` for Ctrl-C when some pictures are finished.
    """
    settings, grid, ranks = plan.settings, plan.grid, options.ranks
    if options.backend == "triton":  # which would be found out after the text is encoded
        select.check_triton(model.device, model.dtype, model.transformer.config.head_dim)
    max_rows = ranks.rows_at_once(settings.num_rows, options.max_rows)
    tiled = wants_tiling(model.memory.mode, grid) if options.vae_tiling is None else options.vae_tiling
    with model.memory.phase("text"):
        length = settings.max_sequence_length
        conditioning = model.text.encode([settings.prompt], length)
        negative = model.text.encode([plan.negative_prompt], length) if plan.true_cfg > 1 else None
    photo = None
    if plan.photo is not None:
        with model.memory.phase("decode"):
            photo = _latents(model, plan.photo, tiled)
    with model.memory.phase("denoise"):
        schedule = sigmas(model.schedule, settings.numbers().steps, grid.num_tokens)

        def read(level: float) -> ReferenceKeys:
            assert photo is not None and model.reference is not None
            rope = reference_rope(model.transformer, grid, conditioning.txt.shape[1])
            guidance = torch.full((1,), settings.guidance_scale, device=model.device)
            of = BokehCondition.of([level])
            return read_reference(model.transformer, model.reference, photo, conditioning, of, rope, guidance)

        def velocity(bokeh: BokehCondition | None, beside: Grounding | ReferenceKeys | None) -> Denoiser:
            return denoiser(
                model.transformer,
                conditioning,
                grid,
                guidance=settings.guidance_scale,
                bokeh=bokeh,
                grounding=beside if isinstance(beside, Grounding) else None,
                reference=beside if isinstance(beside, ReferenceKeys) else None,
                true_cfg=plan.true_cfg,
                negative=negative,
                sigmas=schedule,
                max_rows=max_rows,
                ranks=ranks,
                backend=options.backend,
            )

        def drawn(seed: int) -> Tensor:
            return pack(noise(grid, seed, model.latents_dtype)).to(model.device)

        start, follow = plan.begin(
            Stage(
                velocity=velocity,
                read=read,
                sigmas=schedule,
                photo=photo,
                noise=drawn,
                on_step=options.on_step,
            )
        )
        x = euler(follow, start, schedule, options.on_step)
        check_finite(model, x, follow, lambda velocity: euler(velocity, start, schedule))
        del follow  # and with it the memory of its CUDA graphs
    end = plan.end(x, photo)
    with model.memory.phase("decode"):
        made = decode_pictures(model.vae, end.targets, end.pivot, grid, tiled=tiled, ranks=ranks)
    provenance = dataclasses.replace(
        provenance_of(model, options.backend), max_rows=max_rows, vae_tiling=made.tiled
    )
    images, stop, lens_map = made.images, made.stop, None
    if plan.lens is not None:  # what is decoded there is no picture of the result's
        sharp, blurred, images = plan.shown or made.pivot, images, []
        if stop is None and sharp is not None:
            lens_map = plan.lens.found(sharp, blurred[0], model.device)
            images, stop = _finished(plan.lens.pictures(sharp, lens_map), len(settings.shots), options)
    shown = settings.shows_pivot or not settings.makes_pivot
    result = Result(
        images=images,
        pivot_image=(plan.shown or plan.photo or made.pivot) if shown else None,
        latents=end.targets,
        pivot_latents=end.pivot if shown else None,
        record=Record(settings=settings, provenance=provenance),
        lens_map=lens_map,
    )
    if stop is not None:
        raise Stopped(result) from stop
    return result


def check_finite(model: Model, x: Tensor, velocity: Velocity, sample: Callable[[Velocity], object]) -> None:
    """Raise `NonFiniteError`, naming step and layer, unless x is finite; `sample` made it of `velocity`."""
    if not x.isfinite().all():
        raise explain_nonfinite(model.transformer, velocity, sample)


def check_levels(
    settings: Settings, *, has_adapter: bool, has_reference: bool = False, has_controls: bool = False
) -> None:
    """Raise ValueError for levels where the model has no adapter, and for what it was not trained for."""
    if settings.bokeh_targets is not None and not has_adapter:
        raise ValueError(
            "bokeh_targets need an adapter: load the model with adapter='path/to/BokehDiffusion'"
        )
    if getattr(settings, "looks", False) and not has_reference:
        raise ValueError(
            "method or probe reference needs a reference adapter, whose folder bokehflux.json of the model "
            "names; docs/refocus.md says how one is trained"
        )
    if getattr(settings, "controls", None) is not None and not has_controls:
        raise ValueError(
            "controls need a control adapter, whose folder bokehflux.json of the model names; "
            "docs/controls.md says how one is trained"
        )


def with_fewer_rows(run: Callable[[int | None], Made], rows: int, max_rows: int | None) -> Made:
    """Call run(max_rows); when memory runs out, halve the rows that go together and try again.

    rows: all that there are. Raises ValueError when not even a single one fits.
    """
    while True:
        try:
            return run(max_rows)
        except (torch.OutOfMemoryError, MemoryError) as error:
            if min(max_rows or rows, rows) <= 1:
                raise ValueError(f"even one picture at a time does not fit: {error}") from error
        gc.collect()  # what the attempt has left in cycles
        max_rows = max(1, min(max_rows or rows, rows) // 2)
        logger.warning("out of memory: trying again with %d pictures at a time", max_rows)


def _finished(
    pictures: Iterator[Image.Image], total: int, options: Options
) -> tuple[list[Image.Image], KeyboardInterrupt | None]:
    """All of them, and the Ctrl-C that left the last ones out. One before the first goes on up."""
    images: list[Image.Image] = []
    try:
        while len(images) < total:
            if options.on_picture is not None:
                options.on_picture(len(images), total)
            images.append(next(pictures))
    except KeyboardInterrupt as stop:
        if not images:
            raise
        return images, stop
    return images, None


def _latents(model: Model, picture: Image.Image, tiled: bool) -> Tensor:
    """[1, L, 64] of an RGB picture."""
    pixels = torch.from_numpy(np.array(picture)).to(model.device).movedim(-1, 0)[None]  # [1, 3, H, W]
    x = (pixels.float() / 127.5 - 1).to(model.dtype)
    made = model.vae.draw(*tiling.moments(model.vae, x)) if tiled else model.vae.encode(x)
    return pack(made.to(model.latents_dtype))
