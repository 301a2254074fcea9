"""Training as a library: samples and their randomness, optimisers, the loop, a run's state, objectives."""

from __future__ import annotations

import dataclasses
import errno
import functools
import hashlib
import json
import math
import os
import random
import signal
import types
import weakref
from ast import literal_eval
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from bokehflux.pictures import plot
from bokehflux.training import guard, state
from bokehflux.training import log as log_module
from bokehflux.training.batches import Draws
from bokehflux.training.guard import Told
from bokehflux.training.log import Board, Log
from bokehflux.training.loop import Course, Loss, Step, train
from bokehflux.training.objective import draw_guidance, guided, logit_normal, mix, velocity_target
from bokehflux.training.optim import Muon, Optimizer, orthogonal, trapezoid
from bokehflux.training.state import Ema, Saves, State
from bokehflux.weights.files.checkpoint import CheckpointError, open_checkpoint
from bokehflux.weights.files.write import save
from tests.faults.child import forked, needs_linux, trained
from tests.tiny import tiny_mmdit

CPU = torch.device("cpu")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draws(count: int = 4, seed: int = 0) -> Draws:
    return Draws.of_step(seed, 0, count, CPU)


# --- the randomness of samples


def test_draws_are_splitmix64() -> None:
    """Against the published algorithm on Python's integers. Saved runs rely on it, so it must not change."""

    def mixed(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    golden = 0x9E3779B97F4A7C15
    assert mixed(golden) == 0xE220A8397B1DCDAF, "the first number of seed 0, as published"
    start = int.from_bytes(hashlib.blake2b(b"7 1 noise", digest_size=8).digest(), "little")
    some = Draws.of_step(7, 41_152_263, 3, CPU)
    bits = [
        [mixed((mixed((start + s * golden) % 2**64) + i * golden) % 2**64) for i in (1, 2, 3)]
        for s in (123_456_789, 123_456_790, 123_456_791)
    ]
    uniform = some.uniform("noise", 3)
    assert uniform.tolist() == [[(b >> 40) / 2**24 for b in row] for row in bits]
    integers = some.integers("noise", 10, 3)
    assert integers.tolist() == [[(b >> 32) * 10 >> 32 for b in row] for row in bits]


def test_a_sample_brings_its_own_numbers() -> None:
    """Whoever takes it, in whatever batch: every process, every number of rows, every other draw."""
    whole = Draws.of_step(3, 5, 8, CPU)
    assert whole.samples == range(40, 48)
    parts = [Draws.of_step(3, 5, 8, CPU, rank, 4) for rank in range(4)]
    for kind in (Draws.uniform, Draws.normal):
        assert torch.equal(kind(whole, "x", 2, 3), torch.cat([kind(part, "x", 2, 3) for part in parts]))
    two_steps = torch.cat([Draws.of_step(3, step, 4, CPU).normal("x", 5) for step in (10, 11)])
    assert torch.equal(whole.normal("x", 5), two_steps)
    assert torch.equal(whole.every(4).normal("x", 5), whole.normal("x", 5)[::4])
    assert torch.equal(whole.on(CPU).normal("x", 5), whole.normal("x", 5))
    assert whole.groups(4).samples == range(10, 12)
    assert torch.equal(parts[1].groups(2).normal("x", 5), whole.groups(2).normal("x", 5)[1:2])
    with pytest.raises(ValueError, match="multiple of the 3 processes, got 8"):
        Draws.of_step(0, 0, 8, CPU, 0, 3)
    with pytest.raises(ValueError, match="not whole groups of 3"):
        whole.groups(3)


def test_draws_have_the_moments_they_claim() -> None:
    many = draws(400)
    normal = many.normal("x", 1000)
    assert normal.mean().abs() < 0.01 and (normal.var() - 1).abs() < 0.01
    assert (normal**3).mean().abs() < 0.02 and ((normal**4).mean() - 3).abs() < 0.05
    assert normal.isfinite().all() and 4 < normal.abs().max() < 7
    uniform = many.uniform("x", 1000)
    assert 0 <= uniform.min() and uniform.max() < 1
    counts = torch.histc(uniform, 100, 0, 1)
    assert ((counts - 4000).square() / 4000).sum() < 150, "chi-square of 99 degrees of freedom"
    dice = many.integers("x", 6, 1000).flatten().bincount(minlength=6)
    assert len(dice) == 6 and ((dice - 400_000 / 6).square() / (400_000 / 6)).sum() < 25


def test_spread_draws_take_one_from_each_part() -> None:
    for step in (0, 3):
        parts = [Draws.of_step(1, step, 8, CPU, rank, 2).spread("x") for rank in range(2)]
        assert (torch.cat(parts) * 8).long().tolist() == list(range(8))
        groups = [Draws.of_step(1, step, 8, CPU, rank, 2).groups(2).spread("x") for rank in range(2)]
        assert (torch.cat(groups) * 4).long().tolist() == list(range(4))


def test_draws_of_another_sample_name_or_seed_are_others() -> None:
    normal = draws(400).normal("x", 1000)

    def correlation(a: Tensor, b: Tensor) -> float:
        return float((a * b).mean().abs())

    assert correlation(normal[:-1], normal[1:]) < 0.01, "the next sample"
    assert correlation(normal[:, :-1], normal[:, 1:]) < 0.01, "the next place"
    for other in (draws(400).normal("y", 1000), draws(400, seed=1).normal("x", 1000)):
        assert correlation(normal, other) < 0.01
    assert len(set(draws(1000).uniform("x").tolist())) > 990


# --- optimisers, learning rate, averages


def test_muon_takes_the_matrices_it_is_given() -> None:
    mmdit = tiny_mmdit()
    named = list(mmdit.named_parameters())
    adamw, muon = Optimizer(named, 1e-3, matrices=mmdit.units().matrices).parts
    of_muon, of_adamw = (
        {id(p) for group in part.param_groups for p in group["params"]} for part in (muon, adamw)
    )
    assert of_muon == {id(p) for p in mmdit.units().matrices}
    assert of_muon | of_adamw == {id(p) for _, p in named} and not of_muon & of_adamw
    assert len(Optimizer(named, 1e-3).parts) == 1


def test_optimizer_step() -> None:
    """The factor scales the step of both parts, and gradients are gone afterwards."""
    moved = []
    for factor in (1.0, 0.5, 0.0):
        named = [("matrix", nn.Parameter(torch.zeros(4, 4))), ("vector", nn.Parameter(torch.zeros(4)))]
        optimizer = Optimizer(named, 0.1, matrices=[named[0][1]], weight_decay=0.0)
        for _, p in named:
            p.grad = torch.randn(p.shape, generator=generator(4))
        optimizer.step(factor)
        assert all(p.grad is None for _, p in named)
        moved.append([p.detach().abs().mean().item() for _, p in named])
    assert all(m > 0.01 for m in moved[0]) and moved[2] == [0, 0]
    assert moved[1] == pytest.approx([m / 2 for m in moved[0]], rel=1e-3)


def test_muon_may_have_every_parameter() -> None:
    linear = nn.Linear(4, 3, bias=False)
    optimizer = Optimizer([("weight", linear.weight)], 0.1, matrices=[linear.weight])
    before = linear.weight.detach().clone()
    linear(torch.ones(4)).sum().backward()
    optimizer.step(1.0)
    assert not torch.equal(linear.weight, before)
    assert optimizer.moments().keys() == optimizer.moment_shapes().keys() == {"momentum.weight"}


def test_muon_gives_the_published_update() -> None:
    """Against torch.optim.Muon, matrix by matrix, with equal settings."""
    shapes = [(12, 7), (12, 7), (5, 20), (7, 7)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    mine = Muon(ours, lr=0.02, weight_decay=0.1)
    published = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        mine.step()
        published.step()
    for p, q in zip(ours, theirs, strict=True):
        # Its Newton-Schulz steps run in bfloat16 even on a CPU: 0.02 * 0.2 * sqrt(20) * 3 steps * 2^-6.
        assert (p - q).abs().max() < 8e-4


def test_muon_takes_filters_as_matrices() -> None:
    filters = nn.Parameter(torch.randn(6, 4, 3, 3).contiguous(memory_format=torch.channels_last))
    matrix = nn.Parameter(filters.detach().flatten(1).clone())
    both = [Muon([p], lr=0.1, weight_decay=0.0) for p in (filters, matrix)]
    filters.grad = torch.randn_like(filters)
    matrix.grad = filters.grad.flatten(1).clone()
    for optimizer in both:
        optimizer.step()
    torch.testing.assert_close(filters.flatten(1), matrix)


def test_orthogonal_update_has_singular_values_near_one() -> None:
    values = torch.linalg.svdvals(orthogonal(torch.randn(3, 20, 9), Muon.STEPS))
    assert 0.6 < values.min() and values.max() < 1.3


def test_trapezoid() -> None:
    ours = [trapezoid(step / 100, warmup=0.1, decay=0.4, floor=0.02) for step in range(101)]
    assert ours[:3] == pytest.approx([0.02, 0.1, 0.2])
    assert set(ours[10:61]) == {1.0} and ours[9] < 1 and ours[61] < 1
    assert ours[80] == pytest.approx(0.5) and ours[100] == 0.02
    assert ours[:11] == sorted(ours[:11]) and ours[60:] == sorted(ours[60:], reverse=True)


def test_ema() -> None:
    """Short at first, and from the fifth step on as long as its rate says."""
    p = nn.Parameter(torch.tensor([1.0]))
    ema = Ema([p], rate=0.55)
    values, rates, expected = [5.0, 3.0, 8.0, 2.0, 4.0, -1.0], [1, 0.8, 2 / 3, 4 / 7, 0.55, 0.55], 1.0
    for value, rate in zip(values, rates, strict=True):
        p.data.fill_(value)
        ema.update()
        expected += rate * (value - expected)
        assert ema.average[0].item() == pytest.approx(expected)
    assert p.item() == -1
    ema.copy_to_parameters()
    assert p.item() == pytest.approx(expected)


# --- the loop


class Toy(nn.Module):
    """A matrix for Muon, and a vector and a filter for AdamW."""

    def __init__(self) -> None:
        super().__init__()
        g = generator(11)
        self.matrix = nn.Parameter(torch.randn(6, 4, generator=g))
        self.vector = nn.Parameter(torch.randn(6, generator=g))
        self.other = nn.Parameter(torch.randn(2, 3, 1, 1, generator=g))

    def loss(self, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """Its size changes from step to step, so that clipping bites now and then."""
        x = step.draws.normal("x", 4)
        error = (x @ self.matrix.T + self.vector - step.draws.normal("y", 6)).square().mean()
        value = error * (5.0 if step.number % 3 == 0 else 0.01) + 0.05 * self.other.square().sum()
        return value, {"error": error, "thrice" if step.number % 3 == 0 else "else": value}

    def optimizer(self, muon: bool = True) -> Optimizer:
        named = list(self.named_parameters())
        return Optimizer(named, 0.05, matrices=[self.matrix] if muon else [])

    def prodigy(self) -> Optimizer:
        """With a parameter that begins at 0, as low-rank ones do."""
        self.vector.data.zero_()
        return Optimizer(list(self.named_parameters()), 1.0, prodigy=True)


COURSE = Course(seed=4, batch=6, steps=12, ema_rate=0.3, clip=0.7)


def train_toy(
    folder: Path, saves: Saves | None = None, loss: Callable[[Loss], Loss] = lambda loss: loss,
    course: Course = COURSE, prodigy: bool = False,
) -> tuple[Toy, Log]:  # fmt: skip
    toy, log = Toy(), Log(folder / "log.json", every=5, live=True)
    optimizer = toy.prodigy() if prodigy else toy.optimizer()
    assert train(loss(toy.loss), optimizer, course, log, saves) == course.steps
    return toy, log


def test_the_loop_by_hand(tmp_path: Path) -> None:
    """Loss, backward, clipping, learning rate, update, average: written out, and equal bit by bit."""
    toy, log = Toy(), Log(tmp_path / "log.json", every=4)
    assert train(toy.loss, toy.optimizer(muon=False), COURSE, log) == 12
    hand = Toy()
    parameters = list(hand.parameters())
    adamw = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    average, errors, clipped = [p.detach().clone() for p in parameters], [], 0
    for number in range(12):
        value, figures = hand.loss(Step(number, number / 12, Draws.of_step(4, number, 6, CPU)))
        adamw.zero_grad()
        value.backward()
        clipped += nn.utils.clip_grad_norm_(parameters, 0.7).item() > 0.7
        adamw.param_groups[0]["lr"] = 0.05 * trapezoid(number / 12)
        adamw.step()
        rate = max(0.3, 1 / (1 + 0.25 * number))
        average = [a.lerp(p.detach(), rate) for a, p in zip(average, parameters, strict=True)]
        errors.append(figures["error"].item())
    assert 2 < clipped < 12
    assert all(torch.equal(p, a) for p, a in zip(toy.parameters(), average, strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(toy.parameters(), parameters, strict=True))
    assert [point["step"] for point in log.points] == [4, 8, 12]
    assert [p["error"] for p in log.points] == pytest.approx([sum(errors[i : i + 4]) / 4 for i in (0, 4, 8)])


@pytest.mark.parametrize(("every", "steps"), [(5, [5, 10, 12]), (4, [4, 8, 12]), (20, [12])])
def test_looks_come_every_so_many_steps_and_after_the_last(
    tmp_path: Path, every: int, steps: list[int]
) -> None:
    seen: list[int] = []

    @dataclasses.dataclass
    class Looking:
        every: int

        def __call__(self, state: State) -> dict[str, float]:
            seen.append(state.step)
            return {}

    toy = Toy()
    train(toy.loss, toy.optimizer(), COURSE, Log(tmp_path / "log.json"), looks=[Looking(every)])
    assert seen == steps


def test_paced_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100, 1000, 15))  # every look at the clock takes 15 seconds
    monkeypatch.setattr("bokehflux.training.loop.time.perf_counter", lambda: float(next(clock)))
    timed = dataclasses.replace(COURSE, steps=2, minutes=1.0)
    assert list(timed.from_step(0)) == [(0, 0.0), (1, 0.25), (2, 0.5), (3, 0.75)]
    assert list(dataclasses.replace(COURSE, steps=4).from_step(1)) == [(1, 0.25), (2, 0.5), (3, 0.75)]
    toy = Toy()
    with pytest.raises(ValueError, match="paced by minutes can be neither resumed nor shared"):
        train(toy.loss, toy.optimizer(), timed, Log(tmp_path / "log.json"), saves_in(tmp_path))


@pytest.mark.parametrize(("more", "panels"), [((), 1), (("LVCorr",), 2), (("LVCorr", "consistency [dB]"), 3)])
def test_figures_of_a_unit_share_an_axis(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...], panels: int
) -> None:
    """Decibels do not flatten the losses; every axis goes over the whole run."""
    drawn: list[tuple[list[str], object]] = []
    lines = plot.lines

    def seen(series: Mapping[str, Sequence[tuple[float, float]]], **how: Any) -> Image.Image:
        drawn.append((list(series), how["span"]))
        return lines(series, **how)

    monkeypatch.setattr(plot, "lines", seen)
    log = Log(tmp_path / "log.json", live=True)
    for step in (10, 20, 30):
        log.add(step, {"plain": 1 / step, "held-out, levels 0-10": 2 / step})
    log.add(20 + 10, dict.fromkeys(more, 27.5))
    log.write()
    assert drawn == [
        (names, (10, 30)) for names in (["plain", "held-out, levels 0-10"], *([name] for name in more))
    ]
    with Image.open(tmp_path / "log.png") as image:
        assert image.size == (900, 300 * panels + 18 * (2 + len(more)))


# --- its state


def saves_in(folder: Path, every: int = 4, resume: bool = False, **settings: object) -> Saves:
    return Saves(
        path=folder / "state.safetensors", every=every, settings={"lr": 0.05, **settings}, resume=resume
    )


class Killed(BaseException):
    pass


def killed_at(step: int) -> Callable[[Loss], Loss]:
    """A loss that ends the run at a step, when the steps before have been taken."""

    def wrap(loss: Loss) -> Loss:
        def deadly(at: Step) -> tuple[Tensor, dict[str, Tensor]]:
            if at.number == step:
                raise Killed
            return loss(at)

        return deadly

    return wrap


def without_seconds(log: Log) -> list[dict[str, float]]:
    return [{key: value for key, value in point.items() if key != "seconds"} for point in log.points]


@pytest.mark.parametrize("stops", [(5,), (4, 9), (11, 11), (12,)])
def test_a_run_that_was_killed_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, stops: Sequence[int]
) -> None:
    """Weights, averages, moments and the log, bit by bit, in the file of the last step."""
    (tmp_path / "whole").mkdir()
    toy, log = train_toy(tmp_path / "whole", saves_in(tmp_path / "whole"))
    for i, stop in enumerate(stops):
        if stop < 12:
            with pytest.raises(Killed):
                train_toy(tmp_path, saves_in(tmp_path, resume=i > 0), killed_at(stop))
        else:
            train_toy(tmp_path, saves_in(tmp_path))
    again, resumed_log = train_toy(tmp_path, saves_in(tmp_path, resume=True))
    assert without_seconds(resumed_log) == without_seconds(log) and len(log.points) == 2
    files = [open_checkpoint(folder / "state.safetensors") for folder in (tmp_path / "whole", tmp_path)]
    kinds = {name.split(".")[0] for name in files[0].tensors}
    assert kinds == {"parameter", "average", "momentum", "exp_avg", "exp_avg_sq", "step"}
    assert files[0].tensors.keys() == files[1].tensors.keys()
    assert all(torch.equal(files[0].read(name), files[1].read(name)) for name in files[0].tensors)
    assert all(torch.equal(p, q) for p, q in zip(toy.parameters(), again.parameters(), strict=True))


