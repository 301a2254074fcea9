"""What is far behind the table: ten painters, each with crisp structure and countable points of light.

Detail is structure of three pixels or more (at 256), not grain, which costs an autoencoder and shows no blur.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .canvas import (
    POINT_PX,
    Canvas,
    Color,
    Dice,
    inside,
    mix,
    noise,
    per_cell,
    point_lights,
    ridge,
    scattered,
    smooth,
    splat,
)
from .spec import BACKGROUNDS

Backdrop = tuple[torch.Tensor, torch.Tensor]
"""HDR picture [B, 3, N, N], and the colour of the light it throws on the table [B, 3, 1, 1]."""

WARM: list[Color] = [(1, 0.60, 0.22), (1, 0.75, 0.40), (1, 0.48, 0.12), (1, 0.88, 0.70)]
NEON: list[Color] = [(1, 0.10, 0.05), (0.15, 0.9, 0.35), (0.2, 0.45, 1), (1, 0.25, 0.6), (0.85, 0.92, 1)]


def paint_backgrounds(canvas: Canvas, dice: Dice, kind: torch.Tensor) -> Backdrop:
    """Backgrounds `kind` [B], indices into BACKGROUNDS."""
    picture = torch.zeros(dice.batch, 3, canvas.n, canvas.n, device=canvas.device)
    light = torch.zeros(dice.batch, 3, 1, 1, device=canvas.device)
    for number, paint in enumerate(PAINTERS):
        index = (kind == number).nonzero()[:, 0]
        if len(index):
            picture[index], light[index] = paint(canvas, dice.of(len(index)))
    return picture, light


def _row(t: torch.Tensor) -> torch.Tensor:
    """[B, N, N] or [B, 1, 1] beside colours [B, 3, ...]."""
    return t[:, None]


def _gradient(
    canvas: Canvas, top: torch.Tensor, bottom: torch.Tensor, low: torch.Tensor | float
) -> torch.Tensor:
    """Vertical gradient [B, 3, N, N] from the top of the picture down to height `low`."""
    t = ((canvas.y + 1.1) / (torch.as_tensor(low, device=canvas.device) + 1.1)).clamp(0, 1)
    return mix(top, bottom, _row(t)).expand(-1, -1, -1, canvas.n)


def _stamps(
    canvas: Canvas, dice: Dice, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A turned grid with one jittered, rotated stamp per cell.

    Returns coordinates p, q [B, N, N] in the stamp's own axes (a cell is 1 wide), and two random numbers.
    """
    turn = dice.scalar(0, 2 * math.pi)
    u = (canvas.x * turn.cos() - canvas.y * turn.sin()) * scale + 30 + dice.scalar(0, 1)
    v = (canvas.x * turn.sin() + canvas.y * turn.cos()) * scale + 30 + dice.scalar(0, 1)
    jx, jy, angle, tone, luck = per_cell(dice, u.floor(), v.floor(), 5)
    du, dv = u % 1 - 0.5 + (jx - 0.5) * 0.2, v % 1 - 0.5 + (jy - 0.5) * 0.2
    angle = angle * (2 * math.pi)
    return du * angle.cos() - dv * angle.sin(), du * angle.sin() + dv * angle.cos(), tone, luck


def _leaves(
    canvas: Canvas, dice: Dice, back: list[Color], front: list[Color], lights: list[Color]
) -> torch.Tensor:
    """Layers of leaves from dark to sunlit, with sun sparkling through the upper half."""
    dark, bright = dice.color(back), dice.color(front)
    clump = noise(canvas, dice, 3, 3, 2)
    picture = dark.expand(-1, -1, canvas.n, canvas.n) * 0.5
    layers = 5
    for k in range(layers):
        scale = dice.scalar(5.2, 6.5) - 0.35 * k
        p, q, tone, luck = _stamps(canvas, dice, scale)
        distance = (0.17 * (1 - (p / 0.40) ** 2) - q.abs()) / scale * 0.9
        depth = (k + 0.3) / (layers - 0.5)
        leaf = mix(dark, bright, _row((depth * (0.45 + 0.75 * tone)).clamp(0, 1)))
        leaf = leaf * _row((0.55 + 0.9 * smooth(0.35, 0.65, clump)) * torch.where(q > 0, 0.72, 1.0))
        cover = inside(canvas, distance) * (luck < 0.9 - 0.09 * k)
        picture = mix(picture, leaf, _row(cover))
    px, py = scattered(dice, 18, -1.05, 0.25)
    return picture + point_lights(canvas, dice, px, py, lights, 5.5, 16)


