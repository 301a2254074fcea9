"""The official `config.json` files, read into our configs and written from them.

Nothing is guessed: a key that our networks cannot honour is an error that names the key, as is a missing one.
Where the official classes have a default, an absent key takes it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from bokehflux.configs import (
    BokehConfig,
    CLIPConfig,
    Defaults,
    MMDiTConfig,
    ScheduleConfig,
    T5Config,
    VAEConfig,
)

from .checkpoint import CheckpointError
from .mapping import Shape

Json = Mapping[str, Any]


def _check(config: Json, what: str, required: tuple[str, ...], fixed: Json) -> None:
    """Raise CheckpointError unless all `required` keys are there and each `fixed` key, if there, has its value."""
    problems = [f"key {key!r} is missing" for key in required if key not in config]
    for key, value in fixed.items():
        allowed = value if isinstance(value, tuple) else (value,)
        if key in config and config[key] not in allowed:
            wanted = " or ".join(repr(v) for v in allowed)
            problems.append(f"{key} = {config[key]!r} is not supported, expected {wanted}")
    if problems:
        raise CheckpointError(f"{what} config", problems)


def mmdit_config(config: Json) -> MMDiTConfig:
    """From the config of a diffusers `FluxTransformer2DModel`."""
    required = ("in_channels", "num_layers", "num_single_layers", "attention_head_dim", "num_attention_heads",
                "joint_attention_dim", "pooled_projection_dim", "guidance_embeds")  # fmt: skip
    fixed = {"_class_name": "FluxTransformer2DModel", "patch_size": 1}
    _check(config, "transformer", required, fixed)
    _check(config, "transformer", (), {"out_channels": (None, config["in_channels"])})
    return MMDiTConfig(
        in_channels=config["in_channels"],
        txt_dim=config["joint_attention_dim"],
        pooled_dim=config["pooled_projection_dim"],
        hidden_size=config["attention_head_dim"] * config["num_attention_heads"],
        num_heads=config["num_attention_heads"],
        num_double=config["num_layers"],
        num_single=config["num_single_layers"],
        axes_dim=tuple(config.get("axes_dims_rope", (16, 56, 56))),
        guidance_embed=config["guidance_embeds"],
    )


def mmdit_config_dict(config: MMDiTConfig) -> dict[str, Any]:
    """The diffusers config. Raises ValueError for what diffusers cannot express."""
    if config.mlp_ratio != 4 or config.theta != 10_000:
        raise ValueError(
            "the diffusers layout fixes mlp_ratio at 4 and theta at 10000, "
            f"got mlp_ratio {config.mlp_ratio}, theta {config.theta}"
        )
    return {
        "_class_name": "FluxTransformer2DModel",
        "attention_head_dim": config.head_dim,
        "axes_dims_rope": list(config.axes_dim),
        "guidance_embeds": config.guidance_embed,
        "in_channels": config.in_channels,
        "joint_attention_dim": config.txt_dim,
        "num_attention_heads": config.num_heads,
        "num_layers": config.num_double,
        "num_single_layers": config.num_single,
        "out_channels": None,
        "patch_size": 1,
        "pooled_projection_dim": config.pooled_dim,
    }


def mmdit_config_from_shapes(shapes: Mapping[str, Shape], where: object) -> MMDiTConfig:
    """What a BFL single file says about itself. Only a head dim of 128 implies its rotary axes."""
    try:
        (hidden, in_channels), (_, txt_dim) = shapes["img_in.weight"], shapes["txt_in.weight"]
        (_, pooled_dim) = shapes["vector_in.in_layer.weight"]
        head_dim = next(s for n, s in shapes.items() if n.endswith("norm.query_norm.scale"))[0]
        mlp_size = _mlp_size(shapes, hidden)
    except (KeyError, StopIteration, ValueError) as error:
        raise CheckpointError(str(where), [f"not a complete FLUX transformer: {error!r} not found"]) from None
    if head_dim != 128:
        problem = f"head dim {head_dim} does not imply the rotary axes (128 does): pass a config or add a config.json"
        raise CheckpointError(str(where), [problem])
    return MMDiTConfig(
        in_channels=in_channels,
        txt_dim=txt_dim,
        pooled_dim=pooled_dim,
        hidden_size=hidden,
        num_heads=hidden // head_dim,
        num_double=_count(shapes, "double_blocks"),
        num_single=_count(shapes, "single_blocks"),
        axes_dim=(16, 56, 56),
        guidance_embed="guidance_in.in_layer.weight" in shapes,
        mlp_ratio=mlp_size / hidden,
    )


def _mlp_size(shapes: Mapping[str, Shape], hidden: int) -> int:
    if "double_blocks.0.img_mlp.0.weight" in shapes:
        return shapes["double_blocks.0.img_mlp.0.weight"][0]
    return shapes["single_blocks.0.linear2.weight"][1] - hidden


def _count(shapes: Mapping[str, Shape], prefix: str) -> int:
    """How many numbers follow a prefix (at least the largest plus one, so that a gap shows as missing tensors)."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return max((int(m[1]) + 1 for name in shapes if (m := pattern.match(name))), default=0)


