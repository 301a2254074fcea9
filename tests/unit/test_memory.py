"""Memory modes on the CPU: the same bits in every mode, and weights away from home only while they work."""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections import defaultdict
from pathlib import Path

import pytest
import torch

import bokehflux
from bokehflux.configs import CLIP_L, FLUX_DEV, FLUX_VAE, T5_XXL, CLIPConfig, T5Config
from bokehflux.models.clip import CLIPTextEncoder
from bokehflux.models.linear import Linear, LowRankTerm
from bokehflux.models.mmdit import MMDiT
from bokehflux.models.t5 import T5Encoder
from bokehflux.models.units import Network
from bokehflux.models.vae import AutoencoderKL
from bokehflux.pipeline.memory import Footprint, Placement, Stream, choose, footprint, pieces, place
from bokehflux.sampling.cuda_graph import has_hooks
from bokehflux.sampling.samplers import StepInfo
from tests.tiny import tiny_mmdit, tiny_pipeline

CPU = torch.device("cpu")


class Square(Network):
    """A network that says nothing about itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(width, width)


@pytest.mark.parametrize("mode", ["resident", "offload", "stream"])
def test_every_mode_makes_the_same_picture(mode: str) -> None:
    expected = tiny_pipeline().generate("a mug", [0, 28], bokeh_pivot=15)
    pipe = tiny_pipeline()
    pipe = dataclasses.replace(pipe, memory=place(pipe.transformer, (), pipe.vae, mode, CPU))
    for _ in range(2):  # a second run finds everything as the first did
        result = pipe.generate("a mug", [0, 28], bokeh_pivot=15)
        assert torch.equal(result.latents, expected.latents)
        assert [i.tobytes() for i in result.images] == [i.tobytes() for i in expected.images]


@pytest.mark.parametrize("again", [True, False])
def test_a_streamed_module_holds_its_weights_only_while_it_runs(again: bool) -> None:
    layers = [torch.nn.Linear(4, 4) for _ in range(4)]
    values = [copy.deepcopy(layer.state_dict()) for layer in layers]
    stream = Stream([(layer, list(layer.parameters())) for layer in layers], CPU, again=again)
    homes = [layer.weight.data_ptr() for layer in layers]
    seen: list[tuple[int, int | None]] = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda m, _: seen.append((m.weight.data_ptr(), stream.coming)))
    for _ in range(2):
        x = y = torch.randn(2, 4)
        for i, (layer, value) in enumerate(zip(layers, values, strict=True)):
            x = layer(x)
            if again:  # as often as it is called
                assert torch.equal(layer(y), torch.nn.functional.linear(y, value["weight"], value["bias"]))
                seen.pop()
            assert [at for at, other in enumerate(layers) if other.weight.data_ptr() != homes[at]] == (
                [] if i == 3 and not again else [i]
            )
    pointers = [pointer for pointer, _ in seen]
    assert not set(pointers) & set(homes) and len(set(pointers[:4])) == 2, "two slots take turns"
    assert [coming for _, coming in seen] == [1, 2, 3, 0 if again else None] * 2, "the next one on its way"
    stream.release()
    assert [layer.weight.data_ptr() for layer in layers] == homes and not stream.slots, "back home"
    for layer, value in zip(layers, values, strict=True):
        assert all(torch.equal(t, value[name]) for name, t in layer.state_dict().items())


@pytest.mark.parametrize("mode", ["offload", "stream"])
def test_the_adapter_s_values_are_away_during_steps(mode: str) -> None:
    pipe = tiny_pipeline()
    pipe = dataclasses.replace(pipe, memory=place(pipe.transformer, (), pipe.vae, mode, CPU))
    assert pipe.transformer.bokeh is not None
    homes = {name: p.data_ptr() for name, p in pipe.transformer.bokeh.named_parameters()}
    at_steps: list[bool] = []

    def look(_: StepInfo) -> None:
        layers = (
            m for n, m in pipe.transformer.bokeh.named_modules() if n.endswith(("_k_bokeh", "_v_bokeh"))
        )
        at_steps.append(all(p.data_ptr() in homes.values() for layer in layers for p in layer.parameters()))

    came: list[int] = []
    for block in pipe.transformer.bokeh.adapter_modules.values():
        block.to_v_bokeh.register_forward_pre_hook(lambda m, _: came.append(m.up.weight.data_ptr()))
    pipe.generate("a mug", [0, 28], bokeh_pivot=15, on_step=look)
    assert came and not set(came) & set(homes.values()), "on the device for the value vectors"
    assert at_steps and all(at_steps), "home again for the steps"


def test_a_block_comes_once_a_step_however_rows_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_pipeline()
    pipe = dataclasses.replace(pipe, memory=place(pipe.transformer, (), pipe.vae, "stream", CPU))
    whole = pipe.generate("a mug", [0, 8, 28], bokeh_pivot=15)
    fetched: list[int] = []
    real = Stream._fetch
    monkeypatch.setattr(
        Stream, "_fetch", lambda self, i: (fetched.append(i) if self.again else None, real(self, i))[1]
    )
    split = pipe.generate("a mug", [0, 8, 28], bokeh_pivot=15, max_rows=1)
    torch.testing.assert_close(split.latents, whole.latents, atol=2e-4, rtol=0)
    blocks, steps = pipe.transformer.config.num_blocks, split.record.recipe()["num_inference_steps"]
    assert fetched == [*range(blocks)] * steps + [0]


def test_streamed_modules_in_an_order_of_their_own() -> None:
    layers = [torch.nn.Linear(4, 4) for _ in range(4)]
    values = [copy.deepcopy(layer.state_dict()) for layer in layers]
    Stream([(layer, list(layer.parameters())) for layer in layers], CPU, again=True)
    x = torch.randn(2, 4)
    for i in (2, 0, 1, 1, 3, 2, 0, 3):
        expected = torch.nn.functional.linear(x, values[i]["weight"], values[i]["bias"])
        assert torch.equal(layers[i](x), expected)


def test_weights_come_home_after_an_error() -> None:
    pipe = tiny_pipeline()
    placement = place(pipe.transformer, (), pipe.vae, "stream", CPU)
    homes = {name: p.data_ptr() for name, p in pipe.transformer.named_parameters()}
    with pytest.raises(AttributeError), placement.phase("denoise"):
        pipe.transformer.doubles[0](torch.randn(2, 3), None, None, None, None)  # type: ignore[arg-type]
    assert {name: p.data_ptr() for name, p in pipe.transformer.named_parameters()} == homes


def test_pieces_hold_every_parameter_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters of any type and shape, in pieces no larger than asked for, shared by neighbours."""
    monkeypatch.setattr("bokehflux.pipeline.memory.PIECE_BYTES", 1024)
    kinds = [torch.float32, torch.bfloat16, torch.uint8, torch.float8_e4m3fn]
    shapes = [(3, 5), (), (7,), (0, 4), (9, 4, 2), (400,)]
    values = [torch.randn(s).mul(9).to(kinds[i % 4]) for i, s in enumerate(shapes)]
    parameters = [torch.nn.Parameter(value.clone(), requires_grad=False) for value in values]
    made = pieces(parameters, CPU)
    assert [p for piece in made for p in piece.parameters] == parameters
    assert 1 < len(made) < len(parameters)
    assert all(piece.nbytes <= 1024 or len(piece.parameters) == 1 for piece in made)
    for piece in made:
        piece.show(piece.host.clone())
    for parameter, value in zip(parameters, values, strict=True):
        assert parameter.dtype == value.dtype
        assert torch.equal(parameter.view(torch.uint8) if value.ndim else parameter.float(),
                           value.view(torch.uint8) if value.ndim else value.float())  # fmt: skip


