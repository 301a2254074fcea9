"""A model with all its parts found: where each lies, opened, and what it says about schedule and defaults.

Parts come from an ordered list of places (`resolve.py` makes it; `layouts.py` looks into each): the first
place that has a part provides it. `bokehflux.json` in a model folder is our optional card: default steps and
size, and the folders of its adapters. Only configs and headers are read, each header once.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bokehflux.configs import FLUX_SCHEDULE, SCHNELL_SCHEDULE, Defaults, MMDiTConfig, ScheduleConfig

from ..codec import UNSET, Codec, Field, Json
from ..files.checkpoint import CheckpointError, NotFoundError, Shelf, holds_checkpoint, read_json
from ..networks import (
    ADAPTER,
    CONTROLS,
    NETWORKS,
    REFERENCE,
    TRANSFORMER,
    VAE,
    adapter_for,
    controls_for,
    reference_for,
)
from ..parts import Part, open_part, part_of, shapes_of
from ..relatives import is_named_after_another, like_autoencoder, task
from ..tables import scheduler
from .layouts import PARTS, TOKENIZERS, Candidate, Findings, misfit, scan

CARD = "bokehflux.json"
SCHEDULER = f"scheduler/{scheduler.FILE}"
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "spiece.model", "tokenizer_config.json")
ScheduleName = Literal["dev", "schnell"]
ADAPTERS = (ADAPTER, REFERENCE, CONTROLS)
"""What a card may name a folder of."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Every part of a model. Checkpoints that were opened to find it are kept for the loader."""

    root: Path
    """Folder of the transformer, where the card and the schedule are looked for."""
    paths: Mapping[str, Path]
    """File or folder of every part; keys: those of `PARTS`."""
    parts: Mapping[str, Part[Any, Any]]
    """Every network, and the adapter if there is one, opened."""
    config: MMDiTConfig
    """The transformer's."""
    schedule: ScheduleConfig
    defaults: Defaults
    guessed: bool = False
    """Whether schedule and defaults are schnell's only because the transformer has no guidance embedding.
    A dev that was trained without distillation has none, either."""
    adapter: Path | None = None
    """File or folder of the adapter: the one that was given or, without it, the one that the card names."""
    reference: Path | None = None
    """Folder of the reference adapter, if the card names one."""
    controls: Path | None = None
    """Folder of the control adapter, if the card names one."""
    loras: tuple[tuple[Path, float], ...] = ()
    """File and strength of each LoRA that was given."""

    @property
    def files(self) -> list[Path]:
        """The files and folders that decide what the model computes: weights, configs, tokenizers, schedule.

        Adapter and LoRAs not included.
        """
        networks = [self.paths[network.name] for network in NETWORKS]
        # A tokenizer may lie in one folder with everything else.
        words = [self.paths[row.name] / file for row in TOKENIZERS for file in TOKENIZER_FILES]
        return [path for path in (*networks, *words, self.root / "scheduler") if path.exists()]

    def with_adapter(self, path: Path) -> Snapshot:
        """The same model with another adapter. Raises CheckpointError when there is none at `path`."""
        part = open_part(path, adapter_for(self.config))
        return dataclasses.replace(self, adapter=path, parts={**self.parts, part.network.name: part})

    def with_schedule(self, name: ScheduleName) -> Snapshot:
        """The same model with the publishers' schedule, steps and text length; what its card says holds."""
        schedule, defaults = _scheduled(self.root, name == "dev")
        return dataclasses.replace(self, schedule=schedule, defaults=defaults, guessed=False)

    def close(self) -> None:
        """Let go of the mapped files; what was read from headers stays."""
        for part in self.parts.values():
            part.checkpoint.close()


@dataclass(frozen=True, kw_only=True)
class Place:
    """Somewhere to look."""

    label: str
    """Its name in errors."""
    findings: Findings | None
    """None where there is nothing."""
    has_model: bool = True
    """Whether the transformer may come from here; the other parts always may."""
    bundled: bool = False
    """Whether it holds the tokenizers that come with bokehflux: they serve the published text encoders."""
    guided: bool | None = None
    """Take only transformers with (True: dev) or without (False: schnell) guidance embedding."""


