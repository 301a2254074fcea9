"""Depth Pro and SAM as we run them, against transformers' own way, on small networks with random weights."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from bokehflux.photos.annotate import DepthPro, Sam, open_depth, open_mask
from bokehflux.photos.focus import laplacian_energy

transformers = pytest.importorskip("transformers", reason="needs transformers (extra annotate)")
pytestmark = pytest.mark.parity
VIT = {"model_type": "dinov2", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 1,
       "patch_size": 4, "image_size": 16, "use_mask_token": False}  # fmt: skip


def photograph(width: int = 97, height: int = 61) -> Image.Image:
    pixels = np.random.default_rng(1).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width // 3, height // 3)).resize((width, height))


def save_depth_pro(folder: Path, use_fov_model: bool = True) -> Any:
    torch.manual_seed(0)
    config = transformers.DepthProConfig(
        patch_size=16, fusion_hidden_size=16, intermediate_hook_ids=[1, 0], intermediate_feature_dims=[10, 8],
        scaled_images_ratios=[0.25, 0.5, 1.0], scaled_images_overlap_ratios=[0.0, 0.5, 0.25],
        scaled_images_feature_dims=[12, 12, 8], use_fov_model=use_fov_model, num_fov_head_layers=0,
        image_model_config=VIT, patch_model_config=VIT, fov_model_config=VIT,
    )  # fmt: skip
    model = transformers.DepthProForDepthEstimation(config).eval()
    model.save_pretrained(folder)
    return model


def save_sam(folder: Path) -> Any:
    torch.manual_seed(4)
    side = {"image_size": 64, "patch_size": 8}
    config = transformers.SamConfig(
        vision_config={
            **side, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "output_channels": 16, "mlp_dim": 32, "global_attn_indexes": [1], "window_size": 0,
            "num_pos_feats": 8,
        },
        prompt_encoder_config={**side, "hidden_size": 16, "mask_input_channels": 4},
        mask_decoder_config={
            "hidden_size": 16, "mlp_dim": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "attention_downsample_rate": 1, "iou_head_hidden_dim": 16, "iou_head_depth": 2,
        },
    )  # fmt: skip
    model = transformers.SamModel(config).eval()
    with torch.no_grad():
        for weights in model.mask_decoder.parameters():
            weights.mul_(10)  # or all masks would be nearly 0.5
        model.mask_decoder.iou_prediction_head.proj_out.bias[-2] += (
            100  # neither the first nor the last is best
        )
    model.save_pretrained(folder)
    return model


def their_depth(model: Any, image: Image.Image, fov_degrees: float | None) -> np.ndarray:
    """The library's processor, network and post-processing; fov_degrees takes the place of its own guess."""
    try:
        module: Any = importlib.import_module("transformers.models.depth_pro.image_processing_depth_pro")
    except ModuleNotFoundError as error:
        pytest.skip(f"the processor of transformers 5 needs {error.name}")
    # All that the class takes from torchvision, which need not be here.
    modes = {Image.Resampling.BILINEAR: SimpleNamespace(value="bilinear")}
    module.pil_torch_interpolation_mapping = getattr(module, "pil_torch_interpolation_mapping", modes)
    processor = module.DepthProImageProcessor(size={"height": 64, "width": 64})
    with torch.no_grad():
        out = model(**processor(image, return_tensors="pt"))
    if fov_degrees is not None:
        out.field_of_view = torch.tensor([fov_degrees])
    (found,) = processor.post_process_depth_estimation(out, target_sizes=[image.size[::-1]])
    return found["predicted_depth"].numpy()


def test_depth_pro_by_its_own_field_of_view(tmp_path: Path) -> None:
    model, image = save_depth_pro(tmp_path), photograph()
    ours = DepthPro(tmp_path, "cpu").depth_m(image, None)
    assert ours.shape == image.size[::-1] and ours.std() > 0
    np.testing.assert_allclose(ours, their_depth(model, image, None), rtol=1e-4)


