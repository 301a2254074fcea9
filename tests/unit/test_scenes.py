"""The renderer behind `nano`'s training data: reproducible, lens-true, and described by its captions."""

from __future__ import annotations

import dataclasses
import random
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import avg_pool2d

from bokehflux import metrics
from bokehflux.aperture import DISC
from bokehflux.fingerprint import fingerprint_of_bytes
from bokehflux.nano import captions
from bokehflux.nano.scenery import backgrounds, objects, tables
from bokehflux.nano.scenery.canvas import Canvas, splat
from bokehflux.nano.scenery.spec import (
    BACKGROUNDS,
    COLORS,
    NUM_HELD_OUT,
    PATTERNS,
    SHAPES,
    TABLES,
    SceneSpec,
    is_held_out,
)
from bokehflux.nano.scenes import RADIUS_AT_30, Scene, build_scenes, render, sample_specs
from bokehflux.rendering.blur import Blur

SIZE = 128
WORLD = Path(__file__).resolve().parents[1] / "data" / "world.safetensors"


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one_of_each(seed: int = 0) -> tuple[SceneSpec, Scene]:
    """Ten scenes, one of every background, shape and colour."""
    i = torch.arange(10)
    spec = dataclasses.replace(
        sample_specs(10, seeded(seed)), shape=(i * 3 + seed) % 10, color=(i * 7 + seed) % 10, background=i
    )
    return spec, build_scenes(spec, SIZE, seeded(seed), "cpu")


def levels(scene: Scene, level: float) -> torch.Tensor:
    return torch.full((len(scene),), level)


def test_painters_match_the_names_in_order() -> None:
    names = [p.__name__.strip("_") for p in backgrounds.PAINTERS]
    assert len(names) == len(BACKGROUNDS) == 10 and len(tables.PAINTERS) == len(TABLES)
    keyword = {"bookshelf": "bookshelf", "brick": "brick", "city": "city", "sea": "sea", "forest": "forest"}
    for name, title in zip(names, BACKGROUNDS, strict=True):
        assert keyword.get(name, name.split("_")[0]) in title
    assert set(objects.ALBEDO) == set(objects.PAINT) == set(COLORS)
    assert set(objects.PROFILES) | set(objects._OUTLINES) | {"cube"} == set(SHAPES)


def test_same_seed_same_pictures() -> None:
    _, a = one_of_each(1)
    _, b = one_of_each(1)
    assert torch.equal(render(a, levels(a, 11.0)), render(b, levels(b, 11.0)))
    _, c = one_of_each(2)
    assert not torch.equal(render(a, levels(a, 11.0)), render(c, levels(c, 11.0)))


def test_global_random_state_is_untouched() -> None:
    before = torch.random.get_rng_state()
    _, scene = one_of_each()
    render(scene, levels(scene, 5.0))
    assert torch.equal(before, torch.random.get_rng_state())


def test_range_shape_and_tones() -> None:
    _, scene = one_of_each()
    for level in (0.0, 30.0):
        picture = render(scene, levels(scene, level))
        assert picture.shape == (10, 3, SIZE, SIZE) and picture.isfinite().all()
        assert picture.min() >= 0 and picture.max() <= 1
    sharp = metrics.luma(render(scene, levels(scene, 0.0))).flatten(1)
    assert (sharp.quantile(0.99, 1) > 0.7).all(), "highlights"
    assert (sharp.quantile(0.01, 1) < 0.3).all(), "blacks"


def test_sharpness_falls_with_every_step_of_level() -> None:
    _, scene = one_of_each(3)
    curve = torch.stack([metrics.sharpness(render(scene, levels(scene, k * 30 / 7))) for k in range(8)], 1)
    assert (curve.diff(dim=1) < 0).float().mean() >= 0.98
    assert (curve[:, 0] - curve[:, -1] > 0.6).all()


def test_levels_may_differ_within_a_batch_and_select_agrees() -> None:
    _, scene = one_of_each()
    mixed = render(scene, torch.arange(10) * 3.0)
    part = scene.select(torch.tensor([2, 7]))
    assert torch.allclose(render(part, torch.tensor([6.0, 21.0])), mixed[[2, 7]], atol=2e-4)


def test_levels_of_the_wrong_length_are_named() -> None:
    _, scene = one_of_each()
    with pytest.raises(ValueError, match=r"expected one per scene, \[10\], got \[1\]"):
        render(scene, torch.zeros(1))


