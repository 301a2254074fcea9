"""The one rule by which `pointwise` and `group_norm` take their Triton kernels; all else is PyTorch's.

Nothing is chosen here by a person, hence no reasons: `attention` and `fp8`, which are, have `why_not`.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor


def takes(*tensors: Tensor) -> bool:
    """Whether Triton kernels run on such tensors: all of one 16-bit type, on an NVIDIA GPU from sm_80 on.

    Never while compiling: Inductor fuses PyTorch's operators, and could only work around an opaque kernel.
    """
    first = tensors[0]
    if torch.compiler.is_compiling() or not all(t.is_cuda for t in tensors):
        return False
    if first.dtype not in (torch.bfloat16, torch.float16) or any(t.dtype != first.dtype for t in tensors):
        return False
    return runs_triton(first.device)


@functools.cache
def runs_triton(device: torch.device) -> bool:
    """Whether our Triton kernels run on a CUDA device."""
    if torch.version.cuda is None or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device)[0] >= 8
