"""What made a picture, and the record of a picture, which holds it beside what was asked for.

A record travels inside every picture as one flat JSON object, its recipe.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bokehflux.fields import LEVEL, SWITCH, TEXT, WEIGHTED, WHOLE, Checked, Recipe, convert, setting
from bokehflux.settings import GenerateSettings, RefocusSettings, RenderSettings, Settings

MAX_THREADS = 256


@dataclass(frozen=True, kw_only=True)
class Provenance(Checked):
    """What made a picture: which model, and where and how it ran. All optional: older recipes lack some."""

    model: str | None = setting(None, TEXT, decides=False)
    vae: str | None = setting(None, TEXT, decides=False, sparse=True)
    """A part that was given by itself, as the next three."""
    clip: str | None = setting(None, TEXT, decides=False, sparse=True)
    t5: str | None = setting(None, TEXT, decides=False, sparse=True)
    tokenizers: str | None = setting(None, TEXT, decides=False, sparse=True)
    adapter: str | None = setting(None, TEXT, decides=False)
    """As it was given; None where there was none, or where the model brought its own."""
    loras: tuple[tuple[str, float], ...] = setting((), WEIGHTED, decides=False)
    """File and strength of each, as given."""
    schedule: str | None = setting(None, TEXT, sparse=True)
    """"dev" or "schnell", where it was given."""
    model_hash: str | None = setting(None, TEXT, matters=True)
    adapter_hash: str | None = setting(None, TEXT, matters=True)
    lora_hashes: tuple[tuple[str, float], ...] = setting((), WEIGHTED, matters=True)
    dtype: str | None = setting(None, TEXT, matters=True)
    compute: str | None = setting(None, TEXT, matters=True)
    device: str | None = setting(None, TEXT, decides=False)
    device_name: str | None = setting(None, TEXT, decides=False, matters=True)
    threads: int | None = setting(None, WHOLE, least=1, decides=False, matters=True)
    """Threads of a CPU: sums depend on how they are shared out."""
    torch: str | None = setting(None, TEXT, decides=False, matters=True)
    triton: str | None = setting(None, TEXT, decides=False, matters=True)
    version: str | None = setting(None, TEXT, decides=False, matters=True)
    attention: str | None = setting(None, TEXT, decides=False, matters=True)
    """The backend that attention takes for the model's heads."""
    memory: str | None = setting(None, TEXT, decides=False)
    """The memory mode."""
    max_rows: int | None = setting(None, WHOLE, least=1, decides=False)
    """Pictures that went through the network together; None: all."""
    vae_tiling: bool | None = setting(None, SWITCH, decides=False)
    """Whether pictures were decoded in bands."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """How a picture was made."""

    settings: Settings | RenderSettings
    provenance: Provenance
    role: str | None = None
    """"target", "pivot", or the view that shows several pictures ("sheet", "grid", "animation")."""
    bokeh_level: float | None = None
    """The level of a single picture; None for the plain model."""
    in_focus: str | None = None
    """What was asked to be sharp in a single picture; None: what is so by itself."""

    @classmethod
    def from_recipe(cls, recipe: Mapping[str, Any]) -> Record:
        """Raises ValueError for a recipe that no run could have left. Keys that are not known are passed
        over."""
        kind: type[Settings | RenderSettings] = RefocusSettings if "photo" in recipe else GenerateSettings
        if "renderer" in recipe:
            kind = RenderSettings
        settings, provenance = kind.from_recipe(recipe), Provenance.from_recipe(recipe)
        level, focus = recipe.get("bokeh_level"), recipe.get("in_focus")
        return cls(
            settings=settings,
            provenance=provenance,
            role=None if recipe.get("role") is None else convert("role", TEXT, recipe["role"]),
            bokeh_level=None if level is None else convert("bokeh_level", LEVEL, level),
            in_focus=None if focus is None else convert("in_focus", TEXT, focus),
        )

    def of(self, role: str, bokeh_level: float | None = None, in_focus: str | None = None) -> Record:
        """The record of one picture or view of the same run."""
        return dataclasses.replace(self, role=role, bokeh_level=bokeh_level, in_focus=in_focus)

    def recipe(self) -> Recipe:
        """As JSON, to be written into the picture."""
        made_by = self.provenance.recipe()
        if isinstance(self.settings, RenderSettings):  # by no model
            made_by = {name: value for name, value in made_by.items() if value not in (None, [])}
        recipe = {**self.settings.recipe(), **made_by}
        if self.role is not None:
            recipe["role"] = self.role
        if self.role in ("target", "pivot"):
            recipe["bokeh_level"] = self.bokeh_level
        if self.in_focus is not None:
            recipe["in_focus"] = self.in_focus
        return recipe

    def decides(self) -> Recipe:
        """What decides the picture beside its level. Where it was made is not part of it: a sweep may be
        continued elsewhere."""
        return {**self.settings.marked("decides"), **self.provenance.marked("decides")}
