"""Training: optimiser, averages, objective, batches, and toy runs of the adapter and base stages."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from bokehflux.configs import CLIPConfig, T5Config
from bokehflux.models.adapter import init_adapter
from bokehflux.models.clip import CLIPTextEncoder
from bokehflux.models.embeddings import RopeTable, rope_table
from bokehflux.models.mmdit import MMDiT
from bokehflux.models.t5 import T5Encoder
from bokehflux.models.vae import AutoencoderKL
from bokehflux.nano.base import Sampler, TextToVelocity, draw_guidance, init_mmdit, train_base
from bokehflux.nano.recipe import NANO, AdapterStage, BaseStage
from bokehflux.sampling.latents import LatentGrid, position_ids
from bokehflux.training.adapter import (
    AdapterBatch,
    adapter_step,
    draw_batch,
    stratified_levels,
    train_adapter,
)
from bokehflux.training.data import LatentPool, latent_pool
from bokehflux.training.log import Log
from bokehflux.training.objective import guided, logit_normal, mix, velocity_target
from bokehflux.training.optim import (
    Ema,
    Muon,
    Optimizer,
    orthogonal,
    paced,
    trapezoid,
)
from tests.tiny import BOKEH, MMDIT, TXT_LENGTH, VAE, tiny_mmdit

NUM_TOKENS = 4
STAGE = AdapterStage(
    steps=4,
    batch=12,
    group=3,
    lr=1e-2,
    level_dropout=0.25,
    caption_dropout=0.25,
    scenes=5,
    levels_per_scene=4,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rope() -> RopeTable:
    ids = position_ids(LatentGrid(height_px=32, width_px=32), TXT_LENGTH)
    return rope_table(ids, MMDIT.axes_dim, MMDIT.theta)


def toy_pool(scenes: int = 5, renders: int = 4) -> LatentPool:
    """Latents that name their scene and render: x0[0, 0] = scene, x0[0, 1] = level."""
    levels = torch.linspace(0, 30, renders).expand(scenes, -1) - torch.arange(scenes)[:, None] / 100
    levels = levels.clamp(0, 30)
    latents = torch.randn(scenes, renders, NUM_TOKENS, 64, generator=generator(1))
    latents[:, :, 0, 0] = torch.arange(scenes)[:, None].float()
    latents[:, :, 0, 1] = levels
    ids = torch.randint(3, 20, (scenes, TXT_LENGTH), generator=generator(2))
    return LatentPool(latents=latents, levels=levels, t5_ids=ids, clip_ids=ids)


def toy_text(scenes: int = 5) -> tuple[Tensor, Tensor]:
    g = generator(3)
    txt, pooled = torch.randn(scenes, TXT_LENGTH, 24, generator=g), torch.randn(scenes, 20, generator=g)
    return txt, pooled


NULL_TEXT = (torch.full((1, TXT_LENGTH, 24), 0.5), torch.full((1, 20), -0.5))


# --- optimiser, learning rate, averages


def test_muon_takes_block_matrices_only() -> None:
    mmdit = tiny_mmdit().requires_grad_(True)
    parameters, matrices = list(mmdit.parameters()), mmdit.units().matrices
    adamw, muon = Optimizer(parameters, 1e-3, matrices=matrices).parts
    of_muon = {id(p) for group in muon.param_groups for p in group["params"]}
    of_adamw = {id(p) for group in adamw.param_groups for p in group["params"]}
    assert of_muon | of_adamw == {id(p) for p in parameters} and not of_muon & of_adamw
    assert of_muon == {id(p) for p in matrices}
    assert len(Optimizer(parameters, 1e-3).parts) == 1


def test_optimizer_step() -> None:
    """The factor scales the step of both parts, and gradients are gone afterwards."""
    moved = []
    for factor in (1.0, 0.5, 0.0):
        matrix, bias = parameters = [nn.Parameter(torch.zeros(4, 4)), nn.Parameter(torch.zeros(4))]
        optimizer = Optimizer(parameters, 0.1, matrices=[matrix], weight_decay=0.0)
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator(4))
        optimizer.step(factor)
        assert all(p.grad is None for p in parameters)
        moved.append([p.detach().abs().mean().item() for p in parameters])
    assert all(m > 0.01 for m in moved[0]) and moved[2] == [0, 0]
    assert moved[1] == pytest.approx([m / 2 for m in moved[0]], rel=1e-3)


def test_trapezoid() -> None:
    ours = [trapezoid(step / 100, warmup=0.1, decay=0.4, floor=0.02) for step in range(101)]
    assert ours[:3] == pytest.approx([0.02, 0.1, 0.2])
    assert set(ours[10:61]) == {1.0} and ours[9] < 1 and ours[61] < 1
    assert ours[80] == pytest.approx(0.5) and ours[100] == 0.02
    assert ours[:11] == sorted(ours[:11]) and ours[60:] == sorted(ours[60:], reverse=True)


def test_paced_by_steps_and_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(paced(4)) == [(0, 0.0), (1, 0.25), (2, 0.5), (3, 0.75)]
    clock = itertools.count(100.0, 15.0)  # every look at the clock takes 15 seconds
    monkeypatch.setattr("bokehflux.training.optim.time.perf_counter", lambda: next(clock))
    assert list(paced(2, minutes=1.0)) == [(0, 0.0), (1, 0.25), (2, 0.5), (3, 0.75)]


def test_ema() -> None:
    p = nn.Parameter(torch.tensor([1.0]))
    ema = Ema([p], rate=0.1)
    values, expected = [5.0, 3.0, 8.0, 2.0], 1.0
    for i, value in enumerate(values):
        p.data.fill_(value)
        ema.update()
        expected += max(0.1, 1 / (1 + 0.25 * i)) * (value - expected)
        if i == 0:
            assert ema.average[0].item() == 5.0, "the start is forgotten at once"
    assert p.item() == 2.0
    ema.copy_to_parameters()
    assert p.item() == pytest.approx(expected)


# --- objective


def test_objective_identities() -> None:
    x0, eps = torch.randn(2, 3, 4, 5)
    sigma = torch.tensor([0.0, 1.0, 0.25])
    x = mix(x0, eps, sigma)
    assert torch.equal(x[0], x0[0]) and torch.equal(x[1], eps[1])
    torch.testing.assert_close(x[2], 0.75 * x0[2] + 0.25 * eps[2])
    # The target is the derivative of the path, so one step along it arrives.
    torch.testing.assert_close(x - sigma[:, None, None] * velocity_target(x0, eps), x0)


def test_guided() -> None:
    target, unconditional = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(guided(target, unconditional, torch.ones(3)), target)
    torch.testing.assert_close(guided(target, unconditional, torch.zeros(3)), unconditional)
    mixed = guided(target, unconditional, torch.tensor([1.0, 3.0, 5.0]))
    torch.testing.assert_close(mixed[1], 3 * target[1] - 2 * unconditional[1])
    torch.testing.assert_close(guided(target, target, torch.tensor([1.0, 3.0, 5.0])), target)


def test_draws() -> None:
    sigma = logit_normal(4000, 0.15, 1.0, generator())
    assert ((sigma > 0) & (sigma < 1)).all()
    assert sigma.logit().mean().item() == pytest.approx(0.15, abs=0.05)
    assert sigma.logit().std().item() == pytest.approx(1.0, abs=0.05)
    guidance = draw_guidance(4000, 6.0, generator())
    assert guidance.min() == 1 and guidance.max() <= 6 and guidance.max() > 5.8
    assert (guidance == 1).float().mean().item() == pytest.approx(0.15, abs=0.03)
    assert guidance.median() < 3.5, "denser near 1"


def test_stratified_levels() -> None:
    draw = stratified_levels(generator(), 5, exact_zero=0.25)
    for k in range(5):
        levels = draw(2000, k)  # type: ignore[operator]
        assert (levels >= 6 * k).all() and (levels <= 6 * (k + 1)).all()
        share = (levels == 0).float().mean().item()
        assert share == pytest.approx(0.25, abs=0.04) if k == 0 else share == 0


# --- batches


@pytest.mark.parametrize("seed", range(4))
def test_grouped_batch(seed: int) -> None:
    stage = dataclasses.replace(STAGE, level_dropout=0.0)
    batch = draw_batch(toy_pool(), toy_text(), NULL_TEXT, stage, True, generator(seed))
    assert batch.pivot_of == (0, 0, 0, 3, 3, 3, 6, 6, 6, 9, 9, 9)
    assert batch.x0.shape == batch.eps.shape == (12, NUM_TOKENS, 64)
    for start in range(0, 12, 3):
        rows = slice(start, start + 3)
        assert (batch.eps[rows] == batch.eps[start]).all() and (batch.sigma[rows] == batch.sigma[start]).all()
        assert len(set(batch.levels[rows].tolist())) == 3, "distinct levels"
        assert len(set(batch.x0[rows, 0, 0].tolist())) == 1, "one scene"
        assert torch.equal(batch.x0[rows, 0, 1], batch.levels[rows]), "each level with its own latents"
        for shared in (batch.txt, batch.pooled, batch.guidance):
            assert (shared[rows] == shared[start]).all()
    assert len({tuple(e.flatten()[:2].tolist()) for e in batch.eps}) == 4
    assert len(set(batch.sigma.tolist())) == 4 and ((batch.sigma >= 0) & (batch.sigma <= 1)).all()


def test_plain_batch() -> None:
    batch = draw_batch(toy_pool(), toy_text(), NULL_TEXT, STAGE, False, generator())
    assert batch.pivot_of is None
    assert len(set(batch.sigma.tolist())) == 12
    assert len({tuple(e.flatten()[:2].tolist()) for e in batch.eps}) == 12


def test_text_and_dropout_of_a_batch() -> None:
    """Captions belong to their scenes; a dropped caption is the null text at guidance 1."""
    text, stage = toy_text(), dataclasses.replace(STAGE, batch=120)
    batch = draw_batch(toy_pool(), text, NULL_TEXT, stage, True, generator())
    scene = batch.x0[:, 0, 0].long()
    dropped = (batch.txt == NULL_TEXT[0]).all(dim=2).all(dim=1)
    assert 0 < dropped.sum() < 120
    assert torch.equal(batch.txt[~dropped], text[0][scene[~dropped]])
    assert torch.equal(batch.pooled[~dropped], text[1][scene[~dropped]])
    assert (batch.pooled[dropped] == NULL_TEXT[1]).all() and (batch.guidance[dropped] == 1).all()
    assert batch.guidance[~dropped].max() > 1
    null = batch.levels.isnan()
    assert 10 < null.sum() < 60
    assert torch.equal(batch.levels[~null], batch.x0[~null, 0, 1])


def test_batches_repeat() -> None:
    a, b, c = (draw_batch(toy_pool(), toy_text(), NULL_TEXT, STAGE, True, generator(s)) for s in (1, 1, 2))
    assert torch.equal(a.x0, b.x0) and torch.equal(a.eps, b.eps) and not torch.equal(a.eps, c.eps)


# --- adapter


def toy_batch(grouped: bool) -> AdapterBatch:
    return draw_batch(toy_pool(), toy_text(), NULL_TEXT, STAGE, grouped, generator(7))


@pytest.mark.parametrize("grouped", [False, True])
def test_gradients_reach_the_adapter_and_nothing_else(grouped: bool) -> None:
    mmdit = tiny_mmdit()
    assert mmdit.bokeh is not None
    trainable = {id(p) for p in mmdit.bokeh.trainable()}
    for parameter in mmdit.bokeh.trainable():
        parameter.requires_grad_(True)
    adapter_step(mmdit, toy_batch(grouped), NULL_TEXT, rope()).backward()
    for name, parameter in mmdit.named_parameters():
        if id(parameter) in trainable:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None and not parameter.requires_grad, name


def test_adapter_step_at_guidance_one_is_flow_matching() -> None:
    mmdit, batch = tiny_mmdit(), toy_batch(False)
    batch = dataclasses.replace(batch, guidance=torch.ones(12), levels=torch.full((12,), 11.0))
    seen: list[Tensor] = []
    with mmdit.register_forward_hook(lambda *args: seen.append(args[-1])):
        loss = adapter_step(mmdit, batch, NULL_TEXT, rope())
    assert len(seen) == 2
    torch.testing.assert_close(loss, (seen[1] - (batch.eps - batch.x0)).square().mean())


def test_adapter_step_by_hand() -> None:
    """Target u + g (velocity - u), error divided by g^2; u without text, at the row's level."""
    mmdit, batch = tiny_mmdit(), toy_batch(True)
    seen: list[tuple[tuple, Tensor]] = []
    with mmdit.register_forward_hook(lambda _, args, out: seen.append((args, out))):
        loss = adapter_step(mmdit, batch, NULL_TEXT, rope(), level_guidance=0.25)
    (null_args, u), (args, v) = seen
    assert (null_args[1] == NULL_TEXT[0]).all() and (null_args[2] == NULL_TEXT[1]).all()
    assert (null_args[4] == 1).all() and torch.equal(args[4], batch.guidance)
    torch.testing.assert_close(null_args[7].levels[:9], batch.levels[:9], equal_nan=True)
    assert null_args[7].levels[9:].isnan().all()
    assert args[6].pivot_of == null_args[6].pivot_of == batch.pivot_of
    g = batch.guidance[:, None, None]
    error = (v - u - g * (batch.eps - batch.x0 - u)) / g
    torch.testing.assert_close(loss, error.square().mean())


