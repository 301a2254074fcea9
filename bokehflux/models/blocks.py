"""The transformer blocks of FLUX.1. Parameter names are those of the BFL checkpoint.

B rows, N image tokens, T text tokens, L = T + N joint tokens, E width, H heads, D head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
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


class StreamAttention(nn.Module):
    """One stream's projections around joint attention."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size)
        self.norm = QKNorm(config.head_dim)
        self.proj = Linear(config.hidden_size, config.hidden_size)

    def project(self, x: Tensor, adapter: BlockAdapter | None, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """[B, L, E] -> normalised q, k and plain v, each [B, L, H, D]."""
        return project_heads(self.qkv(x), self.norm, self.num_heads, adapter, scale)


def project_heads(
    qkv: Tensor, norm: QKNorm, num_heads: int, adapter: BlockAdapter | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Split qkv [B, L, 3E], add the adapter's updates to q and k, split heads, normalise q and k."""
    q, k, v = qkv.chunk(3, dim=-1)
    if adapter is not None:
        q, k = adapter.update(q, k, scale)
    q, k, v = (rearrange(t, "b l (h d) -> b l h d", h=num_heads) for t in (q, k, v))
    q, k = norm(q, k)
    return q, k, v


def mlp(config: MMDiTConfig) -> nn.Sequential:
    return nn.Sequential(
        Linear(config.hidden_size, config.mlp_size),
        nn.GELU(approximate="tanh"),
        Linear(config.mlp_size, config.hidden_size),
    )


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

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        vec: Tensor,
        rope: RopeTable,
        spec: AttentionSpec,
        adapter: BlockAdapter | None = None,
        lora_scale: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """img [B, N, E], txt [B, T, E], vec [B, E] -> (img, txt)."""
        img_mod1, img_mod2 = self.img_mod(vec)
        txt_mod1, txt_mod2 = self.txt_mod(vec)
        img_q, img_k, img_v = self.img_attn.project(modulate(img, img_mod1), adapter, lora_scale)
        txt_q, txt_k, txt_v = self.txt_attn.project(modulate(txt, txt_mod1), None, lora_scale)

        q = apply_rope(torch.cat([txt_q, img_q], dim=1), rope)
        k = apply_rope(torch.cat([txt_k, img_k], dim=1), rope)
        joint = self.attention(spec, q, k, torch.cat([txt_v, img_v], dim=1)).flatten(2)
        txt_out, img_out = joint.split([txt.shape[1], img.shape[1]], dim=1)

        img = img + img_mod1.gate * self.img_attn.proj(img_out)
        img = img + img_mod2.gate * self.img_mlp(modulate(img, img_mod2))
        txt = txt + txt_mod1.gate * self.txt_attn.proj(txt_out)
        txt = txt + txt_mod2.gate * self.txt_mlp(modulate(txt, txt_mod2))
        return img, txt


class SingleStreamBlock(nn.Module):
    """Text and image as one sequence; attention and MLP in parallel between two fused projections."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.split = [3 * config.hidden_size, config.mlp_size]
        self.modulation = Modulation(config.hidden_size, 1)
        self.linear1 = Linear(config.hidden_size, sum(self.split))
        self.norm = QKNorm(config.head_dim)
        self.linear2 = Linear(config.hidden_size + config.mlp_size, config.hidden_size)
        self.attention = AttentionCall()

    def forward(
        self,
        x: Tensor,
        vec: Tensor,
        rope: RopeTable,
        spec: AttentionSpec,
        adapter: BlockAdapter | None = None,
        lora_scale: float = 1.0,
    ) -> Tensor:
        """x [B, L, E], vec [B, E] -> [B, L, E]."""
        (mod,) = self.modulation(vec)
        qkv, hidden = self.linear1(modulate(x, mod)).split(self.split, dim=-1)
        q, k, v = project_heads(qkv, self.norm, self.num_heads, adapter, lora_scale)
        joint = self.attention(spec, apply_rope(q, rope), apply_rope(k, rope), v).flatten(2)
        return x + mod.gate * self.linear2(torch.cat([joint, F.gelu(hidden, approximate="tanh")], dim=-1))


class FinalLayer(nn.Module):
    """Modulated norm and the projection back to packed latent channels."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.linear = Linear(config.hidden_size, config.in_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(config.hidden_size, 2 * config.hidden_size))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(x, ModulationOut(shift, scale, scale)))
