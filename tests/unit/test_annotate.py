"""Networks in ONNX files, on small ones whose output numpy computes as well; and no foreign code."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bokehflux.photos.annotate import IMAGENET, RECIPES, metres_of_points, open_depth, open_mask
from bokehflux.photos.focus import Refused

ROOT = Path(__file__).resolve().parents[2]
MAP = [1, 1, "h", "w"]
WEIGHTS = np.array([0.5, -0.25, 0.75], np.float32)


def test_no_remote_code_anywhere() -> None:
    word = "trust_" + "remote_code"
    folders = ("bokehflux", "kernels", "weights", "scripts", "benchmarks", "docs", "tests")
    files = [
        path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md")
    ]
    assert len(files) > 200
    assert not [path for path in files if word in path.read_text(encoding="utf-8")]


def photograph(width: int = 60, height: int = 40) -> Image.Image:
    pixels = np.random.default_rng(1).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width // 4, height // 4)).resize((width, height))


def save(path: Path, side: int | str, outputs: dict[str, tuple[str, Any]], tokens: bool = False) -> Path:
    """An ONNX file. outputs: name -> (operator on a weighted sum of the colours, its shape)."""
    pytest.importorskip("onnxruntime", reason="needs onnxruntime (extra annotate)")
    onnx = pytest.importorskip("onnx", reason="needs onnx, to make small files")
    from onnx import TensorProto, helper, numpy_helper

    tall = ("h", "w") if isinstance(side, str) else (side, side)
    weights = numpy_helper.from_array(WEIGHTS.reshape(1, 3, 1, 1), "weights")
    nodes = [helper.make_node("Conv", ["image", "weights"], ["sum"])]
    for name, (operator, _) in outputs.items():
        if operator == "Points":
            nodes.append(helper.make_node("Transpose", ["image"], [name], perm=[0, 2, 3, 1]))
        elif operator == "Scale":
            nodes.append(helper.make_node("ReduceMax", ["image"], [name], keepdims=0))
        else:
            nodes.append(helper.make_node(operator, ["sum"], [name]))
    inputs = [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, *tall])]
    if tokens:
        inputs.append(helper.make_tensor_value_info("num_tokens", TensorProto.INT64, []))
    shapes = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, (_, shape) in outputs.items()
    ]
    graph = helper.make_graph(nodes, "small", inputs, shapes, [weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return path


def summed(image: Image.Image, mean: Any, std: Any) -> np.ndarray:
    """What the weighted sum of a small file is: [H, W]."""
    x = (np.asarray(image, np.float32) / 255 - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return (x @ WEIGHTS).astype(np.float32)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def resized(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(values.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))


@pytest.mark.parametrize(("kind", "operator"), [
    ("birefnet", "Neg"), ("rmbg-2.0", "Sigmoid"), ("isnet", "Sigmoid"),
])  # fmt: skip
@pytest.mark.parametrize("side", [32, "any"])
def test_masks(tmp_path: Path, kind: str, operator: str, side: int | str) -> None:
    """Squares of a fixed size, or 1024 where the file takes any; BiRefNet's ends before the sigmoid."""
    image = photograph()
    shape = [1, 1, side, side] if isinstance(side, int) else MAP
    model = open_mask(save(tmp_path / "m.onnx", side, {"mask": (operator, shape)}), kind, "cpu")
    mean, std = (0.5, 1.0) if kind == "isnet" else IMAGENET
    pixels = side if isinstance(side, int) else 1024
    square = image.resize((pixels, pixels), Image.Resampling.BILINEAR)
    total = summed(square, mean, std)
    wanted = resized(sigmoid(-total if operator == "Neg" else total), image.size)
    np.testing.assert_allclose(model.mask(image), wanted, atol=1e-5)
    assert "onnxruntime" in model.ran_by and model.about["recipe"]["gives"] == RECIPES[kind].gives


