"""The control adapter: a dial with more than one number, as a second branch beside the published one.

Rows may be asked for a focus plane and an aperture, which are context tokens with keys and values of their
own, and for a map of blur, which is a value bias of its own for every image token. What attends to the tokens
are a row's keys: grounded rows have no queries of their own. All of it is added to the output of attention,
where the level's value vector is, and starts as zero; rows that are asked for nothing stay as they are.

B rows, L joint tokens, N image tokens, M context tokens, C their width, E width, H heads, D head dim.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bokehflux.aperture import DISC, Aperture
from bokehflux.configs import ControlsConfig, MMDiTConfig
from bokehflux.models.adapter import LowRank

PATCH_PX = 16
"""Side of what an image token shows."""
FEATURES = 8
"""Numbers that say how blurred a token's pixels are."""
SHAPE_PX = 16
"""Side of the picture of an aperture."""
WAVES = 4
"""Frequencies in which the focus plane is told."""


def token_features(circles: Tensor) -> Tensor:
    """Circles of confusion [B, H, W] -> [B, N, 8], what a network is told of each token's pixels.

    circles: signed, above 0 behind the focus, 1 for the largest radius of level 30. The means of the four
    quarters tell on which side of an edge which blur lies; least, most, mean size and deviation the rest.
    Roots, so that a little blur counts.
    """
    rows, columns = (side // PATCH_PX for side in circles.shape[-2:])
    cells = circles.unflatten(2, (columns, PATCH_PX)).unflatten(1, (rows, PATCH_PX))
    patches = cells.transpose(2, 3).flatten(1, 2)  # [B, h, 16, w, 16] -> [B, N, 16, 16]
    quarters = F.avg_pool2d(patches, PATCH_PX // 2).flatten(2)  # [B, N, 4]
    pixels = patches.flatten(2)  # [B, N, 256]
    ends = [pixels.amin(2), pixels.amax(2), pixels.abs().mean(2), pixels.std(2, correction=0)]
    features = torch.cat([quarters, torch.stack(ends, 2)], 2)
    return features.sign() * features.abs().sqrt()


def shape_picture(aperture: Aperture) -> Tensor:
    """[256]: the shape less the disc, on 16 x 16 places of the square around it. A disc is zero."""
    place = torch.arange(SHAPE_PX) - (SHAPE_PX - 1) / 2
    rim, edge = torch.tensor(SHAPE_PX / 2), torch.tensor(1.0)
    shape, disc = (each.spread(place, place[:, None], rim, edge) for each in (aperture, DISC))
    return (shape - disc).flatten()


@dataclass(frozen=True, kw_only=True, eq=False)
class Controls:
    """What rows are asked for beside their level, and the adapter that knows how."""

    adapter: ControlAdapter
    focus: Tensor
    """[B] the plane that is sharp, 0 (the subject) to 1 (infinity) in disparity; NaN: not said."""
    shape: Tensor
    """[B, 256] of `shape_picture`; zero: a disc."""
    features: Tensor
    """[B, N, 8] of `token_features`; NaN: not said."""

    def rows(self, rows: slice) -> Controls:
        """Those of some rows of the batch."""
        return dataclasses.replace(
            self, focus=self.focus[rows], shape=self.shape[rows], features=self.features[rows]
        )

    def for_blocks(self, level: Tensor) -> dict[int, BlockControl]:
        """What each block adds. level [B]: what the network is told of it, 0-1 or -1."""
        return self.adapter(self, level)


class ControlBlock(nn.Module):
    """What is added in one block."""

    def __init__(self, config: ControlsConfig, hidden_size: int) -> None:
        super().__init__()
        width, rank = config.context_dim, config.rank
        self.to_k_ctl = LowRank(width, hidden_size, rank)
        self.to_v_ctl = LowRank(width, hidden_size, rank)
        self.to_map_ctl = LowRank(width, hidden_size, rank)
        self.to_out_ctl = LowRank(hidden_size, hidden_size, rank)


class ControlAdapter(nn.Module):
    """Embeds what rows are asked for; blocks are numbered over double then single ones."""

    def __init__(self, config: ControlsConfig, mmdit: MMDiTConfig) -> None:
        super().__init__()
        self.config = config
        self.num_heads = mmdit.num_heads
        hidden, width = config.hidden_dim, config.context_dim

        def embedding(count: int, out: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(count, hidden), nn.SiLU(), nn.Linear(hidden, out))

        self.focus_in = embedding(2 + 2 * WAVES, config.tokens * width)
        self.shape_in = nn.Linear(SHAPE_PX**2, config.tokens * width)
        self.map_in = embedding(FEATURES, width)
        self.adapter_modules = nn.ModuleDict(
            {str(i): ControlBlock(config, mmdit.hidden_size) for i in range(mmdit.num_blocks)}
        )

    def forward(self, asked: Controls, level: Tensor) -> dict[int, BlockControl]:
        """See `Controls.for_blocks`."""
        like = self.shape_in.weight
        level, shape, features = (x.to(like) for x in (level, asked.shape, asked.features))
        focus = asked.focus.to(like.device, torch.float32)  # in 16 bits waves are 0.1 off
        has_focus, has_map = ~focus.isnan(), ~features.isnan().any(2).any(1)  # [B]
        told = has_focus.to(like)[:, None]
        angles = focus.nan_to_num()[:, None] * math.pi * 2.0 ** torch.arange(WAVES, device=like.device)
        waves = torch.cat([angles.sin(), angles.cos()], 1).to(like) * told  # [B, 8]
        focus_tokens = self.focus_in(torch.cat([level[:, None], told, waves], 1))
        tokens = torch.cat([focus_tokens, self.shape_in(shape)], 1)  # [B, M C]
        width = self.config.context_dim
        tokens = F.layer_norm(tokens.unflatten(1, (-1, width)), (width,))  # [B, M, C]
        on = (has_focus | has_map | (shape != 0).any(1)).to(like)[:, None, None]
        blur = F.layer_norm(self.map_in(features.nan_to_num()), (width,))  # [B, N, C]
        blur = blur * has_map.to(like)[:, None, None]

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(2, (self.num_heads, -1))  # [B, M, E] -> [B, M, H, D]

        return {
            i: BlockControl(
                k=heads(block.to_k_ctl(tokens)),
                v=heads(block.to_v_ctl(tokens)),
                on=on,
                blur=blur,
                block=block,
            )
            for i, block in enumerate(self.blocks)
        }

    @property
    def blocks(self) -> list[ControlBlock]:
        return list(self.adapter_modules.values())  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockControl:
    """What is added to the output of one block's attention."""

    k: Tensor
    """[B, M, H, D]"""
    v: Tensor
    """[B, M, H, D]"""
    on: Tensor
    """[B, 1, 1]: 0 for rows that are asked for nothing."""
    blur: Tensor
    """[B, N, C]: the embedded map; 0 without one."""
    block: ControlBlock

    def rows(self, rows: slice) -> BlockControl:
        """Those of some rows of the batch."""
        return dataclasses.replace(
            self, k=self.k[rows], v=self.v[rows], on=self.on[rows], blur=self.blur[rows]
        )

    def __call__(self, joint: Tensor, k: Tensor) -> Tensor:
        """joint [B, L, H, D] of attention, k [B, L, H, D] its rows' keys -> [B, L, H, D]."""
        seeking, keys, values = (x.to(joint.dtype).transpose(1, 2) for x in (k, self.k, self.v))
        found = F.scaled_dot_product_attention(seeking, keys, values).transpose(1, 2)  # [B, L, H, D]
        added = found.flatten(2) + self.block.to_out_ctl(joint.flatten(2))  # [B, L, E]
        bias = self.block.to_map_ctl(self.blur).to(joint.dtype)  # [B, N, E]
        added = added + F.pad(bias, (0, 0, joint.shape[1] - bias.shape[1], 0))
        return joint + (self.on.to(joint.dtype) * added).view(joint.shape)


def init_controls(adapter: ControlAdapter, generator: torch.Generator | None = None) -> None:
    """Start of training: whatever is added is zero; keys are drawn at random, so that tokens differ."""
    for name, module in adapter.named_modules():
        if isinstance(module, LowRank):
            nn.init.normal_(module.down.weight, std=module.down.in_features**-0.5, generator=generator)
            if name.endswith("to_k_ctl"):
                std = module.up.in_features**-0.5
                nn.init.normal_(module.up.weight, std=std, generator=generator)
            else:
                nn.init.zeros_(module.up.weight)
