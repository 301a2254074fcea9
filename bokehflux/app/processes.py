"""Commands on several GPUs: a process for each, started here by PyTorch's elastic launcher, or by torchrun.

Scenes of a sweep are claimed one by one, by each process when it is done with the last. Where they share the
rows or tokens of a scene, the first (rank 0) is the command as it is on one GPU, and the others follow it.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from bokehflux.app.terminal import say

if TYPE_CHECKING:
    from torch.distributed import Store

    from bokehflux.sampling.ranks import Ranks
    from bokehflux.settings import Settings

Asked = TypeVar("Asked", bound="Settings")
SPLITS = ("scenes", "rows", "tokens")
DEAD = (-signal.SIGTERM, -signal.SIGINT)
"""How the launcher ends the others when one process has ended badly."""
DAYS = timedelta(days=30)
"""How long one waits for another. The launcher ends all of them when one has died."""


def inside() -> bool:
    """Whether this is one of several processes that a launcher has started."""
    return "WORLD_SIZE" in os.environ


@dataclass(frozen=True, kw_only=True)
class Team:
    """The processes of a command, as one of them sees them."""

    rank: int = 0
    size: int = 1
    split: str | None = None
    """What they share: one of `SPLITS`."""
    store: Store | None = None
    ranks: Ranks

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @property
    def shares_scenes(self) -> bool:
        return self.split == "scenes"

    @property
    def follows(self) -> bool:
        """Whether this process does what the first announces, and nothing else."""
        return not self.leads and not self.shares_scenes

    def agreed(self, asked: Sequence[Asked]) -> Sequence[Asked]:
        """What the first process was asked for: random seeds, for instance, are its own."""
        if self.store is None:
            return asked
        import pickle  # most commands are one process, and begin at once

        if self.leads:
            self.store.set("asked", pickle.dumps(asked).hex())
        return pickle.loads(bytes.fromhex(self.store.get("asked").decode()))

    def claimed(self, count: int) -> Iterator[int]:
        """Numbers below `count` that no other process gets, each when the one before is done."""
        assert self.store is not None
        while (number := self.store.add("claimed", 1) - 1) < count:
            yield number

    def ends_last(self) -> bool:
        """Whether all others have come here before. Call it once."""
        assert self.store is not None
        return self.store.add("ended", 1) == self.size

    def announce(self, settings: Settings | None) -> None:
        """Tell the followers what is made next; None: nothing."""
        if self.size > 1 and self.leads and not self.shares_scenes:
            self._broadcast(settings)

    def announced(self) -> Iterator[Settings]:
        """What the first process makes, until it is done."""
        while (settings := self._broadcast(None)) is not None:
            yield settings

    def _broadcast(self, settings: Settings | None) -> Settings | None:
        import torch
        from torch import distributed

        told: list[Settings | None] = [settings]
        distributed.broadcast_object_list(told, device=torch.device("cpu"))
        return told[0]


def on_gpus(args: argparse.Namespace, asked: Sequence[Settings], work: Callable[[Team], object]) -> int:
    """Do the work in this process, or in as many as the flags ask for; returns the exit code.

    asked: all scenes. Raises ValueError for devices that are not there.
    """
    from bokehflux.sampling.ranks import ALONE

    split = args.split or ("scenes" if len(asked) > 1 else "rows" if asked[0].num_rows > 1 else "tokens")
    if split == "scenes" and args.command != "sweep":
        raise ValueError("--split scenes is for sweeps: one picture's GPUs share its rows or tokens")
    count = int(os.environ["WORLD_SIZE"]) if inside() else args.gpus
    if args.preview is not None and split == "scenes" and count > 1:
        raise ValueError("--preview shows one scene, and several processes make several: leave it out")
    if inside():
        with _joined(args, split) as team:
            work(team)
        return 0
    if args.gpus == 1:
        work(Team(ranks=ALONE))
        return 0
    _check(args)
    if split != "scenes":
        return _launch(args.words, args.gpus)[0]
    for count in range(args.gpus, 0, -1):
        code, killed = _launch(args.words, count)
        if killed is None:
            return code
        if count > 1:
            say(f"scenes that are not finished go to the other {count - 1}")
    return code


def _check(args: argparse.Namespace) -> None:
    import torch

    if args.gpus < 1:
        raise ValueError(f"--gpus must be at least 1, got {args.gpus}")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cuda", "cpu"):
        raise ValueError(f"--gpus takes --device cuda, or cpu for processes without a GPU, not {device}")
    if device == "cuda" and args.gpus > torch.cuda.device_count():
        raise ValueError(f"--gpus {args.gpus}: this machine shows {torch.cuda.device_count()} CUDA device(s)")


def take_own_gpu(args: argparse.Namespace) -> None:
    """Make `args.device` the GPU of this process's number on its machine, unless another device is named.

    Before anything else asks for "cuda": that is the first one, in which every process would take memory.
    """
    import torch

    if torch.cuda.is_available() and args.device in (None, "cuda"):
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(torch.device(args.device))


@contextmanager
def group(backend: str | None = None, **how: Any) -> Iterator[None]:
    """PyTorch's default group of processes inside. Afterwards none of its threads is left.

    One that frees a tensor while Python ends takes the whole process with it (SIGABRT, pytorch #190489).
    """
    import gc

    # Defaults of its functions would hold the group that is there when it is first imported.
    import torch.distributed.nn  # noqa: F401
    from torch import distributed

    distributed.init_process_group(backend, timeout=DAYS, **how)
    yield
    distributed.destroy_process_group()
    gc.collect()  # what is wrapped for several processes refers to itself


@contextmanager
def _joined(args: argparse.Namespace, split: str) -> Iterator[Team]:
    """This process's place among the others, and its device; what ends one of them is said once."""
    from torch import distributed

    from bokehflux.sampling.ranks import ALONE, RowsOverRanks, TokensOverRanks

    take_own_gpu(args)
    store, rank, size = next(iter(distributed.rendezvous("env://", timeout=DAYS)))
    kind = "cuda" if (args.device or "").startswith("cuda") else "cpu"
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"  # gloo for what is announced
    alone = split == "scenes"
    try:
        with nullcontext() if alone else group(backend, store=store, rank=rank, world_size=size):
            ranks: Ranks = ALONE
            if not alone:
                mesh = distributed.device_mesh.init_device_mesh(kind, (size,))
                ranks = RowsOverRanks(mesh) if split == "rows" else TokensOverRanks(mesh)
            team = Team(rank=rank, size=size, split=split, store=store, ranks=ranks)
            yield team
            team.announce(None)
    except (ValueError, OSError, ArithmeticError, MemoryError) as error:
        if store.add(f"said {error}", 1) > 1:
            raise SystemExit(2) from error
        raise
    except RuntimeError as error:
        if "peer" not in str(error):  # gloo's word for a process that is gone
            raise
        raise SystemExit(1) from error


def _launch(words: Sequence[str], count: int) -> tuple[int, str | None]:
    """The command in so many processes: its exit code, and the signal that killed one of them."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=count, run_id=os.urandom(16).hex(), rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=0, monitor_interval=0.1,
    )  # fmt: skip
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # we say it in one line
    try:
        elastic_launch(config, sys.executable)("-m", "bokehflux", *words)
    except SignalException as ended:
        return 128 + ended.sigval, None
    except ChildFailedError as failed:
        ends = [(failure.exitcode, rank) for rank, failure in failed.failures.items()]
        code, rank = min(ends, key=lambda end: (end[0] in DEAD, end[0]))
        if code > 0:
            return code, None
        name = signal.Signals(-code).name
        say(f"error: process {rank} of {count} was killed ({name}), and the others were ended with it")
        return 1, name
    return 0, None
