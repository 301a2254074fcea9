"""Networks from checkpoints: built on the meta device, planned against the file, filled tensor by tensor.

Every loader proves exact cover before it reads a tensor, so a wrong file costs nothing. A component is never
held twice: each tensor goes from the mapped file to its device and dtype and becomes the parameter.
Layouts are recognised by tensor names, never by file names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from bokehflux.configs import CLIPConfig, Defaults, MMDiTConfig, ScheduleConfig, T5Config, VAEConfig
from bokehflux.models.bokeh import BokehAdapter
from bokehflux.models.clip import CLIPTextEncoder
from bokehflux.models.mmdit import MMDiT
from bokehflux.models.t5 import T5Encoder
from bokehflux.models.vae import AutoencoderKL
from bokehflux.text.encode import TextEncoders
from bokehflux.text.tokenizers import CLIPTokenizer, T5Tokenizer

from .bokeh_config import read_bokeh_config
from .checkpoint import Checkpoint, CheckpointError, open_checkpoint
from .lora import read_lora
from .lora_apply import attach
from .mapping import Entry, Shape, plan, recognise
from .official import read_clip_config, read_mmdit_config, read_t5_config, read_vae_config
from .snapshot import open_snapshot
from .tables import bokeh, flux, text, vae

BUNDLED = ("nano",)
"""Models that come with the package, as folders beside this file."""
ADAPTER_PREFIX = "bokeh."
"""Where MMDiT keeps its adapter."""
LoraChoice = tuple[str | Path, float]
"""A LoRA file (or a folder with one) and its strength."""
Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class Components:
    """A whole model, loaded."""

    mmdit: MMDiT
    text: TextEncoders
    vae: AutoencoderKL
    schedule: ScheduleConfig
    defaults: Defaults


def load_components(
    model: str | Path,
    adapter: str | Path | None = None,
    *,
    loras: Sequence[LoraChoice] = (),
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> Components:
    """Every part of a model folder (`snapshot.py` says of which layouts) or of a bundled model, by its name.

    `adapter`: folder or file; None takes the one that the model's card names, if any.
    `loras`: attached beside the weights of the transformer and the text encoders, where they add up.
    Raises CheckpointError or TokenizerError before the transformer, the largest part, is read.
    """
    snapshot = open_snapshot(Path(__file__).parent / model if model in BUNDLED else model)
    clip_tokenizer = CLIPTokenizer.from_folder(snapshot.clip_tokenizer)
    t5_tokenizer = T5Tokenizer.from_folder(snapshot.t5_tokenizer)
    autoencoder = load_vae(snapshot.vae, device=device, dtype=dtype)
    clip = load_clip(snapshot.clip, device=device, dtype=dtype)
    t5 = load_t5(snapshot.t5, device=device, dtype=dtype)
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
    added = [(read_lora(path, snapshot.mmdit, clip.config, t5.config), strength) for path, strength in loras]
    chosen = snapshot.adapter if adapter is None else adapter
    mmdit = load_mmdit(snapshot.transformer, snapshot.mmdit, chosen, device=device, dtype=dtype)
    for lora, strength in added:
        attach({"mmdit": mmdit, "clip": clip, "t5": t5}, lora, strength)
    return Components(
        mmdit=mmdit,
        text=text_encoders,
        vae=autoencoder,
        schedule=snapshot.schedule,
        defaults=snapshot.defaults,
    )


def load_mmdit(
    path: str | Path,
    config: MMDiTConfig | None = None,
    adapter: str | Path | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> MMDiT:
    """The transformer, with the bokeh adapter of the folder or file `adapter` built in when it is given.

    `path`: a diffusers folder, a BFL single file, or any checkpoint file in either layout. Without `config`,
    the `config.json` beside the file is used, or, for a BFL file, what its shapes tell.
    Returns it in eval mode without gradients. Raises CheckpointError with everything that does not fit.
    """
    base = open_checkpoint(path)
    table = recognise(flux.TABLES, base.tensors, base.path)
    config = config or read_mmdit_config(base)
    extra = open_checkpoint(adapter) if adapter is not None else None
    adapter_config = read_bokeh_config(extra, config) if extra is not None else None
    with torch.device("meta"):
        network = MMDiT(config, adapter_config)
    shapes = _shapes(network)
    base_shapes = {name: shape for name, shape in shapes.items() if not name.startswith(ADAPTER_PREFIX)}
    base_plan = plan(table, base_shapes, base.shapes, base.path)
    if extra is None or network.bokeh is None:
        return _filled(network, _tensors(base_plan, base, device, dtype))
    adapter_plan = plan(bokeh.ADAPTER, _shapes(network.bokeh), extra.shapes, extra.path)
    tensors = _tensors(base_plan, base, device, dtype)
    for name, tensor in _tensors(adapter_plan, extra, device, dtype).items():
        tensors[ADAPTER_PREFIX + name] = tensor
    return _filled(network, tensors)


def load_adapter(
    path: str | Path,
    mmdit: MMDiTConfig,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> BokehAdapter:
    """The adapter alone, for a transformer of config `mmdit`; its `config` holds what was read."""
    checkpoint = open_checkpoint(path)
    with torch.device("meta"):
        network = BokehAdapter(read_bokeh_config(checkpoint, mmdit), mmdit)
    entries = plan(bokeh.ADAPTER, _shapes(network), checkpoint.shapes, checkpoint.path)
    return _filled(network, _tensors(entries, checkpoint, device, dtype))


def load_vae(
    path: str | Path,
    config: VAEConfig | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> AutoencoderKL:
    """The autoencoder from a diffusers folder or a BFL `ae.safetensors`. As `load_mmdit`."""
    checkpoint = open_checkpoint(path)
    table = recognise(vae.TABLES, checkpoint.tensors, checkpoint.path)
    with torch.device("meta"):
        network = AutoencoderKL(config or read_vae_config(checkpoint))
    entries = plan(table, _shapes(network), checkpoint.shapes, checkpoint.path)
    return _filled(network, _tensors(entries, checkpoint, device, dtype))


def load_t5(
    path: str | Path,
    config: T5Config | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> T5Encoder:
    """The T5 encoder from a transformers folder (`text_encoder_2/`), or from a file and its config."""
    checkpoint = open_checkpoint(path)
    with torch.device("meta"):
        network = T5Encoder(config or read_t5_config(checkpoint))
    entries = plan(text.T5, _shapes(network), checkpoint.shapes, checkpoint.path)
    return _filled(network, _tensors(entries, checkpoint, device, dtype))


def load_clip(
    path: str | Path,
    config: CLIPConfig | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> CLIPTextEncoder:
    """The CLIP text encoder from a transformers folder (`text_encoder/`), or from a file and its config."""
    checkpoint = open_checkpoint(path)
    with torch.device("meta"):
        network = CLIPTextEncoder(config or read_clip_config(checkpoint))
    entries = plan(text.CLIP, _shapes(network), checkpoint.shapes, checkpoint.path)
    return _filled(network, _tensors(entries, checkpoint, device, dtype))


def _shapes(network: nn.Module) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def _tensors(
    entries: Sequence[Entry], checkpoint: Checkpoint, device: torch.device | str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Every planned tensor on its device, in file order so that a cold disk is read in one sweep."""
    tensors: dict[str, Tensor] = {}
    for entry in sorted(entries, key=lambda entry: checkpoint.position(entry.src[0])):
        for name in entry.tied:
            if not torch.equal(checkpoint.read(name), checkpoint.read(entry.src[0])):
                problem = f"{name} and {entry.src[0]} must be the same tensor, but their values differ"
                raise CheckpointError(checkpoint.path, problem)
        # A lone source is copied, so that no parameter aliases the mapped file; joining copies anyway.
        lone = len(entry.src) == 1
        sources = [checkpoint.read(name).to(device, dtype, copy=lone) for name in entry.src]
        tensors[entry.dst] = entry.transform.join(sources)
    return tensors


def _filled(network: Network, tensors: Mapping[str, Tensor]) -> Network:
    network.load_state_dict(tensors, strict=True, assign=True)
    hollow = [n for n, t in (*network.named_parameters(), *network.named_buffers()) if t.is_meta]
    if hollow:
        raise AssertionError(f"{type(network).__name__} kept {hollow[:3]} on the meta device")
    return network.eval().requires_grad_(False)
