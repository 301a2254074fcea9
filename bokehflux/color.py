"""Lab colour transfer between 8-bit images: gives a re-rendered image the mean colour of its pivot.

Published results went through OpenCV's 8-bit Lab, whose rounding is visible in them. Its fixed-point
arithmetic is repeated here with tables, without OpenCV, so that all 2^24 colours come out equal. 8-bit Lab is
(L * 255 / 100, a + 128, b + 128) of sRGB with white point D65. L = 116 f(Y) - 16, a = 500 (f(X) - f(Y)),
b = 200 (f(Y) - f(Z)); f(t) is the cube root, and a straight line below (6/29)^3.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_Bytes = NDArray[np.uint8]
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


def match_lab_means(target: _Bytes, pivot: _Bytes) -> _Bytes:
    """`target` shifted to the mean Lab colour of `pivot`; 8-bit RGB, [H,W,3] each, sizes may differ.

    Each Lab channel moves by the difference of the means, is clipped to 8 bits and truncated, as published
    for grounded Bokeh Diffusion. Raises ValueError unless both are 8-bit [H,W,3].
    """
    return shift_to_lab_mean(target, lab_mean(pivot))


def lab_mean(rgb: _Bytes) -> NDArray[np.float64]:
    """Mean 8-bit Lab colour [3] of 8-bit sRGB [H,W,3]; for several targets of one pivot. Errors as above."""
    return _mean(rgb_to_lab8(rgb))


def shift_to_lab_mean(target: _Bytes, mean: NDArray[np.float64]) -> _Bytes:
    """`match_lab_means` to a mean that is known."""
    lab = rgb_to_lab8(target)
    # One difference, not "- mean + mean": equal means must be a shift of exactly zero, or truncation darkens.
    shifted = (np.arange(256)[:, None] + (mean - _mean(lab))).clip(0, 255).astype(np.uint8)
    return lab8_to_rgb(np.stack([shifted[:, i].take(lab[..., i]) for i in range(3)], axis=-1))


def _mean(lab: _Bytes) -> NDArray[np.float64]:
    return np.array([channel.sum(dtype=np.int64) / channel.size for channel in np.moveaxis(lab, -1, 0)])


def rgb_to_lab8(rgb: _Bytes) -> _Bytes:
    """8-bit Lab of 8-bit sRGB, [H,W,3] -> [H,W,3]. Raises ValueError unless `rgb` is 8-bit [H,W,3]."""
    tables = _to_lab_tables()
    linear = tables.linear[_checked(rgb, "rgb")]
    fx, fy, fz = (tables.f[xyz] for xyz in _apply(tables.matrix, np.moveaxis(linear, -1, 0), _MATRIX_BITS))
    # 255 / 100 * (116 f - 16) and the offset 128; 296 is 295.8 rounded, as in OpenCV.
    lightness = 296 * fy - ((16 * 255 << _F_BITS) + 50) // 100
    a = 500 * (fx - fy) + (128 << _F_BITS)
    b = 200 * (fy - fz) + (128 << _F_BITS)
    lab = (_descale(channel, _F_BITS).clip(0, 255) for channel in (lightness, a, b))
    return np.stack([channel.astype(np.uint8) for channel in lab], axis=-1)


def lab8_to_rgb(lab: _Bytes) -> _Bytes:
    """8-bit sRGB of 8-bit Lab, [H,W,3] -> [H,W,3], clipped where sRGB lacks the colour.

    Raises ValueError unless `lab` is 8-bit [H,W,3].
    """
    tables = _from_lab_tables()
    lightness, a, b = np.moveaxis(_checked(lab, "lab"), -1, 0)
    fy = tables.f[lightness]
    x = tables.cube[fy + tables.a[a] - tables.cube_start]
    z = tables.cube[fy - tables.b[b] - tables.cube_start]
    linear = _apply(tables.matrix, (x, tables.y[lightness], z), _MATRIX_BITS + 2)
    return np.stack([tables.srgb[channel.clip(0, _INVERSE_SIZE - 1)] for channel in linear], axis=-1)


class _ToLab(NamedTuple):
    linear: _Ints
    """8-bit sRGB -> linear light, 0 ... 2040."""
    matrix: _Ints
    """[3,3], linear light -> XYZ / white."""
    f: _Ints
    """XYZ / white on the scale of linear light -> f."""


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
    cube_start: int
    matrix: _Ints
    """[3,3], XYZ / white -> linear light."""
    srgb: _Bytes
    """Linear light, 0 ... 4095 -> 8-bit sRGB."""


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


def _apply(matrix: _Ints, channels: Any, bits: int) -> list[_Ints]:
    first, second, third = channels
    return [_descale(row[0] * first + row[1] * second + row[2] * third, bits) for row in matrix]


def _checked(image: _Bytes, name: str) -> _Bytes:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f"{name} must be uint8 [H,W,3], got {image.dtype} {image.shape}; convert it first")
    return image
