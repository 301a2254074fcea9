"""fp8: the quantisation against its definition, the products against what three bits of mantissa allow."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import bokehflux
from bokehflux.configs import CLIP_L, FLUX_DEV, FLUX_VAE, T5_XXL, BokehConfig
from bokehflux.kernels.fp8 import interface, ops, reference
from bokehflux.models import fp8
from bokehflux.models.adapter import BokehCondition
from bokehflux.models.clip import CLIPTextEncoder
from bokehflux.models.embeddings import rope_table
from bokehflux.models.fold import fold_adapter
from bokehflux.models.fp8 import fp8_layers, fp8_weight, is_fp8, quantize_mmdit
from bokehflux.models.linear import Linear, LowRankTerm
from bokehflux.models.mmdit import MMDiT
from bokehflux.models.t5 import T5Encoder
from bokehflux.models.vae import AutoencoderKL
from bokehflux.pipeline.memory import footprint, place
from bokehflux.sampling.latents import LatentGrid, position_ids
from bokehflux.weights import load as loader
from bokehflux.weights.files import write
from bokehflux.weights.precision import RowScaled, TensorScaled
from tests import model_files as files
from tests.tiny import tiny_mmdit, tiny_pipeline

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
CPU = torch.device("cpu")
TRITON = "cuda" if torch.cuda.is_available() else "cpu"
"""Where its kernels run: in the interpreter where there is no GPU (tests/conftest.py)."""
ULP = 2.0**-4
"""Largest relative rounding error of e4m3, whose mantissa has three bits, where numbers are normal."""
TINY = 2.0**-10
"""Largest absolute one below, in units of the row's scale."""
FUNCTIONS = {
    "plain": "quantize", "modulated": "quantize_modulated", "gated": "add_gated_quantize_modulated",
    "gelu": "quantize_gelu", "beside": "quantize_gelu",
}  # fmt: skip
multiplies = pytest.mark.skipif(
    interface.why_not(CPU, torch.float32) is not None, reason="this PyTorch multiplies no fp8 on a CPU"
)
each_form = pytest.mark.parametrize("form", FUNCTIONS)


def dequantized(values: Tensor, scale: Tensor) -> Tensor:
    return values.float() * scale


