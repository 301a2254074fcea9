"""Networks from checkpoints: built on the meta device, planned against the file, filled tensor by tensor.

Every network proves exact cover before a tensor of it is read, so a wrong file costs nothing. A component is
never held twice: each tensor goes from the mapped file to its device and dtype and becomes the parameter.
Layouts are recognised by tensor names, never by file names.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from bokehflux.configs import MMDiTConfig
from bokehflux.models.adapter import BokehAdapter
from bokehflux.models.clip import CLIPTextEncoder
from bokehflux.models.controls import ControlAdapter
from bokehflux.models.fp8 import fp8_layers, fp8_weight
from bokehflux.models.linear import NARROW, Linear
from bokehflux.models.mmdit import MMDiT
from bokehflux.models.reference import ReferenceAdapter
from bokehflux.models.t5 import T5Encoder
from bokehflux.models.tiny_decoder import TinyDecoder
from bokehflux.models.vae import AutoencoderKL
from bokehflux.text.encode import TextEncoders

from .files.checkpoint import CheckpointError
from .find.resolve import Env, ModelFiles, resolve_model
from .find.snapshot import ScheduleName, Snapshot
from .lora.apply import attach
from .lora.read import read_lora
from .mapping import Entry, Shape
from .networks import (
    ADAPTER,
    ADAPTER_PREFIX,
    CLIP,
    CONTROLS,
    NETWORKS,
    REFERENCE,
    T5,
    TINY_DECODER,
    TRANSFORMER,
    VAE,
    C,
    N,
    Network,
    adapter_for,
)
from .parts import Part, open_part
from .precision import Stored, store

LoraChoice = tuple[str | Path, float]
"""A LoRA file (or a folder with one) and its strength."""
OnProgress = Callable[[int, int], None]
"""Called with (bytes read so far, total bytes), the first time with 0."""
OnRead = Callable[[int], None]
"""Called with the bytes of each parameter in its file, when it is on its device."""
log = logging.getLogger(__name__)
MAX_CAREFUL_BYTES = 10**9
"""In float32 T5-XXL would take 19 GB, twice what its files hold."""


@dataclass(frozen=True, kw_only=True)
class Components:
    """A whole model, loaded."""

    networks: Mapping[str, nn.Module]
    """By their names in the registry."""
    tokenizers: Mapping[str, Any]
    """Those of the text encoders, by the encoders' names."""
    snapshot: Snapshot
    """Where it came from, with schedule and defaults."""

    @property
    def transformer(self) -> MMDiT:
        return cast(MMDiT, self.networks[TRANSFORMER.name])

    @property
    def vae(self) -> AutoencoderKL:
        return cast(AutoencoderKL, self.networks[VAE.name])

    @property
    def reference(self) -> ReferenceAdapter | None:
        return cast("ReferenceAdapter | None", self.networks.get(REFERENCE))

    @property
    def controls(self) -> ControlAdapter | None:
        return cast("ControlAdapter | None", self.networks.get(CONTROLS))

    @property
    def text(self) -> TextEncoders:
        return TextEncoders(
            t5=cast(T5Encoder, self.networks[T5.name]),
            clip=cast(CLIPTextEncoder, self.networks[CLIP.name]),
            t5_tokenizer=self.tokenizers[T5.name],
            clip_tokenizer=self.tokenizers[CLIP.name],
            txt_length=self.snapshot.defaults.txt_length,
        )


