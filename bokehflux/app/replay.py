"""Making a picture again: from the record inside it to the arguments that made it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from bokehflux.pictures.metadata import read_recipe
from bokehflux.record import MAX_THREADS, GenerateSettings, Provenance, Record

logger = logging.getLogger(__name__)

MODEL_FLAGS = (
    "model", "vae", "clip", "t5", "tokenizers", "adapter", "loras", "schedule", "device", "dtype", "compute",
    "max_rows", "vae_tiling",
)  # fmt: skip
"""Facts of a record that a flag of the same name asks for."""


def defaults_from(image: str, command: str) -> dict[str, Any]:
    """Defaults for the flags of a command ("generate" or "sweep") that make the batch of `image` again.

    Raises ValueError (NoRecipe) when the file holds no recipe, or one that no run could have had.
    """
    record = read_record(image)
    if not isinstance(record.settings, GenerateSettings):
        photo = str(read_recipe(image).get("photo"))[:80]
        raise ValueError(
            f"{image} was made from the photograph {photo}: `bokehflux refocus` makes it again, and "
            "`bokehflux info` shows its settings"
        )
    facts = record.provenance.recipe()
    values = {name: facts[name] for name in MODEL_FLAGS if facts.get(name) is not None}
    values |= record.settings.with_open_grounding().recipe()
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


def warn_of_differences(image: str, here: Provenance) -> None:
    """Say what will keep the picture from coming out bit by bit the same, if anything will."""
    recipe: Mapping[str, Any] = read_recipe(image)
    for name, value in here.marked("matters").items():
        if name in recipe and recipe[name] != value:
            logger.warning(
                "%s was made with %s %s, here it is %s: the picture may differ",
                image,
                name,
                recipe[name],
                value,
            )
