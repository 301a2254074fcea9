"""Read checkpoints: one .safetensors or .gguf file, shards behind an index, or a component folder.

The `safetensors` library reads and checks the files; a file that it refuses is looked at once more here, to
say what it is instead. Opening reads headers only; tensors are views of the memory-mapped file, read one at a
time. Knows names and shapes, but no networks. Format: https://huggingface.co/docs/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .gguf import TYPES, GgufError, GgufFile
from .mapped import SafetensorsFile
from .pickled import PICKLE_SUFFIX, PickledFile

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit; the largest FLUX header is 0.2 MB."""
SUFFIXES = (".safetensors", ".sft")
GGUF_SUFFIX = ".gguf"
FILE_SUFFIXES = (*SUFFIXES, GGUF_SUFFIX)
"""Endings of the files that can be opened."""
CLOSED_SUFFIXES = {
    ".engine": "a TensorRT engine", ".plan": "a TensorRT engine", ".trt": "a TensorRT engine",
    ".onnx": "an ONNX graph", **dict.fromkeys((".bin", ".ckpt", ".pt", ".pth"), "a PyTorch pickle"),
}  # fmt: skip
"""Endings of files that may hold a model and are not opened."""
INDEX_SUFFIX = ".safetensors.index.json"
_INDEX = re.compile(r"\.safetensors\.index(?:\.[\w-]+)?\.json$")
"""With the variant, as in `model.safetensors.index.bf16.json`."""
_SHOWN_PROBLEMS = 40
_WRAPPERS = re.compile(r"(?<![^._])_(?:orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)[._]")
"""What `torch.compile`, FSDP and activation checkpointing add to names; in LoRAs with underscores, too."""

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Types that we read and write: all of the format's but complex numbers and those packed below 8 bits."""

# Files that people pass in place of a .safetensors file, by their first bytes.
_LOOKALIKES = (
    (b"<", "it is a web page: the download was redirected, probably because it needs a login"),
    (b"version ", "it is a Git LFS pointer: fetch the real file with `git lfs pull`"),
    (b"PK\x03\x04", "it is a PyTorch pickle file: convert it to .safetensors, pickles are never read"),
    (b"\x80", "it is a Python pickle: convert it to .safetensors, pickles are never read"),
    (b"GGUF", "it is a GGUF file: give it a name that ends in .gguf"),
    (b"../", "it is what became of a link when a cache was copied: copy the file that it names"),
    (b"{", "it is a JSON file: pass the .safetensors file, the shard index or the folder"),
)


class CheckpointError(ValueError):
    """Everything that is wrong with one checkpoint, found before anything was built from it.

    `where` names the file, `problems` holds one line each.
    """

    def __init__(self, where: object, *problems: str) -> None:
        self.where = str(where)
        self.problems = problems
        if len(self.problems) == 1:
            message = f"{where}: {self.problems[0]}"
        else:
            shown = [f"  - {p}" for p in self.problems[:_SHOWN_PROBLEMS]]
            if len(self.problems) > _SHOWN_PROBLEMS:
                shown.append(f"  - ... and {len(self.problems) - _SHOWN_PROBLEMS} more")
            message = "\n".join([self._head(), *shown])
        super().__init__(message)

    def _head(self) -> str:
        return f"{self.where}: {len(self.problems)} problems"


class NotFoundError(CheckpointError):
    """Nothing of that name, or only some of it; `where` says so, `problems` name the places searched.

    missing: the parts of a model that are not there. refused: the files that are, and why each does not fit.
    """

    def __init__(
        self, where: object, *problems: str, missing: Sequence[str] = (), refused: Sequence[str] = ()
    ) -> None:
        super().__init__(where, *problems)
        self.missing, self.refused = tuple(missing), tuple(refused)

    def _head(self) -> str:
        return self.where


