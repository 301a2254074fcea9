"""The transformer in fp8: which layers, how their weights become e4m3, and what a device must have for it.

The projections of all blocks, of both streams, multiply in e4m3 with one scale a token and one an output
channel. Modulation, embedders, final layer and adapter stay as they are: they are next to none of the work,
and an error there reaches every token.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bokehflux.kernels.fp8 import interface as kernels
from bokehflux.models.linear import Dequantize, Linear
from bokehflux.models.mmdit import MMDiT


def check_fp8(device: torch.device, dtype: torch.dtype) -> None:
    """Raise ValueError, with the reason, unless products in fp8 with results in `dtype` run on the device."""
    reason = kernels.why_not(device, dtype)
    if reason is not None:
        raise ValueError(
            f"compute='fp8' cannot run: {reason}. It takes an NVIDIA GPU of compute capability 8.9 or higher "
            "with dtype bfloat16 (or, slowly, a CPU); leave it out to compute in dtype"
        )


def fp8_layers(mmdit: MMDiT) -> Mapping[str, Linear]:
    """The layers that would multiply in fp8, by name. Raises ValueError if their sizes do not allow it."""
    layers = mmdit.units().projections
    odd = [
        n for n, x in layers.items() if x.in_features % kernels.MULTIPLE or x.out_features % kernels.MULTIPLE
    ]
    if odd:
        raise ValueError(
            f"compute='fp8' needs layers whose sizes are multiples of {kernels.MULTIPLE}; {len(odd)} such as "
            f"{odd[0]} are not: this model cannot be computed in fp8"
        )
    return layers


def is_fp8(mmdit: MMDiT) -> bool:
    """Whether its blocks multiply in fp8."""
    return any(layer.scale is not None for layer in mmdit.units().projections.values())


@torch.no_grad()
def quantize_mmdit(mmdit: MMDiT, device: torch.device | None = None) -> None:
    """Turn the blocks' projections to fp8 in place, one after the other: there is never a second copy.

    device: where weights are quantised (None: where they lie); afterwards they go back. Do first whatever
    changes weights (`fold_adapter`, merging LoRAs); attaching LoRAs may come at any time. Raises ValueError,
    and changes nothing, if the network is in fp8 already or its sizes do not allow it.
    """
    layers = fp8_layers(mmdit)
    if is_fp8(mmdit):
        raise ValueError("this transformer is in fp8 already")
    for layer in layers.values():
        home = layer.weight.device
        values, scale = fp8_weight(layer.weight.to(device or home), layer.dequantize)
        layer.set_fp8(values.to(home), scale.to(home))


def fp8_weight(weight: Tensor, dequantize: Dequantize | None) -> tuple[Tensor, Tensor]:
    """A weight [out, in] in any storage form -> (values [out, in] float8_e4m3fn, scale [out] float32).

    Weights stored in e4m3 are taken as they are, with their file's scale: nothing is rounded a second time.
    """
    if weight.dtype != torch.float8_e4m3fn:
        dense = weight if dequantize is None else dequantize(weight, torch.float32)
        values, scale, _ = kernels.quantize(dense)
        return values, scale[:, 0].contiguous()
    if dequantize is None:
        return weight, torch.ones(len(weight), device=weight.device)
    # Everything that scales e4m3 weights scales rows: what it makes of ones is the scale.
    ones = torch.ones(len(weight), 1, device=weight.device).to(weight.dtype)
    return weight, dequantize(ones, torch.float32)[:, 0].contiguous()
