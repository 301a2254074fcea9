"""`Pipeline`: a loaded model that makes pictures, in plain Python arguments. Built by `load`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from bokehflux.pipeline.generate import plan_generate
from bokehflux.pipeline.model import Model
from bokehflux.pipeline.progress import Progress
from bokehflux.pipeline.refocus import plan_refocus
from bokehflux.pipeline.run import Options, Plan, Result, execute
from bokehflux.sampling.pivot_cache import PivotCache
from bokehflux.sampling.samplers import OnStep, StepInfo
from bokehflux.settings import GenerateSettings, RefocusSettings


@dataclass(frozen=True, kw_only=True)
class Pipeline(Model):
    """The two ways to pictures. Each builds settings, a plan and options, and executes them."""

    def generate(
        self,
        prompt: str,
        bokeh_targets: Sequence[float] | None = None,
        *,
        on_step: OnStep | None = None,
        max_rows: int | None = None,
        vae_tiling: bool | None = None,
        backend: str = "auto",
        progress: bool = False,
        pivot_cache: PivotCache | None = None,
        **settings: Any,
    ) -> Result:
        """One picture of the prompt per bokeh level, all from the same noise, in one batch.

        bokeh_targets: levels 0 (all sharp) to 30; None makes one picture without the adapter (plain FLUX).
        settings: further fields of `settings.GenerateSettings`: bokeh_pivot (level of a further picture that
            anchors the scene), num_inference_steps, num_grounding_steps (default: 80 % of them),
            guidance_scale, true_cfg, negative_prompt, height and width in pixels, seed (None draws one),
            max_sequence_length (T5 tokens), reuse (steps between those in which targets are computed, less
            exact and faster), pivot_steps ("grounded" leaves the pivot out after
            them, and the result has no picture of it), and focus, aperture and highlights of a lens, which
            makes all pictures, one for each level and focus, from a sharp one. One seed, dtype and size give
            one picture.
        on_step, max_rows, vae_tiling, backend: `run.Options`. progress: draw a line on stderr that says how
            long it will take. pivot_cache: an empty one keeps the pivot for later; a filled one stands in for
            it, so that a further level of the same scene costs one row.
        Raises ValueError for settings that contradict each other or the model, before any network runs, and
        what `run.execute` raises.
        """
        asked = GenerateSettings(prompt=prompt, bokeh_targets=bokeh_targets, **settings)  # type: ignore[arg-type]
        options = Options(on_step=on_step, max_rows=max_rows, vae_tiling=vae_tiling, backend=backend)
        return self._run(plan_generate(self, asked, pivot_cache), options, progress)

    def refocus(
        self,
        photo: Image.Image,
        prompt: str,
        bokeh_targets: Sequence[float],
        *,
        photo_level: float = 0.0,
        on_step: OnStep | None = None,
        max_rows: int | None = None,
        vae_tiling: bool | None = None,
        backend: str = "auto",
        progress: bool = False,
        **settings: Any,
    ) -> Result:
        """The photograph at other levels, one picture each.

        prompt: what the photograph shows. photo_level: its own level; 0 for one that is sharp throughout.
        settings: further fields of `record.RefocusSettings`. method: "render" (default) blurs the photograph
            itself, focus and aperture as one likes; "inversion" has the model draw every level, and so has
            "reference", for models with a reference adapter, looking at the photograph. At
            guidance_scale 1, the default, the photograph is kept best; more pulls towards the prompt. height
            and width: by default the photograph's own for "render", and for the others its shape with about
            as many pixels as the model is made for.
        Other arguments, and errors, are those of `generate`. By inversion on_step is called for the way to
        noise, then for the way back. The result's pivot_image is the photograph as it was used.
        """
        asked = RefocusSettings(
            prompt=prompt,
            bokeh_targets=bokeh_targets,  # type: ignore[arg-type]
            bokeh_pivot=photo_level,
            **settings,
        )
        options = Options(on_step=on_step, max_rows=max_rows, vae_tiling=vae_tiling, backend=backend)
        return self._run(plan_refocus(self, photo, asked), options, progress)

    def _run(self, plan: Plan, options: Options, progress: bool) -> Result:
        if not progress:
            return execute(self, plan, options)
        rows, prompts, line = plan.settings.num_rows, plan.settings.num_prompts, Progress(sys.stderr)
        with line.watching(self, rows, prompts) as drawn:

            def on_step(info: StepInfo) -> None:
                drawn(info)
                if options.on_step is not None:
                    options.on_step(info)

            seen = dataclasses.replace(options, on_step=on_step, on_picture=line.blurring)
            return execute(self, plan, seen)
