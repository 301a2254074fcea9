"""Values that pass from one stage of the pipeline to the next."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What the text encoders made of a batch of prompts."""

    txt: Tensor
    """T5 states, [B, T, txt_dim]."""
    pooled: Tensor
    """CLIP pooled vectors, [B, pooled_dim]."""
