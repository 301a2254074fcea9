"""Files as today's tools write them, and folders that hold other models beside FLUX.1."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bokehflux.app.replay import MODEL_FLAGS
from bokehflux.configs import FLUX_SCHEDULE, SCHNELL_SCHEDULE
from bokehflux.pipeline.load import load
from bokehflux.pipeline.provenance import provenance_of
from bokehflux.text.tokenizers import CLIPTokenizer, T5Tokenizer, TokenizerError
from bokehflux.weights import manifests, networks, save
from bokehflux.weights.describe import describe
from bokehflux.weights.files import write
from bokehflux.weights.files.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from bokehflux.weights.find.resolve import VOCABULARIES, ModelFiles, resolve_model
from bokehflux.weights.find.snapshot import Snapshot, default_card
from bokehflux.weights.load import load_components
from bokehflux.weights.lora.read import read_lora
from bokehflux.weights.relatives import other_model
from bokehflux.weights.tables import flux
from tests import model_files as files

STATES = files.states()
TRANSFORMER = STATES["transformer"]
PARTS = ("vae/", "text_encoder/", "text_encoder_2/", "tokenizer/", "tokenizer_2/")


def z(*shape: int) -> Tensor:
    return torch.zeros(shape)


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """A machine without any models."""
    return {"HOME": str(tmp_path / "home")}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A ComfyUI tree with a whole model."""
    root = tmp_path / "ComfyUI"
    files.write_comfyui(root / "models", STATES)
    files.write_tokenizers(root / "models")
    return root


def refusal(model: object, env: dict[str, str]) -> str:
    with pytest.raises(CheckpointError) as caught:
        resolve_model(model, env)  # type: ignore[arg-type]
    return str(caught.value)


def finds(model: Path, env: dict[str, str]) -> Snapshot:
    snapshot = resolve_model(model, env)
    assert snapshot.config == files.MMDIT
    return snapshot


# --- other models, and forms that cannot be read

OTHERS = {
    "FLUX.2": {"img_in.weight": z(128, 128), "final_layer.linear.weight": z(128, 128),
               "double_stream_modulation_img.lin.weight": z(768, 128),
               "final_layer.adaLN_modulation.1.weight": z(256, 128)},
    "FLUX.2 ": {"double_stream_modulation_img.linear.weight": z(768, 128), "x_embedder.weight": z(128, 128),
                "norm_out.linear.weight": z(256, 128)},
    "Chroma": {"distilled_guidance_layer.in_proj.weight": z(64, 64), "img_in.weight": z(128, 64),
               "txt_in.weight": z(128, 96), "final_layer.linear.weight": z(64, 128)},
    "Qwen-Image": {"img_in.weight": z(64, 64), "txt_in.weight": z(64, 96), "txt_norm.weight": z(96),
                   "transformer_blocks.0.img_mod.1.weight": z(384, 64), "norm_out.linear.weight": z(128, 64)},
    "Z-Image": {"cap_pad_token": z(1, 64), "noise_refiner.0.attention.qkv.weight": z(192, 64)},
    "Stable Diffusion 3": {"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": z(192, 64),
                           "model.diffusion_model.final_layer.adaLN_modulation.1.weight": z(128, 64),
                           "first_stage_model.decoder.mid.block_1.conv1.weight": z(8, 8, 3, 3),
                           "first_stage_model.decoder.conv_in.weight": z(8, 16, 3, 3)},
    "Stable Diffusion 3 ": {"pos_embed.proj.weight": z(64, 16, 2, 2), "norm_out.linear.weight": z(128, 64)},
    "Stable Diffusion 1, 2 or XL": {"model.diffusion_model.input_blocks.0.0.weight": z(8, 4, 3, 3)},
    "AuraFlow": {"joint_transformer_blocks.0.attn.to_q.weight": z(8, 8),
                 "norm_out.linear.weight": z(128, 64)},
    "HiDream": {"double_stream_blocks.0.block.attn1.to_q.weight": z(8, 8),
                "final_layer.adaLN_modulation.1.weight": z(128, 64)},
    "FLUX.1 Fill": {**STATES["transformer"], "img_in.weight": z(128, 384)},
    "FLUX.1 Canny or Depth": {**STATES["transformer"], "img_in.weight": z(128, 128)},
    "a ControlNet of FLUX.1": {"controlnet_blocks.0.weight": z(8, 8), "x_embedder.weight": z(8, 64)},
}  # fmt: skip
FORMS = {
    "bitsandbytes (8 bits)": {"weight": "SCB"},
    "bitsandbytes (NF4, FP4)": {"weight": "weight.absmax"},
    "optimum-quanto": {"weight._data": "weight._scale"},
    "SVDQuant (nunchaku)": {"qweight": "wscales"},
    "AWQ": {"qweight": "qzeros"},
    "GPTQ": {"qweight": "g_idx"},
}


