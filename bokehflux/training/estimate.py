"""What a run of adapter training takes, from shapes alone: parameters, bytes, arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bokehflux.configs import BokehConfig, MMDiTConfig
from bokehflux.models.mmdit import MMDiT

KEPT_BYTES = 32
"""Bytes that a block keeps of a token for the way back, per channel of its width, in bfloat16: 93 kB in a
single-stream block of FLUX.1 and 103 kB in a double-stream one, counted with saved-tensor hooks."""
FLOPS = 380e12
"""Operations a second that compiled blocks reached on an H100, forward and backward together."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The cost of a run; times and activations are rough."""

    base: int
    """Parameters of the frozen transformer."""
    trained: int
    """Parameters that the optimiser moves."""
    adapter_bytes: int
    """The adapter's file, float32."""
    state_bytes: int
    """The state of the run on disk: weights, average, moments, float32."""
    gpu_bytes: int
    """Frozen transformer, adapter with gradients, moments and average, activations."""
    flops: float
    """Operations of a step of groups on one process."""

    @property
    def seconds(self) -> float:
        """A step on one H100, compiled."""
        return self.flops / FLOPS


def estimate(
    mmdit: MMDiTConfig,
    bokeh: BokehConfig,
    *,
    rows: int,
    txt_tokens: int,
    img_tokens: int,
    activations: float = 0.0,
    narrow: bool = False,
    streamed: bool = False,
    shards: int = 1,
    guided: bool = False,
    graphs: int = 0,
    moments: int = 2,
) -> Estimate:
    """Cost of training with `rows` a process, each of txt_tokens + img_tokens.

    activations: share of them that is kept; narrow: the base in 8 bits; streamed: two of its blocks at most
    are on the GPU at a time. How long streaming takes depends on the machine and is not in `seconds`. shards:
    processes that hold a part of the base each.
    guided: the base predicts once more, without text. graphs: recorded ones, each with gradients of its
    own. moments: what the optimiser keeps, as many numbers as are trained each.
    """
    with torch.device("meta"):
        network = MMDiT(mmdit, bokeh)
    adapter = network.bokeh
    assert adapter is not None
    tokens = txt_tokens + img_tokens
    trained = sum(p.numel() for p in adapter.trainable())
    whole = sum(p.numel() for p in adapter.parameters())
    base = sum(p.numel() for p in network.parameters()) - whole
    # A product of a token with a matrix is two operations a weight. A double-stream block has its matrices
    # once for each stream, and each token visits one of them.
    streams = {name: 2 if name.startswith("double") else 1 for name in network.units().projections}
    projections = sum(p.weight.numel() / streams[name] for name, p in network.units().projections.items())
    low_rank = sum(p.numel() for p in adapter.adapter_modules.parameters())
    attention = 2 * tokens * mmdit.hidden_size * mmdit.num_blocks
    forward = 2 * rows * tokens * (projections + low_rank + attention)
    # With frozen weights the way back is as much work as the way there, and the way there may come twice.
    flops = forward * (3 - activations + guided)
    block_bytes = KEPT_BYTES * mmdit.hidden_size * rows * tokens
    inputs_bytes = 2 * mmdit.hidden_size * rows * tokens * mmdit.num_blocks
    kept = max(inputs_bytes + block_bytes, activations * block_bytes * mmdit.num_blocks)
    kept += 4 * graphs * trained
    largest = max(sum(p.numel() for p in block.parameters()) for block in network.blocks)
    held = 2 * largest if streamed else base if shards == 1 else base // shards + 2 * largest
    there = (1 if narrow else 2) * held
    return Estimate(
        base=base,
        trained=trained,
        adapter_bytes=4 * whole,
        state_bytes=4 * (2 + moments) * trained,
        gpu_bytes=int(there + 4 * whole + 4 * (2 + moments) * trained + kept),
        flops=flops,
    )
