"""The command `bokehflux`: reads arguments, runs the pipeline, writes pictures. No other logic lives here.

Bad input ends with one line on stderr and exit code 2, Ctrl-C with 130.
"""

from __future__ import annotations

import argparse
import bisect
import logging
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from bokehflux import __version__

if TYPE_CHECKING:
    from bokehflux.generate import Result
    from bokehflux.images import Picture
    from bokehflux.sampling.samplers import OnStep, StepInfo


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code. argv: arguments without the program's name."""
    logging.basicConfig(format="bokehflux: %(message)s")
    try:
        args = _parser().parse_args([_hyphenated(word) for word in (sys.argv[1:] if argv is None else argv)])
        return generate(args)
    except ValueError as error:
        print(f"bokehflux: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"bokehflux: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        # The progress line, if there is one, has no end yet.
        print("\n" * sys.stderr.isatty() + "bokehflux: interrupted", file=sys.stderr)
        return 130


def generate(args: argparse.Namespace) -> int:
    """`bokehflux generate`: one PNG per level, the pivot and a contact sheet; prints their paths."""
    # Here, not at the top: --help, --version and mistyped flags must not wait for torch.
    from bokehflux import images
    from bokehflux.generate import load

    _check_before_loading(args)
    folder = Path(args.output)
    images.check_folder(folder)
    pipe = load(args.model, adapter=args.adapter, device=args.device, dtype=args.dtype)
    result = pipe.generate(
        args.prompt,
        args.bokeh_targets,
        bokeh_pivot=args.bokeh_pivot,
        num_inference_steps=args.num_inference_steps,
        num_grounding_steps=args.num_grounding_steps,
        guidance_scale=args.guidance_scale,
        true_cfg=args.true_cfg,
        negative_prompt=args.negative_prompt,
        height=args.height,
        width=args.width,
        seed=args.seed,
        on_step=progress(),
    )
    settings = {**result.settings, "adapter": args.adapter}
    for path in images.save_pictures(_pictures(result, settings), folder):
        print(path)
    return 0


def progress() -> OnStep | None:
    """A line on stderr that is redrawn after every step, or None when nobody watches."""
    if not sys.stderr.isatty():
        return None
    start = time.monotonic()

    def show(info: StepInfo) -> None:
        done = info.step + 1
        minutes, seconds = divmod(round((time.monotonic() - start) / done * (info.num_steps - done)), 60)
        line = f"step {done}/{info.num_steps}  noise {info.sigma:.2f}  {minutes:02}:{seconds:02} left"
        print(f"\r{line:<50}", end="\n" if done == info.num_steps else "", file=sys.stderr, flush=True)

    return show


def _check_before_loading(args: argparse.Namespace) -> None:
    """What `Pipeline.generate` would refuse anyway, said before minutes are spent on loading a model."""
    from bokehflux.models.bokeh import check_level

    if not args.prompt.strip():
        raise ValueError("the prompt is empty")
    for level in [*(args.bokeh_targets or []), args.bokeh_pivot]:
        check_level(level)
    if args.num_grounding_steps and args.bokeh_pivot is None:
        raise ValueError("--num-grounding-steps needs --bokeh-pivot: steps are grounded on a pivot")
    for side in (args.height, args.width):
        if side is not None and side < 16:
            raise ValueError(f"--height and --width must be at least 16 pixels, got {side}")
    if not -(2**63) <= args.seed < 2**64:
        raise ValueError(f"--seed must fit in 64 bits, got {args.seed}")


def _pictures(result: Result, settings: dict[str, Any]) -> list[Picture]:
    """Everything a run leaves behind, in the order in which it is reported: targets, pivot, sheet."""
    from bokehflux.images import Picture, Tile, contact_sheet, distinct, level_stem

    levels, pivot = settings["bokeh_targets"] or [None], settings["bokeh_pivot"]
    stems = distinct(["plain" if level is None else level_stem(level) for level in levels])
    pictures, tiles = [], []
    for level, stem, image in zip(levels, stems, result.images, strict=True):
        about = {**settings, "role": "target", "bokeh_level": level}
        pictures.append(Picture(stem=stem, image=image, settings=about))
        tiles.append(Tile(image=image, label="plain" if level is None else f"bokeh {level:g}"))
    if result.pivot_image is not None:
        about = {**settings, "role": "pivot", "bokeh_level": pivot}
        pictures.append(Picture(stem=f"pivot-{level_stem(pivot)}", image=result.pivot_image, settings=about))
        # In its place among ascending levels, so that the sheet reads as one sweep.
        place = bisect.bisect(levels, pivot) if levels == sorted(levels) else len(levels)
        tiles.insert(place, Tile(image=result.pivot_image, label=f"pivot {pivot:g}", is_pivot=True))
    grounded = f", {settings['num_grounding_steps']} grounded" if result.pivot_image is not None else ""
    footer = " \u00b7 ".join(
        (
            Path(settings["model"]).name,
            f"{settings['num_inference_steps']} steps{grounded}",
            f"guidance {settings['guidance_scale']:g}",
            f"seed {settings['seed']}",
        )
    )
    sheet = contact_sheet(tiles, settings["prompt"], footer)
    return [*pictures, Picture(stem="sheet", image=sheet, settings={**settings, "role": "sheet"})]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"bokehflux: error: {message}\n")


