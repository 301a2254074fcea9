"""Where a model's weights live while it runs: all on the device, or only what is at work.

resident: everything on the device. offload: each network visits it for its phase (text, denoising, decoding);
layers that a run needs once, before its steps (modulation, 27 % of FLUX, and the adapter's values), visit it
just for that. stream: T5's and the transformer's blocks visit it one by one, and the next one's copy hides
behind the current one's work. Latents are the same bits in every mode, and so are pictures if they are
decoded in the same way (`decode.py`).
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from bokehflux.models.linear import Linear, LowRankTerm
from bokehflux.models.units import Network, Units

MemoryMode = Literal["resident", "offload", "stream"]
MODES: tuple[MemoryMode, ...] = get_args(MemoryMode)
Phase = Literal["text", "denoise", "decode"]
Unit = tuple[nn.Module, list[nn.Parameter]]
"""A module that is called, and the parameters that are there only while it runs."""
PIECE_BYTES = 2**29
"""Largest piece of host memory that several parameters share. PyTorch rounds pinned memory up to a power of
two, which would cost a tensor at a time up to twice its size."""
ALIGNMENT = 256
WORKSPACE_BYTES = 3 * 10**9
"""Activations of one 1024 x 1024 picture and the allocator's own share, kept free when a mode is chosen."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What `place` decided: the phases of a run bring in what they need."""

    mode: MemoryMode = "resident"
    device: torch.device | None = None
    """Where the work is done; None: wherever the networks are."""
    visitors: Mapping[Phase, tuple[Piece, ...]] = field(default_factory=dict)
    """Parameters that are on the device only during a phase."""
    streams: Mapping[Phase, tuple[Stream, ...]] = field(default_factory=dict)
    """Modules whose parameters come and go within a phase."""
    needs: Footprint | None = None
    """Memory that the networks need, if known; used to suggest a smaller mode."""

    @contextlib.contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Keep the phase's networks on the device; afterwards they go back.

        Running out of memory becomes a MemoryError that names what would fit.
        """
        visitors, streams = self.visitors.get(phase, ()), self.streams.get(phase, ())
        try:
            with advised(self.mode, self.device, self.needs):
                for piece in visitors:
                    piece.show(piece.host.to(self.device, non_blocking=True))
                yield
        finally:
            for piece in visitors:
                piece.show(piece.host)
            for stream in streams:
                stream.release()
            if self.device is not None and self.device.type == "cuda" and (visitors or streams):
                # The next phase's pieces have other sizes: what the allocator keeps would lie idle.
                torch.cuda.empty_cache()


@contextlib.contextmanager
def advised(mode: MemoryMode, device: torch.device | None, needs: Footprint | None = None) -> Iterator[None]:
    """Turn running out of memory into a MemoryError that names what would fit.

    needs: of the networks. Without it the error names the next leaner mode, with it the first that fits.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        reason = _what_ran_out(error)
        smaller = "fewer pictures at once (max_rows) or a smaller size"
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


@contextlib.contextmanager
def room_to_blur() -> Iterator[None]:
    """Turn running out of memory while a picture is blurred into a ValueError: fewer rows need no less."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        reason = _what_ran_out(error)
        raise ValueError(
            "the picture does not fit in memory while it is blurred; make it smaller (height and width, or "
            f"a photograph's long_side): {reason}"
        ) from error


def _what_ran_out(error: Exception) -> str:
    """The allocator's words. Raises any other error again."""
    if not ran_out(error):
        raise error
    # The error holds the frames of the failed calls, and they hold tensors that another attempt needs.
    traceback.clear_frames(error.__traceback__)
    return " ".join(str(error).split())[:300]


