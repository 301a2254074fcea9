"""Load a model, make pictures: the whole pipeline, stage by stage, in two functions.

`load` builds a `Pipeline`; `Pipeline.generate` walks through the stages, each of which stands on its own:
tokenise and encode (`text.encode`), noise and pack (`sampling.latents`), schedule (`sampling.schedule`),
velocity (`sampling.denoise`), sampler (`sampling.samplers`), unpack and decode (`models.vae`), colour
transfer (`decode`, `color`). To change one, call the others yourself; there is no other state.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from PIL import Image
from torch import Tensor

from bokehflux.configs import GROUNDED_SHARE, Defaults, ScheduleConfig
from bokehflux.lens import check_level
from bokehflux.models.adapter import BokehCondition
from bokehflux.models.fp8 import check_fp8, is_fp8
from bokehflux.models.mmdit import MMDiT
from bokehflux.models.vae import AutoencoderKL
from bokehflux.pipeline.decode import decode_pictures, wants_tiling
from bokehflux.pipeline.memory import (
    MODES,
    MemoryMode,
    Placement,
    advised,
    choose,
    footprint,
    free_memory,
    place,
)
from bokehflux.sampling.denoise import Grounding, denoiser
from bokehflux.sampling.diagnose import explain_nonfinite
from bokehflux.sampling.latents import LatentGrid, noise, pack
from bokehflux.sampling.pivot_cache import PivotCache
from bokehflux.sampling.samplers import OnStep, euler
from bokehflux.sampling.schedule import sigmas
from bokehflux.text.encode import TextEncoders
from bokehflux.version import __version__

if TYPE_CHECKING:
    from bokehflux.weights.find.resolve import ModelFiles
    from bokehflux.weights.find.snapshot import Snapshot

logger = logging.getLogger(__name__)

NEGATIVE_PROMPT = "bad quality, low resolution"
Compute = Literal["dtype", "fp8"]
"""What the transformer's blocks multiply in."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What `generate` made."""

    images: list[Image.Image]
    """One RGB picture per target, in order; grounded ones colour-matched to the pivot. Fewer in `Stopped`."""
    pivot_image: Image.Image | None
    """The pivot, when the run was grounded."""
    latents: Tensor
    """[N, L, 64] final packed latents of the targets."""
    pivot_latents: Tensor | None
    """[L, 64], when the run was grounded."""
    settings: dict[str, Any]
    """Every setting of the run after defaults were filled in; JSON-able."""