def inputs(form: str, width: int = 37, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Arguments of the form's function: [2, 5, width] with rows of very different size, some strided."""
    x = torch.randn(2, 5, width) * torch.logspace(-3, 3, 5)[:, None]
    if form == "modulated":
        return tuple(t.to(dtype) for t in (x, torch.randn(2, 1, width), torch.randn(1, 1, width)))
    if form == "gated":
        y = torch.randn(2, 9, width + 9)[:, 2:7, 3 : width + 3]
        vectors = torch.randn(2, 1, width), torch.randn(1, 1, width), torch.randn(2, 1, width)
        return tuple(t.to(dtype) for t in (x, y, *vectors))
    if form == "gelu":
        return (torch.randn(2, 5, width + 9).to(dtype)[..., 3 : width + 3],)
    if form == "beside":
        return torch.randn(2, 5, width + 9).to(dtype)[..., 3 : width + 3], x[:, :, :21].to(dtype)
    return (x.to(dtype),)


def run(module, form: str, args: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Values and scale; of the gated form, the sum is looked at here."""
    *added, values, scale = getattr(module, FUNCTIONS[form])(*args)
    if added:
        x, y, gate = args[:3]
        torch.testing.assert_close(added[0], torch.addcmul(x.float(), gate.float(), y.float()).to(x.dtype))
    return values, scale


def wanted(form: str, args: tuple[Tensor, ...]) -> Tensor:
    """What the quantised tensor stands for, in float64."""
    first, *others = (x.double() for x in args)
    if form == "plain":
        return first
    if form == "gated":
        y, gate, *others = others
        first = (first + gate * y).to(args[0].dtype).double()
    if form in ("modulated", "gated"):
        scale, shift = others
        return torch.nn.functional.layer_norm(first, first.shape[-1:], eps=1e-6) * (1 + scale) + shift
    return torch.cat([*others, torch.nn.functional.gelu(first, approximate="tanh")], dim=-1)


# --- quantisation


@each_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_definition(form: str, dtype: torch.dtype) -> None:
    """Every number within half a unit of e4m3's last place, and every row's largest is 448."""
    args = inputs(form, dtype=dtype)
    exact = wanted(form, args)
    values, scale = run(reference, form, args)
    assert values.dtype == E4M3 and values.shape == exact.shape and scale.shape == (2, 5, 1)
    assert bool((values.float().abs().amax(-1) == 448).all())
    allowed = torch.maximum(ULP * exact.abs(), TINY * scale) * (1 + 1e-4)
    assert bool(((dequantized(values, scale) - exact).abs() <= allowed).all())


def test_rows_of_zeros_and_of_almost_nothing() -> None:
    x = torch.zeros(3, 8)
    x[1, 2], x[2, 3] = 1e-30, 3e38
    values, scale = reference.quantize(x)
    assert bool(scale.isfinite().all()) and bool((scale > 0).all())
    assert dequantized(values, scale)[0].tolist() == [0.0] * 8
    assert dequantized(values, scale)[1].abs().max() <= 1e-12
    torch.testing.assert_close(dequantized(values, scale)[2, 3], x[2, 3])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_stays_none(bad: float) -> None:
    """Saturation must not hide it: a run says in which layer it began."""
    x = torch.randn(2, 8)
    x[0, 3] = bad
    values, scale = reference.quantize(x)
    assert bool(dequantized(values, scale)[0].isnan().any())
    assert bool(dequantized(values, scale)[1].isfinite().all())


@each_form
@pytest.mark.parametrize("width", [1, 37, 64, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_triton_is_the_definition(
    form: str, width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers just before their rounding to e4m3, which Triton's interpreter gets wrong: it loses carries
    and subnormal numbers. tests/gpu has the bytes."""
    monkeypatch.setattr(ops, "VALUES", torch.float32)
    if width == 1 and form in ("modulated", "gated"):
        pytest.skip("the norm of one number is nothing but rounding")
    args = tuple(x.to(TRITON) for x in inputs(form, width + 20 * (form == "beside"), dtype))
    values, scale = run(ops, form, args)
    expected, expected_scale = run(reference, form, args)
    assert values.shape == expected.shape and scale.shape == expected_scale.shape
    torch.testing.assert_close(scale, expected_scale, rtol=1e-5, atol=0)
    exact = wanted(form, args)
    torch.testing.assert_close(values * scale, exact.float(), rtol=1e-5, atol=1e-5 * exact.abs().max().item())
    if form == "plain":
        assert torch.equal(scale, expected_scale) and torch.equal(values.to(E4M3).float(), expected.float())


def test_triton_takes_any_rows() -> None:
    """A matrix, rows out of line, and none at all; the output is e4m3 in rows one after the other."""
    shapes = [(3, 16), (2, 3, 4, 16), (0, 16)]
    for x in (
        *(torch.randn(shape, device=TRITON) for shape in shapes),
        torch.randn(16, 3, device=TRITON).t(),
    ):
        values, scale = ops.quantize(x)
        assert values.dtype == E4M3 and values.is_contiguous() and values.shape == x.shape
        assert torch.equal(scale, reference.quantize(x)[1])
    with pytest.raises(ValueError, match="up to 32768 numbers, got 32769"):
        ops.quantize(torch.zeros(1, 32769, device=TRITON))


def test_what_a_kernel_would_read_beyond_is_refused() -> None:
    x, y = (torch.randn(3, 5, 48, device=TRITON) for _ in range(2))
    gate, scale, shift = torch.randn(3, 3, 1, 48, device=TRITON)
    for bad in (y[:2], y[:, :4]):
        with pytest.raises(RuntimeError, match="expand"):
            ops.add_gated_quantize_modulated(x, bad, gate, scale, shift)
        with pytest.raises(RuntimeError, match="expand"):
            ops.quantize_gelu(x, bad)


@each_form
def test_operators_tell_their_shapes(form: str) -> None:
    args: tuple[Tensor | None, ...] = tuple(x.to(TRITON) for x in inputs(form))
    operators = {"gated": ops.add_gated_quantize_modulated, "gelu": ops._quantize_gelu}
    operator = operators.get("gelu" if form == "beside" else form, ops._quantize)
    args += {"plain": (None, None), "gelu": (None,)}.get(form, ())
    torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))


# --- linear layers


