"""The flags of every command. Names and defaults of `generate` are those of the published script.

Flags may be written with hyphens or underscores, and shortened as long as they stay unambiguous.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from bokehflux.record import DEFAULT_NEGATIVE_PROMPT, DEFAULT_SEED, Request
from bokehflux.version import __version__

if TYPE_CHECKING:
    from bokehflux.weights.find.resolve import ModelFiles

ABOUT = " Flags may be written with hyphens or underscores, and shortened as long as they stay unambiguous."


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command; with --config-from, what was not given is what made that picture.

    Raises ValueError for a picture without a recipe; exits with 2 and one line for wrong flags.
    """
    words = [_hyphenated(word) for word in argv]
    root, commands = parsers()
    args = root.parse_args(words)
    if getattr(args, "config_from", None) is not None:
        from bokehflux.app.replay import defaults_from

        commands[args.command].set_defaults(**defaults_from(args.config_from, args.command))
        args = root.parse_args(words)
    return args


def parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The whole command line and, by name, its commands."""
    root = _Parser(prog="bokehflux", description="Text-to-image with lens-true control of defocus.")
    root.add_argument("--version", action="version", version=f"bokehflux {__version__}")
    group = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands: dict[str, argparse.ArgumentParser] = {}

    def command(name: str, summary: str) -> argparse.ArgumentParser:
        commands[name] = group.add_parser(name, help=summary, description=f"{summary.capitalize()}.{ABOUT}")
        return commands[name]

    generate = command("generate", "make one picture per bokeh level, all of one scene when a pivot is given")
    generate.add_argument("--prompt", help="what to show")
    seed_help = "one seed, size and dtype give one picture (default: %(default)s)"
    generate.add_argument("--seed", type=int, default=DEFAULT_SEED, metavar="N", help=seed_help)
    _picture_flags(generate)

    sweep = command("sweep", "make scenes at many levels, and sheet, animations and a page to compare them")
    prompts = sweep.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", help="what to show")
    prompts.add_argument("--prompts-file", metavar="FILE", help="one prompt a line; # begins a comment")
    seeds_help = f"every prompt is made with each (default: {DEFAULT_SEED})"
    sweep.add_argument("--seeds", type=int, nargs="+", default=[DEFAULT_SEED], metavar="N", help=seeds_help)
    _picture_flags(sweep)

    refocus = command("refocus", "show a photograph at other bokeh levels")
    refocus.add_argument("photo", metavar="PHOTO", help="the photograph: PNG, JPEG, WebP or GIF")
    refocus.add_argument("--prompt", help="what it shows")
    refocus.add_argument("--photo-level", type=float, default=0.0, metavar="LEVEL",
                         help="its own bokeh level, 0 (all sharp) to 30 (default: %(default)s)")  # fmt: skip
    _request_flags(refocus, guidance_scale=1.0)
    _run_flags(refocus)

    info = command("info", "show how a picture was made")
    info.add_argument("image", metavar="IMAGE", help="a picture that bokehflux wrote")
    command("doctor", "show versions, devices, memory, attention, models, and what is missing")
    inspect = command("inspect", "show what a checkpoint is and what bokehflux would do with it")
    inspect.add_argument("file", metavar="FILE", help="a file or a model folder; only headers are read")
    fetch = command("fetch", "download a model into the Hugging Face cache; goes on where it stopped")
    fetch.add_argument("name", metavar="NAME", help="flux-dev, flux-schnell or owner/name")
    fetch.add_argument("--tokenizers-only", action="store_true",
                       help="3 MB that no single file of a model holds")  # fmt: skip
    fetch.add_argument("--revision", default="main", metavar="R",
                       help="branch, tag or commit (default: %(default)s)")  # fmt: skip
    return root, commands


def request_from(args: argparse.Namespace, prompt: str, seed: int) -> Request:
    """What the flags ask for. Raises ValueError as `Request` does."""
    return Request(
        prompt=prompt,
        bokeh_targets=None if args.bokeh_targets is None else tuple(args.bokeh_targets),
        bokeh_pivot=args.bokeh_pivot,
        num_inference_steps=args.num_inference_steps,
        num_grounding_steps=args.num_grounding_steps,
        guidance_scale=args.guidance_scale,
        true_cfg=args.true_cfg,
        negative_prompt=args.negative_prompt,
        height=args.height,
        width=args.width,
        seed=seed,
    )


def model_from(args: argparse.Namespace) -> str | ModelFiles:
    """The model: by its name, or with parts that were given as files."""
    parts = {name: getattr(args, name) for name in ("vae", "clip", "t5", "tokenizers")}
    if not any(parts.values()):
        return args.model
    from bokehflux.weights.find.resolve import ModelFiles

    paths = {name: Path(path) for name, path in parts.items() if path is not None}
    return ModelFiles({"transformer": args.model, **paths})


def loras_from(args: argparse.Namespace) -> list[tuple[str, float]]:
    """Paths and strengths of the LoRAs. Raises ValueError for a strength that is no number."""
    loras = []
    for path, *scale in args.lora or []:
        if len(scale) > 1:
            raise ValueError(
                f"--lora takes a path and a strength, got {len(scale) + 1} values: repeat the flag"
            )
        try:
            strength = float(scale[0]) if scale else 1.0
        except ValueError:
            raise ValueError(f"--lora {path}: the strength must be a number, got {scale[0]!r}") from None
        if not math.isfinite(strength):
            raise ValueError(f"--lora {path}: the strength must be a finite number, got {scale[0]}")
        loras.append((path, strength))
    return loras


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"bokehflux: error: {' '.join(message.split())}\n")


def _picture_flags(parser: argparse.ArgumentParser) -> None:
    """What `generate` and `sweep` have in common."""
    add = parser.add_argument
    _request_flags(parser, guidance_scale=3.0)
    # fmt: off
    add("--bokeh-pivot", type=float, metavar="LEVEL",
        help="level of a further picture that anchors the scene; 10 to 20 works best (default: generate "
             "none, sweep 15)")
    add("--true-cfg", type=float, default=1.0, metavar="X",
        help="above 1, each step has a second pass that steers away from --negative-prompt (default: off)")
    add("--negative-prompt", default=DEFAULT_NEGATIVE_PROMPT, metavar="TEXT", help="default: %(default)s")
    add("--preview", metavar="FILE", help="a small picture that is written again and again meanwhile")
    add("--preview-every", type=int, default=1, metavar="K",
        help="steps between previews (default: %(default)s)")
    add("--preview-vae", metavar="PATH",
        help="TAEF1's file or folder, for previews with detail (default: a map of colours)")
    add("--config-from", metavar="IMAGE",
        help="make this picture again; flags that are given as well take precedence")
    # fmt: on
    _run_flags(parser)


def _request_flags(parser: argparse.ArgumentParser, guidance_scale: float) -> None:
    """What is to be made, by every command that makes pictures."""
    add = parser.add_argument
    # fmt: off
    add("--bokeh-targets", type=float, nargs="+", metavar="LEVEL",
        help="bokeh levels, 0 (all sharp) to 30; without any, generate makes one picture of the plain model, "
             "and sweep and refocus go from 0 to 30 in steps of 5")
    add("--num-grounding-steps", type=int, metavar="N",
        help="steps grounded on the pivot or photograph (default: 80 %%); 0 leaves the pivot out")
    add("--num-inference-steps", type=int, metavar="N", help="denoising steps (default: the model's own)")
    add("--guidance-scale", type=float, default=guidance_scale, metavar="X",
        help="distilled guidance, for prompts usually 3 to 6 (default: %(default)s)")
    add("--height", type=int, metavar="PX",
        help="floored to a multiple of 16 (default: the model's own, of refocus in the photograph's shape)")
    add("--width", type=int, metavar="PX", help="likewise")
    # fmt: on


def _run_flags(parser: argparse.ArgumentParser) -> None:
    """Which model it is, where it runs, and where pictures go."""
    add = parser.add_argument
    # fmt: off
    add("--max-rows", type=int, metavar="N",
        help="pictures that go through the network together (default: all that fit)")
    add("--vae-tiling", choices=("auto", "on", "off"), default="auto",
        help="decode pictures in bands, without seams, in less memory (default: where they are large)")
    add("--model", default="nano", metavar="MODEL",
        help="a bundled model, a folder or file in any known layout, or a repository such as "
             "black-forest-labs/FLUX.1-dev, looked up in the local cache (default: %(default)s)")
    add("--vae", metavar="PATH", help="file of the autoencoder, where it is not the model's own")
    add("--clip", metavar="PATH", help="likewise of the CLIP-L text encoder")
    add("--t5", metavar="PATH", help="likewise of the T5-XXL text encoder")
    add("--tokenizers", metavar="FOLDER", help="likewise, the folder that holds tokenizer/ and tokenizer_2/")
    add("--adapter", metavar="PATH", help="folder or file of a bokeh adapter; nano brings its own")
    add("--lora", nargs="+", action="append", metavar=("PATH", "SCALE"),
        help="a LoRA file and its strength (default: 1); may be given several times, effects add up")
    add("--memory", choices=("auto", "resident", "offload", "stream"), default="auto",
        help="what stays on the GPU; leaner is slower (default: %(default)s)")
    add("--device", metavar="DEVICE", help="cpu, cuda, cuda:N or mps (default: the best there is)")
    add("--dtype", choices=("bfloat16", "float16", "float32"),
        help="default: bfloat16 on a GPU, float32 on a CPU")
    add("--compute", choices=("dtype", "fp8"), default="dtype",
        help="fp8: the transformer's products in e4m3, faster and in half the memory on Ada and Hopper GPUs, "
             "and a slightly different picture; on a CPU slower (default: %(default)s)")
    add("--output", "--output-dir", "--results-dir", default="results", metavar="FOLDER",
        help="where to put pictures; those of earlier runs are kept (default: %(default)s)")
    add("--format", choices=("png", "jpeg", "webp"), default="png",
        help="of the pictures; webp is lossless (default: %(default)s)")
    # fmt: on


def _hyphenated(word: str) -> str:
    """--bokeh_pivot -> --bokeh-pivot; values, and what follows "=", stay as they are."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if re.fullmatch(r"--[A-Za-z][\w-]*", name) else word
