"""Making a picture again: from the record inside it to the arguments that made it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from bokehflux.pictures.metadata import read_recipe
from bokehflux.record import MAX_THREADS, Provenance, Record
from bokehflux.settings import GenerateSettings, RenderSettings

logger = logging.getLogger(__name__)

MODEL_FLAGS = (
    "model", "vae", "clip", "t5", "tokenizers", "adapter", "loras", "schedule", "device", "dtype", "compute",
    "max_rows", "vae_tiling",
)  # fmt: skip
"""Facts of a record that a flag of the same name asks for."""


def defaults_from(image: str, command: str) -> dict[str, Any]:
    """Defaults for the flags of a command ("generate", "sweep" or "render") that make `image`'s batch again.

    Raises ValueError (NoRecipe) when the file holds no recipe, or one that no run could have had.
    """
    record = read_record(image)
    settings, facts = record.settings, record.provenance.recipe()
    if command == "render" and isinstance(settings, RenderSettings):
        return {**settings.recipe(), "device": facts["device"]}
    if command == "render" or not isinstance(settings, GenerateSettings):
        raise ValueError(
            f"{image} was made by `bokehflux {settings.command}`, which makes it again; `bokehflux info` "
            "shows its settings"
        )
    values = {name: facts[name] for name in MODEL_FLAGS if facts.get(name) is not None}
    values |= settings.with_open_grounding().recipe()
    if command == "sweep":
        values["seeds"] = [values.pop("seed")]
    return values


def read_record(image: str) -> Record:
    """The record of a picture. Raises ValueError (NoRecipe) for a file without one that can be used."""
    return Record.from_recipe(read_recipe(image))


def use_threads_of(image: str) -> None:
    """Let PyTorch use as many threads as made a picture on a CPU: sums depend on how they are shared out."""
    count = read_record(image).provenance.threads
    if count is not None and count <= MAX_THREADS:
        import torch

        torch.set_num_threads(count)


def warn_of_differences(image: str, here: Provenance, files: Sequence[tuple[str, str]] = ()) -> None:
    """Say what will keep the picture from coming out bit by bit the same, if anything will.

    files: setting and fingerprint of each, as `LensSettings.file_hashes`.
    """
    recipe: Mapping[str, Any] = read_recipe(image)
    facts = {name: (recipe[name], value) for name, value in here.marked("matters").items() if name in recipe}
    before = dict(recipe.get("file_hashes", ()))
    facts |= {f"the {name}": (before[name], value) for name, value in files if name in before}
    for name, (then, now) in facts.items():
        if then != now:
            logger.warning(
                "%s was made with %s %s, here it is %s: the picture may differ", image, name, then, now
            )
