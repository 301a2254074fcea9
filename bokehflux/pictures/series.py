"""One scene at several bokeh levels: its pictures, their recipes, and how they are laid out."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from bokehflux.fields import Recipe
from bokehflux.pictures.files import Picture, distinct, focus_stem, level_stem
from bokehflux.pictures.sheet import Tile, contact_sheet
from bokehflux.record import Record
from bokehflux.settings import RefocusSettings, Settings

BLUR_MAP = "blur-map"
"""Stem of its file."""


@dataclass(frozen=True, kw_only=True)
class Shot:
    """One picture of a scene."""

    level: float | None
    """None: the plain model."""
    image: Image.Image
    focus: str | None = None
    """What was asked to be sharp; None: what is so by itself."""
    names_focus: bool = False
    """Whether its name tells, as it does where several were asked for."""
    is_pivot: bool = False
    is_photo: bool = False
    """A pivot that no model made."""
    file: str | None = None
    """Where it was saved: folder/name, from the folder that a page would lie in."""

    @property
    def stem(self) -> str:
        if self.level is None:
            return "plain"
        return ("pivot-" if self.is_pivot else "") + level_stem(self.level) + focus_stem(self._named)

    @property
    def label(self) -> str:
        if self.level is None:
            return "plain"
        kind = "photo" if self.is_photo else "pivot" if self.is_pivot else "bokeh"
        return f"{kind} {self.level:g}" + ("" if self._named is None else f", focus {self._named}")

    @property
    def _named(self) -> str | None:
        return self.focus if self.names_focus else None


@dataclass(frozen=True, kw_only=True)
class BlurMap:
    """Where, and how strongly, a lens blurs a scene's pivot."""

    image: Image.Image
    """Grey of the pivot's size: white is nearest."""
    ends: tuple[float, float]
    """Radius by level in pixels, of black and of white; what is at 0 is sharp where no focus is asked for."""
    glow: float = 1.0
    """How bright lights are, as `LensMap.glow`."""

    def recipe(self, record: Record) -> Recipe:
        return {**record.of("map").recipe(), "blur_ends": list(self.ends), "glow": self.glow}


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What one prompt and one seed gave."""

    record: Record
    """How the batch was made; a picture's own adds its role and level."""
    targets: tuple[Shot, ...]
    pivot: Shot | None
    blur_map: BlurMap | None = None
    """Where a lens made the targets of the pivot."""

    @classmethod
    def of(
        cls,
        record: Record,
        images: Sequence[Image.Image],
        pivot_image: Image.Image | None = None,
        blur_map: BlurMap | None = None,
    ) -> Scene:
        """What a run made: a picture for each of its first shots, and its pivot or photograph."""
        pivot, settings = None, record.settings
        wanted = settings.shots[: len(images)]
        shots = [
            Shot(level=level, focus=focus, names_focus=len(settings.focus or ()) > 1, image=image)
            for (level, focus), image in zip(wanted, images, strict=True)
        ]
        if pivot_image is not None and isinstance(settings, Settings):
            is_photo = isinstance(settings, RefocusSettings)
            pivot = Shot(level=settings.bokeh_pivot, image=pivot_image, is_pivot=True, is_photo=is_photo)
        return cls(record=record, targets=tuple(shots), pivot=pivot, blur_map=blur_map)

    @property
    def shots(self) -> tuple[Shot, ...]:
        """The targets, then the pivot, if any."""
        return self.targets if self.pivot is None else (*self.targets, self.pivot)

    def pictures(self) -> list[Picture]:
        """One file per target, then the pivot, if the model made it, and the map of its blur."""
        shots = [shot for shot in self.shots if not shot.is_photo]
        stems = distinct([shot.stem for shot in shots])
        made = [
            Picture(stem=stem, image=shot.image, recipe=self.recipe_of(shot))
            for stem, shot in zip(stems, shots, strict=True)
        ]
        if self.blur_map is not None:
            recipe = self.blur_map.recipe(self.record)
            made.append(Picture(stem=BLUR_MAP, image=self.blur_map.image, recipe=recipe))
        return made

    def saved_at(self, files: Sequence[str]) -> Scene:
        """Knowing where its `pictures` are."""
        own = zip(self.shots, files, strict=self.blur_map is None)  # the map's file is the last
        shots = [dataclasses.replace(shot, file=file) for shot, file in own]
        count = len(self.targets)
        return dataclasses.replace(self, targets=tuple(shots[:count]), pivot=next(iter(shots[count:]), None))

    def recipe_of(self, shot: Shot) -> Recipe:
        return self.record.of("pivot" if shot.is_pivot else "target", shot.level, shot.focus).recipe()

    def tiles(self) -> list[Tile]:
        """Labelled pictures; the pivot in its place among ascending levels, so that all read as one sweep."""
        tiles = [Tile(image=shot.image, label=shot.label) for shot in self.targets]
        if self.pivot is not None and self.pivot.level is not None:
            levels = [shot.level or 0.0 for shot in self.targets]
            place = bisect.bisect(levels, self.pivot.level) if levels == sorted(levels) else len(levels)
            tiles.insert(place, Tile(image=self.pivot.image, label=self.pivot.label, is_pivot=True))
        return tiles

    def sheet(self) -> Picture:
        image = contact_sheet(self.tiles(), self.record.settings.title, self.footer())
        return Picture(stem="sheet", image=image, recipe=self.record.of("sheet").recipe())

    def footer(self) -> str:
        """What made the scene, in one line."""
        model = Path(self.record.provenance.model or "").name
        return " \u00b7 ".join(filter(None, (model, self.record.settings.summary)))

    def merged(self, others: Sequence[Shot], pivot: Shot | None) -> Scene:
        """With pictures made earlier, all targets in ascending order, those of one level as was asked."""
        foci = list(self.record.settings.focus or ())
        targets = sorted(
            [*self.targets, *others],
            key=lambda shot: (shot.level or 0.0, foci.index(shot.focus) if shot.focus in foci else -1),
        )
        levels = dict.fromkeys(shot.level for shot in targets if shot.level is not None)
        settings = dataclasses.replace(self.record.settings, bokeh_targets=tuple(levels))
        record = dataclasses.replace(self.record, settings=settings)
        return dataclasses.replace(self, record=record, targets=tuple(targets), pivot=pivot or self.pivot)
