"""Depth and masks from networks on your disk: two protocols, two libraries behind each.

transformers runs its own classes (Depth Pro, SAM), ONNX Runtime runs files (MoGe-2, DA3METRIC; BiRefNet,
RMBG-2.0, ISNet). Nothing is downloaded, and no code that comes with weights is run. The libraries (extra
`annotate`) are imported when a model is opened. docs/photos.md has the licences.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bokehflux.fingerprint import fingerprint
from bokehflux.photos.focus import Refused, laplacian_energy

Array = NDArray[np.float32]
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of ImageNet's colours between 0 and 1."""
NEAREST_PER_M, FARTHEST_PER_M = 1e4, 1e-4
"""Depth Pro's own bounds of inverse depth."""
CUDA = "CUDAExecutionProvider"
"""ONNX Runtime's name for it."""
CANONICAL_FOCAL_PX = 300
"""Focal length for which DA3METRIC gives metres."""
Gives = Literal["metres", "canonical metres", "points", "matte", "matte logits"]
"""What the first output of an ONNX file is: metres; metres for a focal length of 300 px (DA3METRIC); a map of
points up to shift and scale (MoGe-2); a mask between 0 and 1, or its logits."""


POINTS = ("points", "mask", "metric_scale")
"""Outputs of a file that gives points."""


class DepthModel(Protocol):
    """A network that tells how far away every pixel is."""

    about: dict[str, Any]
    """JSON-able: which weights, and whatever else decides the result."""
    ran_by: str
    """The library and its version."""

    def depth_m(self, image: Image.Image, focal_px: float | None) -> Array:
        """[H, W] metres, infinite for the sky, NaN where it cannot tell.

        focal_px: the lens's, in pixels of this upright image; None: not known. Raises Refused where it is
        needed.
        """


class MaskModel(Protocol):
    """A network that tells the subject from the rest."""

    about: dict[str, Any]
    ran_by: str

    def mask(self, image: Image.Image) -> Array:
        """[H, W], 0 to 1."""


# transformers


class DepthPro:
    """`transformers.DepthProForDepthEstimation`, from a folder.

    The class takes no focal length; the published model does, so it is applied here. Without one, its own
    field of view serves, where the weights have that head.
    """

    def __init__(self, folder: Path, device: str) -> None:
        self.model, self.ran_by = _transformers("DepthProForDepthEstimation", folder, device)
        self.about = {"kind": "depth-pro", "model_hash": fingerprint([folder])}
        config = self.model.config
        self.side_px = round(config.patch_size / min(config.scaled_images_ratios))

    def depth_m(self, image: Image.Image, focal_px: float | None) -> Array:
        import torch
        from torch.nn.functional import interpolate

        x = torch.from_numpy(_normalised(image, ((0.5,) * 3, (0.5,) * 3)))
        x = interpolate(x, (self.side_px, self.side_px), mode="bilinear")
        with torch.inference_mode():
            out = self.model(pixel_values=x.to(self.model.device, self.model.dtype))
        inverse, fov_degrees = out.predicted_depth.float()[None], out.field_of_view
        if focal_px is not None:
            inverse = inverse * image.width / focal_px
        elif fov_degrees is not None:
            inverse = inverse * 2 * torch.tan(torch.deg2rad(fov_degrees.float()) / 2)
        else:
            raise Refused("the EXIF tells no focal length, and these weights of Depth Pro cannot guess it")
        inverse = interpolate(inverse, (image.height, image.width), mode="bilinear")[0, 0]
        return (1 / inverse.clamp(FARTHEST_PER_M, NEAREST_PER_M)).cpu().numpy()


class Sam:
    """`transformers.SamModel`, from a folder, asked for the object at the photograph's sharpest point."""

    def __init__(self, folder: Path, device: str) -> None:
        self.model, self.ran_by = _transformers("SamModel", folder, device)
        self.about = {"kind": "sam", "model_hash": fingerprint([folder]), "prompt": "sharpest point"}
        self.side_px = self.model.config.vision_config.image_size

    def mask(self, image: Image.Image) -> Array:
        import torch
        from torch.nn.functional import interpolate, pad

        scale, side = self.side_px / max(image.size), self.side_px
        width, height = (int(edge * scale + 0.5) for edge in image.size)
        small = image.resize((width, height), Image.Resampling.BILINEAR)
        x = pad(torch.from_numpy(_normalised(small, IMAGENET)), (0, side - width, 0, side - height))
        row, column = np.unravel_index(laplacian_energy(small, small.size).argmax(), (height, width))
        points = torch.tensor([[[[float(column), float(row)]]]])
        device, dtype = self.model.device, self.model.dtype
        with torch.inference_mode():
            out = self.model(pixel_values=x.to(device, dtype), input_points=points.to(device, dtype))
        best = int(out.iou_scores[0, 0].argmax())
        logits = out.pred_masks[:, 0, best : best + 1].float()
        logits = interpolate(logits, (side, side), mode="bilinear")[..., :height, :width]
        return interpolate(logits, (image.height, image.width), mode="bilinear")[0, 0].sigmoid().cpu().numpy()


