"""The bokeh adapter: the published file, whose names are ours, and BokehDepth's names for the same."""

from __future__ import annotations

import re

from bokehflux.configs import BokehConfig, MMDiTConfig

from ..codec import UNSET, Codec, Field, Shapes
from ..mapping import Rule, Table

LEVEL = "embedding_layer.0.weight"
"""A tensor that every adapter has, whatever it calls the others."""
_LIST = "adapter_modules."
_PROJECTIONS = ("to_k_bokeh", "to_v_bokeh", "to_q_adp", "to_k_adp")


def _depth(block: str, word: str) -> Table:
    """BokehDepth's names: `dof` for `bokeh`, bare numbers for blocks, or both."""
    return Table(
        "bokeh adapter with BokehDepth's names",
        marker=f"{block}.to_v_{word}.down.weight",
        rules=tuple(
            Rule(f"{_LIST}{{i}}.{ours}.{p}.weight", f"{block}.{ours.replace('bokeh', word)}.{p}.weight")
            for ours in _PROJECTIONS
            for p in ("down", "up")
        ),
    )


PUBLISHED = Table("bokeh adapter", marker=f"{_LIST}{{i}}.to_v_bokeh.down.weight")
BOKEHDEPTH = _depth(f"{_LIST}{{i}}", "dof")
TABLES = (PUBLISHED, BOKEHDEPTH, _depth("{i}", "dof"), _depth("{i}", "bokeh"))


_BLOCK_NAME = re.compile(r"(single_)?transformer_blocks\.(\d{1,9})(\.attn.*)?")


def codec(host: MMDiTConfig) -> Codec[BokehConfig]:
    """The config of an adapter for a transformer `host`. `config.json` adds the strengths, if it is there."""
    rank, context = f"{_LIST}{{}}.to_v_bokeh.down.weight", "embedding_layer.2.weight"
    return Codec(
        what="bokeh adapter",
        build=BokehConfig,
        fields=(
            Field("blocks", "blocks", lambda s: _blocks(s, host), UNSET,
                  lambda names: _indices(names, host), lambda blocks: _names(blocks, host)),
            Field("rank", "lora_rank", lambda s: s.size(rank.format(_blocks(s, host)[0])), UNSET),
            Field("hidden_dim", "bokeh_hidden_dim", lambda s: s.size(LEVEL), UNSET),
            Field("context_dim", "bokeh_context_dim", lambda s: s.size(context), UNSET),
            Field("adapt_q", "unfreeze_q", lambda s: any(".to_q_adp." in name for name in s), UNSET),
            Field("adapt_k", "unfreeze_k", lambda s: any(".to_k_adp." in name for name in s), UNSET),
            Field("alpha", "lora_alpha", None, None, lambda value: value),
            Field("lora_scale", "lora_scale", None, 1.0),
            Field("bokeh_scale", "bokeh_scale", None, 1.0),
        ),
        fixed={"attn_hidden_dim": host.hidden_size, "bokeh_input_dim": 1},
        tensors_rule=True,
    )  # fmt: skip


def _blocks(s: Shapes, host: MMDiTConfig) -> tuple[int, ...]:
    """The adapted blocks. Raises ValueError when they are not the transformer's."""
    found = {int(m[1]) for name in s if (m := re.match(r"adapter_modules\.(\d{1,9})\.", name))}
    updates = [shape for name, shape in s.items() if name.endswith("_adp.down.weight")]
    widths = {shape[1] for shape in updates if len(shape) == 2} - {host.hidden_size}
    problems = [] if found else ["names no block by a number of at most nine digits"]
    if found and max(found) >= host.num_blocks:
        problems.append(f"made for a larger model: it adapts block {max(found)} of {host.num_blocks}")
    if widths:
        problems.append(f"made for width {max(widths)}, this model's is {host.hidden_size}")
    if problems:
        raise ValueError("; ".join(problems))
    return tuple(sorted(found))


def _indices(names: object, host: MMDiTConfig) -> tuple[int, ...]:
    """`transformer_blocks.3` -> 3, `single_transformer_blocks.7` -> num_double + 7."""
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError("is not a list of names")
    blocks = set()
    for name in names:
        match = _BLOCK_NAME.fullmatch(name)
        if not match:
            raise ValueError(f"names block {name!r}, expected [single_]transformer_blocks.N")
        first, limit = (host.num_double, host.num_single) if match[1] else (0, host.num_double)
        if int(match[2]) >= limit:
            raise ValueError(f"names block {name!r}, this model has only {limit} of that kind")
        blocks.add(first + int(match[2]))
    return tuple(sorted(blocks))


def _names(blocks: tuple[int, ...], host: MMDiTConfig) -> list[str]:
    double = host.num_double
    return [
        f"transformer_blocks.{i}" if i < double else f"single_transformer_blocks.{i - double}" for i in blocks
    ]
