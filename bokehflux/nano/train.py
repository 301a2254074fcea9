"""nano, stage by stage: each reads what the earlier ones wrote to a folder, and adds its own files."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bokehflux.conditioning import Conditioning
from bokehflux.configs import ControlsConfig, ReferenceConfig
from bokehflux.metrics import psnr
from bokehflux.models.clip import CLIPTextEncoder
from bokehflux.models.controls import ControlAdapter
from bokehflux.models.embeddings import RopeTable, rope_table
from bokehflux.models.mmdit import MMDiT
from bokehflux.models.reference import ReferenceAdapter, reference_ids
from bokehflux.models.t5 import T5Encoder
from bokehflux.models.vae import AutoencoderKL
from bokehflux.nano import captions
from bokehflux.nano.adapter import EncodedPool, train_adapter
from bokehflux.nano.autoencoder import train_autoencoder
from bokehflux.nano.base import Sampler, TextToVelocity, distill_guidance, init_mmdit, train_base
from bokehflux.nano.controls import ControlledScenes, Views, levels_with_sharp, train_controls
from bokehflux.nano.pool import (
    LevelDraw,
    Shoot,
    Show,
    Tokenize,
    latent_pool,
    mostly_sharp_levels,
    plainly,
    rendered,
    stratified_levels,
    uniform_levels,
)
from bokehflux.nano.recipe import Recipe
from bokehflux.nano.reference import train_reference
from bokehflux.nano.tokenizers import train_tokenizers
from bokehflux.sampling.latents import LatentGrid, position_ids
from bokehflux.text.tokenizers import CLIPTokenizer, T5Tokenizer
from bokehflux.training.log import Log
from bokehflux.training.state import Saves, State
from bokehflux.weights.find.snapshot import ADAPTERS
from bokehflux.weights.load import load_network, load_transformer
from bokehflux.weights.networks import (
    CLIP,
    T5,
    TRANSFORMER,
    VAE,
    Network,
    adapter_for,
    controls_for,
    reference_for,
)
from bokehflux.weights.save import save_index, save_network, save_schedule, split_adapter

CAPTIONS_FOR_TOKENIZERS = 20_000
SHARD_BYTES = 15 * 10**6
"""The repository keeps every file below 16 MB."""
DISTILL = "-distill"
"""The second loop of a stage: its state has a name of its own."""
UNSEEN = 128
"""Renders on which the autoencoder is measured."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One stage on its way into a snapshot folder."""

    name: str
    recipe: Recipe
    stage: Any
    """The stage's settings: one of the dataclasses in `recipe.py`."""
    out: Path
    device: torch.device
    log: Log
    save_every: int | None = None
    """Steps from one saved state to the next; None saves none."""
    resume: bool = False
    """Go on from the saved state."""

    def saves(self, phase: str = "") -> Saves | None:
        """Where the state of the stage's loop lies. A second loop has a state once the first is over."""
        if self.save_every is None:
            return None
        path = self._state(phase)
        resume = self.resume and (not phase or path.is_file())
        settings = dataclasses.asdict(self.stage)
        return Saves(path=path, every=self.save_every, settings=settings, resume=resume)

    def _state(self, phase: str) -> Path:
        return self.out / "training" / f"{self.name}{phase}.state.safetensors"

    def train(self) -> None:
        """Train, write the networks and the log, and forget the saved states."""
        (self.out / "training").mkdir(parents=True, exist_ok=True)
        self.log.note("recipe", dataclasses.asdict(self.stage))
        on_gpu = self.device.type == "cuda"
        self.log.note("device", torch.cuda.get_device_name() if on_gpu else self.device.type)
        self.log.note("torch", torch.__version__)
        STAGES[self.name](self)
        self.log.save()
        for phase in ("", DISTILL):
            self._state(phase).unlink(missing_ok=True)

    def tokenize(self) -> Tokenize:
        t5 = T5Tokenizer.from_folder(self.out / "tokenizer_2")
        clip = CLIPTokenizer.from_folder(self.out / "tokenizer")
        return lambda texts: (t5(texts, self.recipe.defaults.txt_length), clip(texts))

    def rope(self, *, of_reference: bool = False) -> RopeTable:
        defaults = self.recipe.defaults
        grid = LatentGrid(height_px=defaults.height_px, width_px=defaults.width_px)
        ids = position_ids(grid, defaults.txt_length, self.device)
        if of_reference:
            ids = reference_ids(ids, defaults.txt_length)
        return rope_table(ids, self.recipe.mmdit.axes_dim, self.recipe.mmdit.theta)

    def vae(self) -> AutoencoderKL:
        """The trained one, in the layout in which its convolutions and norms are fastest on a GPU."""
        vae = load_network(VAE, self.out / VAE.folder, device=self.device, dtype=torch.float32)
        return vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def autoencoder(run: Run) -> None:
    size_px = run.recipe.defaults.height_px
    vae = train_autoencoder(run.recipe.vae, run.stage, size_px, run.device, run.log, run.saves())
    generator = torch.Generator(run.device).manual_seed(10_000 + run.stage.seed)
    for label, level in (("random levels", None), ("level 0", 0.0), ("level 28", 28.0)):

        def draw(count: int, k: int, generator: torch.Generator, level: float | None = level) -> torch.Tensor:
            levels = uniform_levels(count, k, generator)
            return levels if level is None else torch.full_like(levels, level)

        shoot = Shoot(scenes=UNSEEN, draw=draw, size_px=size_px, chunk=64)
        figures = [
            psnr((vae.decode(vae.encode(images * 2 - 1)) / 2 + 0.5).clamp(0, 1), images)
            for *_, images in rendered(shoot, generator)
        ]
        mean = float(torch.cat(figures).mean())
        run.log.note(f"PSNR of {UNSEEN} unseen renders, {label} [dB]", round(mean, 2))
    run.log.note("latent scale and shift", (vae.config.scale, vae.config.shift))
    save_network(VAE, run.out / VAE.folder, vae.config, half(vae))


