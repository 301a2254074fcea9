"""Evaluations of the network as CUDA graphs: recorded once, then replayed with one launch each.

A step is more than a thousand kernels, and Python may need longer to launch them than a GPU needs to run them
for a small picture. A graph launches all at once, the same kernels on the same numbers: no picture changes.
It costs the activations of one evaluation, reserved while the run lasts, and as much again for every further
kind of step (grounded, plain, negative): about 1 GB each for FLUX.1 at `MAX_TOKENS` (derived, not measured).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from bokehflux.attention import AttentionSpec, Grounded, Plain
from bokehflux.models.mmdit import MMDiT, Modulations

logger = logging.getLogger(__name__)

MAX_TOKENS = 12288
"""Joint tokens of all rows up to which a batch is captured: two pictures at 1024 x 1024, seven at 512 x 512.
Larger batches take longer than they take to launch, in fp8 too."""
Evaluate = Callable[[Tensor, Modulations], Tensor]
"""(x [B, N, C], modulations) -> velocity [B, N, C]; everything else about it is fixed."""


class StepGraphs:
    """The graphs of one run of one prompt: one for every shape and attention.

    The first evaluation of a kind runs as it is (kernels are compiled, libraries make their workspaces), the
    second is captured, and from there on it is replayed. What cannot be captured (an attention backend or a
    storage format that waits for the GPU) is said once and runs as it is. The caller keeps every other tensor
    of an evaluation alive and in place.
    """

    def __init__(self) -> None:
        self._replays: dict[tuple[AttentionSpec, torch.Size], Evaluate | None] = {}

    def __call__(self, spec: AttentionSpec, evaluate: Evaluate, x: Tensor, mods: Modulations) -> Tensor:
        """evaluate(x, mods), where spec stands for all that differs between one `evaluate` and the next."""
        kind = (spec, x.shape)
        with torch.cuda.device(x.device):
            if kind not in self._replays:
                self._replays[kind] = None
                return _warm_up(evaluate, x, mods)
            replay = self._replays[kind]
            if replay is None:
                replay = self._replays[kind] = _capture(evaluate, x, mods)
            return replay(x, mods)


def _capture(evaluate: Evaluate, x: Tensor, mods: Modulations) -> Evaluate:
    try:
        return _Captured(evaluate, x, mods)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        logger.warning("steps are launched one kernel at a time, as no CUDA graph can hold them: %s", reason)
        return evaluate


class _Captured:
    """A graph and the tensors it reads and writes."""

    def __init__(self, evaluate: Evaluate, x: Tensor, mods: Modulations) -> None:
        self.x = x.clone(memory_format=torch.contiguous_format)
        self.mods = mods.map(torch.clone)
        self.graph = torch.cuda.CUDAGraph()
        # Other threads (previews, progress) may use the GPU meanwhile.
        capture = torch.cuda.graph(
            self.graph, stream=_side_stream(x.device.index), capture_error_mode="thread_local"
        )
        # The outer context brings the current stream back even when a capture fails to end.
        with torch.cuda.stream(torch.cuda.current_stream()), capture:
            self.out = evaluate(self.x, self.mods)

    def __call__(self, x: Tensor, mods: Modulations) -> Tensor:
        self.x.copy_(x)
        torch._foreach_copy_(self.mods.tensors(), mods.tensors())  # hundreds of vectors in a few launches
        self.graph.replay()
        return self.out.clone()  # the next replay writes over it


def worth_capturing(mmdit: MMDiT, spec: AttentionSpec, x: Tensor, txt_length: int) -> bool:
    """Whether an evaluation on x [B, N, C] is small enough to gain by it, and only launches kernels.

    Hooks, among them those that stream weights, are Python and would not run again; nor would an attention of
    somebody's own, or one that stores keys. Pivots in other rows than the first are gathered by an index that
    comes from the host.
    """
    if not x.is_cuda or x.shape[0] * (txt_length + x.shape[1]) > MAX_TOKENS:
        return False
    fixed = type(spec) is Plain or (type(spec) is Grounded and set(spec.pivot_of) == {0})
    return fixed and not any(m._forward_hooks or m._forward_pre_hooks for m in mmdit.modules())


def _warm_up(evaluate: Evaluate, x: Tensor, mods: Modulations) -> Tensor:
    """evaluate(x, mods) on the stream that captures, whose library workspaces are made now."""
    stream, current = _side_stream(x.device.index), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        out = evaluate(x, mods)
    current.wait_stream(stream)
    out.record_stream(current)
    return out


@functools.cache
def _side_stream(device_index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device_index)
