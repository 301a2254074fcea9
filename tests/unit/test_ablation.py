"""The ablation of training, with nano on pictures of 64 px: data in both meanings, arms, figures."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from PIL import Image

import bokehflux
from bokehflux.conditioning import Conditioning
from bokehflux.evaluation import ablation
from bokehflux.evaluation.ablation import ARMS, Found, Scenes, run_arm, table
from bokehflux.nano.captions import held_out
from bokehflux.nano.scenes import build_scenes, render
from bokehflux.training import looks
from bokehflux.training.adapter import AdapterBatch
from bokehflux.training.latents import LatentFolder
from bokehflux.training.recipes.named import NANO
from bokehflux.training.recipes.run import STATE
from bokehflux.weights.find.resolve import BUNDLED
from bokehflux.weights.find.snapshot import CARD

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def nano64(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nano, whose pictures are small unless told otherwise."""
    folder = tmp_path_factory.mktemp("models") / "nano64"
    folder.mkdir()
    for path in BUNDLED["nano"].iterdir():
        if path.name != CARD:
            (folder / path.name).symlink_to(path)
    card = json.loads((BUNDLED["nano"] / CARD).read_text())
    assert card["height"] == card["width"] == 256
    (folder / CARD).write_text(json.dumps(card | {"height": 64, "width": 64}))
    return folder


@pytest.fixture(scope="module")
def scenes(nano64: Path, tmp_path_factory: pytest.TempPathFactory) -> Scenes:
    return Scenes.rendered(tmp_path_factory.mktemp("latents"), str(nano64), CPU, 3)


def opened(folder: Path, unify: str) -> LatentFolder:
    def silent(prompts: object) -> Conditioning:
        raise AssertionError(prompts)

    return LatentFolder(folder, silent, unify)  # type: ignore[arg-type]


def test_what_arms_are_trained_on(scenes: Scenes, nano64: Path) -> None:
    groups = opened(scenes.groups, "raw")
    assert (groups.num_scenes, groups.num_renders, groups.grid.height_px) == (3, 5, 64)
    raw, spread = (opened(scenes.photographs, unify) for unify in ("raw", "range"))
    number, first = torch.arange(6), torch.zeros(6, dtype=torch.int64)
    meant, across = raw.levels(number, first), spread.levels(number, first)
    ratio = (meant / across)[meant < 30]
    assert raw.num_scenes == 6 and len(set(ratio.tolist())) == len(ratio) > 0
    assert ((ratio > 0.49) & (ratio < 4.01)).all() and ((meant / across)[meant == 30] <= 4.01).all()
    every = torch.arange(5)
    assert torch.equal(
        groups.levels(0 * every, every), opened(scenes.groups, "range").levels(0 * every, every)
    )
    again = Scenes.rendered(scenes.groups.parent, "no model is needed", CPU, 3)
    assert again == scenes


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_is_a_recipe(arm: str) -> None:
    recipe = dataclasses.replace(NANO, **ARMS[arm])
    assert (recipe == NANO) == (arm == "hybrid")
    assert sum(recipe.in_groups(step) for step in range(100)) == 100 * recipe.grouped


def test_an_arm_is_trained_and_judged_once(
    scenes: Scenes, nano64: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run_arm("photographs only", 3, scenes, tmp_path, str(nano64), CPU, 2, 4, 1)
    assert all(math.isfinite(value) for value in dataclasses.asdict(found).values() if value != found.arm)
    assert 0 < found.loss < 2 and abs(found.loss - found.loss_untold) < 0.01, "two steps teach nothing"
    out = tmp_path / "photographs-only-3"
    told = json.loads((out / "log.json").read_text())["notes"]["recipe"]
    assert told["grouped"] == 0 and told["seed"] == 3
    with monkeypatch.context() as patch:
        patch.setattr(ablation, "train_adapter", None)  # it is there, and so is its judgement
        assert run_arm("photographs only", 3, scenes, tmp_path, str(nano64), CPU, 2, 4, 1) == found
        with pytest.raises(ValueError, match="has an arm of other settings"):
            run_arm("photographs only", 3, scenes, tmp_path, str(nano64), CPU, 3, 4, 1)
    # Killed while it wrote what it had made: the state is still there.
    (out / "judged-by-1.json").unlink()
    (out / STATE).touch()
    train = Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr(ablation, "train_adapter", train)
    with pytest.raises(KeyboardInterrupt):
        run_arm("photographs only", 3, scenes, tmp_path, str(nano64), CPU, 2, 4, 1)
    assert train.call_args.kwargs["resume"]


def test_an_adapter_is_judged_beside_the_renderer() -> None:
    """A model whose pictures are the renderer's scores best; one with a fifth of the blur is weaker."""
    spec, prompts = held_out(2)
    truth = build_scenes(spec, 64, torch.Generator().manual_seed(90_002), CPU)

    def judged(share: float) -> dict[str, float]:
        def generate(prompt: str, levels: Sequence[float], bokeh_pivot: float, **_: Any) -> Any:
            drawn = [
                render(truth, torch.full((2,), share * level))[prompts.index(prompt)]
                for level in (*levels, bokeh_pivot)
            ]
            *images, pivot = (Image.fromarray((x.movedim(0, -1) * 255).round().byte().numpy()) for x in drawn)
            return SimpleNamespace(images=images, pivot_image=pivot)

        defaults = SimpleNamespace(height_px=64)
        return ablation.judge(SimpleNamespace(defaults=defaults, device=CPU, generate=generate), 2)  # type: ignore[arg-type]

    right, weak = judged(1.0), judged(0.2)
    assert right["strength"] == pytest.approx(1, abs=0.05) and right["lvcorr_reference"] > 0.99
    assert weak["strength"] < 0.95 and right["scene_db"] > 20


def test_the_held_out_loss_is_of_every_picture_at_every_noise_level(
    scenes: Scenes, nano64: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[AdapterBatch] = []
    monkeypatch.setattr(looks, "row_losses", lambda _, batch, __: (seen.append(batch), batch.sigma**2)[1])
    pipe = bokehflux.load(nano64, device=CPU, dtype="float32")
    exact = sum(((i + 0.5) / 8) ** 2 for i in range(8)) / 8
    assert ablation.held_out_loss(pipe, scenes.held_out) == pytest.approx((exact, exact))
    told, untold = seen  # 2 scenes at 5 levels, 8 noise levels each
    levels = opened(scenes.held_out, "range").levels(
        torch.arange(2).repeat_interleave(5), torch.arange(5).repeat(2)
    )
    assert torch.equal(told.levels, levels.repeat_interleave(8)) and untold.levels.isnan().all()
    assert torch.equal(told.eps, untold.eps) and torch.equal(told.sigma, untold.sigma)


def test_the_table() -> None:
    one = Found(
        arm="hybrid", seed=0, lvcorr_reference=0.9, lvcorr_level=0.8, strength=1.0, scene_db=30.0, loss=0.25,
        loss_untold=0.26, seconds=3,
    )  # fmt: skip
    other = dataclasses.replace(one, seed=1, lvcorr_reference=0.8, loss=0.26)
    lines = table([one, other, dataclasses.replace(one, arm="unify raw")]).splitlines()
    assert lines[2].startswith(
        "| hybrid | 0.850 ± 0.050 | 0.800 ± 0.000 | 1.00 ± 0.00 | 30.0 ± 0.0 | 0.2550 ±"
    )
    assert lines[3] == "| unify raw | 0.900 | 0.800 | 1.00 | 30.0 | 0.2500 | 0.2600 |"
