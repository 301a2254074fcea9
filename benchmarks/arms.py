"""The ways to compute a denoising step that benchmarks compare. Another way of ours: an entry of `OURS`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import networks
from benchmarks.networks import Batch
from benchmarks.timing import Arm, first_line, relative_error
from bokehflux.models.fp8 import quantize_mmdit
from bokehflux.models.mmdit import MMDiT

Step = Callable[[], Tensor]
"""One velocity [B, N, 64] of a batch that it was prepared for."""
STOCK_ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""PyTorch's attention kernels, fastest on Hopper first."""


OURS = ("ours", "ours, graph", "ours, compiled", "ours, unfolded", "ours, fp8", "ours, fp8, graph")
"""The words say how each is made from a network in plain bfloat16, whose weights it may share: a CUDA graph
(of steps alone: a run decides by itself), compiled, in fp8, with the adapter beside the weights rather than
folded into them (without levels that would be the same again)."""
RIVALS = ("published, compiled", "published, eager", "diffusers, compiled", "diffusers, eager")
"""Published runs with levels, plain diffusers without."""


@dataclass(frozen=True, kw_only=True)
class StepArm:
    """A network, ours or a rival's, and how it computes a step."""

    name: str
    network: nn.Module
    prepare: Callable[[Batch], Step]
    weight_bytes: int

    @property
    def is_ours(self) -> bool:
        return self.name.startswith("ours")

    def on(self, batch: Batch, exact: Tensor, tera_flop: float | None = None) -> Arm:
        """The arm of a race on one batch. exact: see `networks.exact`."""
        step = self.prepare(batch)
        return Arm(
            name=self.name,
            call=lambda _: step(),
            error=lambda out: relative_error(out[networks.checked_rows(batch)], exact),
            tera_flop=tera_flop,
            is_ours=self.is_ours,
            max_error_ratio=10.0 if "fp8" in self.name else 2.0,
        )


@torch.no_grad()
def build_arms(mmdit: MMDiT, names: Iterable[str], *, with_levels: bool, backend: str) -> list[StepArm]:
    """Those arms that make sense with or without levels; rivals where diffusers is installed.

    backend: attention of ours. All work on the weights of `mmdit` or on copies of what they change.
    """
    arms: list[StepArm] = []
    made: dict[frozenset[str], MMDiT] = {}
    for name in names:
        kind, *words = name.split(", ")
        if kind == "ours" and (with_levels or "unfolded" not in words):
            same = frozenset(words) - {"graph"}
            if same not in made:
                made[same] = our_network(mmdit, same, with_levels)
            step = functools.partial(networks.our_step, made[same], backend=backend, graph="graph" in words)
            size = networks.num_bytes(made[same])
            arms.append(StepArm(name=name, network=made[same], prepare=step, weight_bytes=size))
        elif kind == ("published" if with_levels else "diffusers"):
            arms += rival(mmdit, name)
    return arms


def our_network(mmdit: MMDiT, words: Container[str], with_levels: bool) -> MMDiT:
    """As the words of `OURS` say."""
    network = mmdit
    if with_levels and "unfolded" not in words:  # a folded network makes no step without levels
        network = networks.folded(mmdit)
    elif "compiled" in words or "fp8" in words:
        network = networks.on_same_weights(mmdit)
    if "compiled" in words:
        network.compile_blocks()
    if "fp8" in words:
        quantize_mmdit(network)
    return network


def rival(mmdit: MMDiT, name: str) -> list[StepArm]:
    """One arm; none, with a line that says why, where diffusers is not installed."""
    try:
        from tests.oracle import rivals
    except ImportError as error:
        print(f"no {name}: {first_line(error)}")
        return []
    kind, how = name.split(", ")
    build, step = rivals.KINDS[kind]
    model, size = build(mmdit, compile=how == "compiled"), networks.num_bytes(mmdit)
    if kind == "diffusers" and mmdit.bokeh is not None:
        size -= networks.num_bytes(mmdit.bokeh)
    return [StepArm(name=name, network=model, prepare=functools.partial(step, model), weight_bytes=size)]


@contextlib.contextmanager
def best_stock_attention() -> Iterator[None]:
    """Inside, PyTorch's attention takes the fastest kernel that can: for every arm alike."""
    with sdpa_kernel(STOCK_ORDER, set_priority=True):
        yield


def allow_recompiling() -> None:
    """Blocks of two kinds for several shapes: more variants than dynamo's default allows.

    Running into the limit would time eager code under the name of compiled code, so it is an error.
    """
    config = {"recompile_limit": 128, "cache_size_limit": 128, "fail_on_recompile_limit_hit": True}
    for name, value in config.items():
        if hasattr(torch._dynamo.config, name):  # they differ from version to version
            setattr(torch._dynamo.config, name, value)
