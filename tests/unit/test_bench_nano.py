"""The figures that judge nano, fed with the renderer's own pictures and with pictures that cannot pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from benchmarks import bench_nano as bench
from bokehflux.models.vae import to_uint8
from bokehflux.nano.captions import held_out

SPEC, _ = held_out(8)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Many small operations: threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def renders(seed: int) -> bench.Series:
    images = torch.stack([to_uint8(x * 2 - 1) for x in bench.rendered(SPEC, 96, seed, torch.device("cpu"))])
    return bench.Series(images=images, pivots=images[:, -1])


@pytest.fixture(scope="module")
def perfect() -> dict[str, bench.Series]:
    """A model that paints as the renderer does; unbounded pictures show another scene than their pivots."""
    one, other = renders(1), renders(2)
    mixed = dataclasses.replace(other, pivots=one.pivots)
    level_blind = bench.Series(images=one.images[:, [3] * 8], pivots=one.pivots)
    return {
        "renderer": one,
        "renderer through VAE": one,
        "renderer, another scene": mixed,
        "unbounded": mixed,
        "grounded": one,
        "base without adapter": level_blind,
    }


def verdicts(series: dict[str, bench.Series]) -> dict[tuple[str, str], bool | None]:
    return {(row.figure, row.of): row.passed for row in bench.judge(series, SPEC.color)}


def test_renders_meet_the_targets(perfect: dict[str, bench.Series]) -> None:
    rows = {(row.figure, row.of): row for row in bench.judge(perfect, SPEC.color)}
    expected = {key for key in bench.TARGETS if key[0] != bench.DECODED}
    # True renders of one scene differ by occlusion and highlights: about 36 dB, no matter how good the model.
    expected.remove((bench.SCENE, "grounded"))
    assert [str(rows[key]) for key in expected if not rows[key].passed] == []
    assert rows[bench.RANKS, "renderer"].value > 0.99
    assert rows[bench.SCENE, "renderer"].value > rows[bench.SCENE, "renderer, another scene"].value + 10


def test_constant_pictures_fail(perfect: dict[str, bench.Series]) -> None:
    grey = bench.Series(
        images=torch.full_like(perfect["renderer"].images, 128), pivots=perfect["renderer"].pivots
    )
    found = verdicts(perfect | {"grounded": grey, "unbounded": grey})
    for figure in (bench.RANKS, bench.SHAPE, bench.DROP, bench.SCENE, bench.COLOR):
        assert found[figure, "grounded"] is False, figure
    assert found[bench.SCENE, "grounded less unbounded"] is False


def test_a_base_model_that_follows_the_seed_order_fails(perfect: dict[str, bench.Series]) -> None:
    found = verdicts(perfect | {"base without adapter": perfect["renderer"]})
    assert found[bench.RANKS, "base without adapter"] is False
    assert found[bench.SHAPE, "base without adapter"] is False


def test_blur_of_half_the_strength_loses_too_little_sharpness(perfect: dict[str, bench.Series]) -> None:
    weak = bench.MEASURED.index(28.0)
    images = perfect["renderer"].images.clone()
    images[:, weak] = images[:, 2]
    found = verdicts(perfect | {"grounded": dataclasses.replace(perfect["grounded"], images=images)})
    assert found[bench.DROP, "grounded"] is False


def test_nan_fails_and_a_line_without_target_has_no_verdict() -> None:
    assert bench.Row(figure=bench.DROP, of="grounded", value=float("nan")).passed is False
    assert bench.Row(figure=bench.DROP, of="renderer", value=1.0).passed is None


def test_levels_of_the_sheet_and_the_curve_are_all_generated() -> None:
    assert set(bench.SHEET) | set(bench.CURVE) <= set(bench.LEVELS)
    assert bench.LEVELS[: len(bench.MEASURED)] == bench.MEASURED
    assert len(set(bench.LEVELS)) == len(bench.LEVELS)
