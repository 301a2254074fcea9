"""Fingerprints of models: the same for the same contents, another for any others."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bokehflux import fingerprint as fingerprints
from bokehflux.fingerprint import fingerprint
from bokehflux.pipeline.provenance import Source, attention, device_name, provenance_of
from bokehflux.record import Provenance
from bokehflux.version import __version__
from bokehflux.weights.find.resolve import resolve_model
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


def test_the_order_of_files_does_not_count(tmp_path: Path) -> None:
    for folder, shift in (("one", 0), ("two", 5)):
        (tmp_path / folder).mkdir()
        for i in range(12):
            (tmp_path / folder / f"{(i + shift) % 12}-{folder}.json").write_bytes(bytes([i]))
    assert fingerprint([tmp_path / "one"]) == fingerprint([tmp_path / "two"])


@pytest.mark.parametrize("place", [0, 1, 500, 999])
def test_small_files_are_hashed_whole(tmp_path: Path, place: int) -> None:
    content = bytearray(1000)
    (tmp_path / "a").write_bytes(content)
    content[place] = 1
    (tmp_path / "b").write_bytes(content)
    assert fingerprint([tmp_path / "a"]) != fingerprint([tmp_path / "b"])


def test_large_files_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WHOLE", 1 << 16), ("EDGE", 1 << 10), ("BLOCK", 64), ("NUM_BLOCKS", 16)):
        monkeypatch.setattr(fingerprints, name, value)
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


def test_every_part_of_a_model_counts(tmp_path: Path) -> None:
    write_snapshot(tmp_path)
    lora = tmp_path / "lora.safetensors"
    lora.write_bytes(b"lora")

    def source(adapter: Path | None = None, loras: Sequence[tuple[Path, float]] = ()) -> Source:
        return Source.of(tmp_path, adapter, loras, resolve_model(tmp_path, adapter=adapter, loras=loras))

    before = source(loras=[(lora, 0.5)])
    model_hash, adapter_hash, lora_hashes = before.hashes
    assert before.adapter is None and adapter_hash == fingerprint([tmp_path / "adapter"])
    assert before.loras == ((str(lora), 0.5),) and lora_hashes == ((fingerprint([lora]), 0.5),)
    assert source(tmp_path / "adapter").hashes[1] == adapter_hash
    (tmp_path / "README.md").write_text("says nothing")
    assert source(loras=[(lora, 0.5)]).hashes == before.hashes
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2", "scheduler"):
        config = next(path for path in sorted((tmp_path / part).glob("*.json")))
        config.write_text(config.read_text() + " ")
        now = source().hashes[0]
        assert now != model_hash, part
        model_hash = now


def test_provenance_names_every_part_that_was_given() -> None:
    source = Source(model="flux-dev", parts={"t5": "t5.sft"}, adapter="ada")
    found = provenance_of(dataclasses.replace(tiny_pipeline(), source=source))
    assert (found.model, found.t5, found.adapter) == ("flux-dev", "t5.sft", "ada")
    assert "vae" not in found.recipe()


def test_provenance_names_model_and_place() -> None:
    assert provenance_of(tiny_pipeline()) == Provenance(
        model="tiny", dtype="float32", compute="dtype", version=__version__, torch=torch.__version__,
        threads=torch.get_num_threads(), device="cpu", device_name=device_name(torch.device("cpu")),
        attention="sdpa", memory="resident",
    )  # fmt: skip


@pytest.mark.parametrize(("grounded", "told"), [("flash", "sdpa + flash"), ("sdpa", "sdpa")])
def test_both_backends_of_a_run_are_told(grounded: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(*_: object, grounded: bool) -> SimpleNamespace:
        return SimpleNamespace(backend=backends[grounded])

    backends = {False: "sdpa", True: grounded}
    monkeypatch.setattr("bokehflux.pipeline.provenance.select.choose", choose)
    assert attention(tiny_pipeline(), "auto") == told
    assert attention(tiny_pipeline(), "reference") == "reference"
