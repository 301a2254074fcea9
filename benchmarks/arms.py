"""The ways to compute a denoising step that benchmarks compare. Another way of ours: an entry of `OURS`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import networks
from benchmarks.networks import Batch
from benchmarks.timing import Arm, first_line
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


@dataclass(frozen=True, kw_only=True)
class Ours:
    """How a network of ours is made from one in plain bfloat16, whose weights it may share."""

    fold: bool = True
    """The adapter is folded into the weights. Without levels, an unfolded arm would be the same again."""
    compile: bool = False
    fp8: bool = False
    graph: bool = False
    """Replayed as a CUDA graph. For steps alone: a run decides by itself whether to use one."""

    @property
    def max_error_ratio(self) -> float:
        """Largest error that passes, as a multiple of the comparison arms' best."""
        return 10.0 if self.fp8 else 2.0

    def network(self, mmdit: MMDiT, with_levels: bool) -> MMDiT:
        network = mmdit
        if with_levels and self.fold:  # a folded network makes no step without levels
            network = networks.folded(mmdit)
        elif self.compile or self.fp8:
            network = networks.on_same_weights(mmdit)
        if self.compile:
            network.compile_blocks()
        if self.fp8:
            quantize_mmdit(network)
        return network


OURS = {
    "ours": Ours(),
    "ours, graph": Ours(graph=True),
    "ours, compiled": Ours(compile=True),
    "ours, unfolded": Ours(fold=False),
    "ours, fp8": Ours(fp8=True),
    "ours, fp8, graph": Ours(fp8=True, graph=True),
}
RIVALS = {
    "published, compiled": True,
    "published, eager": False,
    "diffusers, compiled": True,
    "diffusers, eager": False,
}
"""Name -> whether its blocks are compiled. Published runs with levels, plain diffusers without."""


@dataclass(frozen=True, kw_only=True)
class StepArm:
    """A network, ours or a rival's, and how it computes a step."""

    name: str
    network: nn.Module
    prepare: Callable[[Batch], Step]
    weight_bytes: int
    is_ours: bool = True
    max_error_ratio: float = 2.0

    def on(self, batch: Batch, exact: Tensor, tera_flop: float | None = None) -> Arm:
        """The arm of a race on one batch. exact: see `networks.exact`."""
        step = self.prepare(batch)
        return Arm(
            name=self.name,
            call=lambda _: step(),
            error=lambda out: networks.relative_error(out, batch, exact),
            tera_flop=tera_flop,
            is_ours=self.is_ours,
            max_error_ratio=self.max_error_ratio,
        )


@torch.no_grad()
def build_arms(
    mmdit: MMDiT, *, with_levels: bool, wants: Callable[[str], bool], backend: str, graphs: bool = True
) -> list[StepArm]:
    """Arms that are wanted by name, ours first; rivals where diffusers is installed.

    backend: attention of ours. graphs: with those that are CUDA graphs. All work on the weights of `mmdit` or
    on copies of what they change.
    """
    arms = []
    made: dict[Ours, MMDiT] = {}
    for name, way in OURS.items():
        if not wants(name) or (way.graph and not graphs) or not (way.fold or with_levels):
            continue
        same = dataclasses.replace(way, graph=False)
        if same not in made:
            made[same] = way.network(mmdit, with_levels)
        arms.append(
            StepArm(
                name=name,
                network=made[same],
                prepare=functools.partial(networks.our_step, made[same], backend=backend, graph=way.graph),
                weight_bytes=networks.num_bytes(made[same]),
                max_error_ratio=way.max_error_ratio,
            )
        )
    kind = "published" if with_levels else "diffusers"
    rivals = [name for name in RIVALS if name.startswith(kind) and wants(name)]
    return arms + (build_rivals(mmdit, rivals) if rivals else [])


def build_rivals(mmdit: MMDiT, names: Sequence[str]) -> list[StepArm]:
    """None of them, with a line that says why, where diffusers is not installed."""
    try:
        from tests.oracle import rivals
    except ImportError as error:
        print(f"no comparison arms: {first_line(error)}")
        return []
    adapter_bytes = networks.num_bytes(mmdit.bokeh) if mmdit.bokeh is not None else 0
    arms = []
    for name in names:
        is_published = name.startswith("published")
        build = rivals.published_model if is_published else rivals.diffusers_model
        step = rivals.published_step if is_published else rivals.diffusers_step
        model = build(mmdit, compile=RIVALS[name])
        arms.append(
            StepArm(
                name=name,
                network=model,
                prepare=functools.partial(step, model),
                weight_bytes=networks.num_bytes(mmdit) - (0 if is_published else adapter_bytes),
                is_ours=False,
            )
        )
    return arms


@contextlib.contextmanager
def best_stock_attention() -> Iterator[None]:
    """Inside, PyTorch's attention takes the fastest kernel that can: for every arm alike."""
    with sdpa_kernel(STOCK_ORDER, set_priority=True):
        yield


def allow_recompiling() -> None:
    """Blocks of two kinds for several shapes: more variants than dynamo's default allows.

    Running into the limit would time eager code under the name of compiled code, so it is an error.
    """
    config = torch._dynamo.config
    for name in ("recompile_limit", "cache_size_limit"):
        if hasattr(config, name):
            setattr(config, name, 128)
    if hasattr(config, "fail_on_recompile_limit_hit"):
        config.fail_on_recompile_limit_hit = True