def load_components(
    model: str | Path | ModelFiles,
    adapter: str | Path | None = None,
    *,
    loras: Sequence[LoraChoice] = (),
    schedule: ScheduleName | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    text_dtype: torch.dtype | None = None,
    fp8_on: torch.device | None = None,
    env: Env | None = None,
    on_found: Callable[[Snapshot], None] | None = None,
    on_progress: OnProgress | None = None,
) -> Components:
    """Every part of a model (`find/resolve.py` says what names one).

    `adapter`: folder, file or repository id; None takes the one that the model's card names, if any.
    `loras`: attached beside the weights of the transformer and the text encoders, where they add up.
    `schedule`: as in `resolve_model`.
    `text_dtype`: what text encoders of up to `MAX_CAREFUL_BYTES` compute in; None: `dtype`.
    `fp8_on`: as in `load_transformer`.
    `env`: stands in for the environment. Weights that are stored narrow stay so; `dtype` is computed in.
    `on_found`: called when every part is found, before a weight is read.
    `on_progress`: hears of every parameter of the networks and the adapters.
    Raises CheckpointError or TokenizerError before the transformer, the largest part, is read.
    """
    snapshot = resolve_model(model, env, adapter=adapter, loras=loras, schedule=schedule)
    if on_found is not None:
        on_found(snapshot)
    parts = snapshot.parts
    tokenizers = {
        network.name: network.tokenizer.read(snapshot.paths[network.tokenizer.name])
        for network in NETWORKS
        if network.tokenizer is not None
    }
    total = sum(part.num_bytes for part in parts.values())
    on_read = None if on_progress is None else _counter(on_progress, total)
    configs = {network.name: parts[network.name].config() for network in NETWORKS}
    networks: dict[str, nn.Module] = {}
    try:
        for network in NETWORKS[1:]:
            part, config = parts[network.name], configs[network.name]
            kind = dtype
            if text_dtype is not None and network.tokenizer and part.num_bytes <= MAX_CAREFUL_BYTES:
                kind = text_dtype
            networks[network.name] = load_network(
                network, part, config, device=device, dtype=kind, on_read=on_read
            )
        for name in (REFERENCE, CONTROLS):
            if name in parts:
                part = parts[name]
                networks[name] = load_network(part.network, part, device=device, dtype=dtype, on_read=on_read)
        added = [(read_lora(path, configs), strength) for path, strength in snapshot.loras]
        networks[TRANSFORMER.name] = load_transformer(
            parts[TRANSFORMER.name],
            snapshot.config,
            parts.get(ADAPTER),
            device=device,
            dtype=dtype,
            fp8_on=fp8_on,
            on_read=on_read,
        )
    finally:
        snapshot.close()
    for lora, strength in added:
        attach(networks, lora, strength)
    return Components(networks=networks, tokenizers=tokenizers, snapshot=snapshot)


def _counter(on_progress: OnProgress, total: int) -> OnRead:
    done = 0

    def on_read(count: int) -> None:
        nonlocal done
        done += count
        on_progress(done, total)

    on_read(0)
    return on_read


def load_network(
    network: Network[C, N],
    source: str | Path | Part[C, N],
    config: C | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    on_read: OnRead | None = None,
) -> N:
    """One network of the registry from a folder, file or index in any of its layouts, or from an opened part.

    Without `config`, the `config.json` beside the file is used, or, for a bare file, what its shapes tell.
    Returns it in eval mode without gradients. Raises CheckpointError with everything that does not fit.
    """
    part = source if isinstance(source, Part) else open_part(source, network)
    with torch.device("meta"):
        made = network.build(part.config() if config is None else config)
    return _filled(made, _stored(made, part.plan(_shapes(made)), part, device, dtype, on_read))


def load_transformer(
    source: str | Path | Part[MMDiTConfig, MMDiT],
    config: MMDiTConfig | None = None,
    adapter: str | Path | Part[Any, BokehAdapter] | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    fp8_on: torch.device | None = None,
    on_read: OnRead | None = None,
) -> MMDiT:
    """As `load_network`, with the bokeh adapter built in when one is given.

    `fp8_on`: the blocks' projections will multiply in fp8 (`models/fp8.py`); each is quantised on this device
    when it is read, so that no memory ever holds them all wider. None: kept as they are.
    Raises ValueError, too, for sizes that fp8 cannot multiply.
    """
    base = source if isinstance(source, Part) else open_part(source, TRANSFORMER)
    config = config or base.config()
    extra = (
        adapter if isinstance(adapter, Part) or adapter is None else open_part(adapter, adapter_for(config))
    )
    with torch.device("meta"):
        network = MMDiT(config, None if extra is None else extra.config())
    shapes = _shapes(network)
    plan = base.plan({name: shape for name, shape in shapes.items() if not name.startswith(ADAPTER_PREFIX)})
    fp8 = {} if fp8_on is None else {f"{name}.weight": fp8_on for name in fp8_layers(network)}
    if extra is None or network.bokeh is None:
        return _filled(network, _stored(network, plan, base, device, dtype, on_read, fp8))
    extra_plan = extra.plan(_shapes(network.bokeh))
    stored = _stored(network, plan, base, device, dtype, on_read, fp8)
    for name, tensor in _stored(network.bokeh, extra_plan, extra, device, dtype, on_read).items():
        stored[ADAPTER_PREFIX + name] = tensor
    return _filled(network, stored)