def fresh_adapter() -> tuple[MMDiT, dict[str, Tensor]]:
    mmdit = tiny_mmdit()
    return mmdit, {k: t.clone() for k, t in mmdit.state_dict().items()}


def test_training_the_adapter_lowers_its_loss(tmp_path: Path) -> None:
    """Levels that change the data: an adapter explains part of what the base cannot. The base stays."""
    mmdit, before = fresh_adapter()
    pool = toy_pool()
    pool.latents[..., 2:] += (pool.levels / 10)[..., None, None]
    stage = dataclasses.replace(
        STAGE, steps=30, lr=2e-2, level_dropout=0.0, max_guidance=1.0, caption_dropout=0.0
    )
    log = Log(tmp_path / "adapter.json", every=10)
    assert mmdit.bokeh is not None
    init_adapter(mmdit.bokeh)
    batches = [
        draw_batch(pool, toy_text(), NULL_TEXT, stage, grouped, generator(9)) for grouped in (False, True)
    ]
    start = [adapter_step(mmdit, batch, NULL_TEXT, rope()) for batch in batches]
    adapter = train_adapter(mmdit, pool, toy_text(), NULL_TEXT, rope(), stage, generator(5), log)
    assert adapter is mmdit.bokeh and not any(p.requires_grad for p in mmdit.parameters())
    end = [adapter_step(mmdit, batch, NULL_TEXT, rope()) for batch in batches]
    assert all(b < 0.9 * a for a, b in zip(start, end, strict=True)), (start, end)
    assert [point["step"] for point in log.points] == [10, 20, 30]
    assert all({"plain", "grounded"} <= point.keys() for point in log.points), "every other step is grounded"
    for name, tensor in mmdit.state_dict().items():
        assert torch.equal(tensor, before[name]) == (not name.startswith("bokeh.")), name


