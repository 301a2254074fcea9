"""The ways to compute a denoising step that benchmarks compare. Another way of ours: an entry of `OURS`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import networks
from benchmarks.networks import Batch
from benchmarks.report import first_line
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

    with_levels: Callable[[MMDiT], MMDiT]
    base: Callable[[MMDiT], MMDiT] | None
    """For the base model, as a folded network makes no step without levels; None: nothing of its own."""
    graph: bool = False
    """Replayed as a CUDA graph. For steps alone: a run decides by itself whether to use one."""
    max_error_ratio: float = 2.0
    """Largest error that passes, as a multiple of the comparison arms' best."""


def same(mmdit: MMDiT) -> MMDiT:
    return mmdit


def folded_in_fp8(mmdit: MMDiT) -> MMDiT:
    return networks.in_fp8(networks.folded(mmdit))


def base_in_fp8(mmdit: MMDiT) -> MMDiT:
    return networks.in_fp8(networks.on_same_weights(mmdit))


OURS: dict[str, Ours] = {
    "ours": Ours(with_levels=networks.folded, base=same),
    "ours, graph": Ours(with_levels=networks.folded, base=same, graph=True),
    "ours, compiled": Ours(
        with_levels=lambda mmdit: networks.compiled(networks.folded(mmdit)),
        base=lambda mmdit: networks.compiled(networks.on_same_weights(mmdit)),
    ),
    "ours, unfolded": Ours(with_levels=same, base=None),
    "ours, fp8": Ours(with_levels=folded_in_fp8, base=base_in_fp8, max_error_ratio=10.0),
    "ours, fp8, graph": Ours(with_levels=folded_in_fp8, base=base_in_fp8, graph=True, max_error_ratio=10.0),
}
"""By name; the first is profiled. Where there are levels, all but one have the adapter folded in."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to compute a step."""

    name: str
    network: nn.Module
    prepare: Callable[[Batch], Step]
    weight_bytes: int
    is_ours: bool = True
    max_error_ratio: float = 2.0


@torch.no_grad()
def build_arms(
    mmdit: MMDiT,
    *,
    with_levels: bool,
    backend: str = "auto",
    wanted: Sequence[str] = ("",),
    graphs: bool = True,
) -> list[Arm]:
    """Arms whose name contains one of `wanted`, or equals what stands before a `$`.

    Ours first; those of diffusers where it is installed.

    backend: attention of ours. graphs: with those that are CUDA graphs. All work on the weights of `mmdit` or
    on copies of what they change.
    """

    def is_wanted(name: str) -> bool:
        return any(name == part[:-1] if part.endswith("$") else part in name for part in wanted)

    arms = []
    made: dict[Callable[[MMDiT], MMDiT], MMDiT] = {}
    for name, way in OURS.items():
        if not is_wanted(name) or (way.graph and not graphs):
            continue
        make = way.with_levels if with_levels else way.base
        if make is None:
            continue
        network = made[make] = made[make] if make in made else make(mmdit)
        arms.append(
            Arm(
                name=name,
                network=network,
                prepare=lambda batch, network=network, graph=way.graph: networks.our_step(
                    network, batch, backend, graph
                ),
                weight_bytes=networks.num_bytes(network),
                max_error_ratio=way.max_error_ratio,
            )
        )
    kind = "published" if with_levels else "diffusers"
    names = {f"{kind}, compiled": True, f"{kind}, eager": False}
    if not any(map(is_wanted, names)):
        return arms
    try:
        from benchmarks import rivals
    except ImportError as error:
        print(f"no comparison arms: {first_line(error)}")
        return arms
    adapter_bytes = networks.num_bytes(mmdit.bokeh) if mmdit.bokeh is not None else 0
    for name, compile in names.items():
        if not is_wanted(name):
            continue
        model: nn.Module
        if with_levels:
            model, step = rivals.published_model(mmdit, compile=compile), rivals.published_step
        else:
            model, step = rivals.diffusers_model(mmdit, compile=compile), rivals.diffusers_step
        arms.append(
            Arm(
                name=name,
                network=model,
                prepare=lambda batch, model=model, step=step: step(model, batch),  # type: ignore[misc]
                weight_bytes=networks.num_bytes(mmdit) - (0 if with_levels else adapter_bytes),
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
