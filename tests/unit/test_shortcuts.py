"""Shortcuts of grounded runs: what is computed, what follows the pivot, and how far it may be from exact."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from bokehflux.pipeline.run import Result
from bokehflux.record import Record
from bokehflux.sampling.pivot_cache import PivotCache
from bokehflux.sampling.samplers import euler
from bokehflux.sampling.shortcuts import is_computed, reused, without_pivot
from bokehflux.settings import GenerateSettings
from tests.tiny import tiny_pipeline

STEPS = 14
COMPUTED = 4 + 2 + 3
"""Steps of 14 with reuse 3: the first, the last, and 4, 7 and 11, the first without grounding."""
LEVELS = [0, 8, 28]


def generate(pipe: Any, levels: list[float] = LEVELS, **options: Any) -> Result:
    return pipe.generate("a red mug", levels, bokeh_pivot=15, num_inference_steps=STEPS, **options)


def rows_of(pipe: Any) -> list[int]:
    """Filled while the network runs: rows of every evaluation."""
    seen: list[int] = []
    pipe.transformer.double_blocks[0].attention.register_forward_pre_hook(
        lambda _, args: seen.append(len(args[3]))
    )
    return seen


@given(st.integers(2, 12), st.integers(1, 60), st.integers(1, 60))
def test_what_is_computed(every: int, steps: int, grounded: int) -> None:
    computed = [step for step in range(steps) if is_computed(step, every, steps, grounded)]
    ends = {*range(min(4, steps)), *range(max(0, steps - 2), steps)}
    assert ends <= set(computed)
    assert grounded in computed or grounded >= steps
    assert all(b - a <= every + 1 for a, b in itertools.pairwise(computed))
    assert len(computed) - len(ends) <= 2 + max(0, steps - 6) // every


def test_thirty_steps_save_the_rows_that_the_documents_say() -> None:
    rows = {every: sum(7 if is_computed(i, every, 30, 24) else 1 for i in range(30)) for every in (2, 3, 4)}
    assert rows == {2: 138, 3: 114, 4: 102}  # of 210


@given(
    st.integers(2, 5), st.integers(8, 24), st.integers(1, 24), st.floats(-2, 2), st.floats(-2, 2),
    st.floats(-2, 2),
)  # fmt: skip
def test_a_difference_that_is_linear_in_the_noise_level_is_exact(
    every: int, steps: int, grounded: int, offset: float, slope: float, jump: float
) -> None:
    """... once the line is known: over noise levels that are not evenly spaced, whatever the pivot does, and
    with a jump where grounding ends."""
    sigmas, x = torch.linspace(1, 0, steps + 1) ** 2, torch.randn(1, 3, 4).expand(4, -1, -1)
    asked: list[int] = []

    def pivot(x: Tensor, sigma: Tensor, step: int) -> Tensor:
        return torch.sin(3 * x[:1] + 5 * sigma)

    def velocity(x: Tensor, sigma: Tensor, step: int) -> Tensor:
        asked.append(step)
        line = offset + slope * sigma + jump * (step >= grounded)
        return pivot(x, sigma, step) + torch.arange(4.0).view(4, 1, 1) * line

    exact: list[Tensor] = []
    euler(velocity, x, sigmas, lambda info: exact.append(info.latents))
    asked.clear()
    short: list[Tensor] = []
    followed = reused(velocity, pivot, every, sigmas, grounded)
    euler(followed, x, sigmas, lambda info: short.append(info.latents))
    assert all(torch.equal(one[0], other[0]) for one, other in zip(short, exact, strict=True))
    assert asked == [step for step in range(steps) if is_computed(step, every, steps, grounded)]
    astray = torch.zeros_like(x)  # what the last steps of grounding guessed, and nobody mends
    before = [step for step in asked if step < grounded]
    if 0 < grounded < steps and before[-1] < grounded - 1:
        astray = short[grounded - 1] - exact[grounded - 1]
        scale = abs(slope) * float(sigmas[before[-1]] - sigmas[grounded]) ** 2
        assert astray.abs().max() <= 3 * scale + 1e-4
    torch.testing.assert_close(short[-1], exact[-1] + astray, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"true_cfg": 2.0}, {"max_rows": 2}], ids=str)
def test_a_sweep(options: dict[str, Any]) -> None:
    """The pivot is as it was, targets are nearer to the exact ones than with half of the steps."""
    pipe = tiny_pipeline()
    exact = generate(pipe, **options)
    seen = rows_of(pipe)
    short = generate(pipe, reuse=3, **options)
    passes = 2 if "true_cfg" in options else 1
    assert sum(seen) == passes * (STEPS + COMPUTED * len(LEVELS))
    torch.testing.assert_close(short.pivot_latents, exact.pivot_latents, atol=2e-4, rtol=0)
    coarse = pipe.generate("a red mug", LEVELS, bokeh_pivot=15, num_inference_steps=STEPS // 2, **options)
    error = (short.latents - exact.latents).square().mean()
    assert 1e-8 < error < (coarse.latents - exact.latents).square().mean() / 4
    assert ", reuse 3 " in short.record.settings.summary
    assert short.record.recipe()["reuse"] == 3 and "reuse" not in exact.record.recipe()


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("filled_with", [None, 3])
def test_a_pivot_cache_gives_the_pivot_of_every_step(device: str | None, filled_with: int | None) -> None:
    """Whether or not the run that filled it took the shortcut; steps between cost nothing then."""
    pipe = tiny_pipeline()
    whole, cache = generate(pipe, reuse=3), PivotCache(device)
    generate(pipe, [0], reuse=filled_with, pivot_cache=cache)
    seen = rows_of(pipe)
    later = generate(pipe, [28, 8], reuse=3, pivot_cache=cache)
    assert seen == [2] * COMPUTED
    torch.testing.assert_close(later.latents, whole.latents[[2, 1]], atol=2e-4, rtol=0)
    torch.testing.assert_close(later.pivot_latents, whole.pivot_latents, atol=2e-4, rtol=0)


def test_a_pivot_that_is_left_out() -> None:
    """Targets are computed as before, and keep nearly the pivot's colours; nobody gets a picture of it."""
    pipe = tiny_pipeline()
    exact = generate(pipe)
    seen = rows_of(pipe)
    short = generate(pipe, pivot_steps="grounded")
    grounded = round(0.8 * STEPS)
    assert seen == [1 + len(LEVELS)] * grounded + [len(LEVELS)] * (STEPS - grounded)
    torch.testing.assert_close(short.latents, exact.latents, atol=2e-4, rtol=0)
    assert short.pivot_image is None and short.pivot_latents is None
    assert exact.pivot_image is not None and exact.pivot_latents is not None
    for mine, theirs in zip(short.images, exact.images, strict=True):
        assert np.abs(np.asarray(mine, float).mean((0, 1)) - np.asarray(theirs, float).mean((0, 1))).max() < 6
    assert short.record.recipe()["pivot_steps"] == "grounded"
    whole = generate(pipe, pivot_steps="grounded", num_grounding_steps=STEPS)
    assert whole.pivot_image is None
    torch.testing.assert_close(whole.latents, generate(pipe, num_grounding_steps=STEPS).latents)