def quantised(names: dict[str, str]) -> dict[str, Tensor]:
    """A transformer whose last layer is stored in another form."""
    layer = "double_blocks.0.img_mlp.0."
    state = {n: t for n, t in STATES["transformer"].items() if n != layer + "weight"}
    state |= {f"{layer}{a}": z(4, 4).char() for a in names} | {f"{layer}{b}": z(4) for b in names.values()}
    return state


STRANGERS = OTHERS | {what: quantised(names) for what, names in FORMS.items()}


@pytest.mark.parametrize("what", STRANGERS)
def test_a_stranger_is_passed_over_where_flux_is(tree, env, what):
    write.save(tree / "models" / "diffusion_models" / "other.safetensors", STRANGERS[what])
    snapshot = finds(tree, env)
    assert snapshot.paths["transformer"].name == "flux1-dev.safetensors"
    assert f"other.safetensors is {'stored by ' if what in FORMS else ''}{what.strip()}" in describe(tree)


@pytest.mark.parametrize("what", STRANGERS)
def test_a_stranger_in_the_place_of_flux_is_named(tree, env, what):
    path = tree / "models" / "unet" / "flux1-dev.safetensors"
    path.unlink()
    write.save(path, STRANGERS[what])
    message = refusal(tree, env)
    assert "unet/flux1-dev.safetensors is there, but it is" in message and what.strip() in message
    assert "not found: transformer/" in message
    assert not [part for part in PARTS if f"not found: {part}" in message]
    for asked in (path, ModelFiles({"transformer": path})):
        assert what.strip() in refusal(asked, env)
    assert what.strip() in describe(path) and "use: --model" not in describe(path)


def test_a_snapshot_of_another_model_is_named(tmp_path, env):
    files.write_official(tmp_path / "flux2", STATES)
    write.save(tmp_path / "flux2" / "transformer" / "diffusion_pytorch_model.safetensors", OTHERS["FLUX.2 "])
    files.write_tokenizers(tmp_path / "flux2")
    assert "FLUX.2" in refusal(tmp_path / "flux2", env)


def test_a_config_of_fill_is_named():
    config = flux.CONFIG.to_json(files.MMDIT) | {"in_channels": 384, "out_channels": 64}
    with pytest.raises(CheckpointError, match=r"FLUX.1 Fill .* needs an image as input"):
        flux.CONFIG.from_json(config)


def test_an_unknown_file_is_named_with_its_tensors(tree, env):
    path = tree / "models" / "unet" / "flux1-dev.safetensors"
    path.unlink()
    write.save(path, {"some.thing": z(2), "another": z(3)})
    message = refusal(tree, env)
    assert "unet/flux1-dev.safetensors is there, but it holds no network of a model" in message
    assert "some.thing" in message and "not found: vae" not in message


@pytest.mark.parametrize("name", ["flux.engine", "flux.plan", "flux.ckpt", "flux.onnx"])
def test_other_formats_are_named_by_their_endings(tree, env, name):
    other = tree / "models" / "unet" / name
    other.write_bytes(b"0")
    assert finds(tree, env)
    (tree / "models" / "unet" / "flux1-dev.safetensors").unlink()
    assert f"unet/{name} is there, but it is a" in refusal(tree, env)
    assert "which cannot be read: take a .safetensors" in refusal(other, env)


VAE_MARK = {
    "bfl": "decoder.mid.block_1.conv1.weight",
    "diffusers": "decoder.mid_block.resnets.0.conv1.weight",
}


@pytest.mark.parametrize("layout", VAE_MARK)
def test_an_autoencoder_of_another_model_is_passed_over(tree, env, layout):
    other = {VAE_MARK[layout]: z(8, 8, 3, 3), "decoder.conv_in.weight": z(8, 4, 3, 3)}
    write.save(tree / "models" / "vae" / "sdxl_vae.safetensors", other)
    assert finds(tree, env).paths["vae"].name == "ae.safetensors"
    (tree / "models" / "vae" / "ae.safetensors").unlink()
    message = refusal(tree, env)
    assert "vae/sdxl_vae.safetensors is there, but it does not fit" in message and "16 channels" in message


NEIGHBOURS = {
    "vae/flux2-vae": {VAE_MARK["bfl"]: z(8, 8, 3, 3), "decoder.conv_in.weight": z(8, 32, 3, 3)},
    "vae/qwen_image_vae": {"decoder.conv_in.weight": z(8, 16, 3, 3, 3),
                           VAE_MARK["diffusers"]: z(8, 8, 3, 3, 3)},
    "vae/wan_2.1_vae": {"decoder.conv1.weight": z(8, 16, 3, 3, 3)},
    "clip/qwen_2.5_vl_7b": {"model.layers.0.self_attn.q_proj.weight": z(8, 8)},
    "clip/clip_g": {"text_model.final_layer_norm.weight": z(80),
                    "text_model.embeddings.token_embedding.weight": z(99, 80)},
    "clip/umt5": STATES["t5"]
    | {"encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight": z(8, 2)},
}  # fmt: skip


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_inspect_and_load_agree_on_a_neighbour(tree, env, name):
    write.save(tree / "models" / f"{name}.safetensors", NEIGHBOURS[name])
    assert finds(tree, env)
    said = describe(tree)
    assert f"passed over: models/{name}.safetensors " in said and "use: --model with this folder" in said