def open_snapshot(path: str | Path) -> Snapshot:
    """A model folder that holds all its parts, in any layout; no other place is searched.

    Raises one CheckpointError that names all that was not found.
    """
    root = Path(path)
    if not root.is_dir():
        found = "is a file" if root.exists() else "does not exist"
        expected = "a model folder (transformer/, vae/, text_encoder/ ...) was expected"
        raise CheckpointError(root, f"{found}; {expected}")
    place = Place(label=str(root), findings=scan(root, Shelf()))
    return complete([place], f"{root} is not a complete model folder")


def complete(places: Iterable[Place], failure: str, advice: Sequence[str] = ()) -> Snapshot:
    """Take every part from the first place that has it.

    Later places are looked into only while something is missing. `failure` heads the NotFoundError that
    names every missing part (unless nothing was found at all), every place, and `advice`.
    """
    seen: list[Place] = []
    chosen: dict[str, Candidate] = {}
    home: Place | None = None
    for place in places:
        seen.append(place)
        if home is None:
            candidate = _transformer(place)
            if candidate is None:
                continue
            home, chosen[TRANSFORMER.name] = place, candidate
            config = part_of(candidate.checkpoint, TRANSFORMER).config()
        # The transformer decides what fits; places before its own may hold the rest.
        for earlier in seen if place is home else [place]:
            for part in PARTS:
                if part in chosen or (earlier.bundled and not _reads_for(part, chosen)):
                    continue
                if found := _choice(earlier, part, chosen[TRANSFORMER.name], config):
                    chosen[part] = found
        if len(chosen) == len(PARTS):
            break
    if home is None or home.findings is None or len(chosen) < len(PARTS):
        raise _incomplete(seen, set(chosen), config if home else None, failure, advice)
    for part, candidate in chosen.items():
        log.info("%s: %s", part, candidate.path)
    if alike := like_autoencoder(chosen[VAE.name].checkpoint):
        log.warning("%s %s: if it is, pictures will be wrong", chosen[VAE.name].path, alike)
    if kind := task(chosen[TRANSFORMER.name].checkpoint):
        log.warning(
            "%s calls itself FLUX.1 %s, which edits a picture: it is used as FLUX.1-dev, from a prompt alone",
            chosen[TRANSFORMER.name].path,
            kind,
        )
    return _snapshot(home, home.findings.root, chosen, config)


def _transformer(place: Place) -> Candidate | None:
    if place.findings is None or not place.has_model:
        return None
    found = [
        candidate
        for candidate in place.findings.parts.get(TRANSFORMER.name, ())
        if misfit(candidate, TRANSFORMER) is None
        and (place.guided is None or place.guided == _is_guided(candidate))
    ]
    return _one(place, TRANSFORMER.name, found)


def _is_guided(transformer: Candidate) -> bool:
    """Whether it has a guidance embedding."""
    return part_of(transformer.checkpoint, TRANSFORMER).config().guidance_embed


def _choice(place: Place, part: str, transformer: Candidate, config: MMDiTConfig) -> Candidate | None:
    found = place.findings.parts.get(part, ()) if place.findings is not None else ()
    for network in NETWORKS:
        if network.name == part:
            found = tuple(c for c in found if misfit(c, network, config) is None)
    # What comes in one file belongs together; apart from that a file of its own is meant.
    together = [c for c in found if c.path == transformer.path]
    alone = [c for c in found if not c.prefix]
    return _one(place, part, together or alone or list(found))


def _reads_for(part: str, chosen: Mapping[str, Candidate]) -> bool:
    """Whether the published tokenizer of this name reads for the text encoder that was found."""
    for network in NETWORKS:
        if network.tokenizer is not None and network.tokenizer.name == part and network.name in chosen:
            published = next(iter(network.presets.values())).vocab_size
            return part_of(chosen[network.name].checkpoint, network).config().vocab_size == published
    return False


