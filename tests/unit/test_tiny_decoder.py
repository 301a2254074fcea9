"""TAEF1's file: exact cover in both layouts, every fault named; previews that are made with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from bokehflux.app import cli
from bokehflux.app.preview import Preview
from bokehflux.models.tiny_decoder import TinyDecoder
from bokehflux.sampling.latents import LatentGrid
from bokehflux.weights.files.checkpoint import CheckpointError
from bokehflux.weights.files.write import save
from bokehflux.weights.load import load_tiny_decoder
from bokehflux.weights.tables.tiny_decoder import DIFFUSERS
from tests.tiny import tiny_pipeline


def state(latent_channels: int = 16) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return TinyDecoder(latent_channels).state_dict()


def test_size_and_names() -> None:
    tensors = state()
    assert sum(t.numel() for t in tensors.values()) == 1_229_443
    assert {"1.weight", "3.conv.0.bias", "7.weight", "18.conv.4.weight", "19.bias"} <= tensors.keys()
    assert not {"7.bias", "12.bias", "17.bias"} & tensors.keys()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_values_arrive(tmp_path: Path, dtype: torch.dtype) -> None:
    save(path := tmp_path / "taef1_decoder.safetensors", {n: t.to(dtype) for n, t in state().items()})
    network = load_tiny_decoder(path)
    path.unlink()
    for name, tensor in network.state_dict().items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, state()[name].to(dtype).float(), rtol=0, atol=0)
    assert not any(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: t.pop("8.conv.2.bias"), "missing: 8.conv.2.bias"),
    (lambda t: t.update({"20.weight": torch.zeros(3)}), r"unexpected: 20.weight \[3\]"),
    (lambda t: t.update({"19.weight": torch.zeros(4, 64, 3, 3)}), r"19.weight is \[4, 64, 3, 3\], expected"),
    (lambda t: t.update({"19.bias": torch.zeros(3, dtype=torch.int8)}), "19.bias is stored as int8"),
    (lambda t: t.pop("19.weight"), "layout not recognised: a TAEF1 decoder for previews has '19.weight'"),
])  # fmt: skip
def test_faults_are_named(tmp_path: Path, change, message: str) -> None:
    tensors = state()
    change(tensors)
    save(path := tmp_path / "x.safetensors", tensors)
    with pytest.raises(CheckpointError, match=message):
        load_tiny_decoder(path)


def test_the_decoder_of_another_model_is_refused(tmp_path: Path) -> None:
    save(path := tmp_path / "taesd_decoder.safetensors", state(4))
    with pytest.raises(
        CheckpointError, match=r"wrong shape: 1.weight is \[64, 4, 3, 3\], expected \[64, 16, 3, 3\]"
    ):
        load_tiny_decoder(path)


def test_what_diffusers_keeps_beside_it_is_ignored_by_name_only(tmp_path: Path) -> None:
    rules = {f"{n}.{r}": t for n, r, t in ((*name.split(".", 1), t) for name, t in state().items())}
    theirs = {}
    for name, tensor in rules.items():
        layer, rest = name.split(".", 1)
        theirs[f"decoder.layers.{int(layer) - 1}.{rest}"] = tensor
    theirs |= {name: torch.zeros(1) for name in DIFFUSERS.ignored}
    save(path := tmp_path / "x.safetensors", theirs)
    torch.testing.assert_close(load_tiny_decoder(path).state_dict()["19.weight"], state()["19.weight"])
    save(path, theirs | {"encoder.layers.15.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="unexpected: encoder.layers.15.weight"):
        load_tiny_decoder(path)


@pytest.mark.parametrize(("side", "shown"), [(32, (256, 256)), (512, (512, 512)), (576, (288, 288))])
def test_previews_show_detail(tmp_path: Path, side: int, shown: tuple[int, int]) -> None:
    """Small ones are enlarged, large ones averaged; one row goes through the decoder at a time."""
    pipe, seen = tiny_pipeline(), []

    def decoder(latents: torch.Tensor) -> torch.Tensor:
        seen.append(latents.shape)
        return torch.zeros(1, 3, side, side)

    grid = LatentGrid(height_px=side, width_px=side)
    preview = Preview(decoder, grid, tmp_path / "p.png", 9)
    pipe.generate("p", [0, 9], num_inference_steps=2, height=side, width=side, on_step=preview)
    assert seen == [(1, 16, side // 8, side // 8)] * 2
    with Image.open(tmp_path / "p.png") as image:
        assert image.size == (2 * shown[0], shown[1])


@pytest.mark.parametrize(("flags", "says"), [
    (["--preview-vae", "x.safetensors"], "--preview-vae needs --preview FILE"),
    (["--preview", "p.png", "--preview-vae", "x.safetensors"], "x.safetensors: no such file"),
])  # fmt: skip
def test_refused_before_loading(
    flags: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bokehflux.pipeline.load.load", lambda *_, **__: pytest.fail("loaded"))
    assert cli.main(["generate", "--prompt", "p", *flags]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("name", ["taef1_decoder.pth", "taef1_decoder.safetensors"])
def test_pickles_are_never_read(tmp_path: Path, name: str) -> None:
    torch.save(state(), path := tmp_path / name)
    with pytest.raises(CheckpointError, match="it is a PyTorch pickle file"):
        load_tiny_decoder(path)


def test_a_wrong_file_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save(Path("x.safetensors"), {"a": torch.zeros(1)})
    monkeypatch.setattr("bokehflux.pipeline.load.load", lambda *_, **__: pytest.fail("loaded"))
    assert (
        cli.main(["generate", "--prompt", "p", "--preview", "p.png", "--preview-vae", "x.safetensors"]) == 2
    )
    assert "layout not recognised" in capsys.readouterr().err
