"""Settings and records: what is refused and filled in, and how they come back from a recipe."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bokehflux.pipeline.run import with_fewer_rows
from bokehflux.record import Provenance, Record
from bokehflux.sampling.latents import LatentGrid, noise
from bokehflux.settings import GenerateSettings, RefocusSettings, Settings
from tests.tiny import tiny_pipeline

FULL = GenerateSettings(
    prompt="a cup", bokeh_targets=(0.0, 4.5), bokeh_pivot=10.0, num_inference_steps=4, num_grounding_steps=2,
    guidance_scale=3.5, true_cfg=1.5, negative_prompt="", height=32, width=48, seed=1,
    max_sequence_length=9, pivot_steps="grounded",
)  # fmt: skip
FOLLOWING = dataclasses.replace(
    FULL, pivot_steps=None, reuse=2, controls="focus=0.5", file_hashes=(("map", "1"),)
)  # fmt: skip
LENS = dataclasses.replace(
    FOLLOWING, controls=None, bokeh_pivot=0.0, focus=("far", "12,8"), aperture="donut:0.5", highlights=2.0,
    file_hashes=(("aperture", "0"),),
)  # fmt: skip
PHOTO = RefocusSettings(
    method="inversion", prompt="a mug", bokeh_targets=(3.0,), bokeh_pivot=7.0, photo="mug.jpg", photo_hash="0"
)
MADE_BY = Provenance(
    model="m", vae="ae.sft", clip="c.sft", t5="t.sft", tokenizers="k",
    adapter="a", schedule="dev", loras=(("l", 0.5),), model_hash="h", adapter_hash="i",
    lora_hashes=(("j", 0.5),), dtype="float32", compute="dtype", device="cpu", device_name="x", threads=2,
    torch="2", triton=None, version="1", attention="sdpa", memory="resident", max_rows=2, vae_tiling=True,
)  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [FULL, FOLLOWING, LENS, GenerateSettings(prompt="p"), PHOTO],
    ids=["full", "following", "lens", "bare", "photo"],
)
@pytest.mark.parametrize("role", ["target", "pivot", "sheet", None])
def test_a_recipe_gives_the_record_back(settings: Settings, role: str | None) -> None:
    level = 4.5 if role in ("target", "pivot") else None
    focus = "far" if settings is LENS and role == "target" else None
    record = Record(settings=settings, provenance=MADE_BY, role=role, bokeh_level=level, in_focus=focus)
    recipe = json.loads(json.dumps({**record.recipe(), "further": 1}))
    assert Record.from_recipe(recipe) == record
    assert next(iter(recipe)) == "prompt"


def test_every_field_differs_from_its_default_above() -> None:
    """Otherwise a field that is lost on the way would go unseen."""
    for those in ((FULL, FOLLOWING, LENS), (MADE_BY,)):
        fields = those[0].fields().items()
        same = [n for n, field in fields if all(getattr(made, n) == field.default for made in those)]
        assert set(same) <= {"triton"}


@pytest.mark.parametrize(("name", "value"), [
    ("prompt", 3), ("prompt", None), ("bokeh_targets", 4), ("bokeh_targets", ["x"]),
    ("bokeh_targets", [True]), ("bokeh_targets", "28"), ("bokeh_targets", {"0": 1}),
    ("bokeh_targets", [0.0] * 1001), ("bokeh_pivot", "15"), ("bokeh_pivot", 31), ("num_inference_steps", 2.5),
    ("num_inference_steps", True), ("guidance_scale", None), ("guidance_scale", float("nan")),
    ("guidance_scale", 10**400), ("seed", "1"), ("seed", 2**70), ("height", {}), ("negative_prompt", []),
    ("width", 3), ("true_cfg", 0.5), ("num_grounding_steps", 5), ("model", 7), ("loras", "ab"),
    ("loras", [["a"]]), ("loras", {}), ("threads", 0), ("vae_tiling", 1),
])  # fmt: skip
def test_recipes_from_strangers_are_checked(name: str, value: object) -> None:
    recipe = json.loads(json.dumps(Record(settings=FULL, provenance=MADE_BY).recipe()))
    says = "level" if name.startswith("bokeh") else name
    with pytest.raises(ValueError, match=f"the recipe cannot be used: .*{says}"):
        Record.from_recipe({**recipe, name: value})


def test_what_a_replay_says_of_another_place() -> None:
    """Whatever can move the last bits; not names of files, which say nothing about what is in them."""
    assert MADE_BY.marked("matters").keys() == {
        "model_hash", "adapter_hash", "lora_hashes", "dtype", "compute", "device_name", "threads", "torch",
        "triton", "version", "attention",
    }  # fmt: skip


def test_a_recipe_that_lacks_a_field() -> None:
    """The prompt must be there; what an older version did not know takes its default."""
    with pytest.raises(ValueError, match="lacks 'prompt'"):
        Record.from_recipe({})
    assert Record.from_recipe({"prompt": "p"}).settings == GenerateSettings(prompt="p")


ANY = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.floats(), max_size=3)
    | st.lists(st.text(), max_size=2) | st.dictionaries(st.text(), st.integers(), max_size=2)
)  # fmt: skip


@given(st.dictionaries(st.sampled_from([*FULL.fields(), *MADE_BY.fields(), "role", "bokeh_level"]), ANY))
def test_any_recipe_gives_a_record_or_a_message(changes: dict[str, Any]) -> None:
    try:
        record = Record.from_recipe({**FULL.recipe(), **MADE_BY.recipe(), **changes})
    except ValueError as error:
        assert str(error)
    else:
        assert Record.from_recipe(json.loads(json.dumps(record.recipe()))) == record


def test_a_negative_seed_of_an_early_recipe_is_the_same_noise() -> None:
    again = GenerateSettings.from_recipe({"prompt": "p", "seed": -5})
    grid = LatentGrid(height_px=16, width_px=16)
    assert again.seed is not None
    early = torch.randn(1, 16, 2, 2, generator=torch.Generator().manual_seed(-5))
    assert torch.equal(noise(grid, again.seed, torch.float32), early)


def test_a_random_seed_is_drawn_once_and_recorded() -> None:
    pipe = tiny_pipeline()
    one, other = (pipe.generate("p", seed=None, num_inference_steps=1) for _ in range(2))
    settings = one.record.settings
    assert isinstance(settings, GenerateSettings) and settings.seed is not None
    assert settings != other.record.settings
    assert torch.equal(pipe.generate(**settings.recipe()).latents, one.latents)


def test_numbers_of_numpy_and_torch_become_plain() -> None:
    settings = GenerateSettings(
        prompt="p", bokeh_targets=np.array([3, 28], np.float32), bokeh_pivot=torch.tensor(12.5),  # type: ignore[arg-type]
        num_inference_steps=np.int64(4), seed=np.int32(9), height=torch.tensor(32),  # type: ignore[arg-type]
    )  # fmt: skip
    plain = {name: type(value) for name, value in vars(settings).items() if value is not None}
    assert plain["bokeh_pivot"] is float and plain["num_inference_steps"] is plain["seed"] is int
    assert settings.bokeh_targets == (3.0, 28.0) and {type(x) for x in settings.bokeh_targets} == {float}
    assert json.loads(json.dumps(settings.recipe()))["height"] == 32


@pytest.mark.parametrize(("name", "value"), [
    ("bokeh_targets", [np.True_]), ("bokeh_targets", np.array([True])), ("bokeh_targets", {3, 28}),
    ("bokeh_targets", torch.tensor([True])), ("bokeh_targets", frozenset([3])),
    ("focus", {"near", "far"}), ("controls", {"aperture=donut": 1}),
    ("bokeh_targets", bytearray(b"28")), ("bokeh_pivot", np.False_), ("guidance_scale", torch.tensor(True)),
    ("num_inference_steps", np.True_), ("seed", torch.tensor(True)),
])  # fmt: skip
def test_a_switch_or_a_set_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be .*, got "):
        GenerateSettings(**{"prompt": "p", "bokeh_targets": [3], "bokeh_pivot": 15, name: value})


def test_what_can_be_read_only_once_is_not_lost() -> None:
    assert Provenance(loras=(pair for pair in MADE_BY.loras)).loras == MADE_BY.loras  # type: ignore[arg-type]


def test_completed_is_what_generate_fills_in() -> None:
    pipe = tiny_pipeline()
    for settings in (
        GenerateSettings(prompt="p"),
        FULL,
        GenerateSettings(prompt="p", bokeh_targets=(3,), bokeh_pivot=3, height=47),
    ):
        assert pipe.generate(**settings.recipe()).record.settings == settings.completed(pipe.defaults)


def test_grounding_that_followed_from_a_default_stays_open() -> None:
    grounded = dataclasses.replace(FULL, num_inference_steps=5, num_grounding_steps=4)
    assert grounded.with_open_grounding().num_grounding_steps is None
    assert FULL.with_open_grounding() == FULL
    plain = GenerateSettings(prompt="p", num_inference_steps=5, num_grounding_steps=0)
    assert plain.with_open_grounding().num_grounding_steps is None


def test_what_decides_a_picture() -> None:
    """Every setting but levels and foci of the batch, and which model in which arithmetic; not the place."""
    decides = [Record(settings=asked, provenance=MADE_BY).decides() for asked in (FULL, FOLLOWING, LENS)]
    assert {key for each in decides for key in each} == (set(FULL.fields()) - {"bokeh_targets", "focus"}) | {
        "model_hash", "adapter_hash", "lora_hashes", "dtype", "compute", "schedule",
    }  # fmt: skip


class Cramped:
    """Runs that hold a limited number of rows."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.asked: list[int | None] = []

    def __call__(self, max_rows: int | None) -> str:
        self.asked.append(max_rows)
        if min(7, max_rows or 7) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "made"


