"""TAEF1's decoder from its file: the layout by tensor names, exact cover, then the numbers."""

from __future__ import annotations

from pathlib import Path

import torch

from bokehflux.models.tiny_decoder import TinyDecoder

from .checkpoint import CheckpointError, open_checkpoint
from .mapping import plan, recognise
from .tables.tiny import TABLES


def load_tiny_decoder(
    path: str | Path,
    latent_channels: int = 16,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> TinyDecoder:
    """From `taef1_decoder.safetensors`, or a folder or file in the layout of diffusers.

    Returns it in eval mode without gradients. Raises CheckpointError with everything that does not fit; also
    for the decoder of another model (TAESD, TAESDXL), whose latents have another number of channels.
    """
    checkpoint = open_checkpoint(path)
    table = recognise(TABLES, checkpoint.tensors, checkpoint.path)
    with torch.device("meta"):
        network = TinyDecoder(latent_channels)
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    entries = plan(table, shapes, checkpoint.shapes, checkpoint.path)
    odd = [
        f"{name} is stored as {checkpoint.tensors[name].dtype}, expected bfloat16, float16 or float32"
        for entry in entries
        for name in entry.src
        if checkpoint.tensors[name].dtype not in (torch.bfloat16, torch.float16, torch.float32)
    ]
    if odd:
        raise CheckpointError(checkpoint.path, *odd)
    tensors = {entry.dst: checkpoint.read(entry.src[0]).to(device, dtype, copy=True) for entry in entries}
    network.load_state_dict(tensors, strict=True, assign=True)
    return network.eval().requires_grad_(False)
