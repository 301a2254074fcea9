"""The progress line: phases, time left, silence where nobody watches."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence

import pytest
import torch

from bokehflux.conditioning import Conditioning
from bokehflux.configs import T5Config
from bokehflux.models.t5 import T5Encoder
from bokehflux.pipeline.progress import Progress
from bokehflux.sampling.samplers import StepInfo
from tests.tiny import FakeText, tiny_pipeline


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def lines(stream: io.StringIO) -> list[str]:
    return [line.strip() for line in stream.getvalue().replace("\n", "\r").split("\r") if line.strip()]


def test_time_left_follows_what_was_measured() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(stream, clock)
    progress.show("decoding", 0, 4)
    clock.now += 10
    progress.show("decoding", 1, 4)
    clock.now += 4000
    progress.show("decoding", 2, 4)
    progress.show("decoding", 4, 4)
    progress.end()
    assert lines(stream) == [
        "decoding 0/4", "decoding 1/4  00:30 left", "decoding 2/4  1:06:50 left", "decoding 4/4  00:00 left",
    ]  # fmt: skip


def test_batches_have_a_time_of_their_own() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(stream, clock)
    for number in (1, 2, 3):
        progress.batch(number, 3)
        progress.show("encoding")
        progress.end()
        clock.now += 60
    assert lines(stream) == ["[1/3] encoding", "[2/3, 02:00 left] encoding", "[3/3, 01:00 left] encoding"]
    progress = Progress(stream := io.StringIO(), clock)
    progress.batch(1, 1)
    progress.show("encoding")
    assert lines(stream) == ["encoding"]


def test_loading_counts_megabytes() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(stream, clock)
    for done in (0, 6_000_000_000, 23_800_500_000):
        progress.loading(done, 23_800_500_000)
        clock.now += 3
    progress.loading(0, 9)  # less than one is not none
    assert lines(stream) == [
        "loading 0/23801  MB", "loading 6000/23801  MB  00:09 left", "loading 23800/23801  MB  00:00 left",
        "loading 0/1  MB",
    ]  # fmt: skip


def test_a_shorter_line_leaves_nothing_of_a_longer_one() -> None:
    stream = io.StringIO()
    progress = Progress(stream)
    progress.show("x" * 60)
    progress.show("y")
    assert len(stream.getvalue().split("\r")[2]) >= 60


def test_silence() -> None:
    progress = Progress(None)
    progress.batch(1, 2)
    progress.show("loading")
    progress.end()


@pytest.mark.parametrize("fails", [False, True])
def test_a_whole_run_is_followed_and_its_hook_removed(fails: bool) -> None:
    pipe, stream = tiny_pipeline(), io.StringIO()
    progress = Progress(stream)

    def watch(info: StepInfo) -> None:
        on_step(info)
        if fails:
            raise KeyboardInterrupt

    try:
        with progress.watching(pipe, 3) as on_step:
            pipe.generate("p", [0, 30], bokeh_pivot=10, num_inference_steps=2, on_step=watch)
    except KeyboardInterrupt:
        assert fails
    seen = [" ".join(line.split()[:2]) for line in lines(stream)]
    whole = ["encoding", "step 1/2", "step 2/2", "decoding 0/3", "decoding 1/3", "decoding 2/3"]
    assert seen == (whole[:2] if fails else whole) and stream.getvalue().endswith("\n")
    before = stream.getvalue()
    pipe.vae.decode(torch.zeros(1, 16, 2, 2))
    assert stream.getvalue() == before


class SlowText(FakeText):
    """Runs a T5 whose blocks take a second each."""

    clock: Clock

    def encode(self, prompts: Sequence[str], txt_length: int | None = None) -> Conditioning:
        self.networks[0](torch.zeros(len(prompts), 4, dtype=torch.long))
        return super().encode(prompts, txt_length)


@pytest.mark.parametrize("prompts", [1, 2])
def test_encoding_has_time_left_and_is_no_part_of_the_steps(prompts: int) -> None:
    t5 = T5Encoder(T5Config(vocab_size=8, width=8, head_dim=4, mlp_size=8, num_layers=3, num_heads=2)).eval()
    clock, stream = Clock(), io.StringIO()

    def tick(*_: object) -> None:
        clock.now += 10

    for block in t5.encoder.block:
        block.register_forward_pre_hook(tick)
    text = SlowText(torch.float32, networks=(t5,))
    pipe = dataclasses.replace(tiny_pipeline(), text=text)  # type: ignore[arg-type]
    progress = Progress(stream, clock)
    arguments = {"num_inference_steps": 2, "true_cfg": float(prompts)}

    def watch(info: StepInfo) -> None:
        clock.now += 7
        on_step(info)

    with progress.watching(pipe, 1, prompts) as on_step:
        pipe.generate("p", [0], on_step=watch, **arguments)
    total = 3 * prompts
    assert lines(stream)[: total + 2] == [
        "encoding",
        *(f"encoding {i}/{total}  00:{10 * (total - i):02} left" for i in range(1, total)),
        f"encoding {total}/{total}  00:00 left",
        f"step 1/2  noise {lines(stream)[total + 1].split()[3]}  00:07 left",
    ]
    assert not any(block._forward_hooks for block in t5.encoder.block)


def test_a_run_that_begins_again_counts_again() -> None:
    """Out of memory: fewer rows, from the start."""
    pipe, stream = tiny_pipeline(), io.StringIO()
    with Progress(stream).watching(pipe, 2) as on_step:
        for _ in range(2):
            pipe.generate("p", [0, 9], num_inference_steps=1, on_step=on_step)
    seen = [" ".join(line.split()[:2]) for line in lines(stream)]
    assert seen == ["encoding", *["step 1/1", "decoding 0/2", "decoding 1/2"] * 2]


def test_a_phase_that_begins_again_is_timed_anew() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(stream, clock)
    for seconds in (100, 2):
        progress.show("decoding", 0, 4)
        clock.now += seconds
        progress.show("decoding", 1, 4)
        progress.end()
        clock.now += 1000
    assert [line.split("  ")[-1] for line in lines(stream)][1::2] == ["05:00 left", "00:06 left"]
