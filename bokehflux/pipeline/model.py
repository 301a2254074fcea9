"""A loaded model: its networks, what its files say about running them, and where it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from bokehflux.configs import Defaults, ScheduleConfig
from bokehflux.models.controls import ControlAdapter
from bokehflux.models.fp8 import is_fp8
from bokehflux.models.mmdit import MMDiT
from bokehflux.models.precision import careful_dtype
from bokehflux.models.reference import ReferenceAdapter
from bokehflux.models.vae import AutoencoderKL
from bokehflux.pipeline.memory import Placement
from bokehflux.pipeline.provenance import Source
from bokehflux.text.encode import TextEncoders

Compute = Literal["dtype", "fp8"]
"""What the transformer's blocks multiply in."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """What a run needs to know of a model. There is no other state."""

    transformer: MMDiT
    text: TextEncoders
    vae: AutoencoderKL
    schedule: ScheduleConfig
    defaults: Defaults
    source: Source
    reference: ReferenceAdapter | None = None
    """What lets its targets look at a photograph."""
    controls: ControlAdapter | None = None
    """What lets them be asked for more than a level."""
    memory: Placement = Placement()
    """Where the weights live while it runs."""

    @property
    def name(self) -> str:
        """The folder or bundled name that the model came from."""
        return self.source.model

    @property
    def device(self) -> torch.device:
        """Where the work is done."""
        return self.memory.device or self.transformer.device

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.dtype

    @property
    def latents_dtype(self) -> torch.dtype:
        """What the sampler keeps latents in."""
        return careful_dtype(self.device, self.dtype)

    @property
    def compute(self) -> Compute:
        return "fp8" if is_fp8(self.transformer) else "dtype"
