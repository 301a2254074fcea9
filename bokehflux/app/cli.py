"""The command `bokehflux`: reads arguments, runs the pipeline, writes pictures. No other logic lives here.

Bad input ends with one message on stderr and exit code 2, a failing disk or broken weights with 1, Ctrl-C
with 130. A message is one line; what it lists (places, missing tensors) follows, a line each.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bokehflux.app.arguments import loras_from, model_from, parse, request_from
from bokehflux.record import DEFAULT_NEGATIVE_PROMPT

# Nothing that needs torch at the top: --help, --version and mistyped flags must not wait for it.
if TYPE_CHECKING:
    from bokehflux.app.progress import Progress
    from bokehflux.pipeline.generate import Pipeline, Result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code. argv: arguments without the program's name."""
    logging.basicConfig(format="bokehflux: %(message)s")
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        return COMMANDS[args.command](args)
    except ValueError as error:
        print(f"bokehflux: error: {_said(error)}", file=sys.stderr)
        return 2
    except (OSError, ArithmeticError, MemoryError) as error:
        # ArithmeticError: NaN in weights or activations. MemoryError: at loading; later a ValueError.
        said = _said(error) or "out of memory"  # Python's own says nothing
        print(f"bokehflux: error: {said}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print(f"bokehflux: interrupted{stop}", file=sys.stderr)
        return 130


def generate(args: argparse.Namespace) -> int:
    """One picture per level, the pivot and a contact sheet; prints their paths."""
    request = request_from(args, _required(args.prompt), args.seed)
    _check_picture_flags(args)
    _check(args)
    from bokehflux.app.progress import Progress
    from bokehflux.app.watched import Interrupted, kept, server
    from bokehflux.pictures.files import save_pictures, uninterrupted
    from bokehflux.pictures.series import Scene
    from bokehflux.pipeline.generate import Stopped

    progress, output = Progress.for_people(), Path(args.output)
    pipe, facts = _load(args, progress)
    stop: KeyboardInterrupt | None = None
    try:
        result = server(args, pipe, progress)(request)
    except Stopped as stopped:
        result, stop = stopped.result, stopped
    try:
        with uninterrupted():
            scene = Scene.of(result, facts)
            views = [] if stop else [scene.sheet()]
            paths = save_pictures([*scene.pictures(), *views], output, args.format)
            print(*paths, sep="\n", flush=True)
    except KeyboardInterrupt as pressed:
        stop = stop or pressed
    if stop is not None:
        raise Interrupted(kept(request, len(scene.targets), paths, output)) from stop
    return 0


def sweep(args: argparse.Namespace) -> int:
    """Prompts x seeds x levels, each scene with its views, and one page; prints paths as they are done."""
    from bokehflux.app import sweep as sweeps
    from bokehflux.app.progress import Progress
    from bokehflux.app.watched import Interrupted, server
    from bokehflux.pipeline.generate import Stopped

    given = args.prompts_file
    prompts = [_required(args.prompt)] if given is None else sweeps.read_prompts(Path(given))
    args.bokeh_targets = args.bokeh_targets or sweeps.LEVELS
    args.bokeh_pivot = sweeps.PIVOT if args.bokeh_pivot is None else args.bokeh_pivot
    requests = sweeps.grid(request_from(args, prompts[0], args.seeds[0]), prompts, args.seeds)
    _check_picture_flags(args)
    _check(args)

    progress, output, num_done = Progress.for_people(), Path(args.output), 0
    try:
        pipe, facts = _load(args, progress)
        serve = server(args, pipe, progress)
        progress.batch(1, len(requests))
        scenes = sweeps.run_sweep(requests, pipe.defaults, facts, output, args.format, serve)
        with contextlib.closing(scenes):  # Ctrl-C between two scenes, too, leaves the page
            for num_done, done in enumerate(scenes, 1):
                print(*done.paths, sep="\n", flush=True)
                if done.num_kept:
                    print(
                        f"bokehflux: scene {num_done}: {done.num_kept} pictures were there already",
                        file=sys.stderr,
                    )
                if num_done < len(requests):
                    progress.batch(num_done + 1, len(requests))
    except KeyboardInterrupt as stop:
        finished = f"{num_done} of {len(requests)} scenes are finished and kept in {output}"
        if isinstance(stop, Stopped) and (begun := len(stop.result.images)):
            finished += f", and {begun} of the levels of the next"
        raise Interrupted(f"; {finished}; the same command continues") from stop
    print(*sweeps.overviews(output, requests, pipe.defaults, facts), sep="\n")
    return 0


def refocus(args: argparse.Namespace) -> int:
    """A photograph at other levels, and a contact sheet; prints their paths."""
    from bokehflux.app.sweep import LEVELS
    from bokehflux.record import Request, with_fewer_rows

    levels = args.bokeh_targets or list(LEVELS)
    names = ("num_inference_steps", "num_grounding_steps", "guidance_scale", "height", "width")
    how = {name: getattr(args, name) for name in names}
    prompt = _required(args.prompt)
    Request(prompt=prompt, bokeh_targets=tuple(levels), bokeh_pivot=args.photo_level, **how)
    _check(args)
    from bokehflux.app.progress import Progress
    from bokehflux.app.watched import TILING, Interrupted, warn_of_words
    from bokehflux.pictures.files import save_pictures, uninterrupted
    from bokehflux.pictures.series import Scene
    from bokehflux.pipeline.generate import Stopped
    from bokehflux.pipeline.refocus import read_photo
    from bokehflux.pipeline.refocus import refocus as run

    photo, photo_facts = read_photo(Path(args.photo))
    progress, output = Progress.for_people(), Path(args.output)
    pipe, facts = _load(args, progress)
    warn_of_words(pipe, prompt)
    stop: KeyboardInterrupt | None = None
    rows = 1 + len(levels)
    try:
        with progress.watching(pipe, rows) as on_step:

            def attempt(max_rows: int | None) -> Result:
                return run(
                    pipe, photo, prompt, levels, photo_level=args.photo_level, on_step=on_step,
                    max_rows=max_rows, vae_tiling=TILING[args.vae_tiling], **how,
                )  # fmt: skip

            result = with_fewer_rows(attempt, rows, args.max_rows)
    except Stopped as stopped:
        result, stop = stopped.result, stopped
    try:
        with uninterrupted():
            scene = Scene.of(result, {**facts, **photo_facts})
            views = [] if stop else [scene.sheet()]
            print(*save_pictures([*scene.pictures(), *views], output, args.format), sep="\n", flush=True)
    except KeyboardInterrupt as pressed:
        stop = stop or pressed
    if stop is not None:
        kept = f"{len(scene.targets)} of {len(levels)} pictures are finished and kept in {output}"
        raise Interrupted(f"; {kept}") from stop
    return 0


def info(args: argparse.Namespace) -> int:
    """The recipe inside a picture, one line each."""
    from bokehflux.pictures.metadata import read_recipe, shown

    for name, value in shown(read_recipe(args.image)).items():
        print(_plain(f"{name}: {value}"))
    return 0


def doctor(args: argparse.Namespace) -> int:
    """What this machine has and lacks, line by line."""
    from bokehflux.app.doctor import report

    for line in report():
        print(line, flush=True)
    return 0


def inspect(args: argparse.Namespace) -> int:
    """What a checkpoint file is."""
    from bokehflux.weights.describe import describe

    print(*map(_plain, describe(args.file).split("\n")), sep="\n")
    return 0


def fetch(args: argparse.Namespace) -> int:
    """Downloads a model and prints its folder: the only command with a network."""
    from bokehflux.app.fetch import TOKENIZERS_ONLY
    from bokehflux.app.fetch import fetch as download

    patterns = TOKENIZERS_ONLY if args.tokenizers_only else None
    print(download(args.name, patterns=patterns, revision=args.revision))
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "generate": generate, "sweep": sweep, "refocus": refocus, "info": info, "doctor": doctor,
    "inspect": inspect, "fetch": fetch,
}  # fmt: skip


