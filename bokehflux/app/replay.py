"""Making a picture again: from the recipe inside it to the arguments that made it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from bokehflux.configs import GROUNDED_SHARE
from bokehflux.pictures.metadata import read_recipe
from bokehflux.record import Request

logger = logging.getLogger(__name__)

MAX_THREADS = 256
TEXT = ("model", "vae", "clip", "t5", "tokenizers", "adapter", "device", "dtype", "compute")


def defaults_from(image: str, command: str) -> dict[str, Any]:
    """Defaults for the flags of a command ("generate" or "sweep") that make the batch of `image` again.

    Raises ValueError (NoRecipe) when the file holds no recipe, or one that no run could have had.
    """
    recipe = read_recipe(image)
    if "photo" in recipe:
        raise ValueError(
            f"{image} was made from the photograph {str(recipe['photo'])[:80]}: `bokehflux refocus` makes it "
            "again, and `bokehflux info` shows its settings"
        )
    values: dict[str, Any] = dataclasses.asdict(Request.from_recipe(recipe))
    if _is_default(values["num_grounding_steps"], values["num_inference_steps"], values["bokeh_pivot"]):
        values["num_grounding_steps"] = None  # to follow a pivot or a number of steps that is given now
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


def _is_default(num_grounded: int | None, num_steps: int | None, pivot: float | None) -> bool:
    """Whether so many grounded steps come about when nothing is said."""
    if pivot is None:
        return not num_grounded
    return num_steps is not None and num_grounded == round(GROUNDED_SHARE * num_steps)


def use_threads_of(image: str) -> None:
    """Let PyTorch use as many threads as made a picture on a CPU: sums depend on how they are shared out."""
    count = read_recipe(image).get("threads")
    if type(count) is int and 0 < count <= MAX_THREADS:
        import torch

        torch.set_num_threads(count)


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
        "threads",
        "torch",
        "triton",
        "version",
        "attention",
    ):
        if name in recipe and recipe[name] != facts.get(name):
            logger.warning(
                "%s was made with %s %s, here it is %s: the picture may differ",
                image, name, recipe[name], facts.get(name),
            )  # fmt: skip