def vae_config(config: Json) -> VAEConfig:
    """From the config of a diffusers `AutoencoderKL`."""
    required = ("block_out_channels", "latent_channels", "scaling_factor", "shift_factor")
    fixed = {
        "_class_name": "AutoencoderKL", "act_fn": "silu", "in_channels": 3, "out_channels": 3,
        "mid_block_add_attention": True, "latents_mean": None, "latents_std": None,
    }  # fmt: skip
    _check(config, "vae", required, fixed)
    # Absent means true here: the older autoencoders have these two convolutions.
    quant = {key: config.get(key, True) for key in ("use_quant_conv", "use_post_quant_conv")}
    _check(quant, "vae", (), dict.fromkeys(quant, False))
    depth = len(config["block_out_channels"])
    for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if list(config.get(key, [kind] * depth)) != [kind] * depth:
            problem = f"{key} = {config[key]!r} is not supported, expected {depth} x {kind}"
            raise CheckpointError("vae config", [problem])
    return VAEConfig(
        channels=tuple(config["block_out_channels"]),
        layers_per_block=config.get("layers_per_block", 1),
        latent_channels=config["latent_channels"],
        norm_groups=config.get("norm_num_groups", 32),
        scale=config["scaling_factor"],
        shift=config["shift_factor"],
    )


def vae_config_dict(config: VAEConfig) -> dict[str, Any]:
    depth = len(config.channels)
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(config.channels),
        "down_block_types": ["DownEncoderBlock2D"] * depth,
        "force_upcast": True,
        "in_channels": 3,
        "latent_channels": config.latent_channels,
        "latents_mean": None,
        "latents_std": None,
        "layers_per_block": config.layers_per_block,
        "mid_block_add_attention": True,
        "norm_num_groups": config.norm_groups,
        "out_channels": 3,
        "scaling_factor": config.scale,
        "shift_factor": config.shift,
        "up_block_types": ["UpDecoderBlock2D"] * depth,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    }


def vae_config_from_shapes(shapes: Mapping[str, Shape], where: object) -> VAEConfig:
    """What a BFL `ae.safetensors` says about itself; 16 latent channels imply FLUX's groups, scale and shift."""
    depth = _count(shapes, "encoder.down")
    try:
        channels = tuple(shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(depth))
        latent_channels = shapes["decoder.conv_in.weight"][1]
    except (KeyError, IndexError) as error:
        raise CheckpointError(str(where), [f"not a complete FLUX autoencoder: {error} not found"]) from None
    if latent_channels != 16:
        problem = f"{latent_channels} latent channels do not imply their scale (16 do): pass a config or add config.json"
        raise CheckpointError(str(where), [problem])
    return VAEConfig(
        channels=channels,
        layers_per_block=_count(shapes, "encoder.down.0.block"),
        latent_channels=latent_channels,
        norm_groups=32,
        scale=0.3611,
        shift=0.1159,
    )


def t5_config(config: Json) -> T5Config:
    """From the config of a transformers `T5EncoderModel` with v1.1 (gated GELU) blocks."""
    required = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
    fixed = {
        "model_type": "t5", "feed_forward_proj": "gated-gelu", "is_gated_act": True,
        "dense_act_fn": ("gelu_new", "gelu_pytorch_tanh"),
    }  # fmt: skip
    _check(config, "T5", required, fixed)
    if "feed_forward_proj" not in config and "is_gated_act" not in config:
        problem = "neither feed_forward_proj nor is_gated_act is there: T5 v1.1 with gated GELU is expected"
        raise CheckpointError("T5 config", [problem])
    return T5Config(
        vocab_size=config["vocab_size"],
        width=config["d_model"],
        head_dim=config["d_kv"],
        mlp_size=config["d_ff"],
        num_layers=config["num_layers"],
        num_heads=config["num_heads"],
        num_buckets=config.get("relative_attention_num_buckets", 32),
        max_distance=config.get("relative_attention_max_distance", 128),
        eps=config.get("layer_norm_epsilon", 1e-6),
    )


