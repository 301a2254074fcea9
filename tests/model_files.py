"""A tiny FLUX-shaped model written in every layout that people keep their files in."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bokehflux.configs import FLUX_SCHEDULE, CLIPConfig, MMDiTConfig, T5Config, VAEConfig
from bokehflux.models.clip import CLIPTextEncoder
from bokehflux.models.mmdit import MMDiT
from bokehflux.models.t5 import T5Encoder
from bokehflux.models.vae import AutoencoderKL
from bokehflux.nano.tokenizers import train_tokenizers
from bokehflux.weights import networks
from bokehflux.weights import save as export
from bokehflux.weights.codec import Codec, Shapes
from bokehflux.weights.files import write
from bokehflux.weights.find.snapshot import default_card
from bokehflux.weights.load import load_network, load_transformer

MMDIT = MMDiTConfig(
    in_channels=64, txt_dim=32, pooled_dim=64, hidden_size=128, num_heads=1, num_double=1, num_single=1,
    axes_dim=(16, 56, 56), guidance_embed=True,
)  # fmt: skip
SCHNELL = dataclasses.replace(MMDIT, guidance_embed=False)
VAE = VAEConfig(
    channels=(32, 32), layers_per_block=1, latent_channels=16, norm_groups=32, scale=0.3611, shift=0.1159
)
T5 = T5Config(vocab_size=512, width=32, head_dim=32, mlp_size=64, num_layers=2, num_heads=2, num_buckets=8)
CLIP = CLIPConfig(vocab_size=1024, width=64, mlp_size=96, num_layers=2, num_heads=1, max_length=16)
"""Shapes that tell all of the config: head dims 128 and 64, 16 latent channels."""
NETWORKS = {"transformer": (MMDiT, MMDIT), "vae": (AutoencoderKL, VAE), "clip": (CLIPTextEncoder, CLIP),
            "t5": (T5Encoder, T5)}  # fmt: skip
FILES = {"transformer": "flux1-dev", "vae": "ae", "clip": "clip_l", "t5": "t5xxl_fp16"}
PREFIXES = {
    "transformer": "model.diffusion_model.", "vae": "vae.", "clip": "text_encoders.clip_l.transformer.",
    "t5": "text_encoders.t5xxl.transformer.",
}  # fmt: skip
States = Mapping[str, Mapping[str, Tensor]]
load_vae, load_clip, load_t5 = (
    functools.partial(load_network, row) for row in (networks.VAE, networks.CLIP, networks.T5)
)
LOADERS = {"transformer": load_transformer, "vae": load_vae, "clip": load_clip, "t5": load_t5}


def told(codec: Codec[Any], shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """The config that the shapes of a file tell."""
    return codec.from_shapes(Shapes(shapes, codec.what, "file"))


def random_state(network: nn.Module) -> dict[str, Tensor]:
    return {name: 0.1 * torch.randn(t.shape) for name, t in network.state_dict().items()}


def states() -> dict[str, dict[str, Tensor]]:
    """The state of every network in our names, those of the bare official files."""
    torch.manual_seed(3)
    return {name: random_state(build(config)) for name, (build, config) in NETWORKS.items()}


def write_tokenizers(folder: Path) -> None:
    """`tokenizer/` and `tokenizer_2/`."""
    train_tokenizers(["a red cup on a table", "a cat and a lamp"] * 3, folder, length=16)


def write_flat(folder: Path, parts: States, suffix: str = ".safetensors") -> dict[str, Path]:
    """Four bare files in one folder."""
    paths = {name: folder / (FILES[name] + suffix) for name in parts}
    for name, path in paths.items():
        write.save(path, parts[name])
    return paths


def write_official(folder: Path, parts: States) -> None:
    """The snapshot layout, without tokenizers."""
    export.save_network(networks.TRANSFORMER, folder / "transformer", MMDIT, parts["transformer"])
    export.save_network(networks.VAE, folder / "vae", VAE, parts["vae"])
    export.save_network(networks.CLIP, folder / "text_encoder", CLIP, parts["clip"])
    export.save_network(networks.T5, folder / "text_encoder_2", T5, parts["t5"])
    export.save_schedule(folder / "scheduler", FLUX_SCHEDULE)
    export.save_index(folder, default_card(True))


def write_comfyui(folder: Path, parts: States) -> dict[str, Path]:
    """The tree below `models/`."""
    homes = {"transformer": "unet", "vae": "vae", "clip": "clip", "t5": "text_encoders"}
    paths = {name: folder / homes[name] / f"{FILES[name]}.safetensors" for name in parts}
    for name, path in paths.items():
        write.save(path, parts[name])
    return paths


def all_in_one(parts: States, prefixes: Mapping[str, str] = PREFIXES) -> dict[str, Tensor]:
    """Everything in one file's tensors, as ComfyUI saves it."""
    tensors = {prefixes[part] + name: t for part, state in parts.items() for name, t in state.items()}
    return tensors | {"text_encoders.clip_l.logit_scale": torch.tensor(4.6)}


def write_sparse(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "BF16", size: int = 2
) -> int:
    """A .safetensors file whose header declares tensors and whose data is a hole; returns its size."""
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + math.prod(shape) * size
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    return path.stat().st_size


def assert_holds(network: nn.Module, expected: Mapping[str, Tensor]) -> None:
    """Every parameter equals the tensor of that name, in the network's dtype."""
    state = network.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor.to(state[name].dtype)), name