@pytest.mark.parametrize("size", [(97, 61), (61, 97)])
def test_depth_pro_with_the_focal_length_of_the_exif(tmp_path: Path, size: tuple[int, int]) -> None:
    """What the class cannot be told: the same as its post-processing with the field of view of that lens."""
    model, image, focal_px = save_depth_pro(tmp_path), photograph(*size), 130.0
    fov_degrees = math.degrees(2 * math.atan(image.width / 2 / focal_px))
    opened = open_depth(tmp_path, "depth-pro", "cpu")
    ours = opened.depth_m(image, focal_px)
    np.testing.assert_allclose(ours, their_depth(model, image, fov_degrees), rtol=1e-4)
    half = opened.depth_m(image, focal_px / 2)
    inside = (half > 1.1e-4) & (ours < 9e3)
    np.testing.assert_allclose(ours[inside], 2 * half[inside], rtol=1e-4)


def test_depth_pro_without_any_focal_length(tmp_path: Path) -> None:
    save_depth_pro(tmp_path, use_fov_model=False)
    model = DepthPro(tmp_path, "cpu")
    with pytest.raises(
        ValueError, match="tells no focal length, and these weights of Depth Pro cannot guess"
    ):
        model.depth_m(photograph(), None)
    assert model.depth_m(photograph(), 90.0).shape == (61, 97)


@pytest.mark.parametrize("size", [(97, 61), (50, 80)])
def test_sam_at_the_sharpest_point(tmp_path: Path, size: tuple[int, int]) -> None:
    model, image = save_sam(tmp_path), photograph(*size)
    ours = open_mask(tmp_path, "sam", "cpu").mask(image)
    assert ours.shape == image.size[::-1] and ours.std() > 0

    images = transformers.SamImageProcessor(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64})
    inputs = images(image, return_tensors="pt")
    height, width = inputs["reshaped_input_sizes"][0].tolist()
    small = image.resize((width, height), Image.Resampling.BILINEAR)
    row, column = np.unravel_index(laplacian_energy(small, small.size).argmax(), (height, width))
    point = torch.tensor([[[[float(column), float(row)]]]])
    with torch.no_grad():
        out = model(pixel_values=inputs["pixel_values"], input_points=point)
    sizes = [inputs[name].tolist() for name in ("original_sizes", "reshaped_input_sizes")]
    (logits,) = images.post_process_masks(list(out.pred_masks), *sizes, binarize=False)
    best = int(out.iou_scores[0, 0].argmax())
    assert best == 1
    theirs = logits[0, best].sigmoid().numpy()
    assert np.abs(theirs - logits[0, 0].sigmoid().numpy()).max() > 0.01
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("device", ["foo", "cuda:99"])
def test_a_device_that_is_not_there(tmp_path: Path, device: str) -> None:
    save_depth_pro(tmp_path)
    with pytest.raises(ValueError, match=f"--device {device} cannot be used: "):
        DepthPro(tmp_path, device)


def test_what_the_maps_were_made_with(tmp_path: Path) -> None:
    save_depth_pro(tmp_path / "a")
    save_depth_pro(tmp_path / "b")
    first, second = (DepthPro(tmp_path / name, "cpu") for name in "ab")
    assert first.about == second.about and "transformers" in first.ran_by
    weights = load_file(tmp_path / "b" / "model.safetensors")
    name = next(name for name in weights if name.startswith("head"))
    from safetensors.torch import save_file

    save_file({**weights, name: weights[name] + 1}, tmp_path / "b" / "model.safetensors", {"format": "pt"})
    assert DepthPro(tmp_path / "b", "cpu").about != first.about


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder with config.json and weights"):
        Sam(tmp_path, "cpu")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "sam"}))
    with pytest.raises(ValueError, match="does not hold a SamModel"):
        Sam(tmp_path, "cpu")
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="does not hold a SamModel"):
        Sam(tmp_path, "cpu")
