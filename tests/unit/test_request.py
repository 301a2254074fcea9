"""Requests: what is refused and filled in, how they come back from a recipe, and running out of memory."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bokehflux.record import Request
from tests.tiny import tiny_pipeline

FULL = Request(
    prompt="a cup", bokeh_targets=(0.0, 4.5), bokeh_pivot=10.0, num_inference_steps=4, num_grounding_steps=2,
    guidance_scale=3.5, true_cfg=1.5, negative_prompt="", height=32, width=48, seed=-1,
)  # fmt: skip


@pytest.mark.parametrize("request_", [FULL, Request(prompt="p")])
def test_a_recipe_gives_the_request_back(request_: Request) -> None:
    recipe = json.loads(json.dumps({**dataclasses.asdict(request_), "model": "nano", "further": 1}))
    assert Request.from_recipe(recipe) == request_


@pytest.mark.parametrize(("name", "value"), [
    ("prompt", 3), ("prompt", None), ("bokeh_targets", 4), ("bokeh_targets", ["x"]),
    ("bokeh_targets", [True]),
    ("bokeh_targets", [0.0] * 1001), ("bokeh_pivot", "15"), ("bokeh_pivot", 31), ("num_inference_steps", 2.5),
    ("num_inference_steps", True), ("guidance_scale", None), ("guidance_scale", float("nan")),
    ("seed", "1"), ("seed", 2**70), ("height", {}), ("negative_prompt", []), ("width", 3),
])  # fmt: skip
def test_recipes_from_strangers_are_checked(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name.split("_")[0]):
        Request.from_recipe({**json.loads(json.dumps(dataclasses.asdict(FULL))), name: value})


def test_a_recipe_that_lacks_a_field() -> None:
    with pytest.raises(ValueError, match="lacks 'prompt'"):
        Request.from_recipe({})


@given(st.dictionaries(
    st.sampled_from([field.name for field in dataclasses.fields(Request)]),
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.floats(), max_size=3),
))  # fmt: skip
def test_any_recipe_gives_a_request_or_a_message(changes: dict[str, Any]) -> None:
    try:
        Request.from_recipe({**dataclasses.asdict(FULL), "bokeh_targets": [0.0], **changes})
    except ValueError as error:
        assert str(error)


def test_completed_is_what_generate_fills_in() -> None:
    pipe = tiny_pipeline()
    for request in (
        Request(prompt="p"),
        FULL,
        Request(prompt="p", bokeh_targets=(3,), bokeh_pivot=3, height=47),
    ):
        settings = request.run(pipe).settings
        completed = dataclasses.asdict(request.completed(pipe.defaults))
        completed["bokeh_targets"] = completed["bokeh_targets"] and list(completed["bokeh_targets"])
        assert {name: settings[name] for name in completed} == completed


class Cramped:
    """A pipeline that holds a limited number of rows."""

    device = torch.device("cpu")

    def __init__(self, room: int) -> None:
        self.room = room
        self.asked: list[int | None] = []

    def generate(self, prompt: str, targets: list[float] | None, **kwargs: Any) -> str:
        self.asked.append(kwargs["max_rows"])
        rows = len(targets or [0]) + (kwargs["bokeh_pivot"] is not None)
        if min(rows, kwargs["max_rows"] or rows) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "made"


@pytest.mark.parametrize(("room", "first", "asked"), [
    (7, None, [None]), (6, None, [None, 3]), (2, None, [None, 3, 1]), (4, 5, [5, 2]), (1, None, [None, 3, 1]),
])  # fmt: skip
def test_out_of_memory_means_fewer_rows(room: int, first: int | None, asked: list[int | None]) -> None:
    pipe = Cramped(room)
    request = Request(prompt="p", bokeh_targets=(0, 5, 10, 15, 20, 25), bokeh_pivot=15)
    run = request.run(pipe, max_rows=first)  # type: ignore[arg-type]
    assert run == "made" and pipe.asked == asked


def test_a_picture_that_does_not_fit_at_all() -> None:
    with pytest.raises(ValueError, match="even one picture at a time does not fit: CUDA out of memory"):
        Request(prompt="p", bokeh_targets=(0, 5)).run(Cramped(0))  # type: ignore[arg-type]
