"""CLIP's text encoder: transformers `CLIPTextModel`, whose names are ours.

transformers writes them without `text_model.` since 5.6. The file of a whole CLIP has its image encoder, too.
"""

from __future__ import annotations

from bokehflux.configs import CLIPConfig

from ..codec import Codec, Field, Shapes
from ..mapping import Rule, Table

_LOSS = ("text_projection.weight", "visual_projection.weight", "logit_scale")
_VISION = ("vision_model.",)

HF = Table(
    "CLIP text encoder",
    marker="text_model.final_layer_norm.weight",
    # position_ids is 0 ... 76, saved by older files; FLUX pools before the projection; the logit scale
    # belongs to CLIP's loss.
    ignored=frozenset({"text_model.embeddings.position_ids", *_LOSS}),
    ignored_below=_VISION,
)

_LAYERS = (*(f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2", "layer_norm1",
           "layer_norm2")  # fmt: skip
FLAT = Table(
    "CLIP text encoder, names of transformers 5.6",
    marker="embeddings.token_embedding.weight",
    rules=tuple(
        Rule(f"text_model.{name}", name)
        for name in (
            "embeddings.token_embedding.weight",
            "embeddings.position_embedding.weight",
            *(f"encoder.layers.{{i}}.{layer}.{{p}}" for layer in _LAYERS),
            "final_layer_norm.{p}",
        )
    ),
    ignored=frozenset({"embeddings.position_ids", *_LOSS}),
    ignored_below=_VISION,
)

TABLES = (HF, FLAT)
_TOKENS = "text_model.embeddings.token_embedding.weight"
_HEAD_DIM = 64
"""The same in every published CLIP."""


def _num_heads(s: Shapes) -> int:
    width = s.size(_TOKENS, 1)
    if width % _HEAD_DIM:
        problem = f"no config.json beside it, and width {width} does not tell the number of heads"
        raise ValueError(f"{problem}: add the official one, or pass a config")
    return width // _HEAD_DIM


CONFIG = Codec(
    what="CLIP text encoder",
    build=CLIPConfig,
    fields=(
        Field("vocab_size", "vocab_size", lambda s: s.size(_TOKENS)),
        Field("width", "hidden_size", lambda s: s.size(_TOKENS, 1)),
        Field("mlp_size", "intermediate_size",
              lambda s: s.size("text_model.encoder.layers.0.mlp.fc1.weight")),
        Field("num_layers", "num_hidden_layers", lambda s: s.count("text_model.encoder.layers")),
        Field("num_heads", "num_attention_heads", _num_heads),
        Field("max_length", "max_position_embeddings",
              lambda s: s.size("text_model.embeddings.position_embedding.weight"), absent=77),
        Field("eos_token_id", "eos_token_id"),
        Field("eps", "layer_norm_eps", absent=1e-5),
    ),
    fixed={"model_type": "clip_text_model", "hidden_act": "quick_gelu"},
    extra=lambda config: {
        "architectures": ["CLIPTextModel"], "attention_dropout": 0.0, "bos_token_id": 0, "pad_token_id": 1,
        "projection_dim": config.width,
    },
)  # fmt: skip
