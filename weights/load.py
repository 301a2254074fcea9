"""Networks from checkpoints: built on the meta device, planned against the file, filled tensor by tensor.

Every loader proves exact cover before it reads a tensor, so a wrong file costs nothing. A component is never
held twice: each tensor goes from the mapped file to its device and dtype and becomes the parameter.
Layouts are recognised by tensor names, never by file names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from bokehflux.configs import BokehConfig, CLIPConfig, MMDiTConfig, T5Config, VAEConfig
from bokehflux.models.bokeh import BokehAdapter
from bokehflux.models.clip import CLIPTextEncoder
from bokehflux.models.mmdit import MMDiT
from bokehflux.models.t5 import T5Encoder
from bokehflux.models.vae import AutoencoderKL

from .checkpoint import Checkpoint, CheckpointError, open_checkpoint, read_json
from .mapping import Entry, Shape, plan, recognise
from .official import (
    Json,
    bokeh_config,
    clip_config,
    mmdit_config,
    mmdit_config_from_shapes,
    t5_config,
    vae_config,
    vae_config_from_shapes,
)
from .tables import bokeh, flux, text, vae

ADAPTER_PREFIX = "bokeh."
"""Where MMDiT keeps its adapter."""
Network = TypeVar("Network", bound=nn.Module)


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
    if config is None:
        found = config_beside(checkpoint)
        if found is not None:
            config = vae_config(found)
        elif table is vae.BFL:
            config = vae_config_from_shapes(checkpoint.shapes, checkpoint.path)
        else:
            raise _needs_config(checkpoint)
    with torch.device("meta"):
        network = AutoencoderKL(config)
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
        network = T5Encoder(config or t5_config(_required_config(checkpoint)))
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
        network = CLIPTextEncoder(config or clip_config(_required_config(checkpoint)))
    entries = plan(text.CLIP, _shapes(network), checkpoint.shapes, checkpoint.path)
    return _filled(network, _tensors(entries, checkpoint, device, dtype))


def read_mmdit_config(checkpoint: Checkpoint) -> MMDiTConfig:
    """The transformer's config: from the `config.json` beside it or, in the BFL layout, from its shapes."""
    found = config_beside(checkpoint)
    if found is not None:
        return mmdit_config(found)
    if recognise(flux.TABLES, checkpoint.tensors, checkpoint.path) is flux.BFL:
        return mmdit_config_from_shapes(checkpoint.shapes, checkpoint.path)
    raise _needs_config(checkpoint)


def read_bokeh_config(checkpoint: Checkpoint, mmdit: MMDiTConfig) -> BokehConfig:
    """The adapter's config, from its tensors and the `config.json` beside them."""
    return bokeh_config(config_beside(checkpoint), checkpoint.shapes, mmdit, checkpoint.path)


def config_beside(checkpoint: Checkpoint) -> Json | None:
    """The `config.json` in the checkpoint's folder."""
    path = checkpoint.path.parent / "config.json"
    return read_json(path) if path.is_file() else None


def _required_config(checkpoint: Checkpoint) -> Json:
    config = config_beside(checkpoint)
    if config is None:
        raise _needs_config(checkpoint)
    return config


def _needs_config(checkpoint: Checkpoint) -> CheckpointError:
    return CheckpointError(checkpoint.path, ["no config.json beside it: add the official one, or pass a config"])


def _shapes(network: nn.Module) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def _tensors(
    entries: Sequence[Entry], checkpoint: Checkpoint, device: torch.device | str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Every planned tensor on its device, in file order so that a cold disk is read in one sweep."""
    tensors: dict[str, Tensor] = {}
    for entry in sorted(entries, key=lambda e: checkpoint.tensors[e.src[0]][::-1][:2] + (e.dst,)):
        for name in entry.tied:
            if not torch.equal(checkpoint.read(name), checkpoint.read(entry.src[0])):
                problem = f"{name} and {entry.src[0]} must be the same tensor, but their values differ"
                raise CheckpointError(checkpoint.path, [problem])
        # A lone source is copied, so that no parameter aliases the mapped file; joining several copies anyway.
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
