"""nano's stages at toy size: what each is trained on and towards, and the way from one to the next."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from bokehflux.conditioning import Conditioning
from bokehflux.configs import CLIPConfig, Defaults, ScheduleConfig, T5Config
from bokehflux.models.adapter import init_adapter
from bokehflux.models.clip import CLIPTextEncoder
from bokehflux.models.embeddings import RopeTable, rope_table
from bokehflux.models.mmdit import MMDiT
from bokehflux.models.t5 import T5Encoder
from bokehflux.models.vae import AutoencoderKL
from bokehflux.nano import autoencoder, train
from bokehflux.nano.adapter import EncodedPool, train_adapter
from bokehflux.nano.autoencoder import train_autoencoder
from bokehflux.nano.base import DISTILLED, Sampler, TextToVelocity, distill_guidance, init_mmdit, train_base
from bokehflux.nano.pool import (
    LatentPool,
    Shoot,
    latent_pool,
    mostly_sharp_levels,
    rendered,
    stratified_levels,
    uniform_levels,
)
from bokehflux.nano.recipe import (
    NANO,
    RESUMED,
    AdapterStage,
    AutoencoderStage,
    BaseStage,
    ControlsStage,
    Recipe,
    ReferenceStage,
)
from bokehflux.sampling.latents import LatentGrid, position_ids
from bokehflux.training.adapter import adapter_step, draw_batch
from bokehflux.training.batches import Draws
from bokehflux.training.log import Log
from bokehflux.training.objective import logit_normal
from bokehflux.weights.files.checkpoint import CheckpointError
from bokehflux.weights.load import load_components
from tests.tiny import BOKEH, MMDIT, TXT_LENGTH, VAE, tiny_mmdit

CPU = torch.device("cpu")
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


def draws(count: int, seed: int = 0) -> Draws:
    return Draws.of_step(seed, 0, count, CPU)


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


def toy_text(scenes: int = 5) -> Conditioning:
    g = generator(3)
    txt, pooled = torch.randn(scenes, TXT_LENGTH, 24, generator=g), torch.randn(scenes, 20, generator=g)
    return Conditioning(txt=txt, pooled=pooled)


NULL_TEXT = Conditioning(txt=torch.full((1, TXT_LENGTH, 24), 0.5), pooled=torch.full((1, 20), -0.5))


# --- the autoencoder


def test_crops_are_parts_of_images_mirrored_or_not() -> None:
    images = torch.randint(256, (3, 3, 48, 48), generator=generator(), dtype=torch.uint8)
    side, seen = 24, set()
    x = autoencoder.crops(images, draws(64), side)
    assert x.shape == (64, 3, side, side) and x.is_contiguous(memory_format=torch.channels_last)
    parts = {
        (i, top, left, mirrored): (part.flip(2) if mirrored else part).float() / 127.5 - 1
        for i in range(3)
        for top in range(0, 25, 8)
        for left in range(0, 25, 8)
        for mirrored in (False, True)
        for part in [images[i, :, top : top + side, left : left + side]]
    }
    for row in x:
        found = [place for place, part in parts.items() if torch.equal(row, part)]
        assert len(found) == 1
        seen |= set(found)
    assert all(len({place[k] for place in seen}) == n for k, n in enumerate((3, 4, 4, 2)))


def test_training_the_autoencoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It learns; what comes back is the average, and its latents have mean 0 and deviation 1."""
    stage = AutoencoderStage(scenes=12, steps=60, batch=8, lr=5e-3)
    log = Log(tmp_path / "vae.json", every=12)
    sizes: list[tuple[int, int]] = []
    real = autoencoder.crops

    def watched(images: Tensor, some: Draws, side: int) -> Tensor:
        sizes.append((len(some), side))
        return real(images, some, side)

    monkeypatch.setattr(autoencoder, "crops", watched)
    vae = train_autoencoder(VAE, stage, 64, CPU, log)
    assert sizes == [(8, 32)] * 48 + [(2, 64)] * 12, "the last fifth sees whole images"
    assert log.points[3]["l1"] < 0.85 * log.points[0]["l1"], log.points
    assert {"l1", "edges", "kl"} <= log.points[0].keys() and log.notes["steps"] == 60
    assert not vae.training and not any(p.requires_grad for p in vae.parameters())
    shoot = Shoot(scenes=12, draw=uniform_levels, size_px=64)
    ((*_, images),) = rendered(shoot, generator(stage.seed))
    raw = vae.moments(images * 2 - 1)[0]
    assert vae.config.scale == pytest.approx(1 / raw.std().item(), rel=1e-3) and vae.config.scale != 1
    assert vae.config.shift == pytest.approx(raw.mean().item(), abs=1e-3)


