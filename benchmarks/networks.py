"""The networks that step, generate and memory benchmarks run: full size or toy, random weights, any device.

Weights are drawn on the device. Arms share them: a further module on the same weights costs nothing.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.shapes import AttentionShape
from bokehflux import configs
from bokehflux.conditioning import Conditioning
from bokehflux.models.adapter import BokehCondition
from bokehflux.models.clip import CLIPTextEncoder
from bokehflux.models.fold import fold_adapter
from bokehflux.models.linear import Linear
from bokehflux.models.mmdit import MMDiT
from bokehflux.models.t5 import T5Encoder
from bokehflux.models.vae import AutoencoderKL
from bokehflux.pipeline.pipeline import Pipeline
from bokehflux.pipeline.provenance import Source
from bokehflux.sampling.denoise import Grounding, denoiser
from bokehflux.sampling.latents import LatentGrid, position_ids
from bokehflux.sampling.ranks import ALONE, Ranks
from bokehflux.text.encode import TextEncoders

PIVOT_LEVEL = 15.0
TARGET_LEVELS = (0.0, 30.0, 22.5, 7.5, 3.75, 26.25)
"""Thirtieths of these, and of the pivot's, are exact in bfloat16: every arm gets what float32 gets."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Sizes of every network and of the pictures."""

    mmdit: configs.MMDiTConfig
    bokeh: configs.BokehConfig
    t5: configs.T5Config
    clip: configs.CLIPConfig
    vae: configs.VAEConfig
    txt_length: int
    sides_px: tuple[int, ...]
    dtype: torch.dtype


