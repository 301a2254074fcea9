"""The commands that make pictures: generate, sweep, refocus, render, and eval where it makes them first.

Each checks what can be checked, opens the model, runs plans and writes what they made.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bokehflux.app import judge, photos
from bokehflux.app.arguments import loras_from, model_from, options_from, settings_from
from bokehflux.app.processes import Team, inside, on_gpus
from bokehflux.app.terminal import plain, say, show_files
from bokehflux.fields import Recipe
from bokehflux.settings import (
    DEFAULT_LEVELS,
    NEGATIVE_PROMPT,
    GenerateSettings,
    RefocusSettings,
    RenderSettings,
    Settings,
    lens_asked,
)

# Nothing that needs torch at the top: --help and mistyped flags must not wait for it.
if TYPE_CHECKING:
    from bokehflux.app.watched import PreviewFile, Watched
    from bokehflux.pictures.credentials import Sign
    from bokehflux.pictures.series import Scene
    from bokehflux.pipeline.pipeline import Pipeline
    from bokehflux.pipeline.run import Options, Plan


def generate(args: argparse.Namespace) -> int:
    """One picture per level, the pivot and a contact sheet; prints their paths."""
    settings = settings_from(args, GenerateSettings)
    preview, options = _preview(args), _checked(args, [settings])
    return on_gpus(args, [settings], lambda team: _generate(args, settings, options, preview, team))


def _generate(
    args: argparse.Namespace,
    settings: GenerateSettings,
    options: Options,
    preview: PreviewFile | None,
    team: Team,
) -> None:
    from bokehflux.app.watched import Interrupted
    from bokehflux.pipeline.generate import plan_generate

    pipe, watched = _open(args, [settings], options, preview, team)
    if team.follows:
        watched.follow()
        return
    scene, paths, stop = _make(args, watched, plan_generate(pipe, settings))
    if stop is not None:
        raise Interrupted(_kept(settings, scene, paths, args.output)) from stop


def sweep(args: argparse.Namespace) -> int:
    """Prompts x seeds x levels, each scene with its views, and one page; prints paths as they are done."""
    from bokehflux.app import sweep as sweeps

    given = args.prompts_file
    lines = [{"prompt": args.prompt}] if given is None else sweeps.read_prompts(Path(given))
    asked = _asked(args, lines)
    preview, options = _preview(args), _checked(args, asked)
    return on_gpus(args, asked, lambda team: _swept(args, team.agreed(asked), options, preview, team))


def evaluate(args: argparse.Namespace) -> int:
    """How well pictures follow their level; without a folder, a model makes them first."""
    judge.check(args)
    if args.place is not None:
        judge.judge(args)
        return 0
    lines, args.bokeh_targets = judge.protocol(args)
    asked = _asked(args, lines)
    judge.judge(args, _swept(args, asked, _checked(args, asked)))
    return 0


def _asked(args: argparse.Namespace, lines: Sequence[Mapping[str, Any]]) -> list[GenerateSettings]:
    """The scenes of a sweep."""
    from bokehflux.app import sweep as sweeps

    pivot = args.bokeh_pivot
    if pivot is None and not lens_asked(vars(args)):
        pivot = sweeps.PIVOT
    base = settings_from(
        args,
        GenerateSettings,
        prompt=lines[0]["prompt"],
        bokeh_targets=DEFAULT_LEVELS if args.bokeh_targets is None else args.bokeh_targets,
        bokeh_pivot=pivot,
        seed=args.seeds[0],
    )
    index, count = args.shard
    asked = sweeps.grid(base, lines, args.seeds)[index - 1 :: count]
    if not asked:
        raise ValueError(f"--shard {index}/{count} holds no scene: there are fewer scenes than shards")
    return asked


def _swept(
    args: argparse.Namespace,
    asked: Sequence[GenerateSettings],
    options: Options,
    preview: PreviewFile | None = None,
    team: Team | None = None,
) -> list[Path]:
    """Make the scenes of a sweep, print their paths, and return their folders."""
    from bokehflux.app import sweep as sweeps
    from bokehflux.app.watched import Interrupted
    from bokehflux.pipeline.generate import plan_generate
    from bokehflux.pipeline.run import Stopped

    output, num_done, (index, count) = Path(args.output), 0, args.shard
    try:
        pipe, watched = _open(args, asked, options, preview, team)
        if team is not None and team.follows:
            watched.follow()
            return []
        watched.progress.batch(1, len(asked))
        scenes = sweeps.Sweep.of(
            pipe,
            asked,
            output,
            args.format,
            lambda one: watched.run(plan_generate(pipe, one)),
            sign=_signer(args),
            part="" if count == 1 else f"-{index}of{count}",
        )
        numbers = team.claimed(len(asked)) if team is not None and team.shares_scenes else None
        made = scenes.made() if numbers is None else scenes.made_of(numbers)
        with contextlib.closing(made):  # Ctrl-C between two scenes leaves the page, too
            for num_done, done in enumerate(made, 1):
                show_files(done.paths)
                if done.num_kept:
                    say(f"scene {num_done}: {done.num_kept} pictures were there already")
                if num_done < len(asked):
                    watched.progress.batch(num_done + 1, len(asked))
    except KeyboardInterrupt as stop:
        finished = f"{num_done} of {len(asked)} scenes are finished and kept in {output}"
        if isinstance(stop, Stopped) and (begun := len(stop.result.images)):
            finished += f", and {begun} of the levels of the next"
        raise Interrupted(f"; {finished}; the same command continues") from stop
    if team is not None and team.shares_scenes:
        if not team.ends_last():
            return []
        scenes.write_pages()
    show_files(scenes.overviews())
    return [output / sweeps.folder_name(record) for record in scenes.scenes]


def refocus(args: argparse.Namespace) -> int:
    """A photograph at other levels, and a contact sheet; prints their paths."""
    if args.bokeh_pivot == "auto":
        args.bokeh_pivot = photos.photo_level_of(Path(args.photo))
    least = args.bokeh_pivot if args.method == "render" else 0
    levels = args.bokeh_targets
    if levels is None:
        levels = [level for level in DEFAULT_LEVELS if level >= least] or DEFAULT_LEVELS
    settings = settings_from(args, RefocusSettings, bokeh_targets=levels, photo=None)
    options = _checked(args, [settings])
    from bokehflux.app.watched import Interrupted
    from bokehflux.photos.read import read_photo
    from bokehflux.pipeline.lens import Lens
    from bokehflux.pipeline.refocus import plan_refocus, shown_photo

    photo = read_photo(Path(args.photo))
    settings = dataclasses.replace(settings, photo=photo.name, photo_hash=photo.fingerprint)
    if settings.method == "render":
        size = shown_photo(photo.image, settings).size
        Lens(size, settings)  # which says what does not go together
        _check_room(args, [settings.recipe()], 6 * len(settings.shots) * math.prod(size))
    pipe, watched = _open(args, [settings], options)
    scene, _, stop = _make(args, watched, plan_refocus(pipe, photo.image, settings))
    if stop is not None:
        kept = f"{len(scene.targets)} of {len(settings.shots)} pictures are finished and kept in"
        raise Interrupted(f"; {kept} {args.output}") from stop
    return 0


def render(args: argparse.Namespace) -> int:
    """A photograph with depth at bokeh levels, and a contact sheet; prints their paths."""
    settings = settings_from(args, RenderSettings)
    from bokehflux.app.replay import use_threads_of, warn_of_differences
    from bokehflux.app.watched import Interrupted
    from bokehflux.pictures.series import Scene
    from bokehflux.pipeline.load import pick_device
    from bokehflux.pipeline.progress import Progress
    from bokehflux.pipeline.render import open_rendering

    if args.config_from is not None:
        use_threads_of(args.config_from)
    rendering = open_rendering(settings, pick_device(args.device))
    record, shots = rendering.record, rendering.settings.shots
    if args.config_from is not None:
        warn_of_differences(args.config_from, record.provenance, rendering.settings.file_hashes)
    if args.bokeh_targets is None:
        own = rendering.own_level
        told = "its EXIF data tells no level" if own is None else f"level {own:.1f}, by its EXIF data"
        say(f"{plain(record.settings.title)}: {told}")
    _check_room(args, [record.recipe()], 6 * len(shots) * math.prod(rendering.size))
    progress, images, stop = Progress.for_people(), [], None
    try:
        for number, shot in enumerate(shots):
            progress.show("rendering", number, len(shots))
            images.append(rendering.picture(*shot))
    except KeyboardInterrupt as pressed:
        if not images:
            raise Interrupted("; no picture is finished") from pressed
        stop = pressed
    finally:
        progress.end()
    _, stop = _keep(args, Scene.of(record, images), stop)
    if stop is not None:
        kept = f"{len(images)} of {len(shots)} pictures are finished and kept in {args.output}"
        raise Interrupted(f"; {kept}") from stop
    return 0


def _checked(args: argparse.Namespace, asked: Sequence[Settings]) -> Options:
    """How runs are carried out, once all is refused that would fail after minutes of loading."""
    loras_from(args)
    # Three bytes a pixel, and as much again for sheets and views: no format of ours takes more.
    pixels = sum(one.num_pictures * (one.height or 512) * (one.width or 512) for one in asked)
    num_bytes = 6 * pixels
    for name in ("model", "adapter", "vae", "clip", "t5", "tokenizers"):
        if getattr(args, name) == "":
            raise ValueError(f"--{name} is empty: give a path, or leave it out")
    options = options_from(args)
    _signer(args)
    _check_room(args, [one.recipe() for one in asked], num_bytes)
    return options


def _check_room(args: argparse.Namespace, recipes: Sequence[Recipe], num_bytes: int) -> None:
    """Raises ValueError unless pictures with these recipes can be written."""
    from PIL import Image

    from bokehflux.pictures.files import check_folder
    from bokehflux.pictures.metadata import encode

    if args.output == "":
        raise ValueError("--output is empty: give a path, or leave it out")
    if args.format == "jpeg":  # the one format that has no room for every recipe
        for recipe in recipes:
            encode(Image.new("RGB", (16, 16)), recipe, args.format)
    check_folder(Path(args.output), num_bytes)


def _preview(args: argparse.Namespace) -> PreviewFile | None:
    """The preview that was asked for. Raises ValueError where it could not be written."""
    typed = args.config_from is None and args.negative_prompt != NEGATIVE_PROMPT
    # Among several processes one says it: the one that has started them, or the first.
    told = inside() and (args.gpus > 1 or os.environ.get("RANK", "0") != "0")
    if typed and args.true_cfg <= 1 and not told:
        say("--negative-prompt does nothing without --true-cfg above 1")
    if args.true_cfg > 1.5 and args.guidance_scale > 2 and not told:
        both = f"--guidance-scale {args.guidance_scale:g} and --true-cfg {args.true_cfg:g}"
        say(f"{both} add up; if pictures look burnt, lower one")
    if args.preview is None and args.preview_every == 1 and args.preview_vae is None:
        return None
    from bokehflux.app.preview import check_preview
    from bokehflux.app.watched import PreviewFile
    from bokehflux.weights.load import load_tiny_decoder

    check_preview(args.preview, args.preview_every, args.preview_vae)
    if args.preview_vae is not None:
        load_tiny_decoder(args.preview_vae)
    return PreviewFile(path=Path(args.preview), every=args.preview_every, tiny_vae=args.preview_vae)


def _open(
    args: argparse.Namespace,
    asked: Sequence[Settings],
    options: Options,
    preview: PreviewFile | None = None,
    team: Team | None = None,
) -> tuple[Pipeline, Watched]:
    """The model that the flags ask for, and its runs as people see them.

    asked: what it will make; what the model cannot serve is refused before its weights are read.
    """
    from bokehflux.app.replay import use_threads_of, warn_of_differences
    from bokehflux.app.watched import Watched
    from bokehflux.pipeline.load import check_all, load
    from bokehflux.pipeline.progress import Progress
    from bokehflux.pipeline.provenance import provenance_of

    leads = team is None or team.leads
    progress = Progress.for_people() if leads else Progress(None)
    replayed = getattr(args, "config_from", None)  # refocus and eval have no such flag
    if replayed is not None:
        use_threads_of(replayed)
    progress.show(f"loading {args.model}")
    try:
        pipe = load(
            model_from(args),
            adapter=args.adapter,
            loras=loras_from(args),
            schedule=args.schedule,
            device=args.device,
            dtype=args.dtype,
            compute=args.compute,
            memory=args.memory,
            on_found=lambda found: check_all(found, asked),
            on_progress=progress.loading,
        )
    finally:
        progress.end()
    if args.memory == "auto" and pipe.device.type == "cuda" and leads:  # elsewhere there is no choice
        say(f"memory mode {pipe.memory.mode}, chosen from free memory")
    if replayed is not None and leads:
        warn_of_differences(replayed, provenance_of(pipe))
    if team is not None:
        options = dataclasses.replace(options, ranks=team.ranks)
    return pipe, Watched(pipe, progress, options, preview, team)


def _make(
    args: argparse.Namespace, watched: Watched, plan: Plan
) -> tuple[Scene, list[Path], KeyboardInterrupt | None]:
    """Run a plan and write what it made, even where Ctrl-C ended it early; prints the paths."""
    from bokehflux.pipeline.run import Stopped

    stop: KeyboardInterrupt | None = None
    try:
        result = watched.run(plan)
    except Stopped as stopped:
        result, stop = stopped.result, stopped
    scene = result.scene()
    return scene, *_keep(args, scene, stop)


def _keep(
    args: argparse.Namespace, scene: Scene, stop: KeyboardInterrupt | None
) -> tuple[list[Path], KeyboardInterrupt | None]:
    """Write the pictures, and the sheet where nothing stopped them; prints the paths."""
    from bokehflux.pictures.files import save_pictures, uninterrupted

    try:
        with uninterrupted():
            views = [] if stop else [scene.sheet()]
            paths = save_pictures([*scene.pictures(), *views], Path(args.output), args.format, _signer(args))
            show_files(paths)
    except KeyboardInterrupt as pressed:
        stop = stop or pressed
    return paths, stop


def _signer(args: argparse.Namespace) -> Sign | None:
    """What signs the pictures. Raises ValueError for certificates or a key that do not serve."""
    if getattr(args, "c2pa", None) is None:  # render has no such flag: its pictures are photographs
        return None
    from bokehflux.pictures.credentials import signer

    return signer(*args.c2pa)


def _kept(settings: GenerateSettings, scene: Scene, paths: Sequence[Path], output: str) -> str:
    """What Ctrl-C left of a batch, and how to get the rest."""
    missing = [f"{level:g}" for level in (settings.bokeh_targets or ())[len(scene.targets) :]]
    if not missing:
        return f"; all pictures are finished and kept in {output}"
    flags = ["--config-from", str(paths[0]), "--bokeh-targets", *missing, "--output", output]
    kept = "1 picture is" if len(paths) == 1 else f"{len(paths)} pictures are"
    return (
        f"; {kept} finished and kept in {output}; levels {', '.join(missing)} are missing: "
        f"bokehflux generate {shlex.join(flags)}"
    )
