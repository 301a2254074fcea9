"""The figures of a control adapter, on pictures whose answers are known."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bokehflux.evaluation import __main__ as evaluation
from bokehflux.evaluation import controls
from bokehflux.evaluation.controls import LEVELS, MAPPED, PLANES, REGIONS, SHAPES, STRONG, WEAK, Shot, Shown
from bokehflux.evaluation.figures import floats
from bokehflux.evaluation.renderer import through_vae
from bokehflux.lens import unit_level
from bokehflux.metrics import disc_blur
from bokehflux.nano.scenes import RADIUS_AT_30, build_scenes, sample_specs
from tests.tiny import tiny_pipeline
from tests.unit.test_controls import adapter

SIDE = 128
PLACES = [(24, 24), (24, 70), (30, 104), (56, 40)]


def texture(seed: int = 0) -> Tensor:
    return torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def blurred(picture: Tensor, level: float, gap: float) -> Tensor:
    return disc_blur(picture[None], abs(gap) * unit_level(level) * RADIUS_AT_30 * SIDE / 256)[0]


def shown() -> Shown:
    """Every plane is blurred as a lens would, each in its own region; gaps are the regions' own."""
    sharp = texture()
    gaps = torch.full((SIDE, SIDE), PLANES[3])
    for plane, place in zip(PLANES, REGIONS, strict=True):
        gaps[controls.region(gaps, place)] = plane

    def at(level: float, focus: float) -> Tensor:
        out = sharp.clone()
        for gap in PLANES:
            inside = (gaps == gap).expand(3, -1, -1)
            out[inside] = blurred(sharp, level, gap - focus)[inside]
        return out

    planes = torch.stack([torch.stack([at(level, plane) for level in LEVELS]) for plane in PLANES])
    weak, strong = at(WEAK, 0.0), at(STRONG, 0.0)
    half = torch.where(torch.arange(SIDE) < SIDE // 2, weak, strong)
    maps = [at(0.0, 0.0), *(at(level, plane) for plane in MAPPED for level in (WEAK, STRONG)), half]
    shapes = [sum(point_of(*place, shape) for place in PLACES) + 0.1 for shape in range(len(SHAPES))]
    return Shown(
        pivot=at(15.0, 0.0), planes=planes, shapes=torch.stack(shapes).expand(-1, 3, -1, -1), plain=strong,
        maps=torch.stack(maps), gaps=gaps,
    )  # fmt: skip


def point_of(row: int, column: int, shape: int | None) -> Tensor:
    """[1, S, S] a point of light, sharp or as one of SHAPES."""
    rows, columns = torch.arange(SIDE)[:, None] - row, torch.arange(SIDE) - column
    if shape is None:
        return torch.exp(-(rows**2 + columns**2) / 2.0)[None]
    rim = torch.tensor(unit_level(STRONG) * RADIUS_AT_30 * SIDE / 256)
    return 0.6 * SHAPES[shape].spread(columns, rows, rim, torch.tensor(1.0))[None]


@pytest.fixture(scope="module")
def lens() -> Shown:
    return shown()


def test_planes(lens: Shown) -> None:
    assert controls.plane_hits(lens).all()
    swapped = dataclasses.replace(lens, planes=lens.planes[[1, 0, 2, 3]])
    assert controls.plane_hits(swapped).tolist() == [False, False, True, True]
    turned = dataclasses.replace(lens, planes=lens.planes[[3, 1, 2, 0]])
    assert controls.subject_fall(lens) > 1 and controls.subject_fall(turned).abs() < 0.1


def test_maps(lens: Shown) -> None:
    assert controls.halves(lens).max() < 0.05
    assert controls.radii(lens) > 0.97
    same = dataclasses.replace(lens, maps=torch.cat([lens.maps[:-1], lens.maps[1:2]]))
    left, right = controls.halves(same).tolist()
    assert left < 0.01 and right > 0.4
    flat = dataclasses.replace(lens, maps=lens.maps[[0, 1, 1, 1, 1, 1, 1, 7]])
    assert controls.radii(flat) < 0.8
    small = torch.full_like(lens.gaps, 0.6)
    small[4:26, 4:26] = PLANES[3]  # 14 x 14 of it even, of 128 x 128: enough, as 28 x 28 of 256 x 256 are
    assert controls.radii(dataclasses.replace(lens, gaps=small)) > 0.9


def test_shapes_are_told_from_lights(lens: Shown) -> None:
    sharp = sum(point_of(*place, None) for place in PLACES).expand(3, -1, -1)
    assert sorted(controls.lights(sharp)) == sorted(PLACES)
    assert controls.lights(torch.zeros(3, SIDE, SIDE)) == []
    lit = lens.planes.clone()
    lit[0, 0] = sharp
    assert controls.shape_hits(dataclasses.replace(lens, planes=lit)).mean() >= 5 / 6
    dark = lens.planes.clone()
    dark[0, 0] = 0
    assert controls.shape_hits(dataclasses.replace(lens, planes=dark)).isnan().all()


def test_what_is_asked_by_maps() -> None:
    behind = torch.linspace(0, 1, 32).expand(32, 32)
    nothing, weak, strong, *others, half = controls.map_shots(behind)
    assert nothing.level == 0 and not nothing.circles.any()  # type: ignore[union-attr]
    assert len(others) == 4 and (others[-1].circles <= 0.05 * unit_level(STRONG) + 1e-6).all()  # type: ignore[operator]
    assert torch.equal(half.circles[:, :16], weak.circles[:, :16])  # type: ignore[index]
    assert torch.equal(half.circles[:, 16:], strong.circles[:, 16:])  # type: ignore[index]


def test_a_model_without_the_adapter() -> None:
    with pytest.raises(ValueError, match="no control adapter"):
        controls.evaluate(tiny_pipeline(), captions=1)


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Random weights miss every target, at a quarter of nano's size."""
    pipe = tiny_pipeline()
    defaults = dataclasses.replace(pipe.defaults, height_px=64, width_px=64)
    pipe = dataclasses.replace(pipe, controls=adapter(), defaults=defaults)
    monkeypatch.setattr("bokehflux.load", lambda *_, **__: pipe)
    words = ["controls", "--captions", "1", "--steps", "2", "--results", str(tmp_path)]
    assert evaluation.main([*words, "--check"]) == 1
    rows = json.loads((tmp_path / "controls.json").read_text())["rows"]
    asked = {row["figure"]: row["passed"] for row in rows if row["target"]}
    assert len(asked) == 10 and not asked[controls.HIT] and not asked[controls.RADII]
    assert "FAIL" in capsys.readouterr().out and (tmp_path / "controls.jpg").is_file()


def test_the_renderer_is_asked_for_what_the_model_is() -> None:
    """One scene through random weights: every picture in its place, half of a map from both others."""
    pipe, draw = tiny_pipeline(), torch.Generator().manual_seed(0)
    scene = build_scenes(sample_specs(1, draw), 32, draw, "cpu")
    found, drawn = controls.rendered(pipe, scene), controls.drawn(scene, [Shot(STRONG)])
    assert found.planes.shape == (len(PLANES), len(LEVELS), 3, 32, 32) and found.pivot.shape == (3, 32, 32)
    assert len(found.shapes) == len(SHAPES) and len(found.maps) == len(controls.map_shots(found.gaps))
    assert torch.equal(found.plain, floats(through_vae(pipe.vae, drawn))[0])
    torch.testing.assert_close(found.plain, found.maps[2])
    assert not torch.allclose(found.maps[-1], found.maps[1]) and not torch.allclose(
        found.maps[-1], found.plain
    )