def ran_out(error: BaseException) -> bool:
    """Whether an error means that memory ran out: each of PyTorch's allocators words it differently."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    told = isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    return told or isinstance(error, (MemoryError, torch.OutOfMemoryError))


class Footprint(NamedTuple):
    """Bytes of the weights that each mode holds on the device at once, at its worst moment."""

    resident: int
    offload: int
    stream: int


def footprint(transformer: Network, text: Sequence[Network], vae: Network) -> Footprint:
    """The weights of a model in each mode. Its LoRAs' terms are there all the time."""
    units, blocks = transformer.units(), _blocks(transformer)
    once = _size(_own(units, units.ahead + units.values))
    loop = _bytes(transformer) - once - sum(p.nbytes for p in units.unread)
    terms = sum(term.nbytes for n in (transformer, *text, vae) for term in _terms(n))
    streamed_text = sum(_bytes(n) - _size(_blocks(n)) + 2 * _largest(_blocks(n)) for n in text)
    return Footprint(
        resident=terms + sum(map(_bytes, (transformer, *text, vae))),
        offload=terms + max(sum(map(_bytes, text)), loop, _bytes(vae)),
        stream=terms + loop - _size(blocks) + max(2 * _largest(blocks), streamed_text, _bytes(vae)),
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
    transformer: Network, text: Sequence[Network], vae: Network, mode: MemoryMode, device: torch.device
) -> Placement:
    """Put weights where the mode wants them. Call once, after loading; the networks work as before."""
    networks, needs = (transformer, *text, vae), footprint(transformer, text, vae)
    if mode == "resident":
        for network in networks:
            network.to(device)
        return Placement(mode=mode, device=device, needs=needs)
    units = transformer.units()
    away = {id(parameter) for parameter in units.unread}
    for parameter in units.unread:
        parameter.data = parameter.data.cpu()

    def streamed(*runs: list[Unit], again: bool = False) -> tuple[Stream, ...]:
        away.update(id(p) for run in runs for _, parameters in run for p in parameters)
        return tuple(Stream(run, device, again=again) for run in runs if run)

    once = streamed(_own(units, units.ahead), _own(units, units.values))
    streams: dict[Phase, tuple[Stream, ...]] = {"denoise": once}
    if mode == "stream":
        streams["denoise"] += streamed(_blocks(transformer), again=True)
        streams["text"] = streamed(*map(_blocks, text))

    def rest(*networks: nn.Module) -> list[nn.Parameter]:
        return [p for network in networks for p in network.parameters() if id(p) not in away]

    visitors: dict[Phase, tuple[Piece, ...]] = {
        "text": pieces(rest(*text), device),
        "decode": pieces(rest(vae), device),
    }
    if mode == "offload":
        visitors["denoise"] = pieces(rest(transformer), device)
    else:  # what is left of the transformer is small
        for parameter in rest(transformer):
            parameter.data = parameter.data.to(device)
    for network in networks:
        for layer in network.modules():
            if isinstance(layer, Linear):  # LoRA terms are small and every step uses them: they stay there
                layer.terms = tuple(term.moved(lambda t: t.to(device)) for term in layer.terms)
    return Placement(mode=mode, device=device, visitors=visitors, streams=streams, needs=needs)