def t5_config_dict(config: T5Config) -> dict[str, Any]:
    return {
        "architectures": ["T5EncoderModel"],
        "d_ff": config.mlp_size,
        "d_kv": config.head_dim,
        "d_model": config.width,
        "decoder_start_token_id": 0,
        "dense_act_fn": "gelu_new",
        "dropout_rate": 0.1,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "is_gated_act": True,
        "layer_norm_epsilon": config.eps,
        "model_type": "t5",
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "pad_token_id": 0,
        "relative_attention_max_distance": config.max_distance,
        "relative_attention_num_buckets": config.num_buckets,
        "tie_word_embeddings": False,
        "vocab_size": config.vocab_size,
    }


def clip_config(config: Json) -> CLIPConfig:
    """From the config of a transformers `CLIPTextModel`."""
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "eos_token_id")  # fmt: skip
    _check(config, "CLIP", required, {"model_type": "clip_text_model", "hidden_act": "quick_gelu"})
    return CLIPConfig(
        vocab_size=config["vocab_size"],
        width=config["hidden_size"],
        mlp_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        max_length=config.get("max_position_embeddings", 77),
        eos_token_id=config["eos_token_id"],
        eps=config.get("layer_norm_eps", 1e-5),
    )


def clip_config_dict(config: CLIPConfig) -> dict[str, Any]:
    return {
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": config.eos_token_id,
        "hidden_act": "quick_gelu",
        "hidden_size": config.width,
        "intermediate_size": config.mlp_size,
        "layer_norm_eps": config.eps,
        "max_position_embeddings": config.max_length,
        "model_type": "clip_text_model",
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "pad_token_id": 1,
        "projection_dim": config.width,
        "vocab_size": config.vocab_size,
    }


def schedule_config(config: Json) -> ScheduleConfig:
    """From the config of a diffusers `FlowMatchEulerDiscreteScheduler`."""
    off = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas", "stochastic_sampling")
    fixed = {
        "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift_terminal": None,
        "time_shift_type": "exponential", **dict.fromkeys(off, (False, None)),
    }  # fmt: skip
    _check(config, "scheduler", (), fixed)
    return ScheduleConfig(
        dynamic=config.get("use_dynamic_shifting", False),
        shift=config.get("shift", 1.0),
        base_tokens=config.get("base_image_seq_len", 256),
        max_tokens=config.get("max_image_seq_len", 4096),
        base_shift=config.get("base_shift", 0.5),
        max_shift=config.get("max_shift", 1.15),
    )


def schedule_config_dict(config: ScheduleConfig) -> dict[str, Any]:
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "base_image_seq_len": config.base_tokens,
        "base_shift": config.base_shift,
        "max_image_seq_len": config.max_tokens,
        "max_shift": config.max_shift,
        "num_train_timesteps": 1000,
        "shift": config.shift,
        "use_dynamic_shifting": config.dynamic,
    }


def bokeh_config(
    config: Json | None, shapes: Mapping[str, Shape], mmdit: MMDiTConfig, where: object = "adapter"
) -> BokehConfig:
    """The adapter's shape as its tensors tell it, with the strengths of its `config.json`, if it has one.

    Every disagreement between the two, or with the transformer, is reported in one CheckpointError.
    """
    found, problems = _bokeh_shape(shapes, mmdit)
    if found and config is not None:
        problems += _bokeh_conflicts(config, found, mmdit)
    if problems or not found:
        raise CheckpointError(str(where), problems)
    settings = config or {}
    return BokehConfig(
        **found,
        alpha=settings.get("lora_alpha"),
        lora_scale=settings.get("lora_scale", 1.0),
        bokeh_scale=settings.get("bokeh_scale", 1.0),
    )


def _bokeh_shape(shapes: Mapping[str, Shape], mmdit: MMDiTConfig) -> tuple[dict[str, Any], list[str]]:
    needed = ("embedding_layer.0.weight", "embedding_layer.2.weight")
    pattern = re.compile(r"adapter_modules\.(\d+)\.(\w+)\.down\.weight")
    downs = {(int(m[1]), m[2]): shape for name, shape in shapes.items() if (m := pattern.fullmatch(name))}
    if any(name not in shapes for name in needed) or not downs:
        some = ", ".join(sorted(shapes)[:3]) or "nothing"
        return {}, [f"not a bokeh adapter: expected {needed[0]!r} and 'adapter_modules.*', found {some}"]
    blocks = tuple(sorted({i for i, _ in downs}))
    problems = []
    if blocks[-1] >= mmdit.num_blocks:
        problems.append(f"made for a larger model: it adapts block {blocks[-1]}, this one has {mmdit.num_blocks}")
    widths = {shape[1] for (_, kind), shape in downs.items() if kind in ("to_q_adp", "to_k_adp")}
    if widths - {mmdit.hidden_size}:
        problems.append(f"made for a model of width {max(widths - {mmdit.hidden_size})}, this one has {mmdit.hidden_size}")
    found = {
        "blocks": blocks,
        "rank": next(iter(downs.values()))[0],
        "hidden_dim": shapes[needed[0]][0],
        "context_dim": shapes[needed[1]][0],
        "adapt_q": any(kind == "to_q_adp" for _, kind in downs),
        "adapt_k": any(kind == "to_k_adp" for _, kind in downs),
    }
    return found, problems


