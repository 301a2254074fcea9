"""What `bokehflux inspect` says, of every kind of file; from headers alone."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import pytest
import torch

from bokehflux.configs import FLUX_DEV, BokehConfig
from bokehflux.models.adapter import BokehAdapter
from bokehflux.models.clip import CLIPTextEncoder
from bokehflux.models.tiny_decoder import TinyDecoder
from bokehflux.weights import manifests
from bokehflux.weights.describe import describe
from bokehflux.weights.files import write
from bokehflux.weights.files.checkpoint import Checkpoint, CheckpointError
from bokehflux.weights.lora.read import read_lora
from bokehflux.weights.mapping import to_official
from bokehflux.weights.tables import flux
from bokehflux.weights.tables import tiny_decoder as tiny_table
from tests import model_files as files

STATES = files.states()
E4M3 = torch.float8_e4m3fn


def lines(path: Path) -> list[str]:
    found = describe(path).split("\n")
    assert found[0].startswith(str(path))
    return [line.strip() for line in found[1:]]


@pytest.fixture
def no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """A LoRA's numbers may be read, tensors not."""
    read = Checkpoint.read

    def small(self: Checkpoint, name: str) -> torch.Tensor:
        return read(self, name) if self.shapes[name] in ((), (1,)) else pytest.fail(f"read {name}")

    monkeypatch.setattr(Checkpoint, "read", small)


def test_a_24_gb_file_is_described_at_once(tmp_path, no_reading):
    path = tmp_path / "flux1-dev.safetensors"
    assert files.write_sparse(path, manifests.shapes("flux1-dev.bfl")) > 23 * 10**9
    start = time.process_time()
    found = lines(path)
    assert time.process_time() - start < 2
    assert found[0] == "FLUX transformer, 23.8 GB, 780 tensors"
    for line in ("layout: FLUX transformer, BFL layout", "parameters: 11.90 billion", "precision: bf16",
                 "model: FLUX.1-dev", "complete: nothing missing, nothing unexpected"):  # fmt: skip
        assert line in found
    assert "cast to the compute dtype; about 23.8 GB" in found[-2] and found[-1].startswith("use: --model")


@pytest.mark.parametrize(
    ("manifest", "title", "model"),
    [
        ("flux1-schnell.bfl", "FLUX transformer", "FLUX.1-schnell"),
        ("ae.bfl", "FLUX autoencoder", "FLUX.1"),
        ("clip_l.hf", "CLIP text encoder", "CLIP-L"),
        ("t5xxl.hf", "T5 text encoder", "T5-XXL"),
    ],
)
@pytest.mark.parametrize(
    ("dtype", "size", "precision"), [("F16", 2, "fp16"), ("F8_E4M3", 1, "fp8 e4m3"), ("F32", 4, "fp32")]
)
def test_official_files(tmp_path, no_reading, manifest, title, model, dtype, size, precision):
    files.write_sparse(tmp_path / "a.sft", manifests.shapes(manifest), dtype, size)
    found = lines(tmp_path / "a.sft")
    assert found[0].startswith(f"{title}, ") and f"model: {model}" in found
    assert f"precision: {precision}" in found
    assert any("stay as stored" in line for line in found) == (size == 1 and title != "FLUX autoencoder")


def test_diffusers_folders_and_indexes(tmp_path):
    tensors = to_official(flux.DIFFUSERS, STATES["transformer"])
    index = write.save_sharded(tmp_path, tensors, "diffusion_pytorch_model", 100_000)
    write.write_json(tmp_path / "config.json", flux.CONFIG.to_json(files.MMDIT))
    assert index.name.endswith("index.json")
    for path in (tmp_path, index):
        found = lines(path)
        assert "layout: FLUX transformer, diffusers layout" in found
        assert any(line.startswith("model: MMDiTConfig(in_channels=64") for line in found)


def test_all_in_one(tmp_path):
    parts = {name: {n: t.to(E4M3) for n, t in STATES[name].items()} for name in ("transformer", "clip")}
    tensors = files.all_in_one(parts) | {"stray.weight": torch.ones(2)}
    write.save(tmp_path / "a.safetensors", tensors)
    found = lines(tmp_path / "a.safetensors")
    assert found[0].startswith("all-in-one checkpoint")
    assert "FLUX transformer, under 'model.diffusion_model.'" in found
    assert "CLIP text encoder, under 'text_encoders.clip_l.transformer.'" in found
    assert "unexpected: stray.weight" in found and "ignored: text_encoders.clip_l.logit_scale" in found
    assert "not in this file: FLUX autoencoder, T5 text encoder" in found


