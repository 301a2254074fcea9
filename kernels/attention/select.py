"""Which attention runs: every choice, and every reason against a kernel, is here.

A call goes one way: `interface` checks its arguments and asks `resolve` for a backend; in backend `triton`,
`ops` and `launch` follow, and `launch` asks `language` whether the tensors allow Gluon. Nothing calls back.

Backends: `reference` (float32 definition), `sdpa` (PyTorch's kernels), `flash` (a flash-attn wheel's) and
`triton` (ours: Gluon on Hopper, plain Triton elsewhere; 16-bit types, head dim 64 or 128). A backend asked
for by its name never falls back. "auto" takes the fastest of those measured (`choose`), logs once what and
why, and warns once where a kernel that was made for this GPU cannot run.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from . import reference, sdpa, tiles

logger = logging.getLogger(__name__)

BACKENDS: dict[str, ModuleType | str] = {
    "reference": reference,
    "sdpa": sdpa,
    "flash": ".flash",
    "triton": ".ops",
}
"""By name, a module with the functions of `reference`, or the name of one that is imported when it is first
used."""

BOUNDED = frozenset({"triton"})
"""Backends that take `logit_bound`; the others have no use for one."""

GLUON_TRITONS = (3, 6), (3, 9)
"""First and last version of Triton that `gluon_fwd` was tried with: Gluon is experimental, its names move."""
DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 128)


class Choice(NamedTuple):
    """What "auto" means for a kind of call."""

    backend: str
    reason: str
    off: str | None = None
    """Why our kernels for this GPU cannot run, if it is one that they were made for."""


FOR_GRADIENTS = Choice(
    "sdpa",
    "gradients are needed, and with them PyTorch's kernels are faster on Hopper; backend 'triton' takes less "
    "memory with many targets: benchmarks/results/train_attention-3c09b9a.json",
)


def choose(
    device: torch.device, dtype: torch.dtype, head_dim: int, *, grounded: bool, gradients: bool = False
) -> Choice:
    """What "auto" runs, and why.

    grounded: whether a pivot's keys are read too, which PyTorch needs two calls for. gradients: whether a
    backward pass follows. The choice rests on benchmarks/results/attention.json (H100, head dim 128).
    """
    if device.type != "cuda":
        return Choice("sdpa", f"our kernels need an NVIDIA GPU, not {device.type}")
    no_gluon = why_not_gluon(device)
    off = no_gluon if tiles.device(device).family == tiles.HOPPER else None
    if reason := why_not_triton(device, dtype, head_dim):
        return Choice("sdpa", reason, off)
    if no_gluon is None:
        choice = Choice("triton", "fastest of those measured on Hopper: benchmarks/results/attention.json")
    elif off is None:
        return Choice("sdpa", f"our fastest kernels cannot run here: {no_gluon}; ask for the others by name")
    elif grounded and head_dim == 128:
        # 1.5 to 3.4 times as fast as two calls merged; a plain row is slower than PyTorch's at 4608 tokens.
        choice = Choice("triton", "plain Triton, faster with a pivot than PyTorch's two calls", off)
    else:
        return Choice("sdpa", "our kernels in plain Triton are not known to be faster here", off)
    return FOR_GRADIENTS if gradients else choice


def resolve(backend: str, q: Tensor, *others: Tensor | None, grounded: bool) -> str:
    """A name in `BACKENDS`; "auto" is `choose`'s. Raises ValueError for any other name.

    others: the further tensors that gradients may be needed of.
    """
    if backend == "auto":
        gradients = dispatch.needs_gradients(q, *others)
        choice = choose(q.device, q.dtype, q.shape[-1], grounded=grounded, gradients=gradients)
        if not torch.compiler.is_compiling():  # a traced graph cannot log
            _log_choice(q.device.type, choice)
        return choice.backend
    check_name(backend)
    return backend


def check_name(backend: str) -> None:
    """Raise ValueError unless a backend has this name."""
    if backend not in ("auto", *BACKENDS):
        raise ValueError(
            f"unknown attention backend {backend!r}: expected 'auto' or one of {sorted(BACKENDS)}"
        )


def check_triton(device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Raise ValueError unless backend `triton` takes such tensors."""
    if reason := why_not_triton(device, dtype, head_dim):
        raise ValueError(f"the Triton attention kernels cannot run: {reason}")


def language(tensors: Sequence[Tensor]) -> str:
    """What the kernels of backend `triton` are written in for q, k, k_pivot, v: Gluon where that can run."""
    reason = why_not_in_gluon(tensors)
    if reason is not None and tiles.device(tensors[0].device).family == tiles.HOPPER:
        _warn_off(reason)
    return tiles.GLUON if reason is None else tiles.TRITON


def why_not_triton(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """The reason why backend `triton` cannot take such tensors, or None."""
    if device.type == "cuda":
        if reason := dispatch.why_not(device):
            return reason
    elif device.type != "cpu" or not _interpreted():
        return f"they need a CUDA device (a CPU only with TRITON_INTERPRET=1), not {device.type}"
    elif dtype != torch.float16:
        return f"Triton's interpreter cannot multiply {dtype} matrices; use float16 on a CPU"
    if dtype not in DTYPES:
        return f"they take bfloat16 and float16, not {dtype}"
    if head_dim not in HEAD_DIMS:
        return f"they are made for head dims {HEAD_DIMS}, not {head_dim}"
    return None


@functools.cache
def why_not_gluon(device: torch.device) -> str | None:
    """The reason why our kernels in Gluon cannot run on a device, or None."""
    if tiles.device(device).family != tiles.HOPPER:
        return "they are made for Hopper (sm_90)"
    if reason := dispatch.why_not(device):
        return reason
    version = dispatch.triton_version()
    assert version is not None  # or there were a reason
    first, last = GLUON_TRITONS
    if not first <= version <= last:
        wanted = f"{dispatch.dotted(first)} to {dispatch.dotted(last)}"
        return f"they are made for Triton {wanted}, not {dispatch.dotted(version)}"
    return None


def why_not_in_gluon(tensors: Sequence[Tensor]) -> str | None:
    """The reason why our kernels in Gluon cannot take these tensors, or None."""
    if reason := why_not_gluon(tensors[0].device):
        return reason
    if not all(map(is_describable, tensors)):
        return "a tensor's address or strides are not multiples of 16 bytes, or its rows repeat"
    return None


def is_describable(x: Tensor) -> bool:
    """Whether a tensor descriptor can express x: addresses in multiples of 16 bytes, no repeated rows."""
    strides = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    return x.data_ptr() % 16 == 0 and all(s > 0 and s * x.element_size() % 16 == 0 for s in strides)


def _interpreted() -> bool:
    if dispatch.triton_version() is None:
        return False
    from . import triton_fwd

    return triton_fwd.INTERPRETED


@functools.cache
def _log_choice(device_type: str, choice: Choice) -> None:
    logger.info("attention backend for %s: %s (%s)", device_type, choice.backend, choice.reason)
    if choice.off is not None:
        _warn_off(choice.off)


@functools.cache
def _warn_off(reason: str) -> None:
    logger.warning("attention is slower than this GPU allows: our kernels for it are off: %s", reason)