@pytest.mark.parametrize(("room", "first", "asked"), [
    (7, None, [None]), (6, None, [None, 3]), (2, None, [None, 3, 1]), (4, 5, [5, 2]), (1, None, [None, 3, 1]),
])  # fmt: skip
def test_out_of_memory_means_fewer_rows(room: int, first: int | None, asked: list[int | None]) -> None:
    run = Cramped(room)
    assert with_fewer_rows(run, 7, first) == "made" and run.asked == asked


def test_a_picture_that_does_not_fit_at_all() -> None:
    with pytest.raises(ValueError, match="even one picture at a time does not fit: CUDA out of memory"):
        with_fewer_rows(Cramped(0), 7, None)


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_texts_without_end_are_refused(field: str) -> None:
    texts = {"prompt": "a", "negative_prompt": "b", "true_cfg": 2.0}
    GenerateSettings(**texts | {field: "a" * 20_000})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"{field} has 20001 characters, more than the 20000 allowed"):
        GenerateSettings(**texts | {field: "a" * 20_001})  # type: ignore[arg-type]


@pytest.mark.parametrize(("rows", "max_rows", "tried"), [
    (1, None, [None]), (1, 4, [4]), (7, None, [None, 3, 1]), (7, 4, [4, 2, 1]), (2, 9, [9, 1]),
])  # fmt: skip
def test_no_attempt_is_made_twice(rows: int, max_rows: int | None, tried: list[int | None]) -> None:
    seen: list[int | None] = []

    def run(at_once: int | None) -> None:
        seen.append(at_once)
        raise MemoryError("none left")

    with pytest.raises(ValueError, match="even one picture at a time does not fit: none left"):
        with_fewer_rows(run, rows, max_rows)
    assert seen == tried
