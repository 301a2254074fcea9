"""The text encoders: transformers `T5EncoderModel` and `CLIPTextModel`, whose names are ours; T5 in GGUF."""

from __future__ import annotations

from ..mapping import Rule, Table

_BLOCK, _ATTENTION, _MLP = (
    "encoder.block.{i}.layer.",
    "encoder.block.{i}.layer.0.SelfAttention.",
    "encoder.block.{i}.layer.1.DenseReluDense.",
)

T5 = Table(
    "T5 encoder",
    marker="encoder.final_layer_norm.weight",
    # One tensor under two names; files hold either or both.
    rules=(Rule("shared.weight", "shared.weight", tied=("encoder.embed_tokens.weight",)),),
)

T5_GGUF = Table(
    "T5 encoder, llama.cpp layout",
    marker="enc.output_norm.weight",
    rules=(
        Rule("shared.weight", "token_embd.weight"),
        Rule("encoder.final_layer_norm.weight", "enc.output_norm.weight"),
        Rule(_BLOCK + "0.layer_norm.weight", "enc.blk.{i}.attn_norm.weight"),
        *(Rule(f"{_ATTENTION}{n}.weight", f"enc.blk.{{i}}.attn_{n}.weight") for n in "qkvo"),
        Rule(_ATTENTION + "relative_attention_bias.weight", "enc.blk.{i}.attn_rel_b.weight"),
        Rule(_BLOCK + "1.layer_norm.weight", "enc.blk.{i}.ffn_norm.weight"),
        Rule(_MLP + "wi_0.weight", "enc.blk.{i}.ffn_gate.weight"),
        Rule(_MLP + "wi_1.weight", "enc.blk.{i}.ffn_up.weight"),
        Rule(_MLP + "wo.weight", "enc.blk.{i}.ffn_down.weight"),
    ),
)

CLIP = Table(
    "CLIP text encoder",
    marker="text_model.final_layer_norm.weight",
    # position_ids is 0 ... 76, saved by older files; FLUX pools before the projection; the logit scale
    # belongs to CLIP's loss.
    ignored=frozenset({"text_model.embeddings.position_ids", "text_projection.weight", "logit_scale"}),
)

T5_TABLES = (T5, T5_GGUF)
CLIP_TABLES = (CLIP,)
