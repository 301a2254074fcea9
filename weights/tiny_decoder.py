"""TAEF1's decoder from its file: the layout by tensor names, exact cover, then the numbers."""

from __future__ import annotations

from pathlib import Path

import torch

from bokehflux.models.tiny_decoder import TinyDecoder

from .checkpoint import Checkpoint, CheckpointError, open_checkpoint
from .mapping import Entry, Table, plan, recognise
from .tables.tiny_decoder import TABLES


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
    _, entries = plan_tiny(checkpoint, latent_channels)
    with torch.device("meta"):
        network = TinyDecoder(latent_channels)
    tensors = {entry.dst: checkpoint.read(entry.src[0]).to(device, dtype, copy=True) for entry in entries}
    network.load_state_dict(tensors, strict=True, assign=True)
    return network.eval().requires_grad_(False)


def plan_tiny(checkpoint: Checkpoint, latent_channels: int = 16) -> tuple[Table, list[Entry]]:
    """The layout of the file, and where each tensor comes from. Raises as `load_tiny_decoder`."""
    table = recognise(TABLES, checkpoint.tensors, checkpoint.path)
    with torch.device("meta"):
        network = TinyDecoder(latent_channels)
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    entries = plan(table, shapes, checkpoint.shapes, checkpoint.path)
    used = {name: checkpoint.tensors[name].dtype for entry in entries for name in entry.src}
    odd = [
        f"{name} is stored as {dtype}, expected bfloat16, float16 or float32"
        for name, dtype in used.items()
        if dtype not in (torch.bfloat16, torch.float16, torch.float32)
    ]
    if odd:
        raise CheckpointError(checkpoint.path, *odd)
    return table, entries
