"""The autoencoder: BFL `ae.safetensors`, whose names are ours, and diffusers `AutoencoderKL`."""

from __future__ import annotations

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

TABLES = (BFL, DIFFUSERS)
