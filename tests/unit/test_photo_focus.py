"""Where a photograph is in focus, on pictures whose focus is known."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from bokehflux.photos.focus import Refused, disparity_per_m, find_focus, laplacian_energy

SIZE = (192, 128)
SUBJECT = (slice(32, 96), slice(64, 128))
SUBJECT_M, BACKGROUND_M = 2.0, 10.0


def scene(sharp: str) -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """A textured square before a textured wall, one of them blurred: picture, depth, the square's mask."""
    noise = np.random.default_rng(0).integers(0, 255, (*SIZE[::-1], 3), dtype=np.uint8)
    texture = Image.fromarray(noise)
    blurred = texture.filter(ImageFilter.GaussianBlur(3))
    mask = np.zeros(SIZE[::-1], np.float32)
    mask[SUBJECT] = 1
    stencil = Image.fromarray((mask * 255).astype(np.uint8))
    front, behind = (texture, blurred) if sharp == "subject" else (blurred, texture)
    depth = np.where(mask > 0, SUBJECT_M, BACKGROUND_M).astype(np.float32)
    return Image.composite(front, behind, stencil), depth, mask


def test_a_mask_that_is_right() -> None:
    image, depth, mask = scene("subject")
    for source in ("mask", "mask+sharpest", "sharpest"):
        focus = find_focus(image, depth, mask, source)  # type: ignore[arg-type]
        assert focus.distance_m == pytest.approx(SUBJECT_M) and not focus.refined


def test_a_mask_of_what_is_blurred() -> None:
    image, depth, mask = scene("wall")
    assert find_focus(image, depth, mask, "mask").distance_m == pytest.approx(SUBJECT_M)
    assert find_focus(image, depth, mask, "sharpest").distance_m == pytest.approx(BACKGROUND_M)
    with pytest.raises(Refused, match="the mask is not where the photograph is sharp"):
        find_focus(image, depth, mask, "mask+sharpest")


def test_a_mask_that_leaks_is_refined() -> None:
    image, depth, mask = scene("subject")
    leaking = mask.copy()
    leaking[:, 128:] = leaking[:, :40] = 1  # most of it is wall
    assert find_focus(image, depth, leaking, "mask").distance_m == pytest.approx(BACKGROUND_M)
    focus = find_focus(image, depth, leaking, "mask+sharpest")
    assert focus.distance_m == pytest.approx(SUBJECT_M) and focus.refined
    assert focus.mask[SUBJECT].all() and focus.mask.sum() == mask.sum()


def test_a_sharp_speck_does_not_save_a_wrong_mask() -> None:
    """The wall is sharp; the mask holds something blurred, and a near speck as sharp as the wall."""
    image, depth, mask = scene("wall")
    depth = np.where(mask > 0, 4, depth).astype(np.float32)
    speck = (slice(60, 68), slice(90, 98))
    depth[speck] = 1
    pixels = np.asarray(image).copy()
    pixels[speck] = np.random.default_rng(1).choice([0, 255], (8, 8, 1))
    with pytest.raises(Refused, match="the mask is not where the photograph is sharp"):
        find_focus(Image.fromarray(pixels), depth, mask, "mask+sharpest")


@pytest.mark.parametrize("source", ["mask", "mask+sharpest"])
@pytest.mark.parametrize("empty", [None, np.zeros(SIZE[::-1], np.float32)], ids=["none", "zeros"])
def test_an_empty_mask(source: str, empty: np.ndarray | None) -> None:
    image, depth, _ = scene("subject")
    with pytest.raises(Refused, match="the mask is empty"):
        find_focus(image, depth, empty, source)  # type: ignore[arg-type]


def test_pictures_without_detail_and_depth_without_values() -> None:
    _, depth, mask = scene("subject")
    with pytest.raises(Refused, match="too little detail"):
        find_focus(Image.new("RGB", SIZE, "gray"), depth, mask, "sharpest")
    with pytest.raises(Refused, match="no usable value"):
        find_focus(Image.new("RGB", SIZE), np.full_like(depth, np.nan), mask, "mask")


def test_wrong_arguments() -> None:
    image, depth, mask = scene("subject")
    with pytest.raises(ValueError, match="focus_source must be one of mask, mask\\+sharpest, sharpest"):
        find_focus(image, depth, mask, "masks")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the mask has"):
        find_focus(image, depth, mask[1:], "mask")


def test_distances_that_are_told_apart_by_less_than_a_pixel_agree() -> None:
    """20 m and 60 m are 1/30 of a diopter apart: one pixel at level 30."""
    image, depth, mask = scene("wall")
    far = np.where(depth < 5, 20, 60).astype(np.float32)
    assert find_focus(image, far, mask, "mask+sharpest").distance_m == pytest.approx(20)


def test_unknown_and_infinite_depths() -> None:
    depth = np.array([[np.nan, 0.0, np.inf, 2.0, -1.0]], np.float32)
    disparity, valid = disparity_per_m(depth)
    assert valid.tolist() == [[False, False, True, True, False]]
    assert disparity.tolist() == [[0, 0, 0, 0.5, 0]]
    image, depth, mask = scene("wall")
    depth = np.where(depth > 5, np.inf, depth)
    assert find_focus(image, depth, mask, "sharpest").distance_m == np.inf


def test_energy_is_the_mean_squared_laplacian() -> None:
    """For a single dot: 16 in the middle and 1 on its four sides, spread over the window."""
    dot = np.zeros((64, 64), np.uint8)
    dot[32, 32] = 255
    energy = laplacian_energy(Image.fromarray(dot), (64, 64))
    assert energy.sum() == pytest.approx(20, rel=1e-5) and energy[32, 32] == pytest.approx(20 / 9, rel=1e-5)
    assert energy[:28].max() < 1e-6


def motorcycle() -> tuple[Image.Image, np.ndarray]:
    """scikit-image's photograph of a motorcycle and its depth in metres, by stereo (Middlebury 2014)."""
    spec = importlib.util.find_spec("skimage")
    folder = Path(spec.origin).parent / "data" if spec is not None and spec.origin else Path("nowhere")
    if not (folder / "motorcycle_disp.npz").is_file():
        pytest.skip("needs scikit-image, whose wheel holds the motorcycle and its disparity")
    with np.load(folder / "motorcycle_disp.npz") as file:
        disparity_px = file["arr_0"]
    depth_m = 994.978 * 0.193001 / (disparity_px + 31.086)
    return Image.open(folder / "motorcycle_left.png").convert("RGB"), np.where(
        np.isfinite(disparity_px), depth_m, np.nan
    ).astype(np.float32)


@pytest.mark.parametrize("focus_m", [2.2, 2.6, 3.2, 4.0])
@pytest.mark.parametrize("k_px_m", [15, 30])
def test_the_sharpest_region_of_a_real_photograph(focus_m: float, k_px_m: float) -> None:
    """The photograph blurred by its true depth: the focus is found again within 25 %."""
    image, depth = motorcycle()
    disparity, valid = disparity_per_m(depth)
    radius = np.where(valid, k_px_m * np.abs(disparity - 1 / focus_m), 0)
    blurred = np.asarray(image).copy()
    for step in range(1, 1 + int(radius.max())):
        soft = np.asarray(image.filter(ImageFilter.GaussianBlur(step / 2)))
        blurred[np.round(radius) == step] = soft[np.round(radius) == step]
    found = find_focus(Image.fromarray(blurred), depth, None, "sharpest").distance_m
    assert focus_m / 1.25 <= found <= focus_m * 1.25