def test_training_needs_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="BokehConfig"):
        train_adapter(
            tiny_mmdit(bokeh=None),
            toy_pool(),
            toy_text(),
            NULL_TEXT,
            rope(),
            STAGE,
            generator(),
            Log(tmp_path / "x"),
        )


# --- base


def toy_model() -> TextToVelocity:
    torch.manual_seed(0)
    mmdit = MMDiT(MMDIT)
    init_mmdit(mmdit)
    t5 = T5Config(vocab_size=20, width=24, head_dim=12, mlp_size=32, num_layers=1, num_heads=2)
    clip = CLIPConfig(
        vocab_size=20, width=20, mlp_size=32, num_layers=1, num_heads=2, max_length=TXT_LENGTH, eos_token_id=1
    )
    return TextToVelocity(mmdit, T5Encoder(t5), CLIPTextEncoder(clip))


def toy_sampler(seed: int) -> Sampler:
    null = torch.ones(TXT_LENGTH, dtype=torch.long)
    pool = toy_pool()
    pool.clip_ids[:, -1] = 1
    return Sampler(pool=pool, null_t5=null, null_clip=null, generator=generator(seed))


def test_init_mmdit_predicts_zero() -> None:
    model = toy_model()
    x0, eps, t5_ids, clip_ids = toy_sampler(0).draw(3, 0.0)
    with torch.no_grad():
        assert not model(x0, t5_ids, clip_ids, torch.rand(3), torch.ones(3), rope()).any()