class TensorInfo(NamedTuple):
    """What the header of a file says of one tensor."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    """Shape of the numbers. Packed tensors are stored as bytes of another shape."""
    place: int
    """Position among the tensors of its file, in the order of their data."""
    key: str
    """Its name in the file. A part of a larger file is named without its prefix (`Checkpoint.under`)."""
    packing: str | None = None
    """GGUF's name of a block format such as "Q8_0"; the tensor is then read as raw bytes [rows, bytes]."""

    @property
    def num_bytes(self) -> int:
        """Bytes that it takes in the file."""
        numbers = math.prod(self.shape)
        if self.packing is None:
            return numbers * self.dtype.itemsize
        block, size = next((block, size) for name, block, size in TYPES.values() if name == self.packing)
        return numbers // block * size


class Checkpoint:
    """An opened checkpoint: the headers of all its files. Build it with `open_checkpoint`."""

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> None:
        self.path = path
        self.tensors = tensors
        self.metadata = metadata
        self._aside: Mapping[str, TensorInfo] = {}
        self._files: dict[Path, SafetensorsFile | GgufFile | PickledFile] = {}

    def under(self, prefix: str) -> Checkpoint:
        """The tensors whose names start with a prefix, named without it."""
        if not prefix:
            return self
        cut = len(prefix)
        return self._part({n[cut:]: info for n, info in self.tensors.items() if n.startswith(prefix)}, {})

    def without(self, names: Collection[str]) -> Checkpoint:
        """The same without some tensors; `read` still finds them."""
        kept = {name: info for name, info in self.tensors.items() if name not in names}
        return self._part(kept, {name: self.tensors[name] for name in names})

    def _part(self, tensors: Mapping[str, TensorInfo], aside: Mapping[str, TensorInfo]) -> Checkpoint:
        part = Checkpoint(self.path, tensors, self.metadata)
        part._aside = aside
        part._files = self._files
        return part

    def close(self) -> None:
        """Let go of the mapped files. A later `read` maps them again."""
        self._files.clear()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self.tensors.items()}

    @property
    def config_path(self) -> Path:
        return self.path.parent / "config.json"

    def config(self) -> dict[str, Any] | None:
        """The `config.json` beside the checkpoint, None without one."""
        return read_json(self.config_path) if self.config_path.is_file() else None

    def position(self, name: str) -> tuple[str, int]:
        """Sort key: the order in which tensors lie on disk."""
        return str(self.tensors[name].file), self.tensors[name].place

    def read(self, name: str) -> Tensor:
        """The tensor as a CPU view of the mapped file: copy it to outlive the file.

        Raises CheckpointError when the file has changed since it was opened.
        """
        info = self.tensors[name] if name in self.tensors else self._aside[name]
        if info.file not in self._files:
            self._files[info.file] = _opened(info.file)
        try:
            tensor = self._files[info.file].get_tensor(info.key)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(info.file, f"changed since it was opened ({info.key}: {error})") from error
        if info.packing is None and (tensor.dtype, tuple(tensor.shape)) != (info.dtype, info.shape):
            raise CheckpointError(info.file, f"changed since it was opened ({info.key} is another tensor)")
        return tensor


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a .safetensors or .gguf file, a `*.safetensors.index.json`, or a folder that holds a checkpoint.

    Raises CheckpointError with every problem of every file: missing, truncated, malformed, inconsistent.
    """
    path = located(path)
    if path.suffix == ".json":
        return _open_index(path)
    tensors, metadata = read_header(path)
    return Checkpoint(path, tensors, metadata)


def open_pickle(path: Path) -> Checkpoint:
    """Open a file of `torch.save` without running it (`pickled.py`). Raises CheckpointError for others."""
    try:
        tensors = PickledFile(path).tensors.items()
    except (OSError, ValueError) as error:
        raise CheckpointError(path, str(error)) from None
    infos = {n: TensorInfo(path, t.dtype, tuple(t.shape), i, n) for i, (n, t) in enumerate(tensors)}
    return Checkpoint(path, infos, {})


def located(path: str | Path) -> Path:
    """The file or index that a path means: itself, or the only one in a folder. Raises CheckpointError."""
    path = Path(path)
    if path.is_dir():
        path = _inside(path)
    if not path.is_file():
        what = "not a regular file" if path.exists() else "no such file or folder"
        raise CheckpointError(path, f"{what}; expected a .safetensors file, its index, or a folder with one")
    return path


class Shelf:
    """Opened checkpoints: asking for one again gives the same object, so no header is read twice."""

    def __init__(self) -> None:
        self._opened: dict[Path, Checkpoint] = {}

    def open(self, path: str | Path) -> Checkpoint:
        """As `open_checkpoint`."""
        file = located(path)
        if file.absolute() not in self._opened:
            self._opened[file.absolute()] = open_checkpoint(file)
        return self._opened[file.absolute()]


def _opened(path: Path) -> SafetensorsFile | GgufFile | PickledFile:
    try:
        if path.suffix == PICKLE_SUFFIX:
            return PickledFile(path)
        return GgufFile(path) if path.suffix == GGUF_SUFFIX else SafetensorsFile(path, DTYPES)
    except (OSError, ValueError) as error:
        raise CheckpointError(path, f"cannot be read any more: {error}") from error


def holds_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a .safetensors file."""
    return os.path.isdir(folder) and any(p.suffix in SUFFIXES for p in folder.iterdir())