def test_a_streamed_text_encoder_gives_the_same_states() -> None:
    config = T5Config(vocab_size=20, width=16, head_dim=4, mlp_size=24, num_layers=3, num_heads=4)
    t5, ids = T5Encoder(config).eval(), torch.randint(20, (2, 7))
    expected = t5(ids)
    placement = place(tiny_mmdit(), (t5,), Square(1), "stream", CPU)
    for _ in range(2):
        with placement.phase("text"):
            torch.testing.assert_close(t5(ids), expected, atol=0, rtol=0)
    (piece,) = placement.visitors["text"]
    assert len(piece.parameters) == 3, "embedding, position bias and the final norm"


def test_footprint() -> None:
    mmdit, text, vae = tiny_mmdit(), Square(100), Square(10)
    size = sum(p.nbytes for p in mmdit.parameters())
    needs = footprint(mmdit, (text,), vae)
    assert needs.resident == size + 40_400 + 440
    assert needs.stream < needs.offload < needs.resident
    names = ("_mod.lin.", ".modulation.lin.", ".adaLN_modulation.", ".to_k_bokeh.", ".to_v_bokeh.")
    mods = sum(p.nbytes for n, p in mmdit.named_parameters() if any(name in n for name in names))
    assert needs.offload == max(size - mods, 40_400)
    blocks: dict[str, int] = defaultdict(int)
    for name, p in mmdit.named_parameters():
        if name.startswith(("double_blocks.", "single_blocks.")) and not any(n in name for n in names):
            blocks[".".join(name.split(".")[:2])] += p.nbytes
    rest = size - mods - sum(blocks.values())
    assert needs.stream == rest + max(2 * max(blocks.values()), 40_400)
    assert footprint(mmdit, (Square(1),), vae).stream == rest + 2 * max(blocks.values())