def test_the_subject_is_the_same_at_every_level() -> None:
    _, scene = one_of_each()
    pad = (scene.subject.shape[-1] - SIZE) // 2
    solid = scene.subject[:, 3, pad:-pad, pad:-pad] > 0.9999
    a, b = render(scene, levels(scene, 0.0)), render(scene, levels(scene, 30.0))
    assert solid.flatten(1).sum(1).min() > 300
    assert ((a - b).abs().amax(1) * solid).max() < 2e-3
    assert ((a - b).abs().amax(1) * ~solid).flatten(1).amax(1).min() > 0.1


def test_blur_keeps_light_and_grows_with_the_level() -> None:
    n, radius = 96, torch.tensor([0.0, 0.5, 2.0, 8.0])
    point = torch.zeros(4, 1, n, n)
    point[:, :, n // 2, n // 2] = 50.0
    out = Blur(point, DISC).by(-radius)
    assert torch.allclose(out.sum((1, 2, 3)), torch.tensor(50.0), rtol=1e-4)
    assert torch.allclose(out[0], point[0], atol=1e-4)
    peak = out.amax((1, 2, 3))
    assert (peak.diff() < 0).all()
    # A disc: flat inside, nothing outside, area pi r^2.
    assert (out[3, 0] > 0.5 * peak[3]).sum().item() == pytest.approx(3.1416 * 8**2, rel=0.05)
    assert out[3, 0, n // 2, n // 2 + 11] < 1e-4


@pytest.mark.parametrize(("level", "gap"), [(24.0, 1.0), (30.0, 0.8)])
def test_a_point_of_light_becomes_a_disc_of_the_promised_radius(level: float, gap: float) -> None:
    """A lone point, at infinity or nearer: radius gap * level / 30 * RADIUS_AT_30 * size / 256."""
    _, template = one_of_each()
    scene = template.select(slice(0, 1))
    n = scene.background.shape[-1]
    background = torch.zeros_like(scene.background)
    background[:, :, n // 2, n // 2] = 40.0
    zero = torch.zeros_like(scene.subject)
    scene = dataclasses.replace(
        scene,
        background=background,
        background_gap=torch.tensor([gap]),
        table=zero,
        mid=zero,
        subject=zero,
        exposure=torch.ones(1, 1, 1, 1),
    )
    out = render(scene, torch.tensor([level]))[0, 0]
    radius = gap * level / 30 * RADIUS_AT_30 * SIZE / 256
    measured = ((out > 0.75 * out.max()).sum() / 3.1416) ** 0.5
    assert measured.item() == pytest.approx(radius, rel=0.08)


def test_background_does_not_leak_over_the_subject_nor_the_subject_into_it() -> None:
    _, scene = one_of_each()
    dark = dataclasses.replace(scene, background=torch.zeros_like(scene.background))
    red = torch.zeros_like(scene.subject)
    red[:, 0], red[:, 3] = scene.subject[:, 3], scene.subject[:, 3]
    out = render(dataclasses.replace(dark, subject=red, mid=red * 0, table=red * 0), levels(scene, 30.0))
    pad = (red.shape[-1] - SIZE) // 2
    clear = red[:, 3, pad:-pad, pad:-pad] == 0
    assert (out[:, 0] * clear).max() < 0.01


def test_splat_does_not_depend_on_the_picture_size() -> None:
    at = torch.tensor([[0.1]])
    color = torch.full((1, 1, 1), 10.0)
    energy = [splat(Canvas(s, torch.device("cpu")), at, at, color, 1.2).sum() / s**2 for s in (64, 128, 256)]
    assert max(energy) / min(energy) < 1.02


def test_one_scene_keeps_its_content_and_another_does_not() -> None:
    _, scene = one_of_each()
    pivot = render(scene, levels(scene, 15.0))
    same = metrics.blur_matched_psnr(render(scene, levels(scene, 24.0)), pivot).mean()
    other = metrics.blur_matched_psnr(pivot.roll(1, 0), pivot).mean()
    assert same > 29 and other < 20


def test_the_world_is_the_one_that_nano_was_trained_in() -> None:
    """Every background, shape, colour, pattern and table looks as it did, in its places and on the average.

    Whoever changes the world trains nano anew, renews the documents' figures, and runs this file as a program
    (`python -m tests.unit.test_scenes`), which keeps the new one.
    """
    off = (world() - load_file(WORLD)["pictures"]).abs()
    assert off.max() < 0.01 and off.mean() < 1e-4


def world() -> torch.Tensor:
    """[10, 3, 8, 8]: what scenes look like from afar, at level 4."""
    i = torch.arange(10)
    spec = dataclasses.replace(sample_specs(10, seeded(0)), shape=i, color=i, background=i)
    spec = dataclasses.replace(spec, table=i % len(TABLES), pattern=i % len(PATTERNS), num_mid=i % 3)
    scene = build_scenes(spec, 64, seeded(0), "cpu")
    return avg_pool2d(render(scene, levels(scene, 4.0)), 8)


def test_held_out_scenes_are_balanced_and_distinct() -> None:
    spec, texts = captions.held_out()
    assert len(spec) == len(texts) == len(set(texts)) == NUM_HELD_OUT
    for field, names in (
        ("shape", SHAPES),
        ("color", COLORS),
        ("pattern", PATTERNS),
        ("table", TABLES),
        ("background", BACKGROUNDS),
    ):
        count = torch.bincount(getattr(spec, field), minlength=len(names))
        assert count.max() - count.min() <= 1, field
    assert is_held_out(spec).all()
    assert captions.held_out()[1] == texts
    # Figures in documents are of these words: other captions need new figures.
    assert fingerprint_of_bytes("\n".join(texts).encode()) == "176897f4967873b496574d0787c80855"
    with pytest.raises(ValueError, match="1 to 32, got 33"):
        captions.held_out(33)


def test_training_never_sees_a_held_out_combination() -> None:
    many = sample_specs(300_000, seeded(0), held_out=True)
    assert is_held_out(many).sum() > 100, "the draw must be able to hit them, or this test proves nothing"
    drawn = sample_specs(300_000, seeded(0))
    assert len(drawn) == 300_000 and not is_held_out(drawn).any()
    assert torch.bincount(drawn.background).min() > 25_000


def test_spec_select_cat_and_to() -> None:
    spec = sample_specs(6, seeded(0))
    again = SceneSpec.cat([spec.select(slice(0, 2)), spec.select(torch.arange(2, 6))]).to("cpu")
    for field in dataclasses.fields(spec):
        assert torch.equal(getattr(again, field.name), getattr(spec, field.name))


def test_captions_name_what_is_there_in_known_words() -> None:
    spec = sample_specs(400, seeded(0))
    phrases = [*captions.OPENINGS, *captions.SETTINGS, captions.FRAMED, *captions.COMPANY, "an"]
    things = [*SHAPES, *COLORS, *PATTERNS[1:], *TABLES, *BACKGROUNDS]
    known = set(re.findall(r"[a-z-]+", re.sub(r"\{\w+\}", " ", " ".join([*phrases, *things]))))
    phrasings, rng = set(), random.Random(0)
    for i in range(len(spec)):
        text = captions.caption(spec, i, rng)
        phrasings.add(text.split()[0] + text.split()[2])
        words = text.replace(",", " ").split()
        assert text == text.lower() and set(words) <= known
        assert SHAPES[spec.shape[i]] in text and COLORS[spec.color[i]] in text
        assert TABLES[spec.table[i]] in text and BACKGROUNDS[spec.background[i]] in text
        pattern = PATTERNS[spec.pattern[i]]
        assert pattern == "plain" or f"{pattern} {COLORS[spec.color[i]]} {SHAPES[spec.shape[i]]}" in text
        assert " a orange" not in text and "  " not in text
    assert len(phrasings) > 20


def test_corpus_repeats_itself_only_for_one_seed() -> None:
    a = list(captions.corpus(50, seed=3))
    assert len(a) == 50 and a == list(captions.corpus(50, seed=3)) and a != list(captions.corpus(50, seed=4))


@pytest.mark.parametrize("seed", range(3))
def test_a_caption_tells_its_scene(seed: int) -> None:
    """All that it mentions, in every phrasing."""
    many, rng = sample_specs(300, seeded(seed)), random.Random(seed)
    for i in range(len(many)):
        text, scene = captions.caption(many, i, rng), many.select(slice(i, i + 1))
        found = captions.spec_of(text)
        assert found is not None, text
        told = int(found.num_mid[0])
        assert told in (0, int(scene.num_mid[0])), text
        for name in ("shape", "color", "pattern", "table", "background"):
            assert torch.equal(getattr(found, name), getattr(scene, name)), (text, name)
        for name in ("mid_shape", "mid_color"):
            assert torch.equal(getattr(found, name)[:, :told], getattr(scene, name)[:, :told]), (text, name)


def test_other_words_are_not_a_caption() -> None:
    setting = "on a wooden table, city lights at night"
    assert captions.spec_of(f"a RED ball {setting}") is not None
    for words in (
        "",
        "a red ball",
        f"a lamp {setting}",
        f"a colored ball {setting}",
        f"a red balloon {setting}",
        f"a red ball {setting} and a brick wall",
        f"a red ball {setting}, watercolor",
        f"a very large red ball {setting}",
        f"a red ball with its subject {setting}",
        f"a red ball and a blue cone and a pink mug and a teal star {setting}",
    ):
        assert captions.spec_of(words) is None, words


if __name__ == "__main__":
    save_file({"pictures": world()}, WORLD)