def _parser() -> _Parser:
    # Flag names and defaults are those of the published script; `_hyphenated` admits its spelling.
    parser = _Parser(prog="bokehflux", description="Text-to-image with lens-true control of defocus.")
    parser.add_argument("--version", action="version", version=f"bokehflux {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add = commands.add_parser(
        "generate",
        help="make one picture per bokeh level",
        description="Make one picture per bokeh level, all of one scene when a pivot is given. Flags may be "
        "written with hyphens or underscores, and shortened as long as they stay unambiguous.",
    ).add_argument
    # fmt: off
    add("--prompt", required=True, help="what to show")
    add("--bokeh-targets", type=float, nargs="+", metavar="LEVEL",
        help="bokeh levels, 0 (all sharp) to 30; without any, one picture of the plain model")
    add("--bokeh-pivot", type=float, metavar="LEVEL",
        help="level of a further picture that anchors the scene; 10 to 20 works best")
    add("--num-grounding-steps", type=int, metavar="N", help="steps grounded on the pivot (default: 80 %%)")
    add("--num-inference-steps", type=int, metavar="N", help="denoising steps (default: the model's own)")
    add("--guidance-scale", type=float, default=3.0, metavar="X",
        help="distilled guidance, usually 3 to 6 (default: %(default)s)")
    add("--true-cfg", type=float, default=1.0, metavar="X",
        help="above 1, each step has a second pass that steers away from --negative-prompt (default: off)")
    add("--negative-prompt", default="bad quality, low resolution", metavar="TEXT",
        help="default: %(default)s")
    add("--height", type=int, metavar="PX", help="floored to a multiple of 16 (default: the model's own)")
    add("--width", type=int, metavar="PX", help="likewise")
    add("--seed", type=int, default=65578, metavar="N",
        help="one seed, size and dtype give one picture (default: %(default)s)")
    add("--model", default="nano", metavar="MODEL",
        help="a bundled model, or a folder in the official FLUX layout (default: %(default)s)")
    add("--adapter", metavar="PATH", help="folder or file of a bokeh adapter; nano brings its own")
    add("--device", metavar="DEVICE", help="cpu, cuda, cuda:N or mps (default: the best there is)")
    add("--dtype", choices=("bfloat16", "float16", "float32"),
        help="default: bfloat16 on a GPU, float32 on a CPU")
    add("--output", "--output-dir", "--results-dir", default="results", metavar="FOLDER",
        help="where to put pictures; those of earlier runs are kept (default: %(default)s)")
    # fmt: on
    return parser


def _hyphenated(word: str) -> str:
    """--bokeh_pivot -> --bokeh-pivot; values, and what follows "=", stay as they are."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if re.fullmatch(r"--[A-Za-z][\w-]*", name) else word


if __name__ == "__main__":
    sys.exit(main())
