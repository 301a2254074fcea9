"""The transformer blocks of FLUX.1. Parameter names are those of the BFL checkpoint.

What is computed, not how: the numeric forms of each pass are in `fused`, `Residual` is explained there.
B rows, Q rows with queries, N image tokens, T text tokens, L = T + N, E width, H heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bokehflux.attention import AttentionSpec
from bokehflux.configs import MMDiTConfig
from bokehflux.kernels.fp8.interface import Quantized
from bokehflux.kernels.pointwise.interface import Projected, joint_heads
from bokehflux.models import fused
from bokehflux.models.adapter import BlockAdapter
from bokehflux.models.controls import BlockControl
from bokehflux.models.embeddings import RopeTable
from bokehflux.models.fused import Residual
from bokehflux.models.linear import Linear
from bokehflux.models.norms import QKNorm
from bokehflux.models.reference import ReferenceBlock


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
        chunks = self.lin(F.silu(vec))[:, None].chunk(3 * self.count, dim=-1)  # [B, 1, E] each
        return tuple(ModulationOut(*chunks[3 * i : 3 * i + 3]) for i in range(self.count))


class DoubleModulation(NamedTuple):
    """Modulation of a double block: attention and MLP of each stream."""

    img_attn: ModulationOut
    img_mlp: ModulationOut
    txt_attn: ModulationOut
    txt_mlp: ModulationOut


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockSpec:
    """What a block is asked to compute with its weights: which attention, and what the adapter adds."""

    attention: AttentionSpec
    adapter: BlockAdapter | None = None
    lora_scale: float = 1.0
    """Strength of the adapter's query and key updates."""
    reference: ReferenceBlock | None = None
    """What is added for rows that show a reference picture."""
    control: BlockControl | None = None
    """What is added to attention's output."""

    def adapt(self, heads: Projected) -> Projected:
        """Heads with the adapters' updates: they act on what was projected, before norms."""
        if self.adapter is not None:
            q = self.adapter.update_q(heads.q, self.lora_scale)
            k = self.adapter.update_k(heads.k, self.lora_scale)
            heads = heads._replace(q=q, k=k)
        return heads if self.reference is None else self.reference.update(heads)

    def steer(self, joint: Tensor, k: Tensor) -> Tensor:
        """Attention's output [B, L, H, D] with what controls add, k the rows' keys."""
        return joint if self.control is None else self.control(joint, k)

    def leaving(self, stream: Residual) -> Residual:
        """A stream as a block hands it on."""
        return stream.leaving() if self.reference is None else Residual(self.reference.after(stream.sum()))