def test_moments_are_part_of_the_state(tmp_path: Path) -> None:
    """A resume that forgot any kind of tensor would end elsewhere: the test above can fail."""
    toy, _ = train_toy(tmp_path)
    with pytest.raises(Killed):
        train_toy(tmp_path, saves_in(tmp_path), killed_at(9))
    saved = saves_in(tmp_path, resume=True)
    file = open_checkpoint(saved.path)
    for kind in ("parameter", "average", "momentum", "exp_avg", "exp_avg_sq", "step"):
        tensors = {name: file.read(name).clone() for name in file.tensors}
        for name in tensors:
            if name.split(".")[0] == kind:
                tensors[name] += 1
        path = tmp_path / f"{kind}.safetensors"
        save(path, tensors, file.metadata)
        other, _ = train_toy(tmp_path, dataclasses.replace(saved, path=path))
        assert not all(
            torch.equal(p, q) for p, q in zip(toy.parameters(), other.parameters(), strict=True)
        ), kind


def test_prodigy_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """Bit by bit after a stop, and elsewhere where any number of its own was another."""
    pytest.importorskip("prodigyopt")
    (tmp_path / "whole").mkdir()
    course = dataclasses.replace(COURSE, steps=40)
    toy, _ = train_toy(tmp_path / "whole", saves_in(tmp_path / "whole"), course=course, prodigy=True)
    with pytest.raises(Killed):
        train_toy(tmp_path, saves_in(tmp_path), killed_at(30), course, prodigy=True)
    saved = saves_in(tmp_path, resume=True)
    half = open_checkpoint(saved.path)
    tensors, facts = {name: half.read(name).clone() for name in half.tensors}, half.metadata
    assert {name for name in tensors if "." not in name} == {"d", "d_max", "d_numerator", "k"}
    assert tensors["d"] > 1e-6, "it has found a rate by then, or this test proves little"
    again, _ = train_toy(tmp_path, saved, course=course, prodigy=True)
    files = [open_checkpoint(folder / "state.safetensors") for folder in (tmp_path / "whole", tmp_path)]
    assert files[0].tensors.keys() == files[1].tensors.keys()
    assert all(torch.equal(files[0].read(name), files[1].read(name)) for name in files[0].tensors)
    for kind in ("d", "d_max", "d_numerator", "k", "s", "p0", "exp_avg", "exp_avg_sq"):
        path = tmp_path / f"{kind}.safetensors"
        save(path, {n: t + 0.5 * t + 1 if n.split(".")[0] == kind else t for n, t in tensors.items()}, facts)
        other, _ = train_toy(tmp_path, dataclasses.replace(saved, path=path), course=course, prodigy=True)
        pairs = list(zip(toy.parameters(), other.parameters(), again.parameters(), strict=True))
        assert not all(torch.equal(p, q) for p, q, _ in pairs), kind
        assert all(torch.equal(p, r) for p, _, r in pairs)


