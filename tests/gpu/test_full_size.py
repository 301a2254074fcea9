"""`full_size_error` on the GPU, at a toy's size: every case within twice the published error."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")

from benchmarks.cases import full_size_error  # noqa: E402


@pytest.mark.parametrize("seed", [0, 1])
def test_bfloat16_error(seed: int) -> None:
    names = full_size_error.cases(tiny=True)
    rows = full_size_error.compare(True, names, torch.device("cuda"), seed)
    assert len(rows) == 2 * 2 * 2 and all(0 < row["error"] < 0.05 for row in rows)
    assert [row for row in rows if row["verdict"] != "ok"] == []
