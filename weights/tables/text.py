"""The text encoders: transformers `T5EncoderModel` and `CLIPTextModel`, whose names are ours."""

from __future__ import annotations

from ..mapping import Rule, Table

T5 = Table(
    "T5 encoder",
    marker="encoder.final_layer_norm.weight",
    # One tensor under two names; files hold either or both.
    rules=(Rule("shared.weight", "shared.weight", tied=("encoder.embed_tokens.weight",)),),
)

CLIP = Table(
    "CLIP text encoder",
    marker="text_model.final_layer_norm.weight",
    # position_ids is 0 ... 76, saved by older files; FLUX pools before the projection.
    ignored=frozenset({"text_model.embeddings.position_ids", "text_projection.weight"}),
)
