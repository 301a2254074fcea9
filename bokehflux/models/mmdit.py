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
    BlockTerms,
    DoubleModulation,
    DoubleStreamBlock,
    FinalLayer,
    ModulationOut,
    Residual,
    SingleStreamBlock,
)
from bokehflux.models.embeddings import SINUSOID_DIM, MLPEmbedder, RopeTable, sinusoid
from bokehflux.models.linear import Linear
from bokehflux.models.units import Network, Units


@dataclass(frozen=True, kw_only=True, eq=False)
class Modulations:
    """Every shift, scale and gate of one network evaluation, each [B, 1, E], or [1, 1, E] for all rows."""

    double: tuple[DoubleModulation, ...]
    single: tuple[ModulationOut, ...]
    final: ModulationOut

    def row(self, i: int) -> Modulations:
        """Those of one row, shapes kept."""
        return self.map(lambda t: t[i : i + 1])

    def map(self, function: Callable[[Tensor], Tensor]) -> Modulations:
        """With every vector passed through a function."""

        def each(mod: ModulationOut) -> ModulationOut:
            return ModulationOut(*map(function, mod))

        return Modulations(
            double=tuple(DoubleModulation(*map(each, mods)) for mods in self.double),
            single=tuple(map(each, self.single)),
            final=each(self.final),
        )

    def tensors(self) -> list[Tensor]:
        """All of them, in one order."""
        mods = [*(mod for block in self.double for mod in block), *self.single, self.final]
        return [t for mod in mods for t in mod]


