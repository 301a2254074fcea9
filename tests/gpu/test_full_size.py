"""A step's error on the GPU, at a toy's size: every case within twice the published error."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")

from benchmarks.cases import step  # noqa: E402
from benchmarks.registry import Session  # noqa: E402
from benchmarks.timing import Budget  # noqa: E402


def test_bfloat16_error() -> None:
    cases = {name: case for name, case in step.cases(tiny=True).items() if case[0] in ("pair", "one row")}
    session = Session(
        device=torch.device("cuda"), tiny=True, cases=cases, arms=["ours, unfolded", "published, eager"],
        repeats=1, backend="auto", budget=Budget(600),
    )  # fmt: skip
    rows = [row for rows in step.measure(session) for row in rows]
    assert len(rows) == 2 * 2 * 2 * 2 and all(0 < row["error"] < 0.05 for row in rows)
    assert [row for row in rows if row["verdict"] != "ok"] == []