def test_scaled_fp8_and_mixtures(tmp_path):
    state = dict(STATES["t5"])
    name = "encoder.block.0.layer.0.SelfAttention.q."
    state |= {name + "weight": state[name + "weight"].to(E4M3), name + "scale_weight": torch.tensor(0.1)}
    write.save(tmp_path / "a.safetensors", state)
    precision = next(line for line in lines(tmp_path / "a.safetensors") if line.startswith("precision"))
    assert "fp32 9" in precision and "fp8 e4m3 with scales" in precision


def test_gguf(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "flux")
    for name, tensor in STATES["transformer"].items():
        kind = gguf.GGMLQuantizationType.Q8_0 if tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = lines(tmp_path / "a.gguf")
    assert found[0].startswith("FLUX transformer, ")
    assert any(line.startswith("precision: Q8_0") for line in found)
    assert any("stay as stored" in line for line in found)


def test_what_lacks_and_what_is_too_much(tmp_path):
    state = dict(STATES["t5"]) | {"extra": torch.ones(3)}
    del state["encoder.block.1.layer.1.layer_norm.weight"]
    write.save(tmp_path / "a.safetensors", state)
    found = lines(tmp_path / "a.safetensors")
    assert "problem: missing: encoder.block.1.layer.1.layer_norm.weight [32]" in found
    assert "problem: unexpected: extra [3]" in found
    assert not any("complete" in line for line in found)
    state = {n: t for n, t in STATES["transformer"].items() if "txt_in" not in n}
    write.save(tmp_path / "b.safetensors", state)
    assert any("'txt_in.weight'" in line for line in lines(tmp_path / "b.safetensors"))
    odd = dict(STATES["clip"]) | {"x.scale_weight": torch.ones(())}
    write.save(tmp_path / "c.safetensors", odd)
    assert "problem: x.scale_weight has no weight beside it" in lines(tmp_path / "c.safetensors")


def test_a_model_without_heads_that_shapes_tell(tmp_path):
    small = dataclasses.replace(files.CLIP, width=8)
    write.save(tmp_path / "a.safetensors", files.random_state(CLIPTextEncoder(small)))
    assert any("no config.json beside it" in line for line in lines(tmp_path / "a.safetensors"))


def test_adapters(tmp_path, no_reading):
    files.write_sparse(tmp_path / "a.safetensors", manifests.shapes("bokeh_adapter.all57-qk"))
    found = lines(tmp_path / "a.safetensors")
    assert found[0].startswith("bokeh adapter, 291.5 MB")
    assert "model: for FLUX.1-dev, 57 of 57 blocks, rank 128, updates queries and keys" in found
    assert found[-1] == "use: --adapter"
    config = BokehConfig(blocks=(0, 1), rank=2, hidden_dim=3, context_dim=5)
    write.save(tmp_path / "b.safetensors", files.random_state(BokehAdapter(config, files.MMDIT)))
    assert any("made for width 128" in line for line in lines(tmp_path / "b.safetensors"))


def test_loras(tmp_path, no_reading):
    layer = "transformer.transformer_blocks.0.attn.to_q"
    width = FLUX_DEV.hidden_size
    shapes = {
        f"{layer}.lora_A.weight": (4, width),
        f"{layer}.lora_B.weight": (width, 4),
        f"{layer}.alpha": (),
    }
    files.write_sparse(tmp_path / "a.safetensors", shapes)
    found = lines(tmp_path / "a.safetensors")
    assert found[0].startswith("LoRA, ") and "changes: 1 layer of transformer, rank 4" in found
    assert found[-2:] == ["model: for FLUX.1, every layer has its place", "use: --lora"]
    # What loading would refuse is said here.
    sdxl = "lora_unet_down_blocks_1_attentions_0_proj_in"
    foreign = {f"{sdxl}.lora_down.weight": (4, 8), f"{sdxl}.lora_up.weight": (8, 4)}
    files.write_sparse(tmp_path / "c.safetensors", shapes | foreign)
    found = lines(tmp_path / "c.safetensors")
    assert f"not for FLUX.1: no such layer in this model: {sdxl}" in found and found[-1].startswith(
        "use: none"
    )
    many = {f"{layer[:-1]}{n}.lora_A.weight": (4, 8) for n in range(20)}
    files.write_sparse(tmp_path / "d.safetensors", many)
    assert "not for FLUX.1: 8 more" in lines(tmp_path / "d.safetensors")
    shapes = {"lora_unet_double_blocks_0_img_attn_qkv.hada_w1_a": (4, 8)}
    files.write_sparse(tmp_path / "b.safetensors", shapes)
    assert lines(tmp_path / "b.safetensors")[0].startswith("LoHa adapter")


