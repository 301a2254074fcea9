"""FLUX.1's multimodal diffusion transformer, with the bokeh adapter built in when its config is given."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bokehflux.attention import AttentionSpec, Plain
from bokehflux.configs import BokehConfig, MMDiTConfig
from bokehflux.models.adapter import BokehAdapter, BokehCondition
from bokehflux.models.blocks import (
    BlockSpec,
    DoubleModulation,
    DoubleStreamBlock,
    FinalLayer,
    ModulationOut,
    SingleStreamBlock,
)
from bokehflux.models.controls import BlockControl
from bokehflux.models.embeddings import SINUSOID_DIM, MLPEmbedder, RopeTable, sinusoid
from bokehflux.models.fused import Residual
from bokehflux.models.linear import Linear
from bokehflux.models.precision import careful_dtype
from bokehflux.models.reference import ReferenceAdapter
from bokehflux.models.units import Network, Units


@dataclass(frozen=True, kw_only=True, eq=False)
class Modulations:
    """Every shift, scale and gate of one network evaluation, each [B, 1, E], or [1, 1, E] for all rows."""

    double: tuple[DoubleModulation, ...]
    single: tuple[ModulationOut, ...]
    final: ModulationOut

    def row(self, i: int) -> Modulations:
        """The modulations of one row, as [1, 1, E]."""
        return self.map(lambda t: t[i : i + 1])

    def map(self, function: Callable[[Tensor], Tensor]) -> Modulations:
        """The modulations with every vector passed through a function."""

        def each(mod: ModulationOut) -> ModulationOut:
            return ModulationOut(*map(function, mod))

        return Modulations(
            double=tuple(DoubleModulation(*map(each, mods)) for mods in self.double),
            single=tuple(map(each, self.single)),
            final=each(self.final),
        )

    def for_blocks(self, dtype: torch.dtype) -> Modulations:
        """For blocks that compute in a dtype: narrower than they were made in, or, where autocast made them,
        wider, so that 1 + scale is not rounded. The last layer's stay: its result is the sampler's."""
        return dataclasses.replace(self.map(lambda t: t.to(dtype)), final=self.final)

    def tensors(self) -> list[Tensor]:
        """All vectors, always in the same order."""
        mods = [*(mod for block in self.double for mod in block), *self.single, self.final]
        return [t for mod in mods for t in mod]


@dataclass(frozen=True, kw_only=True, eq=False)
class RunConstants:
    """What depends on a run's levels and the weights alone, computed once: see `MMDiT.constants`."""

    values: dict[int, Tensor]
    """Value vector of each adapted block, [B, H, D]; empty without levels."""
    logit_bounds: tuple[float, ...]
    """By block, a bound that no scaled attention score exceeds."""
    controls: dict[int, BlockControl]
    """What each block adds for what is asked beside the level; empty where nothing is."""

    def rows(self, rows: slice) -> RunConstants:
        """The constants of some rows of the batch."""
        return dataclasses.replace(
            self,
            values={i: value[rows] for i, value in self.values.items()},
            controls={i: control.rows(rows) for i, control in self.controls.items()},
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Some rows of a batch, and what is asked of them: see `MMDiT.forward`."""

    img: Tensor
    txt: Tensor
    attention: AttentionSpec | None = None
    bokeh: BokehCondition | None = None
    constants: RunConstants | None = None
    """Computed by the run for these levels; None: value vectors are computed now, and no score is bounded."""
    reference: ReferenceAdapter | None = None
    """What is added where the rows show a reference picture."""


class MMDiT(Network):
    """Velocity prediction on packed latent tokens, conditioned on text, noise level, guidance and bokeh.

    Parameter names equal the BFL checkpoint's; the adapter's live under `bokeh.` with the published names.
    """

    def __init__(self, config: MMDiTConfig, bokeh: BokehConfig | None = None) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.img_in = Linear(config.in_channels, width)
        self.txt_in = Linear(config.txt_dim, width)
        self.time_in = MLPEmbedder(SINUSOID_DIM, width)
        self.vector_in = MLPEmbedder(config.pooled_dim, width)
        self.guidance_in = MLPEmbedder(SINUSOID_DIM, width) if config.guidance_embed else None
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(config) for _ in range(config.num_double))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(config) for _ in range(config.num_single))
        self.final_layer = FinalLayer(config)
        self.bokeh = BokehAdapter(bokeh, config) if bokeh is not None else None

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        pooled: Tensor,
        sigma: Tensor,
        guidance: Tensor | None,
        rope: RopeTable,
        attention: AttentionSpec | None = None,
        bokeh: BokehCondition | None = None,
    ) -> Tensor:
        """Predict the velocity (noise - data).

        img [B, N, 64] packed latents; txt [B, T, W] T5 states; pooled [B, P]; sigma [B] noise level in 0-1;
        guidance [B] (ignored by models without guidance embedding); rope: table of T text then N image
        tokens; attention: specification of the joint attentions, plain by default; bokeh: levels of the
        B rows, None for the base model alone. With levels, blocks that the adapter leaves alone attend
        plainly whatever the specification (as published). Returns [B, N, 64].
        Raises ValueError for levels without an adapter or a missing guidance.
        """
        rows = Rows(img=img, txt=txt, attention=attention, bokeh=bokeh)
        mods = self.modulations(pooled, sigma, guidance).for_blocks(self.dtype)
        return self.velocities([rows], mods, rope)[0]

    def modulations(self, pooled: Tensor, sigma: Tensor, guidance: Tensor | None) -> Modulations:
        """Shifts, scales and gates for pooled [B, P], sigma [B] and guidance [B].

        They depend on nothing else: a run computes them once a step for all its rows, or once for all steps.
        On a CPU they are float32, and blocks compute in the dtype of theirs (`for_blocks`).
        """
        careful = careful_dtype(self.device, self.dtype)
        vec = self.time_in(sinusoid(sigma.to(careful)).to(careful))
        if self.guidance_in is not None:
            if guidance is None:
                raise ValueError("this model is guidance-distilled: guidance [B] is required")
            vec = vec + self.guidance_in(sinusoid(guidance.to(careful)).to(careful))
        vec = vec + self.vector_in(pooled.to(careful))
        return Modulations(
            double=tuple(block.modulation_of(vec) for block in self.doubles),
            single=tuple(block.modulation_of(vec) for block in self.singles),
            final=self.final_layer.modulation_of(vec),
        )

    def velocities(self, parts: Sequence[Rows], mods: Modulations, rope: RopeTable) -> list[Tensor]:
        """The velocity of each part of a batch; mods: those of its rows, or [1, 1, E] for all.

        All parts pass a block before any passes the next one: what one leaves for a later one (a pivot's
        queries and keys) is needed in one block only, and weights that visit the device come once for all.
        Raises ValueError as `forward`.
        """
        if self.bokeh is None and any(rows.bokeh is not None for rows in parts):
            raise ValueError("bokeh levels need an adapter, and this model was loaded without one")
        specs = [self._block_specs(rows) for rows in parts]
        num_double = len(self.doubles)

        def waiting(stream: Residual) -> Residual:
            """A part that waits for its turn holds its tokens and no update beside them."""
            return stream.settled() if len(parts) > 1 else stream

        careful = careful_dtype(self.device, self.dtype)
        # Both ways: autocast narrows what a float32 network's products give, and blocks want one type.
        imgs = [Residual(self.img_in(rows.img.to(careful)).to(careful)) for rows in parts]  # [B, N, E]
        txts = [Residual(self.txt_in(rows.txt.to(careful)).to(careful)) for rows in parts]  # [B, T, E]
        for i, (double, double_mod) in enumerate(zip(self.doubles, mods.double, strict=True)):
            for n, spec in enumerate(specs):  # one by one, so that no part's input outlives its output
                imgs[n], txts[n] = map(waiting, double(imgs[n], txts[n], double_mod, rope, spec[i]))
        # [B, T + N, E]: text first. Popped, so that what was apart is freed.
        xs = [Residual(torch.cat([txts.pop(0).sum(), imgs.pop(0).sum()], dim=1)) for _ in parts]
        for i, (single, mod) in enumerate(zip(self.singles, mods.single, strict=True), start=num_double):
            for n, spec in enumerate(specs):
                xs[n] = waiting(single(xs[n], mod, rope, spec[i]))
        return [
            self.final_layer(x.tokens(slice(rows.txt.shape[1], None)), mods.final)  # [B, N, C]
            for x, rows in zip(xs, parts, strict=True)
        ]

    def constants(self, bokeh: BokehCondition | None) -> RunConstants:
        """What all evaluations with these levels and weights share.

        For inference: it waits for the device once, and does not follow weights that change afterwards.
        """
        values = {} if bokeh is None else self._values(bokeh)
        controls = {} if bokeh is None else self._controls(bokeh)
        return RunConstants(values=values, logit_bounds=self._logit_bounds(), controls=controls)

    def _values(self, bokeh: BokehCondition) -> dict[int, Tensor]:
        if self.bokeh is None:
            raise ValueError("bokeh levels need an adapter, and this model was loaded without one")
        scale = self.bokeh.config.bokeh_scale if bokeh.bokeh_scale is None else bokeh.bokeh_scale
        return self.bokeh.values(bokeh.model_input(self.device, self.dtype), scale)

    def _controls(self, bokeh: BokehCondition) -> dict[int, BlockControl]:
        if bokeh.controls is None:
            return {}
        return bokeh.controls.for_blocks(bokeh.model_input(self.device, self.dtype))

    def _logit_bounds(self) -> tuple[float, ...]:
        """By block: |q . k| / sqrt(D) <= sqrt(D) max|w_q| max|w_k|.

        A normalised query is at most sqrt(D) times its norm's largest weight long, and so is a key; rotations
        keep lengths. 2 % more covers six roundings of q and k to bfloat16. The bound is rounded up to a power
        of two, since compiled blocks are compiled for each value.
        """
        double = [
            torch.maximum(block.img_attn.norm.largest(), block.txt_attn.norm.largest())
            for block in self.doubles
        ]
        largest = torch.stack(double + [block.norm.largest() for block in self.singles])
        bounds = (1.02 * self.config.head_dim**0.5 * largest.prod(dim=1)).tolist()
        return tuple(
            2.0 ** math.ceil(math.log2(max(b, 1.0))) if math.isfinite(b) else math.inf for b in bounds
        )

    def _block_specs(self, rows: Rows) -> list[BlockSpec]:
        specs = self._specs_by_level(rows.attention or Plain(), rows.bokeh, rows.constants)
        if rows.reference is None:
            return specs
        return [dataclasses.replace(spec, reference=rows.reference.block(i)) for i, spec in enumerate(specs)]

    def _specs_by_level(
        self, spec: AttentionSpec, bokeh: BokehCondition | None, constants: RunConstants | None
    ) -> list[BlockSpec]:
        folded_at = self.bokeh.folded_at if self.bokeh is not None else None
        bounds = constants.logit_bounds if constants is not None else (None,) * self.config.num_blocks
        if bokeh is None or self.bokeh is None:
            if folded_at is not None:
                raise ValueError("the adapter is folded into the weights: undo that to run without levels")
            return [BlockSpec(attention=spec.for_block(i, None, bound)) for i, bound in enumerate(bounds)]
        config = self.bokeh.config
        lora_scale = config.lora_scale if bokeh.lora_scale is None else bokeh.lora_scale
        if folded_at is not None and lora_scale != folded_at:
            raise ValueError(f"the adapter is folded at lora_scale {folded_at}, asked for {lora_scale}")
        values = constants.values if constants is not None else self._values(bokeh)
        controls = constants.controls if constants is not None else self._controls(bokeh)
        plain = spec.plain()
        specs = [BlockSpec(attention=plain.for_block(i, None, bound)) for i, bound in enumerate(bounds)]
        for i, value in values.items():
            updates = self.bokeh.block(i) if folded_at is None else None
            adapted = spec.for_block(i, value, bounds[i])
            specs[i] = BlockSpec(attention=adapted, adapter=updates, lora_scale=lora_scale)
        for i, control in controls.items():
            specs[i] = dataclasses.replace(specs[i], control=control)
        return specs

    @property
    def doubles(self) -> list[DoubleStreamBlock]:
        return list(self.double_blocks)  # type: ignore[arg-type]

    @property
    def singles(self) -> list[SingleStreamBlock]:
        return list(self.single_blocks)  # type: ignore[arg-type]

    @property
    def blocks(self) -> list[DoubleStreamBlock | SingleStreamBlock]:
        """In the order in which they run, numbered as the adapter numbers them."""
        return [*self.doubles, *self.singles]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype it computes in; weights may be stored narrower."""
        return self.img_in.bias.dtype

    @property
    def device(self) -> torch.device:
        return self.img_in.weight.device

    def compile_blocks(self) -> None:
        """Compile each block by itself: seconds instead of minutes, and blocks of a kind share the code."""
        for block in self.blocks:
            block.compile(dynamic=False)

    def units(self) -> Units:
        modulations = [layer for block in self.blocks for layer in block.modulations]
        apart = {part for layer in modulations for part in layer.modules()}
        projections = {
            f"{kind}.{name}": layer
            for kind in ("double_blocks", "single_blocks")
            for name, layer in self.get_submodule(kind).named_modules()
            if isinstance(layer, Linear) and layer not in apart
        }
        return Units(
            blocks=tuple(self.blocks),
            ahead=(*modulations, self.final_layer.adaLN_modulation),
            values=() if self.bokeh is None else self.bokeh.value_layers,
            unread=() if self.bokeh is None else self.bokeh.unread,
            projections=projections,
            folded=self.bokeh is not None and self.bokeh.folded_at is not None,
            matrices=tuple(layer.weight for layer in projections.values()),
        )
