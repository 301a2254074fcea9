"""A run on several processes, each with its share of every batch. Without torch.distributed: one of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh

from bokehflux.models.units import Network

At = TypeVar("At")
Scalars = tuple[Tensor, dict[str, Tensor]]
"""A loss, and the scalars to log for it."""


def rank_and_world() -> tuple[int, int]:
    """The number of this process, and how many there are."""
    shared = distributed.is_available() and distributed.is_initialized()
    return (distributed.get_rank(), distributed.get_world_size()) if shared else (0, 1)


def shard(network: Network, device: torch.device) -> None:
    """Spread a frozen network over the processes: each holds a part of every unit on its device.

    A unit comes together while it runs, there and back (FSDP2). Call it before an adapter is added, which is
    trained on every process alike. Needs PyTorch 2.6.
    """
    from torch.distributed.fsdp import fully_shard

    mesh, units = init_device_mesh(device.type, (rank_and_world()[1],)), network.units()
    network.requires_grad_(False)
    for unit in (*units.ahead, *units.blocks, network):  # inner ones first
        fully_shard(unit, mesh=mesh)


class _Objective(nn.Module):
    """A loss in the form that DistributedDataParallel takes: a module with the parameters it depends on."""

    def __init__(self, loss: Callable[..., Scalars], parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.loss = loss
        self.trained = nn.ParameterList(parameters)

    def forward(self, at: object) -> Scalars:
        return self.loss(at)


def averaged(loss: Callable[[At], Scalars], parameters: Sequence[nn.Parameter]) -> Callable[[At], Scalars]:
    """The loss, whose gradients and figures become those of all processes: the mean of their means."""
    world = rank_and_world()[1]
    if world == 1:
        return loss
    objective = nn.parallel.DistributedDataParallel(_Objective(loss, parameters))

    def shared(at: At) -> Scalars:
        value, figures = objective(at)
        together = torch.stack([figure.detach() for figure in figures.values()])
        distributed.all_reduce(together)
        return value, dict(zip(figures, together / world, strict=True))

    return shared
