"""The programs in docs/research.md, run as they stand there, on a tiny model in place of the bundled one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import bokehflux
from bokehflux.attention import Grounded, PivotQuery
from bokehflux.pipeline.pipeline import Pipeline
from bokehflux.sampling.samplers import euler
from bokehflux.sampling.schedule import sigmas
from tests.tiny import tiny_pipeline

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "research.md"
PROGRAMS = re.findall(
    r"^```python\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
)


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return tiny_pipeline()


def run(number: int, pipe: Pipeline, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Execute a program in an empty folder; what it defined."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(bokehflux, "load", lambda: pipe)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(
        compile(PROGRAMS[number], f"{DOCUMENT.name}, program {number + 1}", "exec", dont_inherit=True), names
    )
    return names


def test_the_document_has_three_programs() -> None:
    assert len(PROGRAMS) == 3
    assert all(len(program.splitlines()) < 65 for program in PROGRAMS), "short, or nobody reads them"
    assert all(max(map(len, program.splitlines())) <= 110 for program in PROGRAMS)


def test_attention_variant(pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run(0, pipe, tmp_path, monkeypatch)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pulled_0.png", "pulled_12.png", "pulled_28.png"]
    assert Image.open("pulled_0.png").size == (48, 32)

    pulled, pivot_of = names["Pulled"], (1, 1, 1)
    q, k, v = torch.randn(3, 3, 9, 2, 16)
    bias = torch.randn(3, 2, 16)
    for pull, same in ((0.0, Grounded), (-torch.inf, PivotQuery)):
        ours = pulled(pivot_of=pivot_of, pull=pull, value_bias=bias)(q, k, v)
        torch.testing.assert_close(ours, same(pivot_of=pivot_of, value_bias=bias)(q[1:2], k, v))
    assert not torch.allclose(
        pulled(pivot_of=pivot_of, pull=2.0)(q, k, v), Grounded(pivot_of=pivot_of)(q[1:2], k, v)
    )

    # It did reach the network: plain attention gives other targets, and the same pivot.
    free = pipe.generate(
        "a red mug on a wooden table in front of city lights at night",
        names["levels"],
        seed=1,
        num_inference_steps=12,
    )
    torch.testing.assert_close(names["x"][0], free.latents[0], atol=1e-3, rtol=1e-3)
    assert not torch.allclose(names["x"][1:], free.latents[1:], atol=1e-3)


def test_sampler(pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run(1, pipe, tmp_path, monkeypatch)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ancestral_0.png", "ancestral_28.png"]
    assert names["x"].shape == (3, 6, 64) and names["x"].isfinite().all()

    # Without churn it is euler, and the whole walk is `generate`.
    schedule = sigmas(pipe.schedule, 12, 6)
    x = torch.randn(1, 6, 64).expand(3, -1, -1)
    still = names["ancestral"](names["velocity"], x, schedule, 0.0, torch.Generator())
    torch.testing.assert_close(still, euler(names["velocity"], x, schedule), atol=1e-4, rtol=1e-4)
    monkeypatch.setitem(names, "x", None)
    program = PROGRAMS[1].replace("churn=0.3", "churn=0.0")
    assert program != PROGRAMS[1]
    exec(program, names)
    result = pipe.generate(
        "a purple vase on a marble table in front of green foliage", [0, 28], bokeh_pivot=12, seed=1,
        num_inference_steps=12, num_grounding_steps=10,
    )  # fmt: skip
    torch.testing.assert_close(names["x"][1:], result.latents, atol=1e-4, rtol=1e-4)


def test_hook(pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run(2, pipe, tmp_path, monkeypatch)
    assert len(names["shares"]) == pipe.defaults.num_inference_steps
    share = names["share"]
    assert share.shape == (2, 3) and (share > 0).all() and (share < 1).all() and share.std() > 0
    assert Image.open("looks_at_prompt.png").size == (48, 32)
    pipe.generate("again", [4.0])
    assert len(names["shares"]) == pipe.defaults.num_inference_steps, "the hook is gone"