FULL = Setting(
    mmdit=configs.FLUX_DEV, bokeh=configs.FLUX_BOKEH, t5=configs.T5_XXL, clip=configs.CLIP_L,
    vae=configs.FLUX_VAE, txt_length=512, sides_px=(1024, 512), dtype=torch.bfloat16,
)  # fmt: skip
TINY = Setting(
    mmdit=configs.MMDiTConfig(
        in_channels=64, txt_dim=48, pooled_dim=32, hidden_size=64, num_heads=2,
        num_double=2, num_single=3, axes_dim=(8, 12, 12), guidance_embed=True,
    ),
    bokeh=configs.BokehConfig(blocks=tuple(range(5)), rank=4, hidden_dim=8, context_dim=16),
    t5=configs.T5Config(vocab_size=99, width=48, head_dim=8, mlp_size=64, num_layers=2, num_heads=2),
    clip=configs.CLIPConfig(vocab_size=99, width=32, mlp_size=64, num_layers=1, num_heads=2),
    vae=configs.VAEConfig(
        channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=16, norm_groups=4, scale=0.36, shift=0.12
    ),
    txt_length=8, sides_px=(64, 32), dtype=torch.bfloat16,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One step's inputs. Row 0 is the pivot where the batch is grounded; all rows share all but the level."""

    img: Tensor
    """[1, N, 64] float32; noise, exact in bfloat16"""
    txt: Tensor
    pooled: Tensor
    grid: LatentGrid
    levels: tuple[float, ...] | None
    """None: the base model, without adapter."""
    sigma: float
    guidance: float = 4.0

    @property
    def num_rows(self) -> int:
        return 1 if self.levels is None else len(self.levels)

    @property
    def num_targets(self) -> int:
        """Grounded rows."""
        return self.num_rows - 1

    @property
    def ids(self) -> Tensor:
        """[T + N, 3]"""
        return position_ids(self.grid, self.txt.shape[1], self.txt.device)

    @property
    def length(self) -> int:
        return self.txt.shape[1] + self.grid.num_tokens


@dataclass(frozen=True)
class RandomIds:
    """Stands in for a tokenizer where there are no files of one: the same work on made-up ids."""

    vocab_size: int
    length: int

    def __call__(self, prompts: Sequence[str], length: int | None = None) -> Tensor:
        rows = [torch.Generator().manual_seed(zlib.crc32(prompt.encode())) for prompt in prompts]
        size = (length or self.length,)
        return torch.stack([torch.randint(self.vocab_size, size, generator=row) for row in rows])


@torch.no_grad()
def randomise(mmdit: MMDiT, generator: torch.Generator) -> None:
    """Draw every parameter, those that start as zero or one too, so that signals keep their size with depth.

    Query and key scales lie around 1.5: scores then spread by about 2, and attention picks a few tokens
    rather than averaging all of them, which would hide its errors.
    """
    for name, parameter in mmdit.named_parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
        elif name.endswith(".scale"):
            parameter.data.normal_(1.5, 0.1, generator=generator)
        else:
            parameter.data.normal_(0.0, 0.02, generator=generator)


def setting(tiny: bool) -> Setting:
    return TINY if tiny else FULL


def build_mmdit(setting: Setting, device: torch.device) -> MMDiT:
    """Every parameter drawn on the device; see `randomise`."""
    with torch.device("meta"):
        mmdit = MMDiT(setting.mmdit, setting.bokeh).to(setting.dtype)
    mmdit = mmdit.to_empty(device=device).eval().requires_grad_(False)
    randomise(mmdit, torch.Generator(device).manual_seed(0))
    return mmdit


@torch.no_grad()
def build_pipeline(setting: Setting, device: torch.device) -> Pipeline:
    """All networks on the device. T5 takes 19 GB there for a moment: it is drawn in float32."""
    torch.manual_seed(0)
    with device:
        t5, clip, vae = T5Encoder(setting.t5), CLIPTextEncoder(setting.clip), AutoencoderKL(setting.vae)
    for network in (t5, clip, vae):
        network.to(setting.dtype).eval().requires_grad_(False)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    side = setting.sides_px[0]
    return Pipeline(
        transformer=build_mmdit(setting, device),
        text=TextEncoders(
            t5=t5,
            clip=clip,
            t5_tokenizer=RandomIds(setting.t5.vocab_size, setting.txt_length),  # type: ignore[arg-type]
            clip_tokenizer=RandomIds(setting.clip.vocab_size, setting.clip.max_length),  # type: ignore[arg-type]
            txt_length=setting.txt_length,
        ),
        vae=vae,
        schedule=configs.FLUX_SCHEDULE,
        defaults=configs.Defaults(
            num_inference_steps=30, height_px=side, width_px=side, txt_length=setting.txt_length
        ),
        source=Source(model="random"),
    )


def on_same_weights(mmdit: MMDiT) -> MMDiT:
    """A further network on the same tensors, so that one can be compiled and the other not."""
    assert mmdit.bokeh is not None and mmdit.bokeh.folded_at is None, "its adapter would count twice"
    with torch.device("meta"):
        twin = MMDiT(mmdit.config, mmdit.bokeh.config).to(mmdit.dtype)
    twin.load_state_dict(mmdit.state_dict(), assign=True)
    return twin.eval().requires_grad_(False)


def widened(mmdit: MMDiT) -> MMDiT:
    """The float32 network, bit for bit `.float()`, on the same narrow weights: each is cast when it is used.

    At full size 1 GB more rather than 48: it fits beside everything else on one GPU.
    """
    twin = on_same_weights(mmdit)
    kept = set()
    for layer in twin.modules():
        if isinstance(layer, Linear):
            layer.dequantize = lambda weight, dtype: weight.to(dtype)
            kept.add(id(layer.weight))
    for parameter in twin.parameters():
        if id(parameter) not in kept:
            parameter.data = parameter.data.float()
    return twin


def folded(mmdit: MMDiT) -> MMDiT:
    """The adapter folded into copies of the projections that it changes: 6 GB more at full size."""
    twin = on_same_weights(mmdit)
    for block in twin.blocks:
        for parameter in block.adapted.parameters():
            parameter.data = parameter.data.clone()
    fold_adapter(twin)
    return twin


def draw_batch(
    setting: Setting,
    side_px: int,
    levels: tuple[float, ...] | None,
    device: torch.device,
    sigma: float = 0.9,
) -> Batch:
    """levels: the pivot's, then the targets'; one level: a row by itself. sigma: the noise level."""
    generator = torch.Generator(device).manual_seed(0)
    grid = LatentGrid(height_px=side_px, width_px=side_px)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, *shape, device=device, generator=generator).to(torch.bfloat16).float()

    return Batch(
        img=normal(grid.num_tokens, setting.mmdit.in_channels),
        txt=normal(setting.txt_length, setting.mmdit.txt_dim),
        pooled=normal(setting.mmdit.pooled_dim),
        grid=grid,
        levels=levels,
        sigma=sigma,
    )


