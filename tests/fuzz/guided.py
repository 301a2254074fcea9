"""Coverage-guided fuzzing of what reads strangers' bytes, with Google's atheris where it is installed.

    pip install atheris && python -m tests.fuzz.guided TARGET [--seconds 60]

atheris watches which branches an input reaches and mutates those that reach new ones. Whatever is not refused
in words ends the run with a traceback and the input. It begins with valid examples; without atheris the tests
(`test_guided.py`) run these and damaged copies of them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MAX_BYTES = 4096


@contextlib.contextmanager
def file_of(data: bytes, suffix: str) -> Iterator[Path]:
    """The bytes as a file, in memory where the system has such a place."""
    descriptor, name = tempfile.mkstemp(suffix, dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        yield Path(name)
    finally:
        os.unlink(name)


def checkpoint(data: bytes, suffix: str) -> None:
    from bokehflux.weights.describe import describe
    from bokehflux.weights.files.checkpoint import CheckpointError, open_checkpoint

    with file_of(data, suffix) as path:
        try:
            opened = open_checkpoint(path)
            for name in opened.tensors:
                assert opened.read(name).nbytes <= len(data)
            describe(path)
        except CheckpointError as error:
            assert all(problem.strip() for problem in error.problems)


def picture(data: bytes, suffix: str) -> None:
    from bokehflux.app.replay import defaults_from

    with file_of(data, suffix) as path, contextlib.suppress(ValueError):
        assert defaults_from(str(path), "sweep")["seeds"]


def lora(data: bytes, _: str) -> None:
    """A line is the name of a tensor; its last character, if that is a digit, the size of both sides."""
    import torch

    from bokehflux.weights.files.checkpoint import CheckpointError
    from bokehflux.weights.files.write import save
    from bokehflux.weights.lora.read import read_lora
    from tests.tiny import MMDIT

    names = data.decode("utf-8", "replace").splitlines()[:20]
    sizes = {name: int(name[-1]) if name[-1:] in set("0123456789") else 2 for name in names}
    with file_of(b"", ".safetensors") as path:
        save(path, {name: torch.ones(size, size) for name, size in sizes.items() if name != "__metadata__"})
        with contextlib.suppress(CheckpointError):
            read_lora(path, {"transformer": MMDIT})


def config(data: bytes, _: str) -> None:
    """All readers of a JSON file, one after the other."""
    from bokehflux.weights.files.checkpoint import read_json
    from bokehflux.weights.find import snapshot
    from bokehflux.weights.tables import clip, flux, scheduler, t5, vae

    readers: tuple[Callable[[Any], object], ...] = (
        flux.CONFIG.from_json, vae.CONFIG.from_json, t5.CONFIG.from_json, clip.CONFIG.from_json,
        scheduler.CONFIG.from_json, snapshot.card(True).from_json,
    )  # fmt: skip
    with file_of(data, ".json") as path:
        try:
            value = read_json(path)
        except ValueError:
            return
        for read in readers:
            with contextlib.suppress(ValueError):
                read(value)


def command(data: bytes, _: str) -> None:
    """Words of a command line, one a line; a model is never loaded."""
    from bokehflux.app.arguments import model_from, parse, settings_from
    from bokehflux.settings import GenerateSettings

    words = ["generate", *data.decode("utf-8", "surrogateescape").splitlines()[:30]]
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            args = parse(words)
            model_from(args)
            settings_from(args, GenerateSettings, prompt=args.prompt or "")
        except ValueError:
            pass
        except SystemExit as stop:
            assert stop.code in (0, 2)


def examples(target: str) -> list[bytes]:
    """Valid inputs of a target."""
    import torch
    from PIL import Image

    from bokehflux.pictures import metadata
    from bokehflux.settings import GenerateSettings
    from bokehflux.weights.files.write import save
    from bokehflux.weights.tables import flux, vae
    from tests.tiny import MMDIT, VAE

    if target == "safetensors":
        with file_of(b"", ".safetensors") as path:
            save(path, {"a": torch.ones(2, 3), "b.weight": torch.ones(4).bfloat16()})
            return [path.read_bytes()]
    if target == "gguf":
        key, name = b"general.architecture", b"a"
        head = b"GGUF" + struct.pack("<IQQ", 3, 1, 1)
        head += struct.pack("<Q", len(key)) + key + struct.pack("<IQ", 8, 4) + b"flux"
        head += struct.pack("<Q", len(name)) + name + struct.pack("<IQQIQ", 2, 2, 3, 0, 0)  # 2 x 3 float32
        return [head + bytes(-len(head) % 32) + bytes(24)]
    if target in metadata.FORMATS:
        settings = GenerateSettings(prompt="a cup", bokeh_targets=(0.0, 9.0))
        recipe = {**settings.recipe(), "model": "nano", "max_rows": 2}
        return [metadata.encode(Image.new("RGB", (4, 4)), recipe, target)]
    if target == "lora":
        stem = "transformer.proj_out.lora_"
        return [
            f"{stem}A.weight\n{stem}B.weight".encode(),
            b"lora_unet_img_in.lora_down.weight\nlora_te1_x.alpha",
        ]
    if target == "config":
        return [json.dumps(d).encode() for d in (flux.CONFIG.to_json(MMDIT), vae.CONFIG.to_json(VAE))]
    return [
        b"--prompt\na cup\n--bokeh-targets\n0\n9\n--bokeh_pivot\n4",
        b"--lora\nx\n0.5\n--prompt=p",
    ]


TARGETS: dict[str, tuple[Callable[[bytes, str], None], str]] = {
    "safetensors": (checkpoint, ".safetensors"), "gguf": (checkpoint, ".gguf"),
    "png": (picture, ".png"), "jpeg": (picture, ".jpg"), "webp": (picture, ".webp"),
    "lora": (lora, ""), "config": (config, ""), "command": (command, ""),
}  # fmt: skip
"""Name -> what reads the bytes, and how a file of them is called."""


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60)
    args = parser.parse_args(argv)
    import atheris

    with atheris.instrument_imports(include=["bokehflux"]):
        import bokehflux.app.replay
        import bokehflux.weights.describe
        import bokehflux.weights.lora.read  # noqa: F401
    read, suffix = TARGETS[args.target]
    with tempfile.TemporaryDirectory() as corpus:
        for number, data in enumerate(examples(args.target)):
            (Path(corpus) / str(number)).write_bytes(data)
        flags = [f"-max_total_time={args.seconds}", f"-max_len={MAX_BYTES}", "-print_final_stats=1"]
        atheris.Setup([sys.argv[0], *flags, corpus], lambda data: read(data, suffix))
        atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
