"""Commands with a tiny model, for the faults that befall them; as a program, fills a disk."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from bokehflux.app import cli
from bokehflux.pipeline import run
from tests.tiny import tiny_pipeline

PIPE = tiny_pipeline()
Outcome = tuple[int, str, str]
"""Exit code, stdout, stderr."""


def generate(
    folder: Path | None, output: str, side: int = 32, during: Callable[[], None] | None = None
) -> Outcome:
    """Two levels, their pivot and sheet, in this folder if it is None. during: called while they are made."""
    return _run(folder, during, "generate", "--prompt", "a cup", "--output", output, *_flags(side))


def sweep(
    folder: Path | None, output: str, seeds: int = 1, during: Callable[[], None] | None = None
) -> Outcome:
    """As many scenes as seeds, with all their views."""
    numbers = [str(seed) for seed in range(seeds)]
    return _run(
        folder, during, "sweep", "--prompt", "a cup", "--output", output, "--seeds", *numbers, *_flags(32)
    )


def _flags(side: int) -> list[str]:
    size = ["--height", str(side), "--width", str(side)]
    return [*size, "--bokeh-targets", "0", "9", "--bokeh-pivot", "5", "--num-inference-steps", "1"]


def _run(folder: Path | None, during: Callable[[], None] | None, *argv: str) -> Outcome:
    made = run.execute

    def watched(*args: Any, **kwargs: Any) -> Any:
        result = made(*args, **kwargs)
        if during is not None:
            during()
        return result

    out, err = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch("bokehflux.pipeline.load.load", lambda *_, **__: PIPE))
        stack.enter_context(mock.patch("bokehflux.app.watched.execute", watched))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        if folder is not None:
            stack.callback(os.chdir, os.getcwd())
            os.chdir(folder)
        code = cli.main(argv)
    return code, out.getvalue(), err.getvalue()


if __name__ == "__main__":
    code, out, err = sweep(Path(sys.argv[1]), "out", seeds=40)
    print((code, len({Path(line).parent for line in out.splitlines()}), err))