def test_inspect_and_load_agree_on_a_choice(tree, env):
    write.save(tree / "models" / "unet" / "flux1-dev-finetune.safetensors", TRANSFORMER)
    assert "holds several transformer files" in refusal(tree, env)
    assert "use: none as it is; name the transformer that you mean by its path" in describe(tree)


@pytest.mark.parametrize(("channels", "whose"), [(4, "Stable Diffusion 1, 2 or XL"), (32, r"FLUX\.2")])
def test_an_autoencoder_that_was_asked_for_is_named(tree, env, channels, whose):
    vae = {VAE_MARK["bfl"]: z(8, 8, 3, 3), "decoder.conv_in.weight": z(8, channels, 3, 3)}
    path = tree / "other.safetensors"
    write.save(path, vae)
    with pytest.raises(CheckpointError, match=f"those of {whose}"):
        resolve_model(ModelFiles({"transformer": tree, "vae": path}), env)


def test_an_autoencoder_in_diffusers_layout_needs_no_config(tree, env):
    (tree / "models" / "vae" / "ae.safetensors").unlink()
    folder = tree.parent / "vae"
    networks_file = "diffusion_pytorch_model.safetensors"
    save.save_network(networks.VAE, folder, files.VAE, STATES["vae"])
    (folder / networks_file).rename(tree / "models" / "vae" / "flux_vae.safetensors")
    snapshot = finds(tree, env)
    files.assert_holds(files.load_vae(snapshot.paths["vae"], dtype=torch.float32), STATES["vae"])


LORAS = {
    "FLUX.2": ("transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj", 64),
    "Qwen-Image": ("transformer.transformer_blocks.0.img_mlp.net.0.proj", 64),
    "Stable Diffusion 1, 2 or XL": ("lora_unet_input_blocks_4_1_proj_in", 64),
    "FLUX.1 Canny or Depth": ("transformer.x_embedder", 128),
    "FLUX.1 Fill": ("diffusion_model.img_in", 384),
    "Wan": ("diffusion_model.blocks.0.self_attn.q", 64),
}


@pytest.mark.parametrize("what", LORAS)
def test_a_lora_of_another_model_is_named(tmp_path, what):
    layer, columns = LORAS[what]
    path = tmp_path / "some.safetensors"
    write.save(path, {f"{layer}.lora_A.weight": z(2, columns), f"{layer}.lora_B.weight": z(64, 2)})
    with pytest.raises(CheckpointError, match="was made for " + what.replace(".", r"\.")):
        read_lora(path, {})
    assert f"model: {what}" in describe(path) and "use: --lora" not in describe(path)


@pytest.mark.parametrize("name", ["sd3_vae", "sd3.5/diffusion_pytorch_model", "qwen_image_vae"])
def test_an_autoencoder_that_looks_alike_is_passed_over_by_its_name(tree, env, name):
    write.save(tree / "models" / "vae" / f"{name}.safetensors", STATES["vae"])
    assert finds(tree, env).paths["vae"].name == "ae.safetensors"


OWN_FILES = {
    "bokehflux.json": "{", "bokehflux.json ": '{"num_inference_steps": 1e999}',
    "bokehflux.json  ": '{"adapter": "../gone"}', "bokehflux.json   ": '{"height": 7}',
    "scheduler/scheduler_config.json": "[]",
    "scheduler/scheduler_config.json ": '{"_class_name": "DDIMScheduler"}',
    "models/tokenizer/vocab.json": "{", "models/tokenizer_2/tokenizer.json": "{}",
}  # fmt: skip


@pytest.mark.parametrize("name", OWN_FILES)
def test_inspect_and_load_agree_on_files_without_weights(tree, env, name):
    assert "use: --model with this folder" in describe(tree)
    path = tree / name.strip()
    path.parent.mkdir(exist_ok=True)
    path.write_text(OWN_FILES[name])
    with pytest.raises(ValueError, match=path.name.split(".")[0].split("_")[0]):
        load_components(tree, env=env)
    said = describe(tree)
    assert "use: none as it is, a part has a problem" in said and f"problem: {path}" in said


MISNAMED = ("flux1-dev.safetensors.part", "flux1-dev.safetensors.crdownload", "FLUX1-DEV.SAFETENSORS",
            "flux1-dev.gguf.1", "flux1-dev.sft.tmp")  # fmt: skip


@pytest.mark.parametrize("name", MISNAMED)
def test_an_unfinished_download_is_named(tree, env, name):
    path = tree / "models" / "unet" / "flux1-dev.safetensors"
    path.rename(path.with_name(name))
    says = f"ends in {path.with_name(name).suffix}, as unfinished downloads do"
    assert f"unet/{name} is there, but it {says}" in refusal(tree, env)
    assert f"passed over: models/unet/{name} {says}" in describe(tree)
    (path.parent / "flux1-dev.safetensors.sha256").write_text("")
    assert "sha256" not in describe(tree)