class AttentionCall(nn.Module):
    """Where a specification is applied. A module so that forward hooks see q, k and v of one block."""

    def forward(self, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [Q, L, H, D], k and v [B, L, H, D] -> [B, L, H, D]."""
        return spec(q, k, v)


class StreamAttention(nn.Module):
    """One stream's projections around joint attention."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size)
        self.norm = QKNorm(config.head_dim)
        self.proj = Linear(config.hidden_size, config.hidden_size)

    def project(self, stream: Residual, mod: ModulationOut, spec: AttentionSpec) -> tuple[Tensor, Projected]:
        """The stream's tokens [B, L, E], and its queries [Q, L, E], of the spec's rows, keys and values."""
        x, normed = fused.modulate(stream, mod.shift, mod.scale, self.qkv)
        return x, fused.project(self.qkv, self.norm, normed, spec.query_rows())[0]


class MLP(nn.Sequential):
    """The MLP of one stream. Index 1 is a placeholder so that parameter names match the checkpoint."""

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
        return fused.mlp(*self.layers, x)

    def update(self, stream: Residual, mod: ModulationOut) -> Residual:
        """The stream's tokens, and the MLP's result as the update."""
        x, normed = fused.modulate(stream, mod.shift, mod.scale, self.layers[0])
        return Residual(x, self(normed), mod.gate)


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

    def forward(
        self, img: Residual, txt: Residual, mod: DoubleModulation, rope: RopeTable, spec: BlockSpec
    ) -> tuple[Residual, Residual]:
        """img [B, N, E], txt [B, T, E] -> (img, txt)."""
        img_x, img_heads = self.img_attn.project(img, mod.img_attn, spec.attention)
        img_heads = spec.adapt(img_heads)
        txt_x, txt_heads = self.txt_attn.project(txt, mod.txt_attn, spec.attention)
        q, k, v = joint_heads((txt_heads, img_heads), *rope)  # [Q, L, H, D], [B, L, H, D] twice
        del img_heads, txt_heads  # nothing outlives its use: heads are six times a stream's tokens
        joint = spec.steer(self.attention(spec.attention, q, k, v), k).flatten(2)  # [B, L, H, D] -> [B, L, E]
        del q, k, v
        txt_joint, img_joint = joint.split([txt_x.shape[1], img_x.shape[1]], dim=1)  # [B, T, E], [B, N, E]
        img = Residual(img_x, self.img_attn.proj(img_joint), mod.img_attn.gate)
        txt = Residual(txt_x, self.txt_attn.proj(txt_joint), mod.txt_attn.gate)
        del img_x, txt_x, joint, img_joint, txt_joint
        img, txt = self.img_mlp.update(img, mod.img_mlp), self.txt_mlp.update(txt, mod.txt_mlp)
        return spec.leaving(img), txt.leaving()

    def modulation_of(self, vec: Tensor) -> DoubleModulation:
        """[B, E] -> this block's vectors, which depend on prompt, guidance and noise level only."""
        return DoubleModulation(*self.img_mod(vec), *self.txt_mod(vec))

    @property
    def modulations(self) -> tuple[Modulation, ...]:
        """What `modulation_of` calls, outside `forward`."""
        return self.img_mod, self.txt_mod

    @property
    def adapted(self) -> Linear:
        """The projection whose first rows, queries then keys, the adapter updates."""
        return self.img_attn.qkv


class SingleStreamBlock(nn.Module):
    """Text and image as one sequence; attention and MLP in parallel between two fused projections."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.modulation = Modulation(config.hidden_size, 1)
        self.linear1 = Linear(config.hidden_size, 3 * config.hidden_size + config.mlp_size)
        self.norm = QKNorm(config.head_dim)
        self.linear2 = Linear(config.hidden_size + config.mlp_size, config.hidden_size)
        self.attention = AttentionCall()

    def forward(self, stream: Residual, mod: ModulationOut, rope: RopeTable, spec: BlockSpec) -> Residual:
        """stream [B, L, E] -> [B, L, E]."""
        layers, rows = (self.linear1, self.linear2), spec.attention.query_rows()
        x, normed = fused.modulate(stream, mod.shift, mod.scale, self.linear1)
        heads, hidden = fused.single_in(*layers, self.norm, normed, rows)
        q, k, v = joint_heads((spec.adapt(heads),), *rope)  # [Q, L, H, D], [B, L, H, D] twice
        del heads  # attention's result takes their place
        joint = spec.steer(self.attention(spec.attention, q, k, v), k).flatten(2)  # [B, L, H, D] -> [B, L, E]
        del q, k, v
        return spec.leaving(Residual(x, fused.single_out(*layers, normed, joint, hidden), mod.gate))

    def modulation_of(self, vec: Tensor) -> ModulationOut:
        """[B, E] -> this block's vectors, which depend on prompt, guidance and noise level only."""
        return self.modulation(vec)[0]

    @property
    def modulations(self) -> tuple[Modulation, ...]:
        """What `modulation_of` calls, outside `forward`."""
        return (self.modulation,)

    @property
    def adapted(self) -> Linear:
        """The projection whose first rows, queries then keys, the adapter updates."""
        return self.linear1


class FinalLayer(nn.Module):
    """Modulated norm and the projection back to packed latent channels."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.linear = Linear(config.hidden_size, config.in_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(config.hidden_size, 2 * config.hidden_size))

    def forward(self, stream: Residual, mod: ModulationOut) -> Tensor:
        """stream [B, N, E] -> [B, N, C]."""
        return self.linear(fused.modulate(stream, mod.shift, mod.scale, self.linear)[1])

    def modulation_of(self, vec: Tensor) -> ModulationOut:
        """[B, E] -> shift and scale. The gate is one, since no residual follows."""
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)  # [B, 1, E] each
        return ModulationOut(shift, scale, torch.ones_like(scale))
