"""`bokehflux eval`: how well pictures follow their level and keep their scene.

Nothing that needs torch at the top: --help and mistyped flags must not wait for it.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bokehflux.app.terminal import plain, say, show, show_files

OWN_FLAGS = ("command", "place", "reference", "perceptual")
"""What goes with a folder; every other flag is about making pictures."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of judging; those of making pictures are the other commands' own."""
    parser.add_argument("place", metavar="FOLDER", nargs="?",
        help="pictures that bokehflux made, or a .jsonl manifest of others (default: make 20 scenes at 5 "
             "levels with --model, and judge them)")  # fmt: skip
    add = parser.add_argument_group("how to judge").add_argument
    add("--reference", metavar="FOLDER",
        help="true or rendered pictures of the same scenes at the same levels, made by bokehflux render, or "
             "a .jsonl manifest")  # fmt: skip
    add("--perceptual", metavar="HUB",
        help="measure LPIPS and DISTS: torch.hub's folder with torchvision's weights of AlexNet and "
             "VGG16")  # fmt: skip


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for what would fail after pictures are made, and for flags that would do nothing."""
    from bokehflux.app.arguments import parsers
    from bokehflux.evaluation.folder import find_scenes
    from bokehflux.evaluation.perceptual import HubPerceptual

    if args.perceptual is not None:
        HubPerceptual(Path(args.perceptual))
    if args.reference is not None:
        find_scenes(Path(args.reference))
    if args.place is not None:
        parser = parsers()[1]["eval"]
        idle = [name for name, value in vars(args).items() if name not in OWN_FLAGS]
        idle = [name for name in idle if getattr(args, name) != parser.get_default(name)]
        if idle:
            flags = ", ".join("--" + name.replace("_", "-") for name in idle)
            raise ValueError(f"{flags} would do nothing: pictures in a folder are judged as they are")


def protocol(args: argparse.Namespace) -> tuple[list[dict[str, Any]], Sequence[float]]:
    """Prompts, as a file of them would give them, and levels of what is made where there is no folder."""
    from bokehflux.app.sweep import read_prompts
    from bokehflux.evaluation.protocol import LEVELS, prompts_for

    prompts = [{"prompt": prompt} for prompt in prompts_for(args.model)]
    lines = prompts if args.prompts_file is None else read_prompts(Path(args.prompts_file))
    return lines, LEVELS if args.bokeh_targets is None else args.bokeh_targets


def judge(args: argparse.Namespace, folders: Sequence[Path] | None = None) -> None:
    """Judge a folder, print the table, and leave eval.json and eval.png in it.

    folders: those of its subfolders that count; None: all.
    """
    from bokehflux.evaluation.folder import find_scenes
    from bokehflux.evaluation.judge import judge as judged
    from bokehflux.evaluation.perceptual import HubPerceptual
    from bokehflux.pictures.files import check_folder, replace_file

    place = Path(args.output if args.place is None else args.place)
    scenes = find_scenes(place, folders)
    if args.reference is not None:
        others = find_scenes(Path(args.reference))
        scenes = [scene.with_truth(others) for scene in scenes]
    perceptual = None if args.perceptual is None else HubPerceptual(Path(args.perceptual))
    output = place if place.is_dir() else place.parent
    check_folder(output)
    report = judged(scenes, perceptual, lambda done: say(f"scene {done + 1} of {len(scenes)}"))
    show(map(plain, report.lines()))
    buffer = io.BytesIO()
    report.plot().save(buffer, "PNG")
    contents = {"eval.json": json.dumps(report.json(), indent=1).encode(), "eval.png": buffer.getvalue()}
    for name, data in contents.items():
        replace_file(output / name, data)
    show_files(output / name for name in contents)
