"""The shapes of every network, as frozen dataclasses: what a checkpoint must state, nothing that a run sets.

Each class checks itself when it is built, so a wrong combination never reaches a network. The presets at the
end are the official models; for other models `bokehflux.weights` builds the same classes from `config.json`.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import Any

MAX_LAYERS = 1000
"""A config with more layers is refused; the largest published network has 57 blocks. A limit keeps a hostile
config file from making us build layers without end."""
GROUNDED_SHARE = 0.8
"""The share of grounded steps when a pivot is given without their number (published: 24 of 30)."""
MAX_SIDE_PX = 16_383
"""The largest side that every picture format can hold (WebP's limit)."""
MAX_STEPS = 10_000
"""The most denoising steps that a run or a model's card may ask for."""
MAX_TXT_LENGTH = 65_536
"""T5 tokens of a prompt."""


def check_fields(config: Any) -> None:
    """Raise ValueError unless every number of a config has its declared type and a possible value.

    Whole numbers must be positive, except for the counts and ids in `_MAY_BE_ZERO`; floats must be finite.
    """
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), str(field.type)
        if value is None and kind.endswith("| None"):
            continue
        if kind == "bool":
            good, wanted = isinstance(value, bool), "true or false"
        elif kind == "int":
            least = 0 if field.name in _MAY_BE_ZERO else 1
            most = MAX_LAYERS if field.name in _LAYERS else 2**31 - 1
            good, wanted = _whole(value, least, most), f"a whole number from {least} to {most}"
        elif kind.startswith("tuple"):
            good = isinstance(value, tuple) and all(_whole(v, 0, 2**31 - 1) for v in value)
            good, wanted = (
                good and 0 < len(value) <= MAX_LAYERS,
                f"a list of whole numbers, none of them negative, 1 to {MAX_LAYERS} of them",
            )
        else:
            good, wanted = _finite(value), "a finite number"
        if not good:
            raise ValueError(f"{field.name} must be {wanted}, got {value!r:.80}")


_LAYERS = frozenset({"num_double", "num_single", "num_layers", "layers_per_block"})
_MAY_BE_ZERO = frozenset({"num_double", "num_single", "num_layers", "eos_token_id"})