@dataclass(frozen=True, kw_only=True, eq=False)
class Constants:
    """What a run's levels and the weights alone decide, computed once: see `MMDiT.constants`."""

    values: dict[int, Tensor]
    """Value vector of each adapted block, [B, H, D]; empty without levels."""
    logit_bounds: tuple[float, ...]
    """By block, what no scaled attention score exceeds."""

    def rows(self, rows: slice) -> Constants:
        """Those of some rows of the batch."""
        return dataclasses.replace(self, values={i: value[rows] for i, value in self.values.items()})


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Some rows of a batch, and what the blocks compute for them: arguments of `MMDiT.velocity`."""

    img: Tensor
    txt: Tensor
    attention: AttentionSpec | None = None
    bokeh: BokehCondition | None = None
    constants: Constants | None = None


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
        """What it computes in; weights may be stored narrower."""
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
            matrices=tuple(layer.weight for layer in projections.values()),
        )

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
        return self.velocity(img, txt, self.modulations(pooled, sigma, guidance), rope, attention, bokeh)

    def modulations(self, pooled: Tensor, sigma: Tensor, guidance: Tensor | None) -> Modulations:
        """Shifts, scales and gates for pooled [B, P], sigma [B] and guidance [B].

        They depend on nothing else: a run computes them once a step for all its rows, or once for all steps.
        """
        vec = self.time_in(sinusoid(sigma.to(self.dtype)).to(self.dtype))
        if self.guidance_in is not None:
            if guidance is None:
                raise ValueError("this model is guidance-distilled: guidance [B] is required")
            vec = vec + self.guidance_in(sinusoid(guidance.to(self.dtype)).to(self.dtype))
        vec = vec + self.vector_in(pooled)
        return Modulations(
            double=tuple(block.modulation_of(vec) for block in self.doubles),
            single=tuple(block.modulation_of(vec) for block in self.singles),
            final=self.final_layer.modulation_of(vec),
        )

    def velocity(
        self,
        img: Tensor,
        txt: Tensor,
        mods: Modulations,
        rope: RopeTable,
        attention: AttentionSpec | None = None,
        bokeh: BokehCondition | None = None,
        constants: Constants | None = None,
    ) -> Tensor:
        """`forward` with its modulations already computed, and the `constants` of its levels, if a run has
        computed them; without, logits count as unbounded."""
        part = Part(img=img, txt=txt, attention=attention, bokeh=bokeh, constants=constants)
        return self.velocities([part], mods, rope)[0]

    def velocities(self, parts: Sequence[Part], mods: Modulations, rope: RopeTable) -> list[Tensor]:
        """`velocity` of each part, block by block: what a part leaves for a later one (a pivot's queries and
        keys) is needed in one block only, and weights that visit the device come once for all parts.

        mods: of the rows of each part, or [1, 1, E] for all. Raises ValueError as `velocity`.
        """
        if self.bokeh is None and any(part.bokeh is not None for part in parts):
            raise ValueError("bokeh levels need an adapter, and this model was loaded without one")
        terms = [self._block_terms(p.attention or Plain(), p.bokeh, p.constants) for p in parts]
        streams = [(Residual(self.img_in(part.img)), Residual(self.txt_in(part.txt))) for part in parts]
        # A part that waits for its turn holds its tokens and no update beside them.
        waits = len(parts) > 1
        count = len(mods.double)
        for i, (double, double_mod) in enumerate(zip(self.doubles, mods.double, strict=True)):
            for n, term in enumerate(terms):  # one by one, so that no part's input outlives its output
                img, txt = double(*streams[n], double_mod, rope, term[i])
                streams[n] = (img.settled(), txt.settled()) if waits else (img, txt)
        xs = []
        while streams:
            img, txt = streams.pop(0)
            xs.append(Residual(torch.cat([txt.sum(), img.sum()], dim=1)))
        for i, (single, mod) in enumerate(zip(self.singles, mods.single, strict=True), start=count):
            for n, term in enumerate(terms):
                x = single(xs[n], mod, rope, term[i])
                xs[n] = x.settled() if waits else x
        return [
            self.final_layer(x.tokens(slice(part.txt.shape[1], None)), mods.final)
            for x, part in zip(xs, parts, strict=True)
        ]

    def constants(self, bokeh: BokehCondition | None) -> Constants:
        """What every evaluation with these levels and these weights shares. For inference: it waits for the
        device once, and says nothing about weights that change afterwards."""
        values = {} if bokeh is None else self._values(bokeh)
        return Constants(values=values, logit_bounds=self._logit_bounds())

    def _values(self, bokeh: BokehCondition) -> dict[int, Tensor]:
        if self.bokeh is None:
            raise ValueError("bokeh levels need an adapter, and this model was loaded without one")
        scale = self.bokeh.config.bokeh_scale if bokeh.bokeh_scale is None else bokeh.bokeh_scale
        return self.bokeh.values(bokeh.model_input(self.device, self.dtype), scale)

    def _logit_bounds(self) -> tuple[float, ...]:
        """By block. A normalised query's length is at most sqrt(D) times its norm's largest weight, so is a
        key's, and rotations keep lengths: |q . k| / sqrt(D) <= sqrt(D) max|w_q| max|w_k|.

        2 % more covers six roundings of q and k to bfloat16. Then up to a power of two: compiled blocks are
        compiled for each value.
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

    def _block_terms(
        self, spec: AttentionSpec, bokeh: BokehCondition | None, constants: Constants | None
    ) -> list[BlockTerms]:
        """For every block: its attention, and what the adapter adds to it."""
        folded_at = self.bokeh.folded_at if self.bokeh is not None else None
        bounds = constants.logit_bounds if constants is not None else (None,) * self.config.num_blocks
        if bokeh is None or self.bokeh is None:
            if folded_at is not None:
                raise ValueError("the adapter is folded into the weights: undo that to run without levels")
            return [BlockTerms(spec=spec.for_block(i, None, bound)) for i, bound in enumerate(bounds)]
        config = self.bokeh.config
        lora_scale = config.lora_scale if bokeh.lora_scale is None else bokeh.lora_scale
        if folded_at is not None and lora_scale != folded_at:
            raise ValueError(f"the adapter is folded at lora_scale {folded_at}, asked for {lora_scale}")
        values = constants.values if constants is not None else self._values(bokeh)
        plain = Plain(backend=spec.backend)
        terms = [BlockTerms(spec=plain.for_block(i, None, bound)) for i, bound in enumerate(bounds)]
        for i, value in values.items():
            updates = self.bokeh.block(i) if folded_at is None else None
            grounded = spec.for_block(i, value, bounds[i])
            terms[i] = BlockTerms(spec=grounded, adapter=updates, lora_scale=lora_scale)
        return terms