def _transformers(name: str, folder: Path, device: str) -> tuple[Any, str]:
    """A network of a class that transformers itself has, ready to run, and the library's version."""
    try:
        import torch
        import transformers
    except ImportError:
        raise ValueError("this model needs `transformers`: pip install transformers") from None
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not a folder with config.json and weights, as {name} needs it")
    try:
        model = getattr(transformers, name).from_pretrained(
            folder, local_files_only=True, use_safetensors=True
        )
    except (OSError, RuntimeError, TypeError) as error:
        raise ValueError(f"{folder} does not hold a {name}: {error}") from error
    half = device.startswith("cuda")
    try:
        model = model.to(device, torch.float16 if half else torch.float32).eval()
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch without CUDA
        raise ValueError(f"--device {device} cannot be used: {error}") from error
    return model, f"transformers {transformers.__version__}, {'float16' if half else 'float32'}"


# ONNX Runtime


@dataclass(frozen=True, kw_only=True)
class OnnxRecipe:
    """How an ONNX file wants its picture, and what it gives back."""

    gives: Gives
    mean: Sequence[float] = IMAGENET[0]
    std: Sequence[float] = IMAGENET[1]
    side_px: int = 1024
    """Where the file leaves its input's size open: side of a square, or the longer side (`keeps_shape`)."""
    keeps_shape: bool = False
    multiple_px: int = 1
    """Sides of an open size are multiples of this."""
    sky: str | None = None
    """Name of an output that is above `sky_above` at points infinitely far away."""
    sky_above: float = 0.5
    more: dict[str, int] = dataclasses.field(default_factory=dict)
    """Further inputs, whole numbers by name."""

    def __post_init__(self) -> None:
        if self.gives not in get_args(Gives):
            raise ValueError(f"gives must be one of {', '.join(get_args(Gives))}, got {self.gives!r}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 3 or not all(math.isfinite(v) for v in values) or name == "std" and 0 in values:
                raise ValueError(f"{name} must be three numbers, those of std not 0, got {values!r}")
        whole = {"side_px": self.side_px, "multiple_px": self.multiple_px}
        for name, value in (whole | self.more).items():
            if type(value) is not int or (name in whole and value < 1):
                raise ValueError(f"{name} must be a whole number, sizes at least 1, got {value!r}")


RECIPES = {
    "moge-2": OnnxRecipe(gives="points", mean=(0, 0, 0), std=(1, 1, 1), side_px=700, keeps_shape=True,
                         more={"num_tokens": 2500}),
    "da3metric": OnnxRecipe(gives="canonical metres", side_px=504, keeps_shape=True, multiple_px=14,
                            sky="sky", sky_above=0.3),
    "birefnet": OnnxRecipe(gives="matte logits"),
    "rmbg-2.0": OnnxRecipe(gives="matte"),
    "isnet": OnnxRecipe(gives="matte", mean=(0.5, 0.5, 0.5), std=(1, 1, 1)),
}  # fmt: skip


class _Onnx:
    """A session, and pictures in and arrays out by the recipe."""

    def __init__(self, file: Path, recipe: OnnxRecipe, device: str) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise ValueError("this model needs `onnxruntime`: pip install onnxruntime") from None
        if not file.is_file():
            raise ValueError(f"{file} is not an ONNX file: it is not there")
        cuda = re.fullmatch(r"cuda(?::(\d+))?", device)
        if cuda is None and device != "cpu":
            raise ValueError(f"--device: expected cpu, cuda or cuda:N for ONNX files, got {device!r}")
        wanted: list[Any] = ["CPUExecutionProvider"]
        if cuda is not None:
            if CUDA not in onnxruntime.get_available_providers():
                raise ValueError(f"onnxruntime lacks {CUDA} for --device {device}: install onnxruntime-gpu")
            wanted.insert(0, (CUDA, {"device_id": int(cuda[1] or 0)}))
        state = onnxruntime.capi.onnxruntime_pybind11_state
        self.failures = (
            state.Fail,
            state.InvalidProtobuf,
            state.InvalidGraph,
            state.InvalidArgument,
            state.NotImplemented,
            state.RuntimeException,
        )
        self.name = file.name
        try:
            self.session = onnxruntime.InferenceSession(str(file), providers=wanted)
        except self.failures as error:
            raise ValueError(f"{file} cannot be opened as an ONNX file: {error}") from error
        if cuda is not None and self.session.get_providers()[0] != CUDA:  # it goes on with the CPU
            raise ValueError(
                f"onnxruntime could not start CUDA for --device {device}; its own message says why"
            )
        self.recipe = recipe
        beside = [path for path in file.parent.glob(f"{file.name}*") if path.is_file()]  # large weights
        told = json.loads(json.dumps(dataclasses.asdict(recipe)))  # lists for tuples, as it will be read
        self.about = {"model_hash": fingerprint(beside), "recipe": told}
        self.ran_by = f"onnxruntime {onnxruntime.__version__}, {self.session.get_providers()[0]}"
        self.input = next((one for one in self.session.get_inputs() if len(one.shape) == 4), None)
        if self.input is None:
            raise ValueError(f"{file} has no input of shape [1, 3, H, W]")
        outputs = [one.name for one in self.session.get_outputs()]
        needed = {*(POINTS if recipe.gives == "points" else ()), *([recipe.sky] if recipe.sky else [])}
        if lacking := sorted(needed - set(outputs)):
            raise ValueError(f"{file} has no output {', '.join(lacking)}, but {', '.join(outputs)}")
        inputs = {one.name for one in self.session.get_inputs()} - {self.input.name}
        if lacking := sorted(set(recipe.more) - inputs):
            raise ValueError(f"{file} has no input {', '.join(lacking)}: a .json recipe can leave it out")
        if lacking := sorted(inputs - set(recipe.more)):
            raise ValueError(
                f"{file} has inputs that nothing is known of, {', '.join(lacking)}: a .json recipe can give "
                'them whole numbers, as in "more": {"num_tokens": 2500}'
            )

    def run(self, image: Image.Image) -> tuple[dict[str, Array], tuple[int, int]]:
        """Outputs by name, the first first, without their axes of length 1; and the size that went in.

        Raises Refused where the network fails on the picture.
        """
        assert self.input is not None
        size = self._size(image)
        x = _normalised(image.resize(size, Image.Resampling.BILINEAR), (self.recipe.mean, self.recipe.std))
        if self.input.type == "tensor(float16)":
            x = x.astype(np.float16)
        more = {name: np.array(value, np.int64) for name, value in self.recipe.more.items()}
        try:
            outputs = self.session.run(None, {self.input.name: x, **more})
        except self.failures as error:
            raise Refused(f"{self.name} fails on it: {error}") from error
        found = [one.name for one in self.session.get_outputs()]
        return {
            name: np.squeeze(np.asarray(value, np.float32))
            for name, value in zip(found, outputs, strict=True)
        }, size

    def checked(self, values: Array) -> Array:
        """[H, W] as it is. Raises Refused for another output."""
        if values.ndim != 2:
            raise Refused(f"{self.name} gives {values.ndim} axes longer than 1, and a map has 2: [H, W]")
        return values

    def _size(self, image: Image.Image) -> tuple[int, int]:
        """(W, H) of the input."""
        assert self.input is not None
        height, width = self.input.shape[2:]
        if isinstance(height, int) and isinstance(width, int):
            return width, height
        recipe, multiple = self.recipe, self.recipe.multiple_px
        scale = recipe.side_px / max(image.size)
        sides = (scale * image.width, scale * image.height) if recipe.keeps_shape else (recipe.side_px,) * 2
        wide, high = (max(1, round(side / multiple)) * multiple for side in sides)
        return wide, high


class OnnxDepth(_Onnx):
    """A metric depth network in an ONNX file."""

    def depth_m(self, image: Image.Image, focal_px: float | None) -> Array:
        outputs, (width, height) = self.run(image)
        # In pixels of what went in: sides may have been scaled differently.
        focal = None if focal_px is None else focal_px * (width / image.width + height / image.height) / 2
        if self.recipe.gives == "points":
            points, mask, scale = (outputs[name] for name in POINTS)
            if points.shape != (*self.checked(mask).shape, 3) or scale.size != 1:
                raise Refused(f"{self.name} gives points that are not [H, W, 3], with a mask and a scale")
            depth = metres_of_points(points, mask > 0.5, float(scale), focal)
        else:
            depth = self.checked(next(iter(outputs.values())))
        if self.recipe.gives == "canonical metres":
            if focal is None:
                raise Refused("this network needs the focal length, and the EXIF does not tell it")
            depth = depth * np.float32(focal / CANONICAL_FOCAL_PX)
        if self.recipe.sky is not None:
            depth = np.where(outputs[self.recipe.sky] >= self.recipe.sky_above, np.inf, depth)
        inverse = np.divide(1, depth, out=np.full(depth.shape, np.nan, np.float32), where=depth > 0)
        inverse = _resized(inverse.astype(np.float32), image.size)
        return np.divide(1, inverse, out=np.full(inverse.shape, np.inf, np.float32), where=inverse != 0)


class OnnxMask(_Onnx):
    """A matting or segmentation network in an ONNX file."""

    def mask(self, image: Image.Image) -> Array:
        matte = self.checked(next(iter(self.run(image)[0].values())))
        if self.recipe.gives == "matte logits":
            matte = (1 / (1 + np.exp(-matte))).astype(np.float32)
        return _resized(matte, image.size).clip(0, 1)


def metres_of_points(points: Array, known: NDArray[np.bool_], scale: float, focal_px: float | None) -> Array:
    """Depth in metres from a map of points that is right up to a shift along the axis and a scale.

    points: [H, W, 3]. known: [H, W], elsewhere it is infinitely far. The shift is the one with which points
    fall on their own pixels, for the lens's focal length or, where it is not known, the one that fits best.
    """
    height, width = known.shape
    step = max(1, round((height * width / 4096) ** 0.5))
    half = (np.arange(height) - (height - 1) / 2, np.arange(width) - (width - 1) / 2)
    v, u = np.meshgrid(*half, indexing="ij")
    use = known[::step, ::step]
    if not use.any():
        return np.full(known.shape, np.inf, np.float32)
    xyz = points[::step, ::step][use].astype(np.float64)
    uv = np.stack([u[::step, ::step][use], v[::step, ::step][use]], axis=-1)
    nearest = xyz[:, 2].min()

    def misfit(shift: float) -> float:
        on_plane = xyz[:, :2] / (xyz[:, 2:] + shift)
        focal = focal_px or (on_plane * uv).sum() / (on_plane**2).sum()
        return float(((focal * on_plane - uv) ** 2).sum())

    spread = max(float(np.median(np.abs(xyz))), 1e-6)
    low, high = np.log(1e-3 * spread), np.log(1e3 * spread)  # of the nearest point's depth
    for _ in range(5):
        tried = np.linspace(low, high, 64)
        best = int(np.argmin([misfit(np.exp(log) - nearest) for log in tried]))
        low, high = tried[max(best - 1, 0)], tried[min(best + 1, 63)]
    depth = (points[..., 2] + np.exp((low + high) / 2) - nearest) * scale
    return np.where(known, depth, np.inf).astype(np.float32)


# What they share


def _normalised(image: Image.Image, colours: tuple[Sequence[float], Sequence[float]]) -> Array:
    """[1, 3, H, W]."""
    mean, std = (np.asarray(values, np.float32) for values in colours)
    x = (np.asarray(image.convert("RGB"), np.float32) / 255 - mean) / std
    return np.ascontiguousarray(x.transpose(2, 0, 1)[None], dtype=np.float32)


def _resized(values: Array, size: tuple[int, int]) -> Array:
    return np.asarray(Image.fromarray(values).resize(size, Image.Resampling.BILINEAR))


DEPTH_KINDS = ("depth-pro", "moge-2", "da3metric")
MASK_KINDS = ("sam", "birefnet", "rmbg-2.0", "isnet")


def open_depth(path: Path, kind: str, device: str) -> DepthModel:
    """A depth model. kind: a name in `DEPTH_KINDS`, or a JSON file with the fields of `OnnxRecipe`.

    Raises ValueError for a kind, file or folder that does not fit, and where the library is missing.
    """
    if kind == "depth-pro":
        return DepthPro(path, device)
    recipe = _recipe(kind, DEPTH_KINDS)
    if recipe.gives.startswith("matte"):
        raise ValueError(f"{kind} gives a mask, not depth: pass it as the kind of the mask")
    return OnnxDepth(path, recipe, device)


def open_mask(path: Path, kind: str, device: str) -> MaskModel:
    """A mask model; as `open_depth`."""
    if kind == "sam":
        return Sam(path, device)
    recipe = _recipe(kind, MASK_KINDS)
    if not recipe.gives.startswith("matte"):
        raise ValueError(f"{kind} gives depth, not a mask: pass it as the kind of the depth")
    return OnnxMask(path, recipe, device)


def _recipe(kind: str, names: Sequence[str]) -> OnnxRecipe:
    if kind in RECIPES:
        return RECIPES[kind]
    if not kind.endswith(".json"):
        raise ValueError(f"expected one of {', '.join(names)}, or a .json file with a recipe, got {kind!r}")
    try:
        return OnnxRecipe(**json.loads(Path(kind).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        fields = ", ".join(field.name for field in dataclasses.fields(OnnxRecipe))
        raise ValueError(f"{kind} is not a recipe with fields of {fields}: {error}") from error
