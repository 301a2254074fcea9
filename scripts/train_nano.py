"""Train the bundled model, one command a stage, each under ten minutes on one H100:

    python scripts/train_nano.py vae     --out weights/nano
    python scripts/train_nano.py base    --out weights/nano
    python scripts/train_nano.py base    --out weights/nano --resume
    python scripts/train_nano.py adapter --out weights/nano

Every stage reads what the earlier ones wrote to --out and adds its own files in the official layout, with a
log of its curve under training/. Hyper-parameters and seeds are `NANO` and `RESUMED` of
`bokehflux.nano.recipe`.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
from pathlib import Path

import torch

from bokehflux.metrics import psnr
from bokehflux.models.clip import CLIPTextEncoder
from bokehflux.models.embeddings import RopeTable, rope_table
from bokehflux.models.mmdit import MMDiT
from bokehflux.models.t5 import T5Encoder
from bokehflux.models.vae import AutoencoderKL
from bokehflux.nano import captions
from bokehflux.nano.autoencoder import train_autoencoder
from bokehflux.nano.base import Sampler, TextToVelocity, distill_guidance, init_mmdit, train_base
from bokehflux.nano.recipe import NANO, RESUMED, SIZE_PX, Recipe
from bokehflux.nano.tokenizers import train_tokenizers
from bokehflux.sampling.latents import LatentGrid, position_ids
from bokehflux.text.tokenizers import CLIPTokenizer, T5Tokenizer
from bokehflux.training.adapter import stratified_levels, train_adapter
from bokehflux.training.data import Tokenize, latent_pool, rendered
from bokehflux.training.log import Log
from bokehflux.weights.load import load_network
from bokehflux.weights.networks import ADAPTER_PREFIX, CLIP, T5, TRANSFORMER, VAE, adapter_for
from bokehflux.weights.save import save_index, save_network, save_schedule, split_adapter

CAPTIONS_FOR_TOKENIZERS = 20_000
SHARD_BYTES = 15 * 10**6
"""The repository keeps every file below 16 MB."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=["vae", "base", "adapter"])
    parser.add_argument("--out", type=Path, required=True, help="snapshot folder to read from and add to")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--resume", action="store_true", help="base: go on from the weights in --out, not from chance"
    )
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=VALUE", help="change a hyper-parameter of the stage"
    )
    args = parser.parse_args()
    if args.resume and args.stage != "base":
        parser.error(f"--resume goes on with the base model; {args.stage} always begins from chance")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    torch._dynamo.config.cache_size_limit = 64
    (args.out / "training").mkdir(parents=True, exist_ok=True)
    name = {"vae": "autoencoder"}.get(args.stage, args.stage)
    planned = RESUMED if args.resume else getattr(NANO, name)
    recipe = dataclasses.replace(NANO, **{name: override(planned, args.set)})
    log = Log(args.out / "training" / f"{name}{'-resumed' if args.resume else ''}.json")
    log.note("recipe", dataclasses.asdict(getattr(recipe, name)))
    log.note("device", torch.cuda.get_device_name() if args.device == "cuda" else args.device)
    log.note("torch", torch.__version__)
    device = torch.device(args.device)
    if args.stage == "base":
        base_stage(recipe, args.out, device, log, args.resume)
    else:
        {"vae": vae_stage, "adapter": adapter_stage}[args.stage](recipe, args.out, device, log)
    log.save()


def override(stage: object, settings: list[str]) -> object:
    """The stage with NAME=VALUE settings applied; exits with one line for anything that is no such number."""
    changes: dict[str, int | float] = {}
    fields = {field.name: type(getattr(stage, field.name)) for field in dataclasses.fields(stage)}  # type: ignore[arg-type]
    for setting in settings:
        key, _, value = setting.partition("=")
        try:
            changes[key] = fields[key](value)
        except (KeyError, ValueError):
            known = ", ".join(f"{name} ({kind.__name__})" for name, kind in fields.items())
            raise SystemExit(f"--set {setting}: expected NAME=VALUE with one of {known}") from None
    return dataclasses.replace(stage, **changes)  # type: ignore[type-var]


def vae_stage(recipe: Recipe, out: Path, device: torch.device, log: Log) -> None:
    vae = train_autoencoder(recipe.vae, recipe.autoencoder, SIZE_PX, device, log)
    generator = torch.Generator(device).manual_seed(10_000 + recipe.autoencoder.seed)
    for label, level in (("random levels", None), ("level 0", 0.0), ("level 28", 28.0)):

        def draw(n: int, _: int, level: float | None = level) -> torch.Tensor:
            uniform = torch.rand(n, generator=generator, device=device) * 30
            return uniform if level is None else torch.full_like(uniform, level)

        figures = []
        for *_, images in rendered(128, 1, draw, generator, SIZE_PX, chunk=64):
            figures.append(psnr((vae.decode(vae.encode(images * 2 - 1)) / 2 + 0.5).clamp(0, 1), images))
        log.note(f"PSNR of 128 unseen renders, {label} [dB]", round(float(torch.cat(figures).mean()), 2))
    log.note("latent scale and shift", (vae.config.scale, vae.config.shift))
    save_network(VAE, out / "vae", vae.config, half(vae))


