"""Where and with what scenes are painted: coordinates, reproducible chance, and a few batched brushes.

B scenes, N = size + 2 pad pixels a side. The picture spans -1 ... 1 (x to the right, y down); the padding
beyond it feeds the blur. Colours are linear light.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

Color = tuple[float, float, float]

POINT_PX = 1.2
"""Standard deviation of a point of light, in pixels at 256: small, yet no spike to an autoencoder."""


class Canvas:
    """Pixel grid of one batch: `x` [1, 1, N], `y` [1, N, 1] in picture units, `px` the size of a pixel."""

    def __init__(self, size_px: int, device: torch.device) -> None:
        self.size_px = size_px
        self.device = device
        self.pad = math.ceil(size_px / 16)
        self.n = size_px + 2 * self.pad
        centre = (torch.arange(self.n, device=device) + 0.5 - self.pad) / size_px * 2 - 1
        self.x = centre.view(1, 1, -1)
        self.y = centre.view(1, -1, 1)
        self.px = 2.0 / size_px


class Dice:
    """Random numbers for a batch: drawn where the generator lives, delivered where the picture is painted."""

    def __init__(self, generator: torch.Generator, device: torch.device, batch: int) -> None:
        self.generator = generator
        self.device = device
        self.batch = batch

    def of(self, batch: int) -> Dice:
        return Dice(self.generator, self.device, batch)

    def uniform(self, low: float, high: float, *shape: int) -> torch.Tensor:
        """[B, *shape] in low ... high."""
        r = torch.rand(self.batch, *shape, generator=self.generator, device=self.generator.device)
        return r.to(self.device) * (high - low) + low

    def scalar(self, low: float, high: float) -> torch.Tensor:
        """[B, 1, 1] in low ... high."""
        return self.uniform(low, high, 1, 1)

    def index(self, count: int, *shape: int) -> torch.Tensor:
        """long [B, *shape] in 0 ... count - 1."""
        g = self.generator
        return torch.randint(count, (self.batch, *shape), generator=g, device=g.device).to(self.device)

    def color(self, choices: list[Color], spread: float = 0.12) -> torch.Tensor:
        """[B, 3, 1, 1]: one of the choices for each scene, each channel varied by +- spread."""
        picked = torch.tensor(choices, device=self.device)[self.index(len(choices))].view(-1, 3, 1, 1)
        return picked * self.uniform(1 - spread, 1 + spread, 3, 1, 1)


def mix(a: torch.Tensor, b: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return a + (b - a) * t


def smooth(low: float, high: float, x: torch.Tensor) -> torch.Tensor:
    """Smoothstep from 0 at `low` to 1 at `high`; `low` may exceed `high`."""
    t = ((x - low) / (high - low)).clamp(0, 1)
    return t * t * (3 - 2 * t)


def inside(canvas: Canvas, distance: torch.Tensor, soft_px: float = 1.0) -> torch.Tensor:
    """Antialiased coverage of a region, from the distance to its border in picture units (inside > 0)."""
    w = soft_px * canvas.px
    return smooth(-w, w, distance)


def noise(canvas: Canvas, dice: Dice, rows: float, cols: float, octaves: int = 2) -> torch.Tensor:
    """Smooth value noise [B, N, N] around 0.5 with about rows x cols features in its first octave."""
    total = torch.zeros((), device=canvas.device)
    weight = 0.0
    for o in range(octaves):
        grid = dice.uniform(0, 1, 1, max(2, round(rows * 2**o)) + 1, max(2, round(cols * 2**o)) + 1)
        full = F.interpolate(grid, (canvas.n, canvas.n), mode="bicubic", align_corners=True)[:, 0]
        total = total + full * 0.5**o
        weight += 0.5**o
    return total / weight


def ridge(canvas: Canvas, dice: Dice, features: int, octaves: int) -> torch.Tensor:
    """Piecewise-linear skyline noise [B, 1, N] in 0 ... 1."""
    total = torch.zeros((), device=canvas.device)
    for o in range(octaves):
        grid = dice.uniform(0, 1, 1, features * 2**o + 1)
        total = total + F.interpolate(grid, canvas.n, mode="linear", align_corners=True) * 0.5**o
    return total / (2 - 0.5 ** (octaves - 1))


def per_cell(dice: Dice, col: torch.Tensor, row: torch.Tensor, channels: int) -> torch.Tensor:
    """Random numbers [channels, B, N, N] in 0 ... 1, constant on integer cells (col, row), both [B, N, N]."""
    side = 64
    table = dice.uniform(0, 1, channels, side * side)
    col, row = torch.broadcast_tensors(col, row)
    index = (row.long() % side * side + col.long() % side).flatten(1)
    picked = table.gather(2, index[:, None].expand(-1, channels, -1))
    return picked.view(dice.batch, channels, *col.shape[1:]).transpose(0, 1)


def splat(
    canvas: Canvas, px: torch.Tensor, py: torch.Tensor, color: torch.Tensor, sigma_px: torch.Tensor | float
) -> torch.Tensor:
    """Sum of Gaussian dots [B, C, N, N]: centres px, py [B, n], peaks [B, n, C], widths in pixels at 256.

    A Gaussian is separable, so the sum is one batched matrix product: no scatter, hence deterministic.
    """
    ideal = torch.as_tensor(sigma_px, device=canvas.device) * canvas.size_px / 256
    sigma_px = ideal.clamp(min=0.6)  # narrower dots would depend on where they fall between pixels
    sigma = (sigma_px * canvas.px).expand(px.shape)[..., None]
    energy = ((ideal / sigma_px) ** 2).expand(px.shape)[..., None]
    gx = torch.exp(-((canvas.x - px[..., None]) ** 2) / (2 * sigma**2))  # [B, n, N]
    gy = torch.exp(-((canvas.y.transpose(1, 2) - py[..., None]) ** 2) / (2 * sigma**2))
    rows = torch.einsum("bnc,bny->bcyn", color * energy, gy).flatten(1, 2)
    return (rows @ gx).view(px.shape[0], color.shape[-1], canvas.n, canvas.n)


def point_lights(
    canvas: Canvas,
    dice: Dice,
    px: torch.Tensor,
    py: torch.Tensor,
    colors: list[Color],
    low: float,
    high: float,
) -> torch.Tensor:
    """HDR points [B, 3, N, N] at px, py [B, n], log-uniform in `low` ... `high` at their peak.

    A point of peak p is a disc of brightness about p / 60 at the largest blur: 5 ... 18 reads as bokeh, and
    loses little light to clipping when it is sharp.
    """
    n = px.shape[1]
    tint = torch.tensor(colors, device=canvas.device)[dice.index(len(colors), n)]
    peak = low * (high / low) ** dice.uniform(0, 1, n, 1)
    return splat(canvas, px, py, tint * peak, POINT_PX)


def scattered(
    dice: Dice, n: int, top: float, bottom: float, left: float = -1.1, right: float = 1.1
) -> tuple[torch.Tensor, torch.Tensor]:
    """n points [B, n], [B, n] without clumps: one to a cell of a shuffled grid, so discs stay countable."""
    cols = max(1, round(math.sqrt(n * (right - left) / max(bottom - top, 1e-3))))
    rows = math.ceil(n / cols)
    order = dice.uniform(0, 1, rows * cols).argsort(1)[:, :n]
    jx, jy = dice.uniform(0.1, 0.9, n), dice.uniform(0.1, 0.9, n)
    px = left + (order % cols + jx) / cols * (right - left)
    py = top + (order // cols + jy) / rows * (bottom - top)
    return px, py
