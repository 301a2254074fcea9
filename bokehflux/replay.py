"""Making a picture again: from the recipe inside it to the arguments that made it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from bokehflux.metadata import read_recipe
from bokehflux.request import Request

logger = logging.getLogger(__name__)

TEXT = ("model", "vae", "clip", "t5", "tokenizers", "adapter", "device", "dtype", "compute")


def defaults_from(image: str, command: str) -> dict[str, Any]:
    """Defaults for the flags of a command ("generate" or "sweep") that make the batch of `image` again.

    Raises ValueError (NoRecipe) when the file holds no recipe, or one that no run could have had.
    """
    recipe = read_recipe(image)
    values: dict[str, Any] = dataclasses.asdict(Request.from_recipe(recipe))
    if values["bokeh_targets"] is not None:
        values["bokeh_targets"] = list(values["bokeh_targets"])
    for name in TEXT:
        if not isinstance(recipe.get(name), str | None):
            raise ValueError(f"the recipe's {name!r} must be text, got {str(recipe[name])[:80]!r}")
        if recipe.get(name) is not None:
            values[name] = recipe[name]
    loras = recipe.get("loras", [])
    if not isinstance(loras, list) or not all(_is_lora(lora) for lora in loras):
        raise ValueError(f"the recipe's 'loras' must be paths and strengths, got {str(loras)[:80]!r}")
    if loras:
        values["lora"] = [[path, str(strength)] for path, strength in loras]
    if type(recipe.get("max_rows")) is int and recipe["max_rows"] > 0:
        values["max_rows"] = recipe["max_rows"]
    if type(recipe.get("vae_tiling")) is bool:
        values["vae_tiling"] = "on" if recipe["vae_tiling"] else "off"
    if command == "sweep":
        values["seeds"] = [values.pop("seed")]
    return values


def _is_lora(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and isinstance(value[0], str)
        and type(value[1]) in (int, float)
    )


def warn_of_differences(image: str, facts: Mapping[str, Any]) -> None:
    """Say what will keep the picture from coming out bit by bit the same, if anything will."""
    recipe = read_recipe(image)
    for name in (
        "model_hash",
        "adapter_hash",
        "lora_hashes",
        "dtype",
        "compute",
        "device_name",
        "torch",
        "version",
        "attention",
    ):
        if name in recipe and recipe[name] != facts.get(name):
            logger.warning(
                "%s was made with %s %s, here it is %s: the picture may differ",
                image, name, recipe[name], facts.get(name),
            )  # fmt: skip