def test_sampler_draws_captions_with_their_scenes() -> None:
    sampler = toy_sampler(1)
    x0, eps, t5_ids, clip_ids = sampler.draw(200, 0.3)
    assert x0.shape == eps.shape == (200, NUM_TOKENS, 64)
    scene = x0[:, 0, 0].long()
    dropped = (t5_ids == sampler.null_t5).all(dim=1)
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.1)
    assert torch.equal(t5_ids[~dropped], sampler.pool.t5_ids[scene[~dropped]])
    assert torch.equal(clip_ids[~dropped], sampler.pool.clip_ids[scene[~dropped]])
    assert (clip_ids[dropped] == sampler.null_clip).all()


def test_training_the_base_lowers_its_loss(tmp_path: Path) -> None:
    """All parts learn, text encoders included; two runs of one seed are one run."""
    stage = BaseStage(steps=20, batch=12, lr=1e-2)
    curves, weights = [], []
    for _ in range(2):
        model = toy_model()
        start = {k: t.clone() for k, t in model.state_dict().items()}
        log = Log(tmp_path / "base.json", every=10)
        train_base(model, rope(), toy_sampler(2), stage, log)
        curves.append([point["loss"] for point in log.points])
        weights.append(model.state_dict())
    assert curves[0] == curves[1]
    assert curves[0][-1] < 0.9 * curves[0][0]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in start)
    for part in (
        "mmdit.single_blocks.1.linear1.weight",
        "t5.shared.weight",
        "mmdit.vector_in.in_layer.weight",
    ):
        assert not torch.equal(weights[0][part], start[part])


