"""CLIPTextEncoder against transformers' CLIPTextModel: random small shapes, odd lengths, both poolings."""

from __future__ import annotations

import json

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from bokehflux.configs import CLIP_L, CLIPConfig
from bokehflux.models.clip import CLIPTextEncoder
from bokehflux.weights.mapping import to_official
from bokehflux.weights.tables import clip
from tests.helpers import assert_within_2x, needs_shared, shared

VOCAB = 50

configs = st.builds(
    CLIPConfig,
    vocab_size=st.just(VOCAB),
    width=st.sampled_from([12, 24]),
    mlp_size=st.sampled_from([16, 33]),
    num_layers=st.integers(1, 3),
    num_heads=st.integers(1, 3),
    max_length=st.sampled_from([31, 77]),
    eos_token_id=st.sampled_from([2, 7, VOCAB - 1]),
    eps=st.sampled_from([1e-5, 1e-2]),
)
lengths = st.sampled_from([1, 2, 13, 31])


def official(state: dict[str, Tensor], theirs: CLIPTextModel) -> dict[str, Tensor]:
    """Our tensors under the names of this transformers: ours, and since 5.6 those without `text_model.`."""
    flat = "embeddings.token_embedding.weight" in theirs.state_dict()
    return to_official(clip.FLAT, state) if flat else state


def pair(config: CLIPConfig, seed: int) -> tuple[CLIPTextEncoder, CLIPTextModel]:
    """Both encoders with the same weights: ours, with norms and biases moved off their initial values."""
    torch.manual_seed(seed)
    ours = CLIPTextEncoder(config)
    theirs = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=config.mlp_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            max_position_embeddings=config.max_length,
            eos_token_id=config.eos_token_id,
            layer_norm_eps=config.eps,
        )
    ).eval()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.5)
            if "embedding" in name:
                parameter.mul_(30)
    theirs.load_state_dict(official(ours.state_dict(), theirs), strict=True)
    return ours, theirs


def tokens(config: CLIPConfig, length: int) -> Tensor:
    """Random ids: a row with the end token once, one with it repeated as padding, and whatever comes."""
    ids = torch.randint(VOCAB, (3, length))
    ids[0, length // 2] = config.eos_token_id
    ids[1, length // 3 :] = config.eos_token_id
    return ids


@settings(max_examples=16)
@given(configs, lengths, st.integers(0, 2**31))
def test_states_and_pooled_equal_transformers(config: CLIPConfig, length: int, seed: int) -> None:
    ours, theirs = pair(config, seed)
    ids = tokens(config, length)
    expected = theirs(ids)
    torch.testing.assert_close(ours.states(ids), expected.last_hidden_state, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours(ids), expected.pooler_output, atol=1e-5, rtol=1e-5)


@settings(max_examples=8)
@given(configs, lengths, st.integers(0, 2**31))
def test_bfloat16_is_as_accurate_as_transformers(config: CLIPConfig, length: int, seed: int) -> None:
    ours, theirs = (model.bfloat16() for model in pair(config, seed))
    ids = tokens(config, length)
    low_ours, low_theirs = ours.states(ids), theirs(ids).last_hidden_state
    assert low_ours.dtype == torch.bfloat16
    # The reference runs in float32 on weights that bfloat16 can hold.
    assert_within_2x(low_ours, low_theirs, theirs.float()(ids).last_hidden_state)


@settings(max_examples=6)
@given(configs, st.integers(0, 2**31))
def test_gradients_equal_transformers(config: CLIPConfig, seed: int) -> None:
    ours, theirs = pair(config, seed)
    ids = tokens(config, 9)
    target = torch.randn(3, config.width)
    (ours(ids) * target).sum().backward()
    (theirs(ids).pooler_output * target).sum().backward()
    expected = dict(theirs.named_parameters())
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert len(gradients) == len(expected)
    for name, gradient in official(gradients, theirs).items():
        torch.testing.assert_close(gradient, expected[name].grad, atol=1e-4, rtol=1e-3, msg=name)


@needs_shared
def test_names_and_shapes_are_those_of_the_published_file() -> None:
    published = json.loads(shared("manifests/clip_l.hf.json").read_text())["tensors"]
    with torch.device("meta"):
        ours = {name: list(tensor.shape) for name, tensor in CLIPTextEncoder(CLIP_L).state_dict().items()}
    assert ours == {name: entry["shape"] for name, entry in published.items()}