SD3_NAMES = ("sd3_vae", "sd3.5/vae", "sd-3.5-large-vae", "stable-diffusion-3.5-large/vae", "SD35_VAE")


@pytest.mark.parametrize("name", SD3_NAMES)
def test_the_autoencoder_of_sd3_alone_is_named(tree, env, caplog, name):
    """Its shapes are those of FLUX.1's: its pictures would be wrong, and nothing else would tell."""
    path = tree / "models" / "vae" / f"{name}.safetensors"
    path.parent.mkdir(exist_ok=True)
    (tree / "models" / "vae" / "ae.safetensors").rename(path)
    says = "calls itself the autoencoder of Stable Diffusion 3"
    assert f"vae/{name}.safetensors is there, but it {says}" in refusal(tree, env)
    assert f"passed over: {path.relative_to(tree)} {says}" in describe(tree)
    assert f"problem: {says}" in describe(path) and "use: none as it is" in describe(path)
    assert resolve_model(ModelFiles({"transformer": tree, "vae": path}), env).paths["vae"] == path
    assert says in caplog.text and "pictures will be wrong" in caplog.text


def test_the_autoencoder_of_sd3_is_named_by_its_metadata(tree, env):
    path = tree / "models" / "vae" / "ae.safetensors"
    write.save(path, STATES["vae"], {"modelspec.architecture": "stable-diffusion-v3.5-large/vae"})
    assert "calls itself the autoencoder of Stable Diffusion 3" in refusal(tree, env)
    write.save(path, STATES["vae"], {"modelspec.architecture": "flux-1-dev/vae"})
    assert finds(tree, env)


@pytest.mark.parametrize("name", ["ae", "flux_vae", "z_image_ae", "wsd3d", "asd312/vae"])
def test_an_autoencoder_of_flux_by_any_name_serves(tree, env, name):
    """Z-Image and others use FLUX.1's own."""
    path = tree / "models" / "vae" / f"{name}.safetensors"
    path.parent.mkdir(exist_ok=True)
    (tree / "models" / "vae" / "ae.safetensors").rename(path)
    assert finds(tree, env).paths["vae"] == path


def test_an_autoencoder_with_the_scale_of_sd3_is_named(tmp_path, env):
    files.write_official(tmp_path, STATES)
    files.write_tokenizers(tmp_path)
    path = tmp_path / "vae" / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"scaling_factor": 1.5305, "shift_factor": 0.0609})
    )
    with pytest.raises(CheckpointError, match="the autoencoder of Stable Diffusion 3"):
        files.load_vae(tmp_path / "vae")
    assert "use: none" in describe(tmp_path)


KONTEXT = {
    "by name": ("flux1-kontext-dev", {}),
    "by metadata": ("edit", {"modelspec.architecture": "flux-1-kontext"}),
    "depth": ("flux1-depth-dev", {}),
}


@pytest.mark.parametrize("kind", KONTEXT)
def test_kontext_and_its_like_yield_to_dev_and_are_named(tree, env, kind, caplog):
    name, metadata = KONTEXT[kind]
    path = tree / "models" / "unet" / f"{name}.safetensors"
    write.save(path, TRANSFORMER, metadata)
    assert finds(tree, env).paths["transformer"].name == "flux1-dev.safetensors" and not caplog.messages
    finds(path, env)
    assert any("calls itself FLUX.1" in message for message in caplog.messages)
    assert "calls itself FLUX.1" in describe(path)


def test_a_snapshot_of_kontext_is_named(tmp_path, env, caplog):
    root = tmp_path / "models--black-forest-labs--FLUX.1-Kontext-dev" / "snapshots" / "0a"
    files.write_official(root, STATES)
    files.write_tokenizers(root)
    finds(root, env)
    assert any("calls itself FLUX.1 Kontext" in message for message in caplog.messages)


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("my_kontext_style", True),
        ("flux-canny-lora", True),
        ("flux_depth_of_field", False),
        ("depth-bokeh", False),
    ],
)
def test_loras_of_kontext_and_its_like_are_named(tmp_path, caplog, name, named):
    path = tmp_path / f"{name}.safetensors"
    layer = "transformer.double_blocks.0.img_attn.qkv."
    write.save(path, {layer + "lora_A.weight": z(2, 3072), layer + "lora_B.weight": z(9216, 2)})
    assert read_lora(path, {}).terms
    assert any("calls itself" in message for message in caplog.messages) is named
    assert ("calls itself" in describe(path)) is named


# --- names that today's tools write


def wrapped(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def norms_as_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("_norm.scale", "_norm.weight"): tensor for name, tensor in state.items()}


