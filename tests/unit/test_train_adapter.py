"""Training an adapter: batches drawn from scenes, the objective, and a published trainer's recorded steps."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from bokehflux.attention import AttentionSpec, Grounded, Plain
from bokehflux.conditioning import Conditioning
from bokehflux.models.embeddings import RopeTable, rope_table
from bokehflux.models.mmdit import MMDiT
from bokehflux.sampling.latents import LatentGrid, pack, position_ids
from bokehflux.training.adapter import (
    AdapterBatch,
    GroundedFrom,
    Sampling,
    adapter_step,
    draw_batch,
    row_names,
    trainable_adapter,
)
from bokehflux.training.batches import Draws
from bokehflux.training.engine import keep_activations, mean_of, store_fp8
from bokehflux.training.log import Log
from bokehflux.training.looks import Best, HeldOut, Sheets
from bokehflux.training.loop import Course, Step, train
from bokehflux.training.objective import draw_guidance
from bokehflux.training.optim import Optimizer, cosine
from bokehflux.training.state import Ema, State
from bokehflux.weights.load import load_transformer
from bokehflux.weights.precision import RowScaled
from tests.tiny import MMDIT, TXT_LENGTH, tiny_mmdit

CPU = torch.device("cpu")


def draws(count: int = 4, seed: int = 0) -> Draws:
    return Draws.of_step(seed, 0, count, CPU)


# --- batches


class ToyScenes:
    """Five scenes at four levels; x0 names its scene and level."""

    num_scenes, num_renders, device = 5, 4, CPU

    def latents(self, scene: Tensor, render: Tensor) -> Tensor:
        x0 = torch.zeros(len(scene), 4, 64)
        x0[:, 0, 0], x0[:, 0, 1] = scene, self.levels(scene, render)
        return x0

    def levels(self, scene: Tensor, render: Tensor) -> Tensor:
        return render * 10.0 - scene / 100 * (render > 0)

    def text(self, scene: Tensor, drop: Tensor, draws: Draws) -> Conditioning:
        name = torch.where(drop, -1.0, scene.float())
        return Conditioning(
            txt=name[:, None, None].expand(-1, TXT_LENGTH, 24), pooled=name[:, None].expand(-1, 20)
        )

    def null_text(self) -> Conditioning:
        return self.text(torch.zeros(1), torch.ones(1, dtype=torch.bool), draws(1))


HOW = Sampling(group=3, level_dropout=0.0)


@pytest.mark.parametrize("seed", range(4))
def test_a_grouped_batch_is_groups_of_one_scene(seed: int) -> None:
    batch = draw_batch(ToyScenes(), HOW, True, draws(12, seed))
    assert isinstance(batch.attention, Grounded)
    assert batch.attention.pivot_of == (0, 0, 0, 3, 3, 3, 6, 6, 6, 9, 9, 9)
    assert batch.x0.shape == batch.eps.shape == (12, 4, 64)
    for start in range(0, 12, 3):
        rows = slice(start, start + 3)
        assert (batch.eps[rows] == batch.eps[start]).all() and (batch.sigma[rows] == batch.sigma[start]).all()
        assert len(set(batch.levels[rows].tolist())) == 3, "distinct levels"
        assert len(set(batch.x0[rows, 0, 0].tolist())) == 1, "one scene"
        assert torch.equal(batch.x0[rows, 0, 1], batch.levels[rows]), "each level with its own latents"
        for shared in (batch.text.txt, batch.text.pooled, batch.guidance):
            assert (shared[rows] == shared[start]).all()
    assert len({tuple(e.flatten()[:2].tolist()) for e in batch.eps}) == 4
    assert len(set(batch.sigma.tolist())) == 4 and ((batch.sigma >= 0) & (batch.sigma <= 1)).all()


def test_a_plain_batch_is_unrelated_rows() -> None:
    batch = draw_batch(ToyScenes(), HOW, False, draws(12))
    assert isinstance(batch.attention, Plain)
    assert len(set(batch.sigma.tolist())) == 12
    assert len({tuple(e.flatten()[:2].tolist()) for e in batch.eps}) == 12


def test_the_pivots_level_is_any_of_the_scenes() -> None:
    batch = draw_batch(ToyScenes(), HOW, True, draws(300))
    shares = batch.levels[::3].div(10).round().long().bincount(minlength=4) / 100
    assert ((shares - 0.25).abs() < 0.13).all()


def test_text_and_dropout_of_a_batch() -> None:
    """Captions belong to their scenes; a dropped caption is the empty prompt at guidance 1."""
    how = Sampling(group=3, level_dropout=0.25, caption_dropout=0.25, level_guidance=0.3, max_guidance=5.0)
    batch = draw_batch(ToyScenes(), how, True, draws(1200))
    scene, name = batch.x0[:, 0, 0], batch.text.pooled[:, 0]
    dropped = name == -1
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.08)
    assert torch.equal(name[~dropped], scene[~dropped]) and torch.equal(batch.text.txt[:, 0, 0], name)
    assert (batch.guidance[dropped] == 1).all() and 4 < batch.guidance[~dropped].max() <= 5
    null = batch.levels.isnan()
    assert null.float().mean().item() == pytest.approx(0.25, abs=0.05)
    assert torch.equal(batch.levels[~null], batch.x0[~null, 0, 1])
    left_out = batch.unguided_levels.isnan()
    assert left_out[null].all() and torch.equal(batch.unguided_levels[~left_out], batch.levels[~left_out])
    assert left_out[~null].float().mean().item() == pytest.approx(0.3, abs=0.08)
    assert left_out[dropped & ~null].float().mean().item() == pytest.approx(0.3, abs=0.1)


def test_rows_that_are_not_swapped_keep_noise_of_their_own() -> None:
    how = dataclasses.replace(HOW, group=4, swap_probability=0.4)
    batch = draw_batch(ToyScenes(), how, True, draws(400))
    assert isinstance(batch.attention, Grounded)
    grounded = 0
    for row, pivot in enumerate(batch.attention.pivot_of):
        assert pivot in (row, row // 4 * 4)
        grounded += pivot != row
        assert torch.equal(batch.eps[row], batch.eps[pivot]) and batch.sigma[row] == batch.sigma[pivot]
    assert grounded / 300 == pytest.approx(0.4, abs=0.08)
    alone = 100 + 300 - grounded
    assert len(set(batch.sigma.tolist())) == len(set(batch.eps[:, 0, 0].tolist())) == alone
    assert len({batch.x0[row, 0, 0].item() for row in range(4)}) == 1, "one scene all the same"


def test_noise_levels_as_asked_for() -> None:
    def sigma(**how: object) -> Tensor:
        return draw_batch(ToyScenes(), Sampling(**how), False, draws(4000)).sigma  # type: ignore[arg-type]

    uniform = sigma(spread_sigma=False)
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.02) and uniform.min() < 0.01
    normal = sigma(sigma="logit-normal", sigma_mean=0.7, sigma_std=0.5).logit()
    assert normal.mean().item() == pytest.approx(0.7, abs=0.03)
    assert normal.std().item() == pytest.approx(0.5, abs=0.03)
    shifted = sigma(sigma_shift=3.0, spread_sigma=False)
    torch.testing.assert_close(shifted, 3 * uniform / (1 + 2 * uniform))
    spread = sigma()
    assert (spread * 4000).long().tolist() == list(range(4000))


def test_rows_that_are_alone_have_any_noise_level() -> None:
    """They are the last ones of their groups, whatever the step: no part of 0-1 is theirs."""
    how = Sampling(group=4, swap_probability=0.0)
    last = torch.stack(
        [
            draw_batch(ToyScenes(), how, True, Draws.of_step(0, step, 4, torch.device("cpu"))).sigma[3]
            for step in range(200)
        ]
    )
    assert last.mean().item() == pytest.approx(0.5, abs=0.08)


def test_noise_offset_is_constant_over_a_channel() -> None:
    plain, offset = (
        draw_batch(ToyScenes(), dataclasses.replace(HOW, noise_offset=size), False, draws(100)).eps
        for size in (0.0, 0.05)
    )
    added = (offset - plain).unflatten(2, (16, 4))
    assert (added - added[:, :1, :, :1]).abs().max() < 1e-6
    assert added[:, 0, :, 0].std().item() == pytest.approx(0.05, rel=0.1)


def test_two_processes_draw_the_batch_of_one() -> None:
    how = Sampling(group=3, swap_probability=0.5, spread_sigma=True, noise_offset=0.1, max_guidance=3.0)
    for grouped in (False, True):
        whole, *parts = (
            draw_batch(ToyScenes(), how, grouped, Draws.of_step(5, 3, 12, CPU, rank, world))
            for rank, world in ((0, 1), (0, 2), (1, 2))
        )
        for name in ("x0", "eps", "sigma", "levels", "unguided_levels", "guidance"):
            both = torch.cat([getattr(part, name) for part in parts])
            torch.testing.assert_close(getattr(whole, name), both, rtol=0, atol=0, equal_nan=True)


# --- the objective

NUM_TOKENS = 4
NULL_TEXT = Conditioning(txt=torch.full((1, TXT_LENGTH, 24), 0.5), pooled=torch.full((1, 20), -0.5))


def rope() -> RopeTable:
    ids = position_ids(LatentGrid(height_px=32, width_px=32), TXT_LENGTH)
    return rope_table(ids, MMDIT.axes_dim, MMDIT.theta)


def toy_batch(grouped: bool) -> AdapterBatch:
    d = draws(6)
    levels = d.uniform("level") * 30
    levels[1] = math.nan
    return AdapterBatch(
        x0=d.normal("x0", NUM_TOKENS, 64),
        eps=d.normal("eps", NUM_TOKENS, 64),
        sigma=d.uniform("sigma"),
        levels=levels,
        unguided_levels=torch.where(torch.arange(6) < 4, levels, math.nan),
        text=Conditioning(txt=d.normal("txt", TXT_LENGTH, 24), pooled=d.normal("pooled", 20)),
        guidance=draw_guidance(d, 4.0),
        attention=Grounded(pivot_of=(0, 0, 0, 3, 3, 3)) if grouped else Plain(),
    )


def test_blocks_of_a_float32_network_get_float32_under_autocast() -> None:
    """A GPU trains so: the tokens between blocks are not narrowed, and no block is compiled twice."""
    mmdit, seen = tiny_mmdit(), []
    for block in mmdit.blocks:
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0].x.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        adapter_step(mmdit, toy_batch(grouped=False), rope(), NULL_TEXT)
    assert len(seen) >= len(mmdit.blocks)
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("grouped", [False, True])
def test_gradients_reach_the_adapter_and_nothing_else(grouped: bool) -> None:
    mmdit = tiny_mmdit()
    trainable = dict(trainable_adapter(mmdit))
    adapter_step(mmdit, toy_batch(grouped), rope(), NULL_TEXT).backward()
    for name, parameter in mmdit.named_parameters():
        if name.removeprefix("bokeh.") in trainable:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None and not parameter.requires_grad, name


@pytest.mark.parametrize("null_text", [None, NULL_TEXT])
def test_adapter_step_is_flow_matching_without_guidance(null_text: Conditioning | None) -> None:
    """Without a prompt to lead away from, whatever the guidance; with one, at guidance 1."""
    mmdit, batch = tiny_mmdit(), toy_batch(False)
    if null_text is not None:
        batch = dataclasses.replace(batch, guidance=torch.ones(6), unguided_levels=batch.levels)
    seen: list[Tensor] = []
    with mmdit.register_forward_hook(lambda *args: seen.append(args[-1])):
        loss = adapter_step(mmdit, batch, rope(), null_text)
    assert len(seen) == (1 if null_text is None else 2)
    torch.testing.assert_close(loss, (seen[-1] - (batch.eps - batch.x0)).square().mean())


def test_adapter_step_by_hand() -> None:
    """Target u + g (velocity - u), error divided by g^2; u without text, at its own levels."""
    mmdit, batch = tiny_mmdit(), toy_batch(True)
    seen: list[tuple[tuple, Tensor]] = []
    with mmdit.register_forward_hook(lambda _, args, out: seen.append((args, out))):
        loss = adapter_step(mmdit, batch, rope(), NULL_TEXT)
    (null_args, u), (args, v) = seen
    assert (null_args[1] == NULL_TEXT.txt).all() and (null_args[2] == NULL_TEXT.pooled).all()
    assert (null_args[4] == 1).all() and torch.equal(args[4], batch.guidance)
    torch.testing.assert_close(null_args[7].levels, batch.unguided_levels, equal_nan=True)
    torch.testing.assert_close(args[7].levels, batch.levels, equal_nan=True)
    assert args[6] is null_args[6] is batch.attention
    g = batch.guidance[:, None, None]
    error = (v - u - g * (batch.eps - batch.x0 - u)) / g
    torch.testing.assert_close(loss, error.square().mean())


# --- the published trainer, step by step

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
NO_LEVEL = -1


def golden(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / "training" / f"{name}.safetensors")


def golden_mmdit() -> tuple[MMDiT, list[tuple[str, torch.nn.Parameter]]]:
    folder = GOLDEN / "snapshot" / "transformer"
    mmdit = load_transformer(folder, adapter=GOLDEN / "adapter", dtype=torch.float32)
    return mmdit, trainable_adapter(mmdit)


def golden_batch(data: dict[str, Tensor], first_grounded_block: int = 0) -> tuple[AdapterBatch, RopeTable]:
    """A recorded batch as ours: packed, -1 as the null level, one text for the rows of a group."""
    spec: AttentionSpec = Plain()
    if "ids" in data:
        spec = Grounded(pivot_of=tuple(data["ids"].tolist()))
        if first_grounded_block:
            spec = GroundedFrom(grounded=spec, first=first_grounded_block)
    count, _, height, width = data["x0"].shape
    levels = torch.where(data["levels"] == NO_LEVEL, math.nan, data["levels"])
    txt, pooled = data["prompt_embeds"], data["pooled"]
    batch = AdapterBatch(
        x0=pack(data["x0"]), eps=pack(data["eps"]), sigma=data["sigma"],
        levels=levels, unguided_levels=levels,
        text=Conditioning(txt=txt.expand(count, -1, -1), pooled=pooled.expand(count, -1)),
        guidance=data["guidance"], attention=spec,
    )  # fmt: skip
    ids = position_ids(LatentGrid(height_px=8 * height, width_px=8 * width), txt.shape[1])
    return batch, rope_table(ids, (4, 14, 14), 10_000)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("name", ["plain", "grounded", "swap", "swap_single_blocks_only"])
def test_velocity_loss_and_gradients_are_the_published_ones(name: str) -> None:
    data = (golden("swap") if "swap" in name else {}) | golden(name)
    mmdit, named = golden_mmdit()
    batch, table = golden_batch(data, first_grounded_block=2 if "single" in name else 0)
    seen: list[Tensor] = []
    with mmdit.register_forward_hook(lambda *args: seen.append(args[-1].detach())):
        loss = adapter_step(mmdit, batch, table)
    loss.backward()
    assert relative(seen[0], data["v"]) < 1e-5
    assert loss.item() == pytest.approx(data["loss"].item(), rel=1e-5)
    published = {key for key in data if key.startswith("grad.") and "to_k_bokeh" not in key}
    assert {f"grad.{key}" for key, _ in named} == published
    for key, parameter in named:
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, key
        assert relative(parameter.grad, data[f"grad.{key}"]) < 1e-4, key


def test_the_two_rules_of_grounding_differ_in_velocity() -> None:
    """Their losses hardly do; without this the test above could not tell them apart."""
    assert 0.01 < relative(golden("swap_single_blocks_only")["v"], golden("swap")["v"]) < 0.05


def test_five_optimiser_steps_are_the_published_ones(tmp_path: Path) -> None:
    """Through the loop: AdamW, clipping to 1, the cosine that begins at 0."""
    data = golden("optimiser")
    mmdit, named = golden_mmdit()
    start = {name: p.detach().clone() for name, p in mmdit.named_parameters()}
    losses: list[float] = []

    def loss(step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        prefix = f"step{step.number}."
        of_step = {k.removeprefix(prefix): t for k, t in data.items() if k.startswith(prefix)}
        value = adapter_step(mmdit, *golden_batch(of_step))
        losses.append(value.item())
        return value, {"loss": value}

    optimizer = Optimizer(named, 1e-3, betas=(0.9, 0.999), weight_decay=0.01)
    schedule = functools.partial(cosine, warmup=2 / 5)
    assert [1e-3 * schedule(step / 5) for step in range(5)] == pytest.approx(data["learning_rates"].tolist())
    course = Course(seed=0, batch=4, steps=5, ema_rate=1.0, schedule=schedule)
    train(loss, optimizer, course, Log(tmp_path / "log.json"))
    assert losses == pytest.approx(data["losses"].tolist(), rel=1e-5)
    moments = optimizer.moments()
    for name, parameter in named:
        torch.testing.assert_close(parameter.detach(), data[f"param.{name}"], rtol=0, atol=1e-5)
        assert relative(moments[f"exp_avg.{name}"], data[f"exp_avg.{name}"]) < 1e-4, name
        assert relative(moments[f"exp_avg_sq.{name}"], data[f"exp_avg_sq.{name}"]) < 1e-4, name
    live = {f"bokeh.{name}" for name, _ in named}
    assert not any("to_k_bokeh" in name for name in live)
    for name, parameter in mmdit.named_parameters():
        assert torch.equal(parameter, start[name]) != (name in live), name


def test_noise_offset_comes_before_the_swap_as_published() -> None:
    """(noise + 0.05 offset)[ids]: rows that are swapped have the pivot's offset, too."""
    data = golden("swap")
    eps = (data["noise"] + 0.05 * data["noise_offset"])[data["ids"]]
    torch.testing.assert_close(eps, data["eps"])
    how = dataclasses.replace(HOW, swap_probability=0.5, noise_offset=5.0)
    batch = draw_batch(ToyScenes(), how, True, draws(12))
    assert isinstance(batch.attention, Grounded)
    assert all(torch.equal(batch.eps[i], batch.eps[p]) for i, p in enumerate(batch.attention.pivot_of))


