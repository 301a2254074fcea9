"""Where a pivot's queries and keys wait for its targets: a whole run of them, or those of one block.

A pivot's path does not depend on its targets. With its velocity of every step, and its queries and keys of
every grounded step and block, a further level of the same scene costs one row. In bfloat16 one step of 57
blocks takes 1.1 GB at 512 x 512 and 3.2 GB at 1024 x 1024.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bokehflux.sampling.samplers import Velocity


class PivotCache:
    """Everything later targets need of a pivot: the first run of a scene fills the cache, later runs read it.

    device: where tensors are kept. None leaves them where they were computed; "cpu" takes host memory
    (pinned, for a CUDA device) and copies each block's share back during the run.
    """

    def __init__(self, device: str | torch.device | None = None) -> None:
        self.device = None if device is None else torch.device(device)
        self.scene: dict[str, Any] | None = None
        """The settings that made the pivot; None while the cache is empty."""
        self._kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._velocities: dict[int, Tensor] = {}

    def put(self, step: int, block: int, q: Tensor, k: Tensor) -> None:
        """Keep a pivot's query and key [1, L, H, D] of one block."""
        self._kept[step, block] = (self._keep(q), self._keep(k))

    def get(self, step: int, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Query and key [1, L, H, D] on `device`. Raises ValueError for a step that was not grounded."""
        if (step, block) not in self._kept:
            raise ValueError(f"the pivot cache holds nothing for step {step}, block {block}")
        q, k = self._kept[step, block]
        return q.to(device, non_blocking=True), k.to(device, non_blocking=True)

    def recorded(self, velocity: Velocity) -> Velocity:
        """The same velocity; what it gives for row 0, the pivot, is kept."""

        def follow(x: Tensor, sigma: Tensor, step: int) -> Tensor:
            v = velocity(x, sigma, step)  # [B, N, C]
            self._velocities[step] = self._keep(v[:1])
            return v

        return follow

    def velocity(self, x: Tensor, sigma: Tensor, step: int) -> Tensor:
        """The pivot's own, [1, N, C], as it was kept; on the device of x."""
        return self._velocities[step].to(x.device, non_blocking=True)

    def replayed(self, velocity: Velocity) -> Velocity:
        """A velocity of the pivot, in row 0 and as it was kept, and of targets that follow it as `velocity`
        says."""

        def follow(x: Tensor, sigma: Tensor, step: int) -> Tensor:
            return torch.cat([self.velocity(x, sigma, step), velocity(x[1:], sigma, step)])  # [B, N, C]

        return follow

    def finish(self, scene: dict[str, Any]) -> None:
        """Mark the cache as filled by a run of `scene`."""
        self.scene = scene

    def check(self, scene: dict[str, Any]) -> None:
        """Raise ValueError, naming what differs, unless the cache was filled by a run of `scene`."""
        mine = self.scene or {}
        changed = [
            f"{key} {mine.get(key)!r} -> {value!r}" for key, value in scene.items() if mine.get(key) != value
        ]
        if changed:
            raise ValueError(
                f"the pivot cache holds another scene ({', '.join(changed)}): use a new PivotCache"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of all queries and keys."""
        return sum(t.nbytes for pair in self._kept.values() for t in pair)

    def _keep(self, x: Tensor) -> Tensor:
        device = self.device or x.device
        if device.type == "cpu" and x.is_cuda:
            # Pinned, so that neither this copy nor the one back waits for the GPU.
            host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            return host.copy_(x, non_blocking=True)
        return x.to(device, copy=True)  # never a view, which would hold every row


class BlockPivot:
    """A pivot's query and key of the current block, for the batches of the same step that come after it."""

    def __init__(self, readers: int) -> None:
        self.readers = readers
        """How many batches read each block's entry; the last reader frees it."""
        self._kept: tuple[tuple[int, int], tuple[Tensor, Tensor]] | None = None
        self._asked = 0

    def put(self, step: int, block: int, q: Tensor, k: Tensor) -> None:
        """Keep a pivot's query and key [1, L, H, D] of one block, in place of the block before."""
        self._kept, self._asked = ((step, block), (q, k)), 0

    def holds(self, step: int, block: int) -> bool:
        """Whether this block's is the one that is kept."""
        return self._kept is not None and self._kept[0] == (step, block)

    def get(self, step: int, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Query and key [1, L, H, D]. Raises ValueError for any other block than the one kept."""
        if self._kept is None or not self.holds(step, block):
            raise ValueError(
                f"no pivot is kept for step {step}, block {block}: its batch comes before its targets'"
            )
        found = self._kept[1]
        self._asked += 1
        if self._asked == self.readers:
            self._kept = None
        return found
