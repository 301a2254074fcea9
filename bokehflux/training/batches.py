"""Which samples a step takes, and the random numbers that each of them brings.

Samples are counted over the whole run. Whatever is random about one is a function of the run's seed and its
number alone: a run that was resumed, that is spread over more processes or that takes fewer rows at a time
sees the same samples, and no two processes ever share noise. The numbers are those of SplitMix64 (Steele et
al. 2014), computed where they are needed rather than drawn in turn; uniform ones are equal on all devices.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

_GOLDEN = -0x61C8864680B583EB
"""2^64 divided by the golden ratio, as a signed number: SplitMix64's increment."""
_LOW = 2**32 - 1


@dataclass(frozen=True, kw_only=True)
class Draws:
    """The random numbers of B samples: by name, so that a further draw changes none of the others."""

    seed: int
    samples: range
    """Their numbers in the run."""
    batch: int
    """Samples of the whole step, these among them, over all processes."""
    device: torch.device
    group: int = 1
    """Rows that each of them stands for (`groups`)."""

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
        return cls(seed=seed, samples=range(first, first + rows), batch=batch, device=device)

    def __len__(self) -> int:
        return len(self.samples)

    def every(self, size: int) -> Draws:
        """One sample out of each `size`, and none of the others."""
        return dataclasses.replace(self, samples=self.samples[::size], batch=self.batch // size)

    def groups(self, size: int) -> Draws:
        """Those that the rows of each group of `size` have in common. Raises ValueError for broken groups."""
        if len(self) % size or self.samples.start % size:
            raise ValueError(f"samples {self.samples} are not whole groups of {size}")
        together = range(self.samples.start // size, self.samples.stop // size)
        return dataclasses.replace(self, samples=together, batch=self.batch // size, group=size)

    def parts(self, rows: int) -> list[Draws]:
        """The same samples, `rows` at a time. Raises ValueError unless they come out even."""
        if len(self) % rows:
            raise ValueError(f"{len(self)} samples are not whole parts of {rows}")
        starts = range(0, len(self), rows)
        return [dataclasses.replace(self, samples=self.samples[i : i + rows]) for i in starts]

    def on(self, device: torch.device) -> Draws:
        """The same on another device: on the CPU, reading them waits for nothing."""
        return dataclasses.replace(self, device=device)

    def uniform(self, name: str, *shape: int) -> Tensor:
        """[B, *shape] float32 in 0-1, 1 excluded."""
        return (self._bits(name, *shape) >> 40 & (2**24 - 1)).float() * 2.0**-24

    def spread(self, name: str) -> Tensor:
        """[B] as `uniform`, but the samples of a step fall one into each of as many equal parts of 0-1."""
        return (self._numbers() % self.batch + self.uniform(name)) / self.batch

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
        digest = hashlib.blake2b(f"{self.seed} {self.group} {name}".encode(), digest_size=8).digest()
        start = int.from_bytes(digest, "little", signed=True)
        keys = _mix(self._numbers() * _GOLDEN + start).view(-1, *[1] * len(shape))
        places = torch.arange(1, math.prod(shape) + 1, device=keys.device).view(1, *shape)
        return _mix(keys + places * _GOLDEN).view(-1, *shape)

    def _numbers(self) -> Tensor:
        """[B] int64"""
        return torch.arange(self.samples.start, self.samples.stop, self.samples.step, device=self.device)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser, on int64 that wrap around. `>>` keeps the sign: the mask takes it away."""
    x = (x ^ (x >> 30 & 2**34 - 1)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27 & 2**37 - 1)) * -0x6B2FB644ECCEEE15
    return x ^ (x >> 31 & 2**33 - 1)
