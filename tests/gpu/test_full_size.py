"""`benchmarks.full_size_error` on the GPU, at a toy's size: every case within twice the published error."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")

from benchmarks import full_size_error  # noqa: E402
from benchmarks.networks import TINY  # noqa: E402


@pytest.mark.parametrize("seed", [0, 1])
def test_bfloat16_error(seed: int) -> None:
    rows = list(full_size_error.run(TINY, torch.device("cuda"), seed, limit=2.0))
    assert len(rows) == 2 * 2 * 2 and all(0 < row["error"] < 0.05 for row in rows)
    assert [row for row in rows if row["verdict"] != "pass"] == []
