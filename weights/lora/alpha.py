"""The scale of each layer of a LoRA: alpha from tensors, metadata or the settings file of PEFT."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from ..files.checkpoint import Checkpoint, CheckpointError, read_json
from ..networks import NETWORKS, TRANSFORMER

PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Alphas:
    """The alphas that a file declares beside its tensors."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._kohya = checkpoint.metadata.get("ss_network_alpha", "None")
        self._peft = _peft_settings(checkpoint)
        for settings in self._peft.values():
            if settings.get("use_dora"):
                raise CheckpointError(
                    checkpoint.path, "its settings declare DoRA; only plain LoRA can be used"
                )
        self._patterns = {name: self._pattern(s.get("alpha_pattern") or {}) for name, s in self._peft.items()}

    def scale(self, stem: str, network: str, tensor: str | None, rank: int) -> float:
        """Alpha / rank of a layer. stem: its name in the file; tensor: name of its own alpha, if any."""
        if tensor is not None:
            value = self._checkpoint.read(tensor).flatten()[0].item()
            return self._number(value, tensor) / rank
        settings = self._peft.get(network)
        if settings is None:
            return 1.0 if self._kohya == "None" else self._number(self._kohya, "ss_network_alpha") / rank
        named = [a for name, a in self._patterns[network].items() if f".{stem}".endswith(f".{name}")]
        alpha = named[0] if named else self._number(settings.get("lora_alpha", rank), "lora_alpha")
        return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)

    def check_patterns(self, stems: Mapping[str, object]) -> None:
        """Raise CheckpointError for an alpha that is declared for no layer of the file."""
        lost = [
            name
            for patterns in self._patterns.values()
            for name in patterns
            if not any(f".{stem}".endswith(f".{name}") for stem in stems)
        ]
        if lost:
            raise CheckpointError(
                self._checkpoint.path, f"alpha_pattern names layers that the file does not have: {lost}"
            )

    def _pattern(self, value: Any) -> dict[str, float]:
        if not isinstance(value, dict):
            raise CheckpointError(self._checkpoint.path, f"alpha_pattern is not a JSON object: {value!r:.80}")
        return {name: self._number(alpha, f"alpha of {name}") for name, alpha in value.items()}

    def _number(self, value: Any, what: str) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise CheckpointError(
                self._checkpoint.path, f"{what} is {value!r:.80}, a finite number was expected"
            )
        return number


def _peft_settings(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Network -> its PEFT settings, from diffusers' metadata or PEFT's file beside the weights."""
    beside = checkpoint.path.with_name(PEFT_CONFIG)
    if checkpoint.path.name == PEFT_FILE and beside.is_file():
        return {TRANSFORMER.name: read_json(beside)}
    try:
        value = json.loads(checkpoint.metadata.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(checkpoint.path, f"lora_adapter_metadata is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(checkpoint.path, "lora_adapter_metadata is not a JSON object")
    # diffusers calls networks after their folders.
    networks = {network.folder: network.name for network in NETWORKS if network.lora}
    settings: dict[str, dict[str, Any]] = {}
    for key, entry in value.items():
        folder, _, field = key.partition(".")
        if folder in networks:
            settings.setdefault(networks[folder], {})[field] = entry
    return settings
