"""The transformer blocks of FLUX.1. Parameter names are those of the BFL checkpoint.

B rows, N image tokens, T text tokens, L = T + N joint tokens, E width, H heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bokehflux.attention import AttentionSpec
from bokehflux.configs import MMDiTConfig
from bokehflux.kernels.fp8 import interface as fp8
from bokehflux.kernels.fp8.interface import Quantized
from bokehflux.kernels.pointwise import interface as pointwise
from bokehflux.kernels.pointwise.interface import Projected
from bokehflux.models.adapter import BlockAdapter
from bokehflux.models.embeddings import RopeTable
from bokehflux.models.linear import Linear
from bokehflux.models.norms import QKNorm


class ModulationOut(NamedTuple):
    """Shift, scale and gate of one sub-layer, each [B, 1, E]."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


class Modulation(nn.Module):
    """Shift, scale and gate vectors from the conditioning vector [B, E], for `count` sub-layers."""

    def __init__(self, hidden_size: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.lin = Linear(hidden_size, 3 * count * hidden_size)

    def forward(self, vec: Tensor) -> tuple[ModulationOut, ...]:
        chunks = self.lin(F.silu(vec))[:, None].chunk(3 * self.count, dim=-1)
        return tuple(ModulationOut(*chunks[3 * i : 3 * i + 3]) for i in range(self.count))


class Residual(NamedTuple):
    """The tokens of a stream [B, L, E], whose last update may still have to be added: x + gate * update.

    The pass that prepares the stream for its next layer adds it on the way (`modulate`).
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


def modulate(stream: Residual, mod: ModulationOut, into: Linear) -> tuple[Tensor, Tensor | Quantized]:
    """The stream's `sum`, and its layer norm without parameters, scaled and shifted: the input of a layer, as
    that layer takes it. One pass over the tokens."""
    x, update, gate = stream
    if update is None or gate is None:
        only_norm = fp8.quantize_modulated if into.takes_quantized else pointwise.modulate
        return x, only_norm(x, mod.scale, mod.shift)
    both = fp8.add_gated_quantize_modulated if into.takes_quantized else pointwise.add_gated_modulate
    return both(x, update, gate, mod.scale, mod.shift)


class AttentionCall(nn.Module):
    """Where a specification is applied. A module so that forward hooks see q, k and v of one block."""

    def forward(self, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [B, L, H, D] -> [B, L, H, D]."""
        return spec(q, k, v)


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockTerms:
    """What a block computes beside its own weights: its attention, and what the bokeh adapter adds."""

    spec: AttentionSpec
    adapter: BlockAdapter | None = None
    lora_scale: float = 1.0
    """Strength of the adapter's query and key updates."""


class StreamAttention(nn.Module):
    """One stream's projections around joint attention."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size)
        self.norm = QKNorm(config.head_dim)
        self.proj = Linear(config.hidden_size, config.hidden_size)

    def project(self, stream: Residual, mod: ModulationOut, terms: BlockTerms) -> tuple[Tensor, Projected]:
        """The stream's sum [B, L, E], and its queries (of the spec's query rows), keys and values."""
        x, normed = modulate(stream, mod, self.qkv)
        return x, project_heads(self.qkv, self.norm, normed, terms, self.qkv.out_features)[0]


def project_heads(
    linear: Linear, norm: QKNorm, x: Tensor | Quantized, terms: BlockTerms, end: int
) -> tuple[Projected, Tensor]:
    """Queries, keys and values of x [B, L, E], and what else the fused projection holds before column `end`.

    Queries are computed for the rows that the attention asks for, no others. The adapter acts on projected
    queries and keys, before their norms.
    """
    width = linear.in_features
    rows = terms.spec.query_rows()
    if rows is None or len(rows) == len(x.values if isinstance(x, Quantized) else x):
        whole = linear(x) if end == linear.out_features else linear.columns(x, 0, end)
        q, k, v, rest = whole.split([width, width, width, end - 3 * width], dim=-1)
    else:
        q = linear.columns(queried(x, rows), 0, width)
        k, v, rest = linear.columns(x, width, end).split([width, width, end - 3 * width], dim=-1)
    if terms.adapter is not None:
        q, k = terms.adapter.update_q(q, terms.lora_scale), terms.adapter.update_k(k, terms.lora_scale)
    return Projected(q, k, v, norm.query_norm.scale, norm.key_norm.scale), rest


def queried(x: Tensor | Quantized, rows: tuple[int, ...]) -> Tensor | Quantized:
    """Rows of a layer's input."""
    if isinstance(x, Quantized):
        return Quantized(take_rows(x.values, rows), take_rows(x.scale, rows), x.dtype)
    return take_rows(x, rows)


def take_rows(x: Tensor, rows: tuple[int, ...]) -> Tensor:
    """Rows of a batch; a view where they are one run."""
    if not rows:
        return x[:0]
    first = rows[0]
    return x[first : first + len(rows)] if rows[-1] - first + 1 == len(rows) else x[list(rows)]


