"""What a run computes once: bounds of the logits, value vectors, CUDA graphs (without a GPU: their rules)."""

from __future__ import annotations

import contextlib
import logging
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from bokehflux.attention import Grounded, OnStored, PivotQuery, Plain
from bokehflux.kernels.attention import select
from bokehflux.models.adapter import BokehCondition
from bokehflux.models.mmdit import MMDiT, Rows
from bokehflux.sampling import cuda_graph
from bokehflux.sampling.denoise import Denoiser, Grounding, denoiser
from bokehflux.sampling.latents import LatentGrid
from bokehflux.sampling.pivot_cache import PivotCache
from tests.tiny import FakeText, tiny_mmdit, tiny_pipeline

GRID = LatentGrid(height_px=32, width_px=48)
SIGMA = torch.tensor(0.5)


def velocity_of(mmdit: MMDiT) -> Denoiser:
    return denoiser(
        mmdit,
        FakeText(torch.float32).encode(["a cup"]),
        GRID,
        bokeh=BokehCondition.of([15, 3, 20]),
        grounding=Grounding(pivot_row=0, num_steps=1),
    )


def latents() -> Tensor:
    return torch.randn(3, GRID.num_tokens, 64)


def with_uneven_norms() -> MMDiT:
    """Every norm has weights of its own, so that no bound is another's."""
    mmdit = tiny_mmdit()
    for name, parameter in mmdit.named_parameters():
        if name.endswith("_norm.scale"):
            parameter.data = 2 * torch.randn_like(parameter)
    return mmdit


@pytest.mark.parametrize("step", [0, 1])
def test_no_logit_exceeds_its_bound(step: int) -> None:
    mmdit, seen = with_uneven_norms(), []

    def look(_: torch.nn.Module, args: tuple) -> None:
        spec, q, k, _ = args
        scores = torch.einsum("blhd,cmhd->bchlm", q, k) * q.shape[-1] ** -0.5
        seen.append((scores.abs().max().item(), spec.logit_bound))

    for block in (*mmdit.doubles, *mmdit.singles):
        block.attention.register_forward_pre_hook(look)
    velocity_of(mmdit)(latents(), SIGMA, step)
    assert len(seen) == mmdit.config.num_blocks and len({bound for _, bound in seen}) > 1
    assert all(0 < largest <= bound for largest, bound in seen)


def test_a_bound_is_tight_up_to_a_power_of_two() -> None:
    """One large weight in a norm of text keys is enough to reach it."""
    mmdit = tiny_mmdit()
    for parameter in (p for name, p in mmdit.named_parameters() if name.endswith("_norm.scale")):
        parameter.data.fill_(1.0)
    mmdit.doubles[1].txt_attn.norm.key_norm.scale.data[3] = -40.0
    # sqrt(16) = 4, and 4 x 40 = 160.
    assert mmdit.constants(None).logit_bounds == (8.0, 256.0, 8.0, 8.0, 8.0, 8.0)


