"""A dial with more than one number: what is not asked changes nothing, what is asked shows, modes agree."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bokehflux.aperture import DISC, Anamorphic, Polygon
from bokehflux.attention import Plain
from bokehflux.conditioning import Conditioning
from bokehflux.configs import ControlsConfig
from bokehflux.models.adapter import BokehCondition, LowRank
from bokehflux.models.controls import (
    ControlAdapter,
    Controls,
    init_controls,
    shape_picture,
    token_features,
)
from bokehflux.models.embeddings import rope_table
from bokehflux.models.fold import fold_adapter
from bokehflux.models.fp8 import quantize_mmdit
from bokehflux.models.mmdit import MMDiT, Rows
from bokehflux.nano.adapter import EncodedPool
from bokehflux.nano.controls import MIXED, PLAIN, RENDERS, ControlledScenes, Views
from bokehflux.nano.pool import LatentPool
from bokehflux.nano.scenes import build_scenes, gaps, render, sample_specs
from bokehflux.sampling.denoise import Grounding, denoiser
from bokehflux.sampling.latents import LatentGrid, position_ids
from bokehflux.sampling.pivot_cache import PivotCache
from bokehflux.training.adapter import Sampling
from bokehflux.training.batches import Draws
from bokehflux.training.controls import controls_loss
from bokehflux.training.loop import Step
from bokehflux.weights.files.checkpoint import CheckpointError
from bokehflux.weights.load import load_network
from bokehflux.weights.networks import controls_for
from bokehflux.weights.save import save_network
from tests.tiny import MMDIT, TXT_LENGTH, tiny_mmdit

GRID = LatentGrid(height_px=32, width_px=32)
TOKENS = GRID.num_tokens
ROPE = rope_table(position_ids(GRID, TXT_LENGTH), MMDIT.axes_dim, MMDIT.theta)
CONFIG = ControlsConfig(rank=3, hidden_dim=8, context_dim=10, tokens=2)
LEVELS = (15.0, 4.0, 28.0, 20.0, 9.0)
"""Rows: one that is asked for nothing, then for a focus, a shape, a map, and all of them."""


def adapter(*, started: bool = False) -> ControlAdapter:
    torch.manual_seed(5)
    made = ControlAdapter(CONFIG, MMDIT)
    if started:
        init_controls(made)
    for module in made.modules():
        if isinstance(module, LowRank) and not started:
            torch.nn.init.normal_(module.down.weight, std=0.3)
            torch.nn.init.normal_(module.up.weight, std=0.3)
    return made.eval().requires_grad_(False)


def asked(of: ControlAdapter) -> Controls:
    none, three = float("nan"), Polygon(3)
    circles = torch.linspace(-0.4, 0.9, 32 * 32).view(1, 32, 32)
    blur = token_features(circles)[0]
    nothing = torch.full_like(blur, none)
    return Controls(
        adapter=of,
        focus=torch.tensor([none, 0.6, none, none, 0.2]),
        shape=torch.stack([shape_picture(a) for a in (DISC, DISC, three, DISC, three)]),
        features=torch.stack([nothing, nothing, nothing, blur, blur]),
    )


def text(rows: int) -> Conditioning:
    seeded = torch.Generator().manual_seed(3)
    return Conditioning(
        txt=torch.randn(1, TXT_LENGTH, MMDIT.txt_dim, generator=seeded).expand(rows, -1, -1),
        pooled=torch.randn(1, MMDIT.pooled_dim, generator=seeded).expand(rows, -1),
    )


def velocity(mmdit: MMDiT, controls: Controls | None, levels: tuple[float, ...] = LEVELS) -> Tensor:
    x = torch.randn(1, TOKENS, 64, generator=torch.Generator().manual_seed(4)).expand(len(levels), -1, -1)
    bokeh = dataclasses.replace(BokehCondition.of(levels), controls=controls)
    rows, shown = len(levels), text(len(levels))
    sigma = torch.full((rows,), 0.7)
    return mmdit(x, shown.txt, shown.pooled, sigma, torch.ones(rows), ROPE, Plain(), bokeh)


# --- what is asked, as numbers


def test_a_tokens_features() -> None:
    """By hand: quarters, least, most, mean size, deviation, as roots that keep their sign."""
    circles = torch.zeros(1, 16, 32)
    circles[0, :8, 16:24], circles[0, 8:, 16:24] = 0.25, -0.04
    left, right = token_features(circles)[0]
    assert not left.any()
    deviation = circles[0, :, 16:].std(correction=0).sqrt().item()
    expected = torch.tensor([0.5, 0, -0.2, 0, -0.2, 0.5, 0.0725**0.5, deviation])
    torch.testing.assert_close(right, expected)


def test_tokens_of_a_map_lie_as_those_of_a_picture() -> None:
    circles = torch.arange(6.0).view(2, 3).repeat_interleave(16, 0).repeat_interleave(16, 1)[None]
    torch.testing.assert_close(token_features(circles)[0, :, 0], torch.arange(6.0).sqrt())


def test_a_disc_is_no_shape() -> None:
    assert not shape_picture(DISC).any()
    upright, lying = (shape_picture(Anamorphic(s)).view(16, 16) for s in (2, 0.5))
    assert (upright < 0).any() and torch.allclose(upright, lying.T, atol=1e-5)


# --- what a network makes of it


def test_rows_that_ask_for_nothing_stay_bit_for_bit() -> None:
    mmdit, made = tiny_mmdit(), adapter()
    without, given = velocity(mmdit, None), velocity(mmdit, asked(made))
    assert torch.equal(given[0], without[0])
    for row in range(1, 5):
        assert not torch.allclose(given[row], without[row], atol=1e-3), row


def test_a_new_adapter_changes_nothing_bit_for_bit() -> None:
    mmdit = tiny_mmdit()
    assert torch.equal(velocity(mmdit, asked(adapter(started=True))), velocity(mmdit, None))


@pytest.mark.parametrize("what", ["focus", "shape", "features", "level", "to_k_ctl"])
def test_everything_asked_shows(what: str) -> None:
    """Keys are live: there is more than one context token."""
    mmdit, made = tiny_mmdit(), adapter()
    controls, levels = asked(made), list(LEVELS)
    before = velocity(mmdit, controls)[4]
    if what == "level":
        with_level = made(controls.rows(slice(4, 5)), torch.tensor([0.9]))[0]
        assert not torch.allclose(with_level.v, made(controls.rows(slice(4, 5)), torch.tensor([0.3]))[0].v)
        return
    if what == "to_k_ctl":
        for block in made.blocks:
            block.to_k_ctl.up.weight.mul_(-3)
    else:
        controls = dataclasses.replace(controls, **{what: getattr(controls, what) * 0.7})
    after = velocity(mmdit, controls, tuple(levels))[4]
    assert not torch.allclose(before, after, atol=1e-4)


def test_the_focus_is_told_exactly_in_16_bits() -> None:
    told: list[Tensor] = []
    for made in (adapter(), adapter().bfloat16()):
        made.focus_in.register_forward_pre_hook(lambda _, args: told.append(args[0].float()))
        controls = dataclasses.replace(asked(made), focus=torch.tensor([0.1, 0.3, 0.4, 0.7, 0.95]))
        controls.for_blocks(torch.zeros(5))
    assert (told[0] - told[1]).abs().max() <= 2**-9, "no more than their own rounding"


def test_a_map_acts_on_its_own_tokens_first() -> None:
    """In the last block, before anything mixes tokens again, other tokens see nothing of it."""
    made, heads = adapter(), (2, MMDIT.num_heads, MMDIT.head_dim)
    features = torch.zeros(1, TOKENS, 8)
    changed = features.clone()
    changed[0, 3] = 0.8
    joint = torch.randn(1, TXT_LENGTH + TOKENS, *heads[1:])
    outs = []
    for each in (features, changed):
        controls = dataclasses.replace(asked(made).rows(slice(3, 4)), features=each)
        outs.append(controls.for_blocks(torch.tensor([0.5]))[5](joint, joint))
    other = (outs[0] - outs[1]).abs().amax((0, 2, 3)) > 1e-6
    assert other.nonzero().flatten().tolist() == [TXT_LENGTH + 3]


def test_one_batch_parts_of_it_and_single_rows_agree() -> None:
    mmdit, made = tiny_mmdit(), adapter()
    controls, together = asked(made), velocity(mmdit, asked(made))
    for row in range(5):
        alone = velocity(mmdit, controls.rows(slice(row, row + 1)), LEVELS[row : row + 1])
        torch.testing.assert_close(alone[0], together[row], atol=2e-5, rtol=1e-5)


def test_the_negative_pass_asks_for_nothing() -> None:
    condition = dataclasses.replace(BokehCondition.of(LEVELS), controls=asked(adapter()))
    assert condition.null().controls is None
    part = condition.rows(slice(1, 3)).controls
    assert part is not None and part.focus.shape == (2,) and part.features.shape == (2, TOKENS, 8)


def test_folded() -> None:
    mmdit, controls = tiny_mmdit(), asked(adapter())
    expected = velocity(mmdit, controls)
    folded = fold_adapter(mmdit)
    torch.testing.assert_close(velocity(mmdit, controls), expected, atol=2e-4, rtol=1e-4)
    folded.undo()
    assert torch.equal(velocity(mmdit, controls), expected)


def test_fp8() -> None:
    """Blocks multiply in e4m3; what is asked still shows, and as much as in full precision."""
    mmdit, controls = tiny_mmdit(), asked(adapter())
    exact = velocity(mmdit, controls) - velocity(mmdit, None)
    quantize_mmdit(mmdit)
    found = velocity(mmdit, controls) - velocity(mmdit, None)
    assert not found[0].any()
    assert (found - exact).norm() < 0.3 * exact.norm()


@pytest.mark.parametrize("max_rows", [None, 1, 2])
def test_grounded_batches_and_a_kept_pivot(max_rows: int | None) -> None:
    """However rows are split, and with the pivot from an earlier run, the targets are the same."""
    mmdit, controls = tiny_mmdit(), asked(adapter())
    x = torch.randn(1, TOKENS, 64, generator=torch.Generator().manual_seed(6)).expand(5, -1, -1)
    bokeh = dataclasses.replace(BokehCondition.of(LEVELS), controls=controls)
    sigma = torch.tensor(0.8)

    def run(rows: slice, grounding: Grounding, split: int | None) -> Tensor:
        made = denoiser(
            mmdit, text(1), GRID, bokeh=bokeh.rows(rows), grounding=grounding, max_rows=split,
            cuda_graphs=False,
        )  # fmt: skip
        return made(x[rows], sigma, 0)

    expected = run(slice(0, 5), Grounding(pivot_row=0, num_steps=1), None)
    plain = denoiser(mmdit, text(1), GRID, bokeh=bokeh, cuda_graphs=False)(x, sigma, 0)
    torch.testing.assert_close(plain[0], expected[0], atol=2e-5, rtol=1e-5)
    assert not torch.allclose(plain[1:], expected[1:], atol=1e-3)
    cache = PivotCache()
    if max_rows is None:
        run(slice(0, 5), Grounding(pivot_row=0, num_steps=1, cache=cache), 1)
        found = run(slice(1, 5), Grounding(pivot_row=None, num_steps=1, cache=cache), None)
        torch.testing.assert_close(found, expected[1:], atol=2e-5, rtol=1e-5)
    else:
        found = run(slice(0, 5), Grounding(pivot_row=0, num_steps=1), max_rows)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


def test_constants_of_a_run_are_those_of_a_call() -> None:
    mmdit = tiny_mmdit()
    bokeh = dataclasses.replace(BokehCondition.of(LEVELS), controls=asked(adapter()))
    shown, x = text(5), torch.randn(5, TOKENS, 64)
    mods = mmdit.modulations(shown.pooled, torch.full((5,), 0.4), torch.ones(5))
    both = [
        mmdit.velocities([Rows(img=x, txt=shown.txt, bokeh=bokeh, constants=constants)], mods, ROPE)[0]
        for constants in (None, mmdit.constants(bokeh))
    ]
    assert torch.equal(*both)


# --- its file


def test_written_and_read(tmp_path: Path) -> None:
    row, made = controls_for(MMDIT), adapter()
    save_network(row, tmp_path, made.config, made.state_dict())
    read = load_network(row, tmp_path, dtype=torch.float32)
    assert read.config == CONFIG
    assert all(torch.equal(t, made.state_dict()[name]) for name, t in read.state_dict().items())
    short = {name: t for name, t in made.state_dict().items() if "3.to_v_ctl.up" not in name}
    with pytest.raises(CheckpointError, match=r"3\.to_v_ctl\.up"):
        save_network(row, tmp_path / "short", made.config, short)
    wider = dataclasses.replace(MMDIT, num_single=5)
    with pytest.raises(CheckpointError, match="num_blocks"):
        load_network(controls_for(wider), tmp_path)


# --- nano's scenes


def test_where_things_lie_and_what_focus_does() -> None:
    draw = torch.Generator().manual_seed(7)
    scene = build_scenes(sample_specs(2, draw), 64, draw, "cpu")
    behind, at = gaps(scene), torch.full((2,), 20.0)
    pad = (scene.subject.shape[-1] - 64) // 2
    subject = scene.subject[:, 3, pad:-pad, pad:-pad] > 0.5
    assert not behind[subject].any()
    assert torch.equal(behind[:, 0, 0], scene.background_gap) and behind.max() <= 1
    assert (behind[:, -1] < 0).all(), "the table's front lies before the subject"
    near, on_subject = render(scene, at), render(scene, at, torch.zeros(2))
    torch.testing.assert_close(near, on_subject, atol=2e-4, rtol=0)
    far = render(scene, at, scene.background_gap)
    sharp = render(scene, at * 0, scene.background_gap)
    torch.testing.assert_close(sharp, render(scene, at * 0), atol=2e-4, rtol=0)
    inside = slice(0, 16)
    torch.testing.assert_close(far[:, :, inside], sharp[:, :, inside], atol=0.05, rtol=0)
    assert (near - sharp)[:, :, inside].abs().mean() > 3 * (far - sharp)[:, :, inside].abs().mean()


def pool() -> tuple[EncodedPool, Views]:
    """Two scenes whose latents are 100 scene + 10 render + token."""
    scene, render_, token = torch.arange(2), torch.arange(RENDERS), torch.arange(TOKENS)
    latents = (100 * scene[:, None, None] + 10 * render_[:, None] + token)[..., None].expand(-1, -1, -1, 64)
    ids = torch.zeros(2, 3, dtype=torch.long)
    levels = torch.arange(2.0 * RENDERS).view(2, RENDERS)
    made = LatentPool(latents=latents.float(), levels=levels, t5_ids=ids, clip_ids=ids)
    views = Views()
    for k in range(RENDERS):
        views.focus[k].append(torch.full((2,), float(k > 2) * k / 10))
        views.shape[k].append(torch.full((2, 256), float(k in (2, 5))))
        views.features[k].append(torch.full((2, TOKENS, 8), k / 10))
    shown = text(2)
    return EncodedPool(pool=made, captions=shown, empty=text(1)), views


def controlled(by_map: float = 0.4) -> ControlledScenes:
    return ControlledScenes.of(*pool(), by_map, torch.Generator().manual_seed(1))


def test_numbers_of_pictures() -> None:
    scenes = controlled()
    assert scenes.num_renders == PLAIN + RENDERS + MIXED
    scene, numbers = torch.ones(10, dtype=torch.long), torch.arange(10)
    latents = scenes.latents(scene, numbers)
    whole = (latents[:8, 0, 0] - 100).div(10).long().tolist()
    assert whole == [0, 0, 1, 1, 2, 3, 4, 5], "plain ones count twice"
    assert torch.equal(latents[:8, :, 0] - latents[:8, :1, 0], torch.arange(float(TOKENS)).expand(8, -1))
    for mixed in latents[8:, :, 0]:
        renders = ((mixed - 100 - torch.arange(TOKENS)) / 10).long()
        assert not set(renders.tolist()) & {2, 5}, "discs only"
    levels = scenes.levels(scene, numbers)
    assert levels[:8].tolist() == [6, 6, 7, 7, 8, 9, 10, 11]
    first, second = scenes.pairs[1].unbind(1)
    assert torch.equal(levels[8:], 6.0 + torch.maximum(first, second))


def test_what_pictures_are_asked_for_by() -> None:
    scenes, made = controlled(), adapter()
    numbers = torch.arange(10).repeat(50)
    draws = Draws.of_step(0, 0, 500, torch.device("cpu"))
    told = scenes.controls(made, torch.zeros(500, dtype=torch.long), numbers, draws)
    by_map = ~told.features.isnan().any(2).any(1)
    by_focus = ~told.focus.isnan()
    assert not (by_map & by_focus).any()
    assert by_map[numbers >= 8].all() and by_map[numbers < 8].float().mean().item() == pytest.approx(
        0.4, abs=0.08
    )
    nothing = ~by_map & ~by_focus
    assert (numbers[nothing] < 4).all() and 0.15 < nothing[numbers < 4].float().mean() < 0.45
    assert torch.equal((told.shape != 0).any(1), (numbers == 4) | (numbers == 7))
    assert told.focus[by_focus & (numbers == 6)].unique().tolist() == pytest.approx([0.4])
    assert told.features[by_map & (numbers == 5)].unique().tolist() == pytest.approx([0.3])


def test_the_adapter_learns_and_the_model_stays() -> None:
    """What a scene's pictures differ by is not their level alone: the loss falls below what levels allow."""
    mmdit, made, scenes = tiny_mmdit(), adapter(started=True), controlled()
    scenes.encoded.pool.latents.mul_(0.02)
    made.requires_grad_(True)
    before = {name: t.clone() for name, t in mmdit.state_dict().items()}
    how = Sampling(group=2, caption_dropout=0, level_dropout=0)
    loss = controls_loss(mmdit, made, ROPE, how, scenes)
    optimizer = torch.optim.Adam(made.parameters(), 2e-2)

    def error(number: int) -> Tensor:
        return loss(Step(number, 0.0, Draws.of_step(3, number, 32, torch.device("cpu"))))[0]

    def held_out() -> float:
        with torch.no_grad():
            return sum(error(1000 + i).item() for i in range(4))

    start = held_out()
    for number in range(40):
        optimizer.zero_grad()
        error(number).backward()
        optimizer.step()
    print(f"{start:.3f} -> {held_out():.3f}")
    assert held_out() < 0.85 * start
    assert all(torch.equal(t, before[name]) for name, t in mmdit.state_dict().items())
    assert all(p.grad is not None and p.grad.any() for p in made.parameters())


def test_training_starts_from_keys_that_differ_and_from_nothing_added() -> None:
    ups = {name: m.up.weight for name, m in adapter(started=True).named_modules() if isinstance(m, LowRank)}
    keys = [weight for name, weight in ups.items() if name.endswith("to_k_ctl")]
    assert 0 < len(keys) < len(ups)
    for name, weight in ups.items():
        assert weight.any() == name.endswith("to_k_ctl"), name
