"""Objects on the table: outline, surface normals and pattern of ten shapes, and how light falls on them.

Shapes come in three families: bodies of revolution given by a profile, outlines inflated like cushions from
their signed distance, and a cube. Objects are 1 high: X from their axis, Y from 0 (top) to 1 (base).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from .canvas import Canvas, Dice, mix, smooth
from .spec import COLORS, SHAPES

ALBEDO = {
    "red": (0.72, 0.012, 0.02),
    "orange": (0.95, 0.25, 0.005),
    "yellow": (0.95, 0.72, 0.01),
    "green": (0.03, 0.38, 0.05),
    "teal": (0.005, 0.42, 0.42),
    "blue": (0.01, 0.06, 0.62),
    "purple": (0.24, 0.025, 0.50),
    "pink": (0.95, 0.26, 0.48),
    "white": (0.88, 0.88, 0.88),
    "black": (0.018, 0.018, 0.02),
}
# What stripes and dots are painted with: far in lightness from the base, yet no other colour's hue.
PAINT = {name: (0.88, 0.88, 0.86) for name in COLORS} | {
    "yellow": (0.30, 0.17, 0.004),
    "white": (0.30, 0.30, 0.31),
    "black": (0.16, 0.16, 0.17),
}
STEM = (0.10, 0.05, 0.02)

# Profiles: (Y, half width) control points from the top to the base.
PROFILES = {
    "cone": ((0, 0.015), (0.97, 0.46), (1, 0.455)),
    "vase": (
        (0, 0.19),
        (0.04, 0.18),
        (0.2, 0.095),
        (0.32, 0.13),
        (0.5, 0.29),
        (0.62, 0.335),
        (0.78, 0.29),
        (1, 0.15),
    ),
    "bottle": (
        (0, 0.095),
        (0.07, 0.095),
        (0.08, 0.075),
        (0.28, 0.08),
        (0.36, 0.11),
        (0.47, 0.205),
        (1, 0.205),
    ),
    "mug": ((0, 0.35), (0.95, 0.34), (1, 0.32)),
}
# Softer than the backgrounds' edges: a subject with hard edges would drown the level in its own sharpness.
EDGE_PX = 1.6


class Surface(NamedTuple):
    """What shading needs of every pixel, each [b, N, N]."""

    alpha: torch.Tensor
    nx: torch.Tensor
    ny: torch.Tensor
    nz: torch.Tensor
    u: torch.Tensor
    """Pattern coordinate across, in object heights."""
    v: torch.Tensor
    """Pattern coordinate down."""
    inner: torch.Tensor
    """1 where the eye looks into the object (a mug's opening)."""
    stem: torch.Tensor
    """1 on wooden parts."""


class Placement(NamedTuple):
    """Where objects stand: centre x, base y and height in picture units, each [b, 1, 1]."""

    cx: torch.Tensor
    base: torch.Tensor
    height: torch.Tensor

    def select(self, index: torch.Tensor) -> Placement:
        return Placement(*(t[index] for t in self))


def paint_objects(
    canvas: Canvas,
    dice: Dice,
    place: Placement,
    shape: torch.Tensor,
    color: torch.Tensor,
    pattern: torch.Tensor,
    light: torch.Tensor,
    towards_light: torch.Tensor,
) -> torch.Tensor:
    """One object per scene, premultiplied linear colour and coverage: [B, 4, N, N].

    `shape`, `color`, `pattern`: long [B]; `light`: colour [B, 3, 1, 1]; `towards_light`: unit vectors [B, 3].
    """
    s = _surfaces(canvas, place, shape)
    albedo = _albedo(canvas, dice, s, color, pattern)
    lx, ly, lz = (towards_light[:, i].view(-1, 1, 1) for i in range(3))
    key = ((s.nx * lx + s.ny * ly + s.nz * lz + 0.3) / 1.3).clamp(min=0)
    half = torch.stack([lx, ly, lz + 1]) / torch.stack([lx, ly, lz + 1]).norm(dim=0)
    gloss = (s.nx * half[0] + s.ny * half[1] + s.nz * half[2]).clamp(min=0)
    sky = 0.20 - 0.10 * s.ny
    ground = 0.55 + 0.45 * smooth(1.05, 0.72, s.v)  # occlusion near the table
    diffuse = (0.82 * key + sky) * ground * (1 - 0.75 * s.inner)
    shine = (
        (0.42 * gloss**40 + 0.03 * gloss**6 + 0.10 * (1 - s.nz.clamp(0, 1)) ** 3)
        * (1 - s.inner)
        * (1 - s.stem)
    )
    rgb = (albedo * diffuse[:, None] + shine[:, None]) * light
    return torch.cat([rgb * s.alpha[:, None], s.alpha[:, None]], 1)


def _albedo(
    canvas: Canvas, dice: Dice, s: Surface, color: torch.Tensor, pattern: torch.Tensor
) -> torch.Tensor:
    def table(colors: dict[str, tuple[float, float, float]]) -> torch.Tensor:
        return torch.tensor([colors[name] for name in COLORS], device=canvas.device)[color].view(-1, 3, 1, 1)

    base = table(ALBEDO) * dice.uniform(0.92, 1.06, 1, 1, 1)
    rows = dice.scalar(4.6, 5.6)
    stripes = smooth(0.17, 0.33, ((s.v * rows) % 1 - 0.5).abs())
    cells = dice.scalar(4.4, 5.2)
    row = s.v * cells
    col = s.u * cells + 0.5 * (row.floor() % 2)
    dots = smooth(0.36, 0.20, ((col % 1 - 0.5) ** 2 + (row % 1 - 0.5) ** 2).sqrt())
    which = pattern.view(-1, 1, 1)
    painted = torch.where(which == 1, stripes, torch.where(which == 2, dots, torch.zeros_like(dots)))
    albedo = mix(base, table(PAINT), painted[:, None])
    return mix(albedo, torch.tensor(STEM, device=canvas.device).view(1, 3, 1, 1), s.stem[:, None])


def _surfaces(canvas: Canvas, place: Placement, shape: torch.Tensor) -> Surface:
    n = canvas.n
    out = torch.zeros(len(Surface._fields), shape.shape[0], n, n, device=canvas.device)
    families = (
        (tuple(PROFILES), _revolved),
        (tuple(_OUTLINES), _inflated),
        (("cube",), _cube),
    )
    for names, family in families:
        numbers = torch.tensor([SHAPES.index(name) for name in names], device=canvas.device)
        member = shape[:, None] == numbers
        index = member.any(1).nonzero()[:, 0]
        if not len(index):
            continue
        p = place.select(index)
        x, y = (canvas.x - p.cx) / p.height, (canvas.y - p.base) / p.height + 1
        pixel = canvas.px / p.height
        surface = family(x, y, pixel, member[index].long().argmax(1))
        out[:, index] = torch.stack([t.expand(len(index), n, n) for t in surface])
    return Surface(*out)


def _edge(distance: torch.Tensor, pixel: torch.Tensor) -> torch.Tensor:
    t = (distance / (2 * EDGE_PX * pixel) + 0.5).clamp(0, 1)
    return t * t * (3 - 2 * t)


@lru_cache(maxsize=1)
def _profile_table() -> torch.Tensor:
    """[profiles, 257] half widths, control points joined smoothly."""
    v = np.linspace(0, 1, 257)
    rows = []
    for points in PROFILES.values():
        width = np.interp(v, *np.array(points).T)
        padded = np.pad(width, 14, mode="edge")
        rows.append(np.convolve(padded, np.hanning(31)[1:-1] / np.hanning(31).sum(), mode="valid"))
    return torch.tensor(np.stack(rows), dtype=torch.float32)


def _revolved(x: torch.Tensor, y: torch.Tensor, pixel: torch.Tensor, which: torch.Tensor) -> Surface:
    table = _profile_table().to(x.device)[which]  # [b, 257]

    def half_width(v: torch.Tensor) -> torch.Tensor:
        at = v.clamp(0, 1) * 256
        low = at.floor().clamp(max=255)
        pick = low.long()[..., 0]
        a, b = table.gather(1, pick)[..., None], table.gather(1, pick + 1)[..., None]
        return mix(a, b, at - low)

    w = half_width(y)
    slope = ((half_width(y + 0.01) - half_width(y - 0.01)) / 0.02).clamp(-2.5, 2.5)
    t = (x / w).clamp(-0.999, 0.999)
    round_z = (1 - t * t).sqrt()
    bulge = 0.09 * w * round_z  # the rims are ellipses seen from slightly above
    alpha = _edge((w - x.abs()) * torch.rsqrt(1 + slope**2), pixel) * _edge(1 + bulge - y, pixel)
    is_cup = which.view(-1, 1, 1) != tuple(PROFILES).index("cone")
    flat = 0.16 * w  # half height of the opening, an ellipse; its value over its gradient is a distance
    rim = ((x / w) ** 2 + (y / flat) ** 2).sqrt().clamp(min=1e-3)
    steepness = ((x / w**2) ** 2 + (y / flat**2) ** 2).sqrt().clamp(min=1e-3) / rim
    mouth = _edge((1 - rim) / steepness, pixel) * is_cup
    alpha = torch.maximum(alpha * _edge(y, pixel), mouth)
    inner = smooth(0.86, 0.74, rim) * is_cup

    length = torch.rsqrt(1 + slope**2)
    nx, ny, nz = t * length, -slope * length, round_z * length

    # The mug's handle: half a torus on its right.
    hx, hy = x - 0.35, (y - 0.52) / 1.2
    ring = (hx**2 + hy**2).sqrt()
    tube = (ring - 0.19) / 0.055
    is_mug = (which == tuple(PROFILES).index("mug")).view(-1, 1, 1)
    handle = _edge((1 - tube.abs()) * 0.055, pixel) * is_mug * (x > 0.3)
    over = handle * (1 - alpha)
    tube = tube.clamp(-1, 1)
    nx = mix(nx, tube * hx / (ring + 1e-4), over)
    ny = mix(ny, tube * hy / (ring + 1e-4), over)
    nz = mix(nz, (1 - tube**2).clamp(min=0).sqrt(), over)
    u = torch.asin(t) * w
    zero = torch.zeros_like(alpha)
    return Surface(torch.maximum(alpha, handle), nx, ny, nz, u + zero, y - bulge, inner, zero)


def _cube(x: torch.Tensor, y: torch.Tensor, pixel: torch.Tensor, which: torch.Tensor) -> Surface:
    """A cube seen edge-on from above: a hexagon of three faces that meet at (0, 0.46)."""
    w, drop = 0.46, 0.23
    top_edge = y - drop * x.abs() / w  # distance below the upper rim, along y
    bottom_edge = 1 - drop * x.abs() / w - y
    alpha = _edge(torch.minimum(torch.minimum(top_edge, bottom_edge) * 0.9, w - x.abs()), pixel)
    top = _edge(2 * drop - drop * x.abs() / w - y, pixel)
    right = _edge(x, pixel) * (1 - top)
    left = 1 - top - right
    nx, ny, nz = 0.7 * (right - left), -0.9 * top + 0.05 * (1 - top), 0.7 * (right + left) + 0.43 * top
    # Each face carries its own coordinates: across and down on the sides, along two edges on the top.
    a, b = x / w + (y - drop) / drop, -x / w + (y - drop) / drop
    flat = top > 0.5
    u = torch.where(flat, a * 0.3, x) + 0.13
    v = torch.where(flat, b * 0.3 + 0.5, y + drop * x.abs() / w - 2 * drop)
    zero = torch.zeros_like(alpha)
    return Surface(alpha, nx, ny, nz, u + zero, v, zero, zero)


def _ball(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x**2 + (y - 0.5) ** 2).sqrt() - 0.5


def _smooth_min(a: torch.Tensor, b: torch.Tensor, k: float) -> torch.Tensor:
    h = (0.5 + 0.5 * (b - a) / k).clamp(0, 1)
    return mix(b, a, h) - k * h * (1 - h)


def _pear(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    lower = (x**2 + (y - 0.66) ** 2).sqrt() - 0.34
    upper = (x**2 + (y - 0.28) ** 2).sqrt() - 0.17
    return _smooth_min(lower, upper, 0.16)


def _star(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Distance to the line from a tip to the next valley, all ten half-arms folded onto one."""
    tip, valley = 0.56, 0.27
    cy = y - 0.545
    angle = torch.atan2(x, -cy)
    fifth = 2 * math.pi / 5
    folded = (angle - fifth * (angle / fifth).round()).abs()
    r = (x**2 + cy**2).sqrt()
    ax, ay = r * folded.cos() - tip, r * folded.sin()
    bx, by = valley * math.cos(fifth / 2) - tip, valley * math.sin(fifth / 2)
    return (ax * by - ay * bx) / math.hypot(bx, by)


def _heart(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Two tapered capsules from the tip up to each lobe, blended along the middle."""
    cx, cy, r1, r2 = 0.25, 0.275, 0.275, 0.03
    ty = 1 - r2
    length = math.hypot(cx, ty - cy)
    b = (r1 - r2) / length
    a = math.sqrt(1 - b * b)

    def lobe(side: float) -> torch.Tensor:
        dx, dy = x * side - cx, y - cy
        ux, uy = -cx / length, (ty - cy) / length
        along, across = dx * ux + dy * uy, (dx * uy - dy * ux).abs()
        k = -b * across + a * along
        near = (across**2 + along**2).sqrt() - r1
        far = (across**2 + (along - length) ** 2).sqrt() - r2
        return torch.where(k < 0, near, torch.where(k > a * length, far, a * across + b * along - r1))

    return _smooth_min(lobe(1.0), lobe(-1.0), 0.10)


def _donut(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return ((x**2 + (y - 0.5) ** 2).sqrt() - 0.31).abs() - 0.19


# Outline, depth over which it is rounded off, and height of the rounding relative to that depth.
_OUTLINES = {
    "ball": (_ball, 0.5, 1.0),
    "pear": (_pear, 0.32, 1.0),
    "star": (_star, 0.2, 0.8),
    "heart": (_heart, 0.2, 0.9),
    "donut": (_donut, 0.19, 1.0),
}


def _inflated(x: torch.Tensor, y: torch.Tensor, pixel: torch.Tensor, which: torch.Tensor) -> Surface:
    distance = torch.zeros_like(x + y)
    depth, swell = torch.ones_like(pixel), torch.ones_like(pixel)
    for i, (outline, d, s) in enumerate(_OUTLINES.values()):
        mine = (which == i).view(-1, 1, 1)
        index = (which == i).nonzero()[:, 0]
        distance[index] = outline(x[index], y[index])
        depth, swell = torch.where(mine, d, depth), torch.where(mine, s, swell)
    t = 1 - (-distance / depth).clamp(0, 1)
    height = (1 - t * t).clamp(min=1e-4).sqrt() * depth * swell
    # Distance has creases where two sides are equally near; averaging twice rounds them off.
    width = 2 * round(x.shape[-1] / 60) + 1
    for _ in range(2):
        height = F.avg_pool2d(height[:, None], width, stride=1, padding=width // 2)[:, 0]
    gx = F.pad(height[:, :, 2:] - height[:, :, :-2], (1, 1)) / (2 * pixel)
    gy = F.pad(height[:, 2:] - height[:, :-2], (0, 0, 1, 1)) / (2 * pixel)
    gx, gy = gx.clamp(-2.5, 2.5), gy.clamp(-2.5, 2.5)
    length = torch.rsqrt(gx**2 + gy**2 + 1)
    along = (y + 0.05).clamp(0, 0.18) - 0.05  # pear's stem: a short capsule, leaning right
    stem_distance = 0.028 - ((x - 0.035 * (0.13 - along) / 0.18) ** 2 + (y - along) ** 2).sqrt()
    is_pear = (which == tuple(_OUTLINES).index("pear")).view(-1, 1, 1)
    stem = _edge(stem_distance, pixel) * is_pear
    body = _edge(-distance, pixel)
    stem = stem * smooth(-0.02, 0.0, distance)
    alpha = torch.maximum(body, stem)
    zero = torch.zeros_like(alpha)
    return Surface(alpha, -gx * length, -gy * length, length, x + zero + 0.11, y + zero, zero, stem)