def _city(canvas: Canvas, dice: Dice) -> Backdrop:
    x, y = canvas.x, canvas.y
    top = dice.color([(0.004, 0.006, 0.025), (0.010, 0.006, 0.030), (0.003, 0.010, 0.022)])
    glow = dice.color([(0.11, 0.05, 0.06), (0.05, 0.05, 0.12), (0.13, 0.07, 0.03)])
    picture = _gradient(canvas, top, glow, 0.3)
    for layer in range(2):
        blocks = dice.scalar(3.4, 4.6) + 1.2 * (1 - layer)
        u = (x + 1.3 + dice.scalar(0, 1)) * blocks
        skyline, hue = per_cell(dice, u.floor(), torch.zeros_like(u), 2)
        roof = 0.05 - (0.95 - 0.35 * layer) * skyline + 0.2 * layer
        wall = torch.minimum((0.5 - (u % 1 - 0.5).abs()) / blocks, y - roof)
        wall = inside(canvas, wall)
        tone = dice.color([(0.012, 0.014, 0.028), (0.020, 0.014, 0.022), (0.010, 0.018, 0.024)])
        picture = mix(picture, tone * (0.6 + 0.9 * _row(hue)) * (1 + 0.4 * (1 - layer)), _row(wall))
        # A whole number of window columns per block, so that no window straddles a corner.
        columns = 3.0
        wx, wy = u * columns, (y - roof) * dice.scalar(9, 11)
        lit, dim = per_cell(dice, wx.floor(), wy.floor().clamp(min=0), 2)
        fx, fy = (wx % 1 - 0.5).abs(), (wy % 1 - 0.5).abs()
        pane = inside(canvas, (0.27 - fx) / (blocks * columns)) * inside(canvas, (0.26 - fy) / 10)
        pane = pane * (lit < 0.38) * wall * (wy > 0.2)
        warm = dice.color([(1.0, 0.55, 0.18), (1.0, 0.70, 0.35), (0.75, 0.85, 1.0)])
        picture = picture + warm * _row(pane * (0.25 + 1.3 * dim**2))
    px, py = scattered(dice, 22, -0.35, 0.50)
    picture = picture + point_lights(canvas, dice, px, py, WARM + WARM + NEON, 4.5, 18)
    return picture, dice.color([(0.80, 0.78, 0.84), (0.88, 0.80, 0.74), (0.76, 0.80, 0.88)], 0.04)


def _foliage(canvas: Canvas, dice: Dice) -> Backdrop:
    back: list[Color] = [(0.012, 0.075, 0.016), (0.022, 0.085, 0.022)]
    front: list[Color] = [(0.19, 0.46, 0.03), (0.28, 0.50, 0.05), (0.10, 0.40, 0.06)]
    sparkle: list[Color] = [(1, 1, 0.70), (0.85, 1, 0.55), (1, 0.97, 0.85)]
    return _leaves(canvas, dice, back, front, sparkle), dice.color([(0.98, 1.0, 0.92)], 0.04)


def _autumn(canvas: Canvas, dice: Dice) -> Backdrop:
    back: list[Color] = [(0.13, 0.028, 0.008), (0.15, 0.045, 0.008)]
    front: list[Color] = [(0.92, 0.27, 0.012), (0.88, 0.42, 0.02), (0.80, 0.14, 0.012)]
    sparkle: list[Color] = [(1, 0.80, 0.40), (1, 0.90, 0.60), (1, 0.65, 0.25)]
    return _leaves(canvas, dice, back, front, sparkle), dice.color([(1.02, 0.96, 0.88)], 0.04)


