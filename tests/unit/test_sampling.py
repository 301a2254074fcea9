"""Schedule, latents, positions, samplers and the denoiser: every stage between text and pixels."""

from __future__ import annotations

import dataclasses
import logging
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bokehflux.attention import Grounded, PivotQuery, Plain
from bokehflux.conditioning import Conditioning
from bokehflux.configs import FLUX_SCHEDULE, SCHNELL_SCHEDULE, ScheduleConfig
from bokehflux.kernels.attention import select
from bokehflux.kernels.pointwise.reference import rotate
from bokehflux.models.adapter import BokehCondition
from bokehflux.models.embeddings import rope_table, sinusoid
from bokehflux.sampling.denoise import Denoiser, Grounding, denoiser, model_sigma
from bokehflux.sampling.latents import LatentGrid, noise, pack, position_ids, unpack
from bokehflux.sampling.samplers import StepInfo, Velocity, euler
from bokehflux.sampling.schedule import shift_mu, sigmas
from tests.tiny import BOKEH, FakeText, tiny_mmdit

# --- schedule


@pytest.mark.parametrize(("tokens", "mu"), [(256, 0.5), (1024, 0.63), (4096, 1.15)])
def test_shift(tokens: int, mu: float) -> None:
    assert shift_mu(FLUX_SCHEDULE, tokens) == pytest.approx(mu, abs=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 4, 7, 30])
@pytest.mark.parametrize("tokens", [1, 256, 4096, 20_000])
@pytest.mark.parametrize("config", [FLUX_SCHEDULE, SCHNELL_SCHEDULE], ids=["dev", "schnell"])
def test_sigmas_fall_from_one_to_zero(config: ScheduleConfig, steps: int, tokens: int) -> None:
    ours = sigmas(config, steps, tokens)
    assert ours.shape == (steps + 1,) and ours.dtype == torch.float32 and ours.device.type == "cpu"
    assert ours[0] == 1 and ours[-1] == 0
    assert (ours.diff() < 0).all()


def test_schnell_is_not_shifted() -> None:
    for tokens in (256, 4096):
        torch.testing.assert_close(sigmas(SCHNELL_SCHEDULE, 4, tokens), torch.tensor([1, 0.75, 0.5, 0.25, 0]))


def test_dev_schedule_by_hand() -> None:
    """e^mu t / (1 + (e^mu - 1) t) at mu = 1.15."""
    s = math.exp(1.15)
    by_hand = [s * t / (1 + (s - 1) * t) for t in (1, 0.75, 0.5, 0.25, 0)]
    torch.testing.assert_close(sigmas(FLUX_SCHEDULE, 4, 4096), torch.tensor(by_hand))
    assert sigmas(FLUX_SCHEDULE, 4, 4096)[2] > sigmas(FLUX_SCHEDULE, 4, 256)[2]


def test_fixed_shift_by_hand() -> None:
    ours = sigmas(ScheduleConfig(dynamic=False, shift=3.0), 2, 77)
    torch.testing.assert_close(ours, torch.tensor([1, 3 * 0.5 / (1 + 2 * 0.5), 0]))


