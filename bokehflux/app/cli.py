"""The command `bokehflux`: which command it is, and how every one ends.

Bad input ends with one message on stderr and exit code 2, a failing disk or broken weights with 1, Ctrl-C
with 130, SIGTERM and SIGHUP with 128 plus their number. A message is one line; what it lists (places, missing
tensors) follows, a line each.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

from bokehflux.app import making, photos
from bokehflux.app import train as training
from bokehflux.app.arguments import parse
from bokehflux.app.processes import inside
from bokehflux.app.terminal import finish, plain, prepare, say, show

# Nothing that needs torch at the top: --help, --version and mistyped flags must not wait for it.


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code. argv: arguments without the program's name."""
    prepare()
    logging.basicConfig(format="bokehflux: %(message)s")
    with ended_like_ctrl_c() as ended:
        try:
            args = parse(sys.argv[1:] if argv is None else argv)
            return COMMANDS[args.command](args)
        except ValueError as error:
            say(f"error: {_said(error)}")
            return 2
        except (OSError, ArithmeticError, MemoryError) as error:
            # ArithmeticError: NaN in weights or activations. MemoryError: at loading; later a ValueError.
            say(f"error: {_said(error) or 'out of memory'}")  # Python's own MemoryError says nothing
            return 1
        except KeyboardInterrupt as stop:
            say(f"interrupted{stop}")
            return 128 + (ended[0] if ended else signal.SIGINT)
        finally:
            finish()


@contextlib.contextmanager
def ended_like_ctrl_c() -> Iterator[list[int]]:
    """Inside, SIGTERM and SIGHUP do what Ctrl-C does; yields the one that came. An ignored one stays so."""
    ended: list[int] = []

    def end(number: int, _: object) -> None:
        ended.append(number)
        raise KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread():
        # A launcher ends processes that may wait for one that is gone: they end at once.
        names = () if inside() else ("SIGTERM", "SIGHUP")
        for number in (getattr(signal, name) for name in names if hasattr(signal, name)):
            if signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, end)
    try:
        yield ended
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def info(args: argparse.Namespace) -> int:
    """The recipe inside a picture, one line each."""
    from bokehflux.pictures.metadata import read_recipe, shown

    recipe = shown(read_recipe(args.image))
    if args.json:
        show([json.dumps(recipe, indent=2)])
    else:
        show(plain(f"{name}: {value}") for name, value in recipe.items())
    return 0


def doctor(args: argparse.Namespace) -> int:
    """What this machine has and lacks, line by line."""
    from bokehflux.app.doctor import report

    show(report())
    return 0


def inspect(args: argparse.Namespace) -> int:
    """What a checkpoint file is."""
    from bokehflux.weights.describe import describe

    show(map(plain, describe(args.file).split("\n")))
    return 0


def fetch(args: argparse.Namespace) -> int:
    """Downloads a model and prints its folder: the only command with a network."""
    from bokehflux.app.fetch import TOKENIZERS_ONLY
    from bokehflux.app.fetch import fetch as download

    patterns = TOKENIZERS_ONLY if args.tokenizers_only else None
    show([str(download(args.name, patterns=patterns, revision=args.revision))])
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "generate": making.generate, "sweep": making.sweep, "refocus": making.refocus,
    "render": making.render, "eval": making.evaluate,
    "info": info, "exif": photos.exif, "annotate": photos.annotate,
    "latents": training.latents, "train": training.train, "doctor": doctor, "inspect": inspect,
    "fetch": fetch,
}  # fmt: skip


def _said(error: Exception) -> str:
    """A message in one line, and one more for each thing that it lists ("  - ...")."""
    parts = str(error).split("\n  - ")
    return "\n  - ".join(plain(" ".join(part.split())) for part in parts)


if __name__ == "__main__":
    sys.exit(main())