def likely(found: Sequence[Candidate]) -> Sequence[Candidate]:
    """The files that are not named after another model, among those that fit alike; all, if none is left."""
    if len(found) < 2:
        return found
    return [c for c in found if not is_named_after_another(c.checkpoint)] or found


def _one(place: Place, part: str, found: Sequence[Candidate]) -> Candidate | None:
    found = likely(found)
    if len(found) > 1:
        names = ", ".join(sorted(c.path.name for c in found))
        raise CheckpointError(
            place.label, f"holds several {part} files ({names}): pass the path of the one you mean"
        )
    return found[0] if found else None


def _incomplete(
    seen: Sequence[Place],
    chosen: set[str],
    transformer: MMDiTConfig | None,
    failure: str,
    advice: Sequence[str],
) -> NotFoundError:
    seen = [place for place in seen if not place.bundled]
    if transformer is None:  # which decides what fits; what may fit is not missing
        chosen = {part for place in seen if place.findings for part in _present(place.findings)}
    missing = [part for part in PARTS if part not in chosen]
    anything = any(place.findings is not None for place in seen)
    problems = [f"not found: {PARTS[part]}" for part in missing] if anything else []
    refused: list[str] = []
    for place in seen:
        if len(seen) > 1 or place.findings is None:
            problems.append(f"looked in {place.label}{'' if place.findings else ': nothing there'}")
        if place.findings is not None:
            problems += place.findings.unreadable
            here = _refused(place, place.findings, missing, transformer)
            problems += here
            refused += here
    roots = [place.findings.root for place in seen if place.findings is not None and place.has_model]
    if len(seen) == 1 and roots and not (roots[0] / SCHEDULER).is_file():
        problems.append(f"not found: {SCHEDULER}")
    if anything and missing and set(missing) <= {row.name for row in TOKENIZERS}:
        problems.append("all else was found: `bokehflux fetch flux-dev --tokenizers-only` gets these 3 MB")
    return NotFoundError(failure, *problems, *advice, missing=missing if anything else (), refused=refused)


def _present(findings: Findings) -> set[str]:
    """The parts, apart from the transformer, that a place may provide."""
    networks = {network.name: network for network in NETWORKS}
    return {
        part
        for part, found in findings.parts.items()
        if part != TRANSFORMER.name
        and any(part not in networks or misfit(candidate, networks[part]) is None for candidate in found)
    }


def _refused(
    place: Place, findings: Findings, missing: Sequence[str], transformer: MMDiTConfig | None
) -> list[str]:
    """The files of a place that are not what is missing, and why."""
    reasons = dict(findings.passed_over)
    for network in NETWORKS:
        for candidate in findings.parts.get(network.name, ()) if network.name in missing else ():
            reason = misfit(candidate, network, transformer)
            if reason is None and network is TRANSFORMER and place.guided is not None:
                here, asked = ("no", "dev") if place.guided else ("a", "schnell")
                reason = f"has {here} guidance embedding, so it is not {asked}: pass its path to use it"
            if reason is not None:
                reasons[candidate.path] = reason
    return [f"{_below(path, findings.root)} is there, but it {reason}" for path, reason in reasons.items()]


def _below(path: Path, root: Path) -> Path:
    return path.relative_to(root) if path.is_relative_to(root) else path


def check_own_files(root: Path, guided: bool) -> None:
    """Raise CheckpointError for a card or a schedule of a model folder that cannot be used."""
    _stated(root)
    _scheduled(root, guided)
    _adapters(root)


def _stated(root: Path) -> ScheduleConfig | None:
    """The schedule that a model folder brings."""
    path = root / SCHEDULER
    return scheduler.CONFIG.from_json(read_json(path), path) if path.is_file() else None


def _adapters(root: Path) -> dict[str, Path]:
    """The adapters that the card of a model folder names, by the names in `ADAPTERS`."""
    named = {name: folder for name, folder in _settings(root).items() if name in ADAPTERS}
    for name, folder in named.items():
        if not holds_checkpoint(root / folder):
            raise CheckpointError(root / CARD, f"not found: {root / folder}/*.safetensors, its {name}")
    return {name: root / folder for name, folder in named.items()}