def is_index(path: Path) -> bool:
    """Whether a file's name is that of a shard index, of any variant."""
    return _INDEX.search(path.name) is not None


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors, in file order, and metadata of one .safetensors or .gguf file; the data is not read.

    Raises CheckpointError that says what is wrong with the file, or what it is instead.
    """
    if path.suffix == GGUF_SUFFIX:
        return _gguf_header(path)
    try:
        # As numpy: for PyTorch the library maps the data in a way that needs as much memory as there is data.
        with safe_open(path, framework="np") as file:
            entries = [(name, file.get_slice(name)) for name in file.offset_keys()]
            found = [(name, entry.get_dtype(), tuple(entry.get_shape())) for name, entry in entries]
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(path, _diagnosis(path, str(error))) from None
    odd = [
        f"tensor {name!r} of type {dtype} is not supported" for name, dtype, _ in found if dtype not in DTYPES
    ]
    if odd:
        raise CheckpointError(path, *odd)
    plain = _unwrapped([name for name, _, _ in found])
    return {
        plain[n]: TensorInfo(path, DTYPES[dtype], shape, i, n) for i, (n, dtype, shape) in enumerate(found)
    }, metadata


def _unwrapped(names: Collection[str]) -> dict[str, str]:
    """Names of a file -> the same without what PyTorch's wrappers add to them."""
    plain = {name: _WRAPPERS.sub("", name) for name in names}
    if all(name.startswith("module.") for name in names):  # DistributedDataParallel
        plain = {name: short.removeprefix("module.") for name, short in plain.items()}
    return plain if len(set(plain.values())) == len(plain) else {name: name for name in names}


def _gguf_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    try:
        file = GgufFile(path)
    except GgufError as error:
        raise CheckpointError(path, str(error)) from None
    return {
        t.name: TensorInfo(path, t.dtype, t.shape, i, t.name, t.packing) for i, t in enumerate(file.tensors)
    }, {}