@needs_linux
def test_prodigy_takes_no_sharded_parameters(tmp_path: Path) -> None:
    pytest.importorskip("prodigyopt")

    def refused() -> str:
        distributed.init_process_group("gloo", f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
        whole = distribute_tensor(torch.ones(4), init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match="Prodigy takes no sharded parameters"):
            Optimizer([("weight", nn.Parameter(whole))], 1.0, prodigy=True)
        return "as it should"

    assert forked(refused) == (0, "as it should")


def test_tensorboard_leaves_out_what_a_resumed_run_does_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps, value in (((2, 4, 6, 8), 1.0), ((6,), 3.0)):  # the second goes on from the state of step 4
        board = Board(tmp_path)
        for step in steps:
            board.add(step, {"plain": value})
    found = EventAccumulator(str(tmp_path)).Reload().Scalars("plain")
    assert [(event.step, event.value) for event in found] == [(2, 1.0), (4, 1.0), (6, 3.0)]


def test_resume_refuses_what_is_not_this_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"state.safetensors.*no saved run to resume"):
        train_toy(tmp_path, saves_in(tmp_path, resume=True))
    train_toy(tmp_path, saves_in(tmp_path, rank=4))
    with pytest.raises(CheckpointError) as error:
        train_toy(tmp_path, saves_in(tmp_path, resume=True, rank=8, lr=0.1, blocks=(1, 2)))
    assert error.value.problems == (
        "lr was 0.05 when the run was saved and is 0.1 now",
        "rank was 4 when the run was saved and is 8 now",
        "blocks was None when the run was saved and is [1, 2] now",
    )
    other = nn.Linear(3, 2)
    with pytest.raises(CheckpointError, match=r"parameter.weight: expected \(2, 3\), found None"):
        train(
            lambda step: (other.weight.sum() + other.bias.sum(), {}),
            Optimizer(list(other.named_parameters()), 0.1),
            COURSE,
            Log(tmp_path / "log.json"),
            saves_in(tmp_path, resume=True, rank=4),
        )
    save(tmp_path / "state.safetensors", {"x": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="not the saved state of a run"):
        train_toy(tmp_path, saves_in(tmp_path, resume=True))


def test_a_failing_disk_keeps_the_last_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Killed):
        train_toy(tmp_path, saves_in(tmp_path), killed_at(5))
    before = (tmp_path / "state.safetensors").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        train_toy(tmp_path, dataclasses.replace(saves_in(tmp_path, resume=True), on_full="stop"))
    assert (tmp_path / "state.safetensors").read_bytes() == before
    assert {p.suffix for p in tmp_path.iterdir()} == {".safetensors", ".json", ".csv", ".png"}


