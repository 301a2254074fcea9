"""The bokeh adapter: what a level becomes, what it can change, and what it leaves alone."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bokehflux.configs import BokehConfig
from bokehflux.lens import check_level
from bokehflux.models.adapter import BokehAdapter, BokehCondition, LowRank, init_adapter
from bokehflux.models.embeddings import rope_table
from bokehflux.models.mmdit import MMDiT
from bokehflux.sampling.latents import LatentGrid, position_ids
from tests.tiny import BOKEH, MMDIT, TXT_LENGTH, tiny_mmdit

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def predict(mmdit: MMDiT, bokeh: BokehCondition | None, rows: int = 3) -> Tensor:
    """One prediction on fixed inputs, the same in every row."""
    grid = LatentGrid(height_px=32, width_px=48)
    g = torch.Generator().manual_seed(5)
    return mmdit(
        torch.randn(1, grid.num_tokens, 64, generator=g).expand(rows, -1, -1),
        torch.randn(1, TXT_LENGTH, MMDIT.txt_dim, generator=g).expand(rows, -1, -1),
        torch.randn(1, MMDIT.pooled_dim, generator=g).expand(rows, -1),
        torch.full((rows,), 0.7),
        torch.full((rows,), 3.0),
        rope_table(position_ids(grid, TXT_LENGTH), MMDIT.axes_dim, MMDIT.theta),
        bokeh=bokeh,
    )


@pytest.mark.parametrize("level", [0, 0.0, 1e-3, 15, 29.99, 30, 30.0])
def test_levels_that_are(level: float) -> None:
    check_level(level)
    BokehCondition.of([level, None])


@pytest.mark.parametrize("level", [-0.01, 30.01, 300, math.nan, math.inf, -math.inf])
def test_levels_that_are_not(level: float) -> None:
    for call in (lambda: check_level(level), lambda: BokehCondition.of([3.0, level])):
        with pytest.raises(ValueError, match=r"between 0 \(all sharp\) and 30, got"):
            call()


def test_model_input() -> None:
    ours = BokehCondition.of([0, 30, 15, None, 18.5]).model_input(CPU, torch.float32)
    assert ours.dtype == torch.float32
    assert ours.tolist() == [0.0, 1.0, 0.5, -1.0, torch.tensor(18.5 / 30, dtype=torch.float32).item()]


def test_model_input_is_rounded_once() -> None:
    """The quotient is taken in float64: rounding the level first would be another level."""
    for dtype in (torch.bfloat16, torch.float16):
        levels = [1.7, 3.3, 18.1, 29.9]
        ours = BokehCondition.of(levels).model_input(CPU, dtype)
        assert torch.equal(ours, torch.tensor([x / 30 for x in levels], dtype=torch.float64).to(dtype))


def test_null_drops_levels_and_keeps_strengths() -> None:
    condition = dataclasses.replace(BokehCondition.of([4, 9]), lora_scale=0.5, bokeh_scale=0.25)
    null = condition.null()
    assert null.model_input(CPU, torch.float32).tolist() == [-1, -1]
    assert (null.lora_scale, null.bokeh_scale) == (0.5, 0.25)
    assert condition.levels.tolist() == [4, 9]


def test_one_place_divides_by_30() -> None:
    """Levels are 0-30 everywhere else; a second division somewhere would go unnoticed."""
    files = [path for top in ("bokehflux", "kernels", "weights") for path in (ROOT / top).rglob("*.py")]
    divides = re.compile(r"/\s*\(?\s*(30\b|(lens\.)?MAX_LEVEL)")
    hits = []
    for file in files:
        for line in re.sub(r'"""[\s\S]*?"""', "", file.read_text(encoding="utf-8")).splitlines():
            hits += [(file.name, line)] if divides.search(line.partition("#")[0]) else []
    assert [name for name, _ in hits] == ["lens.py"], hits


def test_levels_and_null_are_told_apart() -> None:
    rows = predict(tiny_mmdit(), BokehCondition.of([0, 30, None]))
    assert min((rows[a] - rows[b]).abs().max().item() for a, b in [(0, 1), (1, 2), (0, 2)]) > 1e-2


def test_a_level_needs_an_adapter() -> None:
    with pytest.raises(ValueError, match="without one"):
        predict(tiny_mmdit(bokeh=None), BokehCondition.of([1, 2, 3]))


def test_without_a_level_the_adapter_is_silent() -> None:
    """Same base weights with and without adapter: no condition, no difference."""
    adapted, plain = tiny_mmdit(), tiny_mmdit(bokeh=None)
    plain.load_state_dict({k: v for k, v in adapted.state_dict().items() if not k.startswith("bokeh.")})
    assert torch.equal(predict(adapted, None), predict(plain, None))
    assert not torch.equal(predict(adapted, BokehCondition.of([None] * 3)), predict(plain, None))


def test_init_adapter_is_a_no_op() -> None:
    mmdit = tiny_mmdit()
    assert mmdit.bokeh is not None
    init_adapter(mmdit.bokeh)
    for value in mmdit.bokeh.values(torch.tensor([0.0, 0.5, -1.0]), 1.0).values():
        assert value.shape == (3, 2, 16) and not value.any()
    torch.testing.assert_close(predict(mmdit, BokehCondition.of([0, 30, None])), predict(mmdit, None))
    assert all(module.down.weight.any() for module in mmdit.bokeh.modules() if isinstance(module, LowRank))


def test_init_adapter_is_reproducible() -> None:
    a, b, c = (BokehAdapter(BOKEH, MMDIT) for _ in range(3))
    for adapter, seed in ((a, 1), (b, 1), (c, 2)):
        init_adapter(adapter, torch.Generator().manual_seed(seed))
    name = "adapter_modules.0.to_q_adp.down.weight"
    assert torch.equal(a.state_dict()[name], b.state_dict()[name])
    assert not torch.equal(a.state_dict()[name], c.state_dict()[name])
    wide = BokehAdapter(dataclasses.replace(BOKEH, rank=32), MMDIT)
    init_adapter(wide)
    assert wide.state_dict()[name].std().item() == pytest.approx(1 / 32, rel=0.15)


def test_to_k_bokeh_changes_nothing_and_learns_nothing() -> None:
    """One key: its softmax is one whatever it holds, NaN included."""
    mmdit = tiny_mmdit().requires_grad_(True)
    condition = BokehCondition.of([0, 12, 30])
    before = predict(mmdit, condition)
    before.square().sum().backward()
    assert mmdit.bokeh is not None
    trainable = {id(p) for p in mmdit.bokeh.trainable()}
    for name, parameter in mmdit.bokeh.named_parameters():
        if "to_k_bokeh" in name:
            assert parameter.grad is None and id(parameter) not in trainable
            torch.nn.init.constant_(parameter, math.nan)
        else:
            assert parameter.grad is not None and parameter.grad.any(), name
            assert id(parameter) in trainable
    assert torch.equal(predict(mmdit, condition), before)


def test_published_cross_attention_is_the_value_vector() -> None:
    """The published branch, written out: any query, one key, softmax over that one key."""
    mmdit = tiny_mmdit()
    assert mmdit.bokeh is not None
    level = torch.tensor([0.0, 0.4, -1.0])
    context = mmdit.bokeh.embedding_layer(level[:, None])[:, None]  # [B, 1, context]
    block = mmdit.bokeh.block(3)
    k, v = (
        net(context).unflatten(-1, (2, 16)).transpose(1, 2) for net in (block.to_k_bokeh, block.to_v_bokeh)
    )
    q = torch.randn(3, 2, 11, 16)
    published = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    ours = mmdit.bokeh.values(level, 1.0)[3]
    torch.testing.assert_close(published, ours[:, None].expand_as(published))


def test_scales_of_a_call() -> None:
    """Zero strengths silence the two halves of the adapter one by one; None takes the adapter's own."""
    mmdit, condition = tiny_mmdit(), BokehCondition.of([2, 12, 30])

    def at(lora: float | None, bokeh: float | None) -> Tensor:
        return predict(mmdit, dataclasses.replace(condition, lora_scale=lora, bokeh_scale=bokeh))

    torch.testing.assert_close(at(0, 0), predict(mmdit, None))
    assert torch.equal(at(None, None), at(BOKEH.lora_scale, BOKEH.bokeh_scale))
    # Without the value vectors the level has no say: equal rows, though not those of the base.
    silent = at(1, 0)
    torch.testing.assert_close(silent[0], silent[2])
    assert not torch.allclose(silent, at(0, 0), atol=1e-3)
    only_values = at(0, 1)
    assert not torch.allclose(only_values[0], only_values[2], atol=1e-3)
    assert not torch.allclose(only_values, at(1, 1), atol=1e-3)


