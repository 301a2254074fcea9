"""The bokeh adapter: the published file, whose names are ours."""

from __future__ import annotations

from ..mapping import Table

ADAPTER = Table("bokeh adapter", marker="embedding_layer.0.weight")