def deadly_run(folder: Path, dies_at: int = -1, resume: bool = False) -> None:
    def die(loss: Loss) -> Loss:
        def deadly(at: Step) -> tuple[Tensor, dict[str, Tensor]]:
            if at.number == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return loss(at)

        return deadly

    train_toy(folder, saves_in(folder, resume=resume), die, dataclasses.replace(COURSE, steps=40))


@needs_linux
@pytest.mark.parametrize("seed", range(3))
def test_killed_twice_at_any_of_forty_steps(tmp_path: Path, seed: int) -> None:
    """By SIGKILL, in a process of its own: the state of the last step, and the curve, are those of a run that
    nobody disturbed. The first nine steps are left out: until a second state is begun, none need be whole."""
    first, second = sorted(random.Random(seed).sample(range(9, 40), 2))
    folders = [tmp_path / "whole", tmp_path / "killed"]
    for folder in folders:
        folder.mkdir()
    deadly_run(folders[0])
    for step, resume in ((first, False), (second, True)):
        ((code, said),) = trained(functools.partial(deadly_run, folders[1], step, resume))
        assert code == -signal.SIGKILL, said
    deadly_run(folders[1], resume=True)
    files = [open_checkpoint(folder / "state.safetensors") for folder in folders]
    assert len(files[0].tensors) == 13 and files[0].tensors.keys() == files[1].tensors.keys()
    assert all(torch.equal(files[0].read(name), files[1].read(name)) for name in files[0].tensors)
    tables = [(folder / "log.csv").read_bytes() for folder in folders]
    assert tables[0].count(b"\n") == 9 and tables[0] == tables[1]