SPELLINGS = {
    "ComfyUI 0.14": norms_as_weights(TRANSFORMER),
    "ComfyUI 0.14, with a prefix": wrapped(norms_as_weights(TRANSFORMER), "model.diffusion_model."),
    "compiled": wrapped(TRANSFORMER, "_orig_mod."),
    "compiled by block": {n.replace("blocks.0.", "blocks.0._orig_mod."): t for n, t in TRANSFORMER.items()},
    "compiled, data parallel": wrapped(TRANSFORMER, "module._orig_mod."),
    "FSDP": {n.replace("blocks.0.", "blocks.0._fsdp_wrapped_module."): t for n, t in TRANSFORMER.items()},
    "checkpointed, with a prefix": wrapped(TRANSFORMER, "model.diffusion_model._checkpoint_wrapped_module."),
    "with a running average": TRANSFORMER | wrapped(TRANSFORMER, "ema."),
    "all-in-one with a running average": wrapped(TRANSFORMER, "model.diffusion_model.")
    | {"model_ema.decay": z(1)[0], "model_ema.diffusion_modelimg_inweight": z(128, 64)},
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_transformer_loads_under_the_names_of_today(tree, env, spelling):
    path = tree / "models" / "unet" / "flux1-dev.safetensors"
    path.unlink()
    write.save(path, SPELLINGS[spelling])
    loaded = files.load_transformer(finds(tree, env).paths["transformer"], dtype=torch.float32)
    files.assert_holds(loaded, TRANSFORMER)
    assert "complete: nothing missing, nothing unexpected" in describe(path) and "use: --model" in describe(
        path
    )


def test_copies_of_a_norm_must_agree(tmp_path):
    name = "double_blocks.0.img_attn.norm.query_norm."
    path = tmp_path / "both.safetensors"
    write.save(path, TRANSFORMER | {name + "weight": TRANSFORMER[name + "scale"] + 1})
    with pytest.raises(CheckpointError, match="must be the same tensor"):
        files.load_transformer(path)


CLIP_FLAT = {name.removeprefix("text_model."): tensor for name, tensor in STATES["clip"].items()}
VISION = {"vision_model.embeddings.class_embedding": z(64), "vision_model.pre_layrnorm.weight": z(64),
          "visual_projection.weight": z(64, 64), "text_projection.weight": z(64, 64),
          "logit_scale": torch.tensor(4.6)}  # fmt: skip
ENCODERS = {
    "flat": ("clip", CLIP_FLAT),
    "flat, with positions": ("clip", CLIP_FLAT | {"embeddings.position_ids": torch.arange(16)[None]}),
    "with its vision half": ("clip", STATES["clip"] | VISION),
    "with its decoder": (
        "t5",
        STATES["t5"] | {"decoder.final_layer_norm.weight": z(32), "lm_head.weight": z(9, 32)},
    ),
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_text_encoders_of_today(tree, env, kind):
    part, state = ENCODERS[kind]
    path = finds(tree, env).paths[part]
    path.unlink()
    write.save(path, state)
    assert finds(tree, env).paths[part] == path
    files.assert_holds(files.LOADERS[part](path, dtype=torch.float32), STATES[part])


def test_a_snapshot_with_flat_clip_names(tmp_path, env):
    files.write_official(tmp_path, STATES)
    files.write_tokenizers(tmp_path)
    write.save(tmp_path / "text_encoder" / "model.safetensors", CLIP_FLAT)
    snapshot = finds(tmp_path, env)
    files.assert_holds(files.load_clip(snapshot.paths["clip"], dtype=torch.float32), STATES["clip"])


LORA_NAMES = [
    "transformer.double_blocks.0.img_attn.qkv.lora_{}.my-style.weight",
    "base_model.model.double_blocks.0.img_attn.qkv.lora_{}.default_0.weight",
    "transformer._orig_mod.double_blocks.0.img_attn.qkv.lora_{}.weight",
    "diffusion_model.double_blocks.0._orig_mod.img_attn.qkv.lora_{}.default.weight",
]


@pytest.mark.parametrize("name", LORA_NAMES)
def test_loras_under_the_names_of_today(tmp_path, name):
    path = tmp_path / "lora.safetensors"
    write.save(path, {name.format("A"): torch.ones(2, 3072), name.format("B"): torch.ones(9216, 2)})
    (terms,) = read_lora(path, {}).terms.values()
    assert [*terms] == ["double_blocks.0.img_attn.qkv"] and "use: --lora" in describe(path)


def test_two_peft_adapters_in_one_file_are_refused(tmp_path):
    path = tmp_path / "lora.safetensors"
    name = "transformer.double_blocks.0.img_attn.qkv.lora_{}.{}.weight"
    write.save(path, {name.format(*pair): torch.ones(2, 2) for pair in ("Aa", "Ba", "Ab", "Bb")})
    with pytest.raises(CheckpointError, match="the same matrix of one layer"):
        read_lora(path, {})


@pytest.mark.parametrize("prefix", ["text_encoder.", "lora_te1_"])
def test_loras_of_clip_without_text_model(tmp_path, prefix):
    layer = "encoder.layers.0.self_attn.q_proj"
    layer, ends = (
        (layer.replace(".", "_"), ("lora_down", "lora_up"))
        if prefix.endswith("_")
        else (layer, ("lora_A", "lora_B"))
    )
    path = tmp_path / "lora.safetensors"
    write.save(
        path, {f"{prefix}{layer}.{ends[0]}.weight": z(2, 768), f"{prefix}{layer}.{ends[1]}.weight": z(768, 2)}
    )
    assert [*read_lora(path, {}).terms["clip"]] == ["text_model.encoder.layers.0.self_attn.q_proj"]


# --- snapshots of today's transformers and diffusers

START, END = "<|startoftext|>", "<|endoftext|>"


def as_transformers_5(folder: Path, merges_as: type) -> None:
    """`tokenizer/` with the files that transformers 5 writes."""
    vocab = json.loads((folder / "vocab.json").read_text())
    lines = (folder / "merges.txt").read_text().strip().split("\n")[1:]
    merges = lines if merges_as is str else [line.split(" ") for line in lines]
    special = [{"id": vocab[token], "content": token, "special": True} for token in (START, END)]
    model = {"type": "BPE", "unk_token": END, "end_of_word_suffix": "</w>", "vocab": vocab, "merges": merges}
    length = json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"]
    config = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END,
              "model_max_length": length, "tokenizer_class": "CLIPTokenizer"}  # fmt: skip
    for file in folder.iterdir():
        file.unlink()
    (folder / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "added_tokens": special, "model": model})
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("merges_as", [str, list])
def test_clip_tokenizer_of_transformers_5(tmp_path, merges_as):
    files.write_tokenizers(tmp_path)
    prompts = ["A red  cup, 2 cats", "", "don't | a LAMP é 猫", f"a {END} cup"]
    before = CLIPTokenizer.from_folder(tmp_path / "tokenizer")
    as_transformers_5(tmp_path / "tokenizer", merges_as)
    after = CLIPTokenizer.from_folder(tmp_path / "tokenizer")
    assert torch.equal(before(prompts), after(prompts))
    assert (before.vocab_size, before.length) == (after.vocab_size, after.length)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["model"].update(type="Unigram"),
        lambda c: c["model"].update(end_of_word_suffix=""),
        lambda c: c["model"].pop("merges"),
        lambda c: c["model"].update(merges=[["a"]]),
        lambda c: c.pop("model"),
        lambda c: c.update(added_tokens=[{"id": 1}]),
    ],
)
def test_another_tokenizer_json_is_refused(tmp_path, change):
    files.write_tokenizers(tmp_path)
    as_transformers_5(tmp_path / "tokenizer", list)
    path = tmp_path / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: "):
        CLIPTokenizer.from_folder(tmp_path / "tokenizer")