def bound(x: Tensor, weight: Tensor) -> Tensor:
    """Largest error of x w^T when both are rounded row by row: |x| |w|^T (2 u + u^2) where all numbers are
    normal, and half a subnormal unit of either row's scale for each that is not."""
    x, weight = x.double().flatten(0, -2).abs(), weight.double().abs()
    step_x, step_w = (t.amax(-1, keepdim=True) / 448 * TINY for t in (x, weight))
    error_x, error_w = torch.maximum(ULP * x, step_x), torch.maximum(ULP * weight, step_w)
    return (error_x @ weight.t() + x @ error_w.t() + error_x @ error_w.t()) * 1.001


def fp8_layer(in_features: int = 48, out_features: int = 32) -> tuple[Linear, Linear]:
    """A layer in float32 and the same in fp8; channels of very different size."""
    wide = Linear(in_features, out_features).requires_grad_(False)
    wide.weight *= torch.logspace(-2, 2, out_features)[:, None]
    narrow = copy.deepcopy(wide)
    narrow.set_fp8(*fp8_weight(wide.weight, None))
    return wide, narrow


@multiplies
@pytest.mark.parametrize("shape", [(1, 48), (3, 7, 48), (0, 5, 48)])
def test_a_layer_errs_no_more_than_its_mantissa(shape: tuple[int, ...]) -> None:
    wide, narrow = fp8_layer()
    x = torch.randn(shape) * 10
    out, exact = narrow(x), wide(x)
    assert out.shape == exact.shape and out.dtype == x.dtype
    error = (out - exact).double().flatten(0, -2).abs()
    assert bool((error <= bound(x, wide.weight)).all())
    if x.numel():
        assert 1e-3 < error.norm() / exact.norm() < ULP


@multiplies
def test_a_layer_is_the_product_of_what_it_holds() -> None:
    """Every scale where it belongs: the float64 product of the dequantised operands."""
    wide, narrow = fp8_layer()
    x = torch.randn(3, 7, 48) * torch.logspace(-2, 2, 7)[:, None]
    held = dequantized(*reference.quantize(x)).double() @ narrow.dense(torch.float64).t() + wide.bias.double()
    torch.testing.assert_close(narrow(x).double(), held, rtol=1e-4, atol=1e-4 * held.abs().max().item())
    assert not narrow.is_dense and narrow.weight.dtype == E4M3 and narrow.scale.shape == (32,)


@multiplies
def test_columns_are_those_of_the_whole() -> None:
    _, narrow = fp8_layer()
    x = torch.randn(2, 5, 48)
    assert torch.equal(narrow.columns(x, 16, 32), narrow(x)[..., 16:32])
    quantized = interface.quantize(x)
    assert torch.equal(narrow(quantized), narrow(x))
    assert torch.equal(narrow.columns(quantized, 0, 16), narrow(x)[..., :16])


@multiplies
def test_terms_are_added_to_the_product() -> None:
    """With what the input was before it was quantised."""
    _, narrow = fp8_layer()
    x, before = torch.randn(2, 5, 48), copy.deepcopy(narrow)
    term = LowRankTerm(down=torch.randn(2, 48), up=torch.randn(16, 2), strength=0.5, first=16)
    assert narrow.takes_quantized
    narrow.terms = (term,)
    assert not narrow.takes_quantized
    torch.testing.assert_close(narrow(x), term.add_to(before(x), x))
    torch.testing.assert_close(narrow.columns(x, 0, 16), before.columns(x, 0, 16))


@pytest.mark.parametrize("scale", [None, 0.25, "rows"])
def test_stored_e4m3_is_taken_as_it_is(scale: float | str | None) -> None:
    stored = torch.randn(32, 48).to(E4M3)
    rows = torch.rand(32, 1) + 0.5
    form = RowScaled(scale=rows) if scale == "rows" else TensorScaled(scale=scale) if scale else None
    values, found = fp8_weight(stored, form)
    assert values is stored and found.dtype == torch.float32
    expected = rows[:, 0] if scale == "rows" else torch.full((32,), scale or 1.0)
    assert torch.equal(found, expected)


def test_stored_e5m2_is_rounded_to_e4m3() -> None:
    stored = torch.randn(32, 48).to(E5M2)
    values, scale = fp8_weight(stored, TensorScaled(scale=0.5))
    exact = stored.float() * 0.5
    assert values.dtype == E4M3
    assert bool(
        ((dequantized(values, scale[:, None]) - exact).abs() <= ULP * exact.abs() + scale[:, None]).all()
    )


