"""The flags of every command. Names and defaults of `generate` are those of the published script.

Flags may be written with hyphens or underscores, and shortened as long as they stay unambiguous.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from bokehflux.app import judge, photos, train
from bokehflux.app.processes import SPLITS
from bokehflux.fields import SEED, Checked
from bokehflux.settings import DEFAULT_SEED, GenerateSettings, RefocusSettings, RenderSettings
from bokehflux.version import __version__

if TYPE_CHECKING:
    from bokehflux.pipeline.run import Options
    from bokehflux.weights.find.resolve import ModelFiles

Asked = TypeVar("Asked", bound=Checked)
TILING = {"auto": None, "on": True, "off": False}
"""--vae-tiling, as `run.Options` takes it."""

ABOUT = " Flags may be written with hyphens or underscores, and shortened as long as they stay unambiguous."
ALIASES = {
    "--steps": "--num-inference-steps", "--grounding-steps": "--num-grounding-steps",
    "--levels": "--bokeh-targets", "--targets": "--bokeh-targets", "--pivot": "--bokeh-pivot",
    "--cfg": "--true-cfg", "--out": "--output",
}  # fmt: skip
"""Names that people type for flags that other programs call so. `--size 768x512` is --width and --height."""
EXAMPLES = {
    "generate": """\
examples:
  bokehflux generate --prompt "a red ball on a wooden table" --bokeh-targets 0 8 28 --bokeh-pivot 15
  bokehflux generate --config-from results/bokeh-08.0.png --seed 7
""",
    "sweep": """\
examples:
  bokehflux sweep --prompt "a blue vase" --seeds 1 2 --output sweeps
  bokehflux sweep --prompts-file prompts.jsonl --shard 1/4
  A line of a .jsonl file: {"prompt": "a mug", "levels": [0, 20], "pivot": 15, "seed": 3, "size": "768x512"}
""",
    "eval": """\
examples:
  bokehflux eval sweeps
  bokehflux eval --model path/to/FLUX.1-dev --adapter path/to/BokehDiffusion --output judged
  A line of a .jsonl manifest: {"file": "a.png", "level": 5, "scene": "mug", "mask": "mask.png"}
""",
    "refocus": """\
example:
  bokehflux refocus mug.jpg --prompt "a red mug on a table" --bokeh-targets 8 28
""",
    "render": """\
examples:
  bokehflux render mug.jpg --depth mug.depth.png --focus 420,310 --levels 0 10 20 30 --aperture polygon:6
  bokehflux render mug.jpg --depth labels/maps/mug.jpg.npz --mask labels/maps/mug.jpg.npz
""",
}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command; with --config-from, what was not given is what made that picture.

    Raises ValueError for a picture without a recipe; exits with 2 and one line for wrong flags.
    """
    words = [_hyphenated(word) for word in _sizes_apart(argv)]
    root, commands = parsers()
    if not words or words[0] == "help":  # `bokehflux help sweep` is `bokehflux sweep --help`
        words = [*words[1:2], "--help"]
    args = root.parse_args(words)
    if getattr(args, "config_from", None) is not None:
        from bokehflux.app.replay import defaults_from

        commands[args.command].set_defaults(**defaults_from(args.config_from, args.command))
        args = root.parse_args(words)
    if hasattr(args, "gpus"):
        args.words = words  # which other processes are started with
    return args


def parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The whole command line and, by name, its commands."""
    root = _Parser(prog="bokehflux", description="Text-to-image with lens-true control of defocus.")
    root.add_argument("--version", action="version", version=f"bokehflux {__version__}")
    group = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands: dict[str, argparse.ArgumentParser] = {}

    def command(name: str, summary: str) -> argparse.ArgumentParser:
        commands[name] = group.add_parser(
            name,
            help=summary,
            description=f"{summary.capitalize()}.{ABOUT if name in EXAMPLES else ''}",
            epilog=EXAMPLES.get(name),
            formatter_class=_Formatter,
        )
        return commands[name]

    generate = command("generate", "make one picture per bokeh level, all of one scene when a pivot is given")
    _settings_flags(generate.add_argument_group("what to make"), GenerateSettings)
    _watching_flags(generate)
    _run_flags(generate)
    _gpus_flags(generate)

    sweep = command("sweep", "make scenes at many levels, and sheet, animations and a page to compare them")
    what = sweep.add_argument_group("what to make")
    prompts = what.add_mutually_exclusive_group()
    _settings_flag(prompts, GenerateSettings, "prompt")
    prompts.add_argument("--prompts-file", metavar="FILE",
                         help="one prompt a line, or a JSON object a line; # begins a comment")  # fmt: skip
    what.add_argument("--seeds", type=SEED.parse, nargs="+", default=[DEFAULT_SEED], metavar="N",
                      help=f"every prompt is made with each (default: {DEFAULT_SEED})")  # fmt: skip
    what.add_argument("--shard", type=_shard, default=(1, 1), metavar="I/N",
                      help="make only every Nth scene, from the Ith on: for N machines")  # fmt: skip
    _settings_flags(what, GenerateSettings, without=("prompt", "seed"))
    _watching_flags(sweep)
    _run_flags(sweep)
    _gpus_flags(sweep)

    refocus = command("refocus", "show a photograph at other bokeh levels")
    refocus.add_argument("photo", metavar="PHOTO", help="the photograph: PNG, JPEG, WebP or GIF")
    _settings_flags(refocus.add_argument_group("what to make"), RefocusSettings)
    _run_flags(refocus)

    render = command("render", "blur a photograph whose depth is known, as a lens does")
    render.add_argument("photo", metavar="PHOTO", nargs="?", help="the photograph: PNG, JPEG, WebP or GIF")
    what = render.add_argument_group("what to make")
    _settings_flags(what, RenderSettings)
    _replay_flag(what)
    what.add_argument("--device", default="cpu", metavar="DEVICE", help="cpu or cuda (default: %(default)s)")
    _output_flags(render.add_argument_group("where pictures go"))
    photos.add_commands(command, _shard)

    evaluate = command("eval", "judge how well pictures follow their level and keep their scene")
    judge.add_flags(evaluate)
    what = evaluate.add_argument_group("what to make where there is no folder")
    what.add_argument("--prompts-file", metavar="FILE", help="prompts in place of the 20, as for sweep")
    what.add_argument("--seeds", type=SEED.parse, nargs="+", default=[DEFAULT_SEED], metavar="N",
                      help=f"every prompt is made with each (default: {DEFAULT_SEED})")  # fmt: skip
    _settings_flags(what, GenerateSettings, without=("prompt", "seed", "focus"))
    _run_flags(evaluate)
    evaluate.set_defaults(shard=(1, 1))
    info = command("info", "show how a picture was made")
    info.add_argument("image", metavar="IMAGE", help="a picture that bokehflux wrote")
    info.add_argument("--json", action="store_true", help="as one JSON object")
    train.add_commands(command)
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


def settings_from(args: argparse.Namespace, kind: type[Asked], **given: object) -> Asked:
    """What the flags ask for; `given` stands in for flags. Raises ValueError as the settings do."""
    flags = {name: getattr(args, name) for name in kind.fields() if hasattr(args, name)}
    values = {name: value for name, value in {**flags, **given}.items() if value is not None}
    for name, field in kind.fields().items():
        if field.default is dataclasses.MISSING and name not in values:
            flag = f"--{name} {field.metadata['metavar']}" if field.metadata["help"] else name.upper()
            raise ValueError(f"a {name} is needed: {flag}")
    return kind(**values)


def options_from(args: argparse.Namespace) -> Options:
    """How runs are carried out."""
    from bokehflux.pipeline.run import Options

    return Options(max_rows=args.max_rows, vae_tiling=args.vae_tiling)


def model_from(args: argparse.Namespace) -> str | ModelFiles:
    """The model: by its name, or with parts that were given as files."""
    parts = {name: getattr(args, name) for name in ("vae", "clip", "t5", "tokenizers")}
    if not any(parts.values()):
        return args.model
    from bokehflux.weights.find.resolve import ModelFiles

    paths = {name: Path(path) for name, path in parts.items() if path is not None}
    return ModelFiles({"transformer": args.model, **paths})


def loras_from(args: argparse.Namespace) -> list[tuple[str, float]]:
    """Paths and strengths of the LoRAs. Raises ValueError for a strength that is not a number."""
    loras = []
    for path, *scale in args.loras:
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


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the examples as they are, and folds the description."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else argparse.HelpFormatter._fill_text(self, text, width, indent)


class _Parser(argparse.ArgumentParser):
    """One line for wrong words, with what may have been meant."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"bokehflux: error: {' '.join(message.split())}{self._meant(message)}\n")

    def _meant(self, message: str) -> str:
        wrong = re.search(r"unrecognized arguments: (--[\w-]+)|invalid choice: '([^']*)'", message)
        if wrong is None:
            return ""
        commands = parsers()[1]
        takers = [name for name, parser in commands.items() if wrong[1] in parser._option_string_actions]
        if takers:
            return f" (a flag of {', '.join(takers)})"
        known = [flag for parser in (self, *commands.values()) for flag in parser._option_string_actions]
        known = [*known, *ALIASES] if wrong[1] else re.findall(r"[\w-]+", message[wrong.end() :])
        import difflib  # only a wrong flag needs it

        close = difflib.get_close_matches(wrong[1] or wrong[2], sorted(set(known)), n=1)
        return f" (did you mean {close[0]}?)" if close else ""


