"""Training on a GPU: attention's gradients by each stock kernel, graphs, runs that are killed and go on."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bokehflux.kernels.attention import reference, stock
from bokehflux.training.adapter import AdapterBatch, adapter_step, trainable_adapter
from bokehflux.training.engine import Recorded, keep_activations
from bokehflux.training.latents import write_latents
from bokehflux.training.log import Log
from bokehflux.training.loop import Step, train
from bokehflux.training.optim import Optimizer
from bokehflux.training.recipes.adapter import AdapterRecipe
from bokehflux.training.recipes.run import train_adapter
from bokehflux.weights.files.checkpoint import open_checkpoint
from tests.helpers import max_error
from tests.tiny import tiny_mmdit
from tests.unit.test_train_adapter import rope, toy_batch
from tests.unit.test_training import COURSE, Toy, broken

CUDA = torch.device("cuda")


@pytest.mark.parametrize("kernel", ["cudnn", "flash", "efficient"])
@pytest.mark.parametrize("pivot_of", [(0, 1), (0, 0), (0, 0, 0, 0), (0, 0, 2, 2, 2)], ids=str)
@pytest.mark.parametrize(("length", "dim"), [(1536, 128), (1000, 128), (63, 64)])
def test_gradients_of_grounded_attention(
    kernel: str, pivot_of: tuple[int, ...], length: int, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most twice the error of PyTorch's own autograd on the published formulation, both in bfloat16."""
    monkeypatch.setattr(stock, "_kernel", lambda _: kernel)
    torch.manual_seed(0)
    pivots = sorted(set(pivot_of))
    shapes = [(len(pivots), length, 2, dim)] + [(len(pivot_of), length, 2, dim)] * 3
    q, k, v, weight = (torch.randn(shape, device=CUDA, dtype=torch.bfloat16) for shape in shapes)
    dtype = torch.float32 if kernel == "efficient" else torch.bfloat16

    def run(attend: object, dtype: torch.dtype) -> list[Tensor]:
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = attend(*inputs, pivot_of)  # type: ignore[operator]
        return [out.detach(), *torch.autograd.grad(out, inputs, weight.to(dtype))]

    def published(q: Tensor, k: Tensor, v: Tensor, pivot_of: tuple[int, ...]) -> Tensor:
        queries = q[[pivots.index(p) for p in pivot_of]].transpose(1, 2)
        keys, values = torch.cat([k, k[list(pivot_of)]], dim=1), torch.cat([v, v], dim=1)
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(queries, keys.transpose(1, 2), values.transpose(1, 2)).transpose(1, 2)

    exact, theirs = run(reference.grounded_attention, torch.float32), run(published, torch.bfloat16)
    ours = run(stock.grounded_attention, dtype)
    for name, a, b, e in zip("oqkv", ours, theirs, exact, strict=True):
        assert max_error(a, e) <= 2 * max_error(b, e) + 1e-6, name


@pytest.mark.parametrize("gradient", [False, True])
def test_what_is_not_finite_changes_nothing_and_nobody_waits(tmp_path: Path, gradient: bool) -> None:
    """A refused step on a GPU, where the host hears of it in the next one; no step waits for the device."""
    toy, before = Toy().to(CUDA), {}
    optimizer = Optimizer(list(toy.named_parameters()), 0.05, matrices=[toy.matrix])
    wrong = broken(5, gradient=gradient)(toy.loss)

    def watched(at: Step) -> tuple[Tensor, dict[str, Tensor]]:
        tensors = (*toy.parameters(), *optimizer.moments().values())
        before[at.number] = [x.detach().clone() for x in tensors]
        torch.cuda.set_sync_debug_mode("error" if at.number > 1 else "default")
        return wrong(at)

    try:
        train(watched, optimizer, COURSE, log := Log(tmp_path / "log.json", every=100))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(before[5], before[6], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(before[6], before[7], strict=True))
    assert [entry["step"] for entry in log.notes["refused"]] == [5]  # type: ignore[union-attr]


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_recorded_step_has_the_gradients_of_an_eager_one(share: float) -> None:
    mmdit = tiny_mmdit().to(CUDA)
    named = trainable_adapter(mmdit)
    parameters = [p for _, p in named]
    keep_activations(mmdit, share, compile=False)
    table = type(rope())(*(x.to(CUDA) for x in rope()))

    def loss(attention: object, *tensors: Tensor) -> Tensor:
        return adapter_step(mmdit, AdapterBatch.of(attention, *tensors), table)  # type: ignore[arg-type]

    recorded = Recorded(loss, parameters)
    with torch.cuda.stream(torch.cuda.Stream()):  # since `value` is there when the second kind is recorded
        for grouped in (True, False, True, False):
            batch = toy_batch(grouped)
            inputs = [x.to(CUDA) * (1.1 if grouped else 1.0) for x in batch.tensors()]
            with torch.autocast("cuda", torch.bfloat16):
                eager = torch.autograd.grad(loss(batch.attention, *inputs), parameters)
                value = recorded(batch.attention, *inputs)
            value.backward()
            for p, expected in zip(parameters, eager, strict=True):
                assert p.grad is not None
                atol = 1e-3 * float(expected.abs().max())
                torch.testing.assert_close(p.grad, expected, rtol=0.05, atol=atol)
                with torch.no_grad():
                    p.sub_(0.01 * p.grad)  # the next step must see it
                p.grad = None