def test_canonical_metres_and_the_sky(tmp_path: Path) -> None:
    """DA3METRIC: metres for 300 px of focal length, in pixels of what went in; sky is infinitely far."""
    image = photograph(1008, 672)
    outputs = {"depth": ("Exp", MAP), "sky": ("Neg", MAP)}
    model = open_depth(save(tmp_path / "m.onnx", "any", outputs), "da3metric", "cpu")
    small = image.resize((504, 336), Image.Resampling.BILINEAR)
    total = summed(small, *IMAGENET)
    depth = np.exp(total) * (900 / 2) / 300
    inverse = np.where(-total >= 0.3, 0, 1 / depth)
    got = model.depth_m(image, 900.0)
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(1 / got, resized(inverse, image.size), rtol=1e-4, atol=1e-6)
    assert np.isinf(got).any() and np.isfinite(got).any()
    with pytest.raises(ValueError, match="needs the focal length, and the EXIF does not tell it"):
        model.depth_m(image, None)


@pytest.mark.parametrize("size", [(600, 107), (107, 600)])
def test_a_focal_length_is_in_pixels_of_what_goes_in(size: tuple[int, int], tmp_path: Path) -> None:
    """The mean over both sides, which are scaled differently where the network wants multiples."""
    outputs = {"depth": ("Exp", MAP), "sky": ("Neg", MAP)}
    model = open_depth(save(tmp_path / "m.onnx", "any", outputs), "da3metric", "cpu")
    image = Image.new("RGB", size, (220, 220, 220))  # no sky
    (depth, *_), (width, height) = model.run(image)[0].values(), model.run(image)[1]
    assert abs(width / size[0] - height / size[1]) > 0.02
    wanted = depth.mean() * 900 * (width / size[0] + height / size[1]) / 2 / 300
    np.testing.assert_allclose(model.depth_m(image, 900.0).mean(), wanted, rtol=1e-3)


def test_an_onnx_file_of_another_kind(tmp_path: Path) -> None:
    recipe = {"gives": "metres", "mean": [0, 0, 0], "std": [1, 1, 1]}
    (tmp_path / "mine.json").write_text(json.dumps(recipe))
    path, image = save(tmp_path / "m.onnx", 32, {"metres": ("Exp", [1, 1, 32, 32])}), photograph()
    model = open_depth(path, str(tmp_path / "mine.json"), "cpu")
    square = image.resize((32, 32), Image.Resampling.BILINEAR)
    wanted = 1 / resized(np.exp(-summed(square, 0.0, 1.0)), image.size)
    np.testing.assert_allclose(model.depth_m(image, None), wanted, rtol=1e-4)
    with pytest.raises(ValueError, match="gives depth, not a mask"):
        open_mask(path, str(tmp_path / "mine.json"), "cpu")
    with pytest.raises(ValueError, match="gives a mask, not depth"):
        open_depth(path, "birefnet", "cpu")


def plane(focal_px: float, shift: float, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """A tilted plane with a step, as a network gives it: points without shift and scale; and the metres."""
    height, width = 48, 64
    v, u = np.mgrid[:height, :width].astype(np.float64)
    u, v = u - (width - 1) / 2, v - (height - 1) / 2
    metres = 3 + u / 40 + np.where(v > 5, 0, 2)
    points = np.stack([u * metres / focal_px, v * metres / focal_px, metres], axis=-1) / scale
    points[..., 2] -= shift
    return points.astype(np.float32), metres


@pytest.mark.parametrize("known", [True, False], ids=["EXIF", "no focal length"])
@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (0.7, 2.5), (-0.4, 0.2)])
def test_points_become_metres(known: bool, shift: float, scale: float) -> None:
    points, metres = plane(80.0, shift, scale)
    mask = np.ones(metres.shape, bool)
    mask[:4] = False
    got = metres_of_points(points, mask, scale, 80.0 if known else None)
    np.testing.assert_allclose(got[4:], metres[4:], rtol=1e-4)
    assert np.isinf(got[:4]).all()


def test_a_wrong_focal_length_changes_the_shift() -> None:
    points, metres = plane(80.0, 0.5, 1.0)
    got = metres_of_points(points, np.ones(metres.shape, bool), 1.0, 120.0)
    assert np.abs(got / metres - 1).mean() > 0.1


