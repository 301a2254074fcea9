"""Focus, aperture and map as settings of generate and sweep, for models with a control adapter."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bokehflux.app.arguments import parsers, settings_from
from bokehflux.controls import Asked, parse_controls
from bokehflux.models.controls import token_features
from bokehflux.models.linear import LowRankTerm
from bokehflux.pipeline.controls import level_map
from bokehflux.pipeline.generate import plan_generate
from bokehflux.pipeline.memory import place
from bokehflux.pipeline.pipeline import Pipeline
from bokehflux.pipeline.run import check_levels
from bokehflux.sampling.pivot_cache import PivotCache
from bokehflux.settings import GenerateSettings
from tests.tiny import tiny_pipeline
from tests.unit.test_controls import adapter

ASKED: dict[str, Any] = {"bokeh_targets": (8.0, 28.0), "bokeh_pivot": 15.0, "num_inference_steps": 3}


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return dataclasses.replace(tiny_pipeline(), controls=adapter())


def made(pipe: Pipeline, **more: Any) -> torch.Tensor:
    return pipe.generate("a", **{**ASKED, **more}).latents


def test_every_plane_is_another_picture(pipe: Pipeline) -> None:
    planes = [made(pipe, controls=f"focus={focus}") for focus in ("near", 0.4, "far")]
    assert len({tuple(x.flatten()[:4].tolist()) for levels in planes for x in levels}) == 6
    alone = made(pipe, controls="focus=0.4", bokeh_targets=(28.0,))
    torch.testing.assert_close(alone[0], planes[1][1], atol=2e-5, rtol=1e-5)


def test_the_pivot_is_asked_for_nothing(pipe: Pipeline) -> None:
    plain = pipe.generate("a", **ASKED)
    asked = pipe.generate("a", **ASKED, controls="focus=far aperture=donut")
    assert plain.pivot_latents is not None and asked.pivot_latents is not None
    torch.testing.assert_close(asked.pivot_latents, plain.pivot_latents, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(asked.latents, plain.latents, atol=1e-3)


def test_an_aperture_without_a_focus_is_the_subjects(pipe: Pipeline) -> None:
    assert torch.equal(
        made(pipe, controls="aperture=donut"), made(pipe, controls="aperture=donut focus=near")
    )
    assert torch.equal(made(pipe, controls="aperture=disc"), made(pipe, controls="focus=near"))


def test_apertures_show(pipe: Pipeline) -> None:
    shapes = [made(pipe, controls=f"aperture={shape}") for shape in ("polygon:3", "donut", "disc")]
    assert not any(
        torch.allclose(a, b, atol=1e-4) for a, b in ((shapes[0], shapes[1]), (shapes[1], shapes[2]))
    )


@pytest.mark.parametrize("how", ["reuse", "pivot_steps", "max_rows", "pivot_cache", "true_cfg"])
def test_with_the_ways_of_a_run(pipe: Pipeline, how: str) -> None:
    """Each still tells planes of focus apart; those that change no number change none."""
    far = {"controls": "focus=far", "bokeh_targets": (20.0,)}
    usual = made(pipe, **far)
    more: dict[str, Any] = {"reuse": 2} if how == "reuse" else {how: {"true_cfg": 2.0}.get(how, 1)}
    if how == "pivot_steps":
        more = {how: "grounded"}
    if how == "pivot_cache":
        cache = PivotCache()
        made(pipe, **far, pivot_cache=cache)
        more = {how: cache}
    found = made(pipe, **far, **more)
    assert not torch.allclose(found, made(pipe, bokeh_targets=(20.0,)), atol=1e-3)
    if how not in ("reuse", "true_cfg"):
        torch.testing.assert_close(found, usual, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["offload", "stream"])
def test_in_every_memory_mode(pipe: Pipeline, mode: Any) -> None:
    asked = {"controls": "focus=far"}
    home = dataclasses.replace(tiny_pipeline(), controls=pipe.controls)
    placed = place(home.transformer, (), home.vae, mode, torch.device("cpu"))
    away = dataclasses.replace(home, memory=placed)
    assert torch.equal(made(away, **asked), made(pipe, **asked))


def test_beside_a_lora(pipe: Pipeline) -> None:
    """Both act."""
    other = dataclasses.replace(tiny_pipeline(), controls=pipe.controls)
    term = LowRankTerm(down=torch.randn(2, 32), up=torch.randn(96, 2), strength=0.1)
    other.transformer.doubles[0].img_attn.qkv.terms = (term,)
    found = [made(each, controls=f"focus={f}") for each in (pipe, other) for f in (0, 1)]
    assert len({tuple(x.flatten()[:4].tolist()) for x in found}) == 4


def test_a_map_of_levels(pipe: Pipeline, tmp_path: Path) -> None:
    """Shares of the level, in a picture or an array, at any size; it is every row's."""
    half = np.zeros((4, 6), np.float32)
    half[:, 3:] = 1
    np.save(tmp_path / "half.npy", half)
    Image.fromarray((half * 255).astype(np.uint8)).save(tmp_path / "half.png")
    found = level_map(tmp_path / "half.npy", 32, 48)
    assert found.shape == (32, 48) and not found[:, :20].any() and (found[:, 28:] == 1).all()
    array, picture = (made(pipe, controls=f"map={tmp_path}/half.{k}") for k in ("npy", "png"))
    torch.testing.assert_close(array, picture)
    assert not torch.allclose(array, made(pipe), atol=1e-3)
    plan = plan_generate(pipe, GenerateSettings(
        prompt="a", **ASKED, controls=f"map={tmp_path}/half.npy", seed=1
    ))  # fmt: skip
    assert [name for name, _ in plan.settings.file_hashes or ()] == ["map"]
    assert token_features(found[None]).shape == (1, 6, 8)


