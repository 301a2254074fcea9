"""Adapters under BokehDepth's names and in its pickles; what a pickle may hold, and that none is ever run."""

from __future__ import annotations

import dataclasses
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bokehflux.configs import FLUX_BOKEH, FLUX_DEV, BokehConfig, MMDiTConfig
from bokehflux.models.adapter import BokehAdapter
from bokehflux.models.mmdit import MMDiT
from bokehflux.weights import load
from bokehflux.weights.describe import describe
from bokehflux.weights.files import write
from bokehflux.weights.files.checkpoint import CheckpointError, open_checkpoint
from bokehflux.weights.files.pickled import PickledFile
from bokehflux.weights.mapping import recognise, to_official
from bokehflux.weights.networks import adapter_for
from bokehflux.weights.parts import open_any, open_part
from bokehflux.weights.tables import adapter

MMDIT = MMDiTConfig(
    in_channels=64, txt_dim=8, pooled_dim=4, hidden_size=12, num_heads=2, num_double=2, num_single=2,
    axes_dim=(2, 2, 2), guidance_embed=True,
)  # fmt: skip
BOKEH = BokehConfig(blocks=(1, 3), rank=2, hidden_dim=3, context_dim=5)
ADAPTER = adapter_for(MMDIT)
Names = Callable[[str], str]
SPELLINGS: dict[str, Names] = {
    "published": lambda name: name,
    "dof": lambda name: name.replace("_bokeh.", "_dof."),
    "bare": lambda name: name.replace("adapter_modules.", ""),
    "dof, bare": lambda name: name.replace("_bokeh.", "_dof.").replace("adapter_modules.", ""),
}
DEPTH = SPELLINGS["dof, bare"]


@pytest.fixture
def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(t.shape) for name, t in BokehAdapter(BOKEH, MMDIT).state_dict().items()}


def respelled(state: dict[str, Tensor], names: Names) -> dict[str, Tensor]:
    return {names(name): tensor for name, tensor in state.items()}


def put(path: Path, tensors: object) -> Path:
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".bin":
        torch.save(tensors, path)
    else:
        write.save(path, tensors)  # type: ignore[arg-type]
    return path


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load.load_network(ADAPTER, path, dtype=torch.float32)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "any_name.bin"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_name_and_file_gives_the_same_adapter(tmp_path, state, spelling, file):
    path = put(tmp_path / file, respelled(state, SPELLINGS[spelling]))
    for place in (path, tmp_path):
        found = load.load_network(ADAPTER, place, dtype=torch.float32)
        assert found.config == BOKEH
        assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in state.items())
    base = {name: torch.randn(t.shape) for name, t in MMDiT(MMDIT).state_dict().items()}
    write.save(tmp_path / "base" / "t.safetensors", base)
    network = load.load_transformer(tmp_path / "base" / "t.safetensors", MMDIT, path, dtype=torch.float32)
    assert torch.equal(network.state_dict()["bokeh.embedding_layer.0.bias"], state["embedding_layer.0.bias"])


def test_nothing_aliases_the_file(tmp_path, state):
    path = put(tmp_path / "a.bin", state)
    found = load.load_network(ADAPTER, path, dtype=torch.float32)
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(found.state_dict()["embedding_layer.0.weight"], state["embedding_layer.0.weight"])


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_exact_cover_in_the_files_own_names(tmp_path, state, suffix):
    tensors = respelled(state, DEPTH)
    del tensors["1.to_v_dof.up.weight"]
    tensors |= {"3.to_v_bokeh.up.weight": torch.ones(12, 2), "adapter_modules_.x": torch.ones(1)}
    with pytest.raises(CheckpointError) as caught:
        load.load_network(ADAPTER, put(tmp_path / f"a{suffix}", tensors), dtype=torch.float32)
    assert sorted(caught.value.problems) == [
        "missing: 1.to_v_dof.up.weight [12, 2]",
        "unexpected: 3.to_v_bokeh.up.weight [12, 2]",
        "unexpected: adapter_modules_.x [1]",
    ]


def test_two_spellings_of_one_tensor_are_too_many(tmp_path, state):
    path = put(tmp_path / "a.bin", state | respelled(state, SPELLINGS["bare"]))
    with pytest.raises(CheckpointError, match=r"unexpected: \{1,3\}|unexpected: 1\.to_k"):
        load.load_network(ADAPTER, path, dtype=torch.float32)


def test_the_full_size_file_is_covered():
    with torch.device("meta"):
        ours = BokehAdapter(FLUX_BOKEH, FLUX_DEV).state_dict()
    theirs = [DEPTH(name) for name in ours]
    table = recognise(adapter.TABLES, dict.fromkeys(theirs), "file")
    assert to_official(table, ours).keys() == set(theirs) and len(theirs) == 460
    assert recognise(adapter.TABLES, ours, "file") is adapter.PUBLISHED


def test_inspect_recognises_it(tmp_path, state):
    path = put(tmp_path / "bokeh_lora.bin", respelled(state, DEPTH))
    for place in (path, tmp_path):
        found = describe(place)
        assert "bokeh adapter, " in found and "use: --adapter" in found
        assert "not for FLUX.1-dev: made for width 12" in found
    with torch.device("meta"):
        names = {name: t.shape for name, t in BokehAdapter(FLUX_BOKEH, FLUX_DEV).state_dict().items()}
    some = dataclasses.replace(FLUX_BOKEH, blocks=(0,), rank=1)
    with torch.device("meta"):
        small = BokehAdapter(some, FLUX_DEV).state_dict()
    assert small.keys() < names.keys()
    put(path, respelled({name: torch.zeros(t.shape) for name, t in small.items()}, DEPTH))
    assert "model: for FLUX.1-dev, 1 of 57 blocks, rank 1, updates queries and keys" in describe(path)
    assert "layout: bokeh adapter with BokehDepth's names" in describe(path)


