"""The passes of a transformer block in their numeric forms; `blocks` calls them and knows no form.

eager: layers as they are, norms and GELU as passes between them (`kernels/pointwise`). epilogue: 16-bit
products end in GELU, and a product of two halves is taken apart, so that nobody lays them side by side.
fp8: a pass quantises what it makes, for a layer that multiplies in e4m3 (`kernels/fp8`).

Nothing outlives its use here or in `blocks`: at 1024 x 1024 the heads of one row are 85 MB, its MLP 113 MB.

B rows, Q rows with queries, L tokens, E width, M hidden width of the MLP, H heads, D head dim.
"""

from __future__ import annotations

from typing import NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from bokehflux.kernels.attention.joins import take_rows
from bokehflux.kernels.fp8 import interface as fp8
from bokehflux.kernels.fp8.interface import Quantized
from bokehflux.kernels.pointwise import interface as pointwise
from bokehflux.kernels.pointwise.interface import Projected
from bokehflux.models.linear import Linear
from bokehflux.models.norms import QKNorm

EPILOGUES = {"cuda": (torch.bfloat16, torch.float16), "cpu": (torch.bfloat16,)}
"""Types in which a device's products are taken apart. float32 is not one: its last bits would change."""


class Residual(NamedTuple):
    """The tokens of a stream [B, L, E], whose last update may still have to be added: x + gate * update.

    A sub-layer ends with an update, and the next one begins with a norm of the sum. `modulate` computes sum
    and norm in one pass over the tokens, so blocks hand on both halves. `sum()` gives the plain tokens.
    """

    x: Tensor
    update: Tensor | None = None
    gate: Tensor | None = None
    """[B, 1, E], or [1, 1, E] for all rows; there is one where there is an update."""

    def sum(self) -> Tensor:
        """The tokens with nothing left to add."""
        if self.update is None or self.gate is None:
            return self.x
        return pointwise.add_gated(self.x, self.update, self.gate)

    def settled(self) -> Residual:
        """The same stream with nothing left to add."""
        return Residual(self.sum())

    def leaving(self) -> Residual:
        """As a block hands it on. Under a compiler it is settled: with and without an update would be two
        blocks to compile."""
        return self.settled() if torch.compiler.is_compiling() else self

    def tokens(self, part: slice) -> Residual:
        """Some of the tokens."""
        return Residual(self.x[:, part], None if self.update is None else self.update[:, part], self.gate)


def modulate(
    stream: Residual, shift: Tensor, scale: Tensor, into: Linear
) -> tuple[Tensor, Tensor | Quantized]:
    """The stream's sum x, and norm(x) * (1 + scale) + shift as the layer `into` takes it, both [B, L, E]."""
    x, update, gate = stream
    if update is None or gate is None:
        only_norm = fp8.quantize_modulated if into.takes_quantized else pointwise.modulate
        return x, only_norm(x, scale, shift)
    both = fp8.add_gated_quantize_modulated if into.takes_quantized else pointwise.add_gated_modulate
    return both(x, update, gate, scale, shift)


def project(
    linear: Linear, norm: QKNorm, x: Tensor | Quantized, rows: tuple[int, ...] | None, num_more: int = 0
) -> tuple[Projected, Tensor]:
    """Queries of some rows (None: all), keys and values of x [B, L, E]; and `num_more` columns after them."""
    width, stop = linear.in_features, 3 * linear.in_features + num_more
    if rows is None or len(rows) == len(x.values if isinstance(x, Quantized) else x):
        whole = linear(x) if stop == linear.out_features else linear.columns(x, 0, stop)
        q, k, v, more = whole.split([width, width, width, num_more], dim=-1)  # [B, L, E] three times
    else:
        q = linear.columns(_of_rows(x, rows), 0, width)  # [Q, L, E]
        k, v, more = linear.columns(x, width, stop).split([width, width, num_more], dim=-1)  # [B, L, E] twice
    return Projected(q, k, v, norm.query_norm.scale, norm.key_norm.scale), more


