"""fp8 on a GPU: the compiled passes byte by byte, products at FLUX's sizes, the whole tiny transformer."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bokehflux.kernels.fp8 import interface, ops, reference
from bokehflux.models.embeddings import RopeTable
from bokehflux.models.fp8 import check_fp8, fp8_weight, quantize_mmdit
from bokehflux.models.linear import Linear
from bokehflux.models.mmdit import MMDiT, Rows
from bokehflux.pipeline.memory import place
from tests.tiny import tiny_mmdit, tiny_pipeline
from tests.unit.test_fp8 import (
    FUNCTIONS,
    TINY,
    ULP,
    arguments,
    dequantized,
    each_form,
    relative_error,
    wanted,
)

if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
    pytest.skip("this GPU has no fp8", allow_module_level=True)

CUDA = torch.device("cuda")
WIDTH, MLP = 3072, 12288
SHAPES = {
    "qkv": (WIDTH, 3 * WIDTH), "proj": (WIDTH, WIDTH), "mlp up": (WIDTH, MLP), "mlp down": (MLP, WIDTH),
    "linear1": (WIDTH, 3 * WIDTH + MLP), "linear2": (WIDTH + MLP, WIDTH),
}  # fmt: skip
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


@pytest.fixture(autouse=True)
def _exact_float32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


def inputs(form: str, length: int, width: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """As the blocks have them: views of fused projections and of joint sequences, two rows."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=CUDA).to(dtype)

    joint = draw(2, length + 7, width)[:, 7:] * torch.logspace(-2, 2, length, device=CUDA)[:, None].to(dtype)
    vectors = (draw(2, 1, width), draw(1, 1, width).expand(2, -1, -1), draw(2, 1, width))
    hidden = draw(2, length, width + 64)[..., 64:]
    return {
        "plain": (joint,),
        "modulated": (joint, *vectors[:2]), "gated": (joint, draw(2, length, width), *vectors),
        "gelu": (hidden,), "beside": (hidden, joint[..., : width // 4]),
    }[form]  # fmt: skip


@each_form
@each_dtype
@pytest.mark.parametrize(("length", "width"), [(1, 3072), (63, 100), (515, 3072), (33, 12288), (5, 24576)])
def test_passes(form: str, dtype: torch.dtype, length: int, width: int) -> None:
    """Within half a unit of e4m3's last place of the float64 result, and in one pass what two would give."""
    args = inputs(form, length, width, dtype)
    *added, values, scale = getattr(ops, FUNCTIONS[form])(*args)
    exact = wanted(form, args)
    if added:
        x, y, gate = (t.double() for t in args[:3])
        torch.testing.assert_close(
            added[0], (x + gate * y).to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-5
        )
        exact = (
            F.layer_norm(added[0].double(), (width,), eps=1e-6) * (1 + args[3].double()) + args[4].double()
        )
    assert values.dtype == torch.float8_e4m3fn and values.shape == exact.shape and values.is_contiguous()
    assert bool((values.float().abs().amax(-1) == 448).all())
    allowed = torch.maximum(ULP * exact.abs(), TINY * scale) + 2e-5 * exact.abs().amax(-1, keepdim=True)
    assert bool(((dequantized(values, scale) - exact).abs() <= allowed).all())
    if form == "plain":
        expected, expected_scale = reference.quantize(*args)
        assert torch.equal(scale, expected_scale)
        assert torch.equal(values.view(torch.uint8), expected.view(torch.uint8))


def test_zeros_and_what_is_no_number() -> None:
    x = torch.randn(5, 100, device=CUDA)
    x[0], x[1, 3], x[2, 3], x[3, 3] = 0, math.nan, math.inf, 1e-30
    for values, scale in (ops.quantize(x), ops.quantize_gelu(x[:, :0].new_zeros(5, 16), x)):
        back = dequantized(values, scale)
        assert bool(scale[[0, 3, 4]].isfinite().all()) and bool((back[0] == 0).all())
        assert bool(back[1:3].isnan().any(-1).all()) and bool(back[3:].isfinite().all())
    assert ops.quantize(x[:0])[0].shape == (0, 100)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("tokens", [1, 63, 512, 4608])
def test_products_at_full_size(name: str, tokens: int) -> None:
    """Against float32: no further off than operands rounded alike in plain PyTorch."""
    wide = Linear(*SHAPES[name], bias=True).to(CUDA).requires_grad_(False)
    wide.weight.normal_(0, 0.02).mul_(torch.logspace(-1, 1, wide.out_features, device=CUDA)[:, None])
    x = torch.randn(tokens, wide.in_features, device=CUDA).bfloat16()
    weight, bias = wide.weight.bfloat16(), wide.bias.bfloat16()
    exact = F.linear(x.float(), weight.float(), bias.float())
    narrow = copy.deepcopy(wide).bfloat16()
    narrow.set_fp8(*fp8_weight(weight, None))
    operands = (dequantized(*reference.quantize(t)) for t in (x, weight))
    emulated = F.linear(*operands, bias.float()).bfloat16()
    out = narrow(x)
    assert out.dtype == torch.bfloat16
    assert relative_error(out.float(), exact) <= 1.2 * relative_error(emulated.float(), exact)
    assert relative_error(out.float(), exact) < ULP
    quarter = wide.out_features // 3
    part = narrow.columns(x, quarter, 2 * quarter).float()
    assert relative_error(part, out[:, quarter : 2 * quarter].float()) < 1e-2


def on_gpu(mmdit: MMDiT) -> dict[str, Any]:
    """Arguments of a step, in bfloat16."""
    args = arguments(mmdit)
    found = {name: x.to(CUDA) for name, x in args.items() if isinstance(x, Tensor)}
    found |= {name: found[name].bfloat16() for name in ("img", "txt", "pooled")}
    return args | found | {"rope": RopeTable(*(t.to(CUDA) for t in args["rope"]))}


def test_a_transformer_compiled_and_replayed() -> None:
    """Eager, compiled block by block and as a CUDA graph: one result."""
    mmdit = tiny_mmdit().to(CUDA, torch.bfloat16)
    args = on_gpu(mmdit)
    floats = {name: args[name].float() for name in ("img", "txt", "pooled")}
    exact = copy.deepcopy(mmdit).float()(**args | floats)
    quantize_mmdit(mmdit)
    with torch.inference_mode():
        eager = mmdit(**args)
        assert 0 < relative_error(eager.float(), exact) < 6 * ULP
        mods = mmdit.modulations(args["pooled"], args["sigma"], args["guidance"])
        rows = [Rows(img=args["img"], txt=args["txt"])]
        step = functools.partial(mmdit.velocities, rows, mods, args["rope"])
        (plain,), graph = step(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            (captured,) = step()
        graph.replay()
        torch.testing.assert_close(captured, plain, rtol=0, atol=0)
        mmdit.compile_blocks()
        assert relative_error(mmdit(**args).float(), eager.float()) < ULP


@pytest.mark.parametrize("mode", ["offload", "stream"])
def test_every_memory_mode_makes_the_same_picture(mode: str) -> None:
    made = []
    for kind in ("resident", mode):
        pipe = tiny_pipeline(dtype=torch.bfloat16)
        quantize_mmdit(pipe.transformer, CUDA)
        assert all(p.device.type == "cpu" for p in pipe.transformer.parameters())
        text = dataclasses.replace(pipe.text, device="cuda")  # type: ignore[type-var]
        pipe = dataclasses.replace(pipe, text=text, memory=place(pipe.transformer, (), pipe.vae, kind, CUDA))
        made.append(pipe.generate("a mug", [0, 12, 28], bokeh_pivot=15, max_rows=3).latents)
    assert torch.equal(*made)


def test_a_gpu_with_fp8_is_accepted() -> None:
    check_fp8(CUDA, torch.bfloat16)
    assert interface.why_not(CUDA, torch.bfloat16) is None
