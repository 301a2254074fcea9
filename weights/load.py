"""Networks from checkpoints: built on the meta device, planned against the file, filled tensor by tensor.

Every loader proves exact cover before it reads a tensor, so a wrong file costs nothing. A component is never
held twice: each tensor goes from the mapped file to its device and dtype and becomes the parameter.
Layouts are recognised by tensor names, never by file names.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from bokehflux.configs import CLIPConfig, Defaults, MMDiTConfig, ScheduleConfig, T5Config, VAEConfig
from bokehflux.models.adapter import BokehAdapter
from bokehflux.models.clip import CLIPTextEncoder
from bokehflux.models.fp8 import fp8_layers, fp8_weight
from bokehflux.models.linear import NARROW, Linear
from bokehflux.models.mmdit import MMDiT
from bokehflux.models.t5 import T5Encoder
from bokehflux.models.vae import AutoencoderKL
from bokehflux.text.encode import TextEncoders
from bokehflux.text.tokenizers import CLIPTokenizer, T5Tokenizer

from .adapter import open_adapter
from .bokeh_config import read_bokeh_config
from .checkpoint import CheckpointError
from .lora import read_lora
from .lora_apply import attach
from .mapping import Entry, Shape
from .official import read_clip_config, read_mmdit_config, read_t5_config, read_vae_config
from .parts import CLIP, T5, TRANSFORMER, VAE, Part, open_part, plan_part
from .precision import Stored, store
from .resolve import BUNDLED, Env, ModelFiles, resolve_adapter, resolve_lora, resolve_model
from .snapshot import Snapshot, open_snapshot

ADAPTER_PREFIX = "bokeh."
"""Where MMDiT keeps its adapter."""
LoraChoice = tuple[str | Path, float]
"""A LoRA file (or a folder with one) and its strength."""
OnProgress = Callable[[int, int], None]
"""Called with the bytes that are read and the bytes of the whole model, also before the first."""
OnRead = Callable[[int], None]
"""Called with the bytes of each parameter in its file, when it is on its device."""
Network = TypeVar("Network", bound=nn.Module)
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Components:
    """A whole model, loaded."""

    mmdit: MMDiT
    text: TextEncoders
    vae: AutoencoderKL
    schedule: ScheduleConfig
    defaults: Defaults


def load_components(
    model: str | Path | ModelFiles,
    adapter: str | Path | None = None,
    *,
    loras: Sequence[LoraChoice] = (),
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    fp8_on: torch.device | None = None,
    env: Env | None = None,
    on_progress: OnProgress | None = None,
) -> Components:
    """Every part of a model (a folder or file in any layout, a repository id, `ModelFiles`: `resolve.py`), or
    of a bundled one, by its name.

    `adapter`: folder, file or repository id; None takes the one that the model's card names, if any.
    `loras`: attached beside the weights of the transformer and the text encoders, where they add up.
    `fp8_on`: as in `load_mmdit`.
    `env`: stands in for the environment. Weights that are stored narrow stay so; `dtype` is computed in.
    `on_progress`: hears of every parameter of the networks and the adapter.
    Raises CheckpointError or TokenizerError before the transformer, the largest part, is read.
    """
    snapshot = find_model(model, env)
    lora_paths = [(resolve_lora(path, env), strength) for path, strength in loras]
    chosen = snapshot.adapter if adapter is None else resolve_adapter(adapter, env)
    clip_tokenizer = CLIPTokenizer.from_folder(snapshot.clip_tokenizer)
    t5_tokenizer = T5Tokenizer.from_folder(snapshot.t5_tokenizer)
    on_read = None if on_progress is None else _counter(on_progress, _num_bytes(snapshot, chosen))
    autoencoder = load_vae(snapshot.vae, device=device, dtype=dtype, on_read=on_read)
    clip = load_clip(snapshot.clip, device=device, dtype=dtype, on_read=on_read)
    t5 = load_t5(snapshot.t5, device=device, dtype=dtype, on_read=on_read)
    facts = (
        (
            "the autoencoder's packed latents have",
            4 * autoencoder.config.latent_channels,
            snapshot.mmdit.in_channels,
        ),
        ("T5 states have", t5.config.width, snapshot.mmdit.txt_dim),
        ("CLIP vectors have", clip.config.width, snapshot.mmdit.pooled_dim),
    )
    problems = [
        f"{what} {ours} channels, the transformer expects {its}" for what, ours, its in facts if ours != its
    ]
    if problems:
        raise CheckpointError(f"{snapshot.root}: components of different models", *problems)
    text_encoders = TextEncoders(
        t5=t5,
        clip=clip,
        t5_tokenizer=t5_tokenizer,
        clip_tokenizer=clip_tokenizer,
        txt_length=snapshot.defaults.txt_length,
    )
    added = [
        (read_lora(path, snapshot.mmdit, clip.config, t5.config), strength) for path, strength in lora_paths
    ]
    mmdit = load_mmdit(
        snapshot.transformer,
        snapshot.mmdit,
        chosen,
        device=device,
        dtype=dtype,
        fp8_on=fp8_on,
        on_read=on_read,
    )
    for lora, strength in added:
        attach({"mmdit": mmdit, "clip": clip, "t5": t5}, lora, strength)
    return Components(
        mmdit=mmdit,
        text=text_encoders,
        vae=autoencoder,
        schedule=snapshot.schedule,
        defaults=snapshot.defaults,
    )


def _num_bytes(snapshot: Snapshot, adapter: Path | None) -> int:
    """Of all that `on_read` will be told, by the headers alone."""
    places = (
        (snapshot.vae, VAE), (snapshot.clip, CLIP), (snapshot.t5, T5), (snapshot.transformer, TRANSFORMER),
    )  # fmt: skip
    parts = [open_part(path, kind) for path, kind in places]
    parts += [] if adapter is None else [open_adapter(adapter)]
    return sum(
        info.num_bytes
        for part in parts
        for name, info in part.checkpoint.tensors.items()
        if name not in part.table.ignored
    )


def _counter(on_progress: OnProgress, total: int) -> OnRead:
    done = 0

    def on_read(count: int) -> None:
        nonlocal done
        done += count
        on_progress(done, total)

    on_read(0)
    return on_read


def find_model(model: str | Path | ModelFiles, env: Env | None = None) -> Snapshot:
    """Where the parts of a model lie; a bundled model by its name, others as in `resolve_model`."""
    if isinstance(model, ModelFiles) and model.transformer in BUNDLED:
        model = dataclasses.replace(model, transformer=Path(__file__).parent / model.transformer)
    if isinstance(model, str) and model in BUNDLED:
        return open_snapshot(Path(__file__).parent / model)
    return resolve_model(model, env)


def load_mmdit(
    path: str | Path,
    config: MMDiTConfig | None = None,
    adapter: str | Path | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    fp8_on: torch.device | None = None,
    on_read: OnRead | None = None,
) -> MMDiT:
    """The transformer, with the bokeh adapter of the folder or file `adapter` built in when it is given.

    `path`: a diffusers folder, a BFL single file, or any checkpoint file in either layout. Without `config`,
    the `config.json` beside the file is used, or, for a BFL file, what its shapes tell.
    `fp8_on`: the blocks' projections shall multiply in fp8 (`models/fp8.py`); each is quantised on this
    device when it is read, so that no memory ever holds them all wider. None: kept as they are.
    Returns it in eval mode without gradients. Raises CheckpointError with everything that does not fit,
    ValueError for sizes that fp8 cannot multiply.
    """
    base = open_part(path, TRANSFORMER)
    config = config or read_mmdit_config(base)
    extra = open_adapter(adapter) if adapter is not None else None
    adapter_config = read_bokeh_config(extra, config) if extra is not None else None
    with torch.device("meta"):
        network = MMDiT(config, adapter_config)
    shapes = _shapes(network)
    base_shapes = {name: shape for name, shape in shapes.items() if not name.startswith(ADAPTER_PREFIX)}
    base_plan = plan_part(base, base_shapes)
    fp8 = {} if fp8_on is None else {f"{name}.weight": fp8_on for name in fp8_layers(network)}
    if extra is None or network.bokeh is None:
        return _filled(network, _stored(network, base_plan, base, device, dtype, on_read, fp8))
    adapter_plan = plan_part(extra, _shapes(network.bokeh))
    stored = _stored(network, base_plan, base, device, dtype, on_read, fp8)
    for name, tensor in _stored(network.bokeh, adapter_plan, extra, device, dtype, on_read).items():
        stored[ADAPTER_PREFIX + name] = tensor
    return _filled(network, stored)


def load_adapter(
    path: str | Path,
    mmdit: MMDiTConfig,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> BokehAdapter:
    """The adapter alone, for a transformer of config `mmdit`; its `config` holds what was read."""
    part = open_adapter(path)
    with torch.device("meta"):
        network = BokehAdapter(read_bokeh_config(part, mmdit), mmdit)
    return _load(network, part, device, dtype)


def load_vae(
    path: str | Path,
    config: VAEConfig | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    on_read: OnRead | None = None,
) -> AutoencoderKL:
    """The autoencoder from a diffusers folder or a BFL `ae.safetensors`. As `load_mmdit`."""
    part = open_part(path, VAE)
    with torch.device("meta"):
        network = AutoencoderKL(config or read_vae_config(part))
    return _load(network, part, device, dtype, on_read)


def load_t5(
    path: str | Path,
    config: T5Config | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    on_read: OnRead | None = None,
) -> T5Encoder:
    """The T5 encoder from a transformers folder (`text_encoder_2/`), or from a file and its config."""
    part = open_part(path, T5)
    with torch.device("meta"):
        network = T5Encoder(config or read_t5_config(part))
    return _load(network, part, device, dtype, on_read)


def load_clip(
    path: str | Path,
    config: CLIPConfig | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    on_read: OnRead | None = None,
) -> CLIPTextEncoder:
    """The CLIP text encoder from a transformers folder (`text_encoder/`), or from a file and its config."""
    part = open_part(path, CLIP)
    with torch.device("meta"):
        network = CLIPTextEncoder(config or read_clip_config(part))
    return _load(network, part, device, dtype, on_read)


def _shapes(network: nn.Module) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def _load(
    network: Network,
    part: Part,
    device: torch.device | str,
    dtype: torch.dtype,
    on_read: OnRead | None = None,
) -> Network:
    return _filled(network, _stored(network, plan_part(part, _shapes(network)), part, device, dtype, on_read))


def _stored(
    network: nn.Module,
    entries: Sequence[Entry],
    part: Part,
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


def _filled(network: Network, stored: Mapping[str, Stored]) -> Network:
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