def test_moge(tmp_path: Path) -> None:
    """Outputs are found by name; the number of tokens goes in where the file asks for it."""
    outputs = {
        "points": ("Points", [1, "h", "w", 3]),
        "normal": ("Tanh", MAP),
        "mask": ("Sigmoid", MAP),
        "metric_scale": ("Scale", []),
    }
    model = open_depth(save(tmp_path / "m.onnx", "any", outputs, tokens=True), "moge-2", "cpu")
    image = photograph(70, 50)
    large = image.resize((700, 500), Image.Resampling.BILINEAR)
    points = np.asarray(large, np.float32) / 255
    wanted = metres_of_points(points, sigmoid(summed(large, 0.0, 1.0)) > 0.5, float(points.max()), 800.0)
    got = model.depth_m(image, 80.0)
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(1 / got, resized(1 / wanted, image.size), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("operator", "shape", "said"), [
    ("Points", [1, "h", "w", 3], "m.onnx gives 3 axes longer than 1"), ("Scale", [], "m.onnx gives 0 axes"),
    ("Wrong", MAP, "m.onnx fails on it"),
])  # fmt: skip
def test_networks_that_give_no_map(tmp_path: Path, operator: str, shape: Any, said: str) -> None:
    """Refused, so that the run goes on with the next photograph."""
    onnx = pytest.importorskip("onnx", reason="needs onnx, to make small files")
    file = save(tmp_path / "m.onnx", "any", {"out": ("Exp" if operator == "Wrong" else operator, shape)})
    if operator == "Wrong":  # weights for four colours: found when a picture comes
        model = onnx.load(file)
        model.graph.initializer[0].CopyFrom(
            onnx.numpy_helper.from_array(np.ones((1, 4, 1, 1), np.float32), "weights")
        )
        model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "colours"
        onnx.save(model, file)
    for gives, ask in (("metres", open_depth), ("matte", open_mask)):
        (tmp_path / "own.json").write_text(json.dumps({"gives": gives, "side_px": 32}))
        network: Any = ask(file, str(tmp_path / "own.json"), "cpu")
        with pytest.raises(Refused, match=said):
            network.depth_m(photograph(), None) if gives == "metres" else network.mask(photograph())


def test_points_that_are_none(tmp_path: Path) -> None:
    outputs = {"points": ("Exp", MAP), "mask": ("Sigmoid", MAP), "metric_scale": ("Scale", [])}
    file = save(tmp_path / "m.onnx", "any", outputs)
    (tmp_path / "own.json").write_text('{"gives": "points", "side_px": 32}')
    with pytest.raises(Refused, match=r"gives points that are not \[H, W, 3\]"):
        open_depth(file, str(tmp_path / "own.json"), "cpu").depth_m(photograph(), None)


def test_files_and_kinds_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected one of sam, birefnet, .* or a .json file .* got 'u2net'"):
        open_mask(tmp_path / "m.onnx", "u2net", "cpu")
    (tmp_path / "bad.json").write_text('{"gives": "beauty"}')
    with pytest.raises(ValueError, match="bad.json is not a recipe .*: gives must be one of metres"):
        open_depth(tmp_path / "m.onnx", str(tmp_path / "bad.json"), "cpu")
    pytest.importorskip("onnxruntime", reason="needs onnxruntime (extra annotate)")
    with pytest.raises(ValueError, match="m.onnx is not an ONNX file: it is not there"):
        open_mask(tmp_path / "m.onnx", "isnet", "cpu")
    (tmp_path / "m.onnx").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="m.onnx cannot be opened as an ONNX file"):
        open_mask(tmp_path / "m.onnx", "isnet", "cpu")
    with pytest.raises(ValueError, match="lacks CUDAExecutionProvider for --device cuda"):
        open_mask(tmp_path / "m.onnx", "isnet", "cuda")
    for device in ("foo", "mps", "cuda:x"):
        with pytest.raises(ValueError, match=f"expected cpu, cuda or cuda:N for ONNX files, got '{device}'"):
            open_mask(tmp_path / "m.onnx", "isnet", device)


def test_outputs_that_a_kind_needs_and_a_file_lacks(tmp_path: Path) -> None:
    """Found when the file is opened, not at the first photograph."""
    file = save(tmp_path / "m.onnx", "any", {"depth": ("Exp", MAP)})
    with pytest.raises(ValueError, match="m.onnx has no output mask, metric_scale, points, but depth"):
        open_depth(file, "moge-2", "cpu")
    (tmp_path / "own.json").write_text('{"gives": "metres", "sky": "sky"}')
    for kind in ("da3metric", str(tmp_path / "own.json")):
        with pytest.raises(ValueError, match="m.onnx has no output sky, but depth"):
            open_depth(file, kind, "cpu")