class MLP(nn.Sequential):
    """Of one stream; the names are the checkpoint's, where the activation is number 1."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__(
            Linear(config.hidden_size, config.mlp_size),
            nn.Identity(),
            Linear(config.mlp_size, config.hidden_size),
        )

    @property
    def layers(self) -> tuple[Linear, Linear]:
        return self[0], self[2]  # type: ignore[return-value]

    def forward(self, x: Tensor | Quantized) -> Tensor:
        """[B, L, E] -> [B, L, E]."""
        first, last = self.layers
        if isinstance(x, Tensor) and first.takes_epilogues(x):
            return last(first.gelu_columns(x, 0, first.out_features))
        hidden = first(x)
        return last(fp8.quantize_gelu(hidden) if last.takes_quantized else F.gelu(hidden, approximate="tanh"))


class DoubleModulation(NamedTuple):
    """Modulation of a double block: attention and MLP of each stream."""

    img_attn: ModulationOut
    img_mlp: ModulationOut
    txt_attn: ModulationOut
    txt_mlp: ModulationOut


class DoubleStreamBlock(nn.Module):
    """Image and text with their own weights, one joint attention. The adapter acts on the image stream."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.img_mod = Modulation(config.hidden_size, 2)
        self.img_attn = StreamAttention(config)
        self.img_mlp = MLP(config)
        self.txt_mod = Modulation(config.hidden_size, 2)
        self.txt_attn = StreamAttention(config)
        self.txt_mlp = MLP(config)
        self.attention = AttentionCall()

    def modulation_of(self, vec: Tensor) -> DoubleModulation:
        """[B, E] -> the vectors of this block; they depend on prompt, guidance and noise level only."""
        return DoubleModulation(*self.img_mod(vec), *self.txt_mod(vec))

    def forward(
        self, img: Residual, txt: Residual, mod: DoubleModulation, rope: RopeTable, terms: BlockTerms
    ) -> tuple[Residual, Residual]:
        """img [B, N, E], txt [B, T, E] -> (img, txt)."""
        img, txt = self._attend(img, txt, mod, rope, terms)
        img, txt = through_mlp(img, self.img_mlp, mod.img_mlp), through_mlp(txt, self.txt_mlp, mod.txt_mlp)
        return img.leaving(), txt.leaving()

    def _attend(
        self, img: Residual, txt: Residual, mod: DoubleModulation, rope: RopeTable, terms: BlockTerms
    ) -> tuple[Residual, Residual]:
        """Both streams, with what joint attention makes of them as the update."""
        # Nothing outlives its use: a row's heads are six times its tokens.
        img_x, img_heads = self.img_attn.project(img, mod.img_attn, terms)
        txt_x, txt_heads = self.txt_attn.project(txt, mod.txt_attn, BlockTerms(spec=terms.spec))
        q, k, v = pointwise.joint_heads((txt_heads, img_heads), rope.cos, rope.sin)
        del img_heads, txt_heads
        out = self.attention(terms.spec, q, k, v).flatten(2)
        del q, k, v
        txt_out, img_out = out.split([txt_x.shape[1], img_x.shape[1]], dim=1)
        return (
            Residual(img_x, self.img_attn.proj(img_out), mod.img_attn.gate),
            Residual(txt_x, self.txt_attn.proj(txt_out), mod.txt_attn.gate),
        )


def through_mlp(stream: Residual, mlp: MLP, mod: ModulationOut) -> Residual:
    """A stream [B, L, E] with its MLP's result as the update."""
    x, normed = modulate(stream, mod, mlp.layers[0])
    return Residual(x, mlp(normed), mod.gate)


class SingleStreamBlock(nn.Module):
    """Text and image as one sequence; attention and MLP in parallel between two fused projections."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.modulation = Modulation(config.hidden_size, 1)
        self.linear1 = Linear(config.hidden_size, 3 * config.hidden_size + config.mlp_size)
        self.norm = QKNorm(config.head_dim)
        self.linear2 = Linear(config.hidden_size + config.mlp_size, config.hidden_size)
        self.attention = AttentionCall()

    def modulation_of(self, vec: Tensor) -> ModulationOut:
        """[B, E] -> the vectors of this block; they depend on prompt, guidance and noise level only."""
        return self.modulation(vec)[0]

    def forward(self, stream: Residual, mod: ModulationOut, rope: RopeTable, terms: BlockTerms) -> Residual:
        """stream [B, L, E] -> [B, L, E]."""
        x, normed = modulate(stream, mod, self.linear1)
        # As products of their own, GELU costs no pass over the tokens, and laying both halves together none.
        apart = all(layer.takes_epilogues(normed) for layer in (self.linear1, self.linear2))
        end = self.linear1.out_features
        mlp = 3 * self.linear1.in_features if apart else end
        joint, hidden = self._attend(normed, mlp, rope, terms)
        if apart:
            assert isinstance(normed, Tensor)
            update = self.linear2.of_parts(joint, self.linear1.gelu_columns(normed, mlp, end))
        elif self.linear2.takes_quantized:
            update = self.linear2(fp8.quantize_gelu(hidden, beside=joint))
        else:
            update = self.linear2(pointwise.concat_gelu(joint, hidden))
        return Residual(x, update, mod.gate).leaving()

    def _attend(
        self, x: Tensor | Quantized, end: int, rope: RopeTable, terms: BlockTerms
    ) -> tuple[Tensor, Tensor]:
        """What attention makes of x [B, L, E], and what else `linear1` gives before column `end`."""
        heads, rest = project_heads(self.linear1, self.norm, x, terms, end)
        q, k, v = pointwise.joint_heads((heads,), rope.cos, rope.sin)
        del heads  # attention's result takes their place
        return self.attention(terms.spec, q, k, v).flatten(2), rest


class FinalLayer(nn.Module):
    """Modulated norm and the projection back to packed latent channels."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.linear = Linear(config.hidden_size, config.in_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(config.hidden_size, 2 * config.hidden_size))

    def modulation_of(self, vec: Tensor) -> ModulationOut:
        """[B, E] -> shift and scale; there is no residual to gate, the gate is one."""
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)
        return ModulationOut(shift, scale, torch.ones_like(scale))

    def forward(self, stream: Residual, mod: ModulationOut) -> Tensor:
        """stream [B, N, E] -> [B, N, C]."""
        return self.linear(modulate(stream, mod, self.linear)[1])