def _brick(canvas: Canvas, dice: Dice) -> Backdrop:
    x, y = canvas.x, canvas.y
    scale = dice.scalar(2.6, 3.4)
    v = (y + 1.3) * scale * 2.0
    row = v.floor()
    u = (x + 1.3) * scale + 0.5 * (row % 2) + dice.scalar(0, 1)
    tone, hue = per_cell(dice, u.floor(), row, 2)
    across, down = (0.5 - (u % 1 - 0.5).abs()) / scale, (0.5 - (v % 1 - 0.5).abs()) / (2 * scale)
    brick = inside(canvas, torch.minimum(across, down) - 0.011)
    color = dice.color([(0.38, 0.085, 0.04), (0.46, 0.15, 0.07), (0.30, 0.06, 0.035), (0.44, 0.22, 0.12)])
    mortar = dice.color([(0.46, 0.42, 0.36), (0.60, 0.56, 0.50), (0.10, 0.085, 0.08)])
    warmth = torch.tensor((0.0, 1.0, 1.0), device=canvas.device).view(1, 3, 1, 1)
    lit = color * _row(0.45 + 1.0 * tone) * (1 + warmth * _row(0.5 * hue - 0.2))
    upper = smooth(0.25, 0.12, v % 1) - smooth(0.75, 0.88, v % 1)  # light from above catches the upper edges
    lit = lit * _row(1 + 0.22 * upper)
    picture = mix(mortar, lit, _row(brick))
    sun = ((x - dice.scalar(-1, 1)) ** 2 + (y - dice.scalar(-1.2, 0.0)) ** 2).sqrt()
    picture = picture * _row(0.45 + 0.95 * smooth(1.9, 0.1, sun))
    # Beads of light on the wall, as a shop or a cafe hangs them out.
    px, py = scattered(dice, 9, -1.0, 0.2)
    picture = picture + point_lights(canvas, dice, px, py, WARM, 6, 16)
    return picture, dice.color([(1.0, 0.97, 0.92), (1.02, 0.95, 0.85)], 0.04)


BINDINGS: list[Color] = [
    (0.42, 0.03, 0.03),
    (0.03, 0.09, 0.33),
    (0.03, 0.22, 0.09),
    (0.62, 0.44, 0.16),
    (0.72, 0.66, 0.54),
    (0.08, 0.07, 0.07),
    (0.50, 0.16, 0.04),
    (0.18, 0.04, 0.20),
    (0.04, 0.28, 0.30),
]


def _bookshelf(canvas: Canvas, dice: Dice) -> Backdrop:
    x, y = canvas.x, canvas.y
    height = dice.scalar(0.50, 0.64)
    v = (y + 1.3 + dice.scalar(0, 0.5)) / height
    shelf, down = v.floor(), v % 1
    rate = dice.scalar(5.6, 7.4)
    # Spines are pairs of cells divided at a random place, so that their widths vary.
    u = (x + 1.4 + 0.37 * shelf) * rate / 2
    pair = u.floor()
    (cut,) = per_cell(dice, pair, shelf, 1)
    cut = 0.35 + 0.3 * cut
    second = (u % 1 > cut).float()
    tone, tall, kind, band = per_cell(dice, pair * 2 + second, shelf, 4)
    side = torch.minimum(torch.minimum(u % 1, 1 - u % 1), (u % 1 - cut).abs()) / rate * 2
    top = 0.06 + 0.24 * tall
    spine = inside(canvas, torch.minimum(side - 0.004, torch.minimum(down - top, 0.88 - down) * height))
    palette = torch.tensor(BINDINGS, device=canvas.device)
    cloth = palette[(kind * len(BINDINGS)).long().clamp(max=len(BINDINGS) - 1)].permute(0, 3, 1, 2)
    cloth = cloth * _row(0.6 + 0.7 * tone) * _row(0.55 + 0.45 * smooth(0.0, 0.05, side))
    stripe = inside(canvas, (0.028 - (down - top - 0.13).abs()) * height) * (band > 0.35)
    stripe = stripe + inside(canvas, (0.028 - (down - 0.74).abs()) * height) * (band > 0.6)
    gold = torch.tensor((0.75, 0.50, 0.16), device=canvas.device).view(1, 3, 1, 1)
    cloth = mix(cloth, gold, _row(stripe.clamp(0, 1)))
    wood = dice.color([(0.24, 0.11, 0.045), (0.13, 0.06, 0.03), (0.38, 0.24, 0.12)])
    picture = mix(wood * 0.10, cloth, _row(spine))
    board = inside(canvas, torch.minimum(down - 0.89, 1.0 - down) * height)
    picture = mix(picture, wood * (1.25 - 1.2 * _row((down - 0.9).clamp(0, 0.1)) * 5), _row(board))
    lamp = ((x - dice.scalar(-0.9, 0.9)) ** 2 + (y + dice.scalar(0.1, 0.9)) ** 2).sqrt()
    picture = picture * _row(0.65 + 0.75 * smooth(1.6, 0.0, lamp)) * dice.color([(1.12, 0.98, 0.82)], 0.04)
    px, py = scattered(dice, 8, -0.95, 0.3)
    picture = picture + point_lights(canvas, dice, px, py, [(1, 0.78, 0.42), (1, 0.66, 0.28)], 5, 13)
    return picture, dice.color([(1.03, 0.95, 0.84)], 0.04)


