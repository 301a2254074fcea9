"""A model with all its parts found: where each lies, and what the model says about schedule and defaults.

Parts come from an ordered list of places (`resolve.py` makes it; `layouts.py` looks into each): the first
place that has a part provides it. `bokehflux.json` in a model folder is our optional card: default steps and
size, and the adapter's folder. Only configs and headers are read.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bokehflux.configs import FLUX_SCHEDULE, SCHNELL_SCHEDULE, Defaults, MMDiTConfig, ScheduleConfig

from .checkpoint import CheckpointError, NotFoundError, holds_checkpoint, read_json
from .layouts import Candidate, Findings, fits, is_flux, scan
from .official import Json, read_mmdit_config, schedule_config
from .parts import TRANSFORMER, open_part

CARD = "bokehflux.json"
PARTS = {
    "transformer": "transformer/*.safetensors, and for a BFL flux1-*.safetensors",
    "vae": "vae/*.safetensors, and for a BFL ae.safetensors",
    "clip": "text_encoder/*.safetensors, and for a clip_l.safetensors",
    "t5": "text_encoder_2/*.safetensors, and for a t5xxl*.safetensors",
    "clip_tokenizer": "tokenizer/ with vocab.json, merges.txt and tokenizer_config.json",
    "t5_tokenizer": "tokenizer_2/ with tokenizer_config.json and tokenizer.json or spiece.model",
}
"""What makes a model, and how errors call it."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The parts of a model. Paths are what the loaders of `weights/load.py` take."""

    root: Path
    """Folder of the transformer, where the card and the schedule are looked for."""
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


@dataclass(frozen=True, kw_only=True)
class Place:
    """Somewhere to look."""

    label: str
    """How errors call it."""
    findings: Findings | None
    """None when there is nothing."""
    has_model: bool = True
    """Whether the transformer may come from here; the other parts always may."""
    guided: bool | None = None
    """Of several transformers, take only those with (dev) or without (schnell) guidance embedding."""


def open_snapshot(path: str | Path) -> Snapshot:
    """A model folder that holds all its parts, in any layout; nothing is looked for elsewhere.

    One CheckpointError names all that was looked for in vain.
    """
    root = Path(path)
    if not root.is_dir():
        found = "is a file" if root.exists() else "does not exist"
        expected = "a model folder (transformer/, vae/, text_encoder/ ...) was expected"
        raise CheckpointError(root, f"{found}; {expected}")
    return complete([Place(label=str(root), findings=scan(root))], f"{root} is no complete model folder")


def complete(places: Iterable[Place], failure: str, advice: Sequence[str] = ()) -> Snapshot:
    """Take every part from the first place that has it.

    Later places are looked into only while something is missing. `failure` heads the NotFoundError that
    names every missing part (unless nothing was found at all), every place, and `advice`.
    """
    seen: list[Place] = []
    chosen: dict[str, Candidate] = {}
    home: Place | None = None
    mmdit: MMDiTConfig | None = None
    for place in places:
        seen.append(place)
        if home is None:
            candidate = _transformer(place)
            if candidate is None:
                continue
            home, chosen["transformer"] = place, candidate
            mmdit = read_mmdit_config(open_part(candidate.path, TRANSFORMER))
        assert mmdit is not None
        # The transformer decides what fits; places before its own may hold the rest.
        for earlier in seen if place is home else [place]:
            for part in PARTS:
                if part not in chosen and (found := _choice(earlier, part, chosen["transformer"], mmdit)):
                    chosen[part] = found
        if len(chosen) == len(PARTS):
            break
    if home is None or mmdit is None or len(chosen) < len(PARTS):
        raise _incomplete(seen, set(chosen), failure, advice)
    assert home.findings is not None
    for part, candidate in chosen.items():
        log.info("%s: %s", part, candidate.path)
    return _snapshot(home.findings.root, {part: c.path for part, c in chosen.items()}, mmdit)


def _transformer(place: Place) -> Candidate | None:
    if place.findings is None or not place.has_model:
        return None
    found = [c for c in place.findings.parts.get("transformer", ()) if is_flux(c, place.guided)]
    return _one(place, "transformer", found)


def _choice(place: Place, part: str, transformer: Candidate, mmdit: MMDiTConfig) -> Candidate | None:
    found = place.findings.parts.get(part, ()) if place.findings is not None else ()
    if part in ("vae", "clip", "t5"):
        found = tuple(c for c in found if fits(part, c, mmdit))
    # What comes in one file belongs together; apart from that a file of its own is meant.
    together = [c for c in found if c.path == transformer.path]
    alone = [c for c in found if not c.prefix]
    return _one(place, part, together or alone or list(found))


def _one(place: Place, part: str, found: Sequence[Candidate]) -> Candidate | None:
    if len(found) > 1:
        names = ", ".join(sorted(c.path.name for c in found))
        raise CheckpointError(
            place.label, f"holds several {part} files ({names}): pass the path of the one you mean"
        )
    return found[0] if found else None


def _incomplete(
    seen: Sequence[Place], chosen: set[str], failure: str, advice: Sequence[str]
) -> NotFoundError:
    missing = [what for part, what in PARTS.items() if part not in chosen]
    anything = any(place.findings is not None for place in seen)
    problems = [f"looked in vain for {what}" for what in missing] if anything else []
    for place in seen:
        if len(seen) > 1 or place.findings is None:
            problems.append(f"looked in {place.label}{'' if place.findings else ': nothing there'}")
        problems += place.findings.unreadable if place.findings is not None else ()
    roots = [place.findings.root for place in seen if place.findings is not None and place.has_model]
    if len(seen) == 1 and roots and not (roots[0] / "scheduler" / "scheduler_config.json").is_file():
        problems.append("looked in vain for scheduler/scheduler_config.json")
    return NotFoundError(failure, *problems, *advice)


def _snapshot(root: Path, paths: dict[str, Path], mmdit: MMDiTConfig) -> Snapshot:
    scheduler = root / "scheduler" / "scheduler_config.json"
    settings = read_json(root / CARD) if (root / CARD).is_file() else {}
    adapter = root / str(settings["adapter"]) if "adapter" in settings else None
    problems = []
    if paths["transformer"] == root / "transformer" and not scheduler.is_file():
        problems.append("looked in vain for scheduler/scheduler_config.json")
    if adapter is not None and not holds_checkpoint(adapter):
        problems.append(f"looked in vain for {adapter}/*.safetensors, the adapter in {CARD}")
    if problems:
        raise CheckpointError(f"{root} is no complete model folder", *problems)
    schedule = FLUX_SCHEDULE if mmdit.guidance_embed else SCHNELL_SCHEDULE
    if scheduler.is_file():
        schedule = schedule_config(read_json(scheduler), scheduler)
    return Snapshot(
        root=root,
        **paths,
        adapter=adapter,
        mmdit=mmdit,
        schedule=schedule,
        defaults=card(settings, mmdit.guidance_embed, root / CARD),
    )


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