def base(run: Run, *, warm: bool = False) -> None:
    """warm: from the weights in the folder instead of from chance."""
    recipe, stage, out, device = run.recipe, run.stage, run.out, run.device
    torch.manual_seed(stage.seed)
    # Captions fix the tokenizers, the tokenizers fix the vocabulary sizes.
    clip_tokenizer, t5_tokenizer = train_tokenizers(
        captions.corpus(CAPTIONS_FOR_TOKENIZERS, seed=0), out, length=recipe.defaults.txt_length
    )
    t5_config = dataclasses.replace(recipe.t5, vocab_size=t5_tokenizer.vocab_size)
    clip_config = dataclasses.replace(
        recipe.clip, vocab_size=clip_tokenizer.vocab_size, eos_token_id=clip_tokenizer.eos_id
    )
    tokenize = run.tokenize()
    generator = torch.Generator(device).manual_seed(stage.seed)
    shoot = Shoot(
        scenes=stage.scenes,
        renders=stage.levels_per_scene,
        draw=mostly_sharp_levels,
        size_px=recipe.defaults.height_px,
        crowded=stage.crowded,
    )
    pool = latent_pool(run.vae(), tokenize, shoot, generator)
    run.log.note("latents", list(pool.latents.shape))
    mmdit, t5, clip = MMDiT(recipe.mmdit), T5Encoder(t5_config), CLIPTextEncoder(clip_config)
    init_mmdit(mmdit)
    if warm:
        rows: list[tuple[Network[Any, Any], torch.nn.Module]] = [(TRANSFORMER, mmdit), (T5, t5), (CLIP, clip)]
        for row, network in rows:
            saved = load_network(row, out / row.folder, dtype=torch.float32)
            network.load_state_dict(saved.state_dict())
    model = TextToVelocity(mmdit.to(device), t5.to(device), clip.to(device))
    run.log.note("parameters", sum(p.numel() for p in model.parameters()))
    if device.type == "cuda":
        mmdit.compile_blocks()
    null_t5, null_clip = (ids[0].to(device) for ids in tokenize([""]))
    sampler = Sampler(pool=pool, null_t5=null_t5, null_clip=null_clip)
    train_base(model, run.rope(), sampler, stage, run.log, run.saves())
    distill_guidance(model, run.rope(), sampler, stage, run.log, run.saves(DISTILL))
    save_network(
        TRANSFORMER, out / TRANSFORMER.folder, recipe.mmdit, half(mmdit), max_shard_bytes=SHARD_BYTES
    )
    save_network(T5, out / T5.folder, t5_config, half(t5))
    save_network(CLIP, out / CLIP.folder, clip_config, half(clip))
    save_schedule(out / "scheduler", recipe.schedule)
    save_index(out, recipe.defaults, "adapter")