def test_the_autoencoders_loss_by_hand() -> None:
    torch.manual_seed(2)
    vae, x, stage = AutoencoderKL(VAE), torch.rand(2, 3, 64, 64) * 2 - 1, AutoencoderStage(kl_weight=0.5)
    some = draws(2)
    mean, logvar = vae.moments(x)
    z = mean + some.normal("posterior", *mean.shape[1:]) * (logvar / 2).exp()
    error = vae.decoder(z) - x
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    edges = autoencoder.laplacian_pyramid(error)
    expected = error.abs().mean() + 8 * error.square().mean() + 0.4 * edges + 0.5 * kl
    loss, figures = autoencoder.autoencoder_loss(vae, x, some, stage, half_scale=False)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(figures["kl"], kl)
    half, _ = autoencoder.autoencoder_loss(vae, x, some, stage, half_scale=True)
    pool = functools.partial(torch.nn.functional.avg_pool2d, kernel_size=2)
    small = vae.decoder(pool(z)) - pool(x)
    added = 0.25 * (small.abs().mean() + 0.4 * autoencoder.laplacian_pyramid(small))
    torch.testing.assert_close(half, expected + added)


# --- the base


def toy_model() -> TextToVelocity:
    torch.manual_seed(0)
    mmdit = MMDiT(MMDIT)
    init_mmdit(mmdit)
    t5 = T5Config(vocab_size=20, width=24, head_dim=12, mlp_size=32, num_layers=1, num_heads=2)
    clip = CLIPConfig(
        vocab_size=20, width=20, mlp_size=32, num_layers=1, num_heads=2, max_length=TXT_LENGTH, eos_token_id=1
    )
    return TextToVelocity(mmdit, T5Encoder(t5), CLIPTextEncoder(clip))


def toy_sampler() -> Sampler:
    null = torch.ones(TXT_LENGTH, dtype=torch.long)
    pool = toy_pool()
    pool.clip_ids[:, -1] = 1
    return Sampler(pool=pool, null_t5=null, null_clip=null)


def test_init_mmdit_predicts_zero() -> None:
    model = toy_model()
    x0, _, t5_ids, clip_ids = toy_sampler().batch(draws(3), 0.0)
    with torch.no_grad():
        assert not model(x0, t5_ids, clip_ids, torch.rand(3), torch.ones(3), rope()).any()


def test_batches_pair_captions_with_their_scenes() -> None:
    sampler = toy_sampler()
    x0, eps, t5_ids, clip_ids = sampler.batch(draws(200), 0.3)
    assert x0.shape == eps.shape == (200, NUM_TOKENS, 64)
    scene = x0[:, 0, 0].long()
    assert set(scene.tolist()) == set(range(5)) and len(set(x0[:, 0, 1].tolist())) > 15
    dropped = (t5_ids == sampler.null_t5).all(dim=1)
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.1)
    assert torch.equal(t5_ids[~dropped], sampler.pool.t5_ids[scene[~dropped]])
    assert torch.equal(clip_ids[~dropped], sampler.pool.clip_ids[scene[~dropped]])
    assert (clip_ids[dropped] == sampler.null_clip).all()
    assert len({tuple(e.flatten()[:2].tolist()) for e in eps}) == 200


def test_training_the_base_lowers_its_loss(tmp_path: Path) -> None:
    """All parts learn, text encoders included; two runs of one seed are one run."""
    stage = BaseStage(steps=20, batch=12, lr=1e-2)
    curves, weights = [], []
    for _ in range(2):
        model = toy_model()
        start = {k: t.clone() for k, t in model.state_dict().items()}
        log = Log(tmp_path / "base.json", every=10)
        train_base(model, rope(), toy_sampler(), stage, log)
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


