"""LPIPS and DISTS, as torchmetrics has them (extra `eval`), with weights that are at hand already."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

WEIGHTS = {"lpips": "alexnet-owt-7be5be79.pth", "dists": "vgg16-397923af.pth"}
"""Figure -> torchvision's file of ImageNet weights, under `checkpoints` of torch.hub's folder."""


class HubPerceptual:
    """Whichever of the two has its weights in a folder as torch.hub keeps it. Nothing is downloaded."""

    def __init__(self, hub: Path) -> None:
        """Raises ValueError where the packages or the weights are not there, or cannot be read."""
        files = {name: hub / "checkpoints" / file for name, file in WEIGHTS.items()}
        there = {name: file for name, file in files.items() if file.is_file()}
        if not there:
            raise ValueError(
                f"--perceptual: neither {' nor '.join(map(str, files.values()))} is there; get them from "
                "download.pytorch.org/models (nothing is downloaded here)"
            )
        for file in there.values():  # torchvision itself would run what a pickle says
            try:
                torch.load(file, map_location="cpu", weights_only=True)
            except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
                raise ValueError(f"--perceptual: {file} does not hold weights alone: {error}") from error
        try:
            from torchmetrics.image.dists import DeepImageStructureAndTextureSimilarity
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
        except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision for another torch
            raise ValueError(
                "--perceptual needs torchmetrics, and a torchvision that fits this torch: "
                f"pip install torchmetrics torchvision ({error})"
            ) from error
        before = torch.hub.get_dir()
        torch.hub.set_dir(str(hub))
        try:
            makers = {
                "lpips": lambda: LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True),
                "dists": lambda: DeepImageStructureAndTextureSimilarity(reduction="mean"),
            }
            self.networks = {name: makers[name]() for name in there}
        finally:
            torch.hub.set_dir(before)

    def __call__(self, a: Tensor, b: Tensor) -> Mapping[str, float]:
        """Mean distances of two [K, 3, H, W] in 0 ... 1."""
        return {name: float(network(a, b)) for name, network in self.networks.items()}