class Stopped(KeyboardInterrupt):
    """Ctrl-C while pictures were being decoded: `result` holds those that are finished."""

    def __init__(self, result: Result) -> None:
        super().__init__()
        self.result = result


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """The loaded networks and what the model's files say about running them. Built by `load`."""

    mmdit: MMDiT
    text: TextEncoders
    vae: AutoencoderKL
    schedule: ScheduleConfig
    defaults: Defaults
    name: str
    """Folder or bundled name the model came from."""
    memory: Placement = Placement()
    """Where the weights live while it runs."""
    adapter: str | None = None
    """As given to `load`; None where there was none, or the model brought its own."""
    loras: tuple[tuple[str, float], ...] = ()
    """File and strength of each, as given to `load`."""
    snapshot: Snapshot | None = None
    """The files it came from; None where it was not loaded from files."""

    @property
    def device(self) -> torch.device:
        """Where the work is done."""
        return self.memory.device or self.mmdit.device

    @property
    def dtype(self) -> torch.dtype:
        return self.mmdit.dtype

    @property
    def compute(self) -> Compute:
        return "fp8" if is_fp8(self.mmdit) else "dtype"

    @property
    def facts(self) -> dict[str, Any]:
        """Of every run's settings: which model it was, and how it was computed."""
        return {
            "model": self.name,
            "adapter": self.adapter,
            "loras": [list(lora) for lora in self.loras],
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "compute": self.compute,
            "version": __version__,
        }

    @torch.inference_mode()
    def generate(
        self,
        prompt: str,
        bokeh_targets: Sequence[float] | None = None,
        *,
        bokeh_pivot: float | None = None,
        num_inference_steps: int | None = None,
        num_grounding_steps: int | None = None,
        guidance_scale: float = 3.0,
        true_cfg: float = 1.0,
        negative_prompt: str = NEGATIVE_PROMPT,
        height: int | None = None,
        width: int | None = None,
        seed: int = 65578,
        on_step: OnStep | None = None,
        max_rows: int | None = None,
        vae_tiling: bool | None = None,
        pivot_cache: PivotCache | None = None,
    ) -> Result:
        """One picture of the prompt per bokeh level, all from the same noise, in one batch.

        bokeh_targets: levels 0 (all sharp) to 30; None makes one picture without the adapter (plain FLUX).
        bokeh_pivot: level of a further picture that anchors the scene; with it the first num_grounding_steps
            steps (default: 80 %) are grounded on it, and every target takes its mean Lab colour.
        num_inference_steps, height, width [pixels, floored to multiples of 16]: default to the model's own.
        guidance_scale: distilled guidance; true_cfg above 1 adds a pass with negative_prompt per step.
        seed: of the CPU generator; one seed, dtype and size give one picture. on_step: called with a
            `StepInfo` after every step; its latents have the pivot, if it is being made, in row 0.
        max_rows: pictures that go through the network together; None means all. More rows cost no more work.
        vae_tiling: decode in bands: less memory, the same picture up to rounding. None: where a picture is
            large for the memory mode, and where memory runs out.
        pivot_cache: an empty one keeps the pivot for later; a filled one stands in for it, so that a further
            level of the same scene costs one row.
        Raises ValueError for arguments that contradict each other or the model, MemoryError when the GPU is
        too small, `NonFiniteError`, with the step and the layer, when a network's output is no number, and
        `Stopped` for Ctrl-C when some pictures are finished.
        """
        num_steps = self.defaults.num_inference_steps if num_inference_steps is None else num_inference_steps
        targets = levels_of(bokeh_targets)
        num_grounded = self.check(prompt, targets, bokeh_pivot, num_steps, num_grounding_steps)
        if not true_cfg >= 1:
            raise ValueError(f"true_cfg must be 1 (off) or larger, got {true_cfg}")
        grid = LatentGrid.floored(
            self.defaults.height_px if height is None else height,
            self.defaults.width_px if width is None else width,
        )
        # Everything that a picture depends on, its level apart: a pivot may be kept and used again under it.
        scene = {
            "prompt": prompt,
            "bokeh_pivot": None if bokeh_pivot is None else float(bokeh_pivot),
            "num_inference_steps": num_steps,
            "num_grounding_steps": num_grounded,
            "guidance_scale": guidance_scale,
            "true_cfg": true_cfg,
            "negative_prompt": negative_prompt,
            "height": grid.height_px,
            "width": grid.width_px,
            "seed": seed,
            **self.facts,
        }
        grounded = num_grounded > 0
        if pivot_cache is not None and not grounded:
            raise ValueError(
                "pivot_cache needs a grounded run: give bokeh_pivot and at least one grounded step"
            )
        makes_pivot = grounded and (pivot_cache is None or pivot_cache.scene is None)
        if pivot_cache is not None and not makes_pivot:
            pivot_cache.check(scene)
        levels = None if targets is None else ([bokeh_pivot] if makes_pivot else []) + list(targets)

        grounding = Grounding(pivot_row=0 if makes_pivot else None, num_steps=num_grounded, cache=pivot_cache)
        with self.memory.phase("text"):
            conditioning = self.text.encode([prompt])
            negative = self.text.encode([negative_prompt]) if true_cfg > 1 else None
        with self.memory.phase("denoise"):
            steps = sigmas(self.schedule, num_steps, grid.num_tokens)
            velocity = denoiser(
                self.mmdit,
                conditioning,
                grid,
                guidance=guidance_scale,
                bokeh=None if levels is None else BokehCondition.of(levels),
                grounding=grounding if grounded else None,
                true_cfg=true_cfg,
                negative=negative,
                sigmas=steps,
                max_rows=max_rows,
                cuda_graphs=self.memory.mode == "resident",
            )
            start = pack(noise(grid, seed, self.dtype)).to(self.device)
            start = start.expand(1 if levels is None else len(levels), -1, -1)
            x = euler(velocity, start, steps, on_step)
            if not x.isfinite().all():
                raise explain_nonfinite(self.mmdit, velocity, start, steps)
            del velocity  # and with it the memory of its CUDA graphs
        pivot_latents = None
        if makes_pivot:
            pivot_latents, x = x[0], x[1:]
            if pivot_cache is not None:
                pivot_cache.finish(scene, pivot_latents)
        elif pivot_cache is not None:
            pivot_latents = pivot_cache.latents

        tiled = wants_tiling(self.memory.mode, grid) if vae_tiling is None else vae_tiling
        with self.memory.phase("decode"):
            made = decode_pictures(self.vae, x, pivot_latents, grid, tiled=tiled)
        how = {"memory": self.memory.mode, "max_rows": max_rows, "vae_tiling": made.tiled}
        result = Result(
            images=made.images,
            pivot_image=made.pivot,
            latents=x,
            pivot_latents=pivot_latents,
            settings={**scene, "bokeh_targets": targets, **how},
        )
        if made.stop is not None:
            raise Stopped(result) from made.stop
        return result

    def check(
        self,
        prompt: str,
        targets: list[float] | None,
        pivot: float | None,
        num_steps: int,
        num_grounded: int | None,
    ) -> int:
        """Raise ValueError for arguments that make no run; returns the number of grounded steps."""
        if not prompt.strip():
            raise ValueError("the prompt is empty")
        if pivot is not None:
            check_level(pivot)
        if targets is None and pivot is not None:
            raise ValueError("bokeh_pivot needs bokeh_targets: a pivot anchors pictures at other levels")
        if targets is not None and self.mmdit.bokeh is None:
            raise ValueError(
                "bokeh_targets need an adapter: load the model with adapter='path/to/BokehDiffusion'"
            )
        if type(num_steps) is not int or num_steps < 1:
            raise ValueError(f"num_inference_steps must be a whole number of at least 1, got {num_steps!r}")
        if num_grounded is None:
            return 0 if pivot is None else round(GROUNDED_SHARE * num_steps)
        if not 0 <= num_grounded <= num_steps:
            raise ValueError(
                f"num_grounding_steps must be between 0 and the {num_steps} steps, got {num_grounded}"
            )
        if num_grounded > 0 and pivot is None:
            raise ValueError(
                "num_grounding_steps needs bokeh_pivot: grounding anchors the targets on a pivot"
            )
        return num_grounded


