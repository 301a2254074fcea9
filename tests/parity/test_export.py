"""The official libraries open what we export, and find in it the tensors that our networks hold."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL as OfficialVAE
from diffusers import FluxTransformer2DModel
from transformers import CLIPTextModel, T5EncoderModel

from bokehflux.configs import CLIPConfig, MMDiTConfig, T5Config, VAEConfig
from bokehflux.weights import networks
from bokehflux.weights.load import load_network, load_transformer
from bokehflux.weights.mapping import to_official
from bokehflux.weights.save import save_network

MMDIT = MMDiTConfig(
    in_channels=8, txt_dim=8, pooled_dim=4, hidden_size=12, num_heads=2, num_double=2, num_single=3,
    axes_dim=(2, 2, 2), guidance_embed=True,
)  # fmt: skip
VAE = VAEConfig(
    channels=(4, 8, 8), layers_per_block=1, latent_channels=4, norm_groups=2, scale=0.5, shift=0.1
)
T5 = T5Config(vocab_size=11, width=8, head_dim=4, mlp_size=6, num_layers=2, num_heads=2)
CLIP = CLIPConfig(vocab_size=11, width=4, mlp_size=6, num_layers=2, num_heads=2, eos_token_id=9)
CASES = {
    "transformer": (networks.TRANSFORMER, MMDIT, FluxTransformer2DModel),
    "vae": (networks.VAE, VAE, OfficialVAE),
    "t5": (networks.T5, T5, T5EncoderModel),
    "clip": (networks.CLIP, CLIP, CLIPTextModel),
}


@pytest.mark.parametrize("name", CASES)
def test_official_classes_open_our_exports(tmp_path, name):
    row, config, official_class = CASES[name]
    state = {n: torch.randn(t.shape) for n, t in row.build(config).state_dict().items()}
    save_network(row, tmp_path, config, state)
    network, report = official_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    loaded = network.state_dict()
    loaded.pop("encoder.embed_tokens.weight", None)  # tied to shared.weight
    # CLIP has other names since transformers 5.6, which opens the older ones, too.
    named = (to_official(table, state) for table in row.tables)
    expected = next((one for one in named if one.keys() == loaded.keys()), None)
    assert expected is not None
    assert all(torch.equal(loaded[n], t) for n, t in expected.items())


@pytest.mark.parametrize("limit", ["1GB", "2KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("variant", [None, "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_we_open_what_official_classes_write(tmp_path, name, variant, limit):
    """Names, configs, and the index of a variant's shards, as these versions of the libraries write them."""
    row, config, official_class = CASES[name]
    state = {n: torch.randn(t.shape) for n, t in row.build(config).state_dict().items()}
    save_network(row, tmp_path / "ours", config, state)
    official = official_class.from_pretrained(tmp_path / "ours")
    official.save_pretrained(tmp_path / "theirs", variant=variant, max_shard_size=limit)
    assert (len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1) == (limit == "2KB")
    if row is networks.TRANSFORMER:
        network = load_transformer(tmp_path / "theirs", dtype=torch.float32)
    else:
        network = load_network(row, tmp_path / "theirs", dtype=torch.float32)
    assert network.config == config
    loaded = network.state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[n], t) for n, t in state.items())