def load_tiny_decoder(
    path: str | Path,
    latent_channels: int = 16,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> TinyDecoder:
    """TAEF1's decoder, as `load_network`; refused when it is another model's, with other latent channels."""
    return load_network(TINY_DECODER, path, latent_channels, device=device, dtype=dtype)


def _shapes(network: nn.Module) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def _stored(
    network: nn.Module,
    entries: Sequence[Entry],
    part: Part[Any, Any],
    device: torch.device | str,
    dtype: torch.dtype,
    on_read: OnRead | None,
    fp8: Mapping[str, torch.device] = {},
) -> dict[str, Stored]:
    """Every planned tensor on its device, in file order so that a cold disk is read in one sweep.

    fp8: weights that become fp8, and where that is computed.
    """
    where, checkpoint = torch.device(device), part.checkpoint
    # Metal has no fp8, and its bytes need not be kept for its sake alone.
    linear = {f"{n}.weight" for n, m in network.named_modules() if isinstance(m, Linear)}
    narrow = linear if where.type != "mps" else set()
    if where.type == "mps" and any(info.dtype in NARROW for info in checkpoint.tensors.values()):
        log.warning("%s: MPS has no fp8, weights become %s and need more memory", checkpoint.path, dtype)
    stored: dict[str, Stored] = {}
    for entry in sorted(entries, key=lambda entry: checkpoint.position(entry.src[0])):
        for name in entry.tied:
            if not _equal(checkpoint.read(name), checkpoint.read(entry.src[0])):
                problem = f"{name} and {entry.src[0]} must be the same tensor, but their values differ"
                raise CheckpointError(checkpoint.path, problem)
        found = store(entry, checkpoint, part.scales, where, dtype, keep=entry.dst in narrow)
        if entry.dst in fp8:
            values, scale = fp8_weight(found.tensor.to(fp8[entry.dst]), found.dequantize)
            found = Stored(values.to(where), scale=scale.to(where))
        stored[entry.dst] = found
        if on_read is not None:
            on_read(sum(checkpoint.tensors[name].num_bytes for name in (*entry.src, *entry.tied)))
    return stored


def _equal(a: Tensor, b: Tensor) -> bool:
    """Bit by bit: fp8 has no comparison of its own."""
    same = a.dtype == b.dtype and a.shape == b.shape
    return same and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _filled(network: N, stored: Mapping[str, Stored]) -> N:
    tensors = {name: tensor for name, (tensor, _, _) in stored.items()}
    for name, (tensor, dequantize, scale) in stored.items():
        if dequantize is None and scale is None:
            continue
        layer = network.get_submodule(name.removesuffix(".weight"))
        assert isinstance(layer, Linear)
        if scale is not None:
            layer.set_fp8(tensor, scale)
            tensors[name.removesuffix("weight") + "scale"] = scale
            continue
        layer.dequantize = dequantize
        # Packed weights have the shape of their bytes.
        layer.weight = nn.Parameter(tensor, requires_grad=False)
    network.load_state_dict(tensors, strict=True, assign=True)
    hollow = [n for n, t in (*network.named_parameters(), *network.named_buffers()) if t.is_meta]
    if hollow:
        raise AssertionError(f"{type(network).__name__} kept {hollow[:3]} on the meta device")
    return network.eval().requires_grad_(False)
