"""CLIP's text encoder: transformers `CLIPTextModel`, whose names are ours."""

from __future__ import annotations

from bokehflux.configs import CLIPConfig

from ..codec import Codec, Field, Shapes
from ..mapping import Table

HF = Table(
    "CLIP text encoder",
    marker="text_model.final_layer_norm.weight",
    # position_ids is 0 ... 76, saved by older files; FLUX pools before the projection; the logit scale
    # belongs to CLIP's loss.
    ignored=frozenset({"text_model.embeddings.position_ids", "text_projection.weight", "logit_scale"}),
)

TABLES = (HF,)
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