def base_stage(recipe: Recipe, out: Path, device: torch.device, log: Log, resume: bool) -> None:
    stage = recipe.base
    torch.manual_seed(stage.seed)
    # Captions fix the tokenizers, the tokenizers fix the vocabulary sizes.
    clip_tokenizer, t5_tokenizer = train_tokenizers(
        captions.corpus(CAPTIONS_FOR_TOKENIZERS, seed=0), out, length=recipe.defaults.txt_length
    )
    t5_config = dataclasses.replace(recipe.t5, vocab_size=t5_tokenizer.vocab_size)
    clip_config = dataclasses.replace(
        recipe.clip, vocab_size=clip_tokenizer.vocab_size, eos_token_id=clip_tokenizer.eos_id
    )
    tokenize = tokenizer_of(recipe, out)
    vae = channels_last(load_network(VAE, out / "vae", device=device, dtype=torch.float32))
    generator = torch.Generator(device).manual_seed(stage.seed)

    def draw(n: int, _: int) -> torch.Tensor:
        # Fine detail is the harder half: a third of the pictures lie below level 6.
        return torch.rand(n, generator=generator, device=device) ** 1.5 * 30

    pool = latent_pool(
        vae, tokenize, stage.scenes, stage.levels_per_scene, draw, generator, SIZE_PX, crowded=stage.crowded
    )
    log.note("latents", list(pool.latents.shape))
    mmdit, t5, clip = MMDiT(recipe.mmdit), T5Encoder(t5_config), CLIPTextEncoder(clip_config)
    init_mmdit(mmdit)
    if resume:
        for row, network in ((TRANSFORMER, mmdit), (T5, t5), (CLIP, clip)):
            saved = load_network(row, out / row.folder, dtype=torch.float32)
            network.load_state_dict(saved.state_dict())
    model = TextToVelocity(mmdit.to(device), t5.to(device), clip.to(device))
    log.note("parameters", sum(p.numel() for p in model.parameters()))
    if device.type == "cuda":
        mmdit.compile_blocks()
    null_t5, null_clip = (ids[0].to(device) for ids in tokenize([""]))
    sampler = Sampler(pool=pool, null_t5=null_t5, null_clip=null_clip, generator=generator)
    rope = nano_rope(recipe, device)
    train_base(model, rope, sampler, stage, log)
    distill_guidance(model, rope, sampler, stage, log)
    save_network(TRANSFORMER, out / "transformer", recipe.mmdit, half(mmdit), max_shard_bytes=SHARD_BYTES)
    save_network(T5, out / "text_encoder_2", t5_config, half(model.t5))
    save_network(CLIP, out / "text_encoder", clip_config, half(model.clip))
    save_schedule(out / "scheduler", recipe.schedule)
    save_index(out, recipe.defaults, adapter="adapter")


def adapter_stage(recipe: Recipe, out: Path, device: torch.device, log: Log) -> None:
    stage = recipe.adapter
    torch.manual_seed(stage.seed)
    kind = {"device": device, "dtype": torch.float32}
    tokenize = tokenizer_of(recipe, out)
    vae = channels_last(load_network(VAE, out / "vae", **kind))
    t5, clip = (load_network(row, out / row.folder, **kind) for row in (T5, CLIP))
    generator = torch.Generator(device).manual_seed(stage.seed)
    draw = stratified_levels(generator, stage.levels_per_scene)
    pool = latent_pool(vae, tokenize, stage.scenes, stage.levels_per_scene, draw, generator, SIZE_PX)
    log.note("latents", list(pool.latents.shape))
    with torch.no_grad():
        text = tuple(
            torch.cat([encoder(part) for part in ids.split(1024)])
            for encoder, ids in ((t5, pool.t5_ids), (clip, pool.clip_ids))
        )
        null_text = tuple(
            encoder(ids.to(device)) for encoder, ids in zip((t5, clip), tokenize([""]), strict=True)
        )
    mmdit = MMDiT(recipe.mmdit, recipe.bokeh).to(device)
    base = load_network(TRANSFORMER, out / "transformer", **kind)
    mmdit.load_state_dict(base.state_dict() | adapter_state(mmdit))
    if device.type == "cuda":
        mmdit.compile_blocks()
    adapter = train_adapter(mmdit, pool, text, null_text, nano_rope(recipe, device), stage, generator, log)
    log.note("parameters", sum(p.numel() for p in adapter.trainable()))
    _, tensors = split_adapter(half(mmdit))
    saved = dataclasses.replace(recipe.bokeh, bokeh_scale=stage.saved_scale)
    save_network(adapter_for(recipe.mmdit), out / "adapter", saved, tensors)


def channels_last(vae: AutoencoderKL) -> AutoencoderKL:
    """The layout in which its convolutions and norms are fastest on a GPU."""
    return vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def adapter_state(mmdit: MMDiT) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in mmdit.state_dict().items() if name.startswith(ADAPTER_PREFIX)}


def half(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in module.state_dict().items()
    }


def nano_rope(recipe: Recipe, device: torch.device) -> RopeTable:
    grid = LatentGrid(height_px=SIZE_PX, width_px=SIZE_PX)
    ids = position_ids(grid, recipe.defaults.txt_length, device)
    return rope_table(ids, recipe.mmdit.axes_dim, recipe.mmdit.theta)


def tokenizer_of(recipe: Recipe, out: Path) -> Tokenize:
    t5 = T5Tokenizer.from_folder(out / "tokenizer_2")
    clip = CLIPTokenizer.from_folder(out / "tokenizer")
    return lambda texts: (t5(texts, recipe.defaults.txt_length), clip(texts))


if __name__ == "__main__":
    main()
