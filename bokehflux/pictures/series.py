"""One scene at several bokeh levels: its pictures, their recipes, and how they are laid out."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from bokehflux.pictures.files import Picture, distinct, level_stem
from bokehflux.pictures.sheet import Tile, contact_sheet

if TYPE_CHECKING:
    from bokehflux.pipeline.generate import Result


@dataclass(frozen=True, kw_only=True)
class Shot:
    """One picture of a scene."""

    level: float | None
    """None: the plain model."""
    image: Image.Image
    is_pivot: bool = False
    is_photo: bool = False
    """A pivot that no model made."""

    @property
    def stem(self) -> str:
        if self.level is None:
            return "plain"
        return ("pivot-" if self.is_pivot else "") + level_stem(self.level)

    @property
    def label(self) -> str:
        if self.level is None:
            return "plain"
        return f"{'photo' if self.is_photo else 'pivot' if self.is_pivot else 'bokeh'} {self.level:g}"


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What one prompt and one seed gave."""

    recipe: dict[str, Any]
    """Of the batch; a picture's own adds its role and level."""
    targets: tuple[Shot, ...]
    pivot: Shot | None

    @classmethod
    def of(cls, result: Result, facts: dict[str, Any]) -> Scene:
        """What a run made, also one that was stopped. facts: what `identity` says about model and machine."""
        recipe = {**result.settings, **facts}
        levels: Sequence[float | None] = recipe["bokeh_targets"] or [None]
        finished = levels[: len(result.images)]
        shots = [Shot(level=lv, image=img) for lv, img in zip(finished, result.images, strict=True)]
        pivot = None
        if result.pivot_image is not None:
            pivot = Shot(
                level=recipe["bokeh_pivot"],
                image=result.pivot_image,
                is_pivot=True,
                is_photo="photo" in recipe,
            )
        return cls(recipe=recipe, targets=tuple(shots), pivot=pivot)

    def pictures(self) -> list[Picture]:
        """One file per target, then the pivot, if the model made it."""
        shots = [*self.targets, *([] if self.pivot is None or self.pivot.is_photo else [self.pivot])]
        stems = distinct([shot.stem for shot in shots])
        return [
            Picture(stem=stem, image=shot.image, recipe=self.recipe_of(shot))
            for stem, shot in zip(stems, shots, strict=True)
        ]

    def recipe_of(self, shot: Shot) -> dict[str, Any]:
        return {**self.recipe, "role": "pivot" if shot.is_pivot else "target", "bokeh_level": shot.level}

    def tiles(self) -> list[Tile]:
        """Labelled pictures; the pivot in its place among ascending levels, so that all read as one sweep."""
        tiles = [Tile(image=shot.image, label=shot.label) for shot in self.targets]
        if self.pivot is not None and self.pivot.level is not None:
            levels = [shot.level or 0.0 for shot in self.targets]
            place = bisect.bisect(levels, self.pivot.level) if levels == sorted(levels) else len(levels)
            tiles.insert(place, Tile(image=self.pivot.image, label=self.pivot.label, is_pivot=True))
        return tiles

    def sheet(self) -> Picture:
        image = contact_sheet(self.tiles(), self.recipe["prompt"], self.footer())
        return Picture(stem="sheet", image=image, recipe={**self.recipe, "role": "sheet"})

    def footer(self) -> str:
        """What made the scene, in one line."""
        r = self.recipe
        grounded = f", {r['num_grounding_steps']} grounded" if self.pivot is not None else ""
        return " \u00b7 ".join(
            (
                Path(r["model"]).name,
                f"{r['num_inference_steps']} steps{grounded}",
                f"guidance {r['guidance_scale']:g}",
                f"seed {r['seed']}" if "seed" in r else f"from {r['photo']}",
            )
        )

    def merged(self, others: Sequence[Shot], pivot: Shot | None) -> Scene:
        """With pictures made earlier, all targets in ascending order."""
        targets = sorted([*self.targets, *others], key=lambda shot: shot.level or 0.0)
        recipe = {**self.recipe, "bokeh_targets": [shot.level for shot in targets]}
        return Scene(recipe=recipe, targets=tuple(targets), pivot=pivot or self.pivot)
