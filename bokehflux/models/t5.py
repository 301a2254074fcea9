"""T5 v1.1 text encoder: token ids to a sequence of states. Encoder only, inference and training from scratch.

Parameter names are those of the published files (`text_encoder_2/`), without `encoder.embed_tokens.weight`, a
second copy of `shared.weight`. The published models pad every prompt to a fixed length and let all tokens
attend to the padding, so there is no mask. Run it in bfloat16 or float32: the residual stream of the XXL
model overflows float16.

Shapes: B batch, T tokens, H heads, D head dim, W width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from bokehflux.configs import T5Config
from bokehflux.models.linear import Linear
from bokehflux.models.units import Network, Units


class T5Encoder(Network):
    """Embedding, pre-norm blocks, final norm (Raffel et al. 2020, arXiv:1910.10683; gated MLP of v1.1)."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.width)
        self.encoder = T5Stack(config)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights of an untrained model (scaled normals, as in the T5 paper's code)."""
        nn.init.normal_(self.shared.weight)
        for module in self.modules():
            if isinstance(module, T5Attention | T5GatedMLP | T5RMSNorm):
                module.reset_parameters()

    def units(self) -> Units:
        position_bias = self.encoder.first_attention.relative_attention_bias
        assert position_bias is not None
        return Units(blocks=tuple(self.encoder.block), ahead=(position_bias,))

    def forward(self, ids: Tensor) -> Tensor:
        """States `[B, T, width]` of the token `ids` `[B, T]` (int64), any T, in the dtype of the weights."""
        return self.encoder(self.shared(ids))


class T5Stack(nn.Module):
    """All blocks and the final norm. The first block owns the position bias that every block adds."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.block = nn.ModuleList(T5Block(config, owns_bias=i == 0) for i in range(config.num_layers))
        self.final_layer_norm = T5RMSNorm(config.width, config.eps)

    @property
    def first_attention(self) -> T5Attention:
        """The one that owns the position bias."""
        return self.get_submodule("block.0.layer.0.SelfAttention")  # type: ignore[return-value]

    def forward(self, x_BTW: Tensor) -> Tensor:
        bias_HTT = self.first_attention.position_bias(x_BTW.shape[1])
        for block in self.block:
            x_BTW = block(x_BTW, bias_HTT)
        return self.final_layer_norm(x_BTW)


class T5Block(nn.Module):
    """Self-attention, then a gated MLP."""

    def __init__(self, config: T5Config, *, owns_bias: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            [T5AttentionLayer(config, owns_bias=owns_bias), T5FeedForwardLayer(config)]
        )

    def forward(self, x_BTW: Tensor, bias_HTT: Tensor) -> Tensor:
        attention, feed_forward = self.layer
        return feed_forward(attention(x_BTW, bias_HTT))


class T5AttentionLayer(nn.Module):
    """x + attention(norm(x))."""

    def __init__(self, config: T5Config, *, owns_bias: bool) -> None:
        super().__init__()
        self.SelfAttention = T5Attention(config, owns_bias=owns_bias)
        self.layer_norm = T5RMSNorm(config.width, config.eps)

    def forward(self, x_BTW: Tensor, bias_HTT: Tensor) -> Tensor:
        return x_BTW + self.SelfAttention(self.layer_norm(x_BTW), bias_HTT)


class T5FeedForwardLayer(nn.Module):
    """x + mlp(norm(x))."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.DenseReluDense = T5GatedMLP(config)
        self.layer_norm = T5RMSNorm(config.width, config.eps)

    def forward(self, x_BTW: Tensor) -> Tensor:
        return x_BTW + self.DenseReluDense(self.layer_norm(x_BTW))


class T5Attention(nn.Module):
    """softmax(q k^T + bias) v. No 1/sqrt(D): the initialisation of q carries it."""

    def __init__(self, config: T5Config, *, owns_bias: bool) -> None:
        super().__init__()
        inner = config.num_heads * config.head_dim
        self.config = config
        self.q = Linear(config.width, inner, bias=False)
        self.k = Linear(config.width, inner, bias=False)
        self.v = Linear(config.width, inner, bias=False)
        self.o = Linear(inner, config.width, bias=False)
        self.relative_attention_bias = (
            nn.Embedding(config.num_buckets, config.num_heads) if owns_bias else None
        )

    def reset_parameters(self) -> None:
        width, inner = self.config.width, self.o.in_features
        nn.init.normal_(self.q.weight, std=(width * self.config.head_dim) ** -0.5)
        nn.init.normal_(self.k.weight, std=width**-0.5)
        nn.init.normal_(self.v.weight, std=width**-0.5)
        nn.init.normal_(self.o.weight, std=inner**-0.5)
        if self.relative_attention_bias is not None:
            nn.init.normal_(self.relative_attention_bias.weight, std=width**-0.5)

    def position_bias(self, num_tokens: int) -> Tensor:
        """The bias of each head's scores, `[H, T, T]` (query, key). Only the first block has one."""
        assert self.relative_attention_bias is not None
        position = torch.arange(num_tokens, device=self.relative_attention_bias.weight.device)
        bucket_TT = relative_position_bucket(
            position[None, :] - position[:, None], self.config.num_buckets, self.config.max_distance
        )
        return rearrange(self.relative_attention_bias(bucket_TT), "q k h -> h q k")

    def forward(self, x_BTW: Tensor, bias_HTT: Tensor) -> Tensor:
        q, k, v = (
            rearrange(linear(x_BTW), "b t (h d) -> b h t d", h=self.config.num_heads)
            for linear in (self.q, self.k, self.v)
        )
        # Written out: the fused CPU kernel's exponential is only good to 1e-6, which adds up in 24 layers.
        scores_BHTT = q @ k.mT + bias_HTT
        out_BHTD = scores_BHTT.float().softmax(dim=-1).to(v.dtype) @ v
        return self.o(rearrange(out_BHTD, "b h t d -> b t (h d)"))


class T5GatedMLP(nn.Module):
    """wo(gelu(wi_0 x) * wi_1 x), with the tanh form of GELU."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.wi_0 = Linear(config.width, config.mlp_size, bias=False)
        self.wi_1 = Linear(config.width, config.mlp_size, bias=False)
        self.wo = Linear(config.mlp_size, config.width, bias=False)

    def reset_parameters(self) -> None:
        for linear in (self.wi_0, self.wi_1, self.wo):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)

    def forward(self, x_BTW: Tensor) -> Tensor:
        return self.wo(F.gelu(self.wi_0(x_BTW), approximate="tanh") * self.wi_1(x_BTW))


class T5RMSNorm(nn.Module):
    """x / rms(x) * weight, without mean and bias; statistics in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        x_f32 = x.float()
        x_f32 = x_f32 * torch.rsqrt(x_f32.square().mean(-1, keepdim=True) + self.eps)
        # Rounded before the weight is applied, as the models were trained.
        return self.weight * x_f32.to(self.weight.dtype)


def relative_position_bucket(relative: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """Bucket, 0 ... num_buckets - 1, of the signed distance key minus query; any shape, int64.

    Half of the buckets serve each direction. Of those, the first half hold one distance each, the others
    logarithmically growing ranges up to `max_distance`, beyond which all distances share the last one.
    """
    per_side = num_buckets // 2
    num_exact = per_side // 2
    distance = relative.abs()
    # float32 on the model's device, as in the published code: at a border the rounding decides.
    log_ratio = torch.log(distance.float() / num_exact) / math.log(max_distance / num_exact)
    # Small distances (even the log of 0) are replaced below; the clamp keeps their cast to integers defined.
    far = num_exact + (log_ratio.clamp(min=0) * (per_side - num_exact)).long()
    bucket = torch.where(distance < num_exact, distance, far.clamp(max=per_side - 1))
    return bucket + (relative > 0).long() * per_side