def _whole(value: object, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _finite(value: object) -> bool:
    # Compared, not converted: a whole number may be too large for a float.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


@dataclass(frozen=True, kw_only=True)
class MMDiTConfig:
    """The shape of a FLUX.1 multimodal diffusion transformer (BFL `FluxParams`)."""

    in_channels: int
    """Channels of a packed image token, in and out: latent channels x 2 x 2."""
    txt_dim: int
    """Width of the T5 states."""
    pooled_dim: int
    """Width of the CLIP pooled vector."""
    hidden_size: int
    """Width of both streams: num_heads x head_dim."""
    num_heads: int
    num_double: int
    """How many blocks give image and text weights of their own."""
    num_single: int
    """How many blocks work on the concatenated sequence."""
    axes_dim: tuple[int, ...]
    """How many channels of a head rotate with position axis 0, 1 and 2: all even, their sum is head_dim."""
    guidance_embed: bool
    """Whether the network takes guidance as an input: True for dev, False for schnell."""
    mlp_ratio: float = 4.0
    theta: int = 10_000
    """Base of the rotary frequencies."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}")
        if sum(self.axes_dim) != self.head_dim or any(d % 2 for d in self.axes_dim):
            raise ValueError(
                f"axes_dim must be even and sum to the head dim {self.head_dim}, got {self.axes_dim} "
                f"(sum {sum(self.axes_dim)})"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def mlp_size(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def num_blocks(self) -> int:
        return self.num_double + self.num_single


@dataclass(frozen=True, kw_only=True)
class BokehConfig:
    """The shape and strength of a bokeh adapter (the `config.json` beside its weights)."""

    blocks: tuple[int, ...]
    """The adapted blocks, ascending, counted over double then single blocks (0 ... num_blocks - 1)."""
    rank: int
    """Rank of its low-rank layers."""
    hidden_dim: int = 64
    """Width of the hidden layer that embeds the level."""
    context_dim: int = 768
    """Width of the embedded level."""
    alpha: float | None = None
    """Outputs of low-rank layers are multiplied by alpha / rank; None: by one."""
    adapt_q: bool = True
    """Whether queries get a low-rank update (published: unfreeze_q)."""
    adapt_k: bool = True
    """Whether keys get a low-rank update (published: unfreeze_k)."""
    lora_scale: float = 1.0
    """Default strength of the query and key updates."""
    bokeh_scale: float = 1.0
    """Default strength of the level's value vector."""

    def __post_init__(self) -> None:
        check_fields(self)
        if list(self.blocks) != sorted(set(self.blocks)):
            raise ValueError(f"blocks must be ascending and distinct, got {self.blocks}")

    @property
    def low_rank_scale(self) -> float:
        """The factor on outputs of low-rank layers."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """The shape of a reference adapter, which adapts every block."""

    rank: int = 32
    """Rank of its low-rank layers."""
    width: int = 256
    """Hidden width of the MLP after a block."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class ControlsConfig:
    """The shape of a control adapter, which acts in every block."""

    rank: int = 32
    """Rank of its low-rank layers."""
    hidden_dim: int = 128
    """Width of the hidden layers that embed what is asked for."""
    context_dim: int = 128
    """Width of what is embedded."""
    tokens: int = 4
    """Context tokens for the focus plane, and as many for the aperture."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class T5Config:
    """The shape of a T5 v1.1 encoder (gated GELU, relative position bias in the first block)."""

    vocab_size: int
    width: int
    head_dim: int
    mlp_size: int
    num_layers: int
    num_heads: int
    num_buckets: int = 32
    """How many distances between tokens the position bias tells apart."""
    max_distance: int = 128
    """Tokens further apart than this share a bucket."""
    eps: float = 1e-6

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class CLIPConfig:
    """The shape of a CLIP text encoder (pre-norm, causal, quick GELU)."""

    vocab_size: int
    width: int
    mlp_size: int
    num_layers: int
    num_heads: int
    max_length: int = 77
    """Tokens of a prompt, padding included."""
    eos_token_id: int = 2
    """Pool at the first token with this id. The historical value 2 means: at the largest id instead."""
    eps: float = 1e-5

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """The shape of the convolutional autoencoder, and the affine map from its latents to the model's."""

    channels: tuple[int, ...]
    """Width at each resolution, finest first; each further entry halves height and width."""
    layers_per_block: int
    """Residual blocks at each resolution of the encoder; the decoder has one more."""
    latent_channels: int
    norm_groups: int
    scale: float
    shift: float
    """The model's latents are (z - shift) * scale."""

    def __post_init__(self) -> None:
        check_fields(self)
        bad = [c for c in self.channels if c % self.norm_groups]
        if bad:
            raise ValueError(f"channels {bad} are not divisible by norm_groups {self.norm_groups}")

    @property
    def downscale(self) -> int:
        """Pixels per latent along a side."""
        return int(2 ** (len(self.channels) - 1))


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How sigmas are shifted towards noise (scheduler `config.json`)."""

    dynamic: bool
    """Whether the shift grows with the number of image tokens (dev), or is `shift` for all (schnell)."""
    shift: float = 1.0
    """The shift where it is not dynamic; 1 leaves equal steps."""
    base_tokens: int = 256
    max_tokens: int = 4096
    base_shift: float = 0.5
    """Log of the dynamic shift at `base_tokens` image tokens."""
    max_shift: float = 1.15
    """Log of the dynamic shift at `max_tokens` image tokens."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.dynamic and self.base_tokens == self.max_tokens:
            raise ValueError(f"base_tokens and max_tokens must differ, both are {self.max_tokens}")


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What the model's card (`bokehflux.json`) says about settings that the caller leaves open."""

    num_inference_steps: int
    height_px: int
    width_px: int
    txt_length: int
    """T5 tokens that a prompt is padded or cut to."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name, most in _MOST.items():
            least = 16 if name in ("height_px", "width_px") else 1
            if not least <= getattr(self, name) <= most:
                raise ValueError(
                    f"{name} must be at least {least} and at most {most}, got {getattr(self, name)}"
                )


_MOST = {
    "num_inference_steps": MAX_STEPS,
    "height_px": MAX_SIDE_PX,
    "width_px": MAX_SIDE_PX,
    "txt_length": MAX_TXT_LENGTH,
}


FLUX_DEV = MMDiTConfig(
    in_channels=64, txt_dim=4096, pooled_dim=768, hidden_size=3072, num_heads=24,
    num_double=19, num_single=38, axes_dim=(16, 56, 56), guidance_embed=True,
)  # fmt: skip
FLUX_SCHNELL = dataclasses.replace(FLUX_DEV, guidance_embed=False)
FLUX_BOKEH = BokehConfig(blocks=tuple(range(57)), rank=128)
T5_XXL = T5Config(vocab_size=32128, width=4096, head_dim=64, mlp_size=10240, num_layers=24, num_heads=64)
CLIP_L = CLIPConfig(vocab_size=49408, width=768, mlp_size=3072, num_layers=12, num_heads=12)
FLUX_VAE = VAEConfig(
    channels=(128, 256, 512, 512),
    layers_per_block=2,
    latent_channels=16,
    norm_groups=32,
    scale=0.3611,
    shift=0.1159,
)
FLUX_SCHEDULE = ScheduleConfig(dynamic=True, shift=3.0)
SCHNELL_SCHEDULE = ScheduleConfig(dynamic=False, shift=1.0)
