"""LoRA files: the names that trainers give to the layers they change, and to the matrices of each.

Six families are in use: diffusers/PEFT (`transformer.`), kohya (`lora_unet_`), BFL (`diffusion_model.`),
XLabs (no prefix, `processor.`), LyCORIS (`lycoris_`) and OneTrainer (`lora_transformer_`). Each is a prefix
(`networks.py`) and a table; files mix them freely: every prefix goes with the names of every table, with dots
or underscores.
"""

from __future__ import annotations

import re

from ..mapping import Rule, Table, concat

_QKV = (1, 1, 1)

PARTS = Table(
    "OneTrainer, open model initiative: fused layers by number",
    marker="double_blocks.0.img_attn.qkv.0.weight",
    rules=(
        *(
            Rule(f"{layer}.{{p}}", tuple(f"{layer}.{n}.{{p}}" for n in range(3)), concat(*_QKV))
            for layer in ("double_blocks.{i}.img_attn.qkv", "double_blocks.{i}.txt_attn.qkv")
        ),
        Rule(
            "single_blocks.{i}.linear1.{p}",
            tuple(f"single_blocks.{{i}}.linear1.{n}.{{p}}" for n in range(4)),
            concat(*_QKV, 4),
        ),
    ),
)

XLABS = Table(
    "XLabs attention processors",
    marker="double_blocks.0.processor.qkv_lora1.weight",
    rules=(
        Rule("double_blocks.{i}.img_attn.qkv.{p}", "double_blocks.{i}.processor.qkv_lora1.{p}"),
        Rule("double_blocks.{i}.img_attn.proj.{p}", "double_blocks.{i}.processor.proj_lora1.{p}"),
        Rule("double_blocks.{i}.txt_attn.qkv.{p}", "double_blocks.{i}.processor.qkv_lora2.{p}"),
        Rule("double_blocks.{i}.txt_attn.proj.{p}", "double_blocks.{i}.processor.proj_lora2.{p}"),
        # No file changes the MLP rows: their name is ours, to complete the layer.
        Rule(
            "single_blocks.{i}.linear1.{p}",
            ("single_blocks.{i}.processor.qkv_lora.{p}", "single_blocks.{i}.processor.mlp_lora.{p}"),
            concat(3, 4),
        ),
        Rule("single_blocks.{i}.linear2.{p}", "single_blocks.{i}.processor.proj_lora.{p}"),
    ),
)

ROLES: tuple[tuple[str, str], ...] = (
    (".lora_A.weight", "down"),
    (".lora_down.weight", "down"),
    (".lora.down.weight", "down"),
    (".lora_linear_layer.down.weight", "down"),
    (".down.weight", "down"),
    (".lora_B.weight", "up"),
    (".lora_up.weight", "up"),
    (".lora.up.weight", "up"),
    (".lora_linear_layer.up.weight", "up"),
    (".up.weight", "up"),
    (".alpha", "alpha"),
)
"""(end of a name, what the tensor is); the longest that fits counts."""
_PEFT = re.compile(r"\.(lora_[AB])\.[^.]+\.weight$")
"""PEFT's names while an adapter is loaded, with the adapter's own name."""


def role(name: str) -> tuple[str, str] | None:
    """A layer, as the file spells it, and what the tensor is to it; None for tensors of another kind."""
    name = _PEFT.sub(r".\1.weight", name)
    ends = [(end, role) for end, role in ROLES if name.endswith(end) and name != end]
    if not ends:
        return None
    end, found = max(ends, key=lambda item: len(item[0]))
    return name.removesuffix(end), found


OTHER_KINDS: tuple[tuple[str, str], ...] = (
    (r"\.lokr_(w1|w2|t2)\w*$", "LoKr"),
    (r"\.hada_\w+$", "LoHa"),
    (r"\.(dora_scale|lora_magnitude_vector(\.\w+)*)$", "DoRA"),
    (r"\.(oft_\w+|boft_\w+)(\.\w+)*$", "OFT"),
    (r"\.(a1|a2|b1|b2)\.weight$", "GLoRA"),
    (r"\.on_input$", "(IA)3"),
    (r"\.lora_mid\.weight$", "LoCon with a middle matrix"),
    (r"\.lora_[AB](\.\w+)?\.bias$", "LoRA with biases"),
    (r"\.(diff|diff_b|set_weight|w_norm|b_norm)$", "full difference"),
)
"""(pattern of a name, kind of adapter), for adapters that are more than a pair of matrices."""