@pytest.mark.parametrize("steps", [0, -1])
def test_no_steps(steps: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        sigmas(FLUX_SCHEDULE, steps, 256)


# --- sizes, packing, noise, positions


@pytest.mark.parametrize(
    ("asked", "given_px"), [((256, 256), (256, 256)), ((300, 517), (288, 512)), ((31, 16), (16, 16))]
)
def test_sizes_are_floored_with_a_notice(
    asked: tuple[int, int], given_px: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        grid = LatentGrid.floored(*asked)
    assert (grid.height_px, grid.width_px) == given_px
    assert grid.num_tokens == given_px[0] * given_px[1] // 256
    if asked == given_px:
        assert not caplog.records
    else:
        assert len(caplog.records) == 1
        assert f"{asked[0]} x {asked[1]}" in caplog.text and f"{given_px[0]} x {given_px[1]}" in caplog.text


@pytest.mark.parametrize("size", [(15, 64), (64, 15), (0, 16), (-16, 16)])
def test_too_small(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at least 16 pixels"):
        LatentGrid.floored(*size)


@pytest.mark.parametrize("size", [(17, 16), (16, 24), (0, 16), (16, -16)])
def test_a_grid_itself_never_rounds(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="positive multiple of 16"):
        LatentGrid(height_px=size[0], width_px=size[1])


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 6), st.integers(1, 6))
def test_unpack_inverts_pack(rows: int, channels: int, h: int, w: int) -> None:
    x = torch.arange(rows * channels * 4 * h * w).view(rows, channels, 2 * h, 2 * w)
    packed = pack(x)
    assert packed.shape == (rows, h * w, 4 * channels)
    assert torch.equal(unpack(packed, LatentGrid(height_px=16 * h, width_px=16 * w)), x)
    assert torch.equal(pack(unpack(packed, LatentGrid(height_px=16 * h, width_px=16 * w))), packed)


def test_packing_by_hand() -> None:
    """One token is a 2x2 patch: channel, then row, then column; tokens run along rows of the image."""
    x = torch.arange(2 * 2 * 4).view(1, 2, 2, 4)
    assert pack(x).tolist() == [[[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]]]


def test_noise() -> None:
    grid = LatentGrid(height_px=32, width_px=48)
    first = noise(grid, 7, torch.float32)
    assert first.shape == (1, 16, 4, 6) and first.device.type == "cpu"
    assert torch.equal(first, noise(grid, 7, torch.float32))
    assert not torch.equal(first, noise(grid, 8, torch.float32))
    half = noise(grid, 7, torch.bfloat16)
    assert half.dtype == torch.bfloat16 and torch.equal(half, noise(grid, 7, torch.bfloat16))
    # As published: a draw in bfloat16, whatever PyTorch makes of that.
    published = torch.randn(
        1, 16, 4, 6, generator=torch.Generator("cpu").manual_seed(7), dtype=torch.bfloat16
    )
    assert torch.equal(half, published)
    state = torch.random.get_rng_state()
    noise(grid, 9, torch.float32)
    assert torch.equal(state, torch.random.get_rng_state()), "the global generator is left alone"


def test_position_ids() -> None:
    ids = position_ids(LatentGrid(height_px=48, width_px=32), 3)
    assert ids.dtype == torch.float32
    assert ids.tolist() == [[0, 0, 0]] * 3 + [[0, r, c] for r in range(3) for c in range(2)]


# --- rotary embedding and sinusoids


@given(st.integers(0, 900), st.integers(0, 900), st.integers(0, 90), st.integers(0, 2))
def test_rope_depends_on_relative_position(a: int, b: int, shift: int, axis: int) -> None:
    """q at a, k at b: their product is that at a + shift, b + shift."""
    ids = torch.zeros(4, 3)
    ids[:, axis] = torch.tensor([a, b, a + shift, b + shift])
    table = rope_table(ids, (4, 6, 6), 10_000)
    g = torch.Generator().manual_seed(a)
    q, k = torch.randn(2, 16, generator=g)
    rotated_q, rotated_k = (rotate(x.expand(1, 4, 1, 16), *table, torch.float32)[0, :, 0] for x in (q, k))
    products = (rotated_q[[0, 2]] * rotated_k[[1, 3]]).sum(-1)
    torch.testing.assert_close(products[0], products[1], atol=2e-5, rtol=0)
    torch.testing.assert_close(rotated_q.norm(dim=-1), q.norm().expand(4))


def test_rope_by_hand() -> None:
    """Neighbouring pairs turn by position x theta^(-2i/d); another axis leaves its channels alone."""
    table = rope_table(torch.tensor([[0.0, 2.0, 0.0]]), (2, 4, 2), 10_000)
    turned = rotate(
        torch.tensor([1.0, 0, 1, 0, 0, 1, 1, 0]).view(1, 1, 1, 8), *table, torch.float32
    ).flatten()
    first, second = 2.0, 2.0 / 100
    by_hand = [1, 0, math.cos(first), math.sin(first), -math.sin(second), math.cos(second), 1, 0]
    torch.testing.assert_close(turned, torch.tensor(by_hand, dtype=torch.float32))


def test_rope_angles_are_float64() -> None:
    """At position 100,000 float32 angles are off by about 4e-3; the table is good to float32 rounding."""
    ids = torch.tensor([[0.0, 100_000.0, 99_999.0]])
    table = rope_table(ids, (4, 6, 6), 10_000)
    exact = [0.0] * 2
    for position in (100_000, 99_999):
        exact += [position * 10_000 ** (-2 * i / 6) for i in range(3)]
    torch.testing.assert_close(table.cos[0], torch.tensor([math.cos(a) for a in exact]), atol=1e-7, rtol=0)
    torch.testing.assert_close(table.sin[0], torch.tensor([math.sin(a) for a in exact]), atol=1e-7, rtol=0)


def test_rope_keeps_the_dtype_and_computes_in_float32() -> None:
    table = rope_table(position_ids(LatentGrid(height_px=64, width_px=64), 0), (4, 6, 6), 10_000)
    x = torch.randn(2, 16, 2, 16).bfloat16()
    assert torch.equal(rotate(x, *table, torch.bfloat16), rotate(x.float(), *table, torch.float32).bfloat16())


def test_sinusoid() -> None:
    out = sinusoid(torch.tensor([0.0, 0.25]), 8)
    freqs = [10_000 ** (-i / 4) for i in range(4)]
    by_hand = [[1.0] * 4 + [0.0] * 4, [math.cos(250 * f) for f in freqs] + [math.sin(250 * f) for f in freqs]]
    torch.testing.assert_close(out, torch.tensor(by_hand), atol=1e-4, rtol=0)
    half = sinusoid(torch.tensor([0.7109375], dtype=torch.bfloat16), 8)  # 710.9 rounds to 712 in bfloat16
    torch.testing.assert_close(half, sinusoid(torch.tensor([0.712]), 8), atol=1e-3, rtol=0)


# --- samplers


def decay(x: Tensor, sigma: Tensor, step: int) -> Tensor:
    return x


def driven(x: Tensor, sigma: Tensor, step: int) -> Tensor:
    return -2 * sigma * x + sigma.cos()


def error_of(velocity: Velocity, exact: float, steps: int) -> float:
    return abs(euler(velocity, torch.ones(1, 1, 1), torch.linspace(1, 0, steps + 1)).item() - exact)


def test_convergence_order_on_exponential_decay() -> None:
    """dx/dsigma = x from x(1) = 1: x(0) = 1/e. First order: doubling the steps halves the error."""
    errors = [error_of(decay, math.exp(-1), n) for n in (8, 16, 32)]
    for coarse, fine in zip(errors[:-1], errors[1:], strict=True):
        assert 1.6 < coarse / fine < 2.5


def test_convergence_order_where_sigma_matters() -> None:
    """A velocity that reads sigma: a sampler that hands over the wrong noise level loses its order."""
    fine_x = torch.ones(1, 1, 1, dtype=torch.float64)
    n = 4000
    for i in range(n):  # midpoint rule in float64, error about 1e-8
        s, h = torch.tensor(1 - i / n, dtype=torch.float64), -1 / n
        middle = fine_x + h / 2 * driven(fine_x, s, i)
        fine_x = fine_x + h * driven(middle, s + h / 2, i)
    errors = [error_of(driven, fine_x.item(), steps) for steps in (10, 20, 40)]
    for coarse, fine in zip(errors[:-1], errors[1:], strict=True):
        assert 1.5 < coarse / fine < 2.7


def test_a_straight_path_is_exact() -> None:
    """Constant velocity eps - x0 leads from eps to x0 whatever the schedule."""
    x0, eps = torch.randn(2, 2, 5, 64)
    out = euler(lambda x, sigma, step: eps - x0, eps, sigmas(FLUX_SCHEDULE, 5, 300))
    torch.testing.assert_close(out, x0, atol=1e-6, rtol=0)


def test_euler_rounds_as_documented() -> None:
    """bfloat16: product rounded, sum in float32, result rounded, after every step."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(2, 7, 64, generator=g).bfloat16()
    vs = torch.randn(6, 2, 7, 64, generator=g).bfloat16()
    schedule = sigmas(FLUX_SCHEDULE, 6, 1024)
    ours = euler(lambda x, sigma, step: vs[step], x, schedule)
    by_hand = unrounded = x
    for i in range(6):
        length = schedule[i + 1] - schedule[i]
        product = length * vs[i]  # the published expression: on a CPU PyTorch rounds the length as well
        assert product.dtype == torch.bfloat16
        by_hand = (by_hand.float() + product.float()).bfloat16()
        unrounded = (unrounded.float() + vs[i].float() * length).bfloat16()
    assert ours.dtype == torch.bfloat16 and torch.equal(ours, by_hand)
    assert not torch.equal(ours, unrounded), "the test sees the rounding of the product"


def test_what_a_sampler_calls() -> None:
    schedule = torch.tensor([1, 0.6, 0.3, 0])
    calls: list[tuple[int, float]] = []
    infos: list[StepInfo] = []

    def velocity(x: Tensor, sigma: Tensor, step: int) -> Tensor:
        calls.append((step, sigma.item()))
        return x

    x = euler(velocity, torch.ones(1, 2, 3), schedule, infos.append)
    assert calls == list(enumerate(schedule[:-1].tolist()))
    assert [(i.step, i.num_steps, i.sigma) for i in infos] == [
        (0, 3, schedule[1].item()), (1, 3, schedule[2].item()), (2, 3, 0.0)
    ]  # fmt: skip
    assert torch.equal(infos[-1].latents, x)
    assert not torch.equal(infos[0].latents, infos[1].latents)
    with pytest.raises(dataclasses.FrozenInstanceError):
        infos[0].step = 4  # type: ignore[misc]


def test_a_sampler_leaves_the_noise_alone() -> None:
    x = torch.ones(1, 2, 3)
    euler(decay, x.expand(4, -1, -1), torch.linspace(1, 0, 4))
    assert torch.equal(x, torch.ones(1, 2, 3))


# --- denoiser


def test_model_sigma() -> None:
    """bfloat16 keeps 8 bits of 1000 sigma, and rounds again after the division."""
    assert model_sigma(torch.tensor(0.7123), torch.float32).item() == pytest.approx(0.7123, abs=1e-7)
    ours = model_sigma(torch.tensor(0.7123), torch.bfloat16)
    # 712.3 lies between 712 and 716; 0.712 between 0.7109375 (182/256) and 0.71484375 (183/256).
    assert ours.dtype == torch.bfloat16 and ours.item() == 182 / 256
    assert torch.tensor(0.7139).bfloat16().item() == 183 / 256
    assert model_sigma(torch.tensor(0.7139), torch.bfloat16).item() == 182 / 256, "not sigma rounded once"
    assert model_sigma(torch.tensor([0.0, 1.0]), torch.bfloat16).tolist() == [0, 1]


GRID = LatentGrid(height_px=32, width_px=48)
TEXT = FakeText(torch.float32)


def tiny_denoiser(**options: object) -> Denoiser:
    return denoiser(tiny_mmdit(), TEXT.encode(["a cup"]), GRID, **options)  # type: ignore[arg-type]


def start(rows: int) -> Tensor:
    return pack(noise(GRID, 3, torch.float32)).expand(rows, -1, -1)


HALF = torch.tensor(0.5)


def test_denoiser_is_the_network() -> None:
    ours = tiny_denoiser(guidance=2.5, bokeh=BokehCondition.of([3, 20]))(start(2), HALF, 0)
    mmdit, text = tiny_mmdit(), TEXT.encode(["a cup"])
    rope = rope_table(position_ids(GRID, 6), mmdit.config.axes_dim, mmdit.config.theta)
    for row, level in enumerate([3, 20]):
        alone = mmdit(
            start(1), text.txt, text.pooled, torch.tensor([0.5]), torch.tensor([2.5]), rope,
            bokeh=BokehCondition.of([level]),
        )  # fmt: skip
        torch.testing.assert_close(ours[row], alone[0], atol=1e-5, rtol=1e-5)


def test_grounding_ends_after_its_steps() -> None:
    plain = tiny_denoiser(bokeh=BokehCondition.of([8, 25]))
    grounded = tiny_denoiser(bokeh=BokehCondition.of([8, 25]), grounding=Grounding(pivot_row=0, num_steps=2))
    x = start(2)
    free = plain(x, HALF, 0)
    for step in (0, 1):
        out = grounded(x, HALF, step)
        torch.testing.assert_close(out[0], free[0], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(out[1], free[1], atol=1e-3)
    for step in (2, 3):
        assert torch.equal(grounded(x, HALF, step), free)


def test_true_cfg_by_hand() -> None:
    """negative + scale (positive - negative): the negative pass without level, at guidance 1, ungrounded."""
    levels, grounding = BokehCondition.of([8, 25]), Grounding(pivot_row=1, num_steps=9)
    negative = TEXT.encode(["bad"])
    x = start(2) + torch.randn(2, 6, 64)  # rows that differ: a grounded negative pass would show
    both = tiny_denoiser(guidance=4.0, bokeh=levels, grounding=grounding, true_cfg=2.5, negative=negative)(
        x, HALF, 0
    )
    positive = tiny_denoiser(guidance=4.0, bokeh=levels, grounding=grounding)(x, HALF, 0)
    minus = denoiser(tiny_mmdit(), negative, GRID, guidance=1.0, bokeh=levels.null())(x, HALF, 0)
    torch.testing.assert_close(both, minus + 2.5 * (positive - minus))
    off = tiny_denoiser(guidance=4.0, bokeh=levels, grounding=grounding, true_cfg=1.0, negative=negative)
    assert torch.equal(off(x, HALF, 0), positive)


def test_adapters_that_leave_keys_alone_share_only_the_query() -> None:
    """As published: without adapted keys the pivot's keys are not offered to the targets."""
    grounding = Grounding(pivot_row=1, num_steps=1)
    keys_alone = tiny_mmdit(dataclasses.replace(BOKEH, adapt_k=False))
    velocity = denoiser(keys_alone, TEXT.encode(["a"]), GRID, grounding=grounding)
    rows = slice(0, 3)
    assert list(velocity.batches(3, 0)) == [(rows, PivotQuery(pivot_of=(1, 1, 1)))]
    velocity = tiny_denoiser(grounding=grounding)
    assert list(velocity.batches(3, 0)) == [(rows, Grounded(pivot_of=(1, 1, 1)))]
    assert list(velocity.batches(3, 1)) == [(rows, Plain())] == list(tiny_denoiser().batches(3, 0))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"grounding": Grounding(pivot_row=0, num_steps=1)},
        {"grounding": Grounding(pivot_row=0, num_steps=1), "max_rows": 1},
        {"true_cfg": 2.0, "negative": TEXT.encode(["bad"])},
    ],
    ids=["plain", "grounded", "split", "true CFG"],
)
def test_a_run_is_told_its_attention_backend(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, without any attention left to the choice that "auto" would make, here `sdpa`."""
    monkeypatch.setitem(select.BACKENDS, "sdpa", SimpleNamespace())
    options["bokeh"] = BokehCondition.of([8, 25, 3])
    assert tiny_denoiser(backend="reference", **options)(start(3), HALF, 0).isfinite().all()
    with pytest.raises(AttributeError):
        tiny_denoiser(**options)(start(3), HALF, 0)


def test_attention_of_your_own() -> None:
    asked: list[tuple[int, int]] = []

    def mine(rows: int, step: int) -> Grounded:
        asked.append((rows, step))
        return Grounded(pivot_of=(0,) * rows, backend="reference")

    levels = BokehCondition.of([8, 25, 0])
    ours = tiny_denoiser(bokeh=levels, attention=mine)(start(3), HALF, 5)
    grounded = tiny_denoiser(bokeh=levels, grounding=Grounding(pivot_row=0, num_steps=9))(start(3), HALF, 5)
    assert asked == [(3, 5)]
    torch.testing.assert_close(ours, grounded, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="not both"):
        tiny_denoiser(attention=mine, grounding=Grounding(pivot_row=0, num_steps=1))


def test_true_cfg_needs_a_negative() -> None:
    with pytest.raises(ValueError, match="negative conditioning"):
        tiny_denoiser(true_cfg=2.0)


def test_no_gradients() -> None:
    mmdit = tiny_mmdit().requires_grad_(True)
    conditioning = Conditioning(txt=torch.randn(1, 6, 24), pooled=torch.randn(1, 20))
    assert not denoiser(mmdit, conditioning, GRID)(start(1), HALF, 0).requires_grad
