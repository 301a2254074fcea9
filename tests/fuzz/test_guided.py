"""What `guided.py` gives to atheris: its examples are valid, damaged copies of them refused in words."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from bokehflux.app.arguments import parse
from bokehflux.pictures.metadata import read_recipe
from bokehflux.weights.files.checkpoint import open_checkpoint
from bokehflux.weights.lora.read import read_lora
from tests.fuzz import guided
from tests.tiny import MMDIT

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's about broken EXIF
@pytest.mark.parametrize("target", guided.TARGETS)
def test_damaged_examples(target: str) -> None:
    read, suffix = guided.TARGETS[target]
    draw = random.Random(target)
    for example in guided.examples(target):
        read(example, suffix)
        for _ in range(60):
            data = bytearray(example)
            for _ in range(draw.randint(1, 4)):
                place = draw.randrange(len(data))
                data[place : place + draw.randint(0, 3)] = bytes(
                    draw.choices(range(256), k=draw.randint(0, 3))
                )
            read(bytes(data), suffix)


@pytest.mark.parametrize("target", ["safetensors", "gguf", "png", "jpeg", "webp", "lora", "command"])
def test_examples_are_valid(target: str) -> None:
    """An example that is refused at its first byte would teach atheris nothing."""
    (example, *_), (_, suffix) = guided.examples(target), guided.TARGETS[target]
    if target == "command":
        assert parse(["generate", *example.decode().splitlines()]).bokeh_pivot == 4
        return
    with guided.file_of(example, suffix) as path:
        if target == "lora":
            with guided.file_of(b"", ".safetensors") as tensors:
                pytest.raises(ValueError, read_lora, tensors, {"transformer": MMDIT})
        elif suffix in (".safetensors", ".gguf"):
            opened = open_checkpoint(path)
            assert "a" in opened.tensors and opened.read("a").numel() == 6
        else:
            assert read_recipe(path)["prompt"] == "a cup"


def test_it_runs_where_atheris_is_installed() -> None:
    pytest.importorskip("atheris", reason="atheris is not installed")
    command = [sys.executable, "-m", "tests.fuzz.guided", "config", "--seconds", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