# --- checkpoints of activations


@pytest.mark.parametrize("name", ["plain", "grounded", "swap"])
def test_gradients_with_recomputed_blocks_are_the_same(name: str) -> None:
    """Frozen weights, live adapter: the kind of network for which some checkpointing gives zeros."""
    gradients, saved = [], []
    for checkpointed in (False, True):
        mmdit, named = golden_mmdit()
        if checkpointed:
            keep_activations(mmdit, 0.0, compile=False)
        batch, table = golden_batch(golden(name))
        count = [0]

        def pack_hook(x: Tensor, count: list[int] = count) -> Tensor:
            count[0] += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda x: x):
            loss = adapter_step(mmdit, batch, table)
        loss.backward()
        gradients.append({key: p.grad for key, p in mmdit.named_parameters() if p.grad is not None})
        saved.append(count[0])
    assert len(gradients[0]) == len(named) and gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        assert gradient.abs().max() > 0 and relative(gradients[1][key], gradient) < 1e-5, key
    assert saved[1] < saved[0] / 2, "blocks keep little but their inputs"


def test_blocks_of_a_kind_share_one_compiled_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their number, level and adapter; with and without checkpoints around them."""
    for share in (0.0, 1.0):
        torch._dynamo.reset()
        mmdit, counter = tiny_mmdit(), CompileCounter()
        trainable_adapter(mmdit)
        assert len(mmdit.doubles) > 1 and len(mmdit.singles) > 1
        monkeypatch.setattr(
            nn.Module, "compile", lambda self, c=counter, **_: setattr(
                self, "_compiled_call_impl", torch.compile(self._call_impl, dynamic=False, backend=c)
            ),
        )  # fmt: skip
        keep_activations(mmdit, share, compile=True)
        for count, grouped in ((2, True), (4, False)):
            adapter_step(mmdit, toy_batch(grouped), rope()).backward()
            assert counter.frame_count == count
    torch._dynamo.reset()


def test_narrow_weights_give_nearly_the_same_gradients() -> None:
    gradients = []
    for narrow in (False, True):
        mmdit, _ = golden_mmdit()
        if narrow:
            store_fp8(mmdit, torch.device("cpu"))
            assert all(x.weight.dtype == torch.float8_e4m3fn for x in mmdit.units().projections.values())
        batch, table = golden_batch(golden("grounded"))
        adapter_step(mmdit, batch, table).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in mmdit.parameters() if p.grad is not None]))
    assert 0 < relative(gradients[1], gradients[0]) < 0.3  # of narrow random networks


def test_scales_lie_where_the_work_is_done() -> None:
    """A graph cannot fetch them from the host, where weights that are not resident begin."""
    mmdit = tiny_mmdit()
    store_fp8(mmdit, torch.device("meta"))
    for layer in mmdit.units().projections.values():
        assert isinstance(layer.dequantize, RowScaled) and layer.dequantize.scale.is_meta
        assert not layer.weight.is_meta


def test_a_share_of_activations_is_that_of_the_last_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._functorch.config, "activation_memory_budget", 1.0)
    for share, budget in ((0.4, 0.4), (1.0, 1.0), (0.3, 0.3), (0.0, 1.0)):
        keep_activations(tiny_mmdit(), share, compile=True)
        assert torch._functorch.config.activation_memory_budget == budget


@pytest.mark.parametrize(("swap", "rows"), [(1.0, 4), (0.0, 4), (0.5, 2), (0.5, 4)])
def test_the_patterns_of_attention_are_counted(swap: float, rows: int) -> None:
    how = Sampling(group=2, swap_probability=swap)
    seen = {
        draw_batch(ToyScenes(), how, step % 2 == 1, Draws.of_step(0, step, rows, CPU)).attention
        for step in range(100)
    }
    assert len(seen) == how.num_patterns(rows)


def test_recomputed_blocks_keep_the_names_in_files() -> None:
    mmdit, named = golden_mmdit()
    names = list(mmdit.state_dict())
    keep_activations(mmdit, 0.0, compile=False)
    assert list(mmdit.state_dict()) == names
    assert [name for name, _ in trainable_adapter(mmdit)] == [name for name, _ in named]


# --- looks


class NamedToyScenes(ToyScenes):
    names = ("a", "b", "c", "d", "e")


def state_of(mmdit: MMDiT, tmp_path: Path) -> State:
    named = trainable_adapter(mmdit)
    ema = Ema([parameter for _, parameter in named], 0.1)
    return State(optimizer=Optimizer(named, 0.1), ema=ema, log=Log(tmp_path / "log.json"))


def test_the_held_out_loss_by_hand(tmp_path: Path) -> None:
    """One row at a time: every picture at 8 noise levels with noise of its own, from averaged weights."""
    mmdit = tiny_mmdit()
    state, scenes = state_of(mmdit, tmp_path), ToyScenes()
    look = HeldOut(every=1, mmdit=mmdit, rope=rope(), scenes=scenes, rows=6, pictures=7)
    found = look(state)
    losses: dict[str, list[float]] = {}
    for i in range(7):
        number = torch.tensor([i * 20 // 7])
        scene, render = number // 4, number % 4
        each = Draws(seed=0, samples=range(i, i + 1), batch=7, device=CPU)
        text, level = scenes.text(scene, torch.zeros(1, dtype=torch.bool), each), scenes.levels(scene, render)
        for sigma in torch.arange(0.0625, 1, 0.125):
            batch = AdapterBatch(
                x0=scenes.latents(scene, render), eps=each.normal("noise", 4, 64), sigma=sigma[None],
                levels=level, unguided_levels=level, text=text, guidance=torch.ones(1), attention=Plain(),
            )  # fmt: skip
            loss = adapter_step(mmdit, batch, rope()).item()
            name = next(n for n, top in (("0-10", 10), ("10-20", 20), ("20-30", 31)) if level < top)
            losses.setdefault(f"held-out, levels {name}", []).append(loss)
            losses.setdefault("held-out", []).append(loss)
    assert found == pytest.approx({name: sum(v) / len(v) for name, v in losses.items()}, rel=1e-5)
    with torch.no_grad():
        for parameter in state.ema.parameters:
            parameter += 1
    assert look(state) == found, "the average has not moved"
    for average in state.ema.average:
        average += 1
    assert look(state) != found


def test_the_best_is_kept_once_and_as_its_average(tmp_path: Path) -> None:
    state, kept = state_of(tiny_mmdit(), tmp_path), []
    first = state.ema.parameters[0]
    best = Best(every=2, figure="loss", keep=lambda: kept.append((step, first.flatten()[0].item())))
    trained = first.flatten()[0].item()
    for step, loss in enumerate((math.nan, 3.0, 4.0, math.nan, 2.0, 2.0, 2.5, 1.0)):
        state.ema.average[0].fill_(step)
        state.log.add(step, {"loss": loss})
        assert best(state) == {}
    assert kept == [(1, 1.0), (4, 4.0), (7, 7.0)] and first.flatten()[0].item() == trained


def test_rows_of_a_step_are_named_as_they_are_drawn() -> None:
    scenes, how = NamedToyScenes(), dataclasses.replace(HOW, level_dropout=0.0)
    for number in (0, 1):
        some = Draws.of_step(0, number, 6, CPU)
        batch = draw_batch(scenes, how, number == 1, some)
        named = row_names(how, scenes, scenes)(number, some)
        for name, x0 in zip(named, batch.x0, strict=True):
            scene, picture, level = name.split(", ")
            assert scenes.names.index(scene) == x0[0, 0]
            assert float(level.removeprefix("level ")) == pytest.approx(x0[0, 1].item(), abs=1e-4)
            assert picture == f"picture {round((x0[0, 1].item() + x0[0, 0].item() / 100) / 10) + 1}"


def test_sheets_show_the_average_as_it_will_be_loaded(tmp_path: Path) -> None:
    mmdit = tiny_mmdit().bfloat16()
    mmdit.bokeh.float()
    state, seen = state_of(mmdit, tmp_path), []
    before = [p.detach().clone() for p in state.ema.parameters]
    for average in state.ema.average:
        average.fill_(0.5)

    def generate(prompt: str, levels: Any, **asked: Any) -> Any:
        trained = [p for _, p in trainable_adapter(mmdit)]
        assert len(trained) == len(before) and {p.dtype for p in trained} == {torch.bfloat16}
        assert all((p == 0.5).all() for p in trained)
        seen.append((prompt, asked["seed"], (asked["height"], asked["width"]), asked["bokeh_pivot"]))
        picture = Image.effect_noise((32, 48), 40).convert("RGB")
        return SimpleNamespace(images=[picture] * len(levels), pivot_image=picture, sheet=lambda: picture)

    pipe = SimpleNamespace(transformer=mmdit, generate=generate)
    grid = LatentGrid(height_px=48, width_px=32)
    look = Sheets(every=1, pipe=pipe, prompts=("a", "b"), folder=tmp_path / "looks", grid=grid)  # type: ignore[arg-type]
    look(state)
    assert seen == [("a", 0, (48, 32), 15.0), ("b", 1, (48, 32), 15.0)]
    assert all(torch.equal(p, old) for p, old in zip(state.ema.parameters, before, strict=True))
    assert len(list((tmp_path / "looks").iterdir())) == 2


@pytest.mark.parametrize("count", [1, 2, 5])
def test_losses_one_by_one_are_their_mean(count: int) -> None:
    weights = [nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2, 3))]
    rows = torch.randn(count, 3)

    def loss(row: Tensor) -> Tensor:
        return (weights[1] @ (weights[0] * row)).square().sum()

    whole = torch.stack([loss(row) for row in rows]).mean()
    expected = torch.autograd.grad(whole, weights)
    value = mean_of([functools.partial(loss, row) for row in rows], weights)
    torch.testing.assert_close(value, whole)
    torch.testing.assert_close(torch.autograd.grad(value, weights), expected)