def _said(error: Exception) -> str:
    """A message in one line, and one more for each thing that it lists ("  - ...")."""
    parts = str(error).split("\n  - ")
    return "\n  - ".join(_plain(" ".join(part.split())) for part in parts)


def _plain(text: str) -> str:
    """With control characters spelled out: what strangers wrote into a file must not rule the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _required(prompt: str | None) -> str:
    if prompt is None:
        raise ValueError("a prompt is needed: --prompt TEXT")
    return prompt


def _check(args: argparse.Namespace) -> None:
    """What would fail after minutes of loading, said before."""
    from bokehflux.pictures.files import check_folder

    loras_from(args)
    for name in ("model", "adapter", "vae", "clip", "t5", "tokenizers", "output"):
        if getattr(args, name) == "":
            raise ValueError(f"--{name} is empty: give a path, or leave it out")
    if args.max_rows is not None and args.max_rows < 1:
        raise ValueError(f"--max-rows must be at least 1, got {args.max_rows}")
    check_folder(Path(args.output))


def _check_picture_flags(args: argparse.Namespace) -> None:
    """Likewise, of the flags that only `generate` and `sweep` have."""
    if args.preview is not None or args.preview_every != 1 or args.preview_vae is not None:
        from bokehflux.app.preview import check_preview

        check_preview(args.preview, args.preview_every, args.preview_vae)
    if args.preview_vae is not None:
        from bokehflux.weights.load import load_tiny_decoder

        load_tiny_decoder(args.preview_vae)
    typed = args.config_from is None and args.negative_prompt != DEFAULT_NEGATIVE_PROMPT
    if typed and args.true_cfg <= 1:
        print("bokehflux: --negative-prompt does nothing without --true-cfg above 1", file=sys.stderr)
    if args.true_cfg > 1.5 and args.guidance_scale > 2:
        both = f"--guidance-scale {args.guidance_scale:g} and --true-cfg {args.true_cfg:g}"
        print(f"bokehflux: {both} add up; if pictures look burnt, lower one", file=sys.stderr)


def _load(args: argparse.Namespace, progress: Progress) -> tuple[Pipeline, dict[str, Any]]:
    """The model, and the part of every recipe that tells which model it was and where it ran."""
    from bokehflux.pipeline import provenance as identity
    from bokehflux.pipeline.generate import load

    model, loras = model_from(args), loras_from(args)
    replayed = getattr(args, "config_from", None)
    if replayed is not None:
        from bokehflux.app.replay import use_threads_of

        use_threads_of(replayed)
    progress.show(f"loading {args.model}")
    try:
        pipe = load(
            model,
            adapter=args.adapter,
            loras=loras,
            device=args.device,
            dtype=args.dtype,
            compute=args.compute,
            memory=args.memory,
            on_progress=progress.loading,
        )
        facts = identity.facts(pipe, model, args.adapter, loras)
    finally:
        progress.end()
    if args.memory == "auto" and pipe.device.type == "cuda":  # elsewhere there is no choice
        print(f"bokehflux: memory mode {pipe.memory.mode}, chosen from free memory", file=sys.stderr)
    if replayed is not None:
        from bokehflux.app.replay import warn_of_differences

        warn_of_differences(replayed, facts)
    return pipe, facts


if __name__ == "__main__":
    sys.exit(main())
