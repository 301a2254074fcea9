"""`benchmarks.full_size_error` on the GPU, at a toy's size: every case within twice the published error."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import full_size_error


@pytest.mark.parametrize("seed", [0, 1])
def test_bfloat16_error(seed):
    measurements = full_size_error.run(full_size_error.TINY, torch.device("cuda"), seed)
    assert {m.arm for m in measurements} == {"published", "ours", "ours, 2 targets"}
    assert all(0 < m.error < 0.05 for m in measurements)
    assert all(m.passed for m in measurements), [m for m in measurements if not m.passed]


def test_report(tmp_path):
    assert full_size_error.main(["--tiny", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "full_size_error.json").read_text())
    assert report["passed"] and report["peak_memory_gib"] > 0