# --- what a run is kept from


def broken(*steps: int, gradient: bool = False) -> Callable[[Loss], Loss]:
    """A loss that is not finite at some steps, or whose gradient is not."""

    def wrap(loss: Loss) -> Loss:
        def wrong(at: Step) -> tuple[Tensor, dict[str, Tensor]]:
            value, figures = loss(at)
            if at.number in steps:
                # The root's gradient at 0 is infinite, 0 of it is NaN.
                value = value + 0 * (value - value).sqrt() if gradient else value * math.nan
            return value, figures

        return wrong

    return wrap


@pytest.mark.parametrize("gradient", [False, True])
def test_what_is_not_finite_never_reaches_the_optimizer(
    tmp_path: Path, gradient: bool, caplog: pytest.LogCaptureFixture
) -> None:
    toy, log = Toy(), Log(tmp_path / "log.json", every=4)
    before: dict[int, list[Tensor]] = {}

    def watched(at: Step) -> tuple[Tensor, dict[str, Tensor]]:
        moments = optimizer.moments().values()
        before[at.number] = [x.detach().clone() for x in (*toy.parameters(), *moments)]
        return broken(5, gradient=gradient)(toy.loss)(at)

    optimizer = toy.optimizer()
    assert (
        train(
            watched, optimizer, COURSE, log, rows=lambda step, draws: [f"{step}/{n}" for n in draws.samples]
        )
        == 12
    )
    assert all(torch.equal(a, b) for a, b in zip(before[5], before[6], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(before[6], before[7], strict=True))
    assert all(p.isfinite().all() for p in toy.parameters())
    assert {float(moment) for name, moment in optimizer.moments().items() if name.startswith("step")} == {11}
    assert all(math.isfinite(value) for point in log.points for value in point.values())
    assert "step 5 refused: loss " in caplog.text
    assert "its rows: 5/30; 5/31; 5/32; 5/33; 5/34; 5/35" in caplog.text


def test_the_host_hears_of_a_step_in_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU has begun it by then and need not wait for the host; a state that is saved knows its step."""
    seen: list[str] = []
    read = Told.read
    monkeypatch.setattr(Told, "read", lambda told: (seen.append("heard"), read(told))[1])

    def told(loss: Loss) -> Loss:
        return lambda at: (seen.append(str(at.number)), loss(at))[1]

    train_toy(tmp_path, saves_in(tmp_path, every=3), told, dataclasses.replace(COURSE, steps=5))
    assert " ".join(seen) == "0 1 heard 2 heard heard 3 4 heard heard"


def test_a_step_is_forgotten_before_the_next(tmp_path: Path) -> None:
    """What autograd keeps for a loss, which is a figure, too, is there once."""
    last: list[weakref.ref[Tensor]] = []

    def watch(loss: Loss) -> Loss:
        def watched(at: Step) -> tuple[Tensor, dict[str, Tensor]]:
            assert not last or last.pop()() is None
            value, figures = loss(at)
            last.append(weakref.ref(value))
            return value, figures

        return watched

    train_toy(tmp_path, loss=watch)


def test_more_than_three_refused_steps_of_a_hundred_end_a_run(tmp_path: Path) -> None:
    course = dataclasses.replace(COURSE, steps=110)
    train_toy(tmp_path, loss=broken(1, 2, 3, 101, 102, 103), course=course)
    with pytest.raises(ArithmeticError, match="steps 1, 2, 3, 100 were refused.* more than 3 of 100 steps"):
        train_toy(tmp_path, saves_in(tmp_path), broken(1, 2, 3, 100), course)
    refused = json.loads((tmp_path / "log.json").read_text())["notes"]["refused"]
    assert [entry["step"] for entry in refused] == [1, 2, 3, 100], "the file knows what ended the run"
    # A run that goes on remembers what was refused before.
    with pytest.raises(ArithmeticError, match="steps 1, 2, 3, 100 were refused"):
        train_toy(tmp_path, saves_in(tmp_path, resume=True), broken(100), course)


@needs_linux
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_end_of_a_step_and_saves(tmp_path: Path, number: int) -> None:
    def stopped(loss: Loss) -> Loss:
        def interrupted(at: Step) -> tuple[Tensor, dict[str, Tensor]]:
            if at.number == 6:
                os.kill(os.getpid(), number)
                os.kill(os.getpid(), signal.SIGINT)  # a launcher passes on what its processes have heard
            return loss(at)

        return interrupted

    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt, match="after step 7, whose state is saved"):
        train_toy(tmp_path, saves_in(tmp_path, every=100), stopped)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert json.loads(open_checkpoint(tmp_path / "state.safetensors").metadata["state"])["step"] == 7
    again, _ = train_toy(tmp_path, saves_in(tmp_path, resume=True))
    whole, _ = train_toy(tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), whole.parameters(), strict=True))


def test_a_second_signal_is_not_postponed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "AGAIN_SECONDS", -1.0)
    with pytest.raises(KeyboardInterrupt), guard.postponed() as came:
        signal.raise_signal(signal.SIGINT)
        assert came == [signal.SIGINT]
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_is_ignored_stays_ignored(number: int) -> None:
    """A shell's background jobs ignore Ctrl-C."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with guard.postponed() as came:
            signal.raise_signal(number)
            assert not came
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_run_waits_for_room_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first state is there, the second finds no room twice; the run ends as one that had it."""
    sync, calls = os.fsync, [0]

    def full(file: int) -> None:
        calls[0] += 1
        if calls[0] in (2, 3):
            assert json.loads(open_checkpoint(tmp_path / "state.safetensors").metadata["state"])["step"] == 4
            raise OSError(28, "No space left on device")
        sync(file)

    monkeypatch.setattr("os.fsync", full)
    monkeypatch.setattr(guard, "RETRY_SECONDS", 0.05)
    toy, _ = train_toy(tmp_path, saves_in(tmp_path))
    whole, _ = train_toy(tmp_path)
    assert calls == [5] and caplog.text.count("the disk is full") == 1
    assert all(torch.equal(p, q) for p, q in zip(toy.parameters(), whole.parameters(), strict=True))
    assert json.loads(open_checkpoint(tmp_path / "state.safetensors").metadata["state"])["step"] == 12


def test_tensorboard_misses_what_a_full_disk_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    written: list[tuple[int, int]] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            self.purge_step = purge_step

        def add_scalar(self, name: str, value: float, step: int) -> None:
            if step == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
            written.append((self.purge_step, step))

        def flush(self) -> None:
            pass

    monkeypatch.setattr(log_module, "summary_writer", lambda: Writer)
    board = Board(tmp_path)
    for step in (1, 2, 3, 4):
        board.add(step, {"plain": 1.0})
    assert written == [(1, 1), (3, 3), (3, 4)] and "TensorBoard misses step 2" in caplog.text


def test_a_figure_that_is_not_finite_is_in_the_table_alone(tmp_path: Path) -> None:
    log = Log(tmp_path / "log.json", live=True)
    log.add(1, {"held-out": math.nan})
    log.write()
    assert not (tmp_path / "log.png").exists(), "there is nothing to draw"
    log.add(2, {"held-out": 0.5, "plain": math.inf})
    log.write()
    assert (tmp_path / "log.csv").read_text().split() == ["step,held-out,plain", "1,nan,", "2,0.5,inf"]
    assert (tmp_path / "log.png").stat().st_size


def test_a_full_disk_leaves_the_curve_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Points after steps 5 and 10; the first finds no room, the second writes both. Others end a run."""
    replace, number = os.replace, errno.ENOSPC

    def full(source: Path, target: Path) -> None:
        if target.suffix == ".csv" and not caplog.text.count("the disk is full"):
            raise OSError(number, os.strerror(number))
        replace(source, target)

    monkeypatch.setattr("os.replace", full)
    train_toy(tmp_path)
    assert caplog.text.count("log.json and the curve are behind") == 1
    assert [line.split(",")[0] for line in (tmp_path / "log.csv").open()] == ["step", "5", "10"]
    caplog.clear()
    number = errno.EACCES
    with pytest.raises(PermissionError):
        train_toy(tmp_path)


def test_room_is_checked_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Toy()
    # Parameters, averages, AdamW's two moments with two counts, Muon's momentum.
    size = 4 * (3 * 24 + 4 * 12 + 2)

    def never(_: Step) -> tuple[Tensor, dict[str, Tensor]]:
        raise Killed

    for free, error in ((2 * size, Killed), (2 * size - 1, CheckpointError)):
        monkeypatch.setattr(state.shutil, "disk_usage", lambda _, free=free: types.SimpleNamespace(free=free))
        with pytest.raises(error):
            train(never, toy.optimizer(), COURSE, Log(tmp_path / "log.json"), saves_in(tmp_path))
    (left := tmp_path / ".state.safetensors.123.tmp").write_bytes(b"0")
    assert saves_in(tmp_path).check_room(size) == 2 * size, "what a killed process left will go"
    monkeypatch.setattr(state.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=2 * size))
    with pytest.raises(Killed):
        train(never, toy.optimizer(), COURSE, Log(tmp_path / "log.json"), saves_in(tmp_path))
    assert not left.exists()


