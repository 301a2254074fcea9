"""The control adapter: names of our own, since nobody else publishes one."""

from __future__ import annotations

from bokehflux.configs import ControlsConfig, MMDiTConfig

from ..codec import UNSET, Codec, Field, Shapes
from ..mapping import Table

_MARKER = "adapter_modules.{i}.to_map_ctl.down.weight"
_FIRST = _MARKER.format(i=0)
TABLES = (Table("control adapter", marker=_MARKER),)


def _tokens(shapes: Shapes) -> int:
    return shapes.size("shape_in.weight") // shapes.size(_FIRST, 1)


def codec(host: MMDiTConfig) -> Codec[ControlsConfig]:
    """The config of a control adapter for a transformer `host`."""
    return Codec(
        what="control adapter",
        build=ControlsConfig,
        fields=(
            Field("rank", "control_rank", lambda s: s.size(_FIRST), UNSET),
            Field("hidden_dim", "control_hidden_dim", lambda s: s.size("map_in.0.weight"), UNSET),
            Field("context_dim", "control_context_dim", lambda s: s.size(_FIRST, 1), UNSET),
            Field("tokens", "control_tokens", _tokens, UNSET),
        ),
        fixed={"attn_hidden_dim": host.hidden_size, "num_blocks": host.num_blocks},
        tensors_rule=True,
    )
