"""Marks tests by folder and fixes what would make them depend on the machine."""

from __future__ import annotations

import os
from pathlib import Path

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
