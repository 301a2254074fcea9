"""A generated pair: two rows through the network, and a lens that makes every picture from them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bokehflux.app import cli
from bokehflux.focus import parse_focus
from bokehflux.pictures.metadata import read_recipe
from bokehflux.pipeline.lens import Lens
from bokehflux.pipeline.pipeline import Pipeline
from bokehflux.pipeline.run import Options, Result, execute
from bokehflux.record import Record
from bokehflux.rendering.lens_map import LensMap
from bokehflux.sampling.pivot_cache import PivotCache
from bokehflux.settings import PROBE_LEVEL, GenerateSettings
from tests.tiny import tiny_pipeline

PIPE = tiny_pipeline()
SIZE: dict[str, Any] = {"width": 96, "height": 64, "num_inference_steps": 2}


def same(a: Image.Image | None, b: Image.Image | None) -> bool:
    return np.array_equal(np.asarray(a), np.asarray(b))


def test_two_rows_make_any_number_of_pictures() -> None:
    rows: list[int] = []
    hook = PIPE.transformer.img_in.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    made = PIPE.generate("a cup", [0, 7.5, 30], focus=["near", "0.5", "90,60"], aperture="donut", **SIZE)
    hook.remove()
    assert sum(rows) == 2 * 2 and len(made.images) == 9 and made.record.settings.bokeh_pivot == 0
    drawn = PIPE.generate("a cup", [PROBE_LEVEL], bokeh_pivot=0, **SIZE)
    assert same(made.pivot_image, drawn.pivot_image), "the sharp one is the model's own"
    assert torch.equal(made.latents, drawn.latents), "and so is the one that shows the blur"
    assert all(same(image, made.pivot_image) for image in made.images[:3]), "level 0 is the sharp one"
    assert made.lens_map is not None and made.pivot_image is not None
    sharp = torch.from_numpy(np.array(made.pivot_image)).movedim(-1, 0) / 255
    for number, (level, focus) in enumerate(made.record.settings.shots):
        if level:
            lens = made.lens_map.focused_at(parse_focus(focus or ""))
            seen = lens.render(sharp, level, highlights=None)
            donut = np.asarray(made.images[number]) / 255
            assert np.abs(seen.movedim(0, -1).numpy() - donut).mean() < 0.1
    labels = [tile.label for tile in made.scene().tiles()]
    assert labels[2:5] == ["bokeh 0, focus 90,60", "pivot 0", "bokeh 7.5, focus near"]
    assert len({picture.stem for picture in made.scene().pictures()}) == 11


@pytest.mark.parametrize(
    "change", [{"focus": "far"}, {"focus": "0-0.5"}, {"aperture": "polygon:3"}, {"highlights": 9}]
)
def test_the_lens_counts(change: dict[str, Any]) -> None:
    """Through a map that falls from left to right."""
    ramp = LensMap(blur=torch.linspace(0, -0.4, 96).expand(64, 96).contiguous(), far=0.0, near=0.0)
    white = Image.radial_gradient("L").resize((96, 64)).point(lambda value: 255 - value).convert("RGB")
    plain, changed = (
        next(Lens((96, 64), GenerateSettings(prompt="p", bokeh_targets=[30], **lens)).pictures(white, ramp))
        for lens in ({"aperture": "disc"}, change)
    )
    assert not same(plain, changed)


def test_rows_that_go_one_by_one_give_the_same() -> None:
    options: dict[str, Any] = {"focus": "near", "num_grounding_steps": 2, **SIZE}
    both, one = (PIPE.generate("a cup", [28], max_rows=rows, **options) for rows in (None, 1))
    torch.testing.assert_close(both.latents, one.latents, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bokeh_pivot": 15}, "focus needs a grounded run with bokeh_pivot 0"),
        ({"num_grounding_steps": 0}, "focus needs a grounded run"),
        ({"pivot_steps": "grounded"}, "focus needs the pivot's picture"),
        ({"pivot_cache": PivotCache()}, "a pivot_cache keeps no picture"),
        ({"focus": "96,0"}, "expected a pixel of 96 x 64"),
        ({"focus": "2m"}, "distances are not known"),
        ({"focus": ["near", "mask"]}, "expected a mask, got none"),
        ({"focus": "nearest"}, "expected a point X,Y in pixels, near, far"),
        ({"focus": []}, "focus must be one focus or several"),
        ({"focus": 3}, "focus must be one focus or several"),
        ({"aperture": "gone.png"}, "gone.png"),
        ({"controls": "focus=0.5"}, "focus and controls are two ways to one thing"),
        ({"bokeh_targets": None}, "focus needs bokeh_targets"),
    ],
)
def test_what_a_lens_cannot_serve(options: dict[str, Any], message: str) -> None:
    """Before any network runs."""
    hook = PIPE.transformer.img_in.register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
    try:
        with pytest.raises(ValueError, match=message):
            PIPE.generate("a cup", **{"bokeh_targets": [9], "focus": "near", **SIZE, **options})
    finally:
        hook.remove()


def test_a_residual_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="bokehflux"):
        PIPE.generate("a cup", [9], focus="near", **SIZE)
    assert "leaves a residual of 0." in caplog.text


def test_memory_that_runs_out_in_the_lens_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture that the model drew has no long side to be asked for."""

    def too_large(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("bokehflux.rendering.lens_map.LensMap.render", too_large)
    says = r"the picture does not fit in memory while it is blurred; make it smaller \(height and width, or"
    with pytest.raises(ValueError, match=says):
        PIPE.generate("a cup", [9], focus="near", **SIZE)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[GenerateSettings]:
    """A folder of its own, the tiny model, and what it was asked for."""
    asked: list[Any] = []

    def run(model: Pipeline, plan: Any, options: Options) -> Result:
        asked.append(plan.settings)
        return execute(model, plan, options)

    monkeypatch.setattr("bokehflux.pipeline.load.load", lambda *_, **__: PIPE)
    monkeypatch.setattr("bokehflux.app.watched.execute", run)
    monkeypatch.chdir(tmp_path)
    return asked


ARGV = ["--prompt", "a cup", "--size", "48x32", "--steps", "1", "--levels", "0", "20"]


def test_a_sweep_goes_on_with_another_focus(served: list[GenerateSettings]) -> None:
    assert cli.main(["sweep", *ARGV, "--pivot", "0"]) == 0, "what the model draws is another scene"
    for foci, pictures in (["near", "48,31"], None), (["near", "47,31"], 5), (["far", "near", "47,31"], 7):
        code = cli.main(["sweep", *ARGV, "--focus", *foci])
        assert code == (2 if pictures is None else 0)
        if pictures is not None:
            (folder,) = {path.parent for path in Path("results").glob("*/*focus*.png")}
            assert len(list(folder.glob("*bokeh-*.png"))) == pictures
    assert [one.focus for one in served] == [None, ("near", "47,31"), ("far", "near", "47,31")]
    assert [one.num_rows for one in served] == [3, 2, 2]
    assert read_recipe(folder / "bokeh-20.0-focus-far.png")["in_focus"] == "far"
    assert cli.main(["sweep", *ARGV, "--focus", "47,31", "far"]) == 0 and len(served) == 3
    (folder / "bokeh-20.0-focus-far.png").unlink()
    assert cli.main(["sweep", *ARGV, "--focus", "47,31", "far"]) == 0 and len(served) == 4
    assert served[-1].bokeh_targets == (20.0,) and (folder / "bokeh-20.0-focus-far.png").exists()
    (folder / "blur-map.png").write_bytes(b"broken")
    assert cli.main(["sweep", *ARGV, "--focus", "47,31", "far"]) == 0 and len(served) == 5
    assert read_recipe(folder / "blur-map-run2.png")["role"] == "map"


def test_another_picture_of_an_aperture_is_another_scene(served: list[GenerateSettings]) -> None:
    for side in (20, 24):
        Image.radial_gradient("L").resize((side, side)).save("iris.png")
        assert cli.main(["sweep", *ARGV, "--aperture", "iris.png"]) == 0
    assert len({path.parent for path in Path("results").glob("*/bokeh-20.0.png")}) == len(served) == 2


def test_lines_of_prompts_have_a_lens_of_their_own(served: list[GenerateSettings]) -> None:
    Path("p.jsonl").write_text(
        '{"prompt": "a cup", "focus": ["far"]}\na dog\n{"prompt": "a fox", "focus": null}\n'
    )
    assert cli.main(["sweep", "--prompts-file", "p.jsonl", *ARGV[2:]]) == 0
    assert [(one.focus, one.bokeh_pivot) for one in served] == [(("far",), 0.0), (None, 15.0), (None, 15.0)]


def test_a_picture_through_a_lens_is_made_again(served: list[GenerateSettings]) -> None:
    assert cli.main(["generate", *ARGV, "--focus", "0,0/40,0/0,30", "far"]) == 0
    name = "results/bokeh-20.0-focus-0-0-40-0-0-30.png"
    assert cli.main(["generate", "--config-from", name, "--output", "again"]) == 0
    assert Path(name).read_bytes() == Path(name.replace("results", "again")).read_bytes()
    assert served[0] == served[1]
    record = Record.from_recipe(read_recipe(name))
    assert record.in_focus == "0,0/40,0/0,30" and record.settings.focus == ("0,0/40,0/0,30", "far")
