"""Pictures of a prompt: one per bokeh level, all from the same noise, in one batch; or a sharp one and a
strongly blurred one, of which a lens makes all others."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from bokehflux.models.adapter import BokehCondition
from bokehflux.pipeline.controls import with_controls, with_files
from bokehflux.pipeline.lens import Lens, with_hashes
from bokehflux.pipeline.model import Model
from bokehflux.pipeline.run import End, Plan, Stage, Start, check_levels
from bokehflux.sampling.denoise import Grounding
from bokehflux.sampling.latents import LatentGrid
from bokehflux.sampling.pivot_cache import PivotCache
from bokehflux.sampling.samplers import Velocity
from bokehflux.sampling.shortcuts import reused, without_pivot
from bokehflux.settings import PROBE_LEVEL, GenerateSettings


def plan_generate(model: Model, asked: GenerateSettings, pivot_cache: PivotCache | None = None) -> Plan:
    """The run that makes what was asked for.

    pivot_cache: an empty one keeps the pivot for later; a filled one stands in for it, so that a further
    level of the same scene costs one row. Raises ValueError for settings that the model cannot serve, and
    for a cache of another scene.
    """
    check_levels(
        asked,
        has_adapter=model.transformer.bokeh is not None,
        has_controls=model.controls is not None,
    )
    # Sizes that are not multiples of 16 are floored, and it says so.
    LatentGrid.floored(asked.height or model.defaults.height_px, asked.width or model.defaults.width_px)
    settings = with_hashes(with_files(model, asked.completed(model.defaults)))
    grounded, numbers = settings.makes_pivot, settings.numbers()
    if pivot_cache is not None and not grounded:
        raise ValueError("pivot_cache needs a grounded run: give bokeh_pivot and at least one grounded step")
    lens = None
    if settings.through_lens:
        if pivot_cache is not None:
            raise ValueError("a pivot_cache keeps no picture of the pivot, which a lens blurs: leave it out")
        lens = Lens((numbers.width_px, numbers.height_px), settings, shows_glow=True)
    scene = _scene(model, settings)
    kept = pivot_cache if pivot_cache is not None and pivot_cache.scene is not None else None
    if kept is not None:
        kept.check(scene)
    rows = _asked(model, settings, has_pivot=grounded and kept is None)
    grounding = None
    if grounded:
        grounding = Grounding(
            pivot_row=0 if kept is None else None,
            num_steps=numbers.grounded_steps,
            cache=pivot_cache,
        )

    leaves = settings.pivot_steps == "grounded"
    if leaves and pivot_cache is not None:
        raise ValueError("a pivot_cache keeps the whole pivot: leave out pivot_steps grounded")

    def begin(stage: Stage) -> Start:
        assert settings.seed is not None
        start = stage.noise(settings.seed)
        velocity: Velocity = stage.velocity(rows, grounding)
        if kept is not None:
            velocity = kept.replayed(velocity)
        if settings.reuse is not None:
            pivot = alone(stage) if kept is None else kept.velocity
            velocity = reused(velocity, pivot, settings.reuse, stage.sigmas, numbers.grounded_steps)
        if leaves and numbers.grounded_steps < numbers.steps:
            assert rows is not None
            targets = stage.velocity(rows.rows(slice(1, None)), None)
            velocity = without_pivot(velocity, targets, numbers.grounded_steps)
        if pivot_cache is not None and kept is None:
            velocity = pivot_cache.recorded(velocity)
        return Start(start.expand(settings.num_rows, -1, -1), velocity)

    def alone(stage: Stage) -> Velocity:
        """The pivot's velocity, without its targets."""
        assert rows is not None
        velocity = stage.velocity(rows.rows(slice(1)), grounding)
        return lambda x, sigma, step: velocity(x[:1], sigma, step)

    def end(x: Tensor, _: Tensor | None) -> End:
        if pivot_cache is not None:
            pivot_cache.finish(scene)
        return End(x[1:], x[0]) if grounded else End(x, None)

    return Plan(
        settings=settings,
        begin=begin,
        end=end,
        true_cfg=settings.true_cfg,
        negative_prompt=settings.negative_prompt,
        lens=lens,
    )


def _asked(model: Model, settings: GenerateSettings, has_pivot: bool) -> BokehCondition | None:
    """What rows are asked for, the pivot's first. None: the plain model."""
    if settings.bokeh_targets is None:
        return None
    pivot = [settings.bokeh_pivot] if has_pivot else []
    targets = [PROBE_LEVEL] if settings.through_lens else settings.bokeh_targets
    rows = BokehCondition.of([*pivot, *targets])
    return rows if settings.controls is None else with_controls(model, settings, rows, len(pivot))


def _scene(model: Model, settings: GenerateSettings) -> dict[str, object]:
    """Everything that a pivot depends on: it may be kept and used again under this."""
    source = model.source
    return {
        **dataclasses.replace(settings, reuse=None).marked("decides"),
        "model": source.model,
        "adapter": source.adapter,
        "loras": source.loras,
        "device": model.device.type,
        "dtype": str(model.dtype),
        "compute": model.compute,
    }