@pytest.mark.parametrize(
    ("index", "shard"),
    [
        ("{}.safetensors.index.bf16.json", "{}.bf16-0000{}-of-00002.safetensors"),
        ("{}.safetensors.index.fp16.json", "{}-0000{}-of-00002.fp16.safetensors"),
        ("{}.safetensors.index.json", "{}-0000{}-of-00002.safetensors"),
        ("{}.bf16.safetensors.index.json", "{}.bf16-0000{}-of-00002.safetensors"),
    ],
)
def test_shards_of_a_variant(tmp_path, env, index, shard):
    files.write_official(tmp_path, STATES)
    files.write_tokenizers(tmp_path)
    folder, stem = tmp_path / "text_encoder_2", "model"
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    names = sorted(STATES["t5"])
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = shard.format(stem, number)
        write.save(folder / file, {name: STATES["t5"][name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    (folder / index.format(stem)).write_text(json.dumps({"weight_map": weight_map}))
    snapshot = finds(tmp_path, env)
    files.assert_holds(files.load_t5(snapshot.paths["t5"], dtype=torch.float32), STATES["t5"])


def test_shards_with_the_names_of_a_wrapper(tmp_path):
    names, weight_map = sorted(STATES["t5"]), {}
    for part, file in ((names[::2], "a-00001-of-00002.safetensors"), (names[1::2], "a-00002-of-00002.sft")):
        write.save(tmp_path / file, wrapped({name: STATES["t5"][name] for name in part}, "module._orig_mod."))
        weight_map |= {f"module._orig_mod.{name}": file for name in part}
    (tmp_path / "a.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    files.assert_holds(files.load_t5(tmp_path, dtype=torch.float32), STATES["t5"])


def test_plain_weights_win_over_a_variant(tmp_path):
    write.save(tmp_path / "model.safetensors", STATES["t5"])
    (tmp_path / "model.safetensors.index.bf16.json").write_text('{"weight_map": {"a": "b.safetensors"}}')
    assert open_checkpoint(tmp_path).path.name == "model.safetensors"


@pytest.mark.parametrize("name", ["flux1-dev.bfl", "flux1-schnell.diffusers", "ae.bfl", "vae.diffusers",
                                  "clip_l.hf", "t5xxl.hf", "bokeh_adapter.all57-qk"])  # fmt: skip
@pytest.mark.parametrize("dot", [".", "_"])
def test_no_name_of_flux_is_that_of_another_model(name, dot):
    names = dict.fromkeys("lora_unet_" + n.replace(".", dot) for n in manifests.shapes(name))
    assert other_model(Checkpoint(Path("x"), names, {})) is None  # type: ignore[arg-type]


# --- a transformer without guidance embedding

UNGUIDED = {name: tensor for name, tensor in TRANSFORMER.items() if not name.startswith("guidance_in")}


@pytest.fixture
def unguided(tree: Path) -> Path:
    path = tree / "models" / "unet" / "flux1-dev.safetensors"
    path.unlink()
    write.save(path, UNGUIDED)
    return path


def test_what_is_assumed_without_guidance_is_said(tree, unguided, env, caplog):
    snapshot = resolve_model(tree, env)
    assert (snapshot.schedule, snapshot.defaults) == (SCHNELL_SCHEDULE, default_card(False))
    (said,) = caplog.messages
    assert str(unguided) in said and "4 steps" in said and "--schedule dev" in said
    assert "--schedule dev" in describe(unguided)


@pytest.mark.parametrize(("name", "schedule"), [("dev", FLUX_SCHEDULE), ("schnell", SCHNELL_SCHEDULE)])
def test_the_schedule_can_be_said(tree, unguided, env, caplog, name, schedule):
    (unguided.parent / "bokehflux.json").write_text("{}")
    snapshot = resolve_model(tree, env, schedule=name)
    assert (snapshot.schedule, snapshot.defaults) == (schedule, default_card(name == "dev"))
    assert not caplog.messages


def test_a_card_holds_beside_a_schedule_that_was_said(tree, unguided, env):
    (tree / "bokehflux.json").write_text('{"num_inference_steps": 9}')
    defaults = resolve_model(tree, env, schedule="dev").defaults
    assert (defaults.num_inference_steps, defaults.txt_length) == (9, 512)


def test_a_dev_without_distillation_that_brings_its_schedule(tmp_path, env, caplog):
    files.write_official(tmp_path, STATES)
    save.save_network(networks.TRANSFORMER, tmp_path / "transformer", files.SCHNELL, UNGUIDED)
    files.write_tokenizers(tmp_path)
    (tmp_path / "bokehflux.json").unlink(missing_ok=True)
    snapshot = resolve_model(tmp_path, env)
    assert (snapshot.schedule, snapshot.defaults) == (FLUX_SCHEDULE, default_card(True))
    assert not caplog.messages


def test_schnell_by_its_name_is_no_guess(tree, unguided, env, caplog):
    assert resolve_model("flux-schnell", env | {"BOKEHFLUX_MODELS": str(tree)}).schedule == SCHNELL_SCHEDULE
    assert not caplog.messages


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="unknown schedule 'fast': expected one of"):
        load("nano", schedule="fast")  # type: ignore[arg-type]


def test_the_schedule_is_recorded_and_made_again():
    pipe = load("nano", schedule="schnell", device="cpu")
    assert pipe.schedule == SCHNELL_SCHEDULE
    assert provenance_of(pipe).recipe()["schedule"] == "schnell" and "schedule" in MODEL_FLAGS


# --- trees of other programs


def lay_out(root: Path, homes: dict[str, str]) -> dict[str, Path]:
    """The four files of a model in the folders of a program."""
    paths = {part: root / home / f"{files.FILES[part]}.safetensors" for part, home in homes.items()}
    for part, path in paths.items():
        write.save(path, STATES[part])
    return paths


TREES = {
    "Forge": ("Stable-diffusion", "VAE", "text_encoder"),
    "A1111 with subfolders": ("Stable-diffusion/flux", "VAE/flux", "text_encoder/t5"),
    "SwarmUI": ("diffusion_models", "VAE", "clip"),
    "StabilityMatrix": ("DiffusionModels", "VAE", "TextEncoders"),
}


@pytest.mark.parametrize("program", TREES)
@pytest.mark.parametrize("models", ["models", "Models"])
def test_trees_of_other_programs(tmp_path, env, program, models):
    transformer, vae, text = TREES[program]
    paths = lay_out(tmp_path / models, {"transformer": transformer, "vae": vae, "clip": text, "t5": text})
    files.write_tokenizers(tmp_path / models / text.split("/")[0])
    for model in (tmp_path, tmp_path / models, paths["transformer"]):
        assert finds(model, env).paths.items() >= paths.items()


def write_invokeai(models: Path, homes: dict[str, str]) -> dict[str, Path]:
    paths = lay_out(models, {part: homes[part] for part in ("transformer", "vae")})
    save.save_network(networks.CLIP, models / homes["clip"] / "text_encoder", files.CLIP, STATES["clip"])
    save.save_network(networks.T5, models / homes["t5"] / "text_encoder_2", files.T5, STATES["t5"])
    files.write_tokenizers(models / "spare")
    (models / "spare" / "tokenizer").rename(models / homes["clip"] / "tokenizer")
    (models / "spare" / "tokenizer_2").rename(models / homes["t5"] / "tokenizer_2")
    # A model of another kind, whose CLIP and tokenizers are not meant.
    other = models / homes["transformer"] / ".." / "sdxl"
    save.save_network(networks.CLIP, other / "text_encoder", files.CLIP, STATES["clip"])
    (other / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    return paths


@pytest.mark.parametrize(
    "homes",
    [
        {
            "transformer": "flux/main/dev",
            "vae": "flux/vae/ae",
            "clip": "any/clip_embed/clip-vit",
            "t5": "any/t5_encoder/t5",
        },
        {"transformer": "0a", "vae": "1b", "clip": "2c", "t5": "3d"},
    ],
)
def test_tree_of_invokeai(tmp_path, env, homes):
    (tmp_path / "invokeai.yaml").write_text("schema_version: 4.0.2\n")
    paths = write_invokeai(tmp_path / "models", homes)
    for model in (tmp_path, paths["transformer"]):
        snapshot = finds(model, env)
        assert snapshot.paths.items() >= paths.items()
        assert snapshot.paths["clip"].parent == tmp_path / "models" / homes["clip"] / "text_encoder"
        assert snapshot.paths["t5_tokenizer"] == tmp_path / "models" / homes["t5"] / "tokenizer_2"
    assert "sdxl is a snapshot for StableDiffusionXLPipeline" in describe(tmp_path)


def test_links_are_followed_and_lead_to_one_file(tree, env, tmp_path):
    models = tree / "models"
    elsewhere = tmp_path / "disk"
    elsewhere.mkdir()
    (models / "unet" / "flux1-dev.safetensors").rename(elsewhere / "flux1-dev.safetensors")
    (models / "unet" / "flux").symlink_to(elsewhere)
    (models / "diffusion_models").symlink_to(models / "unet")  # the two names of one folder
    (elsewhere / "round").symlink_to(models)  # and no end of links
    (models / "vae" / "again.safetensors").symlink_to(models / "vae" / "ae.safetensors")
    found = finds(tree, env).paths
    assert found["transformer"].samefile(elsewhere / "flux1-dev.safetensors")
    assert found["vae"].samefile(models / "vae" / "ae.safetensors")
    assert finds(models / "unet" / "flux" / "flux1-dev.safetensors", env)


def test_a_link_that_became_text_is_named(tree, env):
    path = tree / "models" / "vae" / "ae.safetensors"
    path.write_text("../../blobs/0123456789abcdef0123456789abcdef")
    assert "what became of a link" in refusal(tree, env)


# --- owners of single files


def test_only_the_tokenizers_are_missing(tree, env):
    for name in ("tokenizer", "tokenizer_2"):
        shutil.rmtree(tree / "models" / name)
    message = refusal(tree, env)
    assert "all else was found: `bokehflux fetch flux-dev --tokenizers-only`" in message and "3 MB" in message
    assert "not found: tokenizer/" in message and "not found: vae" not in message
    (tree / "models" / "vae" / "ae.safetensors").unlink()
    assert "all else was found" not in refusal(tree, env)


def test_single_files_need_no_tokenizers(tmp_path, env):
    """The vocabularies of the published encoders come with the package."""
    models = tmp_path / "ComfyUI" / "models"
    homes = {"flux1-dev.bfl": "unet", "ae.bfl": "vae", "clip_l.hf": "clip", "t5xxl.hf": "clip"}
    for name, home in homes.items():
        (models / home).mkdir(parents=True, exist_ok=True)
        files.write_sparse(models / home / f"{name}.safetensors", manifests.shapes(name))
    snapshot = resolve_model(tmp_path / "ComfyUI", env)
    paths = [snapshot.paths[name] for name in ("clip_tokenizer", "t5_tokenizer")]
    assert paths == [VOCABULARIES / "tokenizer", VOCABULARIES / "tokenizer_2"]
    # Those of the model itself come first.
    files.write_tokenizers(models)
    assert resolve_model(tmp_path / "ComfyUI", env).paths["t5_tokenizer"] == models / "tokenizer_2"


def test_the_vocabularies_are_the_published_ones():
    clip = CLIPTokenizer.from_folder(VOCABULARIES / "tokenizer")
    t5 = T5Tokenizer.from_folder(VOCABULARIES / "tokenizer_2")
    assert clip(["a photo of a cat"])[0, :7].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert t5(["a photo of a cat"])[0, :7].tolist() == [3, 9, 1202, 13, 3, 9, 1712]
    assert (clip.vocab_size, clip.length, t5.length) == (49408, 77, 512)
    assert "OpenAI" in (VOCABULARIES / "tokenizer" / "LICENSE").read_text()


SHARED = Path(__file__).parents[3] / "shared" / "flux1-dev-snapshot"


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data")
def test_the_vocabularies_read_as_those_of_the_snapshot():
    prompts = [
        "a red  cup, 2 cats",
        "",
        "don't | a LAMP é 猫",
        "a </s> cup <extra_id_0> <pad> x",
        "— “q”\n\ttab",
    ]
    for read, folder in ((CLIPTokenizer, "tokenizer"), (T5Tokenizer, "tokenizer_2")):
        here, there = (read.from_folder(base / folder) for base in (VOCABULARIES, SHARED))
        assert torch.equal(here(prompts), there(prompts))