def _diagnosis(path: Path, refusal: str) -> str:
    """Why the library refused a file, in words that help; the library's own where we know no better."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(9)
        hint = next((text for start, text in _LOOKALIKES if head.startswith(start)), None)
        if hint is None and (what := CLOSED_SUFFIXES.get(path.suffix)):
            return f"it is {what}, which cannot be read: take a .safetensors or .gguf file"
        if len(head) < 9:
            what = "it is empty" if not head else f"it holds {size} bytes"
            return f"not a .safetensors file: {what}; the download is incomplete"
        length = int.from_bytes(head[:8], "little")
        if head[8:] != b"{" or length > MAX_HEADER_BYTES:
            return f"not a .safetensors file: {hint or refusal}"
        if 8 + length > size:
            return f"truncated: the header alone needs {8 + length} bytes, the file holds {size}"
        file.seek(8)
        text = file.read(length)
    try:
        header = json.loads(text)
        ends = [
            8 + length + entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"
        ]
        cut = sum(end > size for end in ends)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return f"damaged, download it again: {refusal}"
    if cut:
        return (
            f"truncated: {max(ends)} bytes expected, the file holds {size}; {cut} of {len(ends)} tensors are "
            "incomplete. Download it again"
        )
    return f"damaged, download it again: {refusal}"


def _inside(folder: Path) -> Path:
    """The one checkpoint of a folder; variants such as `model.fp16.safetensors` yield to the plain name."""
    files = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES or is_index(p))
    indexes = [p for p in files if p.suffix == ".json"]
    candidates = indexes + [
        p for p in files if p not in indexes and not re.search(r"-\d{5}-of-\d{5}\.", p.name)
    ]
    plain = [p for p in candidates if "." not in p.name.removesuffix(INDEX_SUFFIX).removesuffix(p.suffix)]
    for group in (plain, candidates):
        if len(group) == 1:
            return group[0]
    if candidates:
        names = ", ".join(p.name for p in candidates)
        raise CheckpointError(folder, f"holds several checkpoints ({names}): pass the path of one of them")
    if files:
        raise CheckpointError(folder, f"holds shards but no *{INDEX_SUFFIX}: the download is incomplete")
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    note = f"; {', '.join(pickles)} cannot be used, because pickles are never read" if pickles else ""
    raise CheckpointError(folder, f"holds no .safetensors file and no *{INDEX_SUFFIX}{note}")


def _open_index(path: Path) -> Checkpoint:
    index = read_json(path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        weight_map = {}
    files = weight_map.values()
    if not files or not all(isinstance(file, str) for file in files):
        raise CheckpointError(
            path, "not a shard index: a weight_map of tensor name -> file name was expected"
        )
    problems: list[str] = []
    tensors: dict[str, TensorInfo] = {}
    for file in sorted(set(files)):
        expected = {name for name, shard in weight_map.items() if shard == file}
        if file != Path(file).name or file in ("", ".", ".."):
            problems.append(f"{file!r} is not a plain file name beside the index")
        elif not os.path.isfile(path.parent / file):  # False, too, for names that no file can have
            problems.append(f"shard {file} is missing ({len(expected)} tensors)")
        else:
            try:
                found, _ = read_header(path.parent / file)
            except CheckpointError as error:
                problems += [f"shard {file}: {problem}" for problem in error.problems]
                continue
            expected = set(_unwrapped(expected).values())
            problems += [
                f"shard {file} lacks {name}" for name in fold((n, "") for n in expected - set(found))
            ]
            problems += [
                f"shard {file} also holds {name}" for name in fold((n, "") for n in set(found) - expected)
            ]
            tensors.update(found)
    if problems:
        raise CheckpointError(path, *problems)
    return Checkpoint(path, tensors, {})


def fold(names: Iterable[tuple[str, str]]) -> list[str]:
    """Shorten (name, note) pairs that differ only in their first number, to `a.{0-2}.x note`, sorted."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for name, note in names:
        match = re.search(r"\.(\d+)\.", name)
        if match:
            key, number = (name[: match.start(1)], name[match.end(1) :], note), int(match[1])
        else:
            key, number = (name, "", note), -1
        groups.setdefault(key, []).append(number)
    lines = []
    for (head, tail, note), numbers in sorted(groups.items()):
        label = "" if numbers == [-1] else _ranges(sorted(numbers))
        lines.append(f"{head}{label}{tail} {note}".rstrip())
    return lines


def _ranges(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return "{" + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) + "}"


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a small file. Raises CheckpointError for anything else."""
    if not path.is_file():
        raise CheckpointError(path, "no such file")
    if path.stat().st_size > MAX_HEADER_BYTES:
        raise CheckpointError(path, f"larger than {MAX_HEADER_BYTES} bytes: not a config or an index")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"not JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(path, f"a JSON object was expected, found {type(value).__name__}")
    return value