MEADOWS: list[list[Color]] = [
    [(0.90, 0.04, 0.03), (0.95, 0.16, 0.04), (0.92, 0.90, 0.86)],
    [(0.45, 0.12, 0.75), (0.72, 0.38, 0.92), (0.95, 0.94, 0.98)],
    [(0.98, 0.66, 0.01), (0.98, 0.85, 0.10), (0.95, 0.95, 0.92)],
    [(0.95, 0.18, 0.42), (0.97, 0.48, 0.65), (0.95, 0.90, 0.92)],
]


def _meadow(canvas: Canvas, dice: Dice) -> Backdrop:
    x, y = canvas.x, canvas.y
    horizon = dice.scalar(-0.5, -0.2)
    sky = _gradient(
        canvas,
        dice.color([(0.10, 0.32, 0.80), (0.16, 0.40, 0.82)]),
        dice.color([(0.58, 0.78, 0.95), (0.72, 0.82, 0.92)]),
        horizon,
    )
    cloud = inside(canvas, (noise(canvas, dice, 3, 4, 3) - 0.56) * 0.22, 2.0)
    sky = mix(sky, torch.full_like(sky, 0.93), _row(cloud * 0.85))
    # Round trees stand along the horizon.
    for rate in (4.5, 7.0):
        u = x * rate + 30 + dice.scalar(0, 1)
        tall, tone = per_cell(dice, u.floor(), torch.zeros_like(u), 2)
        dome = (1 - ((u % 1 - 0.5) / 0.56) ** 2).clamp(min=0).sqrt()
        tree = dice.color([(0.025, 0.10, 0.03), (0.045, 0.13, 0.04)]) * _row(0.7 + 0.8 * tone)
        sky = mix(sky, tree, _row(inside(canvas, y - horizon + (0.06 + 0.14 * tall) * dome)))
    depth = ((y - horizon) / 1.1).clamp(0, 1)
    grass = mix(
        dice.color([(0.16, 0.38, 0.05), (0.22, 0.42, 0.06)]), dice.color([(0.03, 0.16, 0.02)]), _row(depth)
    )
    # Blades: slanted triangles in rows that grow towards the viewer.
    perspective = 1 / (0.16 + depth)
    v = 9 * torch.log(0.16 + depth) + 40
    row = v.floor()
    u = x * (3.6 + 2.4 * perspective) + 30
    u = torch.where(row % 2 == 0, u, u + 0.5)
    tone, lean = per_cell(dice, u.floor(), row, 2)
    blade = smooth(-0.08, 0.08, 0.32 * (v % 1) - (u % 1 - 0.5 - (lean - 0.5) * 0.6 * (1 - v % 1)).abs())
    grass = grass * _row(mix(torch.full_like(blade, 0.72), 0.85 + 0.6 * tone, blade))
    picture = mix(sky, grass, _row(inside(canvas, y - horizon)))
    n = 64
    t = (torch.arange(n, device=canvas.device) + dice.uniform(0, 1, n)) / n
    py = horizon[:, 0] + 0.05 + 0.85 * t**1.3
    px = dice.uniform(-1.1, 1.1, n)
    kinds = torch.tensor(MEADOWS, device=canvas.device)[dice.index(len(MEADOWS))]
    color = kinds.gather(1, dice.index(3, n)[..., None].expand(-1, -1, 3))
    size = 1.6 + 2.6 * t
    weight = splat(canvas, px, py, torch.cat([color, torch.ones_like(color[..., :1])], 2), size)
    petals = inside(canvas, (weight[:, 3] - 0.40) * 0.024)
    picture = mix(picture, weight[:, :3] / weight[:, 3:].clamp(min=1e-3), _row(petals))
    eye = splat(canvas, px, py, torch.ones_like(color[..., :1]), size * 0.4)[:, 0]
    picture = picture * (1 - 0.75 * _row(inside(canvas, (eye - 0.5) * 0.014)))
    px, py = scattered(dice, 12, -0.2, 0.4)
    picture = picture + point_lights(canvas, dice, px, py, [(1, 1, 0.85), (1, 0.96, 0.75)], 7, 15)
    return picture, dice.color([(1.04, 1.02, 0.96)], 0.04)


