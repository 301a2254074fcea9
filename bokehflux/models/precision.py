"""The dtype that a model computes in when nobody names one, and what a CPU keeps in float32 beside it."""

from __future__ import annotations

import torch


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU, and on a CPU that multiplies it in hardware; float32 on any other CPU."""
    return torch.bfloat16 if device.type != "cpu" or cpu_multiplies_bfloat16() else torch.float32


def careful_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """float32 where a CPU computes in bfloat16, else dtype, as published.

    For what costs little beside the products, and whose rounding is most of a picture's error: noise level
    and guidance, the text encoders, the first and last layer, latents, the residual stream.
    """
    return torch.float32 if device.type == "cpu" and dtype == torch.bfloat16 else dtype


def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has products in bfloat16 (AVX512-BF16 or AMX); without, float32 is faster.

    PyTorch has no public name for the question, and its private ones have changed: a name that is not there
    counts as no.
    """
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)
