"""Serving the requests of a command, with what people see meanwhile: progress, previews, what Ctrl-C left."""

from __future__ import annotations

import argparse
import logging
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from bokehflux.app.preview import Preview, fit_rgb_map
from bokehflux.app.progress import Progress
from bokehflux.pipeline.generate import Pipeline, Result, Stopped
from bokehflux.record import Request
from bokehflux.sampling.samplers import StepInfo
from bokehflux.weights.load import load_tiny_decoder

logger = logging.getLogger(__name__)

TILING = {"auto": None, "on": True, "off": False}
"""--vae-tiling, as `Pipeline.generate` takes it."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with what is to be said about it."""


def server(args: argparse.Namespace, pipe: Pipeline, progress: Progress) -> Callable[[Request], Result]:
    """Serves requests with everything that people watch meanwhile."""
    preview_of = _previews(args, pipe)
    max_rows, vae_tiling = args.max_rows, TILING[args.vae_tiling]
    read: set[str] = set()

    def serve(request: Request) -> Result:
        nonlocal max_rows, vae_tiling
        if request.prompt not in read:
            read.add(request.prompt)
            warn_of_words(pipe, request.prompt)
        grounded = request.bokeh_pivot is not None and request.num_grounding_steps != 0
        rows, prompts = len(request.bokeh_targets or (0,)) + grounded, 1 + (request.true_cfg > 1)
        preview = preview_of(request)
        latest: StepInfo | None = None
        try:
            with progress.watching(pipe, rows, prompts) as on_step:

                def watch(info: StepInfo) -> None:
                    nonlocal latest
                    latest = info
                    on_step(info)
                    if preview is not None:
                        preview(info)

                result = request.run(pipe, watch, max_rows, vae_tiling)
            # What ran out of memory once need not do so in every scene.
            max_rows, vae_tiling = (result.settings[name] for name in ("max_rows", "vae_tiling"))
            return result
        except Stopped:
            raise
        except KeyboardInterrupt as stop:
            if latest is None:
                raise
            shown = f", which {args.preview} shows" if preview is not None and preview.write() else ""
            done = f"step {latest.step + 1} of {latest.num_steps} was done{shown}"
            raise Interrupted(f"; no picture is finished, {done}") from stop

    return serve


def warn_of_words(pipe: Pipeline, prompt: str) -> None:
    """Name what a model of few words cannot read, such as nano."""
    if unknown := pipe.text.unknown_words(prompt):
        some = ", ".join(f"{word!r:.40}" for word in unknown[:8])
        more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
        logger.warning("%s does not know %s%s: expect a picture without them", pipe.name, some, more)


def _previews(args: argparse.Namespace, pipe: Pipeline) -> Callable[[Request], Preview | None]:
    """Makes the preview of each request, if one is wanted."""
    if args.preview is None:
        return lambda _: None
    if args.preview_vae is not None:
        to_rgb: Callable[[Tensor], Tensor] = load_tiny_decoder(
            args.preview_vae, pipe.vae.config.latent_channels, device=pipe.device, dtype=pipe.dtype
        )
    else:
        to_rgb = fit_rgb_map(pipe.vae)
    return lambda request: Preview(
        to_rgb, request.completed(pipe.defaults), Path(args.preview), args.preview_every
    )


def kept(request: Request, num_targets: int, paths: Sequence[Path], output: Path) -> str:
    """What Ctrl-C left of a batch, and how to get the rest."""
    missing = [f"{level:g}" for level in (request.bokeh_targets or ())[num_targets:]]
    if not missing:
        return f"; all pictures are finished and kept in {output}"
    flags = ["--config-from", str(paths[0]), "--bokeh-targets", *missing, "--output", str(output)]
    kept = "1 picture is" if len(paths) == 1 else f"{len(paths)} pictures are"
    return (
        f"; {kept} finished and kept in {output}; levels {', '.join(missing)} are missing: "
        f"bokehflux generate {shlex.join(flags)}"
    )