def _sunset(canvas: Canvas, dice: Dice) -> Backdrop:
    x, y = canvas.x, canvas.y
    horizon = dice.scalar(-0.05, 0.12)
    top = dice.color([(0.04, 0.05, 0.26), (0.10, 0.05, 0.26), (0.03, 0.11, 0.32)])
    middle = dice.color([(0.72, 0.15, 0.20), (0.78, 0.22, 0.10), (0.55, 0.16, 0.38)])
    low = dice.color([(1.15, 0.50, 0.10), (1.2, 0.62, 0.20)])
    t = ((y + 1.1) / (horizon + 1.1)).clamp(0, 1)
    picture = mix(mix(top, middle, _row((t * 1.7).clamp(0, 1))), low, _row((t * 1.8 - 0.8).clamp(0, 1)))
    bank = (noise(canvas, dice, 9, 3, 3) - 0.53) * 0.12  # long flat clouds, lit from below
    cover = inside(canvas, bank)
    picture = mix(picture, mix(middle * 0.45, low * 1.05, _row(smooth(0.028, 0.0, bank))), _row(cover * 0.9))
    sun_x, sun_y = dice.scalar(-0.7, 0.7), horizon - dice.scalar(0.10, 0.35)
    r = ((x - sun_x) ** 2 + (y - sun_y) ** 2).sqrt()
    sun = torch.tensor((1.0, 0.60, 0.20), device=canvas.device).view(1, 3, 1, 1)
    picture = picture + sun * _row(6 * inside(canvas, 0.10 - r) + 0.9 * torch.exp(-8 * r * r))
    for layer in range(3):
        crest = (
            horizon - 0.16 + 0.16 * layer - (0.30 - 0.06 * layer) * (ridge(canvas, dice, 2 + layer, 3) - 0.5)
        )
        if layer:  # pointed trees along the nearer crests
            teeth = x * dice.scalar(7, 9) * (2 - layer * 0.5) + 30
            (grow,) = per_cell(dice, teeth.floor(), torch.zeros_like(teeth), 1)
            crest = crest - (0.03 + 0.16 * grow) * (1 - 2 * (teeth % 1 - 0.5).abs()).clamp(min=0)
        far = (2 - layer) / 2
        ground = mix(
            dice.color([(0.022, 0.016, 0.035), (0.03, 0.022, 0.03)]), middle * 0.38, torch.as_tensor(far)
        )
        picture = mix(picture, ground, _row(inside(canvas, y - crest)))
    px, py = scattered(dice, 18, 0.02, 0.48)
    picture = picture + point_lights(canvas, dice, px, py, WARM, 4.5, 15)
    return picture, dice.color([(1.05, 0.90, 0.80), (1.02, 0.88, 0.84)], 0.03)


