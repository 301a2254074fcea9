"""The linear layer of every network: the weight may be stored narrow, and LoRA terms may be added."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bokehflux.kernels import dispatch
from bokehflux.kernels.fp8 import interface as fp8
from bokehflux.kernels.fp8.interface import Quantized

NARROW = (torch.float8_e4m3fn, torch.float8_e5m2)
"""Storage types that ordinary matrix products do not take."""
LONG_ROW = 2048
"""Tokens. Products of shorter rows do not fill a large GPU, so that copying them together costs less."""
Dequantize = Callable[[Tensor, torch.dtype], Tensor]
"""(weight as stored, compute dtype) -> dense weight [out, in]."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LowRankTerm:
    """strength * up(down(x)), added to a layer's output over the columns first ... first + len(up)."""

    down: Tensor
    """[rank, in]"""
    up: Tensor
    """[out', rank]"""
    strength: float
    first: int = 0
    """Where in the layer's output it acts: fused projections hold several of a LoRA's targets."""

    @property
    def nbytes(self) -> int:
        return self.down.nbytes + self.up.nbytes

    def moved(self, move: Callable[[Tensor], Tensor]) -> LowRankTerm:
        """The term with both factors passed through `move`."""
        return dataclasses.replace(self, down=move(self.down), up=move(self.up))

    def add_to(self, out: Tensor, x: Tensor, start: int = 0) -> Tensor:
        """`out`, the layer's columns from `start` on, plus the part of the term that falls on them."""
        skip = max(0, start - self.first)
        at = max(0, self.first - start)
        width = min(len(self.up) - skip, out.shape[-1] - at)
        if width <= 0:
            return out
        up = self.up[skip : skip + width]
        term = self.strength * F.linear(F.linear(x, self.down.to(x.dtype)), up.to(x.dtype))
        return out + F.pad(term, (at, out.shape[-1] - at - width))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`; long rows of a strided x (one stream of several rows) are multiplied where they lie.

    PyTorch would do so with any rows, and add the bias in a second pass with another rounding.
    """
    if x.is_contiguous() or not _has_long_rows(x) or dispatch.needs_gradients(x, weight, bias):
        return F.linear(x.contiguous(), weight, bias)
    if bias is None or not x.dtype == weight.dtype == bias.dtype:
        return F.linear(x.contiguous(), weight, bias)
    out = x.new_empty(*x.shape[:2], len(weight))
    for row, into in zip(x, out, strict=True):
        torch.addmm(bias, row, weight.T, out=into)
    return out


def _has_long_rows(x: Tensor) -> bool:
    """Whether a product of each row [L, in] of x is as fast as one of all. Compilers do without the copy."""
    if torch.compiler.is_compiling() or not x.is_cuda or x.ndim != 3 or x.dtype not in dispatch.HALF:
        return False
    return x.shape[1] >= LONG_ROW and x[0].is_contiguous()


class Linear(nn.Linear):
    """`nn.Linear` that casts a weight of another type at use, or multiplies in fp8, and adds low-rank terms.

    With a dense weight and no terms it is exactly `nn.Linear`. The loaders of `weights` set `dequantize` and
    `terms` before the first call; `set_fp8` sets the fp8 form.
    """

    scale: nn.Parameter | None
    """[out] float32, one for each row of a weight in e4m3. With it the product itself is in fp8."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.register_parameter("scale", None)
        self.dequantize: Dequantize | None = None
        self.terms: tuple[LowRankTerm, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear:
        # `to`, `cuda` and `half` call this: terms go where the weight goes.
        super()._apply(fn, recurse)
        self.terms = tuple(term.moved(fn) for term in self.terms)
        return self

    def set_fp8(self, values: Tensor, scale: Tensor) -> None:
        """Multiply in fp8 from now on: values [out, in] float8_e4m3fn, scale [out] float32, one a row.

        Inputs are quantised token by token (`kernels/fp8`); bias and terms stay in the inputs' dtype.
        """
        self.weight = nn.Parameter(values, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.dequantize = None

    @property
    def is_dense(self) -> bool:
        return self.dequantize is None and self.weight.dtype not in NARROW

    @property
    def takes_quantized(self) -> bool:
        """Whether forward accepts a quantised input. Layers with LoRA terms do not: the terms need the values
        before quantisation."""
        return self.scale is not None and not self.terms

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] that is multiplied."""
        if self.scale is not None:
            return (self.weight.float() * self.scale[:, None]).to(dtype)
        return self.weight.to(dtype) if self.dequantize is None else self.dequantize(self.weight, dtype)

    def dense_part(self, dtype: torch.dtype, rows: slice, columns: slice = slice(None)) -> Tensor:
        """Rows and columns of `dense`. If the weight is only cast, no more than those are cast."""
        if self.dequantize is None and self.scale is None:
            return self.weight[rows, columns].to(dtype)
        return self.dense(dtype)[rows, columns]

    def forward(self, x: Tensor | Quantized) -> Tensor:
        return self.columns(x, 0, self.out_features)

    def columns(self, x: Tensor | Quantized, start: int, stop: int) -> Tensor:
        """Output columns start ... stop alone, at their share of the cost: part of a fused projection.

        x [..., in] may be quantised only where `takes_quantized`.
        """
        bias: Tensor | None = self.bias if self.bias is None else self.bias[start:stop]
        if self.scale is not None:
            values = x if isinstance(x, Quantized) else fp8.quantize(x)
            out = fp8.product(values, self.weight[start:stop], self.scale[start:stop], bias)
        else:
            assert isinstance(x, Tensor)
            # Under autocast it is the product that casts dense weights, and biases.
            rows, kind = slice(start, stop), x.device.type
            if torch.is_autocast_enabled(kind):
                dtype = torch.get_autocast_dtype(kind)
                weight = self.weight[rows] if self.is_dense else self.dense_part(dtype, rows)
            else:
                weight = self.dense_part(x.dtype, rows)
                bias = None if bias is None else bias.to(x.dtype)
            out = _product(x, weight, bias)
        for term in self.terms:
            assert isinstance(x, Tensor)
            out = term.add_to(out, x, start)
        return out