@pytest.mark.parametrize("sigma_mean", [-1.0, 1.5])
def test_the_base_is_trained_around_its_noise_level(tmp_path: Path, sigma_mean: float) -> None:
    """Flow matching of the batch, at guidance 1, at noise levels around sigmoid(sigma_mean)."""
    model, sampler, calls = toy_model(), toy_sampler(), []
    log = Log(tmp_path / "base.json", every=1)
    model.register_forward_hook(lambda _, args, out: calls.append((args, out.detach())))
    train_base(model, rope(), sampler, BaseStage(steps=2, batch=400, sigma_mean=sigma_mean), log)
    for step, ((x, t5_ids, clip_ids, sigma, guidance, _), v) in enumerate(calls):
        assert sigma.logit().mean().item() == pytest.approx(sigma_mean, abs=0.15)
        assert sigma.logit().std().item() == pytest.approx(1, abs=0.15)
        samples = Draws.of_step(2, step, 400, CPU)
        x0, eps, *ids = sampler.batch(samples, 0.1)
        torch.testing.assert_close(x, (1 - sigma[:, None, None]) * x0 + sigma[:, None, None] * eps)
        assert torch.equal(t5_ids, ids[0]) and torch.equal(clip_ids, ids[1]) and (guidance == 1).all()
        assert log.points[step]["loss"] == pytest.approx((v - (eps - x0)).square().mean().item())


def trained_model() -> TextToVelocity:
    """One that depends on its text: what is to be distilled."""
    model = toy_model()
    for name, parameter in model.named_parameters():
        if "mod" in name or "final_layer" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_distillation_by_hand(tmp_path: Path) -> None:
    """The target is u + g (c - u) of the model as it was, from which only the student moves away."""
    model, before, calls = trained_model(), trained_model(), []
    log = Log(tmp_path / "base.json", every=1)
    stage = BaseStage(distill_steps=3, batch=12, lr=1e-2)
    model.register_forward_hook(lambda _, args, out: calls.append((args, out.detach())))
    distill_guidance(model, rope(), toy_sampler(), stage, log)
    assert len(calls) == 3, "the teacher is another module"
    _, _, first_ids, _ = toy_sampler().batch(draws(12, stage.seed), stage.caption_dropout)
    assert not torch.equal(calls[0][0][1], first_ids), "samples of its own, not the base's again"
    for step, ((x, t5_ids, clip_ids, sigma, guidance, _), v) in enumerate(calls):
        null = torch.ones_like(t5_ids)
        of_step = Draws.of_step(stage.seed + DISTILLED, step, 12, CPU)
        assert torch.equal(sigma, logit_normal(of_step, 0.15, 1.1))
        with torch.no_grad():
            c = before(x, t5_ids, clip_ids, sigma, torch.ones(12), rope())
            u = before(x, null, null, sigma, torch.ones(12), rope())
        target = u + guidance[:, None, None] * (c - u)
        assert log.points[step]["distill"] == pytest.approx((v - target).square().mean().item(), rel=1e-4)
        assert guidance.max() > 2 and (guidance >= 1).all()
    assert log.notes["distill steps"] == 3


def test_distillation_teaches_the_guidance_input(tmp_path: Path) -> None:
    model, log = trained_model(), Log(tmp_path / "base.json", every=20)
    distill_guidance(model, rope(), toy_sampler(), BaseStage(distill_steps=80, batch=24, lr=2e-2), log)
    curve = [point["distill"] for point in log.points]
    assert curve[-1] < 0.6 * curve[0], curve


# --- the adapter


def encoded_pool() -> EncodedPool:
    return EncodedPool(pool=toy_pool(), captions=toy_text(), empty=NULL_TEXT)


def test_an_encoded_pool_pairs_latents_levels_and_captions() -> None:
    scenes = encoded_pool()
    assert (scenes.num_scenes, scenes.num_renders) == (5, 4)
    scene, render = torch.tensor([3, 0, 4]), torch.tensor([1, 2, 0])
    x0 = scenes.latents(scene, render)
    assert torch.equal(x0[:, 0, 0], scene.float()) and torch.equal(x0[:, 0, 1], scenes.levels(scene, render))
    text = scenes.text(scene, torch.tensor([False, True, False]), draws(3))
    for row, expected in ((0, scenes.captions.txt[3]), (1, NULL_TEXT.txt[0]), (2, scenes.captions.txt[4])):
        assert torch.equal(text.txt[row], expected)
    assert torch.equal(text.pooled[1], NULL_TEXT.pooled[0])
    assert torch.equal(text.pooled[2], scenes.captions.pooled[4])


