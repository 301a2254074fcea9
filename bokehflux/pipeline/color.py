"""Lab colour transfer between 8-bit images: gives a re-rendered image the mean colour of its pivot.

Published results went through OpenCV's 8-bit Lab, whose rounding is visible in them. Its fixed-point
arithmetic is repeated here with tables, without OpenCV: all 2^24 colours come out equal, on any device.
8-bit Lab is (L * 255 / 100, a + 128, b + 128) of sRGB with white point D65. L = 116 f(Y) - 16,
a = 500 (f(X) - f(Y)), b = 200 (f(Y) - f(Z)); f(t) is the cube root, and a straight line below (6/29)^3.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_Ints = NDArray[np.int32]

# Binary digits after the point.
_MATRIX_BITS = 12
_F_BITS = 15  # f on the way to Lab
_UNIT_BITS = 14  # f and XYZ on the way back

# Largest value of linear light: on the way to Lab, and on the way back.
_LINEAR_MAX = 255 << 3
_INVERSE_SIZE = 1 << 12

_RGB_TO_XYZ = (
    (0.412453, 0.357580, 0.180423),
    (0.212671, 0.715160, 0.072169),
    (0.019334, 0.119193, 0.950227),
)
_XYZ_TO_RGB = (
    (3.240479, -1.53715, -0.498535),
    (-0.969256, 1.875991, 0.041556),
    (0.055648, -0.204043, 1.057311),
)
_WHITE = (0.950456, 1.0, 1.088754)


def match_lab_means(target: Tensor, pivot: Tensor) -> Tensor:
    """`target` shifted to the mean Lab colour of `pivot`; 8-bit RGB, [H,W,3] each, sizes may differ.

    Each Lab channel moves by the difference of the means, is clipped to 8 bits and truncated, as published
    for grounded Bokeh Diffusion. Raises ValueError unless both are 8-bit [H,W,3].
    """
    return shift_to_lab_mean(target, lab_mean(pivot))


def lab_mean(rgb: Tensor) -> Tensor:
    """Mean 8-bit Lab colour [3], float64 on the CPU, of 8-bit sRGB [H,W,3]: for several targets of one pivot.

    Raises ValueError unless `rgb` is 8-bit [H,W,3].
    """
    return _mean(rgb_to_lab8(rgb))


def shift_to_lab_mean(target: Tensor, mean: Tensor) -> Tensor:
    """`match_lab_means` to a mean that is known."""
    lab = rgb_to_lab8(target)
    # One difference, not "- mean + mean": equal means must be a shift of exactly zero, or truncation darkens.
    shifted = (torch.arange(256)[:, None] + (mean - _mean(lab))).clamp(0, 255).to(torch.uint8).to(lab.device)
    return lab8_to_rgb(torch.stack([shifted[:, i][lab[..., i].int()] for i in range(3)], dim=-1))


def rgb_to_lab8(rgb: Tensor) -> Tensor:
    """8-bit Lab of 8-bit sRGB, [H,W,3] -> [H,W,3]. Raises ValueError unless `rgb` is 8-bit [H,W,3]."""
    _check(rgb, "rgb")
    linear, f = _on(_to_lab_tables, rgb.device)
    channels = [linear[channel.int()] for channel in rgb.unbind(-1)]
    fx, fy, fz = (f[xyz] for xyz in _apply(_to_lab_tables().matrix, channels, _MATRIX_BITS))
    # 255 / 100 * (116 f - 16) and the offset 128; 296 is 295.8 rounded, as in OpenCV.
    lightness = 296 * fy - ((16 * 255 << _F_BITS) + 50) // 100
    a = 500 * (fx - fy) + (128 << _F_BITS)
    b = 200 * (fy - fz) + (128 << _F_BITS)
    lab = (_descale(channel, _F_BITS).clamp(0, 255) for channel in (lightness, a, b))
    return torch.stack([channel.to(torch.uint8) for channel in lab], dim=-1)


def lab8_to_rgb(lab: Tensor) -> Tensor:
    """8-bit sRGB of 8-bit Lab, [H,W,3] -> [H,W,3], clipped where sRGB lacks the colour.

    Raises ValueError unless `lab` is 8-bit [H,W,3].
    """
    _check(lab, "lab")
    tables = _from_lab_tables()
    luminance, f, f_a, f_b, cube, srgb = _on(_from_lab_tables, lab.device)
    lightness, a, b = (channel.int() for channel in lab.unbind(-1))
    fy = f[lightness]
    x = cube[fy + f_a[a] - tables.cube_start]
    z = cube[fy - f_b[b] - tables.cube_start]
    linear = _apply(tables.matrix, (x, luminance[lightness], z), _MATRIX_BITS + 2)
    return torch.stack([srgb[channel.clamp(0, _INVERSE_SIZE - 1)] for channel in linear], dim=-1)


def _mean(lab: Tensor) -> Tensor:
    return lab.sum(dim=(0, 1), dtype=torch.int64).cpu().double() / (lab.shape[0] * lab.shape[1])


class _ToLab(NamedTuple):
    linear: _Ints
    """8-bit sRGB -> linear light, 0 ... 2040."""
    f: _Ints
    """XYZ / white on the scale of linear light -> f."""
    matrix: _Ints
    """[3,3], linear light -> XYZ / white."""


class _FromLab(NamedTuple):
    y: _Ints
    """8-bit L -> Y."""
    f: _Ints
    """8-bit L -> f(Y)."""
    a: _Ints
    """8-bit a -> f(X) - f(Y)."""
    b: _Ints
    """8-bit b -> f(Y) - f(Z)."""
    cube: _Ints
    """f - cube_start -> X or Z."""
    srgb: NDArray[np.uint8]
    """Linear light, 0 ... 4095 -> 8-bit sRGB."""
    cube_start: int
    matrix: _Ints
    """[3,3], XYZ / white -> linear light."""


@cache
def _to_lab_tables() -> _ToLab:
    code = np.arange(256) / 255
    linear = np.where(code <= 0.04045, code / 12.92, ((code + 0.055) / 1.055) ** 2.4)
    matrix = _fixed(np.array(_RGB_TO_XYZ) / np.array(_WHITE)[:, None], 1 << _MATRIX_BITS)
    # A row's rounded coefficients can sum to slightly more than one.
    t = np.arange(_descale(matrix.sum(axis=1).max() * _LINEAR_MAX, _MATRIX_BITS) + 1) / _LINEAR_MAX
    f = np.where(t < 216 / 24389, t * (841 / 108) + 16 / 116, np.cbrt(t))
    # Single precision, as in OpenCV: there the entries 49 and 628 are ties.
    f = _fixed(f.astype(np.float32), 1 << _F_BITS)
    return _ToLab(linear=_fixed(linear, _LINEAR_MAX), matrix=matrix, f=f)


@cache
def _from_lab_tables() -> _FromLab:
    unit = 1 << _UNIT_BITS
    code = np.arange(256)
    lightness = code * 100 / 255
    fy = (lightness + 16) / 116
    f = _fixed(fy, unit)
    # a / 500 and b / 200 by multiplication, with OpenCV's rounding.
    a = ((code * 5 * 53687 + 128) >> 13) - 128 * unit // 500
    b = ((code * 41943 + 16) >> 9) - 128 * unit // 200 + 1

    cube_start = int(min(f.min() + a.min(), f.min() - b.max()))
    cube_end = int(max(f.max() + a.max(), f.max() - b.min()))
    v = np.arange(cube_start, cube_end + 1)
    # Whole-number steps: the straight part rounds towards zero, the cube drops its digits after each product.
    straight = np.trunc(v * 108 / 841) - unit * 16 // 116 * 108 // 841
    cube = np.where(v <= round(6 / 29 * unit), straight, ((v * v >> _UNIT_BITS) * v) >> _UNIT_BITS)

    linear = np.arange(_INVERSE_SIZE) / _INVERSE_SIZE
    srgb = np.where(linear <= 0.0031308, linear * 12.92, linear ** (1 / 2.4) * 1.055 - 0.055)
    return _FromLab(
        y=_fixed(np.where(lightness <= 8, lightness * 27 / 24389, fy**3), unit),
        f=f,
        a=a.astype(np.int32),
        b=b.astype(np.int32),
        cube=cube.astype(np.int32),
        cube_start=cube_start,
        matrix=_fixed(np.array(_XYZ_TO_RGB) * np.array(_WHITE), 1 << _MATRIX_BITS),
        srgb=_fixed(srgb, 255).astype(np.uint8),
    )


def _fixed(x: NDArray[Any], one: int) -> _Ints:
    return np.rint(x * one).astype(np.int32)


def _descale(x: Any, bits: int) -> Any:
    return (x + (1 << (bits - 1))) >> bits


def _apply(matrix: _Ints, channels: Any, bits: int) -> list[Tensor]:
    first, second, third = channels
    rows = matrix.tolist()
    return [_descale(row[0] * first + row[1] * second + row[2] * third, bits) for row in rows]


@cache
def _on(tables: Any, device: torch.device) -> tuple[Tensor, ...]:
    """The one-dimensional tables, in their order, on a device."""
    some = (table for table in tables() if isinstance(table, np.ndarray) and table.ndim == 1)
    return tuple(torch.from_numpy(table).to(device) for table in some)


def _check(image: Tensor, name: str) -> None:
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        kind = str(image.dtype).removeprefix("torch.")
        raise ValueError(f"{name} must be uint8 [H,W,3], got {kind} {tuple(image.shape)}; convert it first")
