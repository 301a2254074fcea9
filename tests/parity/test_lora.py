"""LoRA names and rows against diffusers: its conversions, and its network with the change in its weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers.loaders import lora_conversion_utils as oracle
from torch import Tensor

from benchmarks.networks import TINY, randomise
from bokehflux.configs import FLUX_DEV, MMDiTConfig
from bokehflux.models.embeddings import rope_table
from bokehflux.models.mmdit import MMDiT
from bokehflux.sampling.latents import LatentGrid, position_ids
from bokehflux.weights.files.write import save
from bokehflux.weights.lora.apply import attach
from bokehflux.weights.lora.read import Lora, read_lora
from tests.oracle.published import build_diffusers


@pytest.fixture(scope="module")
def network() -> MMDiT:
    network = MMDiT(TINY.mmdit).eval().requires_grad_(False)
    randomise(network, torch.Generator().manual_seed(1))
    return network


def assert_close(x: Tensor, y: Tensor, tolerance: float = 1e-5) -> None:
    error = ((x - y).norm() / y.norm()).item()
    assert x.shape == y.shape and error < tolerance, f"relative error {error:.2e}"


def read(folder: Path, tensors: Mapping[str, Tensor], config: MMDiTConfig) -> Lora:
    save(folder / "lora.safetensors", tensors)
    return read_lora(folder / "lora.safetensors", {"transformer": config})


def predictions(network: MMDiT, theirs: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """Ours and diffusers' on the same inputs."""
    config, grid, length = network.config, LatentGrid(height_px=64, width_px=48), 5
    generator = torch.Generator().manual_seed(3)
    shapes = ((2, grid.num_tokens, config.in_channels), (2, length, config.txt_dim), (2, config.pooled_dim))
    img, txt, pooled = (torch.randn(s, generator=generator) for s in shapes)
    sigma, guidance = torch.tensor([0.5, 0.9]), torch.tensor([3.0, 2.0])
    ids = position_ids(grid, length)
    ours = network(img, txt, pooled, sigma, guidance, rope_table(ids, config.axes_dim, config.theta))
    (expected,) = theirs(
        hidden_states=img, encoder_hidden_states=txt, pooled_projections=pooled, timestep=sigma,
        guidance=guidance, img_ids=ids[length:], txt_ids=ids[:length], return_dict=False,
    )  # fmt: skip
    return ours, expected


@pytest.mark.parametrize("style", ["transformer.{}", "lora_transformer_{}", "lycoris_{}", "lora_unet_{}"])
def test_diffusers_names_mean_diffusers_layers(network, style, tmp_path):
    """Every linear layer of their network changed, each its own way: one output."""
    theirs = copy.deepcopy(build_diffusers(network))
    generator = torch.Generator().manual_seed(7)
    tensors: dict[str, Tensor] = {}
    for name, layer in theirs.named_modules():
        if isinstance(layer, torch.nn.Linear):
            rank = 2 + len(tensors) % 3
            down = torch.randn(rank, layer.in_features, generator=generator) / layer.in_features**0.5
            up = torch.randn(layer.out_features, rank, generator=generator) * 0.3
            stem = style.format(name if style.endswith(".{}") else name.replace(".", "_"))
            tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
            tensors[f"{stem}.alpha"] = torch.tensor(1.5)
            layer.weight = torch.nn.Parameter(layer.weight + 1.5 / rank * up @ down, requires_grad=False)
    ours = copy.deepcopy(network)
    before, expected = predictions(ours, theirs)
    assert (before - expected).norm() > 0.1 * expected.norm()
    attach({"transformer": ours}, read(tmp_path, tensors, network.config))
    after, expected = predictions(ours, theirs)
    assert_close(after, expected)


def effects(lora: Lora, config: MMDiTConfig) -> dict[str, Tensor]:
    """What each changed layer adds for one input per layer: compares LoRAs without their dense matrices."""
    result = {}
    for module, terms in lora.terms["transformer"].items():
        x = torch.randn(terms[0].down.shape[1], generator=torch.Generator().manual_seed(0))
        out = torch.zeros(7 * config.hidden_size)
        for t in terms:
            out[t.first : t.first + len(t.up)] += t.strength * (t.up @ (t.down @ x))
        result[module] = out
    return result


def assert_same_effect(ours: Lora, theirs: Lora, config: MMDiTConfig = FLUX_DEV) -> None:
    x, y = effects(ours, config), effects(theirs, config)
    assert x.keys() == y.keys()
    for module in y:
        assert y[module].norm() > 0
        assert_close(x[module], y[module])


def bfl_layers(config: MMDiTConfig) -> dict[str, tuple[int, int]]:
    """Name -> (out, in) of every layer, as BFL calls them."""
    with torch.device("meta"):
        modules = list(MMDiT(config).named_modules())
    return {n: (m.out_features, m.in_features) for n, m in modules if isinstance(m, torch.nn.Linear)}