def _snapshot(place: Place, root: Path, chosen: Mapping[str, Candidate], config: MMDiTConfig) -> Snapshot:
    paths = {part: candidate.path for part, candidate in chosen.items()}
    stated = _stated(root)
    guided = config.guidance_embed or (stated is not None and stated.dynamic)  # schnell's is not
    schedule, defaults = _scheduled(root, guided)
    adapters = _adapters(root)
    if paths[TRANSFORMER.name] == root / TRANSFORMER.folder and stated is None:
        raise CheckpointError(f"{root} is not a complete model folder", f"not found: {SCHEDULER}")
    parts: dict[str, Part[Any, Any]] = {
        network.name: part_of(chosen[network.name].checkpoint, network) for network in NETWORKS
    }
    if mismatches := _mismatches(parts, config):
        raise CheckpointError(f"{root}: components of different models", *mismatches)
    for name, row in ((REFERENCE, reference_for(config)), (CONTROLS, controls_for(config))):
        if name in adapters:
            parts[name] = open_part(adapters[name], row)
    snapshot = Snapshot(
        root=root,
        paths=paths,
        parts=parts,
        config=config,
        schedule=stated or schedule,
        defaults=defaults,
        guessed=not (stated or guided or place.guided is False),
        reference=adapters.get(REFERENCE),
        controls=adapters.get(CONTROLS),
    )
    return snapshot.with_adapter(adapters[ADAPTER]) if ADAPTER in adapters else snapshot


def _scheduled(root: Path, guided: bool) -> tuple[ScheduleConfig, Defaults]:
    """The publishers' schedule of dev (guided) or schnell, and its defaults with what the card says."""
    defaults = card(guided).from_json(_settings(root), root / CARD)
    return FLUX_SCHEDULE if guided else SCHNELL_SCHEDULE, defaults


def _settings(root: Path) -> Json:
    """What the card of a model folder says, if there is one."""
    return read_json(root / CARD) if (root / CARD).is_file() else {}


def _mismatches(parts: Mapping[str, Part[Any, Any]], config: MMDiTConfig) -> list[str]:
    problems = []
    for part in parts.values():
        if (seam := part.network.seam) is not None:
            problem = seam.problem(shapes_of(part.checkpoint, part.network), config)
            problems += [problem] if problem else []
    return problems


def default_card(guidance_embed: bool) -> Defaults:
    """The publishers' settings: 30 steps for guidance-distilled models, 4 for schnell; both at 512x512."""
    if guidance_embed:
        return Defaults(num_inference_steps=30, height_px=512, width_px=512, txt_length=512)
    return Defaults(num_inference_steps=4, height_px=512, width_px=512, txt_length=256)


def card(guidance_embed: bool) -> Codec[Defaults]:
    """`bokehflux.json`: any of num_inference_steps, height, width, txt_length, and the adapters' folders."""
    keys = {"num_inference_steps": "num_inference_steps", "height_px": "height", "width_px": "width",
            "txt_length": "txt_length"}  # fmt: skip
    known = sorted({*keys.values(), *ADAPTERS})

    def faults(config: Json) -> list[str]:
        problems = [f"unknown key {key!r}, expected some of {known}" for key in config if key not in known]
        unnamed = [name for name in ADAPTERS if not isinstance(config.get(name, ""), str)]
        return problems + [f"{name} must name a folder, got {config[name]!r}" for name in unnamed]

    return Codec(
        what="model's card",
        build=lambda **stated: dataclasses.replace(default_card(guidance_embed), **stated),
        fields=tuple(Field(name, key, None, UNSET, _positive) for name, key in keys.items()),
        faults=faults,
    )


def _positive(value: object) -> object:
    if type(value) is not int or value < 1:
        raise ValueError("is not a positive whole number")
    return value
