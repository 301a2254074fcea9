"""The autoencoder: BFL `ae.safetensors`, whose names are ours, and diffusers `AutoencoderKL`."""

from __future__ import annotations

from bokehflux.configs import VAEConfig

from ..codec import Codec, Field, Json, Shapes, numbers, refused
from ..mapping import LINEAR_TO_CONV, Rule, Table

BFL = Table("FLUX autoencoder, BFL layout", marker="decoder.mid.block_1.conv1.weight")


def _residual(ours: str, theirs: str) -> tuple[Rule, ...]:
    layers = ("norm1", "conv1", "norm2", "conv2")
    same = (Rule(f"{ours}.{layer}.{{p}}", f"{theirs}.{layer}.{{p}}") for layer in layers)
    return (*same, Rule(f"{ours}.nin_shortcut.{{p}}", f"{theirs}.conv_shortcut.{{p}}"))


def _attention(side: str) -> tuple[Rule, ...]:
    ours, theirs = f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0"
    names = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
    weights = (Rule(f"{ours}.{a}.weight", f"{theirs}.{b}.weight", LINEAR_TO_CONV) for a, b in names.items())
    biases = (Rule(f"{ours}.{a}.bias", f"{theirs}.{b}.bias") for a, b in names.items())
    return (*weights, *biases, Rule(f"{ours}.norm.{{p}}", f"{theirs}.group_norm.{{p}}"))


def _both_sides(side: str) -> tuple[Rule, ...]:
    return (
        *_residual(f"{side}.mid.block_1", f"{side}.mid_block.resnets.0"),
        *_residual(f"{side}.mid.block_2", f"{side}.mid_block.resnets.1"),
        *_attention(side),
        Rule(f"{side}.norm_out.{{p}}", f"{side}.conv_norm_out.{{p}}"),
    )


DIFFUSERS = Table(
    "FLUX autoencoder, diffusers layout",
    marker="decoder.mid_block.resnets.0.conv1.weight",
    rules=(
        *_both_sides("encoder"),
        *_residual("encoder.down.{i}.block.{j}", "encoder.down_blocks.{i}.resnets.{j}"),
        Rule("encoder.down.{i}.downsample.conv.{p}", "encoder.down_blocks.{i}.downsamplers.0.conv.{p}"),
        *_both_sides("decoder"),
        # BFL numbers resolutions from the finest, diffusers in the order in which the decoder runs.
        *_residual("decoder.up.{i}.block.{j}", "decoder.up_blocks.{ri}.resnets.{j}"),
        Rule("decoder.up.{i}.upsample.conv.{p}", "decoder.up_blocks.{ri}.upsamplers.0.conv.{p}"),
    ),
)

TABLES = (DIFFUSERS, BFL)


def _channels(s: Shapes) -> tuple[int, ...]:
    return tuple(s.size(f"encoder.down.{i}.block.0.conv1.weight") for i in range(s.count("encoder.down")))


def _latent_channels(s: Shapes) -> int:
    channels = s.size("decoder.conv_in.weight", 1)
    if channels != 16:  # which imply FLUX's groups, scale and shift
        problem = f"{channels} latent channels do not imply a scale (16 do)"
        raise ValueError(f"{problem}: pass a config or add config.json")
    return channels


_SD3_SCALE = 1.5305


def _faults(config: Json) -> list[str]:
    # An absent key means true: the older autoencoders have these two convolutions.
    problems = refused(_NO_QUANT, {**dict.fromkeys(_NO_QUANT, True), **config})
    if config.get("scaling_factor") == _SD3_SCALE:
        problems.append(f"scaling_factor = {_SD3_SCALE}: the autoencoder of Stable Diffusion 3, not FLUX.1's")
    return problems


_NO_QUANT = {"use_quant_conv": False, "use_post_quant_conv": False}

CONFIG = Codec(
    what="FLUX autoencoder",
    build=VAEConfig,
    fields=(
        Field("channels", "block_out_channels", _channels, read=numbers),
        Field("layers_per_block", "layers_per_block", lambda s: s.count("encoder.down.0.block"), absent=1),
        Field("latent_channels", "latent_channels", _latent_channels),
        Field("norm_groups", "norm_num_groups", lambda s: 32, absent=32),
        Field("scale", "scaling_factor", lambda s: 0.3611),
        Field("shift", "shift_factor", lambda s: 0.1159),
    ),
    fixed={
        "_class_name": "AutoencoderKL", "act_fn": "silu", "in_channels": 3, "out_channels": 3,
        "mid_block_add_attention": True, "latents_mean": None, "latents_std": None,
    },
    implied=lambda config: {
        "down_block_types": ["DownEncoderBlock2D"] * len(config.channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(config.channels),
    },
    extra=lambda config: {"force_upcast": True, **_NO_QUANT},
    faults=_faults,
)  # fmt: skip
