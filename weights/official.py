"""The official `config.json` files, read into our configs and written from them.

Nothing is guessed: a key that our networks cannot honour is an error that names the key, as is a missing one.
Where the official classes have a default, an absent key takes it. Bare files of the official models need no
config: their shapes tell it. A `config.json` that says it belongs to another class is not theirs.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from bokehflux.configs import (
    CLIPConfig,
    MMDiTConfig,
    ScheduleConfig,
    T5Config,
    VAEConfig,
)

from .checkpoint import Checkpoint, CheckpointError
from .mapping import Shape, renamed
from .parts import Part
from .tables import flux, vae

Json = Mapping[str, Any]


def read_mmdit_config(part: Part) -> MMDiTConfig:
    """From the `config.json` beside the transformer or, in the BFL layout, from its shapes."""
    checkpoint = part.checkpoint
    config = _own_config(checkpoint, "FluxTransformer2DModel")
    if config is not None:
        return mmdit_config(config, checkpoint.config_path)
    if part.table is flux.BFL:
        return mmdit_config_from_shapes(checkpoint.shapes, checkpoint.path)
    raise _no_config(checkpoint)


def read_vae_config(part: Part) -> VAEConfig:
    """From the `config.json` beside the autoencoder or, in the BFL layout, from its shapes."""
    checkpoint = part.checkpoint
    config = _own_config(checkpoint, "AutoencoderKL")
    if config is not None:
        return vae_config(config, checkpoint.config_path)
    if part.table is vae.BFL:
        return vae_config_from_shapes(checkpoint.shapes, checkpoint.path)
    raise _no_config(checkpoint)


def read_t5_config(part: Part) -> T5Config:
    """From the `config.json` beside the encoder, or from its shapes."""
    config = _own_config(part.checkpoint, "t5")
    if config is not None:
        return t5_config(config, part.checkpoint.config_path)
    return t5_config_from_shapes(renamed(part.table, part.checkpoint.shapes), part.checkpoint.path)


def read_clip_config(part: Part) -> CLIPConfig:
    """From the `config.json` beside the encoder, or from its shapes."""
    config = _own_config(part.checkpoint, "clip_text_model")
    if config is not None:
        return clip_config(config, part.checkpoint.config_path)
    return clip_config_from_shapes(part.checkpoint.shapes, part.checkpoint.path)


def _own_config(checkpoint: Checkpoint, kind: str) -> Json | None:
    """The config beside a checkpoint unless it says that it is another network's."""
    config = checkpoint.config()
    if config is None:
        return None
    declared = config.get("_class_name", config.get("model_type", kind))
    return config if declared == kind else None


def _no_config(checkpoint: Checkpoint) -> CheckpointError:
    return CheckpointError(
        checkpoint.path, "no config.json beside it: add the official one, or pass a config"
    )


_LISTS = ("block_out_channels", "axes_dims_rope", "down_block_types", "up_block_types")


@contextlib.contextmanager
def faults_of(where: object) -> Iterator[None]:
    """What our configs refuse meanwhile is the fault of a file."""
    try:
        yield
    except ValueError as error:
        raise CheckpointError(where, str(error)) from None


def _check(config: Json, where: object, required: tuple[str, ...], fixed: Json) -> None:
    """Raise CheckpointError unless `required` keys are there and `fixed` keys, if there, have their value."""
    problems = [f"key {key!r} is missing" for key in required if key not in config]
    problems += [
        f"{key} = {config[key]!r:.80} is not {'a list' if key in _LISTS else 'a number'}"
        for key in dict.fromkeys((*required, *_LISTS))
        if key in config and not isinstance(config[key], list if key in _LISTS else (int, float))
    ]
    for key, value in fixed.items():
        allowed = value if isinstance(value, tuple) else (value,)
        if key in config and config[key] not in allowed:
            wanted = " or ".join(repr(v) for v in allowed)
            problems.append(f"{key} = {config[key]!r} is not supported, expected {wanted}")
    if problems:
        raise CheckpointError(where, *problems)


def mmdit_config(config: Json, where: object = "transformer config") -> MMDiTConfig:
    """From the config of a diffusers `FluxTransformer2DModel`."""
    required = ("in_channels", "num_layers", "num_single_layers", "attention_head_dim", "num_attention_heads",
                "joint_attention_dim", "pooled_projection_dim", "guidance_embeds")  # fmt: skip
    fixed = {"_class_name": "FluxTransformer2DModel", "patch_size": 1}
    _check(config, where, required, fixed)
    _check(config, where, (), {"out_channels": (None, config["in_channels"])})
    with faults_of(where):
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
        raise CheckpointError(where, f"not a complete FLUX transformer: {error!r} not found") from None
    if head_dim != 128:
        problem = (
            f"head dim {head_dim} does not imply rotary axes (128 does): pass a config or add config.json"
        )
        raise CheckpointError(where, problem)
    with faults_of(where):
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
    """The largest number that follows a prefix, plus one: a gap then shows as missing tensors."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d{1,9})\.")
    count = max((int(m[1]) + 1 for name in shapes if (m := pattern.match(name))), default=0)
    # A network of a billion blocks is not built to say that they are missing.
    return min(count, len(shapes))


def vae_config(config: Json, where: object = "vae config") -> VAEConfig:
    """From the config of a diffusers `AutoencoderKL`."""
    required = ("block_out_channels", "latent_channels", "scaling_factor", "shift_factor")
    fixed = {
        "_class_name": "AutoencoderKL", "act_fn": "silu", "in_channels": 3, "out_channels": 3,
        "mid_block_add_attention": True, "latents_mean": None, "latents_std": None,
    }  # fmt: skip
    _check(config, where, required, fixed)
    # Absent means true here: the older autoencoders have these two convolutions.
    quant = {key: config.get(key, True) for key in ("use_quant_conv", "use_post_quant_conv")}
    _check(quant, where, (), dict.fromkeys(quant, False))
    depth = len(config["block_out_channels"])
    for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if list(config.get(key, [kind] * depth)) != [kind] * depth:
            problem = f"{key} = {config[key]!r} is not supported, expected {depth} x {kind}"
            raise CheckpointError(where, problem)
    with faults_of(where):
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
    """What a BFL `ae.safetensors` says of itself; 16 latent channels imply FLUX's groups, scale and shift."""
    depth = _count(shapes, "encoder.down")
    try:
        channels = tuple(shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(depth))
        latent_channels = shapes["decoder.conv_in.weight"][1]
    except (KeyError, IndexError) as error:
        raise CheckpointError(where, f"not a complete FLUX autoencoder: {error} not found") from None
    if latent_channels != 16:
        problem = f"{latent_channels} latent channels do not imply a scale (16 do)"
        raise CheckpointError(where, f"{problem}: pass a config or add config.json")
    with faults_of(where):
        return VAEConfig(
            channels=channels,
            layers_per_block=_count(shapes, "encoder.down.0.block"),
            latent_channels=latent_channels,
            norm_groups=32,
            scale=0.3611,
            shift=0.1159,
        )


