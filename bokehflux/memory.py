"""Where a model's weights live while it runs: all on the device, or only what is at work.

resident: everything on the device. offload: each network visits it for its phase (text, denoising, decoding),
the modulation layers (27 % of FLUX) only for the one table a run needs. stream: T5's and the transformer's
blocks visit it one by one, the next one's copy hidden behind the current one's work. Latents are the same
bits in every mode (tested on a CPU; `tests/gpu/test_memory.py` waits for a GPU), and so are pictures that are
decoded alike (`decode.py`).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from bokehflux.models.linear import Linear
from bokehflux.models.mmdit import MMDiT
from bokehflux.models.t5 import T5Encoder

logger = logging.getLogger(__name__)

MemoryMode = Literal["resident", "offload", "stream"]
MODES: tuple[MemoryMode, ...] = get_args(MemoryMode)
Phase = Literal["text", "denoise", "decode"]
Unit = tuple[nn.Module, list[nn.Parameter]]
"""A module that is called, and the parameters that are there only while it runs."""
WORKSPACE_BYTES = 3 * 10**9
"""Activations of one 1024 x 1024 picture and the allocator's own share, kept free when a mode is chosen."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What `place` decided: the phases of a run bring in what they need."""

    mode: MemoryMode = "resident"
    device: torch.device | None = None
    """Where the work is done; None: wherever the networks are."""
    visitors: Mapping[Phase, tuple[nn.Parameter, ...]] = field(default_factory=dict)
    """Parameters that are on the device only during a phase."""
    needs: Footprint | None = None
    """Of the networks, where it is known: tells which leaner mode would fit."""

    @contextlib.contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Inside, the phase's networks are on the device; afterwards where they were.

        Running out of memory becomes a MemoryError that names what would fit.
        """
        homes = [(parameter, parameter.data) for parameter in self.visitors.get(phase, ())]
        try:
            with advised(self.mode, self.device, self.needs):
                for parameter, home in homes:
                    parameter.data = home.to(self.device, non_blocking=True)
                yield
        finally:
            for parameter, home in homes:
                parameter.data = home


@contextlib.contextmanager
def advised(mode: MemoryMode, device: torch.device | None, needs: Footprint | None = None) -> Iterator[None]:
    """Inside, running out of memory becomes a MemoryError that names what would fit.

    needs: of the networks; without it the next leaner mode is named, with it the first that fits.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        smaller = "fewer pictures at once (max_rows) or a smaller size"
        reason = " ".join(str(error).split())[:300]
        if not isinstance(error, torch.OutOfMemoryError):  # that one comes from a GPU
            where = f"device {device}" if device is not None and device.type == "mps" else "the machine"
            raise MemoryError(
                f"{where} is out of memory; try {smaller}, dtype 'bfloat16', or a smaller file of the model "
                f"(fp8, GGUF) ({reason})"
            ) from error
        leaner = MODES[MODES.index(mode) + 1 :]
        if leaner and needs is not None and device is not None:
            # What this process holds is free for another mode.
            free = free_memory(device) + torch.cuda.memory_reserved(device)
            leaner = tuple(m for m in leaner if getattr(needs, m) + WORKSPACE_BYTES <= free) or leaner[-1:]
        advice = f"memory={leaner[0]!r}, or {smaller}" if leaner else smaller
        raise MemoryError(f"the GPU is out of memory in mode {mode!r}; try {advice} ({reason})") from error


