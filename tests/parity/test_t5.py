"""T5Encoder against transformers' T5EncoderModel: random small shapes, odd lengths, both precisions."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import T5EncoderModel
from transformers.models.t5.modeling_t5 import T5Attention as OracleAttention

from bokehflux.configs import T5_XXL, T5Config
from bokehflux.models.t5 import T5Encoder, relative_position_bucket
from tests.helpers import needs_shared, shared

configs = st.builds(
    T5Config,
    vocab_size=st.just(50),
    width=st.sampled_from([8, 24, 40]),
    head_dim=st.sampled_from([4, 7]),
    mlp_size=st.sampled_from([16, 33]),
    num_layers=st.integers(1, 3),
    num_heads=st.integers(1, 3),
    num_buckets=st.sampled_from([8, 32]),
    max_distance=st.sampled_from([20, 128]),
    eps=st.sampled_from([1e-6, 1e-3]),
)


def oracle(config: T5Config) -> T5EncoderModel:
    return T5EncoderModel(
        transformers.T5Config(
            vocab_size=config.vocab_size,
            d_model=config.width,
            d_kv=config.head_dim,
            d_ff=config.mlp_size,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            relative_attention_num_buckets=config.num_buckets,
            relative_attention_max_distance=config.max_distance,
            layer_norm_epsilon=config.eps,
            feed_forward_proj="gated-gelu",
        )
    ).eval()


def pair(config: T5Config, seed: int) -> tuple[T5Encoder, T5EncoderModel]:
    """Both encoders with the same weights: ours, with norms and biases moved off their initial values."""
    torch.manual_seed(seed)
    ours, theirs = T5Encoder(config), oracle(config)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.5)
    weights = dict(ours.state_dict())
    weights["encoder.embed_tokens.weight"] = weights["shared.weight"]
    theirs.load_state_dict(weights, strict=True)
    return ours, theirs


@settings(max_examples=12)
@given(configs, st.integers(1, 3), st.sampled_from([1, 2, 7, 31, 150]), st.integers(0, 2**31))
def test_states_equal_transformers(config: T5Config, batch: int, length: int, seed: int) -> None:
    ours, theirs = pair(config, seed)
    ids = torch.randint(config.vocab_size, (batch, length))
    torch.testing.assert_close(ours(ids), theirs(ids)[0], atol=1e-5, rtol=1e-5)


@settings(max_examples=8)
@given(configs, st.sampled_from([1, 5, 63]), st.integers(0, 2**31))
def test_bfloat16_is_as_accurate_as_transformers(config: T5Config, length: int, seed: int) -> None:
    ours, theirs = pair(config, seed)
    ids = torch.randint(config.vocab_size, (max(2, 200 // length), length))
    # The reference runs in float32 on weights that bfloat16 can hold.
    ours, theirs = ours.bfloat16(), theirs.bfloat16()
    low_ours, low_theirs = ours(ids), theirs(ids)[0]
    exact = theirs.float()(ids)[0]
    assert low_ours.dtype == torch.bfloat16
    # Of networks as small as these the largest error is often twice another's by chance; the mean is not.
    error, other = ((x.float() - exact).square().mean().sqrt() for x in (low_ours, low_theirs))
    assert error <= 1.5 * other


@settings(max_examples=6)
@given(configs, st.integers(0, 2**31))
def test_gradients_equal_transformers(config: T5Config, seed: int) -> None:
    ours, theirs = pair(config, seed)
    ids = torch.randint(config.vocab_size, (2, 9))
    target = torch.randn(2, 9, config.width)
    (ours(ids) * target).sum().backward()
    (theirs(ids)[0] * target).sum().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 20), (16, 64)])
def test_buckets_equal_transformers(num_buckets: int, max_distance: int) -> None:
    relative = torch.arange(-600, 601)
    expected = OracleAttention._relative_position_bucket(relative, True, num_buckets, max_distance)
    bucket = relative_position_bucket(relative, num_buckets, max_distance)
    assert torch.equal(bucket, expected)
    # Distance zero counts as backwards, so the first bucket of the other direction stays empty.
    assert bucket.unique().tolist() == [i for i in range(num_buckets) if i != num_buckets // 2]


def test_untrained_weights_are_drawn_as_transformers_does() -> None:
    config = T5Config(vocab_size=300, width=48, head_dim=16, mlp_size=80, num_layers=2, num_heads=3)
    torch.manual_seed(0)
    expected = dict(oracle(config).named_parameters())
    for name, parameter in T5Encoder(config).named_parameters():
        assert abs(parameter.std() / expected[name].std() - 1) < 0.2 or "norm" in name, name
        assert abs(parameter.mean() - expected[name].mean()) < 0.3 * (expected[name].std() + 1e-6), name


@needs_shared
def test_names_and_shapes_are_those_of_the_xxl_file() -> None:
    published = json.loads(shared("manifests/t5xxl.hf.json").read_text())["tensors"]
    del published["encoder.embed_tokens.weight"]
    with torch.device("meta"):
        ours = {name: list(tensor.shape) for name, tensor in T5Encoder(T5_XXL).state_dict().items()}
    assert ours == {name: entry["shape"] for name, entry in published.items()}
