"""The autoencoder on large pictures: layer by layer, each a band of rows at a time. No seams, bounded memory.

Tiling usually decodes overlapping pieces and blends them. Group normalisation then sees another mean in every
piece, and attention other positions, so the pieces differ in tint; an overlap only spreads
that. Here every layer is computed for the whole picture before the next one begins: convolutions get the rows
around their band, normalisations the statistics of the whole map, queries all keys. So the result is that of
the plain call up to rounding, and there is nothing to blend.

Maps between layers stay on the device while they are small, otherwise in host memory. The device holds the
band at work (`BAND_ELEMENTS`) and, during attention, keys and values of all positions, 1/64 of the pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from bokehflux.models.vae import (
    AttnBlock,
    AutoencoderKL,
    Downsample,
    DownStage,
    GroupNorm,
    Middle,
    ResBlock,
    Upsample,
    UpStage,
    split_moments,
)

BAND_ELEMENTS = 1 << 24
"""Numbers in a band, without its copies (a handful): 34 MB in bfloat16. A band has at least one row."""
DEVICE_MAP_BYTES = 1_200_000_000
"""Maps stay on the device up to this size, that of all that exist at once: 1024 x 1024 pixels in bfloat16."""
Rows = Callable[[int, int], Tensor]
"""(first, end) -> these rows of a map, [B,C,end - first,W], on the device."""


class FeatureMap(NamedTuple):
    """What one layer hands to the next, with the statistics that a normalisation of it needs."""

    x: Tensor
    """[B,C,H,W] in channels-last order, on the device where maps are kept."""
    mean: Tensor | None = None
    var: Tensor | None = None
    """[B,G] float32 on the device at work, over the channels and all positions of each group."""


def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """As `vae.decode`, up to rounding: model latents [B,z,H/8,W/8] -> images [B,3,H,W], about [-1, 1]."""
    net, z = vae.decoder, vae.unscaled(latents)
    bands = Bands.for_images(vae, z, z.shape[-2:].numel() * vae.config.downscale**2)
    x = bands.keep(net.conv_in(z))  # small; called as a module, so that hooks see decoding begin
    x = bands.middle(net.mid, x)
    for stage in reversed(net.up):
        assert isinstance(stage, UpStage)
        x = bands.stage(stage, x)
        if isinstance(stage.upsample, Upsample):
            x = bands.convolve(stage.upsample.conv, x, zoom=2)
    return bands.convolve(net.conv_out, x, norm=net.norm_out).x.contiguous().to(latents.device)


def moments(vae: AutoencoderKL, x: Tensor) -> tuple[Tensor, Tensor]:
    """As `vae.moments`, up to rounding, of images [B,3,H,W]; `vae.draw` makes latents of it."""
    vae.check_images(x)
    net, bands = vae.encoder, Bands.for_images(vae, x, x.shape[-2:].numel())
    h = bands.convolve(net.conv_in, FeatureMap(x))
    for stage in net.down:
        assert isinstance(stage, DownStage)
        h = bands.stage(stage, h)
        if isinstance(stage.downsample, Downsample):
            h = bands.convolve(stage.downsample.conv, h)
    h = bands.middle(net.mid, h)
    return split_moments(bands.convolve(net.conv_out, h, norm=net.norm_out).x.contiguous().to(x.device))


@dataclass(frozen=True, kw_only=True)
class Bands:
    """Runs layers over whole maps, band by band."""

    device: torch.device
    """Where the work is done."""
    home: torch.device
    """Where maps are kept."""
    num_groups: int

    @classmethod
    def for_images(cls, vae: AutoencoderKL, x: Tensor, num_pixels: int) -> Bands:
        """x: the first layer's input, on the device. num_pixels: of one image."""
        widest = max(vae.config.channels[:2])
        # Of a block: its input, the map between its convolutions, and its output, which is narrower.
        needs = 2 * len(x) * widest * num_pixels * x.element_size()
        home = x.device if needs <= DEVICE_MAP_BYTES else torch.device("cpu")
        return cls(device=x.device, home=home, num_groups=vae.config.norm_groups)

    def keep(self, x: Tensor) -> FeatureMap:
        """A map that is computed already."""
        return self.fill(lambda first, end: x[:, :, first:end], x.shape, x.dtype, x[0, :, 0].numel())

    def fill(self, rows: Rows, shape: Sequence[int], dtype: torch.dtype, row_elements: int) -> FeatureMap:
        """The map [B,C,H,W] that `rows` computes. row_elements: numbers at work for a row of one image."""
        batch, channels, height, _ = shape
        step = max(1, BAND_ELEMENTS // (batch * row_elements))
        pinned = self.home.type == "cpu" and self.device.type == "cuda"
        out = torch.empty(
            *shape, dtype=dtype, device=self.home, pin_memory=pinned, memory_format=torch.channels_last
        )
        counts, parts = [], []
        for first in range(0, height, step):
            band = rows(first, min(first + step, height))
            if channels % self.num_groups == 0:
                grouped = band.float().unflatten(1, (self.num_groups, -1))  # [B,G,C/G,h,W]
                parts.append(torch.stack(torch.var_mean(grouped, dim=(2, 3, 4), correction=0)))
                counts.append(band.shape[2])
            out[:, :, first : first + band.shape[2]].copy_(band)
        return FeatureMap(out, *self._merged(counts, parts)) if parts else FeatureMap(out)

    def _merged(self, counts: Sequence[int], parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Mean and variance [B,G] of all rows, from each band's; on the CPU, which has float64."""
        weight = torch.tensor(counts, dtype=torch.float64).view(-1, 1, 1) / sum(counts)
        var, mean = torch.stack(list(parts)).cpu().double().unbind(1)
        whole = (weight * mean).sum(0)
        spread = (weight * (var + (mean - whole).square())).sum(0)
        return whole.float().to(self.device), spread.float().to(self.device)

    def read(self, x: Tensor, first: int, end: int) -> Tensor:
        return x[:, :, first:end].to(self.device, non_blocking=True)

    def normalised(self, norm: GroupNorm, of: FeatureMap, band: Tensor) -> Tensor:
        """Rows of a map, normalised with the statistics of the whole map."""
        assert of.mean is not None and of.var is not None
        each = band.shape[1] // self.num_groups
        scale = norm.weight.float() * (of.var + norm.eps).rsqrt().repeat_interleave(each, 1)
        shift = norm.bias.float() - of.mean.repeat_interleave(each, 1) * scale
        return torch.addcmul(shift[..., None, None], band.float(), scale[..., None, None]).to(band.dtype)

    def convolve(
        self,
        conv: nn.Conv2d,
        x: FeatureMap,
        *,
        norm: GroupNorm | None = None,
        zoom: int = 1,
        add: Rows | None = None,
    ) -> FeatureMap:
        """conv(silu(norm(x)), enlarged zoom times) + add. Zeros pad the whole map, not its bands."""
        kernel, stride, before = conv.kernel_size[0], conv.stride[0], conv.padding[0]
        assert isinstance(before, int)
        height, width = (zoom * side for side in x.x.shape[-2:])
        # Downsampling pads at the end alone, as far as its last output reaches.
        after = (width // stride - 1) * stride + kernel - before - width

        def rows(first: int, end: int) -> Tensor:
            top, bottom = first * stride - before, (end - 1) * stride - before + kernel
            low, high = max(top, 0), min(bottom, height)
            band = self.read(x.x, low // zoom, -(-high // zoom))
            if norm is not None:
                band = F.silu(self.normalised(norm, x, band))
            if zoom > 1:
                skip = low % zoom
                band = F.interpolate(band, scale_factor=float(zoom), mode="nearest")
                band = band[:, :, skip : skip + high - low]
            band = F.pad(band, (before, after, low - top, bottom - high))  # [B,C,rows + kernel - 1,W + ...]
            out = F.conv2d(band, conv.weight, conv.bias, conv.stride)
            return out if add is None else out + add(first, end)

        shape = (len(x.x), conv.out_channels, height // stride, width // stride)
        cost = max(x.x.shape[1] * width * stride, conv.out_channels * width // stride)
        return self.fill(rows, shape, x.x.dtype, cost)

    def residual(self, block: ResBlock, x: FeatureMap) -> FeatureMap:
        h = self.convolve(block.conv1, x, norm=block.norm1)
        return self.convolve(
            block.conv2, h, norm=block.norm2, add=lambda a, b: block.nin_shortcut(self.read(x.x, a, b))
        )

    def stage(self, stage: UpStage | DownStage, x: FeatureMap) -> FeatureMap:
        """The blocks at one resolution, without the step to the next."""
        for block in stage.block:
            assert isinstance(block, ResBlock)
            x = self.residual(block, x)
        return x

    def attention(self, block: AttnBlock, x: FeatureMap) -> FeatureMap:
        def tokens(layer: nn.Conv2d, band: Tensor) -> Tensor:
            return rearrange(layer(self.normalised(block.norm, x, band)), "b c h w -> b 1 (h w) c")

        b, c, height, width = x.x.shape
        step = max(1, BAND_ELEMENTS // (b * c * width))
        k, v = (
            torch.cat(
                [tokens(f, self.read(x.x, a, min(a + step, height))) for a in range(0, height, step)], 2
            )
            for f in (block.k, block.v)
        )

        def rows(first: int, end: int) -> Tensor:
            band = self.read(x.x, first, end)
            h = F.scaled_dot_product_attention(tokens(block.q, band), k, v)
            return band + block.proj_out(rearrange(h, "b 1 (h w) c -> b c h w", h=end - first))

        # If no fused kernel takes heads this wide, each query holds a score for every position.
        return self.fill(rows, x.x.shape, x.x.dtype, width * max(c, height * width))

    def middle(self, middle: Middle, x: FeatureMap) -> FeatureMap:
        x = self.residual(middle.block_1, x)
        return self.residual(middle.block_2, self.attention(middle.attn_1, x))
