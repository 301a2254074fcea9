"""GGUF's block formats as numbers, in PyTorch: a packed weight stays packed and is widened at every use.

A row of a matrix is a sequence of blocks: 32 or 256 numbers that share scales. All arithmetic is float32 and
gives the same bits as the decoder of the `gguf` package. Formats: ggml's `ggml-common.h` (block_q8_0 ...).

Shapes: N blocks; a block format's numbers are unpacked to [N, numbers per block].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Packed:
    """`Linear.dequantize` for a weight that is stored as raw bytes [out, bytes]."""

    packing: str
    """A key of `FORMATS`."""

    def __call__(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """[out, bytes] uint8 -> [out, in]."""
        return unpack(weight, self.packing).to(dtype)


def unpack(raw: Tensor, packing: str) -> Tensor:
    """Packed rows [out, bytes] uint8 -> float32 [out, in]."""
    block_bytes, decode = FORMATS[packing]
    return decode(raw.reshape(-1, block_bytes)).reshape(raw.shape[0], -1)


def _half(raw: Tensor) -> Tensor:
    """Two bytes [N, 2] -> float32 [N, 1]."""
    return raw.contiguous().view(torch.float16).float()


def _nibbles(raw: Tensor, width: int) -> Tensor:
    """[N, bytes] -> [N, 2 * bytes]: of each run of `width` bytes the low halves, then the high halves."""
    runs = raw.unflatten(1, (-1, 1, width))
    return torch.cat([runs & 15, runs >> 4], dim=2).flatten(1)


def _fields(raw: Tensor, width: int, bits: int) -> Tensor:
    """[N, bytes] -> [N, bytes * 8 / bits]: of each run of `width` bytes all lowest fields, then the next."""
    runs = raw.unflatten(1, (-1, 1, width))
    return torch.cat([(runs >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], dim=2).flatten(1)


def _fifth_bits(raw: Tensor) -> Tensor:
    """Four bytes [N, 4] -> their 32 bits, lowest first, each worth 16: [N, 32]."""
    shifts = torch.arange(8, device=raw.device, dtype=torch.uint8)
    return (((raw[:, :, None] >> shifts) & 1) << 4).flatten(1)


def _q8_0(raw: Tensor) -> Tensor:
    return raw[:, 2:].contiguous().view(torch.int8).float() * _half(raw[:, :2])


def _q4_0(raw: Tensor) -> Tensor:
    return _half(raw[:, :2]) * (_nibbles(raw[:, 2:], 16).float() - 8)


def _q4_1(raw: Tensor) -> Tensor:
    return _half(raw[:, :2]) * _nibbles(raw[:, 4:], 16).float() + _half(raw[:, 2:4])


def _q5_0(raw: Tensor) -> Tensor:
    numbers = _nibbles(raw[:, 6:], 16) | _fifth_bits(raw[:, 2:6])
    return _half(raw[:, :2]) * (numbers.float() - 16)


def _q5_1(raw: Tensor) -> Tensor:
    numbers = _nibbles(raw[:, 8:], 16) | _fifth_bits(raw[:, 4:8])
    return _half(raw[:, :2]) * numbers.float() + _half(raw[:, 2:4])


def _grouped(scale: Tensor, numbers: Tensor) -> Tensor:
    """Scales [N, G] times numbers [N, G * group], group by group."""
    return (scale[:, :, None] * numbers.float().unflatten(1, (scale.shape[1], -1))).flatten(1)


def _shifted(numbers: Tensor, offset: Tensor) -> Tensor:
    """Numbers [N, G * group] minus offsets [N, G], group by group."""
    return (numbers.unflatten(1, (offset.shape[1], -1)) - offset[:, :, None]).flatten(1)


def _q2_k(raw: Tensor) -> Tensor:
    both, numbers = raw[:, :16], _fields(raw[:, 16:80], 32, 2)
    scale = _half(raw[:, 80:82]) * (both & 15).float()
    offset = _half(raw[:, 82:84]) * (both >> 4).float()
    return _shifted(_grouped(scale, numbers), offset)


def _q3_k(raw: Tensor) -> Tensor:
    # 6-bit scales: low halves in eight bytes, the two high bits of all sixteen in four.
    low, high = _nibbles(raw[:, 96:104], 8), _fields(raw[:, 104:108], 4, 2)
    scale = _half(raw[:, 108:110]) * ((low | (high << 4)).float() - 32)
    # A set bit of the mask means that nothing is subtracted.
    missing = (_fields(raw[:, :32], 32, 1) ^ 1).float() * 4
    return _grouped(scale, _fields(raw[:, 32:96], 32, 2).float() - missing)


def _scales_and_offsets(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Twelve bytes -> eight 6-bit scales and eight 6-bit offsets, both float32 [N, 8]."""
    a, b, c = raw.split(4, dim=1)
    scale = torch.cat([a & 63, (c & 15) | ((a >> 2) & 48)], dim=1)
    offset = torch.cat([b & 63, (c >> 4) | ((b >> 2) & 48)], dim=1)
    return scale.float(), offset.float()


def _q45_k(raw: Tensor, numbers: Tensor) -> Tensor:
    scale, offset = _scales_and_offsets(raw[:, 4:16])
    return _shifted(_grouped(_half(raw[:, :2]) * scale, numbers), _half(raw[:, 2:4]) * offset)


def _q4_k(raw: Tensor) -> Tensor:
    return _q45_k(raw, _nibbles(raw[:, 16:], 32))


def _q5_k(raw: Tensor) -> Tensor:
    return _q45_k(raw, _nibbles(raw[:, 48:], 32) | (_fields(raw[:, 16:48], 32, 1) << 4))


def _q6_k(raw: Tensor) -> Tensor:
    numbers = _nibbles(raw[:, :128], 64) | (_fields(raw[:, 128:192], 32, 2) << 4)
    scale = _half(raw[:, 208:]) * raw[:, 192:208].contiguous().view(torch.int8).float()
    return _grouped(scale, numbers.float() - 32)


FORMATS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "Q8_0": (34, _q8_0),
    "Q4_0": (18, _q4_0),
    "Q4_1": (20, _q4_1),
    "Q5_0": (22, _q5_0),
    "Q5_1": (24, _q5_1),
    "Q2_K": (84, _q2_k),
    "Q3_K": (110, _q3_k),
    "Q4_K": (144, _q4_k),
    "Q5_K": (176, _q5_k),
    "Q6_K": (210, _q6_k),
}
"""GGUF's name of a block format -> (bytes per block, decoder)."""
