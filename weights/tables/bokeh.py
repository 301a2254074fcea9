"""The bokeh adapter: the published file, whose names are ours, and BokehDepth's names for the same."""

from __future__ import annotations

from collections.abc import Iterable

from ..mapping import Rule, Table

ADAPTER = Table("bokeh adapter", marker="embedding_layer.0.weight")
_LIST = "adapter_modules."
_PROJECTIONS = ("to_k_bokeh", "to_v_bokeh", "to_q_adp", "to_k_adp")


def layout(names: Iterable[str]) -> Table:
    """The table for a file of these names: `dof` for `bokeh`, bare numbers for blocks, both, or neither."""
    names = list(names)
    bare = any(name[:1].isdigit() for name in names) and not any(name.startswith(_LIST) for name in names)
    prefix = "" if bare else _LIST
    word = "dof" if any(".to_k_dof." in name or ".to_v_dof." in name for name in names) else "bokeh"
    if (prefix, word) == (_LIST, "bokeh"):
        return ADAPTER
    return Table(
        "bokeh adapter with BokehDepth's names",
        marker=ADAPTER.marker,
        rules=tuple(
            Rule(
                f"{_LIST}{{i}}.{ours}.{half}.weight",
                f"{prefix}{{i}}.{ours.replace('bokeh', word)}.{half}.weight",
            )
            for ours in _PROJECTIONS
            for half in ("down", "up")
        ),
    )