class _Flat(argparse.Action):
    """Joins lists: `0 8 28` and `0,8,28` are the same levels."""

    def __call__(
        self, parser: argparse.ArgumentParser, args: argparse.Namespace, values: Any, flag: str | None = None
    ) -> None:
        setattr(args, self.dest, [item for value in values for item in value])


class _Anew(argparse.Action):
    """Collects what is given, in place of the default: a recipe's LoRAs do not join those that are typed."""

    def __call__(
        self, parser: argparse.ArgumentParser, args: argparse.Namespace, values: Any, flag: str | None = None
    ) -> None:
        given = getattr(args, self.dest)
        setattr(args, self.dest, [*([] if given is self.default else given), values])


def _settings_flags(
    parser: argparse._ActionsContainer, kind: type[Checked], without: Sequence[str] = ()
) -> None:
    """A flag for every setting that has a help text."""
    for name, field in kind.fields().items():
        if field.metadata["help"] and name not in without:
            _settings_flag(parser, kind, name)


def _settings_flag(parser: argparse._ActionsContainer, kind: type[Checked], name: str) -> None:
    field = kind.fields()[name]
    about, default = field.metadata, field.default
    one, many = about["kind"].parse, about["kind"].many
    parser.add_argument(
        "--" + (about["flag"] or name).replace("_", "-"),
        dest=name,
        type=_Words(one, about["kind"].commas) if many else one,
        nargs="+" if many else None,
        action=_Flat if many else "store",
        default=None if default is dataclasses.MISSING else default,
        metavar=about["metavar"],
        help=about["help"],
    )


class _Words:
    """ "0,8,28" -> its parts, each as `parse` reads it. commas: whether they part it."""

    def __init__(self, parse: Callable[[str], Any], commas: bool = True) -> None:
        self.parse, self.commas, self.__name__ = parse, commas, parse.__name__

    def __call__(self, word: str) -> list[Any]:
        return [self.parse(part) for part in (word.split(",") if self.commas else [word]) if part]


def _watching_flags(parser: argparse.ArgumentParser) -> None:
    """What can be seen of a run from noise, and from which picture its settings come."""
    group = parser.add_argument_group("what to see meanwhile, and what to make again")
    add = group.add_argument
    # fmt: off
    add("--preview", metavar="FILE", help="a small picture that is written again and again meanwhile")
    add("--preview-every", type=int, default=1, metavar="K",
        help="steps between previews (default: %(default)s)")
    add("--preview-vae", metavar="PATH",
        help="TAEF1's file or folder, for previews with detail (default: a map of colours)")
    # fmt: on
    _replay_flag(group)


def _replay_flag(parser: argparse._ActionsContainer) -> None:
    about = "make this picture again; flags that are given as well take precedence"
    parser.add_argument("--config-from", metavar="IMAGE", help=about)