def test_a_recipe_with_graphs_records_both_kinds_of_steps(tmp_path: Path) -> None:
    """As a run does, with patterns of grounded rows: its curve is that of a run without, to bfloat16."""
    torch.manual_seed(0)
    x0, levels = torch.randn(6, 4, 16, 16, 16), torch.rand(6, 4) * 30
    write_latents(tmp_path / "scenes", x0, levels, [["a red ball"], ["a blue cube"]] * 3)
    recipe = AdapterRecipe(
        model="nano", groups=str(tmp_path / "scenes"), rank=8, batch=8, steps=12, lr=1e-3, warmup_steps=4,
        log_every=1, swap_probability=0.5, activations=1.0,
    )  # fmt: skip
    curves = []
    for graphs in (False, True):
        train_adapter(dataclasses.replace(recipe, graphs=graphs), out := tmp_path / str(graphs), CUDA)
        points = json.loads((out / "log.json").read_text())["points"]
        curves.append([point.get("plain", point.get("grounded")) for point in points])
    assert curves[1] == pytest.approx(curves[0], rel=0.02) and len(curves[0]) == 12


def test_killed_twice_and_resumed_bit_by_bit(tmp_path: Path) -> None:
    """kill -9 at random steps of 40, with the deterministic backend: weights, average, moments and curve."""
    torch.manual_seed(0)
    x0 = torch.randn(6, 4, 16, 16, 16)
    levels = torch.rand(6, 4) * 30
    write_latents(tmp_path / "scenes", x0, levels, [["a red ball"], ["a blue cube"]] * 3)
    recipe = AdapterRecipe(
        model="nano", groups=str(tmp_path / "scenes"), rank=8, batch=8, steps=40, lr=1e-3, warmup_steps=4,
        save_every=3, log_every=5, deterministic=True,
    )  # fmt: skip
    recipe.write(tmp_path / "recipe.toml")

    def start(out: str, *more: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "bokehflux", "train", "--config", str(tmp_path / "recipe.toml")]
        return subprocess.Popen([*command, "--output", str(tmp_path / out), "--device", "cuda", *more])

    whole = start("whole")
    assert whole.wait() == 0
    rng, state = random.Random(0), tmp_path / "killed" / "state.safetensors"
    done = 0
    for number in range(2):
        done = rng.randrange(done + 4, 20 * (number + 1))
        child = start("killed", *(["--resume"] if number else []))
        while child.poll() is None and steps_of(state) < done:
            pass
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL, "it came to its end before it was killed"
    assert start("killed", "--resume").wait() == 0
    files = [open_checkpoint(tmp_path / out / "adapter" / "model.safetensors") for out in ("whole", "killed")]
    for name in files[0].shapes:
        assert torch.equal(files[0].read(name), files[1].read(name)), name
    logs = [json.loads((tmp_path / out / "log.json").read_text())["points"] for out in ("whole", "killed")]
    for log in logs:
        for point in log:
            point.pop("seconds")
    assert logs[0] == logs[1]


def steps_of(state: Path) -> int:
    """Steps that a saved state has behind it."""
    if not state.is_file():
        return 0
    file = open_checkpoint(state)
    step = json.loads(file.metadata["state"])["step"]
    file.close()
    return int(step)
