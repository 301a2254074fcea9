"""A model folder: where each component lies, and what the folder says about schedule and defaults.

Official layout: `transformer/ vae/ text_encoder/ text_encoder_2/ tokenizer/ tokenizer_2/ scheduler/`. The
transformer and the autoencoder may instead be BFL single files in the folder itself, recognised by their
tensors; the scheduler folder may then be absent. `bokehflux.json` is our optional card: default steps and
size, and the adapter's folder. Only configs and headers are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bokehflux.configs import FLUX_SCHEDULE, SCHNELL_SCHEDULE, Defaults, MMDiTConfig, ScheduleConfig

from .checkpoint import SUFFIXES, CheckpointError, holds_checkpoint, open_checkpoint, read_header, read_json
from .mapping import Table
from .official import Json, read_mmdit_config, schedule_config
from .tables import flux, vae

CARD = "bokehflux.json"


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The parts of a model folder. Paths are what the loaders of `weights/load.py` take."""

    root: Path
    transformer: Path
    vae: Path
    clip: Path
    t5: Path
    clip_tokenizer: Path
    """Folder with vocab.json and merges.txt."""
    t5_tokenizer: Path
    """Folder with spiece.model or tokenizer.json."""
    adapter: Path | None
    """Folder of the adapter that the card names."""
    mmdit: MMDiTConfig
    schedule: ScheduleConfig
    defaults: Defaults


def open_snapshot(path: str | Path) -> Snapshot:
    """Find every component, read the configs. One CheckpointError names all that was looked for in vain."""
    root = Path(path)
    if not root.is_dir():
        found = "is a file" if root.exists() else "does not exist"
        expected = "a model folder (transformer/, vae/, text_encoder/ ...) was expected"
        raise CheckpointError(root, f"{found}; {expected}")
    transformer = _component(root, "transformer", flux.BFL)
    autoencoder = _component(root, "vae", vae.BFL)
    scheduler = root / "scheduler" / "scheduler_config.json"
    bfl = transformer is not None and transformer.is_file()
    settings = read_json(root / CARD) if (root / CARD).is_file() else {}
    adapter = root / str(settings["adapter"]) if "adapter" in settings else None
    wanted = {
        "transformer/*.safetensors, and for a BFL flux1-*.safetensors": transformer is not None,
        "vae/*.safetensors, and for a BFL ae.safetensors": autoencoder is not None,
        "text_encoder/*.safetensors": holds_checkpoint(root / "text_encoder"),
        "text_encoder_2/*.safetensors": holds_checkpoint(root / "text_encoder_2"),
        "tokenizer/": (root / "tokenizer").is_dir(),
        "tokenizer_2/": (root / "tokenizer_2").is_dir(),
        "scheduler/scheduler_config.json": bfl or scheduler.is_file(),
        f"{adapter}/*.safetensors, the adapter in {CARD}": adapter is None or holds_checkpoint(adapter),
    }
    problems = [f"looked in vain for {what}" for what, found in wanted.items() if not found]
    if problems or transformer is None or autoencoder is None:
        raise CheckpointError(f"{root} is no complete model folder", *problems)

    mmdit = read_mmdit_config(open_checkpoint(transformer))
    schedule = FLUX_SCHEDULE if mmdit.guidance_embed else SCHNELL_SCHEDULE
    if scheduler.is_file():
        schedule = schedule_config(read_json(scheduler), scheduler)
    return Snapshot(
        root=root,
        transformer=transformer,
        vae=autoencoder,
        clip=root / "text_encoder",
        t5=root / "text_encoder_2",
        clip_tokenizer=root / "tokenizer",
        t5_tokenizer=root / "tokenizer_2",
        adapter=adapter,
        mmdit=mmdit,
        schedule=schedule,
        defaults=card(settings, mmdit.guidance_embed, root / CARD),
    )


def _component(root: Path, folder: str, single_file: Table) -> Path | None:
    """The folder when it holds weights, else the one BFL file in the root that has this table's marker."""
    if holds_checkpoint(root / folder):
        return root / folder
    files = sorted(p for p in root.iterdir() if p.suffix in SUFFIXES)
    files = [p for p in files if single_file.marker in read_header(p)[0]]
    if len(files) > 1:
        names = ", ".join(p.name for p in files)
        raise CheckpointError(
            root, f"holds several {single_file.name} files ({names}): keep one, or use {folder}/"
        )
    return files[0] if files else None


def default_card(guidance_embed: bool) -> Defaults:
    """The publishers' settings: 30 steps for guidance-distilled models, 4 for schnell; both at 512x512."""
    if guidance_embed:
        return Defaults(num_inference_steps=30, height_px=512, width_px=512, txt_length=512)
    return Defaults(num_inference_steps=4, height_px=512, width_px=512, txt_length=256)


def card(config: Json, guidance_embed: bool, where: object = "bokehflux.json") -> Defaults:
    """From a `bokehflux.json`: any of num_inference_steps, height, width, txt_length; else the default."""
    known = {"num_inference_steps", "height", "width", "txt_length", "adapter"}
    problems = [
        f"unknown key {key!r}, expected some of {sorted(known)}" for key in config if key not in known
    ]
    problems += [
        f"{key} must be a positive whole number, got {config[key]!r}"
        for key in sorted(known - {"adapter"})
        if key in config and not (type(config[key]) is int and config[key] > 0)
    ]
    if "adapter" in config and not isinstance(config["adapter"], str):
        problems.append(f"adapter must name a folder, got {config['adapter']!r}")
    if problems:
        raise CheckpointError(where, *problems)
    default = default_card(guidance_embed)
    return Defaults(
        num_inference_steps=config.get("num_inference_steps", default.num_inference_steps),
        height_px=config.get("height", default.height_px),
        width_px=config.get("width", default.width_px),
        txt_length=config.get("txt_length", default.txt_length),
    )