# --- pickles


class Hostile:
    """Leaves a file behind when it is unpickled by `pickle.load`."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return exec, (f"open({str(self.trace)!r}, 'w').close()",)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("forced", [False, True])
def test_a_payload_does_not_run(tmp_path, state, monkeypatch, legacy, forced):
    if forced:  # PyTorch's way to switch its protection off
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    trace, path = tmp_path / "it ran", tmp_path / "pytorch_model.bin"
    content = state | {"x": Hostile(trace)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    message = refusal(path)
    assert ("never executed" in message or "not a PyTorch file" in message) and "weights_only" not in message
    with pytest.raises(CheckpointError):
        describe(path)
    path.write_bytes(pickle.dumps(content))
    refusal(path)
    assert not trace.exists()
    # It would have: the payload is a real one.
    pickle.loads(pickle.dumps(Hostile(trace)))
    assert trace.exists()


def test_other_pickles_stay_refused(tmp_path, state):
    network = put(tmp_path / "diffusion_pytorch_model.bin", {"img_in.weight": torch.ones(2, 2)})
    assert "a PyTorch pickle, but not a bokeh adapter (it holds img_in.weight)" in refusal(network)
    for suffix in (".pt", ".pth", ".ckpt", ".safetensors"):
        path = network.with_suffix(suffix)
        torch.save(state, path)
        assert "pickles are never read" in refusal(path)
    adapter = put(tmp_path / "bokeh" / "pytorch_model.bin", state)
    for path in (network, adapter, adapter.parent):  # only who asks for an adapter gets a pickle
        with pytest.raises(CheckpointError, match="pickles are never read"):
            open_checkpoint(path)


def test_which_pickle_of_a_folder(tmp_path, state):
    put(tmp_path / "optimizer.bin", {"step": 3})
    path = put(tmp_path / "pytorch_model.bin", state)
    assert open_any(tmp_path).path == path
    put(tmp_path / "bokeh_lora.bin", state)
    with pytest.raises(CheckpointError, match="holds no .safetensors file"):
        open_any(tmp_path)
    file = put(tmp_path / "model.safetensors", state)
    assert open_any(tmp_path).path == file


STRANGE: dict[str, object] = {
    "no table": [torch.ones(1)],
    "nothing": {},
    "nested": {"state_dict": {"embedding_layer.0.weight": torch.ones(1)}},
    "a number": {"embedding_layer.0.weight": torch.ones(1), "step": 3},
    "numbered": {0: torch.ones(1)},
    "sparse": {"a": torch.eye(3).to_sparse()},
    "expanded": {"a": torch.ones(1).expand(10)},
    "transposed": {"a": torch.ones(2, 3).T},
    "meta": {"a": torch.empty(10**12, device="meta")},
}


@pytest.mark.parametrize("kind", STRANGE)
def test_only_flat_tables_of_plain_tensors(tmp_path, kind):
    path = put(tmp_path / "a.bin", STRANGE[kind])
    assert "not a flat table of plain tensors" in refusal(path)


def test_parameters_and_shared_storage(tmp_path):
    both = torch.arange(1024.0)
    path = put(tmp_path / "a.bin", {"p": nn.Parameter(both[:3]), "v": both[3:]})
    assert PickledFile(path).get_tensor("p").tolist() == [0, 1, 2]
    assert not PickledFile(path).get_tensor("p").requires_grad
    # Views of one storage that add up to more than the file are not taken for weights.
    put(path, {f"v{i}": both for i in range(100)})
    with pytest.raises(ValueError, match="larger than the"):
        PickledFile(path)


def rewritten(path: Path, change: Callable[[bytes], bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """The same archive with another pickle in it."""
    new = path.with_name("changed.bin")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(new, "w", compression) as archive:
        for entry in old.infolist():
            data = old.read(entry)
            archive.writestr(entry.filename, change(data) if entry.filename.endswith("data.pkl") else data)
    return new


def test_headers_that_promise_too_much(tmp_path):
    path = put(tmp_path / "a.bin", {"a": torch.ones(4)})
    shape = b"K\x04\x85"
    larger = rewritten(path, lambda data: data.replace(shape, b"J\0\0\0\x40\x85"))
    assert "not a PyTorch file, or damaged" in refusal(larger)
    assert "not a PyTorch file, or damaged" in refusal(rewritten(path, lambda data: data[:-9]))
    packed = rewritten(path, lambda data: data, zipfile.ZIP_DEFLATED)
    assert "its archive is compressed, which torch.save never does" in refusal(packed)


def test_a_file_that_changes_under_us(tmp_path, state):
    path = put(tmp_path / "a.bin", state)
    part = open_part(path, ADAPTER)
    entries = part.plan({name: tuple(t.shape) for name, t in state.items()})
    put(path, {name: t.double() for name, t in state.items()})
    with pytest.raises(CheckpointError, match="changed since it was opened"):
        part.checkpoint.read(entries[0].src[0])
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read any more"):
        part = open_part(put(path, state), ADAPTER)
        path.unlink()
        part.checkpoint.read(entries[0].src[0])


@given(st.binary(max_size=200), st.integers(0, 2000), st.booleans())
def test_no_bytes_crash_it(tmp_path_factory, content, at, whole):
    folder = tmp_path_factory.mktemp("fuzz")
    path = folder / "a.bin"
    if whole:
        torch.save({"embedding_layer.0.weight": torch.ones(4)}, path)
        data = path.read_bytes()
        content = data[:at] + content[:4] + data[at + len(content[:4]) :]
    path.write_bytes(content)
    try:
        open_any(path)
    except CheckpointError as error:
        assert "\n" not in str(error)
