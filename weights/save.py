"""Networks written in the official layouts, file by file whole or not at all: what a trainer exports.

The tensors may come from a network's `state_dict()` or from an average of several; they are checked against
the config first, so that an incomplete export is never written.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from bokehflux.configs import Defaults, ScheduleConfig

from .files.write import save_sharded, write_json
from .find.layouts import TOKENIZERS
from .find.snapshot import CARD, card
from .mapping import Table, plan, to_official
from .networks import ADAPTER_PREFIX, NETWORKS, C, N, Network
from .tables import scheduler

SHARD_BYTES = 5 * 10**9
_STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
"""How each library calls the weights in a folder."""


def split_adapter(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """An MMDiT state dict as (transformer, adapter), the latter under the published names."""
    base = {name: t for name, t in tensors.items() if not name.startswith(ADAPTER_PREFIX)}
    adapter = {name[len(ADAPTER_PREFIX) :]: t for name, t in tensors.items() if name not in base}
    return base, adapter


def save_network(
    network: Network[C, N],
    folder: str | Path,
    config: C,
    tensors: Mapping[str, Tensor],
    max_shard_bytes: int = SHARD_BYTES,
    table: Table | None = None,
) -> None:
    """A network as the official libraries keep it: `config.json` and weights, in shards where they are large.

    A transformer is saved without its adapter (`split_adapter`), whose row is `adapter_for(config)`. table:
    one of the network's layouts; None is the first.
    Raises CheckpointError unless the tensors are exactly those of the config.
    """
    with torch.device("meta"):
        expected = {name: tuple(t.shape) for name, t in network.build(config).state_dict().items()}
    table, stated = table or network.tables[0], network.codec.to_json(config)
    official = to_official(table, tensors)
    plan(table, expected, {name: tuple(t.shape) for name, t in official.items()}, f"export to {folder}")
    save_sharded(folder, official, _STEMS[network.official[0]], max_shard_bytes)
    write_json(Path(folder) / "config.json", stated)


def save_schedule(folder: str | Path, config: ScheduleConfig) -> None:
    """`scheduler_config.json` in a folder."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_json(Path(folder) / scheduler.FILE, scheduler.CONFIG.to_json(config))


def save_index(root: str | Path, defaults: Defaults, *adapters: str) -> None:
    """`model_index.json`, by which diffusers finds the components, and our card.

    adapters: "adapter", "reference", "controls": those of which the model has folders.
    """
    Path(root).mkdir(parents=True, exist_ok=True)
    components = {"scheduler": ("diffusers", scheduler.CONFIG.fixed["_class_name"])}
    components |= {row.folder: row.official for row in NETWORKS}
    components |= {row.folder: row.official for row in TOKENIZERS}
    write_json(Path(root) / "model_index.json", {"_class_name": "FluxPipeline", **components})
    settings = card(guidance_embed=True).to_json(defaults)
    write_json(Path(root) / CARD, settings | {name: name for name in adapters})
