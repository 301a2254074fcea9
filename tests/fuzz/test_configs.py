"""Configs, cards, adapters' and tokenizers' files with anything in them: loaded, or one clear ValueError."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bokehflux.configs import MAX_LAYERS, BokehConfig, Defaults, MMDiTConfig, T5Config
from bokehflux.models.adapter import BokehAdapter
from bokehflux.text.tokenizers import CLIPTokenizer, T5Tokenizer, TokenizerError
from bokehflux.weights import networks
from bokehflux.weights import save as export
from bokehflux.weights.files.checkpoint import CheckpointError
from bokehflux.weights.files.write import save
from bokehflux.weights.find.snapshot import open_snapshot
from bokehflux.weights.load import load_network, load_transformer
from bokehflux.weights.lora.read import read_lora
from tests import model_files
from tests.fuzz.hostile import HUGE, JSON, TEXTS, changed

ADAPTER = networks.adapter_for(model_files.MMDIT)
LOADERS: dict[str, Callable[[Path], object]] = {
    "transformer/config.json": load_transformer,
    "vae/config.json": model_files.load_vae,
    "text_encoder/config.json": model_files.load_clip,
    "text_encoder_2/config.json": model_files.load_t5,
    "adapter/config.json": lambda folder: load_network(ADAPTER, folder),
    "scheduler/scheduler_config.json": lambda folder: open_snapshot(folder.parent),
    "bokehflux.json": open_snapshot,
    "tokenizer/tokenizer_config.json": CLIPTokenizer.from_folder,
    "tokenizer/vocab.json": CLIPTokenizer.from_folder,
    "tokenizer_2/tokenizer_config.json": T5Tokenizer.from_folder,
    "tokenizer_2/tokenizer.json": T5Tokenizer.from_folder,
}
"""Every JSON file of a model, and who reads its folder."""
LISTS = {
    "transformer/config.json": {"axes_dims_rope"},
    "vae/config.json": {"block_out_channels", "down_block_types", "up_block_types"},
    "adapter/config.json": {"blocks"},
}
FURTHER = [
    "adapter",
    "added_tokens_decoder",
    "additional_special_tokens",
    "extra_ids",
    "legacy",
    "eos_token",
    "model_max_length",
    "_class_name",
    "model_type",
    "out_channels",
    "lora_alpha",
    "shift",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model with an adapter, in the official layout."""
    root = tmp_path_factory.mktemp("model")
    model_files.write_official(root, model_files.states())
    model_files.write_tokenizers(root)
    config = BokehConfig(blocks=(0, 1), rank=4)
    adapter = BokehAdapter(config, model_files.MMDIT).state_dict()
    export.save_network(networks.adapter_for(model_files.MMDIT), root / "adapter", config, adapter)
    for name, load in LOADERS.items():
        load((root / name).parent)
    return root


def outcome(load: Callable[[Path], object], path: Path) -> str:
    """The message of the one error there may be. Zero-element tensors and the like may warn."""
    try:
        load(path.parent)
    except ValueError as error:
        assert str(error).strip()
        return str(error)
    return ""


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("name", LOADERS)
@settings(max_examples=100)
@given(data=st.data())
def test_any_value_in_any_file_is_used_or_refused(model, name, data):
    path = model / name
    good = json.loads(path.read_text())
    keys = [key for key in list(good)[:40] + FURTHER]
    value = data.draw(JSON)
    with changed(path, {**good, data.draw(st.sampled_from(keys)): value}):
        outcome(LOADERS[name], path)


@pytest.mark.parametrize("name", LOADERS)
def test_files_that_are_no_json_object(model, name):
    path = model / name
    for text in TEXTS:
        with changed(path, text):
            assert path.name in outcome(LOADERS[name], path), text[:20]


@pytest.mark.parametrize(
    "name", [n for n in LOADERS if n.startswith("tokenizer_2")] + ["tokenizer/vocab.json"]
)
@settings(max_examples=60)
@given(data=st.data())
def test_tokenizers_with_any_value_anywhere_below(model, name, data):
    """The `tokenizers` library panics on some of these, and a panic is not an Exception in Python."""
    path = model / name

    def mutated(value: Any, depth: int) -> Any:
        if isinstance(value, dict | list) and value and (depth < 1 or data.draw(st.integers(0, 3))):
            keys = list(value) if isinstance(value, dict) else list(range(len(value)))
            key = data.draw(st.sampled_from(keys[:50]))
            copy: Any = dict(value) if isinstance(value, dict) else list(value)
            copy[key] = mutated(value[key], depth + 1)
            return copy
        return data.draw(JSON)

    with changed(path, mutated(json.loads(path.read_text()), 0)):
        try:
            tokenizer: Any = LOADERS[name](path.parent)
        except TokenizerError:
            return
        assert tokenizer(["a red cup \U0001f33c", ""], 8).shape == (2, 8)


@settings(max_examples=40)
@given(st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
def test_any_merges_file(model, content):
    with changed(model / "tokenizer" / "merges.txt", content):
        try:
            CLIPTokenizer.from_folder(model / "tokenizer")
        except TokenizerError as error:
            assert str(error)


def test_a_tokenizer_file_without_end_is_not_read(model):
    """A hole in a file costs no disk, and would cost 8 GB of memory."""
    for name in ("tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer_2/tokenizer.json"):
        path = model / name
        with changed(path, path.read_bytes()):
            with path.open("r+b") as file:
                file.truncate(8 << 30)
            load = CLIPTokenizer if "tokenizer/" in name else T5Tokenizer
            with pytest.raises(TokenizerError, match="8589934592 bytes"):
                load.from_folder(path.parent)


@pytest.mark.parametrize("name", ["extra_ids", "added_tokens_decoder"])
def test_ids_without_end_are_not_counted_out(model, tmp_path, name):
    """Each would be a token; with spiece.model alone, a config decides how many there are."""
    config = json.loads((model / "tokenizer_2" / "tokenizer_config.json").read_text())
    huge = {"extra_ids": 10**12, "added_tokens_decoder": {str(10**12): {"content": "<x>"}}}[name]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, name: huge}))
    (tmp_path / "spiece.model").write_bytes(b"")
    with pytest.raises(TokenizerError, match=name):
        T5Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("key", ["num_layers", "num_single_layers"])