# --- several processes


def one_of_two(folder: Path, rank: int, resume: bool) -> None:
    """A process of a run on two, whose state is resumed with one, or the other way round."""
    distributed.init_process_group("gloo", f"file://{folder / 'meet'}", rank=rank, world_size=2)
    toy, log = train_toy(folder, saves_in(folder, resume=resume))
    save(folder / f"rank{rank}.safetensors", dict(toy.state_dict()))
    (folder / f"rank{rank}.json").write_text(json.dumps(without_seconds(log)))
    distributed.destroy_process_group()


@needs_linux
@pytest.mark.parametrize("resume", [False, True])
def test_two_processes_train_as_one(tmp_path: Path, resume: bool) -> None:
    """The same samples, clipping and curve, to rounding: from the start, and from what one had saved."""
    if resume:
        with pytest.raises(Killed):
            train_toy(tmp_path, saves_in(tmp_path), killed_at(6))
    both = (functools.partial(one_of_two, tmp_path, rank, resume) for rank in range(2))
    assert trained(*both) == [(0, "None")] * 2
    toy, log = train_toy(tmp_path)
    ranks = [open_checkpoint(tmp_path / f"rank{rank}.safetensors") for rank in range(2)]
    for name, tensor in toy.state_dict().items():
        assert torch.equal(ranks[0].read(name), ranks[1].read(name))
        torch.testing.assert_close(ranks[0].read(name), tensor, rtol=1e-5, atol=1e-6)
    for rank in range(2):
        points = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert points == [pytest.approx(point, rel=1e-5) for point in without_seconds(log)]