def test_training_the_adapter_lowers_its_loss(tmp_path: Path) -> None:
    """Levels that change the data: an adapter explains part of what the base cannot. The base stays."""
    mmdit = tiny_mmdit()
    before = {k: t.clone() for k, t in mmdit.state_dict().items()}
    scenes = encoded_pool()
    scenes.pool.latents[..., 2:] += (scenes.pool.levels / 10)[..., None, None]
    stage = dataclasses.replace(
        STAGE, steps=30, lr=2e-2, level_dropout=0.0, max_guidance=1.0, caption_dropout=0.0
    )
    log = Log(tmp_path / "adapter.json", every=10)
    assert mmdit.bokeh is not None
    init_adapter(mmdit.bokeh)
    batches = [draw_batch(scenes, stage, grouped, draws(12, 9)) for grouped in (False, True)]
    start = [adapter_step(mmdit, batch, rope()) for batch in batches]
    train_adapter(mmdit, scenes, rope(), stage, log)
    assert not any(p.requires_grad for p in mmdit.parameters())
    end = [adapter_step(mmdit, batch, rope()) for batch in batches]
    assert all(b < 0.9 * a for a, b in zip(start, end, strict=True)), (start, end)
    assert [point["step"] for point in log.points] == [10, 20, 30]
    assert all({"plain", "grounded"} <= point.keys() for point in log.points), "every other step is grounded"
    for name, tensor in mmdit.state_dict().items():
        assert torch.equal(tensor, before[name]) == (not name.startswith("bokeh.")), name


def test_training_needs_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="BokehConfig"):
        train_adapter(tiny_mmdit(bokeh=None), encoded_pool(), rope(), STAGE, Log(tmp_path / "x"))


# --- the pool


def test_levels_of_the_pools() -> None:
    draw = stratified_levels(5, exact_zero=0.25)
    for k in range(5):
        levels = draw(2000, k, generator(k))
        assert (levels >= 6 * k).all() and (levels <= 6 * (k + 1)).all()
        share = (levels == 0).float().mean().item()
        assert share == pytest.approx(0.25, abs=0.04) if k == 0 else share == 0
    for draw, below_6 in ((uniform_levels, 0.2), (mostly_sharp_levels, 0.2 ** (2 / 3))):
        levels = draw(4000, 0, generator())
        assert (levels >= 0).all() and 29 < levels.max() <= 30
        assert (levels < 6).float().mean().item() == pytest.approx(below_6, abs=0.03)


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
        shoot = Shoot(scenes=3, renders=2, draw=stratified_levels(2), size_px=64, chunk=2)
        return latent_pool(vae, tokenize, shoot, generator(seed))

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


# --- the stages, one after the other

TOY = Recipe(
    mmdit=MMDIT,
    bokeh=BOKEH,
    t5=T5Config(vocab_size=512, width=24, head_dim=12, mlp_size=32, num_layers=1, num_heads=2),
    clip=CLIPConfig(
        vocab_size=1024, width=20, mlp_size=32, num_layers=1, num_heads=2, max_length=24, eos_token_id=1
    ),
    vae=VAE,
    schedule=ScheduleConfig(dynamic=True, shift=3.0),
    defaults=Defaults(num_inference_steps=2, height_px=64, width_px=64, txt_length=24),
    autoencoder=AutoencoderStage(scenes=6, steps=4, batch=8),
    base=BaseStage(scenes=6, steps=5, distill_steps=4, batch=4),
    adapter=AdapterStage(scenes=6, steps=5, batch=8),
    reference=ReferenceStage(scenes=6, steps=5, batch=4),
    controls=ControlsStage(scenes=6, steps=5, batch=8, chunk=4, rank=3, write_every=2),
)
STAGES = ("autoencoder", "base", "base-resumed", "adapter", "reference", "controls")


def run(out: Path, name: str, **how: Any) -> train.Run:
    stage = getattr(TOY, name.removesuffix("-resumed"))
    log = Log(out / "training" / f"{name}.json", every=2)
    return train.Run(name=name, recipe=TOY, stage=stage, out=out, device=CPU, log=log, **how)


@pytest.fixture
def toy_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "UNSEEN", 4)
    monkeypatch.setattr(train, "CAPTIONS_FOR_TOKENIZERS", 300)