def mlp(first: Linear, last: Linear, x: Tensor | Quantized) -> Tensor:
    """last(GELU(first(x))): [B, L, E] -> [B, L, E]."""
    if takes_epilogues(x, first):
        return last(gelu_columns(first, x, 0, first.out_features))
    hidden = first(x)  # [B, L, M]
    return last(fp8.quantize_gelu(hidden) if last.takes_quantized else F.gelu(hidden, approximate="tanh"))


def single_in(
    linear1: Linear, linear2: Linear, norm: QKNorm, x: Tensor | Quantized, rows: tuple[int, ...] | None
) -> tuple[Projected, Tensor | None]:
    """Attention's and the MLP's half of a single block's first layer; `single_out` computes the second half
    where this one is None."""
    if takes_epilogues(x, linear1, linear2):
        return project(linear1, norm, x, rows)[0], None
    return project(linear1, norm, x, rows, linear1.out_features - 3 * linear1.in_features)


def single_out(
    linear1: Linear, linear2: Linear, x: Tensor | Quantized, joint: Tensor, hidden: Tensor | None
) -> Tensor:
    """linear2([joint | GELU(hidden)]): joint [B, L, E] from attention, hidden [B, L, M] from `single_in`."""
    if hidden is None:
        assert isinstance(x, Tensor)
        hidden = gelu_columns(linear1, x, 3 * linear1.in_features, linear1.out_features)
        return of_halves(linear2, joint, hidden)
    if linear2.takes_quantized:
        return linear2(fp8.quantize_gelu(hidden, beside=joint))
    return linear2(pointwise.concat_gelu(joint, hidden))


def takes_epilogues(x: Tensor | Quantized, *layers: Linear) -> TypeGuard[Tensor]:
    """Whether products with x may be taken apart and end in GELU.

    They may in the types of `EPILOGUES`, with weights that are at most cast, without LoRA terms or gradients,
    and not under a compiler, which fuses by itself.
    """
    if isinstance(x, Quantized) or torch.compiler.is_compiling():
        return False
    if x.dtype not in EPILOGUES.get(x.device.type, ()):
        return False
    grad = torch.is_grad_enabled()
    return all(
        layer.dequantize is None
        and layer.scale is None
        and not layer.terms
        and layer.bias is not None
        and layer.bias.dtype == x.dtype
        and not (grad and (x.requires_grad or layer.weight.requires_grad))
        for layer in layers
    )


def gelu_columns(layer: Linear, x: Tensor, start: int, stop: int) -> Tensor:
    """GELU (tanh form) of `layer.columns`, in the product's epilogue: [B, L, E] -> [B, L, stop - start]."""
    weight = layer.dense_part(x.dtype, slice(start, stop))
    rows = torch._addmm_activation(layer.bias[start:stop], x.flatten(0, -2), weight.T, use_gelu=True)
    return rows.unflatten(0, x.shape[:-1])  # [B * L, M] -> [B, L, M]


def of_halves(layer: Linear, left: Tensor, right: Tensor) -> Tensor:
    """layer([left | right]) as two products, the second added to the first: the sum is rounded once more."""
    width, every = left.shape[-1], slice(None)
    rows = torch.addmm(layer.bias, left.flatten(0, -2), layer.dense_part(left.dtype, every, slice(width)).T)
    rows.addmm_(right.flatten(0, -2), layer.dense_part(left.dtype, every, slice(width, None)).T)
    return rows.unflatten(0, left.shape[:-1])  # [B * L, E] -> [B, L, E]


def _of_rows(x: Tensor | Quantized, rows: tuple[int, ...]) -> Tensor | Quantized:
    """Rows of a layer's input."""
    if isinstance(x, Quantized):
        return Quantized(take_rows(x.values, rows), take_rows(x.scale, rows), x.dtype)
    return take_rows(x, rows)
