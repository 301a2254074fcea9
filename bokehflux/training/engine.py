"""How a frozen network with a live adapter goes there and back: what is kept, stored, compiled, recorded.

The mathematics is the same in every form, to the rounding of a compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from bokehflux.kernels.attention import stock
from bokehflux.models.fp8 import fp8_weight
from bokehflux.models.linear import Linear
from bokehflux.models.mmdit import MMDiT
from bokehflux.weights.precision import RowScaled


def keep_activations(mmdit: MMDiT, share: float, *, compile: bool) -> None:
    """Decide what blocks keep for the way back, and compile them if asked. Names in `state_dict` stay.

    share 0: each block's inputs only, the rest is computed again, for half as much time again. 1: everything.
    Between: the compiler keeps about this share and computes again what is cheapest. Raises ValueError for a
    share between without a compiler.
    """
    if compile:
        for block in mmdit.blocks:
            block.compile(dynamic=False)
    if 0 < share < 1:
        if not compile:
            raise ValueError(f"activations between 0 and 1 need compiled blocks, got {share}")
        stock.register_flops()
    # It counts for the whole process: a network before this one may have been given another.
    torch._functorch.config.activation_memory_budget = share or 1.0
    if share == 0:
        # Around what is compiled: what is kept is decided outside it.
        for blocks in (mmdit.double_blocks, mmdit.single_blocks):
            for i in range(len(blocks)):
                # Nothing in a block is random, so that no generator's state need be kept.
                blocks[i] = checkpoint_wrapper(blocks[i], preserve_rng_state=False)


@torch.no_grad()
def store_fp8(mmdit: MMDiT, device: torch.device) -> None:
    """Keep every linear weight of the base as float8 e4m3 with a scale a row; it is widened where it is used.

    A product is one of the dtype as before, on weights that are 2.6 % off (root mean square). device: where
    the work is done. Scales lie there, wherever the weights are.
    """
    for layer in mmdit.modules():
        if isinstance(layer, Linear):
            values, scale = fp8_weight(layer.weight, layer.dequantize)
            layer.weight, layer.scale = nn.Parameter(values, requires_grad=False), None
            layer.dequantize = RowScaled(scale=scale[:, None].to(device))


class Recorded:
    """A loss and its gradients as CUDA graphs, one for each kind of batch: one launch in place of thousands.

    The loss must do the same on every batch of a kind: no random numbers, no waiting for the GPU. Call it on
    a stream of your own where another kind may come while the graph of autograd of the last one is there:
    what that keeps of a parameter waits for the stream on which it was made, which may not be the default
    one while a graph is recorded. Of each kind a set of gradients stays on the device; activations of all
    kinds lie in the same memory, so that gradients must be read before the next batch comes.
    """

    def __init__(self, loss: Callable[..., Tensor], parameters: Sequence[nn.Parameter]) -> None:
        self.loss, self.parameters = loss, list(parameters)
        self._graphs: dict[Hashable, _Graph] = {}
        self._pool: Any = None

    def __call__(self, kind: Hashable, *inputs: Tensor) -> Tensor:
        """loss(kind, *inputs), a scalar whose gradients reach the parameters. kind: all but the inputs'
        values that the loss depends on."""
        key = kind, tuple((x.shape, x.dtype) for x in inputs)
        if key not in self._graphs:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            self._graphs[key] = _Graph(self.loss, self.parameters, kind, inputs, self._pool)
        graph = self._graphs[key]
        return _Known.apply(graph.replay(inputs), graph.gradients, *self.parameters)  # type: ignore[no-any-return]


class _Graph:
    """One graph, and the tensors that it reads and writes."""

    def __init__(
        self,
        loss: Callable[..., Tensor],
        parameters: list[nn.Parameter],
        kind: Hashable,
        inputs: Sequence[Tensor],
        pool: Any,
    ) -> None:
        self.inputs = [x.clone() for x in inputs]
        # A cast that the surrounding context remembers keeps its weight's gradient on the stream of an
        # earlier, eager step, which a graph must not wait for.
        torch.clear_autocast_cache()

        def compute() -> tuple[Tensor, tuple[Tensor, ...]]:
            # Casts of weights that the surrounding context remembers would be those of the first step.
            with torch.enable_grad(), torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
                value = loss(kind, *self.inputs)
            return value.detach(), torch.autograd.grad(value, parameters)

        current = torch.cuda.current_stream()
        stream = torch.cuda.Stream() if current == torch.cuda.default_stream() else current
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(2):  # kernels are compiled, libraries make their workspaces
                compute()
        current.wait_stream(stream)
        torch.cuda.empty_cache()  # what the warm-up took is needed in the graph's own pool
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool, stream=stream):
            self.value, self.gradients = compute()

    def replay(self, inputs: Sequence[Tensor]) -> Tensor:
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        self.graph.replay()
        return self.value.clone()  # the next replay overwrites it


class _Known(torch.autograd.Function):
    """A value whose gradients were computed with it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Sequence[Tensor], *_: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return None, None, *torch._foreach_mul(ctx.gradients, grad)


def mean_of(parts: Sequence[Callable[[], Tensor]], parameters: Sequence[nn.Parameter]) -> Tensor:
    """The mean of several losses, each computed and led back before the next: the memory of one at a time.

    The result's gradients reach the parameters, all at once, however many parts there are.
    """
    value, gradients = torch.zeros((), device=parameters[0].device), [torch.zeros_like(p) for p in parameters]
    for part in parts:
        loss = part() / len(parts)
        torch._foreach_add_(gradients, torch.autograd.grad(loss, parameters))
        value += loss.detach()
    return _Known.apply(value, gradients, *parameters)  # type: ignore[no-any-return]
