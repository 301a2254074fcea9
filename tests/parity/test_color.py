"""Lab conversion against OpenCV on all 8-bit colours, and the colour transfer against published results."""

from __future__ import annotations

import time
from collections.abc import Callable

import cv2
import numpy as np
import pytest
import torch
from helpers import needs_shared, shared
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from bokehflux.pipeline import color


def on_arrays(function: Callable[..., torch.Tensor]) -> Callable[..., np.ndarray]:
    """The function for OpenCV's arrays."""
    return lambda *images: function(*(torch.from_numpy(image) for image in images)).numpy()


rgb_to_lab8, lab8_to_rgb, match_lab_means = map(
    on_arrays, (color.rgb_to_lab8, color.lab8_to_rgb, color.match_lab_means)
)
CONVERSIONS = [(rgb_to_lab8, cv2.COLOR_RGB2LAB), (lab8_to_rgb, cv2.COLOR_LAB2RGB)]


def scene(seed: int, height: int = 48, width: int = 72) -> np.ndarray:
    """A smooth coloured picture with some grain, as 8-bit RGB."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 255, (4, 6, 3)).astype(np.float32)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return (smooth + rng.normal(0, 4, smooth.shape)).clip(0, 255).astype(np.uint8)


def published(target: np.ndarray, pivot: np.ndarray) -> np.ndarray:
    """The transfer as described, through OpenCV."""
    lab = cv2.cvtColor(target, cv2.COLOR_RGB2LAB).astype(np.float32)
    pivot_lab = cv2.cvtColor(pivot, cv2.COLOR_RGB2LAB).astype(np.float32)
    moved = lab - lab.mean(axis=(0, 1)) + pivot_lab.mean(axis=(0, 1))
    return cv2.cvtColor(moved.clip(0, 255).astype(np.uint8), cv2.COLOR_LAB2RGB)


@pytest.mark.parametrize(("ours", "code"), CONVERSIONS)
def test_every_colour_is_opencvs(ours: Callable[[np.ndarray], np.ndarray], code: int) -> None:
    rest = np.stack(np.meshgrid(np.arange(256), np.arange(256), indexing="ij"), axis=-1).astype(np.uint8)
    colours = np.empty((256, 256, 3), np.uint8)
    for first in range(256):
        colours[..., 0], colours[..., 1:] = first, rest
        assert np.array_equal(ours(colours), cv2.cvtColor(colours, code)), f"first channel {first}"


@settings(max_examples=30)
@given(height=st.integers(1, 40), width=st.integers(1, 40), seed=st.integers(0, 9999))
def test_any_size(height: int, width: int, seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    for ours, code in CONVERSIONS:
        assert np.array_equal(ours(image), cv2.cvtColor(image, code))


def test_strided_input() -> None:
    image = scene(0).transpose(1, 0, 2)[::2, 1::3]
    assert np.array_equal(rgb_to_lab8(image), cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2LAB))


@pytest.mark.parametrize("seed", range(10))
def test_transfer_is_the_published_one(seed: int) -> None:
    target, pivot = scene(seed), scene(seed + 100, 40, 56)
    out = match_lab_means(target, pivot)
    assert out.dtype == np.uint8 and out.shape == target.shape
    assert np.array_equal(out, published(target, pivot))


@pytest.mark.parametrize("seed", range(5))
def test_an_image_is_its_own_pivot(seed: int) -> None:
    image = scene(seed)
    assert np.array_equal(match_lab_means(image, image), lab8_to_rgb(rgb_to_lab8(image)))


def test_means_meet() -> None:
    rng = np.random.default_rng(0)
    target = rng.integers(90, 130, (64, 64, 3), np.uint8)
    pivot = rng.integers(110, 170, (64, 64, 3), np.uint8)
    gap = rgb_to_lab8(match_lab_means(target, pivot)).mean((0, 1)) - rgb_to_lab8(pivot).mean((0, 1))
    assert np.abs(gap).max() < 1.5  # truncation takes half a level on average
    assert np.abs(rgb_to_lab8(target).mean((0, 1)) - rgb_to_lab8(pivot).mean((0, 1))).max() > 10


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8)]
)
def test_other_arrays_are_refused(image: np.ndarray) -> None:
    for convert in (rgb_to_lab8, lab8_to_rgb):
        with pytest.raises(ValueError, match=r"uint8 \[H,W,3\]"):
            convert(image)


def test_speed() -> None:
    target, pivot = scene(1, 512, 512), scene(2, 512, 512)
    match_lab_means(target, pivot)
    seconds = []
    for _ in range(3):
        start = time.process_time()
        match_lab_means(target, pivot)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.1


@needs_shared
@pytest.mark.parametrize("case", ["grounded", "grounded_cfg", "grounded_odd_size"])
def test_golden(case: str) -> None:
    golden = load_file(shared(f"golden/{case}.safetensors"))
    ours = match_lab_means(golden["image_target_before_transfer"], golden["image_pivot"])
    assert np.array_equal(ours, golden["image"])