def _bokeh_conflicts(config: Json, found: Json, mmdit: MMDiTConfig) -> list[str]:
    facts = {
        "lora_rank": found["rank"],
        "unfreeze_q": found["adapt_q"],
        "unfreeze_k": found["adapt_k"],
        "bokeh_hidden_dim": found["hidden_dim"],
        "bokeh_context_dim": found["context_dim"],
        "bokeh_input_dim": 1,
        "attn_hidden_dim": mmdit.hidden_size,
    }
    problems = [
        f"config.json says {key} = {config[key]!r}, the tensors say {value!r}"
        for key, value in facts.items()
        if key in config and config[key] != value
    ]
    if config.get("blocks") is not None:
        try:
            blocks = {_block_index(name, mmdit) for name in config["blocks"]}
        except ValueError as error:
            return [*problems, str(error)]
        if blocks != set(found["blocks"]):
            without, extra = sorted(blocks - set(found["blocks"])), sorted(set(found["blocks"]) - blocks)
            problems.append(
                f"config.json and tensors adapt different blocks: named without tensors {without}, "
                f"tensors without name {extra}"
            )
    return problems


_BLOCK_NAME = re.compile(r"(single_)?transformer_blocks\.(\d+)(\.attn.*)?")


def _block_index(name: str, mmdit: MMDiTConfig) -> int:
    """`transformer_blocks.3` -> 3, `single_transformer_blocks.7` -> num_double + 7."""
    match = _BLOCK_NAME.fullmatch(name)
    if not match:
        raise ValueError(f"config.json names block {name!r}, expected [single_]transformer_blocks.N")
    limit = mmdit.num_single if match[1] else mmdit.num_double
    if int(match[2]) >= limit:
        raise ValueError(f"config.json names block {name!r}, this model has only {limit} of that kind")
    return int(match[2]) + (mmdit.num_double if match[1] else 0)


def bokeh_config_dict(config: BokehConfig, mmdit: MMDiTConfig) -> dict[str, Any]:
    """The published adapter's `config.json`."""
    double = mmdit.num_double
    return {
        "attn_hidden_dim": mmdit.hidden_size,
        "blocks": [
            f"transformer_blocks.{i}" if i < double else f"single_transformer_blocks.{i - double}"
            for i in config.blocks
        ],
        "bokeh_context_dim": config.context_dim,
        "bokeh_hidden_dim": config.hidden_dim,
        "bokeh_input_dim": 1,
        "bokeh_scale": config.bokeh_scale,
        "lora_alpha": config.alpha,
        "lora_rank": config.rank,
        "lora_scale": config.lora_scale,
        "unfreeze_k": config.adapt_k,
        "unfreeze_q": config.adapt_q,
    }


def default_card(guidance_embed: bool) -> Defaults:
    """The publishers' settings: 30 steps for guidance-distilled models, 4 for schnell; both at 512x512."""
    if guidance_embed:
        return Defaults(num_inference_steps=30, height_px=512, width_px=512, txt_length=512)
    return Defaults(num_inference_steps=4, height_px=512, width_px=512, txt_length=256)


def card(config: Json, guidance_embed: bool) -> Defaults:
    """From a `bokehflux.json`: any of num_inference_steps, height, width, txt_length; the rest by default."""
    known = {"num_inference_steps", "height", "width", "txt_length", "adapter"}
    problems = [f"unknown key {key!r}, expected some of {sorted(known)}" for key in config if key not in known]
    problems += [
        f"{key} must be a positive whole number, got {config[key]!r}"
        for key in sorted(known - {"adapter"})
        if key in config and not (type(config[key]) is int and config[key] > 0)
    ]
    if "adapter" in config and not isinstance(config["adapter"], str):
        problems.append(f"adapter must name a folder, got {config['adapter']!r}")
    if problems:
        raise CheckpointError("bokehflux.json", problems)
    default = default_card(guidance_embed)
    return Defaults(
        num_inference_steps=config.get("num_inference_steps", default.num_inference_steps),
        height_px=config.get("height", default.height_px),
        width_px=config.get("width", default.width_px),
        txt_length=config.get("txt_length", default.txt_length),
    )