def one_of_two_that_clips(folder: Path, rank: int) -> str:
    """The norm of what reaches the optimiser in each step, where clipping bites now and then."""
    distributed.init_process_group("gloo", f"file://{folder / 'meet'}", rank=rank, world_size=2)
    return str(norms_of_a_run(folder))


def norms_of_a_run(folder: Path) -> list[float]:
    toy, norms = Toy(), []
    optimizer = toy.optimizer()
    step = optimizer.step

    def watched(factor: float, refused: Tensor | None) -> None:
        norms.append(
            torch.cat([p.grad.flatten() for p in toy.parameters() if p.grad is not None]).norm().item()
        )
        step(factor, refused)

    optimizer.step = watched  # type: ignore[method-assign]
    train(toy.loss, optimizer, COURSE, Log(folder / "log.json"))
    return norms


@needs_linux
def test_clipping_clips_on_one_and_two_processes(tmp_path: Path) -> None:
    alone = norms_of_a_run(tmp_path)
    assert max(alone) == pytest.approx(COURSE.clip, rel=1e-4)
    assert 2 < sum(norm > 0.999 * COURSE.clip for norm in alone) < 12
    for code, said in trained(
        *(functools.partial(one_of_two_that_clips, tmp_path, rank) for rank in range(2))
    ):
        assert code == 0, said
        assert literal_eval(said) == pytest.approx(alone, rel=1e-4)


def one_of_two_that_dies(folder: Path, rank: int) -> None:
    distributed.init_process_group("gloo", f"file://{folder / 'meet'}", rank=rank, world_size=2)

    def wrap(loss: Loss) -> Loss:
        def deadly(at: Step) -> tuple[Tensor, dict[str, Tensor]]:
            if at.number == 6 and rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return loss(at)

        return deadly

    train_toy(folder, saves_in(folder), wrap)


