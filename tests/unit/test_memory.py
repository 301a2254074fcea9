"""Memory modes on the CPU: the same bits in every mode, and weights away from home only while they work."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import bokehflux
from bokehflux.memory import Footprint, Stream, choose, footprint, out_of_memory_advice, place, visiting
from bokehflux.models.linear import Linear, LowRankTerm
from tests.tiny import tiny_mmdit, tiny_pipeline

CPU = torch.device("cpu")


@pytest.mark.parametrize("mode", ["resident", "offload", "stream"])
def test_every_mode_makes_the_same_picture(mode: str) -> None:
    expected = tiny_pipeline().generate("a mug", [0, 28], bokeh_pivot=15)
    pipe = tiny_pipeline()
    place(pipe.mmdit, [pipe.vae], mode, CPU)
    for _ in range(2):  # a second run finds everything as the first did
        result = pipe.generate("a mug", [0, 28], bokeh_pivot=15)
        assert torch.equal(result.latents, expected.latents)
        assert [i.tobytes() for i in result.images] == [i.tobytes() for i in expected.images]


def test_a_streamed_module_holds_its_weights_only_while_it_runs() -> None:
    layers = [torch.nn.Linear(4, 4) for _ in range(3)]
    values = [copy.deepcopy(layer.state_dict()) for layer in layers]
    stream = Stream([(layer, list(layer.parameters())) for layer in layers], CPU)
    homes = [layer.weight.data_ptr() for layer in layers]
    seen = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda m, _: seen.append((m.weight.data_ptr(), sorted(stream.ready))))
    x = torch.randn(2, 4)
    for layer in layers:
        x = layer(x)
    assert [layer.weight.data_ptr() for layer in layers] == homes, "back home"
    assert not {pointer for pointer, _ in seen} & set(homes), "a copy at work"
    assert [ready for _, ready in seen] == [[1], [2], [0]], "the next one on its way, and only that"
    for layer, value in zip(layers, values, strict=True):
        assert all(torch.equal(t, value[name]) for name, t in layer.state_dict().items())


def test_weights_come_home_after_an_error() -> None:
    layer = torch.nn.Linear(4, 4)
    Stream([(layer, list(layer.parameters()))], CPU)
    home = layer.weight.data_ptr()
    with pytest.raises(RuntimeError):
        layer(torch.randn(2, 3))
    assert layer.weight.data_ptr() == home


def test_visiting_moves_nothing_that_is_there_already() -> None:
    layer = torch.nn.Linear(4, 4)
    home = layer.weight.data_ptr()
    with visiting([layer], CPU):
        assert layer.weight.data_ptr() == home
    assert layer.weight.data_ptr() == home


def test_footprint() -> None:
    mmdit, visitor = tiny_mmdit(), torch.nn.Linear(100, 100)
    size = sum(p.nbytes for p in mmdit.parameters())
    needs = footprint(mmdit, [visitor])
    assert needs.resident == size + 40_400
    assert needs.stream < needs.offload < needs.resident
    mods = sum(
        p.nbytes for n, p in mmdit.named_parameters() if "_mod." in n or "single" in n and "modulation." in n
    )
    assert needs.offload == size - mods + 40_400


def test_choose() -> None:
    needs = Footprint(resident=34 * 10**9, offload=18 * 10**9, stream=10**9)
    assert [choose(needs, gib * 10**9) for gib in (80, 37, 36, 21, 20, 4, 1)] == [
        "resident", "resident", "offload", "offload", "stream", "stream", "stream",
    ]  # fmt: skip


def test_lora_terms_go_with_the_network() -> None:
    layer = Linear(4, 4)
    layer.terms = (LowRankTerm(down=torch.randn(1, 4), up=torch.randn(4, 1), strength=1.0),)
    layer.to(torch.float64)
    assert {layer.terms[0].down.dtype, layer.terms[0].up.dtype} == {torch.float64}


@pytest.mark.parametrize("mode", ["offload", "stream"])
def test_modes_that_need_a_gpu(mode: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"memory mode '{mode}' needs a CUDA device, got cpu"):
        bokehflux.load(tmp_path, device="cpu", memory=mode)
    with pytest.raises(ValueError, match="unknown memory mode 'tiny'"):
        bokehflux.load(tmp_path, device="cpu", memory="tiny")


def test_running_out_names_the_mode_that_would_fit() -> None:
    for mode, advice in (("resident", "memory='offload', or fewer"), ("stream", "try fewer pictures")):
        with pytest.raises(MemoryError, match=advice), out_of_memory_advice(mode):
            raise torch.cuda.OutOfMemoryError("of memory")
    with pytest.raises(KeyError), out_of_memory_advice("resident"):
        raise KeyError
