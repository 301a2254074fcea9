"""One HTML file that shows a sweep: slider, pivot, difference, blur curve. It needs no other file.

Pictures are embedded as lossless WebP, so the difference view shows differences of the pictures themselves.
The page forbids itself, by its content security policy, to load anything.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bokehflux.lens import MAX_LEVEL
from bokehflux.metrics import sharpness
from bokehflux.pictures.files import replace_file
from bokehflux.pictures.metadata import SOURCE_TYPE
from bokehflux.pictures.page_template import TEMPLATE
from bokehflux.pictures.series import Scene

WIDTH, HEIGHT, PAD = 360, 200, 36
"""Size of the blur curve in SVG units, and the room for its axes."""

MAX_HEAD = 64 << 10
"""Characters of a page in which its scenes are named."""


def write_page(scenes: Sequence[Scene], path: Path, names: Sequence[str] = ()) -> None:
    """Write the page, in place of an earlier one. Raises OSError; then the earlier one is whole.

    names: of the scenes' folders, which `scenes_of` reads from it.
    """
    replace_file(path, page(scenes, names).encode("utf-8"))


def scenes_of(path: Path) -> set[str] | None:
    """Names of the scenes' folders of a page; None for a file that no sweep has written."""
    try:
        with path.open(encoding="utf-8") as file:
            found = re.search('<meta name="bokehflux-scenes" content="([^"]*)">', file.read(MAX_HEAD))
    except (OSError, ValueError):
        return None
    return None if found is None else set(found[1].split())


def page(scenes: Sequence[Scene], names: Sequence[str] = ()) -> str:
    """The page as text, for one or more scenes of at least one target each."""
    parts = {
        "SCENES": html.escape(" ".join(names)),
        "TITLE": html.escape(str(scenes[0].record.settings.prompt)[:80]),
        "SOURCE_TYPE": SOURCE_TYPE,
        "DATA": _json([_scene(scene) for scene in scenes]),
    }
    # In one pass: a prompt may itself contain a placeholder.
    return re.sub("@@([A-Z_]+)@@", lambda match: parts[match[1]], TEMPLATE)


def measured_sharpness(image: Image.Image) -> float:
    """`metrics.sharpness` of one picture: log variance of its Laplacian."""
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).movedim(-1, 0)[None] / 255
    return float(sharpness(pixels))


def curve_svg(points: Sequence[tuple[float, float]], pivot: tuple[float, float] | None) -> str:
    """Level against sharpness, levels ascending, as SVG; dot i has class "dot" and data-index i."""
    levels, values = zip(*points, *([pivot] if pivot else []), strict=True)
    low, high = min(values), max(values)
    margin = max(0.1 * (high - low), 0.5)  # a flat curve must look flat
    low, high = math.floor(low - margin), math.ceil(high + margin)  # what the axis says is where it ends
    right = max(MAX_LEVEL, *levels)

    def place(level: float, value: float) -> tuple[float, float]:
        x = PAD + level / right * (WIDTH - PAD - 12)
        y = HEIGHT - PAD - (value - low) / (high - low) * (HEIGHT - PAD - 12)
        return round(x, 1), round(y, 1)

    places = [place(*point) for point in points]
    line = " ".join(f"{x},{y}" for x, y in places)
    dots = "".join(
        f'<circle class="dot" data-index="{i}" cx="{x}" cy="{y}" r="4">'
        f"<title>level {level:g}: sharpness {value:.2f}</title></circle>"
        for i, ((x, y), (level, value)) in enumerate(zip(places, points, strict=True))
    )
    mark = ""
    if pivot:
        x, y = place(*pivot)
        mark = (
            f'<rect class="pivot" x="{x - 5}" y="{y - 5}" width="10" height="10"><title>pivot</title></rect>'
        )
    ticks = "".join(
        f'<text x="{place(level, low)[0]}" y="{HEIGHT - PAD + 16}" text-anchor="middle">{level}</text>'
        for level in range(0, 31, 10)
    )
    base = HEIGHT - PAD
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Sharpness at every bokeh level">'
        f'<path class="axis" d="M{PAD} 8V{base}H{WIDTH - 8}"/>{ticks}'
        f'<text x="{WIDTH - 8}" y="{HEIGHT - 4}" text-anchor="end">bokeh level</text>'
        f'<text text-anchor="middle" transform="translate(10 {base // 2}) rotate(-90)">sharpness</text>'
        f'<text x="{PAD - 4}" y="16" text-anchor="end">{high}</text>'
        f'<text x="{PAD - 4}" y="{base}" text-anchor="end">{low}</text>'
        f'<polyline class="curve" points="{line}"/>{mark}{dots}</svg>'
    )


def _scene(scene: Scene) -> dict[str, Any]:
    points = [(shot.level or 0.0, measured_sharpness(shot.image)) for shot in scene.targets]
    pivot = None
    if scene.pivot is not None and scene.pivot.level is not None:
        pivot = (scene.pivot.level, measured_sharpness(scene.pivot.image))
    return {
        "prompt": scene.record.settings.prompt,
        "footer": scene.footer(),
        "levels": [level for level, _ in points],
        "sharpness": [round(value, 3) for _, value in points],
        "images": [_data_uri(shot.image) for shot in scene.targets],
        "size": scene.targets[0].image.size,
        "pivot": None if scene.pivot is None else _data_uri(scene.pivot.image),
        "pivot_level": None if scene.pivot is None else scene.pivot.level,
        "pivot_sharpness": None if pivot is None else round(pivot[1], 3),
        "curve": curve_svg(points, pivot),
        "recipe": scene.record.recipe(),
    }


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "WEBP", lossless=True)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _json(data: object) -> str:
    """JSON that cannot leave its script element, whatever a prompt says."""
    return json.dumps(data).replace("<", "\\u003c")
