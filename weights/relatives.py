"""Files of other models, and forms in which weights cannot be read: named for what they are.

Told by tensor names and shapes, as our own networks are. The names are those of checkpoints and of LoRAs,
which have underscores for dots: no pattern may fit a name of FLUX.1 in either form.
"""

from __future__ import annotations

import re

from .files.checkpoint import Checkpoint
from .tables.flux import image_input

_START = r"(?:^|[._])"

MODELS: tuple[tuple[str, str], ...] = (
    (r"double_stream_modulation_img[._]lin", "FLUX.2"),
    (r"single_transformer_blocks[._]\d+[._]attn[._]to_qkv_mlp_proj", "FLUX.2"),
    (r"distilled_guidance_layer[._]", "Chroma"),
    (r"nerf_blocks[._]", "Chroma Radiance"),
    (r"transformer_blocks[._]\d+[._](?:img|txt)_(?:mod[._]1|mlp[._]net)[._]", "Qwen-Image"),
    (r"(?:cap_pad_token|x_pad_token)$", "Z-Image"),
    (r"(?:noise|context)_refiner[._]\d+[._]", "Z-Image or Lumina Image 2"),
    (r"joint_blocks[._]\d+[._]", "Stable Diffusion 3"),
    (r"pos_embed[._]proj[._](?:weight|bias)$", "Stable Diffusion 3 or PixArt"),
    (r"joint_transformer_blocks[._]\d+[._]|single_layers[._]\d+[._]modC[._]", "AuraFlow"),
    (r"double_stream_blocks[._]\d+[._]", "HiDream"),
    (r"individual_token_refiner[._]", "HunyuanVideo"),
    (r"double_blocks\.\d+\.img_attn_qkv\.", "HunyuanVideo"),
    (r"patchify_proj[._]|adaln_single[._]", "LTX-Video or PixArt"),
    (r"blocks[._]\d+[._](?:self|cross)_attn[._][qkvo][._]", "Wan"),
    (r"(?:input|middle|output)_blocks?[._]\d+[._]", "Stable Diffusion 1, 2 or XL"),
    (r"attentions[._]\d+[._]transformer_blocks[._]", "Stable Diffusion 1, 2 or XL"),
    (r"controlnet_(?:x_embedder|blocks|single_blocks|mode_embedder)[._]", "a ControlNet of FLUX.1"),
    (r"redux_(?:up|down)[._]", "the image adapter of FLUX.1 Redux"),
    (r"ip_adapter_\w+[._]|ip_adapter_proj_model[._]", "an IP-Adapter of FLUX.1"),
)  # fmt: skip
"""(pattern of a name, what has such names)."""

FORMS: tuple[tuple[str, str], ...] = (
    (r"\.(?:SCB|weight_format)$", "bitsandbytes (8 bits)"),
    (r"\.(?:absmax|quant_map|quant_state\.bitsandbytes__\w+)$", "bitsandbytes (NF4, FP4)"),
    (r"\.weight\._(?:data|scale|shift)$|\.weight_qtype$", "optimum-quanto"),
    (r"\.wscales$|\.wtscale$|\.smooth_factor(?:_orig)?$|\.smooth_orig$", "SVDQuant (nunchaku)"),
    (r"\.g_idx$", "GPTQ"),
    (r"\.qweight$|\.qzeros$", "AWQ"),
    (r"_weight_qdata$|\.weight\.(?:qdata|tensor_impl)", "torchao"),
)
"""(pattern of a name, what stores weights so)."""
_FIRST_OF_DECODER = ("decoder.conv_in.weight", "decoder.conv1.weight", "decoder.conv_in.conv.weight")
_MODELS = [(re.compile(_START + f"(?:{pattern})", re.M), what) for pattern, what in MODELS]
_FORMS = [(re.compile(pattern, re.M), what) for pattern, what in FORMS]
_OTHERS = re.compile(
    r"(?<![a-z0-9])(?:sd[\W_]?3|sd[\W_]?xl|sd[\W_]?1|wan|qwen|hunyuan|flux[\W_]?2|z[\W_]?image|chroma|lumina|hidream)",
    re.IGNORECASE,
)
_SD3 = re.compile(r"(?<![a-z0-9])(?:sd|stable[\W_]?diffusion)[\W_]?v?3", re.IGNORECASE)
_REPO = re.compile(r"FLUX\.1-(Kontext|Fill|Depth|Canny)-dev", re.IGNORECASE)
_TASK = re.compile(
    r"(kontext)|flux[\W_]*1?[\W_]*(?:dev[\W_]*)?(fill|depth|canny)(?![^\W_])(?![\W_]+of)", re.IGNORECASE
)


def stranger(checkpoint: Checkpoint) -> str | None:
    """Why no network of a checkpoint can be used: another model, or a form that cannot be read. None for all
    others, ours and unknown ones."""
    names = "\n".join(checkpoint.tensors)
    for pattern, form in _FORMS:
        if pattern.search(names):
            return f"is stored by {form}, which cannot be used: take a file in bf16, fp16, fp8 or GGUF"
    if what := other_model(checkpoint):
        return f"is {what}: not supported, a model of FLUX.1 dev or schnell is needed"
    for name, info in checkpoint.tensors.items():
        if name.endswith(_FIRST_OF_DECODER) and len(info.shape) == 5:
            return "is the autoencoder of a video model or of Qwen-Image: not supported, FLUX.1's is needed"
    for prefix in ("", "model.diffusion_model.", "diffusion_model."):
        for first, last in (("img_in", "final_layer.linear"), ("x_embedder", "proj_out")):
            taken = checkpoint.tensors.get(f"{prefix}{first}.weight")
            given = checkpoint.tensors.get(f"{prefix}{last}.weight")
            if taken and given and len(taken.shape) == len(given.shape) == 2:
                if problem := image_input(taken.shape[1], given.shape[0]):
                    return f"is {problem}"
    return None


def other_model(checkpoint: Checkpoint) -> str | None:
    """Which other model a checkpoint or a LoRA is of, if its names tell."""
    names = "\n".join(checkpoint.tensors)
    return next((what for pattern, what in _MODELS if pattern.search(names)), None)


def is_named_after_another(checkpoint: Checkpoint) -> bool:
    """Whether metadata or, last, the names of file and folder speak of another model. Shapes say more where
    they differ; this decides between files that are alike, such as the autoencoders of FLUX.1 and SD3."""
    path = checkpoint.path
    return task(checkpoint) is not None or any(_OTHERS.search(name) for name in (path.stem, path.parent.name))


def like_autoencoder(checkpoint: Checkpoint) -> str | None:
    """What an autoencoder of FLUX.1's shapes calls itself, where that is another with the same shapes."""
    path = checkpoint.path
    if any(_SD3.search(text) for text in (*_words(checkpoint), path.stem, path.parent.name)):
        return "calls itself the autoencoder of Stable Diffusion 3, which has the shapes of FLUX.1's"
    return None


def _words(checkpoint: Checkpoint) -> list[str]:
    """What a file's metadata say of its model."""
    about = ("modelspec.", "ss_base_model", "ss_sd_model", "ss_output_name")
    return [value for key, value in checkpoint.metadata.items() if key.startswith(about)]


def task(checkpoint: Checkpoint) -> str | None:
    """Kontext, Fill, Depth or Canny, where no shape tells: by the file's metadata or, last, by its name."""
    for text in (*_words(checkpoint), checkpoint.path.stem):
        if match := _TASK.search(text):
            return (match[1] or match[2]).capitalize()
    folders = (_REPO.search(part) for part in checkpoint.path.parts)
    return next((match[1].capitalize() for match in folders if match), None)