def test_default_scales_come_from_the_config() -> None:
    condition = BokehCondition.of([2, 12, 30])
    weaker = tiny_mmdit(dataclasses.replace(BOKEH, lora_scale=0.3, bokeh_scale=0.6))
    asked = dataclasses.replace(condition, lora_scale=0.3, bokeh_scale=0.6)
    assert torch.equal(predict(weaker, condition), predict(tiny_mmdit(), asked))


def test_alpha_over_rank_scales_every_low_rank_output() -> None:
    x = torch.randn(2, 32)
    for alpha, factor in ((None, 1.0), (8.0, 2.0)):
        config = dataclasses.replace(BOKEH, alpha=alpha)
        block = tiny_mmdit(config).bokeh.block(0)  # type: ignore[union-attr]
        net = block.to_q_adp
        assert net is not None
        torch.testing.assert_close(net(x), factor * (x @ net.down.weight.T @ net.up.weight.T))


def test_blocks_that_are_not_adapted() -> None:
    """Adapting block 5 alone: what leaves block 4 does not depend on the level, what leaves block 5 does."""
    mmdit = tiny_mmdit(dataclasses.replace(BOKEH, blocks=(5,)))
    seen: list[Tensor] = []
    for block in mmdit.single_blocks[2:]:
        block.register_forward_hook(lambda *args: seen.append(args[-1].sum()))
    predict(mmdit, BokehCondition.of([0, 15, 30]))
    torch.testing.assert_close(seen[0][0], seen[0][2])
    assert not torch.allclose(seen[1][0], seen[1][2], atol=1e-3)