def load(
    model: str | Path | ModelFiles = "nano",
    *,
    adapter: str | Path | None = None,
    loras: Sequence[tuple[str | Path, float]] = (),
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    compute: Compute = "dtype",
    memory: MemoryMode | Literal["auto"] = "auto",
    on_progress: Callable[[int, int], None] | None = None,
) -> Pipeline:
    """Load a model with its text encoders, autoencoder and, if given, a bokeh adapter and LoRAs.

    model: the name of a bundled model ("nano", which brings its adapter); a folder or file in any layout; a
        repository in the Hugging Face cache, such as "black-forest-labs/FLUX.1-dev"; or `ModelFiles`
        (`weights/find/resolve.py`), part by part. The pipeline's `name` is this as text.
    adapter: an adapter's folder, file or repository; None takes the model's own, if it has one.
    loras: (file, strength) of each, in any of the known key families; their effects add up.
    device: None takes CUDA, then MPS, then the CPU. dtype: "bfloat16", "float32" or "float16"; None takes
        bfloat16 on a GPU and float32 on a CPU.
    compute: "fp8" multiplies in e4m3 with rowwise scales in the transformer's blocks (`models/fp8.py`), which
        takes half the memory; it needs a GPU of compute capability 8.9 or higher (a CPU can, slowly, to try
        it out). "dtype": exactly in dtype.
    memory: "resident", "offload" or "stream" (`memory.py`); "auto" takes the first that fits in the GPU's
        free memory, and "resident" on other devices.
    on_progress: called with the bytes read so far and those of the whole model, first with 0.
    Raises ValueError (`CheckpointError` for files) with everything that is wrong in one message, and
    MemoryError with what would fit.
    """
    # The only place where the networks and the checkpoint code meet.
    from bokehflux.weights.load import load_components

    where = _device(device)
    kind = _dtype(dtype, where)
    if compute not in get_args(Compute):
        raise ValueError(f"unknown compute {compute!r}: expected one of {get_args(Compute)}")
    if compute == "fp8":
        check_fp8(where, kind)
        if where.type == "cpu":
            logger.warning("compute 'fp8' on a CPU is for trying it out: it is slower than the dtype")
    if memory not in (*MODES, "auto"):
        raise ValueError(f"unknown memory mode {memory!r}: expected 'auto' or one of {MODES}")
    resident = memory == "resident" or where.type != "cuda"
    if resident and memory not in ("resident", "auto"):
        raise ValueError(f"memory mode {memory!r} needs a CUDA device, got {where}")
    # What will not stay on the device is never put there.
    home = where if resident else torch.device("cpu")
    with advised("resident", where if resident else None):
        parts = load_components(
            model,
            adapter=adapter,
            loras=loras,
            device=home,
            dtype=kind,
            fp8_on=where if compute == "fp8" else None,
            on_progress=on_progress,
        )
    placement = Placement()
    if where.type == "cuda":
        networks = (parts.transformer, parts.text.networks, parts.vae)
        mode: MemoryMode = "resident"
        if not resident:
            mode = choose(footprint(*networks), free_memory(where)) if memory == "auto" else memory
        logger.info("memory mode %s", mode)
        with advised(mode, where, footprint(*networks)):
            placement = place(*networks, mode, where)
    return Pipeline(
        mmdit=parts.transformer,
        text=parts.text,
        vae=parts.vae,
        schedule=parts.snapshot.schedule,
        defaults=parts.snapshot.defaults,
        name=str(model),
        memory=placement,
        adapter=None if adapter is None else str(adapter),
        loras=tuple((str(path), float(strength)) for path, strength in loras),
        snapshot=parts.snapshot,
    )


def levels_of(targets: Sequence[float] | None) -> list[float] | None:
    """Targets as plain numbers. Raises ValueError for anything but one or more levels in 0-30."""
    if targets is None:
        return None
    try:
        levels = [float(level) for level in targets]
    except TypeError:
        raise ValueError(f"bokeh_targets must be a sequence of levels, got {targets!r}") from None
    if not levels:
        raise ValueError("bokeh_targets is empty: give at least one level, or None for plain FLUX")
    for level in levels:
        check_level(level)
    return levels


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"unknown device {device!r}: expected cpu, cuda, cuda:N or mps") from error
    if where.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"unknown device {device!r}: expected cpu, cuda, cuda:N or mps")
    if where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {device} is not there: this machine shows {torch.cuda.device_count()} CUDA device(s)"
        )
    if where.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device mps is not there: this PyTorch has no Metal support")
    return where


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    known = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if isinstance(dtype, torch.dtype) and dtype in known.values():
        return dtype
    if isinstance(dtype, str) and dtype in known:
        return known[dtype]
    raise ValueError(f"unknown dtype {dtype!r}: expected one of {sorted(known)}")