def our_step(
    mmdit: MMDiT, batch: Batch, backend: str = "auto", graph: bool = False, ranks: Ranks = ALONE
) -> Callable[[], Tensor]:
    """The velocity [B, N, 64] as a run computes it: what it computes once a run is made before.

    graph: where a run would replay it as a CUDA graph, it does from the third call on. sigma and guidance are
    exact in bfloat16, times 1000 too.
    """
    sigma = torch.tensor(batch.sigma)
    velocity = denoiser(
        mmdit, Conditioning(txt=batch.txt, pooled=batch.pooled), batch.grid, guidance=batch.guidance,
        bokeh=None if batch.levels is None else BokehCondition.of(batch.levels),
        grounding=Grounding(pivot_row=0, num_steps=1) if batch.num_targets else None,
        sigmas=sigma[None], cuda_graphs=graph, backend=backend, ranks=ranks,
    )  # fmt: skip
    img = batch.img.to(mmdit.dtype).expand(batch.num_rows, -1, -1)
    return lambda: velocity(img, sigma, 0)


@torch.inference_mode()
def exact(wide: MMDiT, batch: Batch) -> Tensor:
    """The float32 velocity of the pivot, the first and the last target [2 or 3, N, 64], by the definition.

    A pair at a time (written-out attention takes gigabytes a row). Raises FloatingPointError where it is not
    finite.
    """
    pairs = [batch]
    if batch.levels is not None and batch.num_targets:
        pivot, *targets = batch.levels
        checked = dict.fromkeys((targets[0], targets[-1]))
        pairs = [dataclasses.replace(batch, levels=(pivot, level)) for level in checked]
    found = [our_step(wide, pair, "reference")() for pair in pairs]
    velocity = torch.cat([found[0], *(pair[1:] for pair in found[1:])])
    if not velocity.isfinite().all():
        raise FloatingPointError("the float32 velocity is not finite: these random weights measure nothing")
    return velocity


def exact_of(mmdit: MMDiT, batches: Iterable[Batch]) -> list[Tensor]:
    """`exact` for each, before any arm takes its memory: written-out attention needs up to 25 GB."""
    wide = widened(mmdit)
    found = [exact(wide, batch) for batch in batches]
    if mmdit.device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def checked_rows(batch: Batch) -> list[int]:
    """The rows of `exact`."""
    return sorted({0, min(1, batch.num_rows - 1), batch.num_rows - 1})


def num_bytes(network: nn.Module) -> int:
    return sum(p.nbytes for p in network.parameters())


def tera_flop(config: configs.MMDiTConfig, batch: Batch, is_ours: bool) -> tuple[float, float]:
    """Work of a step, 1e12 operations: matrix products of blocks, adapter not counted, and attention."""
    rows, idle = batch.num_rows, 0
    if batch.num_targets:  # ours computes no queries of targets, the published way each pair by itself
        rows, idle = (rows, batch.num_targets) if is_ours else (2 * batch.num_targets, 0)
    shape = AttentionShape(
        form="grounded" if batch.num_targets else "plain",
        num_targets=batch.num_targets or batch.num_rows,
        length=batch.length,
        num_heads=config.num_heads,
        head_dim=config.head_dim,
    )
    products = (12 * rows - idle) * 2.0 * batch.length * config.hidden_size**2 / 1e12
    attention = shape.tera_flop("ours" if is_ours else "published")
    return config.num_blocks * products, config.num_blocks * attention