def test_terms_of_loras_count_in_every_mode() -> None:
    """They stay on the device: those of text encoders, too."""
    mmdit, text, vae = tiny_mmdit(), T5Encoder(T5Config(
        vocab_size=8, width=8, head_dim=4, mlp_size=8, num_layers=1, num_heads=2, num_buckets=4
    )), Square(10)  # fmt: skip
    before, added = footprint(mmdit, (text,), vae), 0
    for network, rank in ((mmdit, 3), (text, 5)):
        layer = next(layer for layer in network.modules() if isinstance(layer, Linear))
        down, up = torch.zeros(rank, layer.in_features), torch.zeros(layer.out_features, rank).bfloat16()
        layer.terms = (LowRankTerm(down=down, up=up, strength=1.0),) * 2
        added += 2 * rank * (4 * layer.in_features + 2 * layer.out_features)
    assert footprint(mmdit, (text,), vae) == Footprint(*(size + added for size in before))


def test_footprint_of_text_encoders() -> None:
    """T5 is streamed block by block, its position bias apart, which comes ahead; CLIP is moved whole."""
    t5 = T5Encoder(T5Config(vocab_size=9000, width=16, head_dim=4, mlp_size=24, num_layers=3, num_heads=4))
    clip = CLIPTextEncoder(CLIPConfig(vocab_size=700, width=16, mlp_size=32, num_layers=4, num_heads=2))
    sizes = {name: p.nbytes for name, p in t5.named_parameters()}
    block = sum(n for name, n in sizes.items() if ".block.1." in name)
    whole, clip_whole = sum(sizes.values()), sum(p.nbytes for p in clip.parameters())
    mmdit, vae = tiny_mmdit(), Square(1)
    without, needs = footprint(mmdit, (), vae), footprint(mmdit, (t5, clip), vae)
    blocks = [b for network in (mmdit.double_blocks, mmdit.single_blocks) for b in network]
    largest = max(sum(p.nbytes for p in mmdit.units().own(b)) for b in blocks)
    assert needs.resident == without.resident + whole + clip_whole
    assert needs.offload == max(without.offload, whole + clip_whole)
    streamed = whole - 3 * block + 2 * block + clip_whole
    assert streamed > 2 * largest and needs.stream == without.stream - 2 * largest + streamed


def test_full_size_footprint() -> None:
    """In bfloat16: 17.3 GB in the loop, and T5 and the transformer are never there together."""
    with torch.device("meta"):
        mmdit, vae = MMDiT(FLUX_DEV), AutoencoderKL(FLUX_VAE)
        t5, clip = T5Encoder(T5_XXL), CLIPTextEncoder(CLIP_L)
    for network in (mmdit, vae, t5, clip):
        network.to(torch.bfloat16)
    needs = footprint(mmdit, (t5, clip), vae)
    assert needs.resident == pytest.approx(34e9, rel=0.02)
    assert needs.offload == pytest.approx(17.3e9, rel=0.01)
    assert needs.stream < 2.2e9


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
        with pytest.raises(MemoryError, match=advice), Placement(mode=mode).phase("denoise"):
            raise torch.cuda.OutOfMemoryError("of memory")
    with pytest.raises(KeyError), Placement().phase("text"):
        raise KeyError
    with pytest.raises(RuntimeError, match="^shapes"), Placement().phase("text"):
        raise RuntimeError("shapes do not fit")


