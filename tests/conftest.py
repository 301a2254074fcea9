"""Marks tests by folder and fixes what would make them depend on the machine."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

# No deadline: a shared machine is slow at times. Derandomised: a failure must come back on the next run.
hypothesis.settings.register_profile("bokehflux", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("bokehflux")
# Without a GPU Triton's kernels run in its interpreter, which must be said before triton is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Toy sizes: a second thread costs more than it brings, even in the programs that tests start.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell's background jobs ignore Ctrl-C; here and in the programs that tests start it is heard.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    without_gpu = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        folder = Path(item.path).parent.name
        if folder in ("parity", "gpu"):
            item.add_marker(folder)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(without_gpu)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory is NaN: what a kernel reads before it is written, or leaves unwritten, shows."""

    def poison(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(*args: Any, **options: Any) -> torch.Tensor:
            x = make(*args, **options)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        return made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


@pytest.fixture
def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., torch.device]]:
    """A CUDA device that need not be there: pretend_gpu(family of `tiles`, version of Triton or None)."""
    from bokehflux.kernels import dispatch
    from bokehflux.kernels.attention import select, tiles

    caches = (
        dispatch.why_not,
        dispatch.runs_triton,
        select.why_not_gluon,
        select._log_choice,
        select._warn_off,
    )

    def pretend(family: str, triton: tuple[int, int] | None) -> torch.device:
        for cached in caches:
            cached.cache_clear()
        capability = (9, 0) if family == tiles.HOPPER else (8, 0)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(tiles, "device", lambda of: tiles.Device(family=family, num_sms=132))
        monkeypatch.setattr(dispatch, "triton_version", lambda: triton)
        return torch.device("cuda", 0)

    yield pretend
    for cached in caches:
        cached.cache_clear()