class Piece:
    """Parameters that share one piece of host memory (pinned for a GPU): their home, from which they can be
    copied elsewhere together."""

    def __init__(self, parameters: Sequence[nn.Parameter], device: torch.device) -> None:
        self.parameters = list(parameters)
        self.starts, size = [], 0
        for parameter in self.parameters:
            self.starts.append(size)
            size += -(-parameter.nbytes // ALIGNMENT) * ALIGNMENT
        self.host = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        values = [parameter.data for parameter in self.parameters]
        self.show(self.host)
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.data.copy_(value)

    @property
    def nbytes(self) -> int:
        return len(self.host)

    def show(self, memory: Tensor) -> None:
        """Make the parameters views of `memory` [nbytes or more], which is laid out as their home is."""
        for parameter, start in zip(self.parameters, self.starts, strict=True):
            part = memory[start : start + parameter.nbytes]
            parameter.data = part.view(parameter.dtype).view(parameter.shape)


def pieces(parameters: Sequence[nn.Parameter], device: torch.device) -> tuple[Piece, ...]:
    """Parameters in order, in as few pieces as `PIECE_BYTES` allows (a larger parameter has its own)."""
    groups: list[list[nn.Parameter]] = []
    size = PIECE_BYTES
    for parameter in parameters:
        size += parameter.nbytes + ALIGNMENT
        if size > PIECE_BYTES:
            groups.append([])
            size = parameter.nbytes + ALIGNMENT
        groups[-1].append(parameter)
    return tuple(Piece(group, device) for group in groups)


class Stream:
    """Modules that run one after the other, each with its parameters on the device only while it is at work.

    Two pieces of device memory take turns: while one module runs, as often as it is called, the parameters of
    the next are copied into the other piece, on a CUDA stream of their own. Modules may run downwards, too,
    as those do that are computed again for a backward pass. again: the first module follows the last, for
    the next step; otherwise the memory is given back after the last.
    """

    def __init__(self, units: Sequence[Unit], device: torch.device, *, again: bool) -> None:
        self.device, self.again = device, again
        self.homes = [Piece(parameters, device) for _, parameters in units]
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.slots: list[Tensor] = []
        """Both pieces of device memory; none while nothing runs."""
        self.here: int | None = None
        """The module whose parameters are on the device."""
        self.coming: int | None = None
        """The one whose parameters are being copied, into the other slot."""
        for i, (module, _) in enumerate(units):
            module.register_forward_pre_hook(lambda *_, i=i: self._arrive(i))
        if not again:
            units[-1][0].register_forward_hook(lambda *_: self.release())

    def release(self) -> None:
        """Bring all parameters home and give the device memory back."""
        self._leave()
        if self.copies is not None and self.slots:  # what takes the memory next waits for copies under way
            torch.cuda.current_stream(self.device).wait_stream(self.copies)
        self.slots, self.coming = [], None

    def _arrive(self, i: int) -> None:
        if i == self.here:
            return
        downwards = self.here == i + 1
        self._leave()
        if i != self.coming:
            self._fetch(i)
        if self.copies is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.copies)
        self.slots.reverse()  # the first is at work
        self.homes[i].show(self.slots[0])
        self.here, self.coming = i, None
        following = i - 1 if downwards and i > 0 else i + 1
        if following < len(self.homes) or self.again:
            self._fetch(following % len(self.homes))

    def _fetch(self, i: int) -> None:
        """Begin to copy into the second slot, whose last module's work has been queued."""
        if not self.slots:
            size = max(piece.nbytes for piece in self.homes)
            self.slots = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(2)]
        home = self.homes[i]
        if self.copies is None:
            self.slots[1][: home.nbytes].copy_(home.host)
        else:
            self.copies.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.copies):
                self.slots[1][: home.nbytes].copy_(home.host, non_blocking=True)
        self.coming = i

    def _leave(self) -> None:
        if self.here is not None:
            self.homes[self.here].show(self.homes[self.here].host)
        self.here = None


def _blocks(network: Network) -> list[Unit]:
    units = network.units()
    return _own(units, units.blocks)


def _own(units: Units, modules: Sequence[nn.Module]) -> list[Unit]:
    return [(module, units.own(module)) for module in modules]


def _bytes(network: nn.Module) -> int:
    return sum(p.nbytes for p in network.parameters())


def _terms(network: nn.Module) -> Iterator[LowRankTerm]:
    layers = (layer for layer in network.modules() if isinstance(layer, Linear))
    return (term for layer in layers for term in layer.terms)


def _size(units: Sequence[Unit]) -> int:
    return sum(p.nbytes for _, parameters in units for p in parameters)


def _largest(units: Sequence[Unit]) -> int:
    return max((sum(p.nbytes for p in parameters) for _, parameters in units), default=0)
