"""One HTML page that shows a sweep: slider, comparisons, blur curve, and a lens where the scene has its map.

`page.html` has the markup, `page.css` the look, `page.js` what it does, and `page_lens.js` what a lens makes
of the sharp picture: any level, focus and aperture, in layers, as `rendering` does but coarser. Pictures are
embedded as lossless WebP with their recipes, and the page needs no other file. Where that would make it too
large, it shows the files of the sweep, which lie in folders beside it. By its content security policy it
loads nothing else, and runs no script but its own.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard
from urllib.parse import quote

import numpy as np
import torch
from PIL import Image

from bokehflux.aperture import Aperture, parse_aperture
from bokehflux.lens import MAX_LEVEL
from bokehflux.metrics import sharpness
from bokehflux.pictures import metadata
from bokehflux.pictures.files import distinct, replace_file
from bokehflux.pictures.series import BlurMap, Scene, Shot
from bokehflux.rendering.lights import BRIGHTEST, restored
from bokehflux.rendering.photo import GAMMA

WIDTH, HEIGHT, PAD = 360, 200, 36
"""Size of the blur curve in SVG units, and the room for its axes."""

MAX_EMBEDDED_PIXELS = 10 << 20
"""Twenty scenes of nano, or ten pictures of 1024 px: below 40 MB unless they are noise, 4 bytes a pixel."""

SHAPES = ("disc", "polygon:6", "polygon:5", "donut:0.5", "anamorphic:2")
"""Apertures that a page with a lens offers, beside its sweep's own."""
SHAPE_PX, SHAPE_RIM = 64, 17 / 16
"""Side of an aperture's picture, and how far it goes in units of its circle's radius."""

MAX_HEAD = 64 << 10
"""Characters of a page in which its scenes are named."""


def write_page(scenes: Sequence[Scene], path: Path, names: Sequence[str] = ()) -> None:
    """Write the page, in place of an earlier one. Raises OSError; then the earlier one is whole.

    names: of the scenes' folders, which `scenes_of` reads from it.
    """
    replace_file(path, page(scenes, names).encode())


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
    shots = [shot for scene in scenes for shot in scene.shots]
    embeds = sum(math.prod(shot.image.size) for shot in shots) <= MAX_EMBEDDED_PIXELS
    names = names or [f"scene-{number}" for number in range(1, len(scenes) + 1)]
    data = [_scene(scene, name, embeds) for scene, name in zip(scenes, names, strict=True)]
    style, script = _source("page.css"), _source("page_lens.js") + _source("page.js")
    policy = {
        "default-src": "'none'",
        "img-src": "data:" if embeds else "'self' data:",
        "style-src": _hash(style),
        "script-src": _hash(script),
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    parts = {
        "POLICY": "; ".join(f"{kind} {source}" for kind, source in policy.items()),
        "SCENES": html.escape(" ".join(names)),
        "TITLE": html.escape(str(scenes[0].record.settings.title)[:80]),
        "SOURCE_TYPE": metadata.SOURCE_TYPE,
        "STYLE": style,
        "SCRIPT": script,
        "DATA": _json(data),
    }
    # In one pass: a prompt may itself contain a placeholder.
    return re.sub("@@([A-Z_]+)@@", lambda match: parts[match[1]], _source("page.html"))


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


def _scene(scene: Scene, name: str, embeds: bool) -> dict[str, Any]:
    stems = distinct([shot.stem for shot in scene.shots])
    labels = distinct([shot.label for shot in scene.shots])
    shown: list[dict[str, Any]] = []
    for shot, stem, label in zip(scene.shots, stems, labels, strict=True):
        linked = None if embeds else shot.file
        suffix = ".webp" if linked is None else PurePosixPath(linked).suffix
        shown.append(
            {
                "level": shot.level or 0.0,
                "label": label,
                "sharpness": round(measured_sharpness(shot.image), 3),
                "src": _data_uri(scene, shot) if linked is None else quote(linked),
                "file": f"{name}-{stem}{suffix}",
            }
        )
    pivot = shown.pop() if scene.pivot is not None else None
    shown.sort(key=lambda each: each["level"])
    points = [(each["level"], each["sharpness"]) for each in shown]
    return {
        "prompt": scene.record.settings.title,
        "footer": scene.footer(),
        "shots": shown,
        "pivot": pivot,
        "size": scene.targets[0].image.size,
        "curve": curve_svg(points, None if pivot is None else (pivot["level"], pivot["sharpness"])),
        "recipe": scene.record.recipe(),
        "lens": None
        if pivot is None or scene.blur_map is None
        else _lens(scene, scene.blur_map, pivot["src"]),
    }


def _lens(scene: Scene, blur_map: BlurMap, source: str) -> dict[str, Any]:
    """What the page needs to blur the scene's sharp picture. A page may not read the pixels of other files: a
    picture that lies in one is embedded small, with some loss."""
    assert scene.pivot is not None
    sharp, asked = scene.pivot.image.convert("RGB"), str(scene.record.settings.aperture)
    light = torch.from_numpy(np.array(sharp)).movedim(-1, 0)[None].float().div(255) ** GAMMA
    gain = (restored(light).sum(1) / light.sum(1).clamp(min=1e-6))[0]  # [H, W]
    gain = (1 + (gain - 1) * blur_map.glow).clamp(1, BRIGHTEST).log() / math.log(BRIGHTEST)
    shapes = {name: parse_aperture(name) for name in dict.fromkeys((asked, *SHAPES))}
    return {
        "sharp": source if source.startswith("data:") else _uri(sharp, "webp", quality=92),
        "map": _uri(blur_map.image),
        "lights": _uri(Image.fromarray((gain * 255).round().byte().numpy())) if gain.any() else None,
        "brightest": BRIGHTEST,
        "ends": blur_map.ends,
        "shapes": {name: _uri(_shape(shape)) for name, shape in shapes.items() if _is_drawn(shape)},
    }


def _is_drawn(shape: Aperture | Path) -> TypeGuard[Aperture]:
    """Whether it is one shape all over the picture, and needs no file."""
    return not isinstance(shape, Path) and shape.zones == 1


def _shape(shape: Aperture) -> Image.Image:
    """A shape, white where light passes, in the square around its circle and a rim of 1/16."""
    at = (torch.arange(SHAPE_PX) + 0.5) / SHAPE_PX * 2 - 1
    x, y, one = at * SHAPE_RIM, at[:, None] * SHAPE_RIM, torch.ones(())
    light = shape.spread(x, y, one, one / 16)
    return Image.fromarray((light * 255).round().byte().numpy())


def _uri(image: Image.Image, kind: str = "png", **how: int) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()


def _data_uri(scene: Scene, shot: Shot) -> str:
    data = metadata.encode(shot.image.convert("RGB"), scene.recipe_of(shot), "webp")
    return "data:image/webp;base64," + base64.b64encode(data).decode()


def _source(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """What a content security policy knows a style or script by."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _json(data: object) -> str:
    """JSON that cannot leave its script element, whatever a prompt says."""
    return json.dumps(data).replace("<", "\\u003c")
