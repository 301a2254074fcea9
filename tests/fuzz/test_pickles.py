"""No pickle is ever executed: payloads wherever a file may be named, and a watch on what Python does."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests import model_files
from tests.faults.child import forked, needs_linux
from tests.fuzz.hostile import command

FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "subprocess.Popen",
    "socket.connect",
    "socket.getaddrinfo",
    "pickle.find_class",
)
"""Audit events (https://docs.python.org/3/library/audit_events.html) that no file may cause."""


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def payloads(marker: Path) -> dict[str, bytes]:
    """Every kind of file that some loader would unpickle."""
    bare = pickle.dumps(Payload(marker), protocol=2)
    made: dict[str, bytes] = {"pickle": bare, "old pickle": pickle.dumps(Payload(marker), protocol=0)}
    for name, zipped in (("torch zip", True), ("torch legacy", False)):
        buffer = io.BytesIO()
        torch.save({"a": torch.ones(2), "b": Payload(marker)}, buffer, _use_new_zipfile_serialization=zipped)
        made[name] = buffer.getvalue()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", bare)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/.format_version", "1")
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/code/__torch__.py", f"import os; os.mkdir({str(marker)!r})")
    made["torchscript"] = buffer.getvalue()
    # numpy's object arrays are pickles, too.
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n"
    made["npy"] = b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header + bare
    return made


def test_the_payload_is_alive(tmp_path):
    """Otherwise the tests below would prove nothing."""
    for name, content in payloads(tmp_path / "ran").items():
        if name in ("pickle", "old pickle"):
            pickle.loads(content)
        elif name.startswith("torch "):
            torch.load(io.BytesIO(content), weights_only=False)
        else:
            continue
        (tmp_path / "ran").rmdir()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    model_files.write_official(root, model_files.states())
    model_files.write_tokenizers(root)
    return root


NAMES = ["x.bin", "x.pt", "x.safetensors", "x.gguf", "x.png"]
BESIDE = ["pytorch_model.bin", "diffusion_pytorch_model.bin", "model.pt", "tokenizer.pkl", "modeling.py",
          "added_tokens.json"]  # fmt: skip
"""What other loaders would take, some of them before a .safetensors file."""


@needs_linux
@pytest.mark.parametrize("kind", list(payloads(Path())))
def test_no_payload_runs_wherever_it_is_put(tmp_path, model, kind):
    marker = tmp_path / "ran"
    content = payloads(marker)[kind]

    def everything() -> int:
        events: list[str] = []
        os.chdir(tmp_path)
        os.environ["HF_HOME"] = str(tmp_path / "hub")
        for name in ("BOKEHFLUX_MODELS", "FLUX_MODEL", "FLUX_AE", "FLUX_DEV", "FLUX_SCHNELL", "AE"):
            os.environ.pop(name, None)
        few = ["--output", "out", "--device", "cpu", "--num-inference-steps", "1"]
        make, small = ["generate", "--prompt", "p", *few], ["--height", "16", "--width", "16"]
        calls: list[list[str]] = []
        for name in NAMES:
            folder = Path("given") / name
            folder.mkdir(parents=True)
            (folder / name).write_bytes(content)
            (folder / "config.json").write_text("{}")
            for path in (str(folder / name), str(folder)):
                calls += [
                    ["inspect", path],
                    [*make, "--model", path],
                    [*make, "--model", str(model), "--adapter", path],
                    [*make, "--model", str(model), "--lora", path],
                ]
            calls += [["info", str(folder / name)], [*make, "--config-from", str(folder / name)]]
            # An old pickle is lines of text, which are prompts.
            given = ["--model", str(model), "--prompts-file", str(folder / name), "--bokeh-targets", "0"]
            calls += [["sweep", *given, *few, *small]]
        # In place of each file of a model, and beside all of them.
        every = sorted(p.relative_to(model) for p in model.rglob("*") if p.is_file())
        for number, file in enumerate([*every, None]):
            copy = Path(f"copy-{number}")
            shutil.copytree(model, copy)
            if file is None:
                for name in BESIDE:
                    for folder in {path.parent for path in every}:
                        (copy / folder / name).write_bytes(content)
            else:
                (copy / file).write_bytes(content)
            calls += [
                ["inspect", str(copy)],
                [*make, "--model", str(copy), *small],
            ]
        index = Path("index")
        index.mkdir()
        (index / "x.bin").write_bytes(content)
        for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
            (index / name).write_text(json.dumps({"weight_map": {"a": "x.bin"}}))
            calls += [["inspect", str(index / name)], [*make, "--model", str(index / name)]]
        watching = []
        sys.addaudithook(lambda event, _: events.append(event) if watching and event in FORBIDDEN else None)
        for argv in calls:
            watching.append(1)
            code, _, err = command(*argv)
            watching.clear()
            assert not events, (argv, events)
            assert not marker.exists(), argv
            assert code in (0, 2), (argv, err)
        return len(calls)

    code, said = forked(everything)
    assert code == 0, said
    assert int(said) > 60 and not marker.exists()


@needs_linux
def test_metadata_holds_no_payload_either(tmp_path):
    """Where pickles hide in pictures and headers: as text, which stays text."""
    marker = tmp_path / "ran"
    text = pickle.dumps(Payload(marker), protocol=0).decode("ascii")
    info = PngInfo()
    info.add_text(
        "bokehflux", json.dumps({"prompt": f"__import__('os').mkdir({str(marker)!r})", "loras": text})
    )
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png", pnginfo=info)
    assert command("info", str(tmp_path / "x.png"))[0] == 0
    assert command("generate", "--config-from", str(tmp_path / "x.png"))[0] == 2
    assert not marker.exists()


@needs_linux
def test_making_a_picture_opens_no_connection_and_runs_no_program(tmp_path, model):
    """Nothing leaves the machine: not a name is looked up while a model is loaded, run and shown."""

    def everything() -> str:
        events: list[str] = []
        os.chdir(tmp_path)
        sys.addaudithook(lambda event, _: events.append(event) if event in FORBIDDEN else None)
        size = ["--height", "16", "--width", "16", "--num-inference-steps", "1", "--device", "cpu"]
        for argv in (
            ["generate", "--prompt", "p", "--model", str(model), *size],
            ["sweep", "--prompt", "p", "--model", str(model), "--bokeh-targets", "0", *size],
            ["generate", "--prompt", "p", "--model", "black-forest-labs/FLUX.1-nothing", *size],
            ["info", "results/plain.png"],
            ["inspect", str(model)],
        ):
            command(*argv)
        assert Path("results/plain.png").is_file()
        return " ".join(events)

    code, said = forked(everything)
    assert (code, said) == (0, "")