def _sea(canvas: Canvas, dice: Dice) -> Backdrop:
    x, y = canvas.x, canvas.y
    horizon = dice.scalar(-0.45, -0.15)
    haze = dice.color([(0.70, 0.86, 0.95), (0.86, 0.88, 0.86)], 0.05)
    picture = _gradient(canvas, dice.color([(0.08, 0.32, 0.80), (0.14, 0.42, 0.84)]), haze, horizon)
    cloud = inside(canvas, (noise(canvas, dice, 5, 3, 3) - 0.57) * 0.2, 2.0)
    picture = mix(picture, torch.full_like(picture, 0.94), _row(cloud * 0.85))
    depth = ((y - horizon) / 1.0).clamp(0, 1)
    deep = dice.color([(0.005, 0.10, 0.22), (0.008, 0.16, 0.25), (0.006, 0.07, 0.20)])
    sea = mix(haze * 0.40, deep, _row((depth * 3).clamp(0, 1)))
    # Wave crests: bright lenses in rows that widen towards the viewer.
    v = 8.5 * torch.log(0.10 + depth) + 40
    row = v.floor()
    u = x * (1.8 + 0.75 / (0.12 + depth)) + 30 + 0.5 * (row % 2)
    shift, tone, luck = per_cell(dice, u.floor(), row, 3)
    across, down = (u % 1 - 0.5) / 0.44, v % 1 - 0.5 + (shift - 0.5) * 0.3
    crest = smooth(0.0, 0.10, 0.20 * (1 - across**2) - down.abs()) * (luck < 0.75)
    sea = mix(sea, haze * 0.62, _row(crest * (0.25 + 0.6 * tone)))
    trough = smooth(0.0, 0.10, 0.16 * (1 - across**2) - (down - 0.3).abs()) * (luck < 0.75)
    sea = sea * _row(1 - 0.55 * trough)
    picture = mix(picture, sea, _row(inside(canvas, y - horizon)))
    # One or two sails on the horizon.
    for side in (-1.0, 1.0):
        sx, size = dice.scalar(0.35, 0.85) * side, dice.scalar(0.14, 0.26)
        sx = torch.where(dice.scalar(0, 1) < 0.65, sx, 9.0)
        up = (horizon + 0.04 - y) / size
        sail = torch.minimum(torch.minimum(up, (1 - up) * 0.42 - (x - sx) / size), (x - sx) / size + 0.02)
        jib = torch.minimum(torch.minimum(up, (0.8 - up) * 0.35 + (x - sx) / size), -(x - sx) / size - 0.05)
        hull = torch.minimum(0.09 - (up + 0.09).abs(), 0.42 - (x - sx).abs() / size - 0.6 * (up + 0.09).abs())
        picture = mix(
            picture, torch.full_like(picture, 0.92), _row(inside(canvas, torch.maximum(sail, jib) * size))
        )
        picture = mix(picture, torch.full_like(picture, 0.06), _row(inside(canvas, hull * size)))
    # The sun's path: glitter that widens towards the viewer.
    px, py = scattered(dice, 18, 0.0, 1.0, -1.0, 1.0)
    px, py = dice.uniform(-0.5, 0.5, 1) + px * (0.30 + 0.55 * py), horizon[:, 0] + 0.05 + 0.70 * py
    picture = picture + point_lights(
        canvas, dice, px, py, [(1, 0.96, 0.82), (1, 0.9, 0.66), (1, 1, 1)], 7, 17
    )
    return picture, dice.color([(1.02, 1.01, 0.98)], 0.03)


def _string_lights(canvas: Canvas, dice: Dice) -> Backdrop:
    x, y = canvas.x, canvas.y
    wall = dice.color([(0.10, 0.045, 0.02), (0.05, 0.045, 0.06), (0.11, 0.03, 0.03), (0.03, 0.055, 0.045)])
    planks = x * dice.scalar(4.2, 5.6) + 20
    tone, _ = per_cell(dice, planks.floor(), torch.zeros_like(planks), 2)
    gap = smooth(0.03, 0.08, 0.5 - (planks % 1 - 0.5).abs())
    picture = wall * _row((0.6 + 0.9 * tone) * (0.15 + 0.85 * gap) * (1.25 - 0.55 * (y + 1)).clamp(min=0.25))
    sets: list[list[Color]] = [
        [(1, 0.62, 0.22), (1, 0.66, 0.26), (1, 0.58, 0.2)],
        [(1, 0.78, 0.48), (1, 0.74, 0.42), (1, 0.8, 0.52)],
        [(1, 0.12, 0.06), (0.18, 0.95, 0.25), (0.25, 0.42, 1)],
        [(1, 0.3, 0.55), (1, 0.7, 0.28), (0.5, 0.5, 1)],
    ]
    tint = torch.tensor(sets, device=canvas.device)[dice.index(len(sets))]
    n = 10
    for wire in range(3):
        height, swing = dice.scalar(-0.98, -0.78) + 0.44 * wire, dice.scalar(0.05, 0.13)
        rate, phase = dice.scalar(1.8, 3.4), dice.scalar(0, 6.28)
        line = height + swing * torch.cos(rate * x + phase)
        picture = picture * (1 - 0.8 * _row(inside(canvas, 0.008 - (y - line).abs())))
        step = torch.arange(n, device=canvas.device) / (n - 1)
        px = -1.1 + 2.2 * step + dice.uniform(-0.05, 0.05, n)
        py = height[:, 0] + swing[:, 0] * torch.cos(rate[:, 0] * px + phase[:, 0]) + 0.03
        color = tint.gather(1, dice.index(3, n)[..., None].expand(-1, -1, 3))
        picture = picture + splat(canvas, px, py, color * dice.uniform(7.5, 15, n, 1), POINT_PX)
        picture = picture + splat(canvas, px, py, color * 0.10, 14.0) * wall * 8
    return picture, dice.color([(0.96, 0.86, 0.74), (0.92, 0.86, 0.82)], 0.04)


