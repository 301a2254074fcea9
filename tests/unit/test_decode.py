"""Pictures of a run: when they are made in bands, what becomes of them out of memory and after Ctrl-C."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bokehflux.app import cli
from bokehflux.models import tiling
from bokehflux.pictures.files import uninterrupted
from bokehflux.pictures.metadata import read_recipe
from bokehflux.pipeline.decode import decode_pictures, wants_tiling
from bokehflux.pipeline.memory import place
from bokehflux.pipeline.run import Options, Result, Stopped, execute
from bokehflux.sampling.latents import LatentGrid
from tests.tiny import tiny_pipeline

GRID = LatentGrid(height_px=32, width_px=48)


def latents(rows: int) -> torch.Tensor:
    return torch.randn(rows, GRID.num_tokens, 64)


def test_large_pictures_are_tiled() -> None:
    def tiled(mode: Any, height: int, width: int) -> bool:
        return wants_tiling(mode, LatentGrid(height_px=height, width_px=width))

    for mode in ("resident", "offload"):
        assert not tiled(mode, 1024, 1024) and tiled(mode, 1040, 1024)
    assert not tiled("stream", 512, 512) and tiled("stream", 512, 528)


def test_the_same_pictures_either_way() -> None:
    vae, x = tiny_pipeline().vae, latents(2)
    whole = decode_pictures(vae, x, x[0], GRID, tiled=False)
    bands = decode_pictures(vae, x, x[0], GRID, tiled=True)
    assert (whole.tiled, bands.tiled) == (False, True)
    for a, b in zip([*whole.images, whole.pivot], [*bands.images, bands.pivot], strict=True):
        difference = np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int))
        assert difference.max() <= 1 and (difference > 0).mean() < 0.01


@pytest.mark.parametrize("asked", [None, True, False])
def test_a_run_says_how_it_was_decoded(asked: bool | None) -> None:
    pipe = tiny_pipeline()
    if asked is None:  # streamed, and large enough
        pipe = dataclasses.replace(
            pipe, memory=place(pipe.transformer, (), pipe.vae, "stream", torch.device("cpu"))
        )
        made = pipe.generate("p", num_inference_steps=1, height=512, width=528)
    else:
        made = pipe.generate("p", num_inference_steps=1, vae_tiling=asked)
    assert made.record.provenance.vae_tiling is (asked is not False)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_out_of_memory_goes_on_in_bands(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    vae, x, calls = tiny_pipeline().vae, latents(3), []
    expected = decode_pictures(vae, x, None, GRID, tiled=True)

    def full(*_: object) -> None:
        calls.append(1)
        raise error

    hook = vae.decoder.norm_out.register_forward_hook(full)  # bands do not call it
    with caplog.at_level(logging.WARNING):
        made = decode_pictures(vae, x, None, GRID, tiled=False)
    hook.remove()
    assert made.tiled and len(calls) == 1, "tried once, not for every picture"
    assert [i.tobytes() for i in made.images] == [i.tobytes() for i in expected.images]
    assert caplog.messages == ["out of memory while decoding: going on in bands (VAE tiling)"]


def test_other_errors_are_errors() -> None:
    vae = tiny_pipeline().vae
    hook = vae.decoder.norm_out.register_forward_hook(lambda *_: torch.zeros(2) + torch.zeros(3))
    with pytest.raises(RuntimeError, match="size of tensor"):
        decode_pictures(vae, latents(1), None, GRID, tiled=False)
    hook.remove()


# Ctrl-C


def stop_at(monkeypatch: pytest.MonkeyPatch, decodes: int) -> None:
    """Press Ctrl-C when decoding number `decodes` (from 1) begins."""
    seen: list[int] = []
    real = tiling.AutoencoderKL.decode

    def decode(self: Any, z: torch.Tensor) -> torch.Tensor:
        seen.append(1)
        if len(seen) == decodes:
            raise KeyboardInterrupt
        return real(self, z)

    monkeypatch.setattr(tiling.AutoencoderKL, "decode", decode)


@pytest.mark.parametrize("finished", [0, 1, 2])
def test_stopped_holds_what_is_finished(monkeypatch: pytest.MonkeyPatch, finished: int) -> None:
    """The pivot is decoded first, and kept even where no target is finished."""
    whole = tiny_pipeline().generate("p", [0, 9, 30], bokeh_pivot=15)
    stop_at(monkeypatch, finished + 2)
    with pytest.raises(KeyboardInterrupt) as stopped:
        tiny_pipeline().generate("p", [0, 9, 30], bokeh_pivot=15)
    assert isinstance(stopped.value, Stopped)
    result = stopped.value.result
    assert result.record == whole.record
    assert [i.tobytes() for i in result.images] == [i.tobytes() for i in whole.images[:finished]]
    assert result.pivot_image is not None and whole.pivot_image is not None
    assert result.pivot_image.tobytes() == whole.pivot_image.tobytes()
    assert torch.equal(result.latents, whole.latents)


def test_stopped_without_a_pivot(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tiny_pipeline().generate("p", [0, 9])
    stop_at(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt) as stopped:
        tiny_pipeline().generate("p", [0, 9])
    assert isinstance(stopped.value, Stopped)
    (image,) = stopped.value.result.images
    assert image.tobytes() == whole.images[0].tobytes()


def test_nothing_finished_is_an_ordinary_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt) as stopped:
        tiny_pipeline().generate("p", [0, 30], bokeh_pivot=15)
    assert not isinstance(stopped.value, Stopped)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr("bokehflux.pipeline.load.load", lambda *_, **__: tiny_pipeline())
    monkeypatch.chdir(tmp_path)
    return tmp_path


ARGV = ["--prompt", "a cup", "--bokeh-targets", "0", "4.2", "30", "--bokeh-pivot", "15", "--output", "my out"]


def test_generate_keeps_finished_pictures(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["generate", *ARGV[:-1], "whole"]) == 0
    capsys.readouterr()
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        assert cli.main(["generate", *ARGV]) == 130
    out, err = capsys.readouterr()
    names = ["bokeh-00.0.png", "pivot-bokeh-15.0.png"]
    assert out.splitlines() == [f"my out/{name}" for name in names]
    again = "--config-from 'my out/bokeh-00.0.png' --bokeh-targets 4.2 30 --output 'my out'"
    assert err == (
        "bokehflux: interrupted; 2 pictures are finished and kept in my out; levels 4.2, 30 are missing: "
        f"bokehflux generate {again}\n"
    )
    assert sorted(p.name for p in Path("my out").iterdir()) == sorted(names), "and nothing else"
    for name in names:
        assert read_recipe(f"my out/{name}") == read_recipe(f"whole/{name}")
        with Image.open(f"my out/{name}") as a, Image.open(f"whole/{name}") as b:
            assert a.tobytes() == b.tobytes()
    # The command that it names makes the rest.
    argv = ["generate", "--config-from", "my out/bokeh-00.0.png", "--bokeh-targets", "4.2", "30"]
    assert cli.main([*argv, "--output", "my out"]) == 0
    assert {"bokeh-04.2-run2.png", "bokeh-30.0-run2.png"} <= {p.name for p in Path("my out").iterdir()}


def test_a_sweep_keeps_levels_of_an_unfinished_scene(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["sweep", *ARGV, "--seeds", "1", "2", "--num-inference-steps", "1"]
    with monkeypatch.context() as patch:
        stop_at(patch, 4 + 4)  # the last level of the second scene
        assert cli.main(argv) == 130
    assert capsys.readouterr().err == (
        "bokehflux: interrupted; 1 of 2 scenes are finished and kept in my out, and 2 of the levels of the "
        "next; the same command continues\n"
    )
    stop_at(monkeypatch, 99)
    assert cli.main(argv) == 0
    there = [f"bokehflux: scene {n}: {kept} pictures were there already" for n, kept in ((1, 4), (2, 3))]
    assert capsys.readouterr().err.splitlines() == there


@pytest.mark.parametrize("preview", [False, True])
def test_ctrl_c_between_steps_says_how_far_it_was(
    world: Path, preview: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(model: Any, plan: Any, options: Options) -> Result:
        def watch(info: Any) -> None:
            assert options.on_step is not None
            options.on_step(info)
            if info.step == 3:
                raise KeyboardInterrupt

        return execute(model, plan, dataclasses.replace(options, on_step=watch))

    monkeypatch.setattr("bokehflux.app.watched.execute", run)
    flags = ["--preview", "now.png", "--preview-every", "9"] if preview else []
    assert cli.main(["generate", *ARGV, *flags]) == 130
    shown = ", which now.png shows" if preview else ""
    out, err = capsys.readouterr()
    assert err == f"bokehflux: interrupted; no picture is finished, step 4 of 5 was done{shown}\n"
    assert out == "" and list(Path("my out").iterdir()) == []
    assert not preview or read_recipe("now.png")["step"] == 4


def test_ctrl_c_while_files_are_written_waits_for_them(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real signal, while the first file is being flushed."""
    import os
    import signal

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    real, pressed = os.fsync, []

    def fsync(descriptor: int) -> None:
        if not pressed:
            pressed.append(1)
            os.kill(os.getpid(), signal.SIGINT)
        real(descriptor)

    monkeypatch.setattr("bokehflux.pictures.files.os.fsync", fsync)
    assert cli.main(["generate", *ARGV]) == 130
    out, err = capsys.readouterr()
    assert err == "bokehflux: interrupted; all pictures are finished and kept in my out\n"
    assert len(out.splitlines()) == 5 and all(Path(line).is_file() for line in out.splitlines())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    pressed.clear()
    assert cli.main(["sweep", *ARGV, "--seeds", "1", "2"]) == 130
    out, err = capsys.readouterr()
    assert "1 of 2 scenes are finished" in err and len(out.splitlines()) == 7
    assert (Path("my out") / "index.html").read_text().count('"curve": ') == 1


def test_uninterrupted_in_another_thread_does_nothing() -> None:
    import threading

    said: list[str] = []

    def work() -> None:
        with uninterrupted():
            said.append("worked")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert said == ["worked"]
