"""The published formulation of Bokeh Diffusion on diffusers' FLUX: the oracle of tests and benchmarks.

Written from its description, term by term, with nothing simplified: the level is a key and a value of one
cross-attention per adapted block, and a grounded row attends to concatenated keys and duplicated values.
It needs diffusers 0.32 and shares the weights of the `MMDiT` it is built from.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_processor import Attention, FluxAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from bokehflux.configs import BokehConfig
from bokehflux.models.mmdit import MMDiT
from bokehflux.weights.mapping import to_official
from bokehflux.weights.networks import ADAPTER_PREFIX
from bokehflux.weights.tables import flux
from bokehflux.weights.tables.adapter import PUBLISHED

AttentionOutput = Tensor | tuple[Tensor, Tensor]


class PublishedAttention:
    """Attention of one adapted block. `weights` are its adapter tensors: `to_q_adp.down.weight` and so on."""

    def __init__(
        self, config: BokehConfig, weights: dict[str, Tensor], lora_scale: float, bokeh_scale: float
    ):
        self.config = config
        self.weights = weights
        self.lora_scale = lora_scale
        self.bokeh_scale = bokeh_scale

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        context: Tensor | None = None,
        ids: Sequence[int] | None = None,
    ) -> AttentionOutput:
        """hidden_states [B, L, E], text states [B, T, E] in double blocks, context [B, 1, C]."""
        assert context is not None
        q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        if self.config.adapt_q:
            q = q + self.lora_scale * self._low_rank("to_q_adp", q)
        if self.config.adapt_k:
            k = k + self.lora_scale * self._low_rank("to_k_adp", k)
        q, k, v = (_heads(t, attn.heads) for t in (q, k, v))
        q, k = attn.norm_q(q), attn.norm_k(k)
        if encoder_hidden_states is not None:
            txt = encoder_hidden_states
            txt_q = attn.norm_added_q(_heads(attn.add_q_proj(txt), attn.heads))
            txt_k = attn.norm_added_k(_heads(attn.add_k_proj(txt), attn.heads))
            txt_v = _heads(attn.add_v_proj(txt), attn.heads)
            q, k, v = (torch.cat(pair, dim=2) for pair in ((txt_q, q), (txt_k, k), (txt_v, v)))
        q, k = apply_rotary_emb(q, image_rotary_emb), apply_rotary_emb(k, image_rotary_emb)

        if ids is not None:
            rows = list(ids)
            q = q[rows]
            if self.config.adapt_k:
                k, v = torch.cat([k, k[rows]], dim=2), torch.cat([v, v], dim=2)
        out = F.scaled_dot_product_attention(q, k, v)

        k_bokeh = _heads(self._low_rank("to_k_bokeh", context), attn.heads)  # [B, H, 1, D]
        v_bokeh = _heads(self._low_rank("to_v_bokeh", context), attn.heads)
        out = out + self.bokeh_scale * F.scaled_dot_product_attention(q, k_bokeh, v_bokeh)

        out = out.transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return out
        txt_out, img_out = out.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1)
        return attn.to_out[0](img_out), attn.to_add_out(txt_out)

    def _low_rank(self, name: str, x: Tensor) -> Tensor:
        down, up = self.weights[f"{name}.down.weight"], self.weights[f"{name}.up.weight"]
        y = F.linear(F.linear(x.to(down.dtype), down), up)
        if self.config.alpha is not None:
            y = y * (self.config.alpha / self.config.rank)
        return y.to(x.dtype)


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, L, E] -> [B, H, L, D]."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


class UnadaptedAttention(FluxAttnProcessor2_0):
    """diffusers' own attention, for blocks without an adapter: neither level nor grounding reaches them."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        context: Tensor | None = None,
        ids: Sequence[int] | None = None,
    ) -> AttentionOutput:
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)


class Published(nn.Module):
    """A diffusers transformer whose adapted blocks attend as published. Built by `build_published`."""

    def __init__(self, transformer: FluxTransformer2DModel, adapter: dict[str, Tensor]):
        super().__init__()
        self.transformer = transformer
        self.adapter = adapter

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        pooled: Tensor,
        sigma: Tensor,
        guidance: Tensor | None,
        txt_ids: Tensor,
        img_ids: Tensor,
        annotation: Tensor,
        ids: Sequence[int] | None = None,
    ) -> Tensor:
        """Velocity [B, N, C].

        img [B, N, C], txt [B, T, W], pooled [B, P], sigma [B] in 0-1, guidance [B] (not used by models
        without guidance embedding), txt_ids [T, 3], img_ids [N, 3], annotation [B, 1]: level / 30, or -1 for
        none; ids: for every row the one whose query and further keys it attends with, None: no grounding.
        """
        hidden = F.relu(self._embed(0, annotation))
        context = self._embed(2, hidden)[:, None]  # one token
        return self.transformer(
            hidden_states=img,
            encoder_hidden_states=txt,
            pooled_projections=pooled,
            timestep=sigma,
            img_ids=img_ids,
            txt_ids=txt_ids,
            guidance=guidance if self.transformer.config.guidance_embeds else None,
            joint_attention_kwargs={"context": context, "ids": ids},
            return_dict=False,
        )[0]

    def _embed(self, layer: int, x: Tensor) -> Tensor:
        weight = self.adapter[f"embedding_layer.{layer}.weight"]
        return F.linear(x.to(weight.dtype), weight, self.adapter[f"embedding_layer.{layer}.bias"])


def build_diffusers(mmdit: MMDiT) -> FluxTransformer2DModel:
    """diffusers' transformer without any adapter, its weights views of `mmdit`'s.

    One tensor is a copy: diffusers stores the halves of the final modulation the other way round.
    Raises ValueError for a config that diffusers cannot express.
    """
    config = {key: value for key, value in flux.CONFIG.to_json(mmdit.config).items() if key != "_class_name"}
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(**config)
    base = {n: t for n, t in mmdit.state_dict().items() if not n.startswith(ADAPTER_PREFIX)}
    transformer.load_state_dict(to_official(flux.DIFFUSERS, base), strict=True, assign=True)
    return transformer.eval().requires_grad_(False)


def build_published(
    mmdit: MMDiT, *, lora_scale: float | None = None, bokeh_scale: float | None = None
) -> Published:
    """The published model on the weights of `mmdit` (see `build_diffusers`), adapter included.

    lora_scale, bokeh_scale: strengths in place of the adapter's own. Raises ValueError without an adapter.
    """
    if mmdit.bokeh is None:
        raise ValueError("the published formulation needs an adapter, and this model has none")
    config = mmdit.bokeh.config
    adapter = to_official(PUBLISHED, mmdit.bokeh.state_dict())
    transformer = build_diffusers(mmdit)
    processors: dict[str, PublishedAttention | UnadaptedAttention] = {}
    # diffusers lists its attentions in the order in which the adapter numbers blocks: double, then single.
    for index, name in enumerate(transformer.attn_processors):
        if index not in config.blocks:
            processors[name] = UnadaptedAttention()
            continue
        prefix = f"adapter_modules.{index}."
        processors[name] = PublishedAttention(
            config,
            {n.removeprefix(prefix): t for n, t in adapter.items() if n.startswith(prefix)},
            config.lora_scale if lora_scale is None else lora_scale,
            config.bokeh_scale if bokeh_scale is None else bokeh_scale,
        )
    transformer.set_attn_processor(processors)
    return Published(transformer, adapter)