@given(st.integers(1, 9), st.integers(1, 9))
def test_a_row_that_is_left_goes_on_straight(grounded: int, more: int) -> None:
    """... to what the network held it for when it was last computed."""
    sigmas, x = torch.linspace(1, 0, grounded + more + 1), torch.randn(1, 3, 4).expand(3, -1, -1)

    def velocity(x: Tensor, sigma: Tensor, step: int) -> Tensor:
        return x * sigma

    before = euler(velocity, x, sigmas[:grounded])
    held = before[0] - sigmas[grounded - 1] * before[0] * sigmas[grounded - 1]
    short = euler(without_pivot(velocity, velocity, grounded), x, sigmas)
    torch.testing.assert_close(short[0], held, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(short[1:], euler(velocity, x, sigmas)[1:])


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"bokeh_pivot": None}, "needs a grounded run"),
        ({"num_grounding_steps": 0}, "needs a grounded run"),
        ({"reuse": 2}, "follows the pivot"),
        ({"pivot_cache": PivotCache()}, "keeps the whole pivot"),
        ({"pivot_steps": "some"}, "all or grounded"),
    ],
    ids=["no pivot", "not grounded", "reuse", "cache", "no such steps"],
)
def test_a_pivot_that_cannot_be_left_out(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        tiny_pipeline().generate("a mug", [0, 8], **{"bokeh_pivot": 15, "pivot_steps": "grounded", **options})


def test_refocus_computes_nothing_between() -> None:
    pipe = tiny_pipeline()
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)).resize((48, 32))
    options = {"photo_level": 7, "height": 32, "width": 48, "num_inference_steps": STEPS}
    exact = pipe.refocus(photo, "a mug", [7, 30], method="inversion", **options)
    seen = rows_of(pipe)
    short = pipe.refocus(photo, "a mug", [7, 30], method="inversion", reuse=3, **options)
    assert seen == [1] * STEPS + [3] * COMPUTED  # there, and back
    assert 1e-8 < (short.latents - exact.latents).square().mean() < exact.latents.var() / 100


@pytest.mark.parametrize(
    "asked",
    [{}, {"bokeh_targets": [3]}, {"bokeh_targets": [3], "bokeh_pivot": 15, "num_grounding_steps": 0}],
)
def test_reuse_needs_a_pivot(asked: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="reuse needs a grounded run.*give bokeh_pivot"):
        GenerateSettings(prompt="a mug", reuse=3, **asked)


def test_a_picture_is_made_again_from_its_recipe() -> None:
    pipe = tiny_pipeline()
    made = generate(pipe, reuse=2)
    settings = Record.from_recipe(made.record.recipe()).settings
    values = {name: getattr(settings, name) for name in settings.fields()}
    assert torch.equal(pipe.generate(**values).latents, made.latents)