def test_tiny_decoders(tmp_path):
    """In both layouts; that of Stable Diffusion, with four channels, is of no use here."""
    for name, (channels, prefix, shift) in {
        "own": (16, "", 0),
        "diffusers": (16, "decoder.layers.", 1),
    }.items():
        state = TinyDecoder(channels).state_dict()
        named = {}
        for key, tensor in state.items():
            layer, rest = key.split(".", 1)
            named[f"{prefix}{int(layer) - shift}.{rest}"] = tensor
        if shift:
            named |= {key: torch.zeros(1) for key in tiny_table.DIFFUSERS.ignored}
        write.save(tmp_path / f"{name}.safetensors", named)
        found = lines(tmp_path / f"{name}.safetensors")
        assert found[0].startswith("TAEF1 decoder for previews, 4.9 MB")
        assert found[2:5] == ["parameters: 1.23 million", "precision: fp32", "model: FLUX.1"]
        assert found[-1] == "use: --preview-vae"
    write.save(tmp_path / "taesd.safetensors", TinyDecoder(4).state_dict())
    found = lines(tmp_path / "taesd.safetensors")
    assert "[64, 4, 3, 3], expected [64, 16, 3, 3]" in found[-2] and found[-1].startswith("use: none")


def test_anything_else(tmp_path):
    write.save(tmp_path / "a.safetensors", {"something.weight": torch.ones(3)})
    found = lines(tmp_path / "a.safetensors")
    assert found[0].startswith("unknown: ") and "something.weight" in found[0]
    assert found[-1].startswith("use: none")
    write.save(tmp_path / "b.safetensors", {})
    assert "nothing" in lines(tmp_path / "b.safetensors")[0]


def test_folders(tmp_path, no_reading):
    files.write_official(tmp_path / "snapshot", STATES)
    found = lines(tmp_path / "snapshot")
    assert "transformer: transformer" in found and "t5: text_encoder_2" in found
    assert any(line.startswith("clip_tokenizer: missing; looked for tokenizer/") for line in found)
    assert found[-1].endswith("clip_tokenizer, t5_tokenizer must lie in another known place")
    files.write_tokenizers(tmp_path / "snapshot")
    assert lines(tmp_path / "snapshot")[-1] == "use: --model with this folder"
    files.write_comfyui(tmp_path / "comfy" / "models", STATES)
    write.save(tmp_path / "comfy" / "models" / "unet" / "b.safetensors", STATES["transformer"])
    (tmp_path / "comfy" / "models" / "unet" / "c.safetensors").write_bytes(b"<html>     ")
    found = lines(tmp_path / "comfy")
    assert "transformer: models/unet/b.safetensors (one of several)" in found
    assert any(line.startswith("unreadable: ") and "web page" in line for line in found)
    (tmp_path / "empty").mkdir()
    found = lines(tmp_path / "empty")
    assert sum(": missing; looked for " in line for line in found) == 6
    assert found[-1] == "use: none as a model, it has no transformer"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x02}q", "Python pickle"),
        (b"PK\x03\x04", "PyTorch pickle"),
        (b"", "empty"),
        (b"\xff" * 40, "not a .safetensors file"),
    ],
)
def test_what_cannot_be_read_is_an_error(tmp_path, content, message):
    (tmp_path / "a.safetensors").write_bytes(content.ljust(40 if content else 0, b" "))
    with pytest.raises(CheckpointError, match=message):
        describe(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="no such file"):
        describe(tmp_path / "absent")


@pytest.mark.parametrize("lost", ["adapter_modules.1.to_q_adp.up.weight", "embedding_layer.2.bias",
                                  "adapter_modules.0.to_v_bokeh.up.weight"])  # fmt: skip
