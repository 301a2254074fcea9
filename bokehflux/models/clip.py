"""CLIP text encoder: token ids to one pooled vector. The text half of CLIP without its final projection.

Parameter names are those of the published files (`text_encoder/`). Attention is causal and there is no
padding mask: tokens after the end-of-text token cannot reach it, and the pooled vector is its state.

Shapes: B batch, T tokens, H heads, D head dim, W width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from bokehflux.configs import CLIPConfig
from bokehflux.models.linear import Linear
from bokehflux.models.units import Network

_LARGEST_ID = 2
"""`eos_token_id` of the first CLIP configs: wrong but widely used; it means the largest id of the row."""


class CLIPTextEncoder(Network):
    """The text transformer of CLIP (Radford et al. 2021, arXiv:2103.00020)."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        if config.width % config.num_heads:
            raise ValueError(f"width {config.width} is not divisible by num_heads {config.num_heads}")
        self.config = config
        self.text_model = CLIPTextTransformer(config)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights of an untrained model (as OpenAI's code: residual branches shrink with depth)."""
        for module in self.modules():
            if isinstance(module, CLIPEmbeddings | CLIPLayer | nn.LayerNorm):
                module.reset_parameters()

    def states(self, ids: Tensor) -> Tensor:
        """States `[B, T, width]` after the final norm, of the token `ids` `[B, T]` (int64).

        Raises ValueError when T exceeds `config.max_length`.
        """
        return self.text_model(ids)

    def forward(self, ids: Tensor) -> Tensor:
        """Pooled vectors `[B, width]` of the token `ids` `[B, T]` (int64).

        Each row is the state at its first `config.eos_token_id`, or at its largest id when that is 2.
        """
        # argmax returns the first of equal values, so padding with the end-of-text token is harmless.
        if self.config.eos_token_id == _LARGEST_ID:
            end_B = ids.argmax(dim=-1)
        else:
            end_B = (ids == self.config.eos_token_id).int().argmax(dim=-1)
        return self.states(ids)[torch.arange(ids.shape[0], device=ids.device), end_B]


class CLIPTextTransformer(nn.Module):
    """Embeddings, layers, final norm."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.embeddings = CLIPEmbeddings(config)
        self.encoder = CLIPLayers(config)
        self.final_layer_norm = nn.LayerNorm(config.width, eps=config.eps)

    def forward(self, ids: Tensor) -> Tensor:
        return self.final_layer_norm(self.encoder(self.embeddings(ids)))


class CLIPEmbeddings(nn.Module):
    """Token plus learned position embedding."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.max_length, config.width)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.01)

    def forward(self, ids: Tensor) -> Tensor:
        num_tokens, max_length = ids.shape[1], self.position_embedding.num_embeddings
        if num_tokens > max_length:
            raise ValueError(
                f"CLIP reads at most {max_length} tokens per prompt, got {num_tokens}; truncate the prompt"
            )
        return self.token_embedding(ids) + self.position_embedding.weight[:num_tokens]


class CLIPLayers(nn.Module):
    """The layers in order; exists so that names match the published files."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CLIPLayer(config) for _ in range(config.num_layers))

    def forward(self, x_BTW: Tensor) -> Tensor:
        for layer in self.layers:
            x_BTW = layer(x_BTW)
        return x_BTW


class CLIPLayer(nn.Module):
    """Pre-norm causal attention, then pre-norm MLP."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.self_attn = CLIPAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.width, eps=config.eps)
        self.mlp = CLIPMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.width, eps=config.eps)

    def reset_parameters(self) -> None:
        width = self.config.width
        residual_std = width**-0.5 * (2 * self.config.num_layers) ** -0.5
        for linear, std in (
            (self.self_attn.q_proj, width**-0.5),
            (self.self_attn.k_proj, width**-0.5),
            (self.self_attn.v_proj, width**-0.5),
            (self.self_attn.out_proj, residual_std),
            (self.mlp.fc1, (2 * width) ** -0.5),
            (self.mlp.fc2, residual_std),
        ):
            nn.init.normal_(linear.weight, std=std)
            nn.init.zeros_(linear.bias)

    def forward(self, x_BTW: Tensor) -> Tensor:
        x_BTW = x_BTW + self.self_attn(self.layer_norm1(x_BTW))
        return x_BTW + self.mlp(self.layer_norm2(x_BTW))


class CLIPAttention(nn.Module):
    """Causal multi-head self-attention with biases."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q_proj = Linear(config.width, config.width)
        self.k_proj = Linear(config.width, config.width)
        self.v_proj = Linear(config.width, config.width)
        self.out_proj = Linear(config.width, config.width)

    def forward(self, x_BTW: Tensor) -> Tensor:
        q, k, v = (
            rearrange(linear(x_BTW), "b t (h d) -> b h t d", h=self.num_heads)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        out_BHTD = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(rearrange(out_BHTD, "b h t d -> b t (h d)"))


class CLIPMLP(nn.Module):
    """Two linear maps around quick GELU, x sigmoid(1.702 x)."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.width, config.mlp_size)
        self.fc2 = Linear(config.mlp_size, config.width)

    def forward(self, x_BTW: Tensor) -> Tensor:
        x_BTF = self.fc1(x_BTW)
        return self.fc2(x_BTF * torch.sigmoid(1.702 * x_BTF))
