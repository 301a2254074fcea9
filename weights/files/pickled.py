"""Files of `torch.save`, read without running anything in them; only for bokeh adapters (`parts.py`).

A pickle is a program. PyTorch's restricted reader does not run it: it knows tensors and plain containers, and
stops at any other name. Its result is checked once more here.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

PICKLE_SUFFIX = ".bin"
KNOWN = ("pytorch_model.bin", "bokeh_lora.bin")
"""Usual names. A folder's only .bin is taken whatever its name is."""
_ADVICE = "convert it to .safetensors where you trust it"


def pickle_in(path: Path) -> Path | None:
    """The pickle that a path means: a .bin file, or the only one of a folder. None where there is none."""
    if not path.is_dir():
        return path if path.suffix == PICKLE_SUFFIX and path.is_file() else None
    found = sorted(p for p in path.iterdir() if p.suffix == PICKLE_SUFFIX)
    choice = [p for p in found if p.name in KNOWN] or found
    return choice[0] if len(choice) == 1 else None


class PickledFile:
    """The tensors of one file, by name; views of the mapped file.

    Raises OSError, and ValueError unless it is a flat table of plain tensors that the file really holds.
    """

    def __init__(self, path: Path) -> None:
        size = path.stat().st_size
        try:
            with zipfile.ZipFile(path) as archive:
                if any(entry.compress_type for entry in archive.infolist()):
                    # A small file could unpack to any size.
                    raise ValueError("its archive is compressed, which torch.save never does")
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except OSError:
            raise
        except pickle.UnpicklingError:
            # Not the reader's own message: it advises to run the file.
            problem = f"it is a Python pickle of more than tensors, which is never executed: {_ADVICE}"
            raise ValueError(problem) from None
        except Exception as error:  # a damaged archive or pickle can fail in any way
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"not a PyTorch file, or damaged: download it again ({reason:.200})") from None
        if not isinstance(found, dict) or not found or not all(map(_is_plain, found, found.values())):
            raise ValueError(f"its pickle is not a flat table of plain tensors: {_ADVICE}")
        if sum(tensor.nbytes for tensor in found.values()) > size:
            raise ValueError(f"declares tensors larger than the {size} bytes of the file")
        self.tensors: dict[str, Tensor] = found

    def get_tensor(self, name: str) -> Tensor:
        """A CPU view of one tensor."""
        return self.tensors[name].detach()


def _is_plain(name: object, value: object) -> bool:
    """Whether this is a name and a contiguous tensor of numbers."""
    if not isinstance(name, str) or type(value) not in (Tensor, nn.Parameter):
        return False
    assert isinstance(value, Tensor)
    # An attribute set on the tensor could hide a method that is called below.
    strided = value.layout == torch.strided and not value.is_nested and not value.is_quantized
    return not vars(value) and strided and value.device.type == "cpu" and value.is_contiguous()
