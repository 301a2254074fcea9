"""Fingerprints of models: the same for the same contents, another for any others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bokehflux.pipeline import provenance as identity
from bokehflux.pipeline.provenance import device_name, facts, fingerprint, model_facts
from bokehflux.weights.find.resolve import ModelFiles, resolve_model
from tests.tiny import tiny_pipeline
from tests.unit.test_load import write_snapshot


def test_names_and_places_do_not_count(tmp_path: Path) -> None:
    for folder, name in (("one", "a.safetensors"), ("two", "b.safetensors")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(b"weights")
        (tmp_path / folder / "config.json").write_bytes(b"{}")
    (tmp_path / "two" / "README.md").write_text("does not decide anything")
    assert fingerprint([tmp_path / "one"]) == fingerprint([tmp_path / "two"])
    assert len(fingerprint([tmp_path / "one"])) == 32
    (tmp_path / "two" / "config.json").write_bytes(b"{ }")
    assert fingerprint([tmp_path / "one"]) != fingerprint([tmp_path / "two"])


@pytest.mark.parametrize("place", [0, 1, 500, 999])
def test_small_files_are_hashed_whole(tmp_path: Path, place: int) -> None:
    content = bytearray(1000)
    (tmp_path / "a").write_bytes(content)
    content[place] = 1
    (tmp_path / "b").write_bytes(content)
    assert fingerprint([tmp_path / "a"]) != fingerprint([tmp_path / "b"])


def test_large_files_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WHOLE", 1 << 16), ("EDGE", 1 << 10), ("BLOCK", 64), ("NUM_BLOCKS", 16)):
        monkeypatch.setattr(identity, name, value)
    size = 1 << 20
    base = bytearray(torch.randint(0, 256, (size,), dtype=torch.uint8).numpy().tobytes())

    def digest(content: bytes) -> str:
        (tmp_path / "x").write_bytes(content)
        return fingerprint([tmp_path / "x"])

    whole = digest(base)
    assert digest(base) == whole and digest(base + b"\0") != whole
    assert digest(bytes(size)) != digest(bytes(size + 1)), "nothing but zeros, and one more of them"
    for start in (0, 700, size - 1):  # header and end
        changed = bytearray(base)
        changed[start] ^= 1
        assert digest(changed) != whole
    for i in range(16):  # a change as long as the distance of two samples cannot hide
        changed = bytearray(base)
        step = size // 16
        changed[i * step : (i + 1) * step] = bytes(byte ^ 1 for byte in base[i * step : (i + 1) * step])
        assert digest(changed) != whole


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert fingerprint([]) == fingerprint([tmp_path])  # an empty folder has nothing
    with pytest.raises(OSError):
        fingerprint([tmp_path / "absent"])


def facts_of(model: Path, adapter: Path | None, loras: Sequence[tuple[Path, float]] = ()) -> dict[str, Any]:
    found = SimpleNamespace(snapshot=resolve_model(model, adapter=adapter, loras=loras))
    return model_facts(found, adapter, loras)  # type: ignore[arg-type]


def test_every_part_of_a_model_counts(tmp_path: Path) -> None:
    write_snapshot(tmp_path)
    lora = tmp_path / "lora.safetensors"
    lora.write_bytes(b"lora")
    before = facts_of(tmp_path, None, [(lora, 0.5)])
    assert before["adapter"] is None and before["adapter_hash"] == fingerprint([tmp_path / "adapter"])
    assert before["loras"] == [[str(lora), 0.5]]
    assert before["lora_hashes"] == [[fingerprint([lora]), 0.5]]
    assert facts_of(tmp_path, tmp_path / "adapter")["adapter_hash"] == before["adapter_hash"]
    (tmp_path / "README.md").write_text("says nothing")
    assert facts_of(tmp_path, None, [(lora, 0.5)]) == before
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2", "scheduler"):
        config = next(path for path in sorted((tmp_path / part).glob("*.json")))
        config.write_text(config.read_text() + " ")
        now = facts_of(tmp_path, None)["model_hash"]
        assert now != before["model_hash"], part
        before["model_hash"] = now


def test_facts_name_every_part_that_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "model_facts", lambda *_: {})
    found = facts(tiny_pipeline(), ModelFiles({"transformer": "flux-dev", "t5": Path("t5.sft")}), None)
    assert (found["model"], found["t5"]) == ("flux-dev", "t5.sft") and "vae" not in found


def test_facts_name_model_and_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "model_facts", lambda *_: {"model_hash": "h"})
    assert facts(tiny_pipeline(), "tiny", None) == {
        "model": "tiny", "model_hash": "h", "dtype": "float32", "compute": "dtype",
        "version": identity.__version__, "torch": torch.__version__, "triton": None,
        "threads": torch.get_num_threads(), "device": "cpu",
        "device_name": device_name(torch.device("cpu")),
        "attention": "sdpa",
    }  # fmt: skip
