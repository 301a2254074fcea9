"""The colour transfer on a GPU: whole numbers, so the same bits as on a CPU."""

from __future__ import annotations

import torch

from bokehflux.pipeline.color import lab8_to_rgb, match_lab_means, rgb_to_lab8


def test_every_colour_is_the_cpus() -> None:
    colours = torch.cartesian_prod(*[torch.arange(256, dtype=torch.uint8)] * 3).view(4096, 4096, 3)
    for convert in (rgb_to_lab8, lab8_to_rgb):
        assert torch.equal(convert(colours.cuda()).cpu(), convert(colours))


def test_transfer() -> None:
    target, pivot = (torch.randint(256, size, dtype=torch.uint8) for size in ((1024, 768, 3), (96, 64, 3)))
    moved = match_lab_means(target.cuda(), pivot.cuda())
    assert moved.is_cuda and torch.equal(moved.cpu(), match_lab_means(target, pivot))
