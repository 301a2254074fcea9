"""BokehMe's two networks, by the published names: one renders small pictures, one doubles their size.

ARNet (adaptive rendering) sees a picture so small that no blur is wider than a few of its pixels, and says
besides where the scatter is not to be trusted. IUNet (iterative upsampling) doubles its picture. Both fold 2
x 2 pixels into channels first. B pictures, H x W pixels; float32.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

ARNET_WIDTH, IUNET_WIDTH, NUM_BLOCKS = 128, 64, 3


class _Conv(nn.Module):
    """3 x 3, and an ELU if it is told so. A module of its own because of the published names."""

    def __init__(self, inputs: int, outputs: int, elu: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.elu = elu

    def forward(self, x: Tensor) -> Tensor:
        return F.elu(self.conv(x)) if self.elu else self.conv(x)


class _Blocks(nn.Module):
    """Pairs of convolutions, each pair's result added to what it was given."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(_Conv(width, width, True), _Conv(width, width, True)) for _ in range(NUM_BLOCKS)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class _Network(nn.Module):
    def __init__(self, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.conv0 = _Conv(inputs, width, True)
        self.block_stack = _Blocks(width)
        self.conv1 = _Conv(width, outputs, False)

    def through(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.conv1(self.block_stack(self.conv0(x))), 2)


class ARNet(_Network):
    def __init__(self, width: int = ARNET_WIDTH) -> None:
        super().__init__(17, width, 16)

    def forward(self, image: Tensor, defocus: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
        """Blurred picture [B, 3, H, W], and how wrong the scatter is, 0 ... 1, [B, 1, H, W].

        image [B, 3, H, W]; defocus [B, 1, H, W] in units of 10 px; gamma: (gamma - 1) / 4.
        """
        folded = _folded(torch.cat([image, defocus], 1))
        out = resize(self.through(torch.cat([folded, _constant(folded, gamma)], 1)), image.shape[-2:])
        return out[:, :3], out[:, 3:].sigmoid()


class IUNet(_Network):
    def __init__(self, width: int = IUNET_WIDTH) -> None:
        super().__init__(20, width, 12)

    def forward(self, image: Tensor, defocus: Tensor, coarse: Tensor, gamma: float) -> Tensor:
        """Blurred picture [B, 3, H, W]; coarse: the same picture, smaller, [B, 3, h, w]. Else as ARNet's."""
        folded = _folded(torch.cat([image, defocus], 1))
        if coarse.shape[-2:] != folded.shape[-2:]:
            # The one resize of BokehMe's that does not align corners.
            coarse = F.interpolate(coarse, folded.shape[-2:], mode="bilinear", align_corners=False)
        x = torch.cat([folded, coarse, _constant(folded, gamma)], 1)
        return resize(self.through(x), image.shape[-2:])


Kind = TypeVar("Kind", ARNet, IUNet)


class Networks(NamedTuple):
    arnet: ARNet
    iunet: IUNet


def resize(x: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """To height and width `size`: bilinear, corners aligned; at its own size, untouched."""
    if x.shape[-2:] == torch.Size(size):
        return x
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=True)


def _folded(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, 4 C, H // 2, W // 2]; odd sizes are resized down to even ones, 1 up to 2."""
    height, width = (max(side // 2, 1) * 2 for side in x.shape[-2:])
    return F.pixel_unshuffle(resize(x, (height, width)), 2)


def _constant(like: Tensor, value: float) -> Tensor:
    return like.new_full((like.shape[0], 1, *like.shape[-2:]), value)


def load_networks(arnet: Path, iunet: Path) -> Networks:
    """Both networks from the published arnet.pth and iunet.pth, or the same tensors in .safetensors files.

    A .pth is read without running what it may hold. Raises ValueError for a file that is not such a network.
    """
    return Networks(_loaded(ARNet, arnet), _loaded(IUNet, iunet))


def _loaded(kind: type[Kind], path: Path) -> Kind:
    tensors = _tensors(path)
    if not isinstance(tensors, dict):
        raise ValueError(f"{path}: expected BokehMe's {kind.__name__}, found a {type(tensors).__name__}")
    first = tensors.get("conv0.conv.weight")
    if not isinstance(first, Tensor) or first.dim() != 4:
        raise ValueError(f"{path}: expected BokehMe's {kind.__name__}, found no tensor conv0.conv.weight")
    network = kind(first.shape[0])
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{path}: expected BokehMe's {kind.__name__}: {error}") from error
    return network.eval().requires_grad_(False)


def _tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"{path}: expected a file of one of BokehMe's networks, and there is none")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path}: expected a .pth or .safetensors file of tensors: {error}") from error
    # Published files keep the tensors under "model", beside the optimiser's.
    return saved.get("model", saved) if isinstance(saved, dict) else saved