# --- pool and log


def test_latent_pool() -> None:
    """Rendered, captioned, encoded: shapes, levels, and one pool per seed."""
    torch.manual_seed(3)
    vae = AutoencoderKL(VAE).eval()
    captions: list[str] = []

    def tokenize(texts: list[str]) -> tuple[Tensor, Tensor]:
        captions.extend(texts)
        ids = torch.tensor([[len(t), *t.encode()[:3]] for t in texts])
        return ids, ids[:, :2]

    def pool(seed: int) -> LatentPool:
        g = generator(seed)
        return latent_pool(vae, tokenize, 3, 2, stratified_levels(g, 2), g, 64, chunk=2)  # type: ignore[arg-type]

    first, again, other = pool(1), pool(1), pool(2)
    assert first.latents.shape == (3, 2, 16, 64) and first.levels.shape == (3, 2) and first.num_scenes == 3
    assert first.t5_ids.shape == (3, 4) and first.clip_ids.shape == (3, 2)
    assert (first.levels[:, 0] <= 15).all() and (first.levels[:, 1] >= 15).all()
    assert not first.latents.requires_grad and first.latents.isfinite().all()
    assert torch.equal(first.latents, again.latents) and captions[:3] == captions[3:6]
    assert not torch.equal(first.latents, other.latents)
    # The two renders of a scene are one scene: nearer to each other than to another scene.
    assert (first.latents[0, 0] - first.latents[0, 1]).norm() < (
        first.latents[0, 0] - first.latents[1, 0]
    ).norm()
    assert all(isinstance(text, str) and len(text.split()) >= 5 for text in captions)


def test_log(tmp_path: Path) -> None:
    log = Log(tmp_path / "curve.json", every=2)
    log.note("size", [1, 2])
    for step, value in enumerate([1.0, 3.0, 5.0, 9.0, 100.0]):
        log.step(step, loss=torch.tensor(value))
    log.save()
    saved = json.loads((tmp_path / "curve.json").read_text())
    assert [(p["step"], p["loss"]) for p in saved["points"]] == [(2, 2.0), (4, 7.0)]
    assert saved["notes"]["size"] == [1, 2] and "seconds" in saved["notes"]
    assert [p.name for p in tmp_path.iterdir()] == ["curve.json"]


