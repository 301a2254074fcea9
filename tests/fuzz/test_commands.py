"""The command line with anything on it, and prompts with anything in them: one message, and one folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bokehflux.app import cli
from bokehflux.app.arguments import parsers
from bokehflux.app.sweep import grid, read_prompts
from bokehflux.pictures.metadata import read_recipe
from bokehflux.settings import GenerateSettings
from tests import model_files
from tests.fuzz.hostile import assert_one_message, command
from tests.tiny import tiny_pipeline

PIPE = tiny_pipeline()
HASHES = {"model_hash": "h", "adapter": None, "adapter_hash": None, "loras": [], "lora_hashes": []}
NASTY = [
    "",
    " ",
    "-",
    "--",
    "=",
    "%s",
    "{}",
    "\0",
    "\n",
    "\x1b[2J",
    "\udce9",
    "\u202e",
    "夜",
    "..",
    "../x",
    "/",
    ".",
    "a/b",
    "/dev/zero",
    "/proc/self/mem",
    "C:\\x",
    "\\\\host\\share\\x",
    "nul",
    "x" * 5000,
    "9" * 400,
    "9" * 5000,
    "nan",
    "inf",
    "-inf",
    "1e999",
    "-1",
    "0",
    "1",
    "31",
    "0x10",
    "1_0",
    "٣",
    "@x",
    "cuda:99",
    "foo",
]
ACTIONS = [action for parser in parsers()[1].values() for action in parser._actions]
FLAGS = sorted({flag for action in ACTIONS for flag in action.option_strings} - {"-h", "--help"})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    model_files.write_official(root, model_files.states())
    model_files.write_tokenizers(root)
    return root


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No models of this machine, and no network: `fetch` is stopped at its door."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("BOKEHFLUX_MODELS", "FLUX_MODEL", "FLUX_AE", "FLUX_DEV", "FLUX_SCHNELL", "AE"):
            patch.delenv(name, raising=False)
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hub")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr("bokehflux.app.doctor.report", lambda: ["well"])
        patch.setattr("bokehflux.pipeline.load.load", _load)
        yield


_REAL_LOAD = __import__("bokehflux.pipeline.load", fromlist=["load"]).load


def _load(*args: Any, **kwargs: Any) -> Any:
    """Loads for real, and then hands out a model that is quick."""
    _REAL_LOAD(*args, **kwargs)
    return PIPE


@settings(max_examples=200)
@given(
    st.sampled_from([*cli.COMMANDS, "", "generat"]),
    st.lists(
        st.tuples(st.sampled_from(FLAGS), st.lists(st.sampled_from(NASTY) | st.text(max_size=4), max_size=2)),
        max_size=4,
    ),
    st.booleans(),
)
@example("generate", [("--prompt", ["p"]), ("--height", ["1000000000"])], True)
@example("generate", [("--prompt", ["p"]), ("--num-inference-steps", ["1000000000000"])], True)
@example("sweep", [("--prompts-file", ["/dev/zero"])], True)
def test_any_command_line_ends_well_or_in_one_message(tmp_path_factory, name, flags, complete):
    folder = tmp_path_factory.mktemp("cli")
    words = [
        word for flag, values in flags for word in (flag, *values) if flag not in ("--output", "--output-dir")
    ]
    words += ["--prompt", "p"] if complete and name == "generate" and "--prompt" not in words else []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        code, _, err = command(name, *words)
    # 1: the system itself refuses a name (too long), in its own words.
    assert code in (0, 2) or (code == 1 and "too long" in err), err
    if code:
        first, *listed = err.removesuffix("\n").split("\n")
        assert first.startswith("bokehflux: error: ") and err.endswith("\n"), err
        assert all(line.startswith("  - ") for line in listed), err


@pytest.mark.parametrize("flag", ["--model", "--adapter", "--lora"])
def test_the_home_of_nobody(tmp_path, monkeypatch, model, flag):
    monkeypatch.chdir(tmp_path)
    code, _, err = command("generate", "--prompt", "p", "--model", str(model), flag, "~nosuchuser/x")
    assert code == 2
    assert_one_message(err)


@pytest.mark.parametrize("device", ["meta", "xla", "privateuseone"])
def test_devices_that_nobody_meant(tmp_path, monkeypatch, model, device):
    monkeypatch.chdir(tmp_path)
    code, _, err = command("generate", "--prompt", "p", "--model", str(model), "--device", device)
    assert code == 2
    assert_one_message(err)


# Prompts


@settings(max_examples=100)
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_file_of_prompts(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("prompts") / "p.txt"
    path.write_bytes(content)
    try:
        asked = read_prompts(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert asked and grid(GenerateSettings(prompt="a cup"), asked, [1])


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no /dev/zero")
def test_a_file_of_prompts_without_end(monkeypatch):
    monkeypatch.setattr("bokehflux.app.sweep.MAX_PROMPTS_BYTES", 1000)
    with pytest.raises(ValueError, match="larger than 1000 bytes"):
        read_prompts(Path("/dev/zero"))


PROMPTS = st.sampled_from(
    [
        "../../../../etc/cron.d/x",
        "/etc/passwd",
        "..",
        ".",
        "~",
        "~root",
        "CON",
        "nul.png",
        "aux",
        "a\\..\\b",
        "C:\\x",
        "\0",
        "\x1b]0;x\x07",
        "x" * 20_000,
        "\U0001f33c" * 300,
        "\u202egnp.exe",
        "-rf",
        "--output=/",
        "$(touch x)",
        "%2e%2e%2f",
        "a\nb",
        "</script><script>alert(1)</script>",
        "@@DATA@@",
        "bokeh-00.0",
        "index.html",
        ".",
    ]
) | st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20).filter(str.strip)


def everything(folder: Path) -> set[str]:
    return {
        os.path.relpath(os.path.join(root, name), folder)
        for root, _, names in os.walk(folder)
        for name in names
    }


@settings(max_examples=12)
@given(prompt=PROMPTS, seed=st.integers(0, 2**64 - 1), kind=st.sampled_from(["png", "webp"]))
@example("../../../../etc/cron.d/x", 1, "png")
@example("x" * 20_000, 2**64 - 1, "png")
@example("\0", 0, "webp")
def test_whatever_is_asked_for_stays_in_the_output_folder(tmp_path_factory, prompt, seed, kind):
    """Both commands, all their files: pictures, sheet, animations, page."""
    outer = tmp_path_factory.mktemp("outer")
    (outer / "work").mkdir()
    flags = ["--bokeh-targets", "0", "9", "--num-inference-steps", "1", "--format", kind, "--output", "a/out"]
    flags += ["--height", "16", "--width", "16"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(outer / "work")
        patch.setattr("bokehflux.pipeline.load.load", lambda *_, **__: PIPE)
        for argv in (["generate", f"--prompt={prompt}", f"--seed={seed}"],
                     ["sweep", f"--prompt={prompt}", "--seeds", f"{seed}"]):  # fmt: skip
            code, out, err = command(*argv, *flags)
            assert code == 0, err
            for line in out.splitlines():
                assert Path(line).is_file() and Path(line).resolve().is_relative_to(
                    outer / "work" / "a" / "out"
                )
    found = everything(outer)
    assert len(found) >= 9 and all(name.startswith("work/a/out/") for name in found)
    # Names that every file system takes.
    parts = {part for name in found for part in Path(name).parts[3:]}
    assert all(part.isascii() and len(part) < 100 and not set(part) & set('<>:"/\\|?*') for part in parts)
    assert not {part.split(".")[0].upper() for part in parts} & {"CON", "PRN", "AUX", "NUL", "COM1", "LPT1"}
    still = next(name for name in found if "bokeh-00.0" in name)
    assert read_recipe(outer / still)["prompt"] == prompt