def _forest(canvas: Canvas, dice: Dice) -> Backdrop:
    x, y = canvas.x, canvas.y
    mist = dice.color([(0.50, 0.58, 0.58), (0.60, 0.60, 0.50), (0.42, 0.52, 0.60)])
    dark = dice.color([(0.020, 0.026, 0.018), (0.028, 0.022, 0.014), (0.014, 0.024, 0.024)])
    picture = _gradient(canvas, mist * 1.25, mist * 0.8, 0.4)
    for layer in range(3):
        near = (layer + 0.35) / 2.35
        tone = mix(mist * 0.72, dark, torch.as_tensor(near))
        # Firs: a trunk and a stack of drooping tiers, one to a cell.
        rate = 5.0 - 1.25 * layer
        u = x * rate + 30 + dice.scalar(0, 1)
        shift, tall, wide = per_cell(dice, u.floor(), torch.zeros_like(u), 3)
        across = (u % 1 - 0.5 + (shift - 0.5) * 0.35).abs() / rate
        crown = -1.25 + 0.95 * tall + 0.18 * (2 - layer)
        down = y - crown
        tiers = (down * (5.5 - 0.9 * layer)) % 1
        spread = (
            (0.28 + 0.12 * wide) / rate * (0.35 + 0.65 * (down / 1.5).clamp(0, 1)) * (0.35 + 0.85 * tiers)
        )
        foot = 0.10 + 0.10 * layer
        crown_part = torch.minimum(torch.minimum(spread - across, down), foot - y)
        trunk = torch.minimum(0.012 + 0.010 * layer - across, down)
        picture = mix(picture, tone, _row(inside(canvas, torch.maximum(crown_part, trunk))))
    # Undergrowth: ferns as a jagged band.
    for layer in range(2):
        teeth = x * (9 - 2.5 * layer) + 30 + dice.scalar(0, 1)
        (grow,) = per_cell(dice, teeth.floor(), torch.zeros_like(teeth), 1)
        crest = 0.24 + 0.16 * layer - (0.08 + 0.14 * grow) * (1 - 2 * (teeth % 1 - 0.5).abs())
        fern = mix(
            mist, dice.color([(0.07, 0.14, 0.03), (0.12, 0.10, 0.03)]), torch.as_tensor(0.6 + 0.35 * layer)
        )
        picture = mix(picture, fern * (0.6 + 0.5 * _row(grow)), _row(inside(canvas, y - crest)))
    px, py = scattered(dice, 14, -1.0, 0.2)
    picture = picture + point_lights(canvas, dice, px, py, [(1, 0.97, 0.82), (1, 1, 0.95)], 7, 15)
    return picture, dice.color([(0.97, 1.0, 0.98), (1.0, 0.98, 0.90)], 0.03)


PAINTERS: tuple[Callable[[Canvas, Dice], Backdrop], ...] = (
    _city,
    _foliage,
    _brick,
    _bookshelf,
    _meadow,
    _sunset,
    _sea,
    _string_lights,
    _forest,
    _autumn,
)
assert len(PAINTERS) == len(BACKGROUNDS)
