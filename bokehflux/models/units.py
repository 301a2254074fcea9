"""What a network says about itself to whoever moves, shards, quantises, initialises or trains it.

They ask `units()`; none of them knows a network's class or the names of its parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from bokehflux.models.linear import Linear


@dataclass(frozen=True, kw_only=True, eq=False)
class Units:
    """The modules of a network whose parameters are needed only while they are called.

    A unit may be away, or sharded, between its calls. What lies in no unit is small and read all the time.
    """

    blocks: tuple[nn.Module, ...] = ()
    """In the order in which they run."""
    ahead: tuple[nn.Module, ...] = ()
    """Called before the blocks, in this order, although most lie inside blocks: modulations, T5's position
    bias."""
    values: tuple[nn.Module, ...] = ()
    """The adapter's value layers, in the order of their calls: once for the levels of a run."""
    unread: tuple[nn.Parameter, ...] = ()
    """What no call reads: kept because its file holds it."""
    projections: Mapping[str, Linear] = field(default_factory=dict)
    """By name, the layers that do the blocks' work: the ones that may multiply in fp8."""
    folded: bool = False
    """Whether an adapter is part of the weights now, so that nothing may be added to them."""
    matrices: tuple[Tensor, ...] = ()
    """Weights [out, in] or filters [out, in, h, w] between hidden states: the ones that Muon trains."""

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """Every unit, inner ones before the blocks they lie in: the order for `fully_shard`.

        Ask for `units()` again afterwards: sharding replaces parameters.
        """
        return self.ahead + self.values + self.blocks

    def own(self, unit: nn.Module) -> list[nn.Parameter]:
        """The parameters that only calls of this unit read: a block's without those of `ahead`."""
        apart = {id(p) for layer in self.ahead if layer is not unit for p in layer.parameters()}
        return [p for p in unit.parameters() if id(p) not in apart]


class Network(nn.Module):
    """A network that describes itself. One that says nothing is moved as a whole."""

    def units(self) -> Units:
        return Units()
