"""`bokehflux doctor`: every section is there, and says what it should about what is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bokehflux.app import cli, doctor
from bokehflux.kernels.attention import tiles
from tests.unit.test_load import write_snapshot


def test_a_report_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for part in (
        "bokehflux ",
        f"torch {torch.__version__}",
        "device cpu:",
        "attention: sdpa",
        "model nano: ",
    ):
        assert part in out
    if not torch.cuda.is_available():
        assert "device cuda: none, " in out and "NVIDIA GPU, this is cpu" in out


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "OPTIONAL", {"no_such_package": "flying", "json": "text"})
    lines = list(doctor.report({}))
    assert "optional package missing: no_such_package (flying)" in lines
    assert any(line.startswith("optional package found: json") for line in lines)


def test_models_are_looked_for_where_people_keep_them(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--black-forest-labs--FLUX.1-dev" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "hub" / "models--openai--clip" / "snapshots" / "abc").mkdir(parents=True)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    environment = {"BOKEHFLUX_MODELS": str(tmp_path / "models"), "HF_HOME": str(tmp_path), "AE": "/no/ae"}
    lines = list(doctor.report(environment))
    assert f"BOKEHFLUX_MODELS={tmp_path / 'models'}: exists" in lines and "AE=/no/ae: does not exist" in lines
    for folder in (snapshot, tmp_path / "models" / "mine"):
        assert any(line.startswith(f"model {folder}: not usable: /no/ae: ") for line in lines)
    assert lines[-1].startswith("next: bokehflux generate ") and "small model" in lines[-1]
    del environment["AE"]
    lacks = f"model {tmp_path / 'models' / 'mine'}: not usable: lacks transformer, vae, clip, t5, "
    assert any(line.startswith(lacks) for line in doctor.report(environment))
    assert not any("openai" in line for line in lines)
    assert any(str(snapshot) in line for line in doctor.report({"HF_HUB_CACHE": str(tmp_path / "hub")}))


def test_a_gpu_is_described(
    monkeypatch: pytest.MonkeyPatch, pretend_gpu: Callable[..., torch.device]
) -> None:
    pretend_gpu(tiles.PORTABLE, (3, 9))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (3 << 30, 8 << 30))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Card 2000")
    lines = list(doctor.report({}))
    assert "  fp8 compute: it needs compute capability 8.9 or higher (Ada, Hopper), cuda:0 has 7.5" in lines
    (line,) = [line for line in lines if line.startswith("device cuda:0")]
    assert line == "device cuda:0: Card 2000, compute capability 7.5, 3.0 of 8.0 GiB free"
    assert "  fused kernels: OFF, they need an NVIDIA GPU of compute capability 8.0 or higher" in lines
    (path,) = [line for line in lines if line.startswith("  attention: sdpa with PyTorch's kernels (")]
    assert "flash," not in path, "flash needs 8.0"
    assert path.endswith("they need an NVIDIA GPU of compute capability 8.0 or higher")
    assert not any("SLOWER" in line for line in lines), "no kernels were made for this GPU"


@pytest.mark.parametrize(
    ("triton", "wanted"),
    [
        ((3, 7), ["  attention: triton (fastest of those measured", "  fused kernels: yes"]),
        (
            (3, 10),
            [
                "  attention: sdpa with PyTorch's kernels (",
                "  attention on a pivot: triton (plain Triton, faster",
                "  SLOWER THAN IT COULD BE: the attention kernels for this GPU are off, they are made for "
                "Triton 3.6 to 3.9, not 3.10",
            ],
        ),
        (
            None,
            [
                "  SLOWER THAN IT COULD BE: the attention kernels for this GPU are off, the package triton",
                "  fused kernels: OFF, the package triton is not installed",
            ],
        ),
    ],
)
def test_a_faster_path_that_is_off_is_said_loudly(
    triton: tuple[int, int] | None,
    wanted: list[str],
    monkeypatch: pytest.MonkeyPatch,
    pretend_gpu: Callable[..., torch.device],
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (3 << 30, 8 << 30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Card 9000")
    monkeypatch.setattr(doctor, "why_not", lambda *_: None)
    pretend_gpu(tiles.HOPPER, triton)
    lines = list(doctor.report({}))
    for start in wanted:
        assert any(line.startswith(start) for line in lines), (start, lines)
    assert any("SLOWER" in line for line in lines) == (triton != (3, 7))


def test_what_metal_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    (line,) = [line for line in doctor.report({}) if line.startswith("device mps")]
    assert "no fp8" in line and "no memory modes" in line


def test_a_complete_model_is_described(tmp_path: Path) -> None:
    write_snapshot(tmp_path / "mine")
    lines = list(doctor.report({"BOKEHFLUX_MODELS": str(tmp_path)}))
    state = "complete, 2 + 2 blocks of width 12, with its own adapter"
    assert f"model {tmp_path / 'mine'}: {state}" in lines
    assert lines[-1].endswith(f"--model {tmp_path / 'mine'}") and lines[-1].startswith(
        "next: bokehflux generate"
    )
    # A tree that is a model is named itself, not its folders.
    lines = list(doctor.report({"BOKEHFLUX_MODELS": str(tmp_path / "mine")}))
    assert [line for line in lines if str(tmp_path) in line and line.startswith("model ")] == [
        f"model {tmp_path / 'mine'}: {state}"
    ]


@pytest.mark.parametrize(
    ("cuda", "why"), [(None, "this PyTorch is a CPU build"), ("13.0", "no NVIDIA driver")]
)
def test_why_no_gpu_is_there(cuda: str | None, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    (line,) = [line for line in doctor.report({}) if line.startswith("device cuda")]
    assert line.startswith(f"device cuda: none, {why}")
