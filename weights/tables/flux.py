"""The MMDiT: BFL single files, whose names are ours, and diffusers `FluxTransformer2DModel`."""

from __future__ import annotations

from typing import Any

from bokehflux.configs import MMDiTConfig

from ..codec import Codec, Field, Json, Shapes, numbers
from ..mapping import SWAP_HALVES, Rule, Table, concat

_D, _S = "transformer_blocks.{i}.", "single_transformer_blocks.{i}."

_NORMS = tuple(
    f"{layer}.{norm}"
    for layer in (
        "double_blocks.{i}.img_attn.norm",
        "double_blocks.{i}.txt_attn.norm",
        "single_blocks.{i}.norm",
    )
    for norm in ("query_norm", "key_norm")
)

BFL = Table(
    "FLUX transformer, BFL layout",
    marker="final_layer.adaLN_modulation.1.weight",
    # ComfyUI writes `weight` since 0.14.
    rules=tuple(Rule(f"{norm}.scale", f"{norm}.scale", tied=(f"{norm}.weight",)) for norm in _NORMS),
)

DIFFUSERS = Table(
    "FLUX transformer, diffusers layout",
    marker="norm_out.linear.weight",
    needs_config=True,
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

TABLES = (DIFFUSERS, BFL)
_IMAGE_INPUTS = {384: "FLUX.1 Fill", 128: "FLUX.1 Canny or Depth"}


def _head_dim(s: Shapes) -> int:
    scale = "double_blocks.0.img_attn.norm.query_norm.scale"
    head_dim = s.size(next((name for name in s if name.endswith("norm.query_norm.scale")), scale))
    if head_dim != 128:
        raise ValueError(
            f"head dim {head_dim} does not imply rotary axes (128 does): pass a config or add config.json"
        )
    return head_dim


def _mlp_ratio(s: Shapes) -> float:
    width = s.size("img_in.weight")
    if "double_blocks.0.img_mlp.0.weight" in s:
        return s.size("double_blocks.0.img_mlp.0.weight") / width
    return (s.size("single_blocks.0.linear2.weight", 1) - width) / width


def image_input(channels: int, out_channels: int) -> str | None:
    """What a transformer is that takes more channels than it returns."""
    if channels <= out_channels:
        return None
    what = _IMAGE_INPUTS.get(channels, "a variant of FLUX.1")
    sizes = f"(in_channels = {channels}, out_channels = {out_channels})"
    return f"{what} {sizes}, which needs an image as input: not supported"


def _faults(config: Json) -> list[str]:
    taken, given = config.get("in_channels"), config.get("out_channels")
    problem = image_input(taken, given) if isinstance(taken, int) and isinstance(given, int) else None
    return [f"it is {problem}"] if problem else []


def _config(head_dim: Any, num_heads: Any, **fields: Any) -> MMDiTConfig:
    return MMDiTConfig(hidden_size=head_dim * num_heads, num_heads=num_heads, **fields)


CONFIG = Codec(
    what="FLUX transformer",
    build=_config,
    fields=(
        Field("in_channels", "in_channels", lambda s: s.size("img_in.weight", 1)),
        Field("txt_dim", "joint_attention_dim", lambda s: s.size("txt_in.weight", 1)),
        Field("pooled_dim", "pooled_projection_dim", lambda s: s.size("vector_in.in_layer.weight", 1)),
        Field("head_dim", "attention_head_dim", _head_dim),
        Field("num_heads", "num_attention_heads", lambda s: s.size("img_in.weight") // _head_dim(s)),
        Field("num_double", "num_layers", lambda s: s.count("double_blocks")),
        Field("num_single", "num_single_layers", lambda s: s.count("single_blocks")),
        Field("axes_dim", "axes_dims_rope", lambda s: (16, 56, 56), absent=[16, 56, 56], read=numbers),
        Field("guidance_embed", "guidance_embeds", lambda s: "guidance_in.in_layer.weight" in s),
        Field("mlp_ratio", None, _mlp_ratio),
    ),
    fixed={"_class_name": "FluxTransformer2DModel", "patch_size": 1},
    implied=lambda config: {"out_channels": (None, config.in_channels)},
    faults=_faults,
)