@pytest.mark.parametrize("count", [MAX_LAYERS + 1, *HUGE])
def test_no_network_of_a_billion_blocks_is_built(model, key, count):
    path = model / "transformer" / "config.json"
    with changed(path, {**json.loads(path.read_text()), key: count}):
        assert "whole number" in outcome(load_transformer, path)


@pytest.mark.parametrize(
    "build",
    [
        lambda: T5Config(vocab_size=8, width=4, head_dim=4, mlp_size=4, num_layers=True, num_heads=1),
        lambda: T5Config(vocab_size=8, width=4, head_dim=4, mlp_size=4, num_layers=1, num_heads=0),
        lambda: T5Config(
            vocab_size=8, width=4, head_dim=4, mlp_size=4, num_layers=1, num_heads=1, eps=float("nan")
        ),
        lambda: BokehConfig(blocks=(0,), rank=2, alpha="1"),  # type: ignore[arg-type]
        lambda: BokehConfig(blocks=[0], rank=2),  # type: ignore[arg-type]
        lambda: Defaults(num_inference_steps=1, height_px=10**9, width_px=16, txt_length=8),
        lambda: MMDiTConfig(
            in_channels=4,
            txt_dim=4,
            pooled_dim=4,
            hidden_size=8,
            num_heads=1,
            num_double=1,
            num_single=0,
            axes_dim=(8,),
            guidance_embed=1,
        ),  # type: ignore[arg-type]
    ],
)
def test_configs_refuse_values_of_other_types_by_name(build):
    with pytest.raises(ValueError, match="must be"):
        build()


@pytest.mark.parametrize(
    ("name", "key"), [(name, key) for name, keys in LISTS.items() for key in sorted(keys)]
)
def test_lists_that_are_no_lists(model, name, key):
    path = model / name
    with changed(path, {**json.loads(path.read_text()), key: 3}):
        assert outcome(LOADERS[name], path)


def adapter_file(folder: Path, name: str, shape: list[int]) -> Path:
    config = BokehConfig(blocks=(0, 1), rank=4)
    save(
        folder / "a.safetensors",
        {**BokehAdapter(config, model_files.MMDIT).state_dict(), name: torch.ones(shape)},
    )
    return folder / "a.safetensors"


@pytest.mark.parametrize("name", ["embedding_layer.0.weight", "adapter_modules.0.to_q_adp.down.weight"])
def test_adapters_with_tensors_that_are_no_matrices(tmp_path, name):
    with pytest.raises(CheckpointError):
        load_network(ADAPTER, adapter_file(tmp_path, name, []))


def test_a_card_that_names_an_adapter_no_file_can_be_called(model):
    path = model / "bokehflux.json"
    with changed(path, {**json.loads(path.read_text()), "adapter": "x" * 5000}):
        assert outcome(open_snapshot, path)


# LoRA


STEM = "transformer.transformer_blocks.0.attn.to_q"
LORA = {"transformer": model_files.MMDIT}


def lora_tensors() -> dict[str, torch.Tensor]:
    width = model_files.MMDIT.hidden_size
    return {f"{STEM}.lora_A.weight": torch.ones(2, width), f"{STEM}.lora_B.weight": torch.ones(width, 2)}


@settings(max_examples=80)
@given(
    st.dictionaries(
        st.sampled_from(
            ["lora_alpha", "alpha_pattern", "rank_pattern", "use_dora", "use_rslora", "r", "peft_type"]
        ),
        JSON | st.dictionaries(st.sampled_from([STEM, "to_q", "", "x", "attn.to_q"]), JSON, max_size=2),
    )
    | JSON
)
def test_any_settings_of_peft(tmp_path_factory, settings_):
    folder = tmp_path_factory.mktemp("peft")
    save(folder / "adapter_model.safetensors", lora_tensors())
    (folder / "adapter_config.json").write_text(json.dumps(settings_))
    try:
        (terms,) = read_lora(folder, LORA).terms["transformer"].values()
    except CheckpointError as error:
        assert error.problems
    else:
        assert abs(terms[0].strength) < float("inf")


def near_misses() -> Iterator[str]:
    """Names a character away from one that exists."""
    for name in lora_tensors():
        for at in range(0, len(name), 5):
            yield name[:at] + name[at + 1 :]
            yield name[:at] + "." + name[at:]
            yield name[:at] + "0" + name[at:]


@settings(max_examples=80)
@given(
    st.dictionaries(
        st.sampled_from(sorted({*lora_tensors(), *near_misses()})),
        st.lists(st.integers(0, 3), max_size=3),
        min_size=1,
        max_size=3,
    ),
    st.sampled_from([torch.float32, torch.int8, torch.bool, torch.float8_e4m3fn]),
)
def test_names_and_shapes_near_those_of_a_lora(tmp_path_factory, shapes, dtype):
    tensors = lora_tensors() | {name: torch.ones(shape).to(dtype) for name, shape in shapes.items()}
    path = tmp_path_factory.mktemp("lora") / "a.safetensors"
    save(path, tensors)
    try:
        read_lora(path, LORA)
    except CheckpointError as error:
        assert error.problems