def t5_config(config: Json, where: object = "T5 config") -> T5Config:
    """From the config of a transformers `T5EncoderModel` with v1.1 (gated GELU) blocks."""
    required = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
    fixed = {
        "model_type": "t5", "feed_forward_proj": "gated-gelu", "is_gated_act": True,
        "dense_act_fn": ("gelu_new", "gelu_pytorch_tanh"),
    }  # fmt: skip
    _check(config, where, required, fixed)
    if "feed_forward_proj" not in config and "is_gated_act" not in config:
        problem = "neither feed_forward_proj nor is_gated_act is there: T5 v1.1 with gated GELU is expected"
        raise CheckpointError(where, problem)
    with faults_of(where):
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


def t5_config_from_shapes(shapes: Mapping[str, Shape], where: object) -> T5Config:
    """What a bare T5 encoder says of itself; distance and epsilon are those of every T5 v1.1."""
    block = "encoder.block.0.layer."
    try:
        vocab_size, width = shapes["shared.weight" if "shared.weight" in shapes else _T5_EMBEDDING]
        num_buckets, num_heads = shapes[block + "0.SelfAttention.relative_attention_bias.weight"]
        inner, _ = shapes[block + "0.SelfAttention.q.weight"]
        mlp_size, _ = shapes[block + "1.DenseReluDense.wi_0.weight"]
        head_dim, rest = divmod(inner, num_heads)
        if rest:
            raise ValueError(f"{num_heads} heads in {inner} rows")
    except (KeyError, ValueError, ZeroDivisionError) as error:
        problem = f"not a complete T5 v1.1 encoder, and no config.json of its own: {error!r}"
        raise CheckpointError(where, problem) from None
    with faults_of(where):
        return T5Config(
            vocab_size=vocab_size,
            width=width,
            head_dim=head_dim,
            mlp_size=mlp_size,
            num_layers=_count(shapes, "encoder.block"),
            num_heads=num_heads,
            num_buckets=num_buckets,
        )


_T5_EMBEDDING = "encoder.embed_tokens.weight"


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


def clip_config(config: Json, where: object = "CLIP config") -> CLIPConfig:
    """From the config of a transformers `CLIPTextModel`."""
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "eos_token_id")  # fmt: skip
    _check(config, where, required, {"model_type": "clip_text_model", "hidden_act": "quick_gelu"})
    with faults_of(where):
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


_CLIP_HEAD_DIM = 64
"""Of every published CLIP."""


def clip_config_from_shapes(shapes: Mapping[str, Shape], where: object) -> CLIPConfig:
    """What a bare CLIP text encoder says of itself: 64 channels a head, pooled at the largest id."""
    model = "text_model."
    try:
        vocab_size, width = shapes[model + "embeddings.token_embedding.weight"]
        max_length, _ = shapes[model + "embeddings.position_embedding.weight"]
        mlp_size, _ = shapes[model + "encoder.layers.0.mlp.fc1.weight"]
    except (KeyError, ValueError) as error:
        problem = f"not a complete CLIP text encoder, and no config.json of its own: {error!r}"
        raise CheckpointError(where, problem) from None
    if width % _CLIP_HEAD_DIM:
        problem = f"no config.json beside it, and width {width} does not tell the number of heads"
        raise CheckpointError(where, f"{problem}: add the official one, or pass a config")
    with faults_of(where):
        return CLIPConfig(
            vocab_size=vocab_size,
            width=width,
            mlp_size=mlp_size,
            num_layers=_count(shapes, model + "encoder.layers"),
            num_heads=width // _CLIP_HEAD_DIM,
            max_length=max_length,
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


def schedule_config(config: Json, where: object = "scheduler config") -> ScheduleConfig:
    """From the config of a diffusers `FlowMatchEulerDiscreteScheduler`."""
    off = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas",
           "stochastic_sampling")  # fmt: skip
    fixed = {
        "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift_terminal": None,
        "time_shift_type": "exponential", **dict.fromkeys(off, (False, None)),
    }  # fmt: skip
    _check(config, where, (), fixed)
    with faults_of(where):
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
