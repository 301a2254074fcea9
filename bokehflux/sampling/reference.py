"""A photograph as keys and values: one pass of the network, before the first step.

Its row has noise level 0, its own level, and positions of its own; `models.reference` has the updates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bokehflux.attention import ReferenceKeys, ReferenceRow
from bokehflux.conditioning import Conditioning
from bokehflux.models.adapter import BokehCondition
from bokehflux.models.embeddings import RopeTable, rope_table
from bokehflux.models.mmdit import MMDiT, Rows
from bokehflux.models.reference import ReferenceAdapter, reference_ids
from bokehflux.sampling.latents import LatentGrid, position_ids


def read_reference(
    mmdit: MMDiT,
    adapter: ReferenceAdapter,
    photo: Tensor,
    text: Conditioning,
    levels: BokehCondition | None,
    rope: RopeTable,
    guidance: Tensor,
) -> ReferenceKeys:
    """The keys and values of photographs, for `attention.OnReference`.

    photo [B, N, C]: packed latents. text: what each shows, [B, ...]. levels: of the B photographs. rope: of
    `reference_ids`. guidance [B]: that of the targets. Blocks that the bokeh adapter leaves alone keep none.
    """
    keys, sigma = ReferenceKeys(), torch.zeros(len(photo), device=photo.device)
    spec = ReferenceRow(keys=keys, first=text.txt.shape[1])
    text = Conditioning(txt=text.txt.to(mmdit.dtype), pooled=text.pooled.to(mmdit.dtype))
    rows = Rows(img=photo, txt=text.txt, attention=spec, bokeh=levels, reference=adapter)
    mmdit.velocities([rows], mmdit.modulations(text.pooled, sigma, guidance).for_blocks(mmdit.dtype), rope)
    return keys


def reference_rope(mmdit: MMDiT, grid: LatentGrid, txt_length: int) -> RopeTable:
    """Rotations of a photograph's row: T text tokens, then those of its size."""
    ids = reference_ids(position_ids(grid, txt_length, mmdit.device), txt_length)
    return rope_table(ids, mmdit.config.axes_dim, mmdit.config.theta)
