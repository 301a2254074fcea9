"""Which samples a step takes, and the random numbers that each of them brings.

Samples are counted over the whole run. Whatever is random about one is a function of the run's seed and its
number alone: a run that was resumed, that is spread over more processes or that takes fewer rows at a time
sees the same samples, and no two processes ever share noise. The numbers are those of SplitMix64 (Steele et
al. 2014), computed where they are needed rather than drawn in turn; uniform ones are equal on all devices.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

_GOLDEN = -0x61C8864680B583EB
"""2^64 divided by the golden ratio, as a signed number: SplitMix64's increment."""
_LOW = 2**32 - 1


@dataclass(frozen=True, eq=False)
class Draws:
    """The random numbers of B samples: by name, so that a further draw changes none of the others."""

    seed: int
    samples: Tensor
    """[B] int64, their numbers in the run."""

    @classmethod
    def of_step(
        cls, seed: int, step: int, batch: int, device: torch.device, rank: int = 0, world: int = 1
    ) -> Draws:
        """Those of one of `world` processes in a step of `batch` samples.

        Raises ValueError unless `world` divides the batch.
        """
        rows, left = divmod(batch, world)
        if left:
            raise ValueError(f"batch must be a multiple of the {world} processes, got {batch}")
        first = step * batch + rank * rows
        return cls(seed, torch.arange(first, first + rows, device=device))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: slice) -> Draws:
        return Draws(self.seed, self.samples[index])

    def groups(self, size: int) -> Draws:
        """One sample for each `size` of them in a row: what the rows of a group have in common."""
        if len(self) % size:
            raise ValueError(f"{len(self)} rows are not whole groups of {size}")
        return Draws(self.seed, self.samples[::size] // size)

    def uniform(self, name: str, *shape: int) -> Tensor:
        """[B, *shape] float32 in 0-1, 1 excluded."""
        return (self._bits(name, *shape) >> 40 & (2**24 - 1)).float() * 2.0**-24

    def integers(self, name: str, below: int, *shape: int) -> Tensor:
        """[B, *shape] int64 from 0 to below - 1."""
        return (self._bits(name, *shape) >> 32 & _LOW) * below >> 32

    def normal(self, name: str, *shape: int) -> Tensor:
        """[B, *shape] float32 of mean 0 and variance 1."""
        bits = self._bits(name, *shape)
        # Box and Muller: the upper half of the bits gives the radius, the lower half the angle.
        radius = (-2 * (((bits >> 32 & _LOW).float() + 0.5) * 2.0**-32).log()).sqrt()
        return radius * ((bits & _LOW).float() * (math.tau * 2.0**-32)).cos()

    def _bits(self, name: str, *shape: int) -> Tensor:
        """[B, *shape] int64, all 64 bits random."""
        digest = hashlib.blake2b(f"{self.seed} {name}".encode(), digest_size=8).digest()
        start = int.from_bytes(digest, "little", signed=True)
        keys = _mix(self.samples * _GOLDEN + start).view(-1, *[1] * len(shape))
        places = torch.arange(1, math.prod(shape) + 1, device=keys.device).view(1, *shape)
        return _mix(keys + places * _GOLDEN).view(-1, *shape)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser, on int64 that wrap around. `>>` keeps the sign: the mask takes it away."""
    x = (x ^ (x >> 30 & 2**34 - 1)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27 & 2**37 - 1)) * -0x6B2FB644ECCEEE15
    return x ^ (x >> 31 & 2**33 - 1)
