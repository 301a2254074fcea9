"""The FLUX autoencoder: a convolutional KL autoencoder between images and 8x smaller latents.

Parameter names are those of Black Forest Labs' `ae.safetensors`. A "stage" is the work at one resolution;
stage 0 is the finest in the encoder and in the decoder. Shapes: B images, C channels, H x W the side lengths,
z the latent channels. Docstrings write latents as 8x smaller, as the four stages of FLUX make them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from bokehflux.configs import VAEConfig
from bokehflux.kernels.group_norm.interface import group_norm_silu
from bokehflux.models.units import Network, Units

_EPS = 1e-6
_LOGVAR_RANGE = (-30.0, 20.0)


class GroupNorm(nn.GroupNorm):
    """Group normalisation that keeps the input's dtype.

    Autocast would first copy every activation to float32. That costs memory and gains nothing: the kernels
    accumulate their statistics in float32 whatever the input is.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__(groups, channels, eps=_EPS)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class GroupNormSiLU(GroupNorm):
    """Group normalisation, then SiLU: the pair stands before every convolution of a block."""

    def forward(self, x: Tensor) -> Tensor:
        return group_norm_silu(x, self.weight, self.bias, self.num_groups, self.eps)


class ResBlock(nn.Module):
    """Two normalised 3x3 convolutions around a shortcut, [B,C_in,H,W] -> [B,C_out,H,W]."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNormSiLU(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNormSiLU(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        changes_width = in_channels != out_channels
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if changes_width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.norm1(x))
        h = self.conv2(self.norm2(h))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Self-attention of all positions with one head, [B,C,H,W] -> [B,C,H,W]; q, k, v are 1x1 convolutions."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (rearrange(f(h), "b c h w -> b 1 (h w) c") for f in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)  # [B, 1, H W, C]
        return x + self.proj_out(rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[-2]))


class Downsample(nn.Module):
    """Strided 3x3 convolution, [B,C,H,W] -> [B,C,H/2,W/2]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        # One zero at the right and at the bottom: symmetric padding would shift the image by half a pixel.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour doubling and a 3x3 convolution, [B,C,H,W] -> [B,C,2H,2W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class DownStage(nn.Module):
    """Residual blocks at one resolution of the encoder, then the step to the next coarser one."""

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int, groups: int, last: bool) -> None:
        super().__init__()
        self.block = _res_blocks(in_channels, out_channels, num_blocks, groups)
        self.downsample = nn.Identity() if last else Downsample(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return self.downsample(x)


class UpStage(nn.Module):
    """Residual blocks at one resolution of the decoder, then the step to the next finer one."""

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int, groups: int, last: bool) -> None:
        super().__init__()
        self.block = _res_blocks(in_channels, out_channels, num_blocks, groups)
        self.upsample = nn.Identity() if last else Upsample(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return self.upsample(x)


class Middle(nn.Module):
    """The coarsest resolution, the only one with attention, [B,C,H,W] -> [B,C,H,W]."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Images [B,3,H,W] -> mean and log variance of the latents, concatenated: [B,2z,H/8,W/8]."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, groups, last = config.channels, config.norm_groups, len(config.channels) - 1
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList(
            DownStage(widths[max(i - 1, 0)], width, config.layers_per_block, groups, last=i == last)
            for i, width in enumerate(widths)
        )
        self.mid = Middle(widths[-1], groups)
        self.norm_out = GroupNormSiLU(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for stage in self.down:
            h = stage(h)
        return self.conv_out(self.norm_out(self.mid(h)))


class Decoder(nn.Module):
    """Unscaled latents [B,z,H/8,W/8] -> images [B,3,H,W]."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, groups, last = config.channels, config.norm_groups, len(config.channels) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], groups)
        self.up = nn.ModuleList(
            UpStage(widths[min(i + 1, last)], width, config.layers_per_block + 1, groups, last=i == 0)
            for i, width in enumerate(widths)
        )
        self.norm_out = GroupNormSiLU(widths[0], groups)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for stage in reversed(self.up):
            h = stage(h)
        return self.conv_out(self.norm_out(h))


class AutoencoderKL(Network):
    """Images in [-1, 1] <-> the latents that the transformer sees, (z - shift) * scale."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def units(self) -> Units:
        ends = {conv for net in (self.encoder, self.decoder) for conv in (net.conv_in, net.conv_out)}
        filters = [m for m in self.modules() if isinstance(m, nn.Conv2d) and m not in ends]
        return Units(matrices=tuple(conv.weight for conv in filters))

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the unscaled latents, each [B,z,H/8,W/8], of images [B,3,H,W] in [-1, 1].

        The log variance lies in [-30, 20]. Raises ValueError when `x` has another shape or a side length that
        is not a multiple of `config.downscale`.
        """
        self.check_images(x)
        return split_moments(self.encoder(_in_fast_order(x)))

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Model latents [B,z,H/8,W/8] of images [B,3,H,W] in [-1, 1].

        With a generator (on any device) a random draw, otherwise the distribution's mean. Raises ValueError
        as `moments` does.
        """
        return self.draw(*self.moments(x), generator)

    def draw(self, mean: Tensor, logvar: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Model latents from the result of `moments`, as `encode` draws them."""
        z = mean
        if generator is not None:
            noise = torch.randn(z.shape, generator=generator, device=generator.device, dtype=z.dtype)
            z = z + torch.exp(0.5 * logvar) * noise.to(z.device)
        return (z - self.config.shift) * self.config.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Model latents [B,z,H/8,W/8] -> images [B,3,H,W], about [-1, 1] but not clamped.

        Raises ValueError when `latents` has another shape.
        """
        return self.decoder(_in_fast_order(self.unscaled(latents)))

    def unscaled(self, latents: Tensor) -> Tensor:
        """Model latents [B,z,H/8,W/8] -> the decoder's input. Raises ValueError for another shape."""
        if latents.ndim != 4 or latents.shape[1] != self.config.latent_channels:
            raise ValueError(
                f"latents must be [B,{self.config.latent_channels},h,w], got {tuple(latents.shape)}; "
                "unpack image tokens first"
            )
        z = latents / self.config.scale + self.config.shift
        return z.to(self.decoder.conv_in.weight.dtype)  # a CPU keeps latents in float32

    def check_images(self, x: Tensor) -> None:
        """Raise ValueError for images that the encoder cannot take: see `moments`."""
        multiple = self.config.downscale
        if x.ndim != 4 or x.shape[1] != 3 or x.shape[2] % multiple or x.shape[3] % multiple:
            raise ValueError(
                f"images must be [B,3,H,W] with H and W multiples of {multiple}, got {tuple(x.shape)}; "
                "resize or crop them"
            )


def _in_fast_order(x: Tensor) -> Tensor:
    """16-bit numbers channels last: convolutions keep the order, and are about twice as fast on Hopper
    (`pytest -m gpu -s tests/gpu/test_tiling.py` prints their time). In float32 last bits would change."""
    fast = x.dtype == torch.bfloat16 or (x.is_cuda and x.dtype == torch.float16)
    return x.contiguous(memory_format=torch.channels_last) if fast else x


def split_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """The encoder's output [B,2z,h,w] -> mean and log variance, the latter in [-30, 20]."""
    mean, logvar = x.chunk(2, dim=1)
    return mean, logvar.clamp(*_LOGVAR_RANGE)


def to_uint8(x: Tensor) -> Tensor:
    """Images [B,3,H,W] in [-1, 1] (values outside are clamped) -> 8-bit [B,H,W,3], rounded half to even."""
    # The affine map is computed in the input's dtype, as in diffusers: in bf16 its rounding is seen.
    x = (x / 2 + 0.5).clamp(0, 1)
    return rearrange(x.float() * 255, "b c h w -> b h w c").round().to(torch.uint8)


def _res_blocks(in_channels: int, out_channels: int, num_blocks: int, groups: int) -> nn.ModuleList:
    widths = [in_channels] + [out_channels] * num_blocks
    return nn.ModuleList(ResBlock(a, b, groups) for a, b in zip(widths[:-1], widths[1:], strict=True))
