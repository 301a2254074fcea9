"""Signatures in pictures: there, valid, and refused before anything is made when they cannot be."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from bokehflux.app import cli
from bokehflux.pictures.credentials import signer
from bokehflux.pictures.metadata import SOURCE_TYPE, read_recipe
from tests.tiny import tiny_pipeline

c2pa = pytest.importorskip("c2pa", reason="needs the package c2pa-python")
pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make certificates")
LEAF = """basicConstraints=critical,CA:FALSE
keyUsage=critical,digitalSignature
extendedKeyUsage=emailProtection
subjectKeyIdentifier=hash
authorityKeyIdentifier=keyid
"""
COMMANDS = """
openssl ecparam -name prime256v1 -genkey -noout -out ca.key
openssl req -x509 -new -key ca.key -sha256 -days 30 -subj /CN=Test/O=Test -out ca.pem -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign
openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out leaf.key
openssl req -new -key leaf.key -subj /CN=Signer/O=Test -out leaf.csr
openssl x509 -req -in leaf.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 30 -sha256 -extfile leaf.ext -out leaf.pem
"""  # noqa: E501


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("keys")
    (folder / "leaf.ext").write_text(LEAF)
    for command in COMMANDS.strip().splitlines():
        subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    chain = folder / "chain.pem"
    chain.write_text((folder / "leaf.pem").read_text() + (folder / "ca.pem").read_text())
    return str(chain), str(folder / "leaf.key")


def manifest(path: Path, kind: str) -> dict:
    with path.open("rb") as file, c2pa.Reader(f"image/{kind}", file) as reader:
        return json.loads(reader.json())


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_saved_pictures_are_signed(keys: tuple[str, str], kind: str, tmp_path: Path) -> None:
    result = tiny_pipeline().generate("a mug", [3], num_inference_steps=1)
    for path in result.save(tmp_path, kind, sign=signer(*keys)):
        found = manifest(path, kind)
        assert SOURCE_TYPE in json.dumps(found)
        codes = {item["code"] for item in found.get("validation_status", [])}
        assert codes <= {"signingCredential.untrusted"}, "valid, by somebody whom no list of ours knows"
        assert read_recipe(path)["prompt"] == "a mug", "the recipe stays"


def test_a_change_of_a_pixel_breaks_the_signature(keys: tuple[str, str], tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.radial_gradient("L").save(buffer, "PNG")
    signed = bytearray(signer(*keys)(buffer.getvalue(), "png"))
    signed[-30] ^= 1
    (tmp_path / "x.png").write_bytes(signed)
    codes = {item["code"] for item in manifest(tmp_path / "x.png", "png")["validation_status"]}
    assert "assertion.dataHash.mismatch" in codes


def test_the_command(keys: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bokehflux.pipeline.load.load", lambda *_, **__: tiny_pipeline())
    monkeypatch.chdir(tmp_path)
    argv = ["--prompt", "a mug", "--levels", "3", "--steps", "1", "--c2pa", *keys]
    assert cli.main(["generate", *argv, "--output", "one"]) == 0
    assert cli.main(["sweep", *argv, "--output", "two"]) == 0
    for path in [*Path("one").glob("*.png"), *Path("two").rglob("bokeh-*.png")]:
        assert manifest(path, "png")


def test_keys_that_do_not_serve_are_named_before_loading(
    keys: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bokehflux.pipeline.load.load", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.chdir(tmp_path)
    Path("nonsense.pem").write_text("nonsense")
    for wrong in ((keys[0], "none.key"), ("nonsense.pem", keys[1])):
        assert cli.main(["generate", "--prompt", "a mug", "--c2pa", *wrong]) == 2
        assert f"cannot sign with {wrong[0]} and {wrong[1]}" in capsys.readouterr().err
    with pytest.raises(ValueError, match="unknown signing algorithm 'rot13'"):
        signer(*keys, algorithm="rot13")
