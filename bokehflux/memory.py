"""Where a model's weights live while it runs: all on the device, or only what is at work.

resident: everything on the device. offload: text encoders and autoencoder visit it for their phase, the
modulation layers (27 % of FLUX) for the one table a run needs. stream: also every block visits it, the next
one's copy hidden behind the current one's work. Pictures are the same bits in every mode.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from bokehflux.models.linear import Linear
from bokehflux.models.mmdit import MMDiT

logger = logging.getLogger(__name__)

MemoryMode = Literal["resident", "offload", "stream"]
MODES: tuple[MemoryMode, ...] = get_args(MemoryMode)
WORKSPACE_BYTES = 3 * 10**9
"""Activations of one 1024 x 1024 picture and the allocator's own share, kept free when a mode is chosen."""


class Footprint(NamedTuple):
    """Bytes of the weights that each mode holds on the device at once."""

    resident: int
    offload: int
    stream: int


def footprint(mmdit: MMDiT, visitors: Sequence[nn.Module]) -> Footprint:
    """visitors: text encoders and autoencoder."""
    blocks = [_bytes(block) - _bytes_of(_modulation(block)) for block in _blocks(mmdit)]
    modulation = sum(_bytes_of(_modulation(block)) for block in _blocks(mmdit))
    loop = _bytes(mmdit) - modulation
    largest = max((_bytes(visitor) for visitor in visitors), default=0)
    return Footprint(
        resident=_bytes(mmdit) + sum(map(_bytes, visitors)),
        # A visitor is there beside the loop's weights.
        offload=loop + largest,
        stream=max(loop - sum(blocks) + 2 * max(blocks), largest),
    )


def choose(needs: Footprint, free_bytes: int) -> MemoryMode:
    """The first mode whose weights and workspace fit in free_bytes; stream where none does."""
    for mode in MODES:
        if getattr(needs, mode) + WORKSPACE_BYTES <= free_bytes:
            return mode
    return "stream"


def free_memory(device: torch.device) -> int:
    """Free bytes on a CUDA device."""
    return torch.cuda.mem_get_info(device)[0]


def place(mmdit: MMDiT, visitors: Sequence[nn.Module], mode: MemoryMode, device: torch.device) -> None:
    """Put weights where the mode wants them. Call once, after loading; the networks work as before."""
    if mode == "resident":
        for module in (mmdit, *visitors):
            module.to(device)
        return
    layers = [layer for block in _blocks(mmdit) for layer in _modulation(block)]
    streamed = [(layer, list(layer.parameters())) for layer in layers]
    Stream(streamed, device)
    if mode == "stream":
        mine = {id(p) for _, parameters in streamed for p in parameters}
        units = [(block, [p for p in block.parameters() if id(p) not in mine]) for block in _blocks(mmdit)]
        Stream(units, device)
        streamed += units
    away = {id(p) for _, parameters in streamed for p in parameters}
    for parameter in mmdit.parameters():
        if id(parameter) not in away:
            parameter.data = parameter.data.to(device)
    for module in (mmdit, *visitors):
        for layer in module.modules():
            if isinstance(layer, Linear):  # LoRA terms are small and used by every step: they stay there
                layer.terms = tuple(term.moved(lambda t: t.to(device)) for term in layer.terms)


@contextlib.contextmanager
def visiting(modules: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Inside, the modules are on the device; afterwards where they were."""
    homes = [(p, p.data) for module in modules for p in module.parameters() if p.device != device]
    for parameter, home in homes:
        parameter.data = home.to(device, non_blocking=True)
    try:
        yield
    finally:
        for parameter, home in homes:
            parameter.data = home


@contextlib.contextmanager
def out_of_memory_advice(mode: MemoryMode) -> Iterator[None]:
    """Inside, running out of GPU memory becomes a MemoryError that names what would fit."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        leaner = MODES[MODES.index(mode) + 1 :]
        advice = "fewer pictures at once (max_rows) or a smaller size"
        if leaner:
            advice = f"memory={leaner[0]!r}, or {advice}"
        raise MemoryError(f"the GPU is out of memory in mode {mode!r}; try {advice} ({error})") from error


class Stream:
    """Modules that run one after the other, each with its parameters on the device only while it runs.

    The parameters' home is host memory (pinned for a GPU). While module i runs, those of module i + 1 are
    copied on a stream of their own; after the last comes the first, for the next step.
    """

    def __init__(
        self, units: Sequence[tuple[nn.Module, Sequence[nn.Parameter]]], device: torch.device
    ) -> None:
        self.device = device
        self.parameters = [list(parameters) for _, parameters in units]
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.ready: dict[int, tuple[list[Tensor], torch.cuda.Event | None]] = {}
        for group in self.parameters:
            for parameter in group:
                home = parameter.data.cpu()
                parameter.data = home.pin_memory() if self.copies is not None else home
        self.homes = [[parameter.data for parameter in group] for group in self.parameters]
        for i, (module, _) in enumerate(units):
            module.register_forward_pre_hook(lambda *_, i=i: self._arrive(i))
            module.register_forward_hook(lambda *_, i=i: self._leave(i), always_call=True)

    def _fetch(self, i: int) -> None:
        if i in self.ready:
            return
        if self.copies is None:
            self.ready[i] = ([home.to(self.device, copy=True) for home in self.homes[i]], None)
            return
        with torch.cuda.stream(self.copies):
            tensors = [home.to(self.device, non_blocking=True) for home in self.homes[i]]
            self.ready[i] = (tensors, self.copies.record_event())

    def _arrive(self, i: int) -> None:
        self._fetch(i)
        tensors, event = self.ready.pop(i)
        if event is not None:
            work = torch.cuda.current_stream(self.device)
            work.wait_event(event)
            for tensor in tensors:
                tensor.record_stream(work)  # not to be reused for the next copy before this work is done
        for parameter, tensor in zip(self.parameters[i], tensors, strict=True):
            parameter.data = tensor
        self._fetch((i + 1) % len(self.parameters))

    def _leave(self, i: int) -> None:
        for parameter, home in zip(self.parameters[i], self.homes[i], strict=True):
            parameter.data = home


def _blocks(mmdit: MMDiT) -> list[nn.Module]:
    return [*mmdit.double_blocks, *mmdit.single_blocks]


def _modulation(block: nn.Module) -> list[nn.Module]:
    return [getattr(block, name) for name in ("img_mod", "txt_mod", "modulation") if hasattr(block, name)]


def _bytes(module: nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())


def _bytes_of(modules: Iterable[nn.Module]) -> int:
    return sum(map(_bytes, modules))
