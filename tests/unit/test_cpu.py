"""What a CPU does of its own in bfloat16, and when it is asked to."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

import bokehflux
from bokehflux.kernels.attention import reference, sdpa
from bokehflux.kernels.pointwise import reference as passes
from bokehflux.models import fused
from bokehflux.models.linear import Linear
from bokehflux.models.precision import careful_dtype, default_dtype
from bokehflux.models.vae import AutoencoderKL, split_moments
from bokehflux.pipeline.pipeline import Pipeline
from bokehflux.sampling.denoise import denoiser
from bokehflux.sampling.latents import LatentGrid
from bokehflux.sampling.samplers import StepInfo
from tests.helpers import assert_within_2x
from tests.tiny import VAE

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def nano() -> Pipeline:
    return bokehflux.load("nano", device="cpu", dtype="bfloat16")


@pytest.mark.parametrize("avx512", [False, True])
@pytest.mark.parametrize("amx", [False, True])
def test_bfloat16_where_the_hardware_multiplies_it(
    avx512: bool, amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    expected = torch.bfloat16 if avx512 or amx else torch.float32
    assert default_dtype(CPU) == expected and default_dtype(torch.device("cuda")) == torch.bfloat16
    assert bokehflux.load("nano", device="cpu").dtype == expected
    assert bokehflux.load("nano", device="cpu", dtype="float32").dtype == torch.float32


def test_a_pytorch_that_does_not_know_keeps_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    assert default_dtype(CPU) == torch.float32


@pytest.mark.parametrize("block", [1, 300, 1 << 19], ids=["by query", "by part", "whole"])
@pytest.mark.parametrize("pivots", [(0, 0, 0), (1, 0, 1)], ids=str)
@pytest.mark.parametrize("size", [1, 100], ids=["", "scores of hundreds"])
def test_targets_that_share_exponentials(
    block: int, pivots: tuple[int, ...], size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sdpa, "BLOCK_SCORES", block)
    q, k_pivot, k, v = (
        torch.randn(rows, 19, 3, 16).mul(by).bfloat16() for rows, by in ((2, size), (2, 1), (3, 1), (3, 1))
    )
    ours = sdpa.target_attention(q, k_pivot, k, v, pivots)
    exact = reference.target_attention(*(t.float() for t in (q, k_pivot, k, v)), pivots)
    rows = list(pivots)
    oracle = sdpa.merge(
        sdpa.attention_with_lse(q[rows], k, v), sdpa.attention_with_lse(q[rows], k_pivot[rows], v)
    )
    assert_within_2x(ours, oracle, exact)


def test_a_target_does_not_depend_on_the_others() -> None:
    q, k_pivot = (torch.randn(1, 19, 2, 16).bfloat16() for _ in range(2))
    k, v = (torch.randn(3, 19, 2, 16).bfloat16() for _ in range(2))
    whole = sdpa.target_attention(q, k_pivot, k, v, (0, 0, 0))
    for row in range(3):
        alone = sdpa.target_attention(q, k_pivot, k[row : row + 1], v[row : row + 1], (0,))
        assert torch.equal(alone[0], whole[row])


@pytest.mark.parametrize("dim", [2, 6, 16, 64])
def test_rotations_on_complex_numbers(dim: int) -> None:
    x, angle = torch.randn(2, 7, 3, dim), torch.randn(7, dim // 2) * 100
    ours = passes.rotate(x.bfloat16(), angle.cos(), angle.sin(), torch.bfloat16)
    exact = passes.rotate(x.bfloat16().float(), angle.cos(), angle.sin(), torch.float32)
    torch.testing.assert_close(ours.float(), exact, rtol=2**-8, atol=1e-6)


def test_float32_takes_no_form_of_bfloat16() -> None:
    layer = Linear(16, 8).requires_grad_(False)
    assert not fused.takes_epilogues(torch.zeros(1, 16), layer)
    assert fused.takes_epilogues(torch.zeros(1, 16).bfloat16(), layer.bfloat16())
    assert not fused.takes_epilogues(torch.zeros(1, 16).half(), layer.half())


def test_decoding_in_channels_last() -> None:
    torch.manual_seed(1)
    vae, z = AutoencoderKL(VAE).eval().requires_grad_(False), torch.randn(2, 16, 4, 6)
    seen: list[Tensor] = []
    vae.decoder.mid.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    exact, low = vae.decode(z), vae.bfloat16()
    ours = low.decode(z.bfloat16())
    assert [x.is_contiguous(memory_format=torch.channels_last) for x in seen] == [False, True]
    assert ours.dtype == torch.bfloat16
    assert_within_2x(ours, low.decoder(low.unscaled(z.bfloat16())), exact)


def test_encoding_in_channels_last() -> None:
    torch.manual_seed(1)
    vae, x = AutoencoderKL(VAE).eval().requires_grad_(False), torch.rand(2, 3, 32, 48) * 2 - 1
    exact, low = vae.encode(x), vae.bfloat16()
    ours, plain = low.encode(x.bfloat16()), low.draw(*split_moments(low.encoder(x.bfloat16())))
    assert ours.dtype == torch.bfloat16
    assert_within_2x(ours, plain, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_only_a_cpu_in_bfloat16_is_careful(dtype: torch.dtype) -> None:
    assert careful_dtype(torch.device("cuda"), dtype) == careful_dtype(torch.device("mps"), dtype) == dtype
    assert careful_dtype(CPU, dtype) == (torch.float32 if dtype == torch.bfloat16 else dtype)


def test_what_a_cpu_keeps_in_float32(nano: Pipeline) -> None:
    """Text encoders and the residual stream; noise levels that bfloat16 cannot tell apart are told apart."""
    assert {p.dtype for net in nano.text.networks for p in net.parameters()} == {torch.float32}
    assert {p.dtype for net in (nano.transformer, nano.vae) for p in net.parameters()} == {torch.bfloat16}
    seen: list[torch.dtype] = []
    hooks = [
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0].x.dtype))
        for block in nano.transformer.blocks
    ]
    grid = LatentGrid(height_px=32, width_px=32)
    text = nano.text.encode(["a red ball"])
    velocity = denoiser(nano.transformer, text, grid)
    x = torch.randn(1, 4, 64)
    first, second = (velocity(x, torch.tensor(sigma), 0) for sigma in (0.7123, 0.7125))
    assert first.dtype == torch.float32 and not torch.equal(first, second)
    rounded = dataclasses.replace(text, txt=text.txt.bfloat16().float())
    assert not torch.equal(denoiser(nano.transformer, rounded, grid)(x, torch.tensor(0.7123), 0), first)
    for hook in hooks:
        hook.remove()
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("max_rows", [None, 1])
def test_the_first_steps_are_those_of_float32(nano: Pipeline, max_rows: int | None) -> None:
    """In them things find their places. The noise is the same, too."""

    def steps(pipe: Pipeline) -> list[Tensor]:
        made: list[StepInfo] = []
        size = {"height": 96, "width": 96, "num_inference_steps": 5}
        pipe.generate("a cup", [8], bokeh_pivot=15, on_step=made.append, max_rows=max_rows, **size)  # type: ignore[arg-type]
        return [info.latents for info in made]

    seen: list[torch.dtype] = []
    hook = nano.transformer.singles[0].attention.register_forward_pre_hook(
        lambda _, args: seen.append(args[-1].dtype)
    )
    ours, exact = steps(nano), steps(bokehflux.load("nano", device="cpu", dtype="float32"))
    hook.remove()
    passes = len(seen) // 5
    assert seen == [torch.float32] * passes + [torch.bfloat16] * 4 * passes  # noise levels 1, 0.86 ...
    for step, (a, b) in enumerate(zip(ours, exact, strict=True)):
        error = (a - b).norm() / b.norm()
        assert a.dtype == torch.float32 and (error < 5e-4 if step == 0 else 1e-3 < error < 1e-2)


def test_pictures_in_bfloat16_are_those_of_float32(nano: Pipeline) -> None:
    exact, ours = (
        pipe.generate(
            "a red ball on a wooden table",
            [8],
            bokeh_pivot=15,
            height=96,
            width=96,
            num_inference_steps=4,
            seed=1,
        )
        for pipe in (bokehflux.load("nano", device="cpu", dtype="float32"), nano)
    )
    assert ours.record.recipe()["dtype"] == "bfloat16"
    error = (ours.latents.float() - exact.latents).norm() / exact.latents.norm()
    assert error < 0.008
