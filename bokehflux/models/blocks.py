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
from bokehflux.models.bokeh import BlockAdapter
from bokehflux.models.embeddings import RopeTable, apply_rope
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


def modulate(x: Tensor, mod: ModulationOut) -> Tensor:
    """Layer norm without parameters, then scale and shift."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + mod.scale) + mod.shift


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
        self.num_heads = config.num_heads
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size)
        self.norm = QKNorm(config.head_dim)
        self.proj = Linear(config.hidden_size, config.hidden_size)

    def project(self, x: Tensor, terms: BlockTerms) -> tuple[Tensor, Tensor, Tensor]:
        """[B, L, E] -> q of the spec's query rows, k and v, each [B, L, H, D]; q and k normalised."""
        q, k, v, _ = project_heads(self.qkv, x, self.norm, self.num_heads, terms)
        return q, k, v


def project_heads(
    linear: Linear, x: Tensor, norm: QKNorm, num_heads: int, terms: BlockTerms
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values of x [B, L, E] in heads, and what else the fused projection holds [B, L, *].

    Queries are computed for the rows that the attention asks for, no others. The adapter acts on projected
    queries and keys, before their norms.
    """
    width, end = x.shape[-1], linear.out_features
    rows = terms.spec.query_rows()
    if rows is None or len(rows) == len(x):
        q, k, v, rest = linear(x).split([width, width, width, end - 3 * width], dim=-1)
    else:
        q = linear.columns(take_rows(x, rows), 0, width)
        k, v, rest = linear.columns(x, width, end).split([width, width, end - 3 * width], dim=-1)
    if terms.adapter is not None:
        q, k = terms.adapter.update_q(q, terms.lora_scale), terms.adapter.update_k(k, terms.lora_scale)
    q, k, v = (t.unflatten(-1, (num_heads, -1)) for t in (q, k, v))
    return norm.query_norm(q), norm.key_norm(k), v, rest


def take_rows(x: Tensor, rows: tuple[int, ...]) -> Tensor:
    """Rows of a batch; a view where they are one run."""
    if not rows:
        return x[:0]
    first = rows[0]
    return x[first : first + len(rows)] if rows[-1] - first + 1 == len(rows) else x[list(rows)]


def mlp(config: MMDiTConfig) -> nn.Sequential:
    return nn.Sequential(
        Linear(config.hidden_size, config.mlp_size),
        nn.GELU(approximate="tanh"),
        Linear(config.mlp_size, config.hidden_size),
    )


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
        self.img_mlp = mlp(config)
        self.txt_mod = Modulation(config.hidden_size, 2)
        self.txt_attn = StreamAttention(config)
        self.txt_mlp = mlp(config)
        self.attention = AttentionCall()

    def modulation_of(self, vec: Tensor) -> DoubleModulation:
        """[B, E] -> the vectors of this block; they depend on prompt, guidance and noise level only."""
        return DoubleModulation(*self.img_mod(vec), *self.txt_mod(vec))

    def forward(
        self, img: Tensor, txt: Tensor, mod: DoubleModulation, rope: RopeTable, terms: BlockTerms
    ) -> tuple[Tensor, Tensor]:
        """img [B, N, E], txt [B, T, E] -> (img, txt)."""
        img_q, img_k, img_v = self.img_attn.project(modulate(img, mod.img_attn), terms)
        txt_terms = BlockTerms(spec=terms.spec)
        txt_q, txt_k, txt_v = self.txt_attn.project(modulate(txt, mod.txt_attn), txt_terms)

        q = apply_rope(torch.cat([txt_q, img_q], dim=1), rope)
        k = apply_rope(torch.cat([txt_k, img_k], dim=1), rope)
        joint = self.attention(terms.spec, q, k, torch.cat([txt_v, img_v], dim=1)).flatten(2)
        txt_out, img_out = joint.split([txt.shape[1], img.shape[1]], dim=1)

        img = img + mod.img_attn.gate * self.img_attn.proj(img_out)
        img = img + mod.img_mlp.gate * self.img_mlp(modulate(img, mod.img_mlp))
        txt = txt + mod.txt_attn.gate * self.txt_attn.proj(txt_out)
        txt = txt + mod.txt_mlp.gate * self.txt_mlp(modulate(txt, mod.txt_mlp))
        return img, txt


class SingleStreamBlock(nn.Module):
    """Text and image as one sequence; attention and MLP in parallel between two fused projections."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.modulation = Modulation(config.hidden_size, 1)
        self.linear1 = Linear(config.hidden_size, 3 * config.hidden_size + config.mlp_size)
        self.norm = QKNorm(config.head_dim)
        self.linear2 = Linear(config.hidden_size + config.mlp_size, config.hidden_size)
        self.attention = AttentionCall()

    def modulation_of(self, vec: Tensor) -> ModulationOut:
        """[B, E] -> the vectors of this block; they depend on prompt, guidance and noise level only."""
        return self.modulation(vec)[0]

    def forward(self, x: Tensor, mod: ModulationOut, rope: RopeTable, terms: BlockTerms) -> Tensor:
        """x [B, L, E] -> [B, L, E]."""
        q, k, v, hidden = project_heads(self.linear1, modulate(x, mod), self.norm, self.num_heads, terms)
        joint = self.attention(terms.spec, apply_rope(q, rope), apply_rope(k, rope), v).flatten(2)
        return x + mod.gate * self.linear2(torch.cat([joint, F.gelu(hidden, approximate="tanh")], dim=-1))


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

    def forward(self, x: Tensor, mod: ModulationOut) -> Tensor:
        """x [B, N, E] -> [B, N, C]."""
        return self.linear(modulate(x, mod))
