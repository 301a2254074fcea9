"""The recipe of nano: every shape and hyper-parameter of its training, as data. Seeds included.

Steps are fixed numbers, so a run can be repeated: those that `minutes` paced on one H100, where the stages
took 417, 486, 250 and 337 s, rendering and compiling included. The third is `base --resume`, with `RESUMED`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from bokehflux.configs import (
    BokehConfig,
    CLIPConfig,
    Defaults,
    MMDiTConfig,
    ScheduleConfig,
    T5Config,
    VAEConfig,
)
from bokehflux.training.adapter import Sampling
from bokehflux.training.reference import Pairs

TXT_LENGTH = 48
SIZE_PX = 256


@dataclass(frozen=True, kw_only=True)
class AutoencoderStage:
    seed: int = 1
    scenes: int = 20_480
    """Rendered images held in memory, one random level each."""
    steps: int = 3451
    minutes: float = 0.0
    """Above 0: train this long instead of `steps`, to find out how many a machine affords."""
    batch: int = 96
    """Crops of half the side; the last fifth of the steps takes a quarter as many whole images."""
    lr: float = 1.2e-3
    kl_weight: float = 3e-4
    square_weight: float = 8.0
    """Weight of the mean squared error, which PSNR measures, beside the plain L1."""
    edge_weight: float = 0.4
    """Weight of the Laplacian-pyramid L1 beside the plain L1."""
    half_scale_weight: float = 0.25
    """Weight of decoding half-size latents to half-size images: keeps latents smooth enough to learn."""


@dataclass(frozen=True, kw_only=True)
class BaseStage:
    seed: int = 2
    scenes: int = 49_152
    levels_per_scene: int = 2
    """Renders of every scene, at random levels that the base model is never told, sharp ones more often."""
    steps: int = 4408
    distill_steps: int = 221
    minutes: float = 0.0
    distill_minutes: float = 0.0
    """Above 0: train this long instead of the steps, to find out how many a machine affords."""
    batch: int = 512
    lr: float = 1.5e-3
    caption_dropout: float = 0.1
    max_guidance: float = 6.0
    sigma_mean: float = 0.15
    """Noise levels concentrate around sigmoid(sigma_mean): higher ones decide what is where."""
    crowded: float = 0.0
    """Share of scenes that certainly hold other objects, whose colours must not mix with the subject's."""


@dataclass(frozen=True, kw_only=True)
class FrozenBaseStage:
    """A stage that adds to the trained base and leaves it as it is."""

    seed: int
    scenes: int = 12_288
    levels_per_scene: int = 5
    """One level from each fifth of 0-30, the first exactly 0 in a share of the scenes."""
    chunk: int = 512
    """Scenes rendered together."""
    steps: int
    minutes: float = 0.0
    """Above 0: train this long instead of `steps`, to find out how many a machine affords."""
    batch: int
    lr: float = 1e-3


@dataclass(frozen=True, kw_only=True)
class AdapterStage(FrozenBaseStage, Sampling):
    seed: int = 3
    steps: int = 2397
    batch: int = 512
    spread_sigma: bool = False
    """As the bundled adapter was trained."""
    max_guidance: float = 5.0
    level_guidance: float = 0.18
    saved_scale: float = 1.2
    """`bokeh_scale` written with the trained adapter: at 1 it lost 0.75 times what the renderer loses."""

    def __post_init__(self) -> None:
        if self.batch % self.group or self.group > self.levels_per_scene:
            raise ValueError(
                f"batch {self.batch} must be a multiple of group {self.group}, and a group takes distinct "
                f"levels of the {self.levels_per_scene} per scene"
            )


@dataclass(frozen=True, kw_only=True)
class ReferenceStage(FrozenBaseStage, Pairs):
    seed: int = 5
    steps: int = 1282
    """The bundled adapter began with updates of q, k and v that 3,447 steps towards velocities had made."""
    batch: int = 192
    lr: float = 3e-3


@dataclass(frozen=True, kw_only=True)
class ControlsStage(FrozenBaseStage, Sampling):
    seed: int = 6
    scenes: int = 8_192
    levels_per_scene: int = 6
    """Renders, each with a focus, an aperture and a level of its own (`nano.controls`)."""
    chunk: int = 64
    """Scenes rendered together, which share their apertures."""
    steps: int = 1244
    batch: int = 256
    lr: float = 1.5e-3
    max_guidance: float = 5.0
    by_map: float = 0.4
    """Share of the renders that are asked for by their map of blur, not by their focus."""
    rank: int = 64
    write_every: int = 150
    """Steps from one writing of the adapter to the next."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    mmdit: MMDiTConfig
    bokeh: BokehConfig
    t5: T5Config
    clip: CLIPConfig
    vae: VAEConfig
    schedule: ScheduleConfig
    defaults: Defaults
    autoencoder: AutoencoderStage = field(default_factory=AutoencoderStage)
    base: BaseStage = field(default_factory=BaseStage)
    adapter: AdapterStage = field(default_factory=AdapterStage)
    reference: ReferenceStage = field(default_factory=ReferenceStage)
    controls: ControlsStage = field(default_factory=ControlsStage)


NANO = Recipe(
    mmdit=MMDiTConfig(
        in_channels=64, txt_dim=192, pooled_dim=128, hidden_size=256, num_heads=4, num_double=3, num_single=8,
        axes_dim=(16, 24, 24), guidance_embed=True,
    ),
    bokeh=BokehConfig(blocks=tuple(range(11)), rank=32, hidden_dim=64, context_dim=128),
    # Vocabulary sizes are upper bounds: the tokenizers decide, and the trainer writes what they decided.
    t5=T5Config(vocab_size=512, width=192, head_dim=48, mlp_size=384, num_layers=2, num_heads=4),
    clip=CLIPConfig(
        vocab_size=1024, width=128, mlp_size=256, num_layers=2, num_heads=4, max_length=TXT_LENGTH,
        eos_token_id=1,
    ),
    # Scale and shift are measured after training.
    vae=VAEConfig(
        channels=(32, 64, 128, 144), layers_per_block=2, latent_channels=16, norm_groups=8,
        scale=1.0, shift=0.0,
    ),
    schedule=ScheduleConfig(dynamic=True, shift=3.0),
    defaults=Defaults(num_inference_steps=20, height_px=SIZE_PX, width_px=SIZE_PX, txt_length=TXT_LENGTH),
)  # fmt: skip

RESUMED = BaseStage(
    scenes=16_384, steps=1368, distill_steps=348, lr=1e-3, sigma_mean=0.5, crowded=0.75
)  # fmt: skip
"""What `base --resume` does to the trained base: colours stop mixing between objects."""