@needs_linux
def test_a_dead_process_ends_the_others(tmp_path: Path) -> None:
    """With gloo at once, and in words that the command knows; the state before is kept."""
    both = (functools.partial(one_of_two_that_dies, tmp_path, rank) for rank in range(2))
    (code, said), (killed, _) = trained(*both)
    assert killed == -signal.SIGKILL and code == 1 and "RuntimeError" in said and "peer" in said
    assert json.loads(open_checkpoint(tmp_path / "state.safetensors").metadata["state"])["step"] == 4


def one_of_two_that_breaks(folder: Path, rank: int, every: int, heard: int) -> str:
    """The second process's share of step 3 is not finite, and the first is asked to end in step 6."""
    distributed.init_process_group("gloo", f"file://{folder / 'meet'}", rank=rank, world_size=2)

    def wrap(loss: Loss) -> Loss:
        def wrong(at: Step) -> tuple[Tensor, dict[str, Tensor]]:
            if at.number == 6 and rank == 0:
                signal.raise_signal(signal.SIGTERM)
            value, figures = loss(at)
            return value * (math.nan if at.number == 3 and rank == 1 else 1), figures

        return wrong

    with pytest.raises(KeyboardInterrupt, match=f"after step {heard}"):
        train_toy(folder, saves_in(folder, every=every), wrap)
    file = open_checkpoint(folder / "state.safetensors")
    return str(json.loads(file.metadata["state"])["refused"])


@needs_linux
@pytest.mark.parametrize(("every", "heard"), [(50, 8), (1, 7)])
def test_processes_agree_on_what_is_refused_and_when_to_end(tmp_path: Path, every: int, heard: int) -> None:
    """A step later, or at once where its state is saved."""
    both = (functools.partial(one_of_two_that_breaks, tmp_path, rank, every, heard) for rank in range(2))
    for code, said in trained(*both):
        assert code == 0, said
        (entry,) = literal_eval(said)
        assert entry["step"] == 3 and entry["losses"][1] == entry["norm"] == "nan" != entry["losses"][0]
        assert entry["rows"] == ["sample 21", "sample 22", "sample 23"]


def test_log(tmp_path: Path) -> None:
    log = Log(tmp_path / "curve.json", every=2)
    log.note("size", [1, 2])
    for step, value in enumerate([1.0, 3.0, 5.0, 9.0, 100.0]):
        log.step(step, loss=torch.tensor(value))
    log.save()
    saved = json.loads((tmp_path / "curve.json").read_text())
    assert [(p["step"], p["loss"]) for p in saved["points"]] == [(2, 2.0), (4, 7.0)]
    assert saved["notes"]["size"] == [1, 2] and "seconds" in saved["notes"]
    assert [p.name for p in tmp_path.iterdir()] == ["curve.json"]
    further = Log(tmp_path / "curve.json", every=2)
    further.note("size", [3, 4])
    further.restore(log.state())
    assert further.notes == log.notes | {"size": [3, 4]}, "what is so now"


# --- objectives


def test_objective_identities() -> None:
    x0, eps = torch.randn(2, 3, 4, 5)
    sigma = torch.tensor([0.0, 1.0, 0.25])
    x = mix(x0, eps, sigma)
    assert torch.equal(x[0], x0[0]) and torch.equal(x[1], eps[1])
    torch.testing.assert_close(x[2], 0.75 * x0[2] + 0.25 * eps[2])
    # The target is the derivative of the path, so one step along it arrives.
    torch.testing.assert_close(x - sigma[:, None, None] * velocity_target(x0, eps), x0)


def test_guided() -> None:
    target, unconditional = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(guided(target, unconditional, torch.ones(3)), target)
    torch.testing.assert_close(guided(target, unconditional, torch.zeros(3)), unconditional)
    mixed = guided(target, unconditional, torch.tensor([1.0, 3.0, 5.0]))
    torch.testing.assert_close(mixed[1], 3 * target[1] - 2 * unconditional[1])
    torch.testing.assert_close(guided(target, target, torch.tensor([1.0, 3.0, 5.0])), target)


def test_noise_levels_and_guidance() -> None:
    sigma = logit_normal(draws(4000), 0.15, 1.2)
    assert ((sigma > 0) & (sigma < 1)).all()
    assert sigma.logit().mean().item() == pytest.approx(0.15, abs=0.06)
    assert sigma.logit().std().item() == pytest.approx(1.2, abs=0.06)
    guidance = draw_guidance(draws(4000), 6.0)
    assert guidance.min() == 1 and guidance.max() <= 6 and guidance.max() > 5.8
    assert (guidance == 1).float().mean().item() == pytest.approx(0.15, abs=0.03)
    assert guidance.median() < 3.5, "denser near 1"


def test_the_time_that_is_left_follows_the_last_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [100.0]
    monkeypatch.setattr("bokehflux.training.log.time.perf_counter", lambda: now[0])
    log = Log(tmp_path / "log.json", every=4)
    log.begin(2, 20)
    with caplog.at_level("INFO"):
        for step, passed in ((6, 8), (10, 4)):
            now[0] += passed
            log.add(step, {"loss": 1.0})
    said = [message.split("  ")[-1] for message in caplog.messages]
    assert said == [
        "2 s a step, 0:00:28 left of 20 steps", "1 s a step, 0:00:10 left of 20 steps",
    ]  # fmt: skip


def test_a_full_quota_is_a_full_disk() -> None:
    for number in (errno.ENOSPC, errno.EDQUOT):
        assert guard.is_full(OSError(number, "no room")) and guard.is_full(
            OSError(f"I/O error: os error {number}")
        )
    assert not guard.is_full(OSError(errno.EACCES, "denied")) and not guard.is_full(OSError("os error 13"))
