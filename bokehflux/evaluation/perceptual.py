"""LPIPS and DISTS in plain PyTorch, with weights that are at hand already.

LPIPS 0.1 (Zhang and others, arXiv 1801.03924) looks through AlexNet, DISTS (Ding and others, arXiv
2004.07728) through VGG16: torchvision's files of ImageNet weights. What was learned on top of them lies
within torchmetrics (extra `eval`), of which nothing else is used. B pictures [B, 3, H, W] in 0 ... 1.
"""

from __future__ import annotations

import importlib.util
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WEIGHTS = {"lpips": "alexnet-owt-7be5be79.pth", "dists": "vgg16-397923af.pth"}
"""Figure -> torchvision's file of ImageNet weights, under `checkpoints` of torch.hub's folder."""
HEADS = {"lpips": "lpips_models/alex.pth", "dists": "dists_models/weights.pt"}
"""Figure -> what was learned on top, under `functional/image` of torchmetrics."""
SMALLEST_PX = 31
"""Where AlexNet's second pooling still has something to pool."""


class _Features(nn.Sequential):
    """Layers by torchvision's numbers, so that its names fit. Gives what some of them see."""

    def __init__(self, layers: list[nn.Module], seen: tuple[int, ...]) -> None:
        super().__init__(*layers)
        self.seen = seen

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for i, layer in enumerate(self):
            x = layer(x)
            if i in self.seen:
                found.append(x)
        return found


class _SmoothPool(nn.Module):
    """Half the size, the root of a weighted mean of squares: VGG's pooling without its aliasing."""

    def forward(self, x: Tensor) -> Tensor:
        row = x.new_tensor([0.25, 0.5, 0.25])
        weight = torch.outer(row, row).expand(x.shape[1], 1, 3, 3)
        return (F.conv2d(x.square(), weight, stride=2, padding=1, groups=x.shape[1]) + 1e-12).sqrt()


class Lpips(nn.Module):
    """Weighted squared differences of AlexNet's directions."""

    SEEN = {1: 64, 4: 192, 7: 384, 9: 256, 11: 256}
    """Layer -> its channels."""

    def __init__(self) -> None:
        super().__init__()
        layers = [
            *(nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
        ]
        self.features = _Features(layers, tuple(self.SEEN))
        self.heads = nn.ParameterList(torch.zeros(1, width, 1, 1) for width in self.SEEN.values())

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """[B]. Raises ValueError for pictures below 31 pixels."""
        if min(a.shape[-2:]) < SMALLEST_PX:
            raise ValueError(f"LPIPS needs {SMALLEST_PX} x {SMALLEST_PX} pixels, got {list(a.shape[-2:])}")
        shift, scale = (
            a.new_tensor(three)[:, None, None] for three in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450))
        )
        distance = a.new_zeros(len(a))
        pairs = zip(*(self.features((2 * x - 1 - shift) / scale) for x in (a, b)), strict=True)
        for (of_a, of_b), head in zip(pairs, self.heads, strict=True):
            gap = (_direction(of_a) - _direction(of_b)).square()
            distance = distance + (head * gap).sum(1).mean((1, 2))
        return distance


class Dists(nn.Module):
    """One minus the weighted likeness of means (texture) and of what varies (structure) in VGG16."""

    STAGES = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))
    """Convolutions and channels; between stages the size halves."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        seen, widths = [], [3]
        for count, width in self.STAGES:
            layers += [_SmoothPool()] if layers else []
            for inputs in [widths[-1]] + [width] * (count - 1):
                layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()]
            seen.append(len(layers) - 1)
            widths.append(width)
        self.features = _Features(layers, tuple(seen))
        self.alpha, self.beta = (nn.Parameter(torch.zeros(1, sum(widths), 1, 1)) for _ in range(2))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """[B]."""
        mean, std = (
            a.new_tensor(three)[:, None, None] for three in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        )
        pairs = zip(*([x, *self.features((x - mean) / std)] for x in (a, b)), strict=True)
        likeness = [_likeness(*pair) for pair in pairs]
        texture, structure = (torch.cat(kind, 1) for kind in zip(*likeness, strict=True))
        alpha, beta = self.alpha.flatten(), self.beta.flatten()
        return 1 - (texture @ alpha + structure @ beta) / (alpha.sum() + beta.sum())


def _direction(x: Tensor) -> Tensor:
    return x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)


def _likeness(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """[B, C] of means, and of what varies, of two [B, C, H, W]."""
    mean_a, mean_b = a.mean((2, 3)), b.mean((2, 3))
    var_a, var_b = (x.var((2, 3), correction=0) for x in (a, b))
    both = (a * b).mean((2, 3)) - mean_a * mean_b
    texture = (2 * mean_a * mean_b + 1e-6) / (mean_a.square() + mean_b.square() + 1e-6)
    return texture, (2 * both + 1e-6) / (var_a + var_b + 1e-6)


class HubPerceptual:
    """Whichever of the two has its weights in a folder as torch.hub keeps it. Nothing is downloaded."""

    def __init__(self, hub: Path) -> None:
        """Raises ValueError where torchmetrics or the weights are not there, or not as published."""
        files = {name: hub / "checkpoints" / file for name, file in WEIGHTS.items()}
        there = {name: file for name, file in files.items() if file.is_file()}
        if not there:
            raise ValueError(
                f"--perceptual: neither {' nor '.join(map(str, files.values()))} is there; get them from "
                "download.pytorch.org/models (nothing is downloaded here)"
            )
        spec = importlib.util.find_spec("torchmetrics")
        if spec is None or spec.origin is None:
            raise ValueError(
                "--perceptual needs what was learned on top of the networks, which torchmetrics holds: "
                "pip install torchmetrics"
            )
        learned = Path(spec.origin).parent / "functional" / "image"
        self.networks: dict[str, nn.Module] = {}
        for name, file in there.items():
            self.networks[name] = network = Lpips() if name == "lpips" else Dists()
            backbone, heads = _read(file), _read(learned / HEADS[name])
            state = {key: value for key, value in backbone.items() if key.startswith("features.")}
            for key, value in heads.items():
                state[key.replace("lin", "heads.").removesuffix(".model.1.weight")] = value
            try:
                network.load_state_dict(state)
            except RuntimeError as error:
                raise ValueError(f"--perceptual: {file} is not as published: {error}") from error

    @torch.inference_mode()
    def __call__(self, a: Tensor, b: Tensor) -> Mapping[str, float]:
        """Mean distances of two [B, 3, H, W] in 0 ... 1, one pair at a time: VGG16 needs room."""
        pairs = list(zip(a.split(1), b.split(1), strict=True))
        return {
            name: float(torch.cat([network(*pair) for pair in pairs]).mean())
            for name, network in self.networks.items()
        }


def _read(file: Path) -> dict[str, Tensor]:
    """Raises ValueError for a file that is not there, or holds more than weights."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"--perceptual: {file} does not hold weights alone: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"--perceptual: {file} does not hold weights by name")
    return found
