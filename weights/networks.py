"""The registry of networks: a row says all that loading, saving, describing and finding a network needs.

A further network is a row here, its table (`tables/`) and its module (`bokehflux/models/`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

from torch import nn

from bokehflux.configs import (
    CLIP_L,
    FLUX_DEV,
    FLUX_SCHNELL,
    FLUX_VAE,
    T5_XXL,
    BokehConfig,
    ControlsConfig,
    MMDiTConfig,
    ReferenceConfig,
)
from bokehflux.models.adapter import BokehAdapter
from bokehflux.models.clip import CLIPTextEncoder
from bokehflux.models.controls import ControlAdapter
from bokehflux.models.mmdit import MMDiT
from bokehflux.models.reference import ReferenceAdapter
from bokehflux.models.t5 import T5Encoder
from bokehflux.models.tiny_decoder import TinyDecoder
from bokehflux.models.vae import AutoencoderKL
from bokehflux.text.tokenizers import CLIPTokenizer, T5Tokenizer

from .codec import Codec, Shapes
from .mapping import Table
from .tables import adapter, clip, controls, flux, lora, reference, t5, tiny_decoder, vae

ADAPTER, REFERENCE, CONTROLS = "adapter", "reference", "controls"
ADAPTER_PREFIX = "bokeh."
"""Where MMDiT keeps its adapter."""
C = TypeVar("C")
N = TypeVar("N", bound=nn.Module)


class Seam(NamedTuple):
    """Where a network meets the transformer: both sides must be equally wide."""

    what: str
    """As in "CLIP vectors have 4 channels"."""
    width: Callable[[Shapes], int]
    wanted: Callable[[MMDiTConfig], int]
    known: Mapping[int, str] = {}
    """Widths of other models, and which these are."""

    def problem(self, shapes: Shapes, transformer: MMDiTConfig) -> str | None:
        """What keeps a network from meeting the transformer. Raises CheckpointError for missing tensors."""
        ours, its = self.width(shapes), self.wanted(transformer)
        if ours == its:
            return None
        whose = f" (those of {self.known[ours]})" if ours in self.known else ""
        return f"{self.what} {ours} channels{whose}, the transformer expects {its}"


class Tokenizer(NamedTuple):
    """The tokenizer of a text encoder."""

    name: str
    """Its key in `Snapshot` and in errors."""
    folder: str
    """Its folder in a snapshot."""
    official: tuple[str, str]
    """Library and class that `model_index.json` names."""
    files: str
    """How errors name its files."""
    marks: tuple[str, ...]
    """Files of which one must be in its folder, where a folder of that name may be another model's."""
    read: Callable[[Any], Any]
    """Builds it from its folder. Raises TokenizerError."""


@dataclass(frozen=True, kw_only=True)
class Network(Generic[C, N]):
    """One kind of network, and how files hold it."""

    name: str
    """Its key everywhere: in `Snapshot`, `Components`, LoRAs, `ModelFiles` and errors."""
    build: Callable[[C], N]
    codec: Codec[C]
    tables: tuple[Table, ...]
    """Layouts of its files, tried in this order; the first one is what we write."""
    folder: str = ""
    """Its folder in a snapshot."""
    official: tuple[str, str] = ("transformers", "")
    """Library and class that `model_index.json` names."""
    files: str = ""
    """How errors name its files."""
    prefixes: tuple[str, ...] = ()
    """What its names start with in files that hold more than this network: ComfyUI's and Forge's."""
    presets: Mapping[str, C] = field(default_factory=dict)
    """Published models and their configs."""
    is_ours: Callable[[Shapes], bool] = lambda shapes: True
    """Whether a file with its marker is this network, and not a relative from another model."""
    seam: Seam | None = None
    tokenizer: Tokenizer | None = None
    lora: tuple[Table, ...] = ()
    """Names under which LoRA files change its layers; empty where no LoRA does."""
    lora_prefixes: tuple[str, ...] = ()
    pickled: bool = False
    """Whether its files may be pickles of `torch.save` (`files/pickled.py`)."""


