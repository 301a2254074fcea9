"""Evaluations of the network as CUDA graphs: recorded once, then replayed with one launch each.

A step is more than a thousand kernels. For a small picture Python may need longer to launch them than a GPU
needs to run them. A graph launches them together, the same kernels on the same numbers: no picture changes.
Each kind of step (grounded, plain, negative) reserves the activations of one evaluation while the run lasts:
about 1 GB for FLUX.1 at `MAX_TOKENS` (derived, not measured).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from bokehflux.attention import AttentionSpec, Grounded, Plain
from bokehflux.models.mmdit import MMDiT, Modulations
from bokehflux.sampling.ranks import HeadsOverRanks

logger = logging.getLogger(__name__)

MAX_TOKENS = 12288
"""Batches of more joint tokens, all rows together, are not captured. It is two pictures at 1024 x 1024, seven
at 512 x 512. Larger batches run longer than Python needs to launch them, even in fp8."""
Evaluate = Callable[[Tensor, Modulations], Tensor]
"""(x [B, N, C], modulations) -> velocity [B, N, C], with everything else fixed."""


class StepGraphs:
    """The graphs of one run of one prompt: one for each shape and attention.

    The first evaluation of a kind runs eagerly (kernels are compiled, libraries make their workspaces), the
    second is captured, and further ones are replayed. An evaluation that cannot be captured (an attention
    backend or a storage format that waits for the GPU) is logged once and runs eagerly. The caller keeps
    every other tensor of an evaluation alive and in place.
    """

    def __init__(self) -> None:
        self._replays: dict[tuple[AttentionSpec, torch.Size], Evaluate | None] = {}

    def __call__(self, spec: AttentionSpec, evaluate: Evaluate, x: Tensor, mods: Modulations) -> Tensor:
        """evaluate(x, mods). spec: all that distinguishes this `evaluate` from the run's other ones."""
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
    """A graph, and the tensors that it reads and writes."""

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
        # A graph reads and writes the addresses it was recorded with: inputs are copied there.
        self.x.copy_(x)
        torch._foreach_copy_(self.mods.tensors(), mods.tensors())  # hundreds of vectors in a few launches
        self.graph.replay()
        return self.out.clone()  # the next replay overwrites self.out


def worth_capturing(mmdit: MMDiT, spec: AttentionSpec, x: Tensor, txt_length: int) -> bool:
    """Whether an evaluation on x [B, N, C] is small enough to gain from a graph, and only launches kernels.

    A replay runs no Python. Hooks (streamed weights use them), a user's own attention, and an attention that
    stores keys would all be skipped. Pivots in other rows than the first are gathered by an index from the
    host, which a graph cannot hold.
    """
    if not x.is_cuda or x.shape[0] * (txt_length + x.shape[1]) > MAX_TOKENS:
        return False
    whole = spec.whole if isinstance(spec, HeadsOverRanks) else spec  # a graph holds its messages, too
    fixed = type(whole) is Plain or (type(whole) is Grounded and set(whole.pivot_of) == {0})
    return fixed and not has_hooks(mmdit)


def has_hooks(mmdit: MMDiT) -> bool:
    """Whether a step calls a module with hooks. Layers that a run calls before its steps may have some."""
    hooked = {m for m in mmdit.modules() if m._forward_hooks or m._forward_pre_hooks}
    if not hooked:
        return False
    units = mmdit.units()
    return bool(hooked - {m for unit in units.ahead + units.values for m in unit.modules()})


def _warm_up(evaluate: Evaluate, x: Tensor, mods: Modulations) -> Tensor:
    """evaluate(x, mods) on the capturing stream, so that its library workspaces exist before the capture."""
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