# --- the script


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "scripts" / "train_nano.py"
    spec = importlib.util.spec_from_file_location("train_nano", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_override(script: ModuleType) -> None:
    stage = script.override(NANO.adapter, ["steps=1000", "lr=0.5", "level_guidance=0.25"])
    assert (stage.steps, stage.lr, stage.level_guidance) == (1000, 0.5, 0.25) and isinstance(stage.steps, int)
    unchanged = {name: getattr(NANO.adapter, name) for name in ("steps", "lr", "level_guidance")}
    assert dataclasses.replace(stage, **unchanged) == NANO.adapter
    assert script.override(NANO.base, []) == NANO.base


@pytest.mark.parametrize(
    "setting", ["stepz=3", "steps", "steps=", "=3", "steps=2.7", "steps=many", "replace=1"]
)
def test_override_refuses(script: ModuleType, setting: str) -> None:
    with pytest.raises(SystemExit, match="expected NAME=VALUE with one of seed .int., scenes"):
        script.override(NANO.base, [setting])


def test_groups_must_fit_the_batch() -> None:
    for change in ({"batch": 510}, {"group": 8}):
        with pytest.raises(ValueError, match="must be a multiple of group"):
            dataclasses.replace(NANO.adapter, **change)


def test_recipe_fits_together() -> None:
    """What the trainer relies on: whole groups, enough renders for a group, adapter blocks that exist."""
    stage = NANO.adapter
    assert stage.batch % stage.group == 0 and stage.group <= stage.levels_per_scene
    assert NANO.bokeh.blocks == tuple(range(NANO.mmdit.num_blocks))
    assert NANO.mmdit.txt_dim == NANO.t5.width and NANO.mmdit.pooled_dim == NANO.clip.width
    assert NANO.mmdit.in_channels == 4 * NANO.vae.latent_channels == 64
    assert math.isclose(NANO.vae.downscale, 8) and BOKEH.rank < NANO.bokeh.rank


def test_nano_fits_in_its_parcel() -> None:
    """At most 48 MB in bfloat16, tokenizers and logs included."""
    with torch.device("meta"):
        networks = [
            MMDiT(NANO.mmdit, NANO.bokeh), AutoencoderKL(NANO.vae),
            T5Encoder(NANO.t5), CLIPTextEncoder(NANO.clip),
        ]  # fmt: skip
    assert sum(p.numel() for network in networks for p in network.parameters()) * 2 < 47.5e6


def test_muon_gives_the_published_update() -> None:
    """Against torch.optim.Muon, matrix by matrix, with equal settings."""
    torch.manual_seed(0)
    shapes = [(12, 7), (12, 7), (5, 20), (7, 7)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    mine = Muon(ours, lr=0.02, weight_decay=0.1)
    published = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        mine.step()
        published.step()
    for p, q in zip(ours, theirs, strict=True):
        # Its Newton-Schulz steps run in bfloat16 even on a CPU: 0.02 * 0.2 * sqrt(20) * 3 steps * 2^-6.
        assert (p - q).abs().max() < 8e-4


def test_muon_takes_filters_as_matrices() -> None:
    torch.manual_seed(0)
    filters = nn.Parameter(torch.randn(6, 4, 3, 3).contiguous(memory_format=torch.channels_last))
    matrix = nn.Parameter(filters.detach().flatten(1).clone())
    both = [Muon([p], lr=0.1, weight_decay=0.0) for p in (filters, matrix)]
    filters.grad = torch.randn_like(filters)
    matrix.grad = filters.grad.flatten(1).clone()
    for optimizer in both:
        optimizer.step()
    torch.testing.assert_close(filters.flatten(1), matrix)


def test_orthogonal_update_has_singular_values_near_one() -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonal(torch.randn(3, 20, 9), Muon.STEPS))
    assert 0.6 < values.min() and values.max() < 1.3
