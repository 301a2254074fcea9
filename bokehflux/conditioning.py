"""Values that pass from one stage of the pipeline to the next, and from the host to a device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What the text encoders made of a batch of prompts."""

    txt: Tensor
    """T5 states, [B, T, txt_dim]."""
    pooled: Tensor
    """CLIP pooled vectors, [B, pooled_dim]."""


def onto(x: Tensor, device: torch.device) -> Tensor:
    """x on the device. A GPU fetches it in its turn: the host does not wait for the work before it."""
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)
