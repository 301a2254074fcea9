"""The bokeh adapter's config: what its tensors tell, checked against its `config.json` and the model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from bokehflux.configs import BokehConfig, MMDiTConfig

from .checkpoint import CheckpointError
from .mapping import Shape, renamed
from .official import Json, faults_of
from .parts import Part


def read_bokeh_config(part: Part, mmdit: MMDiTConfig) -> BokehConfig:
    """Of an opened adapter for a transformer of config `mmdit`."""
    checkpoint = part.checkpoint
    return bokeh_config(checkpoint.config(), renamed(part.table, checkpoint.shapes), mmdit, checkpoint.path)


def bokeh_config(
    config: Json | None, shapes: Mapping[str, Shape], mmdit: MMDiTConfig, where: object = "adapter"
) -> BokehConfig:
    """The adapter's shape as its tensors tell it, with the strengths of its `config.json`, if it has one.

    Every disagreement between the two, or with the transformer, is reported in one CheckpointError.
    """
    found, problems = _bokeh_shape(shapes, mmdit)
    if found and config is not None:
        problems += _bokeh_conflicts(config, found, mmdit)
    if problems or not found:
        raise CheckpointError(where, *problems)
    settings = config or {}
    with faults_of(where):
        return BokehConfig(
            **found,
            alpha=settings.get("lora_alpha"),
            lora_scale=settings.get("lora_scale", 1.0),
            bokeh_scale=settings.get("bokeh_scale", 1.0),
        )


def _bokeh_shape(shapes: Mapping[str, Shape], mmdit: MMDiTConfig) -> tuple[dict[str, Any], list[str]]:
    needed = ("embedding_layer.0.weight", "embedding_layer.2.weight")
    pattern = re.compile(r"adapter_modules\.(\d{1,9})\.(\w+)\.down\.weight")
    downs = {(int(m[1]), m[2]): shape for name, shape in shapes.items() if (m := pattern.fullmatch(name))}
    if any(name not in shapes for name in needed) or not downs:
        some = ", ".join(sorted(shapes)[:3]) or "nothing"
        return {}, [f"not a bokeh adapter: expected {needed[0]!r} and 'adapter_modules.*', found {some}"]
    flat = [f"{n} {list(shapes[n])} is no matrix" for n in needed if len(shapes[n]) != 2]
    flat += [f"{kind} of block {i} {list(s)} is no matrix" for (i, kind), s in downs.items() if len(s) != 2]
    if flat:
        return {}, flat
    blocks = tuple(sorted({i for i, _ in downs}))
    problems = []
    if blocks[-1] >= mmdit.num_blocks:
        problems.append(f"made for a larger model: it adapts block {blocks[-1]} of {mmdit.num_blocks}")
    widths = {shape[1] for (_, kind), shape in downs.items() if kind in ("to_q_adp", "to_k_adp")}
    if widths - {mmdit.hidden_size}:
        problems.append(
            f"made for width {max(widths - {mmdit.hidden_size})}, this model's is {mmdit.hidden_size}"
        )
    found = {
        "blocks": blocks,
        "rank": next(iter(downs.values()))[0],
        "hidden_dim": shapes[needed[0]][0],
        "context_dim": shapes[needed[1]][0],
        "adapt_q": any(kind == "to_q_adp" for _, kind in downs),
        "adapt_k": any(kind == "to_k_adp" for _, kind in downs),
    }
    return found, problems


def _bokeh_conflicts(config: Json, found: Json, mmdit: MMDiTConfig) -> list[str]:
    facts = {
        "lora_rank": found["rank"],
        "unfreeze_q": found["adapt_q"],
        "unfreeze_k": found["adapt_k"],
        "bokeh_hidden_dim": found["hidden_dim"],
        "bokeh_context_dim": found["context_dim"],
        "bokeh_input_dim": 1,
        "attn_hidden_dim": mmdit.hidden_size,
    }
    problems = [
        f"config.json says {key} = {config[key]!r}, the tensors say {value!r}"
        for key, value in facts.items()
        if key in config and config[key] != value
    ]
    named = config.get("blocks")
    if named is not None and not (isinstance(named, list) and all(isinstance(n, str) for n in named)):
        problems.append(f"config.json says blocks = {named!r:.80}, a list of names was expected")
    elif named is not None:
        try:
            blocks = {_block_index(name, mmdit) for name in named}
        except ValueError as error:
            return [*problems, str(error)]
        if blocks != set(found["blocks"]):
            without, extra = sorted(blocks - set(found["blocks"])), sorted(set(found["blocks"]) - blocks)
            problems.append(
                f"config.json and tensors adapt different blocks: named without tensors {without}, "
                f"tensors without name {extra}"
            )
    return problems


_BLOCK_NAME = re.compile(r"(single_)?transformer_blocks\.(\d+)(\.attn.*)?")


def _block_index(name: str, mmdit: MMDiTConfig) -> int:
    """`transformer_blocks.3` -> 3, `single_transformer_blocks.7` -> num_double + 7."""
    match = _BLOCK_NAME.fullmatch(name)
    if not match:
        raise ValueError(f"config.json names block {name!r}, expected [single_]transformer_blocks.N")
    limit = mmdit.num_single if match[1] else mmdit.num_double
    if int(match[2]) >= limit:
        raise ValueError(f"config.json names block {name!r}, this model has only {limit} of that kind")
    return int(match[2]) + (mmdit.num_double if match[1] else 0)


def bokeh_config_dict(config: BokehConfig, mmdit: MMDiTConfig) -> dict[str, Any]:
    """The published adapter's `config.json`."""
    double = mmdit.num_double
    return {
        "attn_hidden_dim": mmdit.hidden_size,
        "blocks": [
            f"transformer_blocks.{i}" if i < double else f"single_transformer_blocks.{i - double}"
            for i in config.blocks
        ],
        "bokeh_context_dim": config.context_dim,
        "bokeh_hidden_dim": config.hidden_dim,
        "bokeh_input_dim": 1,
        "bokeh_scale": config.bokeh_scale,
        "lora_alpha": config.alpha,
        "lora_rank": config.rank,
        "lora_scale": config.lora_scale,
        "unfreeze_k": config.adapt_k,
        "unfreeze_q": config.adapt_q,
    }
