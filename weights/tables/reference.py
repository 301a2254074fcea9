"""The reference adapter: names of our own, since nobody else publishes one."""

from __future__ import annotations

from bokehflux.configs import MMDiTConfig, ReferenceConfig

from ..codec import UNSET, Codec, Field
from ..mapping import Table

_MARKER = "adapter_modules.{i}.to_q_ref.down.weight"
_MLP = "adapter_modules.{i}.mlp_ref.down.weight"
TABLES = (Table("reference adapter", marker=_MARKER),)


def codec(host: MMDiTConfig) -> Codec[ReferenceConfig]:
    """The config of a reference adapter for a transformer `host`."""
    return Codec(
        what="reference adapter",
        build=ReferenceConfig,
        fields=(
            Field("rank", "reference_rank", lambda s: s.size(_MARKER.format(i=0)), UNSET),
            Field("width", "reference_width", lambda s: s.size(_MLP.format(i=0)), UNSET),
        ),
        fixed={"attn_hidden_dim": host.hidden_size, "num_blocks": host.num_blocks},
        tensors_rule=True,
    )
