"""What makes a step cheap: no work twice, and the same numbers as without."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor

from bokehflux.attention import Grounded, Plain
from bokehflux.models import linear
from bokehflux.models.adapter import BokehCondition
from bokehflux.models.embeddings import rope_table
from bokehflux.models.fold import fold_adapter
from bokehflux.models.fp8 import quantize_mmdit
from bokehflux.models.linear import Linear, LowRankTerm
from bokehflux.models.mmdit import MMDiT, Modulations, Rows
from bokehflux.sampling.latents import LatentGrid, position_ids
from bokehflux.sampling.pivot_cache import BlockPivot, PivotCache
from tests.tiny import BOKEH, tiny_mmdit, tiny_pipeline

PROMPT = "a red mug"
ROWS = 4


def arguments(mmdit: MMDiT, rows: int = ROWS) -> tuple:
    config = mmdit.config
    grid = LatentGrid(height_px=32, width_px=48)
    rope = rope_table(position_ids(grid, 5), config.axes_dim, config.theta)
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=mmdit.dtype)

    img, txt = draw(rows, grid.num_tokens, config.in_channels), draw(rows, 5, config.txt_dim)
    pooled = draw(1, config.pooled_dim).expand(rows, -1)
    return img, txt, pooled, torch.full((rows,), 0.7), torch.full((rows,), 3.0), rope


def sizes_of(mmdit: MMDiT) -> list[tuple[int, ...]]:
    """Filled while the network runs: rows of q, k and v at every attention call."""
    seen: list[tuple[int, ...]] = []
    for block in (*mmdit.double_blocks, *mmdit.single_blocks):
        block.attention.register_forward_pre_hook(
            lambda _, args: seen.append(tuple(len(t) for t in args[1:]))
        )
    return seen


def test_targets_compute_no_queries() -> None:
    """The attention of a grounded block is called with one query row, and nothing changes for it."""
    mmdit = tiny_mmdit()
    seen = sizes_of(mmdit)
    with torch.no_grad():
        mmdit(*arguments(mmdit), Grounded(pivot_of=(0,) * ROWS), BokehCondition.of([15, 0, 8, 30]))
    assert mmdit.bokeh is not None
    adapted = len(mmdit.bokeh.config.blocks)
    assert seen.count((1, ROWS, ROWS)) == adapted
    assert seen.count((ROWS, ROWS, ROWS)) == mmdit.config.num_blocks - adapted


def test_modulations_once_for_all_rows() -> None:
    mmdit = tiny_mmdit()
    img, txt, pooled, sigma, guidance, rope = arguments(mmdit)
    with torch.no_grad():
        each = mmdit(img, txt, pooled, sigma, guidance, rope)

        def velocity(mods: Modulations) -> Tensor:
            return mmdit.velocities([Rows(img=img, txt=txt)], mods, rope)[0]

        shared = mmdit.modulations(pooled[:1], sigma[:1], guidance[:1])
        torch.testing.assert_close(velocity(shared), each)
        table = mmdit.modulations(pooled[:3], torch.tensor([1.0, 0.7, 0.2]), guidance[:3])
        torch.testing.assert_close(velocity(table.row(1)), each)
        assert not torch.allclose(velocity(table.row(2)), each, atol=1e-3)


def test_a_run_computes_its_modulations_once() -> None:
    pipe = tiny_pipeline()
    calls: list[int] = []
    pipe.transformer.time_in.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    pipe.generate(PROMPT, [0, 8, 30], bokeh_pivot=15, num_inference_steps=5)
    assert calls == [5]
    calls.clear()
    pipe.generate(PROMPT, [0], num_inference_steps=4, true_cfg=2.0)
    assert calls == [4, 4]


@pytest.mark.parametrize("max_rows", [1, 2, 3, 7])
@pytest.mark.parametrize("pivot", [None, 15.0])
@pytest.mark.parametrize("true_cfg", [1.0, 2.0])
def test_split_batches_make_the_same_pictures(max_rows: int, pivot: float | None, true_cfg: float) -> None:
    """... and N targets cost N + 1 rows however they are split."""
    pipe = tiny_pipeline()
    levels = [0, 4, 12, 20, 30]
    whole = pipe.generate(PROMPT, levels, bokeh_pivot=pivot, true_cfg=true_cfg)
    seen = sizes_of(pipe.transformer)
    split = pipe.generate(PROMPT, levels, bokeh_pivot=pivot, true_cfg=true_cfg, max_rows=max_rows)
    torch.testing.assert_close(split.latents, whole.latents, atol=2e-4, rtol=0)
    rows = len(levels) + (pivot is not None)
    passes = whole.record.recipe()["num_inference_steps"] * (2 if true_cfg > 1 else 1)
    assert max(k for _, k, _ in seen) == min(max_rows, rows)
    assert sum(k for _, k, _ in seen) == rows * passes * pipe.transformer.config.num_blocks


def test_a_pivot_is_kept_for_one_block_and_its_readers() -> None:
    store, (q, k) = BlockPivot(readers=2), torch.randn(2, 1, 5, 2, 4)
    for block in range(3):
        with pytest.raises(ValueError, match=f"no pivot is kept for step 1, block {block}"):
            store.get(1, block, q.device)
        store.put(1, block, q, k)
        for _ in range(2):
            assert store.get(1, block, q.device) == (q, k)
        assert not store.holds(1, block), "the last reader frees it"
    store.put(1, 3, q, k)
    store.put(1, 4, q, k)
    with pytest.raises(ValueError, match="block 3"):
        store.get(1, 3, q.device)


def test_a_filled_pivot_cache_costs_one_row() -> None:
    pipe = tiny_pipeline()
    whole = pipe.generate(PROMPT, [0, 28], bokeh_pivot=15)
    cache = PivotCache()
    first = pipe.generate(PROMPT, [0], bokeh_pivot=15, pivot_cache=cache)
    torch.testing.assert_close(first.latents, whole.latents[:1], atol=2e-4, rtol=0)
    assert cache.nbytes > 0 and cache.scene is not None
    seen = sizes_of(pipe.transformer)
    later = pipe.generate(PROMPT, [28], bokeh_pivot=15, pivot_cache=cache)
    assert {k for _, k, _ in seen} == {1}
    torch.testing.assert_close(later.latents, whole.latents[1:], atol=2e-4, rtol=0)
    assert later.pivot_image is not None and whole.pivot_image is not None
    assert later.pivot_image.tobytes() == whole.pivot_image.tobytes()
    assert later.record.recipe()["bokeh_targets"] == [28.0]


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"bokeh_pivot": 12}, {"num_inference_steps": 3}, {"guidance_scale": 2.0}]
)
def test_a_pivot_cache_serves_one_scene(change: dict) -> None:
    pipe = tiny_pipeline()
    cache = PivotCache()
    pipe.generate(PROMPT, [0], bokeh_pivot=15, pivot_cache=cache)
    with pytest.raises(ValueError, match=f"another scene .*{next(iter(change))}"):
        pipe.generate(PROMPT, [4], **({"bokeh_pivot": 15} | change), pivot_cache=cache)


def test_a_pivot_cache_needs_grounding() -> None:
    with pytest.raises(ValueError, match="needs a grounded run"):
        tiny_pipeline().generate(PROMPT, [0], pivot_cache=PivotCache())
    with pytest.raises(ValueError, match="max_rows must be at least 1"):
        tiny_pipeline().generate(PROMPT, [0], max_rows=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("lora_scale", [None, 0.5])
def test_folding(dtype: torch.dtype, lora_scale: float | None) -> None:
    """The folded network predicts the same, and undoing leaves no trace."""
    mmdit = tiny_mmdit().to(dtype)
    before = {name: t.clone() for name, t in mmdit.state_dict().items()}
    condition = dataclasses.replace(BokehCondition.of([15, 0, 8, 30]), lora_scale=lora_scale)
    args, spec = arguments(mmdit), Grounded(pivot_of=(0,) * ROWS)
    with torch.no_grad():
        plain = mmdit(*args, spec, condition)
        folded = fold_adapter(mmdit, lora_scale)
        # Norms and rotations are float32 inside, whatever the weights are.
        torch.testing.assert_close(mmdit(*args, spec, condition), plain, atol=2e-5, rtol=0)
        name = "double_blocks.0.img_attn.qkv.weight"
        assert not torch.equal(mmdit.get_parameter(name), before[name])
        folded.undo()
        assert torch.equal(mmdit(*args, spec, condition), plain)
    assert all(torch.equal(t, before[name]) for name, t in mmdit.state_dict().items())


def test_undo_follows_a_network_that_moved() -> None:
    mmdit = tiny_mmdit()
    before = {name: t.clone() for name, t in mmdit.state_dict().items()}
    folded = fold_adapter(mmdit)
    mmdit.double()  # every parameter has new memory, as after `place` or a move to another device
    folded.undo()
    assert all(torch.equal(t.float(), before[name]) for name, t in mmdit.state_dict().items())


def test_undo_is_refused_after_fp8() -> None:
    mmdit = tiny_mmdit()
    folded = fold_adapter(mmdit)
    quantize_mmdit(mmdit)
    with pytest.raises(ValueError, match="undo comes before fp8"):
        folded.undo()
    assert mmdit.bokeh is not None and mmdit.bokeh.folded_at is not None


def test_folding_in_bfloat16_rounds_once() -> None:
    """Error against float32 at most twice that of the unfolded form."""
    low = tiny_mmdit().to(torch.bfloat16)
    exact = copy.deepcopy(low).float()
    img, txt, pooled, *rest = arguments(low)
    condition = BokehCondition.of([15, 0, 8, 30])
    with torch.no_grad():
        truth = exact(img.float(), txt.float(), pooled.float(), *rest, None, condition)
        plain = low(img, txt, pooled, *rest, None, condition)
        fold_adapter(low)
        folded = low(img, txt, pooled, *rest, None, condition)
    assert (folded - truth).norm() <= 2 * (plain - truth).norm()


def test_a_folded_network_refuses_what_it_cannot_do() -> None:
    mmdit = tiny_mmdit()
    fold_adapter(mmdit)
    args = arguments(mmdit)
    with pytest.raises(ValueError, match="undo that to run without levels"):
        mmdit(*args)
    with pytest.raises(ValueError, match="folded at lora_scale 0.9, asked for 0.5"):
        mmdit(*args, None, dataclasses.replace(BokehCondition.of([1] * ROWS), lora_scale=0.5))
    with pytest.raises(ValueError, match="not folded yet"):
        fold_adapter(mmdit)
    with pytest.raises(ValueError, match="needs an adapter"):
        fold_adapter(tiny_mmdit(bokeh=None))
    other = tiny_mmdit(dataclasses.replace(BOKEH, blocks=(0,)))
    other.double_blocks[0].img_attn.qkv.terms = (
        LowRankTerm(down=torch.zeros(1, 32), up=torch.zeros(1, 1), strength=1.0),
    )
    with pytest.raises(ValueError, match="without LoRA terms"):
        fold_adapter(other)


@pytest.mark.parametrize(("start", "stop"), [(0, 10), (0, 4), (3, 7), (4, 10), (9, 10)])
def test_columns_of_a_linear_layer(start: int, stop: int) -> None:
    """Any columns alone equal those of the whole, low-rank terms included."""
    layer = Linear(6, 10)
    layer.terms = tuple(
        LowRankTerm(down=torch.randn(2, 6), up=torch.randn(width, 2), strength=0.7, first=first)
        for first, width in ((0, 10), (2, 3), (6, 4))
    )
    x = torch.randn(3, 6)
    dense = layer.weight.clone()
    for term in layer.terms:
        dense[term.first : term.first + len(term.up)] += term.strength * term.up @ term.down
    whole = x @ dense.T + layer.bias
    torch.testing.assert_close(layer(x), whole)
    torch.testing.assert_close(layer.columns(x, start, stop), whole[:, start:stop])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_narrow_weights_are_cast_at_use(dtype: torch.dtype) -> None:
    layer = Linear(8, 4)
    narrow = layer.weight.detach().to(dtype)
    layer.weight = torch.nn.Parameter(narrow, requires_grad=False)
    x = torch.randn(2, 8)
    torch.testing.assert_close(layer(x), x @ narrow.float().T + layer.bias)
    layer.dequantize = lambda weight, kind: weight.to(kind) * 3
    torch.testing.assert_close(layer(x), x @ (narrow.float() * 3).T + layer.bias)


def test_blocks_compile_whole() -> None:
    """No graph breaks, one graph per kind of block and attention, whatever the block's number."""
    mmdit = tiny_mmdit()
    args, condition = arguments(mmdit), BokehCondition.of([15, 0, 8, 30])
    specs = (Plain(), Grounded(pivot_of=(0,) * ROWS))
    torch._dynamo.reset()
    with torch.no_grad():
        expected = [mmdit(*args, spec, condition) for spec in specs]
        for block in (*mmdit.double_blocks, *mmdit.single_blocks):
            block.compile(backend="eager", fullgraph=True, dynamic=False)
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for spec, value in zip(specs, expected, strict=True):
            assert torch.equal(mmdit(*args, spec, condition), value)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before <= 6


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("terms", [0, 1])
def test_long_rows_are_multiplied_where_they_lie(
    bias: bool, terms: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers of a copy, and with gradients its gradients."""
    layer = Linear(8, 6, bias=bias).requires_grad_(False)
    layer.terms = (LowRankTerm(down=torch.randn(2, 8), up=torch.randn(3, 2), strength=0.5, first=2),) * terms
    x = torch.randn(3, 9, 8)[:, 2:]
    copied = [layer(x), layer.columns(x, 1, 4)]
    monkeypatch.setattr(linear, "_has_long_rows", lambda x: True)
    for ours, theirs in zip([layer(x), layer.columns(x, 1, 4)], copied, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.is_contiguous()
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(layer(leaf[:, 1:]).sum(), leaf)
    assert gradient.abs().sum() > 0
