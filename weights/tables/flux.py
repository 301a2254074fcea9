"""The MMDiT: BFL single files, whose names are ours, and diffusers `FluxTransformer2DModel`."""

from __future__ import annotations

from ..mapping import SWAP_HALVES, Rule, Table, concat

_D, _S = "transformer_blocks.{i}.", "single_transformer_blocks.{i}."

BFL = Table("FLUX transformer, BFL layout", marker="final_layer.adaLN_modulation.1.weight")

DIFFUSERS = Table(
    "FLUX transformer, diffusers layout",
    marker="norm_out.linear.weight",
    rules=(
        Rule("img_in.{p}", "x_embedder.{p}"),
        Rule("txt_in.{p}", "context_embedder.{p}"),
        Rule("time_in.in_layer.{p}", "time_text_embed.timestep_embedder.linear_1.{p}"),
        Rule("time_in.out_layer.{p}", "time_text_embed.timestep_embedder.linear_2.{p}"),
        Rule("guidance_in.in_layer.{p}", "time_text_embed.guidance_embedder.linear_1.{p}"),
        Rule("guidance_in.out_layer.{p}", "time_text_embed.guidance_embedder.linear_2.{p}"),
        Rule("vector_in.in_layer.{p}", "time_text_embed.text_embedder.linear_1.{p}"),
        Rule("vector_in.out_layer.{p}", "time_text_embed.text_embedder.linear_2.{p}"),
        Rule("double_blocks.{i}.img_mod.lin.{p}", _D + "norm1.linear.{p}"),
        Rule("double_blocks.{i}.txt_mod.lin.{p}", _D + "norm1_context.linear.{p}"),
        Rule(
            "double_blocks.{i}.img_attn.qkv.{p}",
            (_D + "attn.to_q.{p}", _D + "attn.to_k.{p}", _D + "attn.to_v.{p}"),
            concat(1, 1, 1),
        ),
        Rule(
            "double_blocks.{i}.txt_attn.qkv.{p}",
            (_D + "attn.add_q_proj.{p}", _D + "attn.add_k_proj.{p}", _D + "attn.add_v_proj.{p}"),
            concat(1, 1, 1),
        ),
        Rule("double_blocks.{i}.img_attn.norm.query_norm.scale", _D + "attn.norm_q.weight"),
        Rule("double_blocks.{i}.img_attn.norm.key_norm.scale", _D + "attn.norm_k.weight"),
        Rule("double_blocks.{i}.txt_attn.norm.query_norm.scale", _D + "attn.norm_added_q.weight"),
        Rule("double_blocks.{i}.txt_attn.norm.key_norm.scale", _D + "attn.norm_added_k.weight"),
        Rule("double_blocks.{i}.img_attn.proj.{p}", _D + "attn.to_out.0.{p}"),
        Rule("double_blocks.{i}.txt_attn.proj.{p}", _D + "attn.to_add_out.{p}"),
        Rule("double_blocks.{i}.img_mlp.0.{p}", _D + "ff.net.0.proj.{p}"),
        Rule("double_blocks.{i}.img_mlp.2.{p}", _D + "ff.net.2.{p}"),
        Rule("double_blocks.{i}.txt_mlp.0.{p}", _D + "ff_context.net.0.proj.{p}"),
        Rule("double_blocks.{i}.txt_mlp.2.{p}", _D + "ff_context.net.2.{p}"),
        Rule("single_blocks.{i}.modulation.lin.{p}", _S + "norm.linear.{p}"),
        # diffusers fixes the MLP at four times the width.
        Rule(
            "single_blocks.{i}.linear1.{p}",
            (_S + "attn.to_q.{p}", _S + "attn.to_k.{p}", _S + "attn.to_v.{p}", _S + "proj_mlp.{p}"),
            concat(1, 1, 1, 4),
        ),
        Rule("single_blocks.{i}.linear2.{p}", _S + "proj_out.{p}"),
        Rule("single_blocks.{i}.norm.query_norm.scale", _S + "attn.norm_q.weight"),
        Rule("single_blocks.{i}.norm.key_norm.scale", _S + "attn.norm_k.weight"),
        # diffusers: (scale, shift); BFL: (shift, scale).
        Rule("final_layer.adaLN_modulation.1.{p}", "norm_out.linear.{p}", SWAP_HALVES),
        Rule("final_layer.linear.{p}", "proj_out.{p}"),
    ),
)

TABLES = (BFL, DIFFUSERS)