def ran_out(error: BaseException) -> bool:
    """Whether an error means that memory ran out: every allocator of PyTorch says so in its own words."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    told = isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    return told or isinstance(error, (MemoryError, torch.OutOfMemoryError))


class Footprint(NamedTuple):
    """Bytes of the weights that each mode holds on the device at once, at its worst moment."""

    resident: int
    offload: int
    stream: int


def footprint(mmdit: MMDiT, text: Sequence[nn.Module], vae: nn.Module) -> Footprint:
    modulation, blocks = _size(_modulation_units(mmdit)), _block_units(mmdit)
    loop = _bytes(mmdit) - modulation
    streamed_text = sum(_bytes(n) - _size(_block_units(n)) + 2 * _largest(_block_units(n)) for n in text)
    return Footprint(
        resident=sum(map(_bytes, (mmdit, *text, vae))),
        offload=max(sum(map(_bytes, text)), loop, _bytes(vae)),
        stream=loop - _size(blocks) + max(2 * _largest(blocks), streamed_text, _bytes(vae)),
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


def place(
    mmdit: MMDiT, text: Sequence[nn.Module], vae: nn.Module, mode: MemoryMode, device: torch.device
) -> Placement:
    """Put weights where the mode wants them. Call once, after loading; the networks work as before."""
    networks, needs = (mmdit, *text, vae), footprint(mmdit, text, vae)
    if mode == "resident":
        for network in networks:
            network.to(device)
        return Placement(mode=mode, device=device, needs=needs)
    away: set[int] = set()

    def stream(units: list[Unit], again: bool) -> None:
        Stream(units, device, again=again)
        away.update(id(parameter) for _, parameters in units for parameter in parameters)

    stream(_modulation_units(mmdit), again=False)
    if mode == "stream":
        stream(_block_units(mmdit), again=True)
        for network in text:
            stream(_block_units(network), again=False)

    def rest(*networks: nn.Module) -> tuple[nn.Parameter, ...]:
        return tuple(p for network in networks for p in network.parameters() if id(p) not in away)

    visitors: dict[Phase, tuple[nn.Parameter, ...]] = {"text": rest(*text), "decode": rest(vae)}
    if mode == "offload":
        visitors["denoise"] = rest(mmdit)
    else:  # what is left of the transformer is small
        for parameter in rest(mmdit):
            parameter.data = parameter.data.to(device)
    for parameters in visitors.values():
        for parameter in parameters:
            parameter.data = _host(parameter.data, device)
    for network in networks:
        for layer in network.modules():
            if isinstance(layer, Linear):  # LoRA terms are small and used by every step: they stay there
                layer.terms = tuple(term.moved(lambda t: t.to(device)) for term in layer.terms)
    return Placement(mode=mode, device=device, visitors=visitors, needs=needs)


class Stream:
    """Modules that run one after the other, each with its parameters on the device only while it runs.

    The parameters' home is host memory (pinned for a GPU). While module i runs, those of module i + 1 are
    copied on a stream of their own. again: after the last comes the first, for the next step.
    """

    def __init__(self, units: Sequence[Unit], device: torch.device, *, again: bool) -> None:
        self.device, self.again = device, again
        self.parameters = [parameters for _, parameters in units]
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.ready: dict[int, tuple[list[Tensor], torch.cuda.Event | None]] = {}
        for group in self.parameters:
            for parameter in group:
                parameter.data = _host(parameter.data, device)
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
        if i + 1 < len(self.parameters) or self.again:
            self._fetch((i + 1) % len(self.parameters))

    def _leave(self, i: int) -> None:
        for parameter, home in zip(self.parameters[i], self.homes[i], strict=True):
            parameter.data = home


def _modulation_units(mmdit: MMDiT) -> list[Unit]:
    """In the order in which `MMDiT.modulations` calls them."""
    double = [layer for block in mmdit.doubles for layer in (block.img_mod, block.txt_mod)]
    layers = [*double, *(block.modulation for block in mmdit.singles)]
    return [(layer, list(layer.parameters())) for layer in layers]


def _block_units(network: nn.Module) -> list[Unit]:
    """Blocks in the order in which they run, with what only their own call uses; none for other networks."""
    blocks: list[nn.Module]
    shared: tuple[str, ...]
    if isinstance(network, MMDiT):
        blocks, shared = [*network.doubles, *network.singles], ("_mod.", "modulation.")
    elif isinstance(network, T5Encoder):
        blocks, shared = [*network.encoder.block], ("relative_attention_bias.",)
    else:
        return []
    return [
        (block, [p for name, p in block.named_parameters() if not any(part in name for part in shared)])
        for block in blocks
    ]


def _host(x: Tensor, device: torch.device) -> Tensor:
    """In host memory, pinned if that is where a GPU will copy it from."""
    x = x.cpu()
    return x.pin_memory() if device.type == "cuda" and not x.is_pinned() else x


def _bytes(network: nn.Module) -> int:
    return sum(p.nbytes for p in network.parameters())


def _size(units: Sequence[Unit]) -> int:
    return sum(p.nbytes for _, parameters in units for p in parameters)


def _largest(units: Sequence[Unit]) -> int:
    return max((sum(p.nbytes for p in parameters) for _, parameters in units), default=0)