def _run_flags(parser: argparse.ArgumentParser) -> None:
    """Which model it is, where it runs, and where pictures go."""
    add = parser.add_argument_group("which model").add_argument
    # fmt: off
    add("--model", default="nano", metavar="MODEL",
        help="a bundled model, a folder or file in any known layout, or a repository such as "
             "black-forest-labs/FLUX.1-dev, looked up in the local cache (default: %(default)s)")
    add("--vae", metavar="PATH", help="file of the autoencoder, where it is not the model's own")
    add("--clip", metavar="PATH", help="file of the CLIP-L text encoder, where it is not the model's own")
    add("--t5", metavar="PATH", help="file of the T5-XXL text encoder, where it is not the model's own")
    add("--tokenizers", metavar="FOLDER",
        help="folder that holds tokenizer/ and tokenizer_2/, where they are not the model's own")
    add("--adapter", metavar="PATH", help="folder or file of a bokeh adapter; nano brings its own")
    add("--lora", dest="loras", nargs="+", action=_Anew, default=[], metavar=("PATH", "SCALE"),
        help="a LoRA file and its strength (default: 1); may be given several times, effects add up")
    add("--schedule", choices=("dev", "schnell"),
        help="whose noise schedule, steps and text length (default: the model's own; a transformer without "
             "guidance embedding is taken for schnell)")
    add = parser.add_argument_group("how it runs").add_argument
    add("--max-rows", type=int, metavar="N",
        help="pictures that go through the network together (default: all that fit)")
    add("--vae-tiling", type=_tiling, metavar="{auto,on,off}",
        help="decode pictures in bands, without seams, in less memory (default: where they are large)")
    add("--memory", choices=("auto", "resident", "offload", "stream"), default="auto",
        help="what stays on the GPU; leaner is slower (default: %(default)s)")
    add("--device", metavar="DEVICE", help="cpu, cuda, cuda:N or mps (default: the best there is)")
    add("--dtype", choices=("bfloat16", "float16", "float32"),
        help="default: bfloat16 on a GPU and on a CPU that multiplies it, float32 on other CPUs")
    add("--compute", choices=("dtype", "fp8"), default="dtype",
        help="fp8: the transformer's products in e4m3, faster and in half the memory on Ada and Hopper GPUs, "
             "and a slightly different picture; on a CPU slower (default: %(default)s)")
    group = parser.add_argument_group("where pictures go")
    _output_flags(group)
    add = group.add_argument
    add("--c2pa", nargs=2, metavar=("CERTS", "KEY"),
        help="sign pictures with Content Credentials: a chain of certificates and a private key, both PEM")
    # fmt: on


def _output_flags(parser: argparse._ActionsContainer) -> None:
    # fmt: off
    parser.add_argument("--output", "--output-dir", "--results-dir", default="results", metavar="FOLDER",
        help="where to put pictures; those of earlier runs are kept (default: %(default)s)")
    parser.add_argument("--format", choices=("png", "jpeg", "webp"), default="png",
        help="of the pictures; webp is lossless (default: %(default)s)")
    # fmt: on


def _gpus_flags(parser: argparse.ArgumentParser) -> None:
    """How many GPUs, and what they share."""
    add = parser.add_argument_group("on several GPUs").add_argument
    # fmt: off
    add("--gpus", type=int, default=1, metavar="N",
        help="a process on each of N GPUs of this machine, or N processes with --device cpu; torchrun, where "
             "it started them, says how many (default: %(default)s)")
    add("--split", choices=SPLITS,
        help="what they share: scenes of a sweep, rows (the pictures of a scene) or tokens of every picture "
             "(default: scenes where there are several, else rows, for a single picture tokens)")
    # fmt: on


def _tiling(word: str) -> bool | None:
    if word not in TILING:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(TILING)}, got {word!r}")
    return TILING[word]


def _shard(word: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", word)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"expected I/N with I from 1 to N, such as 2/4, got {word!r}")
    return int(found[1]), int(found[2])


def _sizes_apart(argv: Sequence[str]) -> Iterator[str]:
    """--size 768x512 -> --width 768 --height 512; one number is a square."""
    words = iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag != "--size":
            yield word
            continue
        value = value if equals else next(words, "")
        found = re.fullmatch(r"(\d{1,9})(?:[xX\u00d7](\d{1,9}))?", value)
        if found is None:
            raise ValueError(f"--size: expected 768x512 (width, height) or one number, got {value!r:.40}")
        width, height = found.groups()
        yield from (f"--width={width}", f"--height={height or width}")


def _hyphenated(word: str) -> str:
    """--bokeh_pivot -> --bokeh-pivot, and other names of flags; what follows "=" stays as it is, but for a
    home folder, which shells write out only where it begins a word."""
    name, equals, value = word.partition("=")
    if not re.fullmatch(r"--[A-Za-z][\w-]*", name):
        return word
    name = name.replace("_", "-")
    return ALIASES.get(name, name) + equals + (os.path.expanduser(value) if value[:2] == "~/" else value)