TRANSFORMER = Network(
    name="transformer",
    build=MMDiT,
    codec=flux.CONFIG,
    tables=flux.TABLES,
    folder="transformer",
    official=("diffusers", "FluxTransformer2DModel"),
    files="transformer/*.safetensors, or a BFL flux1-*.safetensors",
    prefixes=("model.diffusion_model.", "diffusion_model."),
    presets={"FLUX.1-dev": FLUX_DEV, "FLUX.1-schnell": FLUX_SCHNELL},
    is_ours=lambda s: "txt_in.weight" in s,  # SD3 has the same last layer
    lora=(flux.BFL, flux.DIFFUSERS, lora.PARTS, lora.XLABS),
    lora_prefixes=(
        "base_model.model.transformer.", "base_model.model.", "model.diffusion_model.", "diffusion_model.",
        "transformer.", "lora_transformer_", "lora_unet_", "lycoris_", "",
    ),
)  # fmt: skip
VAE = Network(
    name="vae",
    build=AutoencoderKL,
    codec=vae.CONFIG,
    tables=vae.TABLES,
    folder="vae",
    official=("diffusers", "AutoencoderKL"),
    files="vae/*.safetensors, or a BFL ae.safetensors",
    prefixes=("first_stage_model.", "vae."),
    presets={"FLUX.1": FLUX_VAE},
    seam=Seam(
        "the autoencoder's packed latents have",
        lambda s: 4 * s.size("decoder.conv_in.weight", 1),
        lambda transformer: transformer.in_channels,
        {16: "Stable Diffusion 1, 2 or XL", 128: "FLUX.2"},
    ),
)
CLIP = Network(
    name="clip",
    build=CLIPTextEncoder,
    codec=clip.CONFIG,
    tables=clip.TABLES,
    folder="text_encoder",
    official=("transformers", "CLIPTextModel"),
    files="text_encoder/*.safetensors, or a clip_l.safetensors",
    prefixes=("text_encoders.clip_l.transformer.", "text_encoders.clip_l."),
    presets={"CLIP-L": CLIP_L},
    seam=Seam(
        "CLIP vectors have",
        lambda s: s.size("text_model.final_layer_norm.weight"),
        lambda transformer: transformer.pooled_dim,
        {1280: "CLIP-G", 1024: "CLIP-H"},
    ),
    tokenizer=Tokenizer(
        "clip_tokenizer", "tokenizer", ("transformers", "CLIPTokenizer"),
        "tokenizer/ with vocab.json and merges.txt, or tokenizer.json, and tokenizer_config.json",
        ("vocab.json", "tokenizer.json"), CLIPTokenizer.from_folder,
    ),
    lora=clip.TABLES,
    lora_prefixes=("text_encoders.clip_l.transformer.", "text_encoder.", "lora_te1_", "lora_te_"),
)  # fmt: skip
T5 = Network(
    name="t5",
    build=T5Encoder,
    codec=t5.CONFIG,
    tables=t5.TABLES,
    folder="text_encoder_2",
    official=("transformers", "T5EncoderModel"),
    files="text_encoder_2/*.safetensors, or a t5xxl*.safetensors",
    prefixes=("text_encoders.t5xxl.transformer.", "text_encoders.t5xxl."),
    presets={"T5-XXL": T5_XXL},
    # UMT5 has T5-XXL's width, and a position bias in every block.
    is_ours=lambda s: "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight" not in s,
    seam=Seam(
        "T5 states have",
        lambda s: s.size("encoder.final_layer_norm.weight"),
        lambda transformer: transformer.txt_dim,
    ),
    tokenizer=Tokenizer(
        "t5_tokenizer", "tokenizer_2", ("transformers", "T5TokenizerFast"),
        "tokenizer_2/ with tokenizer_config.json and tokenizer.json or spiece.model",
        ("tokenizer.json", "spiece.model"), T5Tokenizer.from_folder,
    ),
    lora=(t5.HF,),
    # kohya keeps the number that T5 has in SD3.
    lora_prefixes=("text_encoders.t5xxl.transformer.", "text_encoder_2.", "lora_te2_", "lora_te3_"),
)  # fmt: skip

NETWORKS: tuple[Network[Any, Any], ...] = (TRANSFORMER, VAE, CLIP, T5)
"""What a model is made of. The transformer comes first: it decides which of the others fit."""
TINY_DECODER: Network[int, TinyDecoder] = Network(
    name="tiny_decoder",
    build=TinyDecoder,
    codec=tiny_decoder.LATENT_CHANNELS,
    tables=tiny_decoder.TABLES,
    presets={"FLUX.1": FLUX_VAE.latent_channels},
)


def adapter_for(transformer: MMDiTConfig) -> Network[BokehConfig, BokehAdapter]:
    """The bokeh adapter of transformers of one config."""
    return Network(
        name=ADAPTER,
        build=lambda config: BokehAdapter(config, transformer),
        codec=adapter.codec(transformer),
        tables=adapter.TABLES,
        pickled=True,
    )


def reference_for(transformer: MMDiTConfig) -> Network[ReferenceConfig, ReferenceAdapter]:
    """The reference adapter of transformers of one config."""
    return Network(
        name=REFERENCE,
        build=lambda config: ReferenceAdapter(config, transformer),
        codec=reference.codec(transformer),
        tables=reference.TABLES,
    )


def controls_for(transformer: MMDiTConfig) -> Network[ControlsConfig, ControlAdapter]:
    """The control adapter of transformers of one config."""
    return Network(
        name=CONTROLS,
        build=lambda config: ControlAdapter(config, transformer),
        codec=controls.codec(transformer),
        tables=controls.TABLES,
    )