@pytest.mark.parametrize(
    ("values", "said"),
    [(np.full((4, 4), 2.0), "-1 to 1"), (np.full((4, 4), np.nan), "-1 to 1"), (np.zeros(4), "shape")],
)
def test_maps_that_are_none(tmp_path: Path, values: np.ndarray, said: str) -> None:
    np.save(tmp_path / "map.npy", values)
    with pytest.raises(ValueError, match=said):
        level_map(tmp_path / "map.npy", 32, 32)
    with pytest.raises(ValueError, match="cannot read the level map"):
        level_map(tmp_path / "missing.npy", 32, 32)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected one of focus"), ("focus=0.4 map=m.png", "leave one out"), ("focus=2", "from 0"),
        ("focus=120,80", "near, far or a number"), ("focus=nan", "from 0"),
        ("blur=3", "expected focus=NUMBER"),
        ("focus=0.1 focus=0.2", "at most once"), ("aperture=round", "expected disc"),
        ("focus", "got 'focus'"), ("map='a b", "No closing quotation"), ("map=", "got 'map='"),
    ],
)  # fmt: skip
def test_words_that_ask_for_nothing(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        GenerateSettings(prompt="a", **{**ASKED, "controls": text})


def test_text_and_value() -> None:
    for text in ("focus=0.4 aperture=polygon:6@15", "focus=1.0", "'map=my maps/half.png'"):
        assert str(parse_controls(text)) == text
    assert parse_controls("focus=near") == Asked(focus=0.0)
    assert parse_controls(["map=my maps/half.png", "aperture=disc"]).map == "my maps/half.png"


def test_a_model_without_a_control_adapter() -> None:
    asked = GenerateSettings(prompt="a", **ASKED, controls="focus=far")
    with pytest.raises(ValueError, match="need a control adapter"):
        plan_generate(tiny_pipeline(), asked)
    check_levels(asked, has_adapter=True, has_controls=True)
    with pytest.raises(ValueError, match="need bokeh_targets"):
        GenerateSettings(prompt="a", controls="focus=far")


def test_flags_and_recipe() -> None:
    words = ["--prompt", "a", "--bokeh-targets", "28", "--controls", "focus=0.4", "aperture=donut"]
    settings = settings_from(parsers()[1]["generate"].parse_args(words), GenerateSettings)
    assert settings.controls == "focus=0.4 aperture=donut:0.5" and "focus=0.4" in settings.summary
    assert GenerateSettings.from_recipe(settings.recipe()) == settings
    plain = settings_from(parsers()[1]["generate"].parse_args(words[:4]), GenerateSettings)
    assert plain.controls is None and "controls" not in plain.recipe()