def encoded_pool(run: Run, draw: LevelDraw, show: Show = plainly) -> EncodedPool:
    """Scenes for the stages on a frozen base, captions as its text encoders see them."""
    recipe, stage, out, device = run.recipe, run.stage, run.out, run.device
    torch.manual_seed(stage.seed)
    tokenize = run.tokenize()
    t5 = load_network(T5, out / T5.folder, device=device, dtype=torch.float32)
    clip = load_network(CLIP, out / CLIP.folder, device=device, dtype=torch.float32)
    generator = torch.Generator(device).manual_seed(stage.seed)
    shoot = Shoot(
        scenes=stage.scenes,
        renders=stage.levels_per_scene,
        draw=draw,
        show=show,
        size_px=recipe.defaults.height_px,
        chunk=stage.chunk,
    )
    pool = latent_pool(run.vae(), tokenize, shoot, generator)
    run.log.note("latents", list(pool.latents.shape))

    @torch.no_grad()
    def encode(t5_ids: torch.Tensor, clip_ids: torch.Tensor) -> Conditioning:
        txt = torch.cat([t5(part) for part in t5_ids.to(device).split(1024)])
        return Conditioning(
            txt=txt, pooled=torch.cat([clip(part) for part in clip_ids.to(device).split(1024)])
        )

    return EncodedPool(pool=pool, captions=encode(pool.t5_ids, pool.clip_ids), empty=encode(*tokenize([""])))


def adapter(run: Run) -> None:
    recipe, stage, out, device = run.recipe, run.stage, run.out, run.device
    scenes = encoded_pool(run, stratified_levels(stage.levels_per_scene))
    mmdit = MMDiT(recipe.mmdit, recipe.bokeh).to(device)
    trained_base = load_network(TRANSFORMER, out / TRANSFORMER.folder, device=device, dtype=torch.float32)
    mmdit.load_state_dict(mmdit.state_dict() | trained_base.state_dict())
    if device.type == "cuda":
        mmdit.compile_blocks()
    train_adapter(mmdit, scenes, run.rope(), stage, run.log, run.saves())
    assert mmdit.bokeh is not None
    run.log.note("parameters", sum(p.numel() for p in mmdit.bokeh.trainable()))
    _, tensors = split_adapter(half(mmdit))
    saved = dataclasses.replace(recipe.bokeh, bokeh_scale=stage.saved_scale)
    save_network(adapter_for(recipe.mmdit), out / "adapter", saved, tensors)


def reference(run: Run) -> None:
    recipe, stage, out, device = run.recipe, run.stage, run.out, run.device
    scenes = encoded_pool(run, stratified_levels(stage.levels_per_scene, exact_zero=0.7))
    mmdit = load_transformer(
        out / TRANSFORMER.folder, adapter=out / "adapter", device=device, dtype=torch.float32
    )
    made = ReferenceAdapter(ReferenceConfig(), recipe.mmdit).to(device)
    if device.type == "cuda":
        mmdit.compile_blocks()
    train_reference(
        mmdit, made, scenes, (run.rope(), run.rope(of_reference=True)), stage, run.log, run.saves()
    )
    run.log.note("parameters", sum(p.numel() for p in made.parameters()))
    save_network(reference_for(recipe.mmdit), out / "reference", made.config, half(made))
    index(run)


@dataclass(frozen=True, kw_only=True)
class Written:
    """Writes what was learned so far (`loop.Look`): a run that is cut off leaves it behind."""

    every: int
    write: Callable[[], None]

    def __call__(self, state: State) -> dict[str, float]:
        with state.ema.shown():
            self.write()
        return {}


def index(run: Run) -> None:
    """The card, with all adapters that were trained so far."""
    made = [name for name in ADAPTERS if (run.out / name).is_dir()]
    save_index(run.out, run.recipe.defaults, *made)


def controls(run: Run) -> None:
    recipe, stage, out, device = run.recipe, run.stage, run.out, run.device
    views = Views()
    encoded = encoded_pool(run, levels_with_sharp, views)
    chance = torch.Generator(device).manual_seed(20_000 + stage.seed)
    scenes = ControlledScenes.of(encoded, views, stage.by_map, chance)
    mmdit = load_transformer(
        out / TRANSFORMER.folder, adapter=out / "adapter", device=device, dtype=torch.float32
    )
    made = ControlAdapter(ControlsConfig(rank=stage.rank), recipe.mmdit).to(device)
    if device.type == "cuda":
        mmdit.compile_blocks()

    def write() -> None:
        save_network(controls_for(recipe.mmdit), out / "controls", made.config, half(made))
        index(run)

    written = Written(every=stage.write_every, write=write)
    train_controls(mmdit, made, scenes, run.rope(), stage, run.log, run.saves(), (written,))
    run.log.note("parameters", sum(p.numel() for p in made.parameters()))
    write()


STAGES: dict[str, Callable[[Run], None]] = {
    "autoencoder": autoencoder,
    "base": base,
    "base-resumed": functools.partial(base, warm=True),
    "adapter": adapter,
    "reference": reference,
    "controls": controls,
}


def half(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Its tensors as the repository stores them."""
    return {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in module.state_dict().items()
    }