# --- the transformer


def arguments(mmdit: MMDiT, rows: int = 2) -> dict[str, Any]:
    config, grid = mmdit.config, LatentGrid(height_px=48, width_px=80)
    return {
        "img": torch.randn(rows, grid.num_tokens, config.in_channels),
        "txt": torch.randn(rows, 4, config.txt_dim),
        "pooled": torch.randn(rows, config.pooled_dim),
        "sigma": torch.full((rows,), 0.7),
        "guidance": torch.full((rows,), 3.5),
        "rope": rope_table(position_ids(grid, 4), config.axes_dim, config.theta),
        "bokeh": BokehCondition.of([3, 25][:rows]),
    }


def relative_error(x: Tensor, exact: Tensor) -> float:
    return ((x - exact).norm() / exact.norm()).item()


def test_only_the_blocks_projections_change() -> None:
    mmdit = tiny_mmdit()
    assert not is_fp8(mmdit)
    quantize_mmdit(mmdit)
    assert is_fp8(mmdit)
    narrow = {name for name, p in mmdit.named_parameters() if p.dtype == E4M3}
    double = ("img_attn.qkv", "img_attn.proj", "img_mlp.0", "img_mlp.2")
    double += tuple(name.replace("img", "txt") for name in double)
    expected = {f"double_blocks.{i}.{name}.weight" for i in range(2) for name in double}
    expected |= {f"single_blocks.{i}.linear{n}.weight" for i in range(4) for n in (1, 2)}
    assert narrow == expected
    with pytest.raises(ValueError, match="in fp8 already"):
        quantize_mmdit(mmdit)


@multiplies
def test_a_step_is_that_of_rounded_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is fp8's alone: the same network with operands rounded in plain PyTorch errs as much."""
    exact_net = tiny_mmdit()
    args = arguments(exact_net)
    exact = exact_net(**args)
    narrow = copy.deepcopy(exact_net)
    quantize_mmdit(narrow)
    ours = narrow(**args)

    emulated = copy.deepcopy(exact_net)
    for layer in fp8_layers(emulated).values():
        layer.weight.copy_(dequantized(*reference.quantize(layer.weight)))
        layer.register_forward_pre_hook(lambda _, xs: (dequantized(*reference.quantize(xs[0])),))
    monkeypatch.setattr(
        Linear,
        "columns",
        lambda layer, x, a, b: torch.nn.functional.linear(x, layer.weight, layer.bias)[..., a:b],
    )
    oracle = emulated(**args)
    assert 0 < relative_error(ours, exact) <= 1.2 * relative_error(oracle, exact)
    assert relative_error(ours, oracle) < 0.1 * relative_error(oracle, exact)


