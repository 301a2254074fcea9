"""Runs that people watch: progress, previews, fewer rows where memory runs out, and what Ctrl-C left."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from bokehflux.app.preview import Preview, fit_rgb_map
from bokehflux.app.processes import Team
from bokehflux.pipeline.generate import plan_generate
from bokehflux.pipeline.model import Model
from bokehflux.pipeline.progress import Progress
from bokehflux.pipeline.run import Options, Plan, Result, Stopped, execute, with_fewer_rows
from bokehflux.sampling.latents import LatentGrid
from bokehflux.sampling.samplers import StepInfo
from bokehflux.settings import GenerateSettings
from bokehflux.weights.find.resolve import BUNDLED
from bokehflux.weights.load import load_tiny_decoder

logger = logging.getLogger(__name__)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, carrying the message to print."""


@dataclass(frozen=True, kw_only=True)
class PreviewFile:
    """A picture that is written again and again while a run goes on."""

    path: Path
    every: int = 1
    """Steps between two writings."""
    tiny_vae: str | None = None
    """TAEF1's file or folder; None: a map of colours."""


class Watched:
    """Executes plans one after the other, and lets people see what is going on."""

    def __init__(
        self,
        model: Model,
        progress: Progress,
        options: Options,
        preview: PreviewFile | None = None,
        team: Team | None = None,
    ) -> None:
        self.model, self.progress, self.options, self.preview = model, progress, options, preview
        self.team = team
        self._to_rgb = None if preview is None else _to_rgb(model, preview)
        self._read: set[str] = set()

    def follow(self) -> None:
        """Execute what the first process of the team announces, with it, until it is done."""
        assert self.team is not None
        for settings in self.team.announced():
            assert isinstance(settings, GenerateSettings)
            execute(self.model, plan_generate(self.model, settings), self.options)

    def run(self, plan: Plan) -> Result:
        """As `pipeline.run.execute`, with fewer rows at a time where memory runs out.

        Raises `Interrupted` for Ctrl-C before a picture is finished, `Stopped` after.
        """
        settings = plan.settings
        if settings.prompt not in self._read:
            warn_of_words(self.model, settings.prompt)
            if not self._read:  # all plans of a command are of one size
                warn_of_size(self.model, plan.grid)
            self._read.add(settings.prompt)
        shown = self._preview(plan)
        latest: StepInfo | None = None
        try:
            with self.progress.watching(self.model, settings.num_rows, settings.num_prompts) as on_step:

                def watch(info: StepInfo) -> None:
                    nonlocal latest
                    latest = info
                    on_step(info)
                    if shown is not None:
                        shown(info)

                def attempt(max_rows: int | None) -> Result:
                    options = dataclasses.replace(
                        self.options, on_step=watch, on_picture=self.progress.blurring, max_rows=max_rows
                    )
                    return execute(self.model, plan, options)

                if self.options.ranks.size > 1 and self.team is not None:
                    self.team.announce(settings)  # and all try once: what one does, the others must do, too
                    result = attempt(self.options.max_rows)
                else:
                    result = with_fewer_rows(attempt, settings.num_rows, self.options.max_rows)
        except Stopped:
            raise
        except KeyboardInterrupt as stop:
            if latest is None:
                raise
            where = ""
            if shown is not None and self.preview is not None and shown.write():
                where = f", which {self.preview.path} shows"
            done = f"step {latest.step + 1} of {latest.num_steps} was done{where}"
            raise Interrupted(f"; no picture is finished, {done}") from stop
        # A run that ran out of memory need not do so in every scene.
        how = result.record.provenance
        self.options = dataclasses.replace(self.options, max_rows=how.max_rows, vae_tiling=how.vae_tiling)
        return result

    def _preview(self, plan: Plan) -> Preview | None:
        if self.preview is None or self._to_rgb is None:
            return None
        return Preview(self._to_rgb, plan.grid, self.preview.path, self.preview.every)


def warn_of_words(model: Model, prompt: str) -> None:
    """Name what a model of few words cannot read, such as nano, and what other programs read in prompts."""
    if found := re.search(r"<(?:lora|lyco):([^:>]*):?([^:>]*)[^>]*>", prompt):
        strength = f" {found[2]}" if found[2] else ""
        logger.warning("%s is read as words; a LoRA is loaded by --lora %s%s", found[0], found[1], strength)
    if found := re.search(r"\([^()]*:\s*[0-9.]+\)", prompt):
        logger.warning("%s is read as words: prompts have no weights here", found[0])
    if unknown := model.text.unknown_words(prompt):
        some = ", ".join(f"{word!r:.40}" for word in unknown[:8])
        more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
        said = "%s draws a few things, and does not know %s%s: expect a picture without them"
        logger.warning(said, model.name, some, more)


def warn_of_size(model: Model, grid: LatentGrid) -> None:
    """Say when a model of one size, such as nano, is asked for another."""
    own, asked = model.defaults, f"{grid.width_px} x {grid.height_px}"
    if model.name in BUNDLED and (grid.width_px, grid.height_px) != (own.width_px, own.height_px):
        said = "%s knows pictures of %d x %d only: expect less of %s"
        logger.warning(said, model.name, own.width_px, own.height_px, asked)


def _to_rgb(model: Model, preview: PreviewFile) -> Callable[[Tensor], Tensor]:
    if preview.tiny_vae is None:
        return fit_rgb_map(model.vae)
    channels = model.vae.config.latent_channels
    return load_tiny_decoder(preview.tiny_vae, channels, device=model.device, dtype=model.dtype)