@pytest.mark.parametrize(("free_gb", "advice"), [(21, "offload"), (20, "stream"), (0, "stream")])
def test_the_mode_that_is_named_would_fit(free_gb: int, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """18 GB of weights and the workspace; what this process holds counts as free."""
    monkeypatch.setattr("bokehflux.pipeline.memory.free_memory", lambda _: (free_gb // 2) * 10**9)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: (free_gb - free_gb // 2) * 10**9)
    needs = Footprint(resident=34 * 10**9, offload=18 * 10**9, stream=10**9)
    at_work = Placement(mode="resident", device=torch.device("cuda"), needs=needs)
    with pytest.raises(MemoryError, match=f"mode 'resident'; try memory='{advice}'"), at_work.phase("decode"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_placement_knows_the_needs() -> None:
    pipe = tiny_pipeline()
    for mode in ("resident", "offload", "stream"):
        assert place(pipe.transformer, (), pipe.vae, mode, CPU).needs == footprint(
            pipe.transformer, (), pipe.vae
        )


def test_an_error_keeps_no_tensors() -> None:
    """Another attempt has the memory of the first, even while its error is still at hand."""
    seen: list[weakref.ref] = []

    def fail(x: torch.Tensor) -> None:
        seen.append(weakref.ref(x))
        raise torch.OutOfMemoryError("CUDA out of memory")

    def work() -> None:
        fail(torch.zeros(3))

    with pytest.raises(MemoryError) as caught, Placement(mode="stream").phase("denoise"):
        work()
    assert caught.value.__cause__ is not None and seen[0]() is None


@pytest.mark.parametrize("error", [
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 40 bytes. Error code 12"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 4000 bytes."),
    RuntimeError("MPS backend out of memory (MPS allocated: 18 GB)"), MemoryError(),
])  # fmt: skip
def test_running_out_elsewhere_is_advised_too(error: Exception) -> None:
    with pytest.raises(MemoryError, match="is out of memory; try fewer pictures.*or a smaller file"):
        with Placement(device=CPU).phase("denoise"):
            raise error


def test_this_machine_says_it_in_those_words() -> None:
    with pytest.raises(MemoryError, match="^the machine is out of memory"), Placement().phase("denoise"):
        torch.empty(10**15)


def test_running_out_at_loading_names_a_mode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object, device: torch.device, **__: object) -> None:
        if device.type == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory")
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("bokehflux.pipeline.load.load_components", full)
    with pytest.raises(MemoryError, match="the machine is out of memory"):
        bokehflux.load(tmp_path, device="cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(MemoryError, match="in mode 'resident'; try memory='offload'"):
        bokehflux.load(tmp_path, device="cuda", memory="resident")


def test_hooks_that_a_step_meets() -> None:
    """Graphs hold no hooks: layers that a run calls before its steps may have some, blocks may not."""
    met = {}
    for mode in ("resident", "offload", "stream"):
        mmdit = tiny_mmdit()
        place(mmdit, (), Network(), mode, CPU)  # type: ignore[arg-type]
        met[mode] = has_hooks(mmdit)
        mmdit.single_blocks[1].attention.register_forward_hook(lambda *_: None)
        assert has_hooks(mmdit)
    assert met == {"resident": False, "offload": False, "stream": True}


def test_parameters_of_one_piece_lie_apart() -> None:
    """However odd their sizes: copies and kernels want addresses that are multiples of 256 bytes."""
    layers = [torch.nn.Linear(3, 1), torch.nn.Linear(5, 7).half(), torch.nn.Linear(1, 1).double()]
    parameters = [p for layer in layers for p in layer.parameters()]
    values = [p.detach().clone() for p in parameters]
    (piece,) = pieces(parameters, CPU)
    offsets = [p.data_ptr() - piece.host.data_ptr() for p in parameters]
    assert len(set(offsets)) == len(offsets) and all(offset % 256 == 0 for offset in offsets)
    assert all(torch.equal(p, value) for p, value in zip(parameters, values, strict=True))