@multiplies
def test_products_come_in_the_type_of_the_modulation() -> None:
    """A CPU keeps the stream in float32 beside blocks in bfloat16."""
    x, scale, shift = torch.randn(1, 3, 32), *torch.randn(2, 1, 1, 32).bfloat16()
    alone = interface.quantize_modulated(x, scale, shift)
    kept, added = interface.add_gated_quantize_modulated(x, x, scale, scale, shift)
    assert (kept.dtype, alone.dtype, added.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    weight, ones = torch.ones(16, 32).to(E4M3), torch.ones(16)
    assert interface.product(alone, weight, ones).dtype == torch.bfloat16


@multiplies
def test_passes_quantise_what_they_make(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only attention's output is quantised by a pass of its own, and fusing changes nothing."""
    mmdit, calls = tiny_mmdit(), []
    args = arguments(mmdit)
    quantize_mmdit(mmdit)
    monkeypatch.setattr(
        interface, "quantize", lambda x, real=interface.quantize: (calls.append(1), real(x))[1]
    )
    fused = mmdit(**args)
    assert len(calls) == 2 * len(mmdit.doubles)
    monkeypatch.setattr(Linear, "takes_quantized", False)
    apart = mmdit(**args)
    assert len(calls) > 2 * 2 * len(mmdit.doubles)
    torch.testing.assert_close(fused, apart, rtol=1e-3, atol=1e-3 * apart.abs().max().item())


@multiplies
@pytest.mark.parametrize("kernels", [False, True], ids=["plain", "triton"])
def test_blocks_compile_as_one_graph(kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels and TRITON == "cuda":
        pytest.skip("Triton's interpreter is off where there is a GPU: tests/gpu compiles")
    mmdit = tiny_mmdit()
    args = arguments(mmdit)
    quantize_mmdit(mmdit)
    monkeypatch.setattr(interface, "takes", lambda x: kernels)
    expected = mmdit(**args)
    for block in (mmdit.doubles[0], mmdit.singles[0]):
        block.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(mmdit(**args), expected)


@multiplies
def test_a_lora_keeps_its_precision() -> None:
    """Layers with terms take inputs that were never quantised; the others still do."""
    mmdit = tiny_mmdit()
    args = arguments(mmdit)
    quantize_mmdit(mmdit)
    before = mmdit(**args)
    for name in ("double_blocks.0.img_mlp.0", "double_blocks.1.txt_mlp.2", "single_blocks.0.linear1"):
        layer = fp8_layers(mmdit)[name]
        down, up = torch.randn(2, layer.in_features), torch.randn(layer.out_features, 2)
        layer.terms = (LowRankTerm(down=down, up=up, strength=0.0),)
    assert relative_error(mmdit(**args), before) < 1e-3
    layer.terms = (LowRankTerm(down=down, up=up, strength=0.1),)
    assert relative_error(mmdit(**args), before) > 1e-2


@multiplies
def test_a_grounded_run_keeps_its_scene() -> None:
    """Queries of the pivot alone: columns of the fused projections, through the whole pipeline."""
    pipe = tiny_pipeline()
    exact = pipe.generate("a mug", [0, 28], bokeh_pivot=15)
    quantize_mmdit(pipe.transformer)
    result = pipe.generate("a mug", [0, 28], bokeh_pivot=15)
    assert (exact.record.provenance.compute, result.record.provenance.compute) == ("dtype", "fp8")
    assert 0 < relative_error(result.latents, exact.latents) < 6 * ULP


@multiplies
@pytest.mark.parametrize("mode", ["offload", "stream"])
def test_every_memory_mode_makes_the_same_picture(mode: str) -> None:
    made = {}
    for kind in ("resident", mode):
        pipe = tiny_pipeline()
        quantize_mmdit(pipe.transformer)
        made[kind] = dataclasses.replace(pipe, memory=place(pipe.transformer, (), pipe.vae, kind, CPU))
    a, b = (pipe.generate("a mug", [0, 28], bokeh_pivot=15).latents for pipe in made.values())
    assert torch.equal(a, b)


def test_full_size_footprint() -> None:
    """At most 10 GB, adapter included, while pictures are denoised and while text is encoded."""
    adapter = BokehConfig(blocks=tuple(range(57)), rank=16, hidden_dim=64, context_dim=128)
    with torch.device("meta"):
        mmdit, vae = MMDiT(FLUX_DEV, adapter), AutoencoderKL(FLUX_VAE)
        t5, clip = T5Encoder(T5_XXL), CLIPTextEncoder(CLIP_L)
    for network in (mmdit, vae, t5, clip):
        network.to(torch.bfloat16)
    before = footprint(mmdit, (), vae)
    for layer in fp8_layers(mmdit).values():
        layer.set_fp8(layer.weight.to(E4M3), torch.empty(layer.out_features, device="meta"))
    needs = footprint(mmdit, (t5, clip), vae)
    assert needs.offload <= 10e9
    alone = footprint(mmdit, (), vae)
    assert alone.offload == pytest.approx(8.8e9, rel=0.02)
    assert alone.stream < 0.75 * before.stream


# --- loading


@pytest.fixture(scope="module")
def transformer() -> dict[str, Tensor]:
    return files.random_state(MMDiT(files.MMDIT))


@pytest.mark.parametrize("stored", [torch.bfloat16, E4M3])
def test_weights_become_fp8_as_they_are_read(tmp_path, transformer: dict[str, Tensor], stored) -> None:
    state = {name: t.to(stored) for name, t in transformer.items()}
    write.save(tmp_path / "a.safetensors", state)
    network = loader.load_transformer(
        tmp_path / "a.safetensors", files.MMDIT, dtype=torch.bfloat16, fp8_on=CPU
    )
    afterwards = loader.load_transformer(tmp_path / "a.safetensors", files.MMDIT, dtype=torch.bfloat16)
    quantize_mmdit(afterwards)
    for (name, a), (_, b) in zip(network.state_dict().items(), afterwards.state_dict().items(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a.float(), b.float()), name
    layer = network.get_submodule("double_blocks.0.img_mlp.0")
    assert layer.weight.untyped_storage().nbytes() == layer.weight.nbytes
    if stored == E4M3:
        assert torch.equal(layer.weight.float(), state["double_blocks.0.img_mlp.0.weight"].float())
        assert set(layer.scale.tolist()) == {1.0}


@pytest.fixture
def golden(monkeypatch: pytest.MonkeyPatch) -> None:
    """`bokehflux.load` finds the golden transformer, whatever it is asked for."""
    rest = tiny_pipeline()

    def load_components(model: Any, *, device: Any, dtype: Any, fp8_on: Any, **_: Any) -> Any:
        folder = GOLDEN / "snapshot" / "transformer"
        transformer = loader.load_transformer(
            folder, adapter=GOLDEN / "adapter", device=device, dtype=dtype, fp8_on=fp8_on
        )
        found = {"files": (), "adapter": None, "loras": ()}
        snapshot = SimpleNamespace(schedule=rest.schedule, defaults=rest.defaults, **found)
        return SimpleNamespace(
            transformer=transformer,
            text=rest.text,
            vae=rest.vae,
            reference=None,
            controls=None,
            snapshot=snapshot,
        )

    monkeypatch.setattr("bokehflux.pipeline.load.load_components", load_components)


@multiplies
def test_load_computes_in_fp8(golden: None) -> None:
    plain, narrow = (bokehflux.load("x", device="cpu", dtype="float32", compute=c) for c in ("dtype", "fp8"))
    assert (plain.compute, narrow.compute) == ("dtype", "fp8")
    args = arguments(plain.transformer)
    assert 0 < relative_error(narrow.transformer(**args), plain.transformer(**args)) < 6 * ULP


def test_wrong_asks() -> None:
    with pytest.raises(ValueError, match="unknown compute 'int8': expected one of .*'dtype', 'fp8'"):
        bokehflux.load("nano", compute="int8")  # type: ignore[arg-type]
    odd = tiny_mmdit()
    odd.single_blocks[0].linear1 = Linear(32, 40)
    with pytest.raises(ValueError, match="1 such as single_blocks.0.linear1 are not"):
        quantize_mmdit(odd)
    assert not is_fp8(odd)
    mmdit = tiny_mmdit()
    quantize_mmdit(mmdit)
    with pytest.raises(ValueError, match="fold_adapter comes before fp8"):
        fold_adapter(mmdit)


@multiplies
def test_folding_first_is_allowed() -> None:
    mmdit = tiny_mmdit()
    args = arguments(mmdit)
    exact = mmdit(**args)
    fold_adapter(mmdit)
    quantize_mmdit(mmdit)
    assert 0 < relative_error(mmdit(**args), exact) < 6 * ULP


def test_devices_without_fp8_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    with pytest.raises(ValueError, match=r"capability 8.9 or higher \(Ada, Hopper\), cuda:0 has 8.6"):
        fp8.check_fp8(torch.device("cuda:0"), torch.bfloat16)
    with pytest.raises(ValueError, match="mps has no fp8"):
        fp8.check_fp8(torch.device("mps"), torch.bfloat16)

    def refuse(*_, **__):
        raise RuntimeError("only sm_90\nlong trace")

    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    with pytest.raises(ValueError, match="no such product for torch.float16 on cpu: only sm_90. It takes"):
        bokehflux.load("nano", device="cpu", dtype="float16", compute="fp8")


def test_a_sum_beside_its_quantised_form_lies_in_rows() -> None:
    """Whatever the layout of x: tokens may be its fastest axis."""
    x, *others = inputs("gated")
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    for ours, theirs in zip(
        ops.add_gated_quantize_modulated(turned.to(TRITON), *(t.to(TRITON) for t in others)),
        ops.add_gated_quantize_modulated(x.to(TRITON), *(t.to(TRITON) for t in others)), strict=True,
    ):  # fmt: skip
        assert torch.equal(ours.float(), theirs.float())
