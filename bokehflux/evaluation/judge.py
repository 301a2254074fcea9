"""Judging the scenes of a folder: a table by prompt, a plot, and JSON with all of it."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from bokehflux.evaluation.folder import Found
from bokehflux.evaluation.renderer import Renderer, regions
from bokehflux.evaluation.scores import METRICS, Perceptual, Scores, mean, score
from bokehflux.pictures import plot

PICTURES, TRUTH = "pictures", "truth"
"""Names of what is judged, and of the true pictures beside it; the renderer's are its own."""
NAME_WIDTH = 36


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was found on one scene: on its pictures, and on the yardsticks beside them."""

    found: Found
    sources: dict[str, Scores]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was found on all scenes."""

    verdicts: list[Verdict]

    @property
    def sources(self) -> list[str]:
        """The pictures, then the yardsticks, of which the last is what the pictures are measured by."""
        return list(dict.fromkeys(name for verdict in self.verdicts for name in verdict.sources))

    def means(self) -> dict[str, dict[str, float]]:
        """Mean figures over the scenes, by source."""
        return {
            name: mean([v.sources[name].figures for v in self.verdicts if name in v.sources])
            for name in self.sources
        }

    def shortfalls(self) -> dict[str, float]:
        """How far the pictures' means fall short of the last yardstick's, 0 at best; empty without any.

        Over the scenes that have both values.
        """
        last = self.sources[-1]
        if last == PICTURES:
            return {}
        both = [
            (v.sources[PICTURES].figures, v.sources[last].figures) for v in self.verdicts if last in v.sources
        ]
        shown = mean([{name: ours[name] for name in ours.keys() & own} for ours, own in both])
        truth = mean([{name: own[name] for name in ours.keys() & own} for ours, own in both])
        return {name: METRICS[name].shortfall(value, truth[name]) for name, value in shown.items()}

    def lines(self) -> Iterator[str]:
        """The table and what its columns mean."""
        means, short = self.means(), self.shortfalls()
        columns = [name for name in METRICS if any(name in figures for figures in means.values())]

        def row(name: str, figures: Mapping[str, float]) -> str:
            cells = [f"{figures[c]:.3f}" if c in figures else "-" for c in columns]
            widths = [max(8, len(METRICS[c].heading)) + 2 for c in columns]
            cut = name if len(name) <= NAME_WIDTH else name[: NAME_WIDTH - 3] + "..."
            return f"{cut:<{NAME_WIDTH}}" + "".join(
                f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)
            )

        for levels, count in Counter(verdict.found.levels for verdict in self.verdicts).items():
            grid = ", ".join(f"{level:g}" for level in levels)
            yield f"{count} {'scene' if count == 1 else 'scenes'} at levels {grid}"
        headings = "".join(f"{METRICS[c].heading:>{max(8, len(METRICS[c].heading)) + 2}}" for c in columns)
        yield f"{'scene':<{NAME_WIDTH}}{headings}"
        for number, verdict in enumerate(self.verdicts, 1):
            yield row(f"{number} {verdict.found.name}", verdict.sources[PICTURES].figures)
        for name, figures in means.items():
            yield row(f"mean, {name}", figures)
        if short:
            yield row("pictures fall short of the last by", short)
        for name in columns:
            yield f"{METRICS[name].heading}: {METRICS[name].about}"

    def json(self) -> dict[str, Any]:
        """Everything; NaN is null."""
        scenes = [
            {
                "scene": verdict.found.name,
                "prompt": verdict.found.prompt,
                "model": verdict.found.model,
                "levels": verdict.found.levels,
                "pivot_level": None if verdict.found.pivot is None else verdict.found.pivot.level,
                "files": [str(picture.path) for picture in verdict.found.pictures],
                "sources": {name: dataclasses.asdict(scores) for name, scores in verdict.sources.items()},
            }
            for verdict in self.verdicts
        ]
        about = {name: metric.about for name, metric in METRICS.items()}
        mean_of_all = {"mean": self.means(), "shortfall": self.shortfalls()}
        return _without_nan({"metrics": about, **mean_of_all, "scenes": scenes})

    def plot(self) -> Image.Image:
        """Sharpness and blur over the level, means over the scenes of the most frequent grid."""
        (levels, _), *_ = Counter(verdict.found.levels for verdict in self.verdicts).most_common(1)
        alike = [verdict for verdict in self.verdicts if verdict.found.levels == levels]
        panels = []
        for curve, title in (
            ("sharpness", "sharpness: log variance of the Laplacian"),
            ("radius_px", "radius of the blur behind the subject [px]"),
        ):
            lines = {}
            for name in self.sources:
                curves = [v.sources[name].curves[curve] for v in alike if name in v.sources]
                points = [
                    (level, sum(known) / len(known))
                    for i, level in enumerate(levels)
                    if (known := [each[i] for each in curves if not math.isnan(each[i])])
                ]
                if len(points) > 1:
                    lines[name] = points
            if lines:
                panels.append(plot.lines(lines, title=title, x="bokeh level", size=(480, 420)))
        return plot.joined(panels, "right")


def judge(
    scenes: Sequence[Found],
    perceptual: Perceptual | None = None,
    on_scene: Callable[[int], None] = lambda done: None,
) -> Report:
    """Read and judge every scene. Raises ValueError for pictures that cannot be read or compared."""
    renderer, verdicts = Renderer(), []
    for done, found in enumerate(scenes):
        on_scene(done)
        shots = found.read()
        yardsticks = {}
        if shots.is_truth:
            assert shots.reference is not None
            yardsticks[TRUTH] = dataclasses.replace(shots, images=shots.reference)
        elif found.prompt is not None and found.pivot is not None:
            size = (shots.images.shape[-2], shots.images.shape[-1])
            known = renderer.yardsticks(found.model, found.prompt, found.levels, found.pivot.level, size)
            if known is not None:
                reference, yardsticks = known
                subject, behind = regions(size[0])
                shots = dataclasses.replace(shots, reference=reference, subject=subject, behind=behind)
        sources = {PICTURES: shots, **yardsticks}
        verdicts.append(
            Verdict(found=found, sources={name: score(one, perceptual) for name, one in sources.items()})
        )
    return Report(verdicts=verdicts)


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value
