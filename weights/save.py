"""Networks written in the official layouts, file by file whole or not at all: what the trainer exports.

The tensors may come from a network's `state_dict()` or from an average of several; they are checked against
the config first, so that an incomplete export is never written.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from bokehflux.configs import (
    BokehConfig,
    CLIPConfig,
    Defaults,
    MMDiTConfig,
    ScheduleConfig,
    T5Config,
    VAEConfig,
)
from bokehflux.models.adapter import BokehAdapter
from bokehflux.models.clip import CLIPTextEncoder
from bokehflux.models.mmdit import MMDiT
from bokehflux.models.t5 import T5Encoder
from bokehflux.models.vae import AutoencoderKL

from .bokeh_config import bokeh_config_dict
from .load import ADAPTER_PREFIX
from .mapping import Table, plan, to_official
from .official import (
    Json,
    clip_config_dict,
    mmdit_config_dict,
    schedule_config_dict,
    t5_config_dict,
    vae_config_dict,
)
from .snapshot import CARD
from .tables import bokeh, flux, text, vae
from .write import save_sharded, write_json

SHARD_BYTES = 5 * 10**9
_DIFFUSERS, _TRANSFORMERS = "diffusion_pytorch_model", "model"


def split_adapter(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """An MMDiT state dict as (transformer, adapter), the latter under the published names."""
    base = {name: t for name, t in tensors.items() if not name.startswith(ADAPTER_PREFIX)}
    adapter = {name[len(ADAPTER_PREFIX) :]: t for name, t in tensors.items() if name not in base}
    return base, adapter


def save_mmdit(
    folder: str | Path, config: MMDiTConfig, tensors: Mapping[str, Tensor], max_shard_bytes: int = SHARD_BYTES
) -> None:
    """The transformer, without its adapter (`split_adapter`), as a diffusers `transformer/` folder."""
    build = functools.partial(MMDiT, config)
    _save(folder, flux.DIFFUSERS, build, tensors, mmdit_config_dict(config), _DIFFUSERS, max_shard_bytes)


def save_vae(folder: str | Path, config: VAEConfig, tensors: Mapping[str, Tensor]) -> None:
    """The autoencoder as a diffusers `vae/` folder."""
    _save(folder, vae.DIFFUSERS, lambda: AutoencoderKL(config), tensors, vae_config_dict(config), _DIFFUSERS)


def save_t5(folder: str | Path, config: T5Config, tensors: Mapping[str, Tensor]) -> None:
    """The T5 encoder as a transformers `text_encoder_2/` folder."""
    _save(folder, text.T5, lambda: T5Encoder(config), tensors, t5_config_dict(config), _TRANSFORMERS)


def save_clip(folder: str | Path, config: CLIPConfig, tensors: Mapping[str, Tensor]) -> None:
    """The CLIP text encoder as a transformers `text_encoder/` folder."""
    _save(
        folder, text.CLIP, lambda: CLIPTextEncoder(config), tensors, clip_config_dict(config), _TRANSFORMERS
    )


def save_adapter(
    folder: str | Path, config: BokehConfig, mmdit: MMDiTConfig, tensors: Mapping[str, Tensor]
) -> None:
    """The adapter in the published layout: `config.json` and `model.safetensors`."""
    json = bokeh_config_dict(config, mmdit)
    _save(folder, bokeh.ADAPTER, lambda: BokehAdapter(config, mmdit), tensors, json, _TRANSFORMERS)


def save_schedule(folder: str | Path, config: ScheduleConfig) -> None:
    """`scheduler/scheduler_config.json`."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_json(Path(folder) / "scheduler_config.json", schedule_config_dict(config))


def save_index(root: str | Path, defaults: Defaults, adapter: str | None = None) -> None:
    """`model_index.json`, by which diffusers finds the components, and our card."""
    Path(root).mkdir(parents=True, exist_ok=True)
    components = {
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    write_json(Path(root) / "model_index.json", {"_class_name": "FluxPipeline", **components})
    settings = {
        "num_inference_steps": defaults.num_inference_steps,
        "height": defaults.height_px,
        "width": defaults.width_px,
        "txt_length": defaults.txt_length,
    }
    write_json(Path(root) / CARD, settings if adapter is None else {**settings, "adapter": adapter})


def _save(
    folder: str | Path,
    table: Table,
    build: Callable[[], nn.Module],
    tensors: Mapping[str, Tensor],
    config: Json,
    stem: str,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    with torch.device("meta"):
        expected = {name: tuple(t.shape) for name, t in build().state_dict().items()}
    official = to_official(table, tensors)
    plan(table, expected, {name: tuple(t.shape) for name, t in official.items()}, f"export to {folder}")
    save_sharded(folder, official, stem, max_shard_bytes)
    write_json(Path(folder) / "config.json", config)
