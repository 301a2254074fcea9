"""nano's renderer as a yardstick: scenes of a caption, as they are and through the model's autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from bokehflux.evaluation.figures import floats
from bokehflux.evaluation.scores import Shots
from bokehflux.models.vae import AutoencoderKL, to_uint8
from bokehflux.nano.captions import spec_of
from bokehflux.nano.scenes import SceneSpec, build_scenes, render
from bokehflux.weights.find.resolve import BUNDLED
from bokehflux.weights.load import load_network
from bokehflux.weights.networks import VAE

SEED, OTHER_SEED = 90_002, 90_003
"""Decide the reference's scene, and another scene of the same caption, which is judged by it."""
SUBJECT_ROWS, SUBJECT_COLUMNS = (0.62, 0.78), (0.44, 0.56)
"""Shares of the picture's height and width that lie within nearly every subject."""
BEHIND_ROWS, BEHIND_BESIDE = 0.6, 0.25
"""Share of the height, from the top, and of the width, from both sides, where only the background is."""


class Renderer:
    """What the bundled model was taught to draw. Its autoencoder is read when it is first needed."""

    def yardsticks(
        self, model: str | None, prompt: str, levels: Sequence[float], pivot: float, size: tuple[int, int]
    ) -> tuple[Tensor, dict[str, Shots]] | None:
        """A reference [K, 3, S, S], and another scene of the same caption, without and with the autoencoder.

        None for pictures (height, width) that are not square, of another model, or of no caption of nano's.
        """
        spec, (height, width) = spec_of(prompt), size
        if spec is None or model not in BUNDLED or height != width:
            return None
        reference, scene = (rendered(spec, (*levels, pivot), height, seed)[0] for seed in (SEED, OTHER_SEED))
        subject, behind = regions(height)
        sources = {"renderer": scene, "renderer, through the VAE": floats(through_vae(self.vae, scene))}
        return reference[:-1], {
            name: Shots(
                levels=tuple(levels), images=images[:-1], pivot=images[-1], subject=subject, behind=behind,
                reference=reference[:-1],
            )
            for name, images in sources.items()
        }  # fmt: skip

    @cached_property
    def vae(self) -> AutoencoderKL:
        return load_network(VAE, BUNDLED["nano"] / VAE.folder, dtype=torch.float32)


def rendered(spec: SceneSpec, levels: Sequence[float], size_px: int, seed: int) -> Tensor:
    """[N, K, 3, S, S] in 0 ... 1, rounded to 8 bits: one scene of every caption at these levels."""
    scene = build_scenes(spec, size_px, torch.Generator().manual_seed(seed), "cpu")
    pictures = [render(scene, torch.full((len(spec),), level)) for level in levels]
    return torch.stack([(each * 255).round() / 255 for each in pictures], 1)


@torch.inference_mode()
def through_vae(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """[B, 3, H, W] in 0 ... 1 -> uint8 [B, H, W, 3] after encoding and decoding."""
    parts = (images * 2 - 1).to(next(vae.parameters())).split(32)
    return torch.cat([to_uint8(vae.decode(vae.encode(part))) for part in parts])


def regions(size_px: int) -> tuple[Tensor, Tensor]:
    """Bool [S, S] each: within nearly every subject, and where only the background is."""
    subject, behind = torch.zeros(2, size_px, size_px, dtype=torch.bool)
    rows, columns = ((round(size_px * share) for share in of) for of in (SUBJECT_ROWS, SUBJECT_COLUMNS))
    subject[slice(*rows), slice(*columns)] = True
    behind[: round(size_px * BEHIND_ROWS)] = True
    beside = round(size_px * BEHIND_BESIDE)
    behind[:, beside : size_px - beside] = False
    return subject, behind
