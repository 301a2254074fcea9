"""Recipes that come with the package: start from one, and change what your data and your machine need."""

from __future__ import annotations

from bokehflux.training.recipes.adapter import AdapterRecipe

FLUX = AdapterRecipe(
    model="FLUX.1-dev",
    groups="latents/groups",
    photographs="latents/photographs",
    noise_offset=0.05,
    batch=4,
    steps=20_000,
    compile=True,
    activations=0.4,
)
"""An adapter of the published shape for FLUX.1-dev, from photographs at 512 px: objective, dropout and
learning rate as those of BokehDepth, the published adapter's relative; memory for one GPU of 80 GB."""

NANO = AdapterRecipe(
    model="nano",
    groups="latents/groups",
    photographs="latents/photographs",
    rank=32,
    batch=64,
    steps=2000,
    lr=1e-3,
    ema_rate=0.003,
    max_guidance=5.0,
    level_guidance=0.18,
    activations=1.0,
    save_every=200,
)
"""The same for the bundled model, which is led at a guidance above 1 and so trained: minutes on a GPU."""

NAMED = {"flux": FLUX, "nano": NANO}
"""By the names that `bokehflux train --config` takes."""