@pytest.mark.parametrize("weight", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_have_no_bound(weight: float) -> None:
    mmdit = tiny_mmdit()
    mmdit.singles[0].norm.query_norm.scale.data[0] = weight
    assert mmdit.constants(None).logit_bounds[2] == torch.inf


def test_a_bound_belongs_to_the_weights_of_its_run() -> None:
    """Outside a run there is none, and the next run computes it anew."""
    mmdit, seen = tiny_mmdit(), []
    mmdit.singles[1].attention.register_forward_pre_hook(lambda _, args: seen.append(args[0].logit_bound))
    for _ in range(2):
        velocity_of(mmdit)(latents(), SIGMA, 0)
        mmdit.singles[1].norm.key_norm.scale.data *= 4
    guide = velocity_of(mmdit).positive
    rows = Rows(img=latents()[:1], txt=guide.conditioning.txt)
    mmdit.velocities([rows], guide.modulations(SIGMA), guide.rope)
    assert seen[1] == 4 * seen[0] and seen[2] is None


def test_the_interface_tells_only_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []

    def mine(*args: object, **options: object) -> object:
        told.append(options.get("logit_bound", "nothing"))
        return args[0]

    module = SimpleNamespace(attention=mine, grounded_attention=mine, target_attention=mine)
    for name in ("triton", "other"):
        monkeypatch.setitem(select.BACKENDS, name, module)
    q = torch.zeros(1, 4, 2, 16)
    store = PivotCache()
    store.put(0, 0, q, q)
    for spec in (Plain, Grounded, OnStored):
        options = {Plain: {}, Grounded: {"pivot_of": (0,)}, OnStored: {"store": store, "step": 0}}[spec]
        for name in ("triton", "other"):
            spec(backend=name, **options).for_block(0, None, 8.0)(q, q, q)
    assert told == [8.0, "nothing"] * 3


def test_value_vectors_once_a_run() -> None:
    pipe, calls = tiny_pipeline(), []
    assert pipe.transformer.bokeh is not None
    pipe.transformer.bokeh.embedding_layer.register_forward_pre_hook(
        lambda _, args: calls.append(len(args[0]))
    )
    pipe.generate("a mug", [0, 8], bokeh_pivot=15)
    assert calls == [3]
    pipe.generate("a mug", [0, 8], true_cfg=2.0, max_rows=1)
    assert calls == [3, 2, 2]


# --- CUDA graphs


def worth(x: object, spec: object, mmdit: MMDiT | None = None) -> bool:
    return cuda_graph.worth_capturing(mmdit or tiny_mmdit(), spec, x, 512)  # type: ignore[arg-type]


def batch(rows: int, tokens: int, is_cuda: bool = True) -> SimpleNamespace:
    return SimpleNamespace(is_cuda=is_cuda, shape=(rows, tokens, 64))


def test_what_is_captured() -> None:
    """Small batches on CUDA of our own attentions, and only where no Python is left out by a replay."""
    assert worth(batch(1, 1024), Plain()) and worth(batch(2, 1024), Grounded(pivot_of=(0, 0)))
    assert not worth(batch(1, 1024, is_cuda=False), Plain())
    assert worth(batch(2, 4096), Plain()) and worth(batch(8, 1024), Plain())
    assert not worth(batch(8, 1025), Plain()) and not worth(batch(9, 1024), Plain())
    assert not worth(batch(2, 1024), Grounded(pivot_of=(1, 1)))
    assert not worth(batch(2, 1024), PivotQuery(pivot_of=(0, 0)))
    assert not worth(batch(2, 1024), OnStored(store=PivotCache(), step=0))
    assert not worth(batch(1, 1024), type("Mine", (Plain,), {})())
    mmdit = tiny_mmdit()
    handle = mmdit.singles[3].attention.register_forward_pre_hook(lambda *_: None)
    assert not worth(batch(1, 1024), Plain(), mmdit)
    handle.remove()
    assert worth(batch(1, 1024), Plain(), mmdit)


def test_first_as_it_is_then_captured_then_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    def capture(evaluate: object, x: object, mods: object) -> object:
        log.append("capture")
        return lambda x, mods: log.append("replay")

    monkeypatch.setattr(cuda_graph, "_warm_up", lambda *_: log.append("warm up"))
    monkeypatch.setattr(cuda_graph, "_capture", capture)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    graphs, mods = cuda_graph.StepGraphs(), None
    pair, one = torch.zeros(2, 6, 64), torch.zeros(1, 6, 64)
    for spec, x in [(Grounded(pivot_of=(0, 0)), pair)] * 3 + [(Plain(), pair)] * 2 + [(Plain(), one)]:
        graphs(spec, lambda x, mods: x, x, mods)  # type: ignore[arg-type]
    assert log == ["warm up", "capture", "replay", "replay", "warm up", "capture", "replay", "warm up"]


def test_what_cannot_be_captured_runs_and_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(cuda_graph, "_Captured", fail)
    with caplog.at_level(logging.WARNING):
        replay = cuda_graph._capture(lambda x, mods: 2 * x, torch.ones(1), None)  # type: ignore[arg-type]
    assert replay(torch.ones(1), None).item() == 2  # type: ignore[arg-type]
    assert "no CUDA graph can hold them: operation not permitted when stream is capturing" in caplog.text
    assert "and more" not in caplog.text


def test_only_whole_batches_with_the_switch_on(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    monkeypatch.setattr("bokehflux.sampling.denoise.worth_capturing", lambda *_: True)
    monkeypatch.setattr(
        cuda_graph.StepGraphs, "__call__", lambda _, spec, f, x, mods: rows.append(len(x)) or f(x, mods)
    )
    text, x = FakeText(torch.float32).encode(["a"]), latents()
    options = {"bokeh": BokehCondition.of([1, 2, 3])}
    made = [denoiser(tiny_mmdit(), text, GRID, **options, **more)(x, SIGMA, 0) for more in (  # type: ignore[arg-type]
        {}, {"max_rows": 3}, {"max_rows": 2}, {"cuda_graphs": False},
    )]  # fmt: skip
    assert rows == [3, 3]
    assert torch.equal(made[0], made[3])


def test_modulations_as_a_list() -> None:
    mmdit = tiny_mmdit()
    mods = mmdit.modulations(torch.randn(2, mmdit.config.pooled_dim), torch.rand(2), torch.ones(2))
    copies = mods.map(torch.zeros_like)
    torch._foreach_copy_(copies.tensors(), mods.tensors())
    assert len(mods.tensors()) == 12 * len(mods.double) + 3 * len(mods.single) + 3
    assert torch.equal(copies.double[1].txt_mlp.gate, mods.double[1].txt_mlp.gate)
    assert torch.equal(copies.single[3].scale, mods.single[3].scale)
    assert torch.equal(copies.row(1).final.shift, mods.final.shift[1:])


def test_compiled_blocks_are_few_whatever_the_bounds() -> None:
    mmdit, x = with_uneven_norms(), latents()
    assert len(set(mmdit.constants(None).logit_bounds)) > 2
    expected = [velocity_of(mmdit)(x, SIGMA, step) for step in (0, 1)]
    torch._dynamo.reset()
    for block in (*mmdit.doubles, *mmdit.singles):
        block.compile(backend="eager", fullgraph=True, dynamic=False)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    velocity = velocity_of(mmdit)
    for step in (0, 1):
        assert torch.equal(velocity(x, SIGMA, step), expected[step])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before <= 4
