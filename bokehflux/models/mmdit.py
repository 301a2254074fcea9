"""FLUX.1's multimodal diffusion transformer, with the bokeh adapter built in when its config is given."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bokehflux.attention import AttentionSpec, Plain, with_value_bias
from bokehflux.configs import BokehConfig, MMDiTConfig
from bokehflux.models.blocks import DoubleStreamBlock, FinalLayer, SingleStreamBlock
from bokehflux.models.bokeh import BlockAdapter, BokehAdapter, BokehCondition
from bokehflux.models.embeddings import SINUSOID_DIM, MLPEmbedder, RopeTable, sinusoid
from bokehflux.models.linear import Linear


class MMDiT(nn.Module):
    """Velocity prediction on packed latent tokens, conditioned on text, noise level, guidance and bokeh.

    Parameter names equal the BFL checkpoint's; the adapter's live under `bokeh.` with the published names.
    """

    def __init__(self, config: MMDiTConfig, bokeh: BokehConfig | None = None) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.img_in = Linear(config.in_channels, width)
        self.txt_in = Linear(config.txt_dim, width)
        self.time_in = MLPEmbedder(SINUSOID_DIM, width)
        self.vector_in = MLPEmbedder(config.pooled_dim, width)
        self.guidance_in = MLPEmbedder(SINUSOID_DIM, width) if config.guidance_embed else None
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(config) for _ in range(config.num_double))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(config) for _ in range(config.num_single))
        self.final_layer = FinalLayer(config)
        self.bokeh = BokehAdapter(bokeh, config) if bokeh is not None else None

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in; weights may be stored narrower."""
        return self.img_in.bias.dtype

    @property
    def device(self) -> torch.device:
        return self.img_in.weight.device

    def condition(self, pooled: Tensor, sigma: Tensor, guidance: Tensor | None) -> Tensor:
        """pooled [B, P], sigma [B] in 0-1, guidance [B] -> the vector [B, E] that drives every modulation."""
        vec = self.time_in(sinusoid(sigma.to(self.dtype)).to(self.dtype))
        if self.guidance_in is not None:
            if guidance is None:
                raise ValueError("this model is guidance-distilled: guidance [B] is required")
            vec = vec + self.guidance_in(sinusoid(guidance.to(self.dtype)).to(self.dtype))
        return vec + self.vector_in(pooled)

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        pooled: Tensor,
        sigma: Tensor,
        guidance: Tensor | None,
        rope: RopeTable,
        attention: AttentionSpec | None = None,
        bokeh: BokehCondition | None = None,
    ) -> Tensor:
        """Predict the velocity (noise - data).

        img [B, N, 64] packed latents; txt [B, T, W] T5 states; pooled [B, P]; sigma [B] noise level in 0-1;
        guidance [B] (ignored by models without guidance embedding); rope: table of T text then N image
        tokens; attention: specification of the joint attentions, plain by default; bokeh: levels of the
        B rows, None for the base model alone. With levels, blocks that the adapter leaves alone attend
        plainly whatever the specification (as published). Returns [B, N, 64].
        Raises ValueError for levels without an adapter or a missing guidance.
        """
        if bokeh is not None and self.bokeh is None:
            raise ValueError("bokeh levels need an adapter, and this model was loaded without one")
        spec = attention if attention is not None else Plain()
        parts = self._block_terms(spec, bokeh)

        vec = self.condition(pooled, sigma, guidance)
        img, txt = self.img_in(img), self.txt_in(txt)
        for block, part in zip(self.double_blocks, parts[: len(self.double_blocks)], strict=True):
            img, txt = block(img, txt, vec, rope, *part)
        x = torch.cat([txt, img], dim=1)
        for block, part in zip(self.single_blocks, parts[len(self.double_blocks) :], strict=True):
            x = block(x, vec, rope, *part)
        return self.final_layer(x[:, txt.shape[1] :], vec)

    def _block_terms(
        self, spec: AttentionSpec, bokeh: BokehCondition | None
    ) -> list[tuple[AttentionSpec, BlockAdapter | None, float]]:
        """For every block: its attention specification, its adapter, and the strength of the latter."""
        if bokeh is None or self.bokeh is None:
            return [(spec, None, 1.0)] * self.config.num_blocks
        config = self.bokeh.config
        bokeh_scale = config.bokeh_scale if bokeh.bokeh_scale is None else bokeh.bokeh_scale
        lora_scale = config.lora_scale if bokeh.lora_scale is None else bokeh.lora_scale
        values = self.bokeh.values(bokeh.model_input(self.device, self.dtype), bokeh_scale)
        terms: list[tuple[AttentionSpec, BlockAdapter | None, float]] = [
            (Plain(), None, 1.0)
        ] * self.config.num_blocks
        for i, value in values.items():
            terms[i] = (with_value_bias(spec, value), self.bokeh.block(i), lora_scale)
        return terms
