"""TAEF1's decoder: its own file, whose names are ours, and diffusers `AutoencoderTiny`.

diffusers counts without the clamp that comes first here, and keeps the encoder in the same file.
"""

from __future__ import annotations

from ..codec import Codec, Field
from ..mapping import Rule, Table

_CONVS, _BLOCKS, _ENCODER_BLOCKS = (
    (1, 7, 12, 17, 19),
    (3, 4, 5, 8, 9, 10, 13, 14, 15, 18),
    (1, 3, 4, 5, 7, 8, 9, 11, 12, 13),
)
_ENCODER_CONVS = (0, 2, 6, 10, 14)
"""Positions of layers with parameters; those of the encoder as diffusers counts them."""

OWN = Table("TAEF1 decoder", marker="19.weight")
DIFFUSERS = Table(
    "TAEF1, diffusers layout",
    marker="decoder.layers.18.weight",
    rules=(
        *(Rule(f"{n}.{{p}}", f"decoder.layers.{n - 1}.{{p}}") for n in _CONVS),
        *(Rule(f"{n}.conv.{{i}}.{{p}}", f"decoder.layers.{n - 1}.conv.{{i}}.{{p}}") for n in _BLOCKS),
    ),
    ignored=frozenset(
        f"encoder.layers.{layer}.{p}"
        for layer in (*_ENCODER_CONVS, *(f"{n}.conv.{i}" for n in _ENCODER_BLOCKS for i in (0, 2, 4)))
        for p in ("weight", "bias")
    ),
)
TABLES = (OWN, DIFFUSERS)
LATENT_CHANNELS = Codec(
    what="TAEF1 decoder for previews",
    build=lambda latent_channels: int(latent_channels),
    fields=(Field("latent_channels", None, lambda s: s.size("1.weight", 1)),),
)
"""All that its shape depends on."""
