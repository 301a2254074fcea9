"""What an adapter is trained on, from labelled photographs: latents of two kinds, each in a folder.

A photograph that is blurred somewhere is a row by itself, at the level that its lens gave it. One that is
sharp throughout, and whose depth is known, becomes a group: itself, and renders of it at levels between 1
and 30, blurred around its subject. Groups teach that a level changes the blur alone, photographs what blur
of real lenses looks like.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from bokehflux.fingerprint import fingerprint_of_bytes
from bokehflux.lens import MAX_LEVEL, TRAINING_SIDE_PX, Blur, Unify
from bokehflux.models.vae import AutoencoderKL
from bokehflux.photos.focus import disparity_per_m
from bokehflux.photos.labels import Label, blur_of
from bokehflux.photos.readers import Row
from bokehflux.rendering.bokehme import PX_PER_UNIT
from bokehflux.rendering.bokehme_networks import Networks
from bokehflux.rendering.synthetic import add_bokeh, subject_defocus
from bokehflux.training.latents import Entry

Kind = Literal["groups", "photographs"]
LEAST_LEVEL = 1.0
"""The lowest of a render: the photograph itself is the sharp picture of its group."""
LEAST_BLUR = 0.1
"""A render at some level in which no pixel is blurred by this share of it would be a wrong example."""
RULE = 1
"""Counted up when the same photograph comes to other latents than before."""


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """How photographs become latents."""

    width_px: int = 512
    height_px: int = 512
    """Photographs are scaled until they cover this, and cropped around their middle."""
    renders: int = 8
    """Pictures of a group, the photograph among them: a step takes a few of them."""
    sharp_px: float = 1.0
    """A photograph that nobody has called sharp throughout counts as that when its largest blur has at most
    this radius, at a shorter side of 512."""
    flip: bool = False
    """Add the mirror image of everything."""
    seed: int = 0
    """Decides the levels of renders."""

    def __post_init__(self) -> None:
        for name in ("width_px", "height_px"):
            side = getattr(self, name)
            if side < 16 or side % 16:
                raise ValueError(f"{name} must be a positive multiple of 16, got {side}")
        if self.renders < 2:
            raise ValueError(f"renders must be at least 2, a photograph and one render, got {self.renders}")
        if not self.sharp_px >= 0:
            raise ValueError(f"sharp_px must be at least 0, got {self.sharp_px}")

    def num_bytes(self, channels: int, counts: Mapping[Kind, int]) -> int:
        """What latents of so many photographs take on the disk."""
        pictures = counts["groups"] * self.renders + counts["photographs"]
        return pictures * (1 + self.flip) * channels * self.width_px * self.height_px // 64 * 2


def kind_of(row: Row, label: Label, how: Preparation) -> Kind:
    """Which kind a labelled photograph is of. Raises ValueError where it can be neither."""
    sharp = row.all_in_focus
    if sharp is None and label["largest_radius_px"] is not None:
        sharp = float(label["largest_radius_px"]) <= how.sharp_px
    if sharp and row.read_depth is not None:
        return "groups"
    if label["K_px_m_short_side"] is None:
        raise ValueError("its level is not known, and it is not a sharp photograph with depth")
    return "photographs"


class Sorted(NamedTuple):
    """Labelled photographs by kind, and the reason for every other one, by its key."""

    kinds: dict[Kind, list[tuple[Row, Label]]]
    left_out: dict[str, str]


def sort_photographs(rows: Iterable[tuple[Row, Label]], how: Preparation) -> Sorted:
    """What becomes of each, by labels alone: no pixel is read."""
    found = Sorted({"groups": [], "photographs": []}, {})
    for row, label in rows:
        try:
            if not row.captions:
                raise ValueError("it has no caption")
            found.kinds[kind_of(row, label, how)].append((row, label))
        except ValueError as error:
            found.left_out[row.key] = str(error)
    return found


class Encoder:
    """The autoencoder, and the renderer before it."""

    def __init__(self, vae: AutoencoderKL, networks: Networks | None = None) -> None:
        self.vae, self.networks = vae, networks
        self.device = next(vae.parameters()).device
        weights = [*vae.state_dict().values()]
        weights += [] if networks is None else [t for one in networks for t in one.state_dict().values()]
        data = (t.cpu().contiguous().view(-1).view(torch.uint8).numpy(force=True) for t in weights)
        self.key = fingerprint_of_bytes("".join(fingerprint_of_bytes(d.tobytes()) for d in data).encode())
        """A hash of their weights."""

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """[R, 3, H, W], 0 ... 1 -> latents [R, C, h, w] float16, the means of what the encoder says."""
        return torch.cat([self.vae.encode(one[None].to(self.device) * 2 - 1) for one in images]).half().cpu()


class Crop(NamedTuple):
    """A photograph as it is trained on."""

    image: NDArray[np.uint8]
    """[H, W, 3]"""
    depth_m: NDArray[np.float32] | None
    """[H, W]"""
    mask: NDArray[np.float32] | None
    blur: Blur | None
    """That of the cropped picture at a shorter side of 512; None where the label lacks a part of it."""
    k_px_m: float | None
    """The same for its K alone."""

    def mirrored(self) -> Crop:
        """Left and right exchanged."""
        depth, mask = (
            None if values is None else np.ascontiguousarray(values[:, ::-1])
            for values in (self.depth_m, self.mask)
        )
        return self._replace(image=np.ascontiguousarray(self.image[:, ::-1]), depth_m=depth, mask=mask)


def cropped(row: Row, label: Label, how: Preparation) -> Crop:
    """Scaled to cover the size, cropped around the middle. Raises ValueError for an unreadable photograph."""
    photo = row.photo()
    size = how.width_px, how.height_px
    wide, high = photo.image.size
    scale = max(size[0] / wide, size[1] / high)
    covers = max(size[0], round(scale * wide)), max(size[1], round(scale * high))
    left, top = ((whole - side) // 2 for whole, side in zip(covers, size, strict=True))

    def fitted(image: Image.Image, resample: Image.Resampling) -> Image.Image:
        # Averages of unknown or distant depths mean nothing: maps take their nearest points.
        return image.resize(covers, resample).crop((left, top, left + size[0], top + size[1]))

    def map_of(values: NDArray[np.float32] | None) -> NDArray[np.float32] | None:
        return None if values is None else np.array(fitted(Image.fromarray(values), Image.Resampling.NEAREST))

    depth, whole = map_of(row.depth_m(photo)), blur_of(label)
    # Cropping the shorter side leaves fewer pixels across it, to which the level is told.
    wider = min(covers) / min(size)
    told = label["K_px_m_short_side"]
    k_px_m = None if told is None else float(told) * wider
    blur = None
    if (
        depth is not None
        and whole is not None
        and k_px_m is not None
        and (known := disparity_per_m(depth)[1]).any()
    ):
        ends = float(depth[known].min()), float(depth[known].max())
        blur = dataclasses.replace(whole, k_px_m=k_px_m, nearest_m=ends[0], farthest_m=ends[1])
    image = np.array(fitted(photo.image, Image.Resampling.LANCZOS))
    return Crop(image, depth, map_of(row.mask(photo)), blur, k_px_m)


def entries_of(
    kind: Kind,
    rows: Iterable[tuple[Row, Label]],
    how: Preparation,
    encoder: Encoder,
    left_out: dict[str, str],
) -> Iterator[Entry]:
    """Scenes of one kind as `write_entries` takes them. Each photograph is read once.

    left_out: gets the reason for every photograph that is left out, by its key.
    """
    for row, label in rows:
        try:
            crop = cropped(row, label, how)
            entry = _entry(kind, row, crop, how, encoder)
        except ValueError as error:
            left_out[row.key] = str(error)
            continue
        yield entry
        if how.flip:
            other = _entry(kind, row, crop.mirrored(), how, encoder)
            yield dataclasses.replace(other, name=f"{row.key}, mirrored")


def _entry(kind: Kind, row: Row, crop: Crop, how: Preparation, encoder: Encoder) -> Entry:
    """Raises ValueError for a photograph that no group can be made of."""
    own: dict[Unify, float | None] = {
        "raw": None if crop.k_px_m is None else min(crop.k_px_m, MAX_LEVEL),
        "range": None if crop.blur is None else crop.blur.level("range"),
    }
    drawn: list[float] = []
    if kind == "groups":
        drawn = _levels(f"{how.seed} {row.key}", how.renders - 1)
        own = {meaning: 0.0 if level is None else level for meaning, level in own.items()}
        _check_blurs(crop)
    seen: list[NDArray[Any]] = [crop.image, *_maps(crop, drawn)]
    pixels = [fingerprint_of_bytes(values.tobytes()) for values in seen]
    decides = [RULE, kind, how.width_px, how.height_px, encoder.key, drawn, *pixels]
    return Entry(
        name=row.key,
        key=fingerprint_of_bytes(json.dumps(decides).encode()),
        captions=row.captions,
        levels={meaning: [level, *drawn] for meaning, level in own.items()},
        make=functools.partial(_made, crop, how, encoder, drawn),
    )


def _made(crop: Crop, how: Preparation, encoder: Encoder, drawn: list[float]) -> Tensor:
    """Latents [1 + drawn, C, h, w]: the photograph, and renders of it."""
    image = torch.from_numpy(crop.image).to(encoder.device).permute(2, 0, 1).float() / 255
    images = [image]
    if drawn:
        depth, mask = (torch.from_numpy(values).to(encoder.device) for values in _maps(crop, drawn))
        shorter = min(how.width_px, how.height_px) / TRAINING_SIDE_PX
        images += [add_bokeh(image, depth, mask > 0.5, level * shorter, encoder.networks) for level in drawn]
    return encoder(torch.stack(images))


def _maps(crop: Crop, drawn: list[float]) -> list[NDArray[np.float32]]:
    """Depth and mask of what is rendered; without a mask the focus is on the median."""
    if not drawn:
        return []
    assert crop.depth_m is not None
    return [crop.depth_m, np.zeros_like(crop.depth_m) if crop.mask is None else crop.mask]


def _check_blurs(crop: Crop) -> None:
    """Raise ValueError where renders would stay sharp whatever their level: no depth, or a mask of all."""
    depth, mask = (torch.from_numpy(values) for values in _maps(crop, [MAX_LEVEL]))
    radius_px = subject_defocus(depth, mask > 0.5, MAX_LEVEL).abs().max() * PX_PER_UNIT
    if radius_px < LEAST_BLUR * MAX_LEVEL:
        raise ValueError("its mask or depth leaves nothing to blur: a render would be sharp at every level")


def _levels(seed: str, count: int) -> list[float]:
    """One from each of as many equal parts of 1-30, ascending."""
    chance = random.Random(seed)
    step = (MAX_LEVEL - LEAST_LEVEL) / count
    return [round(LEAST_LEVEL + (i + chance.random()) * step, 2) for i in range(count)]


def reasons(left_out: Mapping[str, str]) -> list[str]:
    """How many were left out for what, most first."""
    return [f"left out: {why}: {count}" for why, count in Counter(left_out.values()).most_common()]