@pytest.mark.parametrize(("q", "k"), [(True, False), (False, True), (False, False)])
def test_adapters_without_query_or_key_updates(q: bool, k: bool) -> None:
    block = BokehAdapter(dataclasses.replace(BOKEH, adapt_q=q, adapt_k=k), MMDIT).block(0)
    x, y = torch.randn(1, 3, 32), torch.randn(1, 3, 32)
    new_x, new_y = block.update_q(x, 1.0), block.update_k(y, 1.0)
    assert (not torch.equal(new_x, x), not torch.equal(new_y, y)) == (q, k)


@pytest.mark.parametrize("blocks", [(), (1, 0), (0, 0), (-1, 0)])
def test_wrong_blocks(blocks: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match="blocks must be (ascending and distinct|a list of whole numbers, none of them neg)"
    ):
        BokehConfig(blocks=blocks, rank=4)


def test_wrong_rank_and_a_block_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="rank must be a whole number from 1"):
        BokehConfig(blocks=(0,), rank=0)
    with pytest.raises(ValueError, match="block 6 does not exist: the model has 6"):
        BokehAdapter(BokehConfig(blocks=(0, 6), rank=1), MMDIT)


def test_angles_of_far_positions_are_those_of_float64() -> None:
    """By NumPy: float32 anywhere on the way would be seen at the far side of a large picture."""
    place = np.array([0, 1, 77, 255, 4095], dtype=np.float64)
    ids = torch.from_numpy(np.stack([0 * place, place, place[::-1]], 1))
    table = rope_table(ids.long(), (16, 56, 56), 10_000)
    angle = np.concatenate(
        [
            ids[:, axis, None].numpy() * 10_000.0 ** -(np.arange(0, dim, 2) / dim)
            for axis, dim in enumerate((16, 56, 56))
        ],
        axis=1,
    )
    for ours, exact in zip(table, (np.cos(angle), np.sin(angle)), strict=True):
        assert ours.dtype == torch.float32 and np.abs(ours.numpy() - exact).max() < 1e-7