def random_pairs(layers: Mapping[str, tuple[int, int]], rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(4)
    return {
        name: (torch.randn(rank, width, generator=g), torch.randn(out, rank, generator=g))
        for name, (out, width) in layers.items()
    }


def test_kohya_files_convert_alike(tmp_path):
    """Full size, for their converter knows no other; it has no rules for layers outside the blocks."""
    layers = {n: s for n, s in bfl_layers(FLUX_DEV).items() if "_blocks.0." in n or "_blocks.17." in n}
    tensors = {}
    for n, (name, (down, up)) in enumerate(random_pairs(layers, 3).items()):
        stem = "lora_unet_" + name.replace(".", "_")
        alpha = torch.tensor(0.5 * (n % 5 + 1))
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": alpha}
    converted = oracle._convert_kohya_flux_lora_to_diffusers(dict(tensors))
    assert all(name.startswith("transformer.") for name in converted)
    ours, theirs = read(tmp_path, tensors, FLUX_DEV), read(tmp_path, converted, FLUX_DEV)
    assert set(ours.terms["transformer"]) == set(layers)
    assert_same_effect(ours, theirs)


def test_kohya_text_encoder_converts_alike(tmp_path):
    """CLIP's names; it knows no T5."""
    names = [f"text_model_encoder_layers_{i}_{n}" for i in (0, 11) for n in ("self_attn_q_proj", "mlp_fc1")]
    tensors = {}
    for i, name in enumerate(names):
        out = 3072 if name.endswith("fc1") else 768
        stem = f"lora_te1_{name}"
        tensors |= {
            f"{stem}.lora_down.weight": torch.randn(2, 768),
            f"{stem}.lora_up.weight": torch.randn(out, 2),
        }
        tensors[f"{stem}.alpha"] = torch.tensor(i + 1.0)
    # Copies, for it scales in place.
    converted = oracle._convert_kohya_flux_lora_to_diffusers({n: t.clone() for n, t in tensors.items()})
    # Attention matrices come out under the name of a class that diffusers has given up.
    converted = {n.replace(".to_q_lora.", ".q_proj.lora."): t for n, t in converted.items()}
    ours = read(tmp_path, tensors, FLUX_DEV).terms["clip"]
    theirs = read(tmp_path, converted, FLUX_DEV).terms["clip"]
    assert ours.keys() == theirs.keys() and len(ours) == 4
    for module in ours:
        (x,), (y,) = ours[module], theirs[module]
        assert_close(x.strength * x.up @ x.down, y.strength * y.up @ y.down)


def test_bfl_files_convert_alike(tmp_path):
    """Their converter for BFL's own (control) LoRAs takes the whole network, final layer included."""
    layers = bfl_layers(FLUX_DEV)
    tensors = {}
    for name, (down, up) in random_pairs(layers, 2).items():
        if "adaLN" in name:  # it swaps the rows of the down matrix too, by mistake: harmless for equal rows
            down = down[:1].repeat(2, 1)
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    # It also insists on new scales for the norms, which do not belong to a LoRA: put in, and taken out again.
    norms = [f"double_blocks.{i}.{s}_attn.norm" for i in range(19) for s in ("img", "txt")]
    norms += [f"single_blocks.{i}.norm" for i in range(38)]
    scales = {f"{n}.{k}_norm.scale": torch.ones(1) for n in norms for k in ("query", "key")}
    converted = oracle._convert_bfl_flux_control_lora_to_diffusers({**tensors, **scales})
    converted = {n: t for n, t in converted.items() if ".attn.norm_" not in n}
    ours = read(tmp_path, {f"diffusion_model.{n}": t for n, t in tensors.items()}, FLUX_DEV)
    theirs = read(tmp_path, converted, FLUX_DEV)
    assert set(ours.terms["transformer"]) == set(layers)
    assert_same_effect(ours, theirs)


def test_xlabs_files_convert_alike(tmp_path):
    config = TINY.mmdit
    width = config.hidden_size
    layers = {}
    for i in range(config.num_double):
        for stream in "12":
            layers[f"double_blocks.{i}.processor.qkv_lora{stream}"] = (3 * width, width)
            layers[f"double_blocks.{i}.processor.proj_lora{stream}"] = (width, width)
    for i in range(config.num_single):
        layers[f"single_blocks.{i}.processor.qkv_lora"] = (3 * width, width)
        layers[f"single_blocks.{i}.processor.proj_lora"] = (width, 5 * width)
    tensors = {}
    for name, (down, up) in random_pairs(layers, 3).items():
        tensors |= {f"{name}.down.weight": down, f"{name}.up.weight": up}
    converted = oracle._convert_xlabs_flux_lora_to_diffusers(dict(tensors))
    ours, theirs = read(tmp_path, tensors, config), read(tmp_path, converted, config)
    assert len(ours.terms["transformer"]) == len(layers)
    assert_same_effect(ours, theirs, config)