def test_inputs_that_a_kind_knows_are_those_of_the_file(tmp_path: Path) -> None:
    """A number that went nowhere, or that nothing gave, was not said."""
    outputs = {
        "points": ("Points", [1, "h", "w", 3]),
        "mask": ("Sigmoid", MAP),
        "metric_scale": ("Scale", []),
    }
    without = save(tmp_path / "without.onnx", "any", outputs)
    with pytest.raises(ValueError, match="without.onnx has no input num_tokens: a .json recipe can leave it"):
        open_depth(without, "moge-2", "cpu")
    own = tmp_path / "own.json"
    own.write_text('{"gives": "points"}')
    assert open_depth(without, str(own), "cpu").depth_m(photograph(), 80.0).shape == (40, 60)
    asking = save(tmp_path / "asking.onnx", 32, {"mask": ("Abs", [1, 1, 32, 32])}, tokens=True)
    with pytest.raises(ValueError, match="asking.onnx has inputs that nothing is known of, num_tokens"):
        open_mask(asking, "isnet", "cpu")
    own.write_text('{"gives": "matte", "more": {"num_tokens": 3}}')
    assert open_mask(asking, str(own), "cpu").mask(photograph()).shape == (40, 60)


@pytest.mark.parametrize(("field", "says"), [
    ('"more": {"num_tokens": "3"}', "num_tokens must be a whole number"),
    ('"more": {"num_tokens": 2.5}', "num_tokens must be a whole number"),
    ('"side_px": 0', "side_px must be"), ('"multiple_px": 0', "multiple_px must be"),
    ('"side_px": "1"', "side_px must be"),
    ('"std": [1, 0, 1]', "std must be three numbers"), ('"mean": [1, 1]', "mean must be three numbers"),
    ('"mean": ["1", "1", "1"]', "is not a recipe"), ('"more": [1]', "is not a recipe"),
    ('"gives": ["matte"]', "gives must be one of"),
])  # fmt: skip
def test_recipes_that_no_file_has(tmp_path: Path, field: str, says: str) -> None:
    (tmp_path / "own.json").write_text('{"gives": "matte", ' + field + "}")
    with pytest.raises(ValueError, match=says):
        open_mask(tmp_path / "m.onnx", str(tmp_path / "own.json"), "cpu")


@pytest.mark.parametrize("started", [True, False])
def test_cuda_is_the_device_that_was_named_or_an_error(
    tmp_path: Path, started: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime goes on with the CPU where CUDA does not start."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime (extra annotate)")
    names = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    file = save(tmp_path / "m.onnx", 32, {"mask": ("Abs", [1, 1, 32, 32])})
    real, asked = onnxruntime.InferenceSession(str(file)), []

    class Session:
        def __init__(self, _: str, providers: list[Any]) -> None:
            asked.append(providers)
            self.get_inputs, self.get_outputs = real.get_inputs, real.get_outputs

        def get_providers(self) -> list[str]:
            return names if started else names[1:]

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    if started:
        open_mask(file, "isnet", "cuda:1")
    else:
        with pytest.raises(ValueError, match="could not start CUDA for --device cuda:1"):
            open_mask(file, "isnet", "cuda:1")
    assert asked == [[("CUDAExecutionProvider", {"device_id": 1}), "CPUExecutionProvider"]]


@pytest.mark.parametrize(("library", "kind"), [("onnxruntime", "isnet"), ("transformers", "sam")])
def test_a_missing_library(tmp_path: Path, library: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ValueError, match=rf"needs `{library}`: pip install {library}"):
        open_mask(tmp_path, kind, "cpu")


def test_recipes_travel_as_json() -> None:
    for recipe in RECIPES.values():
        again = type(recipe)(**json.loads(json.dumps(dataclasses.asdict(recipe))))
        assert dataclasses.asdict(again).keys() == dataclasses.asdict(recipe).keys()