@pytest.mark.parametrize("host", [files.MMDIT, FLUX_DEV])
def test_what_load_refuses_of_an_adapter_is_not_recommended(tmp_path, host, lost):
    """Whether it is FLUX.1's or another model's, which only loading can tell."""
    config = BokehConfig(blocks=(0, 1), rank=2, hidden_dim=3, context_dim=5)
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in BokehAdapter(config, host).state_dict().items()}
    files.write_sparse(tmp_path / "a.safetensors", shapes)
    use = lines(tmp_path / "a.safetensors")[-1]
    assert use == ("use: --adapter" if host is FLUX_DEV else "use: --adapter, with its own model")
    del shapes[lost]
    files.write_sparse(tmp_path / "a.safetensors", shapes)
    found = lines(tmp_path / "a.safetensors")
    assert found[-1] == "use: none as it is" and any(lost in line for line in found)


TO_Q, WIDTH = "transformer.transformer_blocks.0.attn.to_q", FLUX_DEV.hidden_size
PAIR = {f"{TO_Q}.lora_A.weight": (4, WIDTH), f"{TO_Q}.lora_B.weight": (WIDTH, 4)}
DECLARED = ("{", "[]", '{"transformer.lora_alpha": "x"}', '{"transformer.lora_alpha": NaN}',
            '{"transformer.use_dora": true}', '{"transformer.alpha_pattern": {"gone": 3}}')  # fmt: skip


@pytest.mark.parametrize("declared", DECLARED)
def test_what_load_refuses_of_a_lora_by_its_metadata_is_not_recommended(tmp_path, declared):
    tensors = {name: torch.zeros(shape) for name, shape in PAIR.items()}
    path = tmp_path / "a.safetensors"
    write.save(path, tensors, {"lora_adapter_metadata": '{"transformer.lora_alpha": 4}'})
    assert lines(path)[-1] == "use: --lora"
    write.save(path, tensors, {"lora_adapter_metadata": declared})
    with pytest.raises(CheckpointError):
        read_lora(path, {"transformer": FLUX_DEV})
    assert lines(path)[-1] == "use: none as it is"


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_what_load_refuses_of_a_lora_by_an_alpha_is_not_recommended(tmp_path, alpha):
    tensors = {name: torch.zeros(shape) for name, shape in PAIR.items()}
    path = tmp_path / "a.safetensors"
    write.save(path, tensors | {f"{TO_Q}.alpha": torch.tensor(alpha)}, {})
    with pytest.raises(CheckpointError):
        read_lora(path, {"transformer": FLUX_DEV})
    found = lines(path)
    assert found[-1] == "use: none as it is" and any("a finite number was expected" in one for one in found)


def test_a_damaged_lora_is_not_said_to_be_another_models(tmp_path):
    path = tmp_path / "a.safetensors"
    for lost in PAIR:
        files.write_sparse(path, {name: shape for name, shape in PAIR.items() if name != lost})
        assert lines(path)[-1] == "use: none as it is"
    files.write_sparse(path, {name.replace("blocks.0", "blocks.99"): shape for name, shape in PAIR.items()})
    assert lines(path)[-1] == "use: none with FLUX.1; it was made for another model"


def test_what_no_picture_needs_is_not_counted(tmp_path):
    """T5's decoder in another precision: neither parameters nor precision are its own."""
    bare = {name: tensor.bfloat16() for name, tensor in STATES["t5"].items()}
    write.save(tmp_path / "bare.safetensors", bare)
    write.save(tmp_path / "whole.safetensors", bare | {"decoder.final_layer_norm.weight": torch.ones(32)})
    told = [
        [line for line in lines(tmp_path / name) if line.startswith(("parameters", "precision"))]
        for name in ("bare.safetensors", "whole.safetensors")
    ]
    assert told[0] == told[1] and len(told[0]) == 2


def test_of_two_whole_models_in_a_folder_one_must_be_named(tmp_path):
    files.write_tokenizers(tmp_path)
    write.save(tmp_path / "a.safetensors", files.all_in_one(STATES))
    assert lines(tmp_path)[-1] == "use: --model with this folder"
    write.save(tmp_path / "b.safetensors", files.all_in_one(STATES))
    found = lines(tmp_path)[-1]
    assert found.startswith("use: none as it is; name the transformer")