def contents(folder: Path) -> dict[str, str]:
    """A hash of every file; of logs without their seconds."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            if path.parent.name == "training":
                log = json.loads(data)
                log["notes"].pop("seconds")
                points = [{k: v for k, v in p.items() if k != "seconds"} for p in log["points"]]
                data = json.dumps([log["notes"], points], sort_keys=True).encode()
            found[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return found


class Killed(BaseException):
    pass


@pytest.mark.usefixtures("toy_sizes")
def test_the_stages_make_a_model_killed_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each writes its networks and a log, and they load as one model. Killed in every loop and
    continued, they write the same files."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for name in STAGES:
        run(whole, name).train()
        log = json.loads((whole / "training" / f"{name}.json").read_text())
        assert log["notes"]["recipe"] == dataclasses.asdict(getattr(TOY, name.removesuffix("-resumed")))
        assert log["notes"]["steps"] == log["notes"]["recipe"]["steps"] and len(log["points"]) >= 2
    model = load_components(whole)
    assert model.reference is not None and model.reference.config.rank == 32
    assert (model.reference.block(0).to_v_ref.up.weight != 0).any()
    assert model.controls is not None and model.controls.config.rank == 3
    assert (model.controls.blocks[0].to_map_ctl.up.weight != 0).any()
    bokeh = model.transformer.bokeh
    assert bokeh is not None and bokeh.config.bokeh_scale == TOY.adapter.saved_scale
    assert model.snapshot.defaults == TOY.defaults and model.snapshot.schedule == TOY.schedule

    step = torch.optim.AdamW.step
    for name in STAGES:
        for deaths in (4, 3):  # in the second loop of the base, then once more, earlier
            count = [0]

            def deadly(self: torch.optim.AdamW, *args: Any, deaths=deaths, count=count) -> None:
                count[0] += 1
                if count[0] == deaths:
                    raise Killed
                step(self, *args)

            monkeypatch.setattr(torch.optim.AdamW, "step", deadly)
            with pytest.raises(Killed):
                run(stopped, name, save_every=1, resume=deaths == 3).train()
            if deaths == 4 and "base" not in name:
                break
        if name == "controls":  # it is written on the way, and not from the start again
            written = contents(stopped / name)
            with monkeypatch.context() as patch, pytest.raises(Killed):
                patch.setattr(train, "train_controls", Mock(side_effect=Killed))
                run(stopped, name, save_every=1, resume=True).train()
            assert written and contents(stopped / name) == written
        monkeypatch.setattr(torch.optim.AdamW, "step", step)
        run(stopped, name, save_every=1, resume=True).train()
    assert contents(stopped) == contents(whole)


@pytest.mark.usefixtures("toy_sizes")
def test_the_resumed_base_begins_with_the_weights_in_the_folder(tmp_path: Path) -> None:
    run(tmp_path, "autoencoder").train()
    waiting = tmp_path / "training" / "base-resumed.state.safetensors"
    waiting.write_bytes(b"of another run")
    run(tmp_path, "base").train()
    assert waiting.exists(), "a run forgets its own states only"
    waiting.unlink()
    before = contents(tmp_path)
    still = dataclasses.replace(TOY.base, lr=0.0, seed=7)
    dataclasses.replace(run(tmp_path, "base-resumed"), stage=still).train()
    after = contents(tmp_path)
    assert [name for name in after if after[name] != before.get(name)] == ["training/base-resumed.json"]


@pytest.mark.usefixtures("toy_sizes")
def test_a_stage_continues_only_what_was_begun(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"autoencoder.state.safetensors: no saved run to resume"):
        run(tmp_path, "autoencoder", save_every=2, resume=True).train()


# --- the recipe, and the script


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


@pytest.mark.parametrize(
    ("argv", "name", "stage", "saving"),
    [
        (["vae"], "autoencoder", NANO.autoencoder, (None, False)),
        (["base", "--set", "steps=7"], "base", dataclasses.replace(NANO.base, steps=7), (None, False)),
        (["base", "--resume"], "base-resumed", RESUMED, (None, False)),
        (["adapter", "--save-every", "5", "--continue"], "adapter", NANO.adapter, (5, True)),
    ],
)  # fmt: skip
def test_the_script_starts_the_stage(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, argv: list[str], name: str,
    stage: object, saving: tuple[int | None, bool],
) -> None:  # fmt: skip
    started: list[train.Run] = []
    monkeypatch.setattr(train.Run, "train", lambda self: started.append(self))
    monkeypatch.setattr("sys.argv", ["train_nano.py", *argv, "--out", str(tmp_path), "--device", "cpu"])
    script.main()
    (made,) = started
    assert (made.name, made.stage, made.recipe, made.out, made.device) == (name, stage, NANO, tmp_path, CPU)
    assert made.log.path == tmp_path / "training" / f"{name}.json"
    assert (made.save_every, made.resume) == saving


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["vae", "--resume"], "vae always begins from chance"),
        (["base", "--continue"], "--continue needs --save-every"),
    ],
)
def test_the_script_refuses(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: Any, argv: list[str], said: str
) -> None:
    monkeypatch.setattr("sys.argv", ["train_nano.py", *argv, "--out", "x"])
    with pytest.raises(SystemExit):
        script.main()
    assert said in capsys.readouterr().err


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
