"""The T5 v1.1 encoder: transformers `T5EncoderModel`, whose names are ours, and llama.cpp's names in GGUF."""

from __future__ import annotations

from bokehflux.configs import T5Config

from ..codec import Codec, Field, Json, Shapes
from ..mapping import Rule, Table

_BLOCK, _ATTENTION, _MLP = (
    "encoder.block.{i}.layer.",
    "encoder.block.{i}.layer.0.SelfAttention.",
    "encoder.block.{i}.layer.1.DenseReluDense.",
)

HF = Table(
    "T5 encoder",
    marker="encoder.final_layer_norm.weight",
    # One tensor under two names; files hold either or both.
    rules=(Rule("shared.weight", "shared.weight", tied=("encoder.embed_tokens.weight",)),),
    # A whole T5 has its other half, too.
    ignored_below=("decoder.", "lm_head."),
)

GGUF = Table(
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

TABLES = (HF, GGUF)
_ATTENTION_0 = _ATTENTION.format(i=0)


def _head_dim(s: Shapes) -> int:
    rows, heads = (
        s.size(_ATTENTION_0 + "q.weight"),
        s.size(_ATTENTION_0 + "relative_attention_bias.weight", 1),
    )
    if rows % heads:
        raise ValueError(f"{heads} heads cannot share the {rows} rows of {_ATTENTION_0}q.weight")
    return rows // heads


def _gating(config: Json) -> list[str]:
    if "feed_forward_proj" in config or "is_gated_act" in config:
        return []
    return ["neither feed_forward_proj nor is_gated_act is there: T5 v1.1 with gated GELU is expected"]


# Distance and epsilon are those of every T5 v1.1.
CONFIG = Codec(
    what="T5 text encoder",
    build=T5Config,
    fields=(
        Field("vocab_size", "vocab_size", lambda s: s.size("shared.weight")),
        Field("width", "d_model", lambda s: s.size("shared.weight", 1)),
        Field("head_dim", "d_kv", _head_dim),
        Field("mlp_size", "d_ff", lambda s: s.size(_MLP.format(i=0) + "wi_0.weight")),
        Field("num_layers", "num_layers", lambda s: s.count("encoder.block")),
        Field("num_heads", "num_heads", lambda s: s.size(_ATTENTION_0 + "relative_attention_bias.weight", 1)),
        Field("num_buckets", "relative_attention_num_buckets",
              lambda s: s.size(_ATTENTION_0 + "relative_attention_bias.weight"), absent=32),
        Field("max_distance", "relative_attention_max_distance", absent=128),
        Field("eps", "layer_norm_epsilon", absent=1e-6),
    ),
    fixed={
        "model_type": "t5", "feed_forward_proj": "gated-gelu", "is_gated_act": True,
        "dense_act_fn": ("gelu_new", "gelu_pytorch_tanh"),
    },
    extra=lambda config: {
        "architectures": ["T5EncoderModel"], "decoder_start_token_id": 0, "dropout_rate": 0.1,
        "eos_token_id": 1, "is_encoder_decoder": True, "pad_token_id": 0, "tie_word_embeddings": False,
    },
    faults=_gating,
)  # fmt: skip
