"""Where our Triton kernels run: what every folder here asks before conditions of its own.

Users cannot pick a kernel of `pointwise`, `group_norm` or `scatter`: the folder's `takes` decides, and
`runs_triton` warns once of a GPU where none of ours runs. `attention` and `fp8`, where they can, have a
`why_not...` that gives the reason.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

OLDEST_TRITON = (3, 4)
"""The first with the tensor descriptors that our attention reads through."""


HALF = (torch.bfloat16, torch.float16)


def takes(*tensors: Tensor, dtypes: Sequence[torch.dtype] = HALF) -> bool:
    """Whether Triton kernels run on such tensors: all of one of the types, on a GPU that `why_not` allows.

    Never while compiling: Inductor fuses PyTorch's operators, and could only work around an opaque kernel.
    """
    first = tensors[0]
    if torch.compiler.is_compiling() or not all(t.is_cuda for t in tensors):
        return False
    if first.dtype not in dtypes or any(t.dtype != first.dtype for t in tensors):
        return False
    return runs_triton(first.device)


def needs_gradients(*tensors: Tensor | None) -> bool:
    """Whether a backward pass through these may follow."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


@functools.cache
def runs_triton(device: torch.device) -> bool:
    """Whether our Triton kernels run on a CUDA device; where they do not, a warning says so once."""
    reason = why_not(device)
    if reason is not None:
        logger.warning("fused kernels are off on %s, PyTorch's operators run instead: %s", device, reason)
    elif torch.version.hip is not None:
        logger.warning("fused kernels compile for AMD GPUs, but nobody has tested them there: %s", device)
    return reason is None


@functools.cache
def why_not(device: torch.device) -> str | None:
    """The reason why our Triton kernels cannot run on a CUDA device, or None. AMD's GPUs are untested."""
    on_amd = torch.version.hip is not None  # PyTorch calls its GPUs CUDA devices too
    if not on_amd and (torch.version.cuda is None or torch.cuda.get_device_capability(device)[0] < 8):
        return "they need an NVIDIA GPU of compute capability 8.0 or higher"
    version = triton_version()
    if version is None:
        return "the package triton is not installed"
    if version < OLDEST_TRITON:
        return f"they need Triton {dotted(OLDEST_TRITON)} or newer, not {dotted(version)}"
    return None


@functools.cache
def triton_version() -> tuple[int, int] | None:
    """Major and minor, or None where Triton cannot be imported."""
    try:
        import triton
    except ImportError:  # it has no wheels for some systems
        return None
    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
