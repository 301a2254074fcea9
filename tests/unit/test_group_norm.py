"""silu(group_norm(x)): the kernels in Triton's interpreter against PyTorch's operators in float64."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F

from bokehflux.kernels.group_norm import interface

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1 (set by tests/conftest.py)"
)


def case(shape, groups, dtype, offset=0.5):
    torch.manual_seed(0)
    batch, channels, height, width = shape
    x = (torch.randn(shape) * 2 + offset).to(dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(channels) + 1, torch.randn(channels)
    dy = torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)
    return x, weight, bias, groups, dy


def gradients(call, x, weight, bias, dy):
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    out = call(*leaves)
    out.backward(dy.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def error(got, exact):
    return float((got.double() - exact).norm() / exact.norm())


@interpreted
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((2, 32, 16, 16), 8),
        ((1, 144, 7, 5), 8),
        ((3, 48, 33, 3), 4),
        ((2, 8, 1, 1), 2),
        ((1, 32, 64, 96), 32),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_forward_and_gradients(shape, groups, dtype):
    from bokehflux.kernels.group_norm import ops

    x, weight, bias, groups, dy = case(shape, groups, dtype)

    def pytorch(x, w, b):
        return F.silu(F.group_norm(x, groups, w.to(x.dtype), b.to(x.dtype), 1e-6))

    plain = gradients(pytorch, x, weight, bias, dy)
    exact = gradients(pytorch, x.double(), weight.double(), bias.double(), dy.double())
    ours = gradients(lambda x, w, b: ops.group_norm_silu(x, w, b, groups, 1e-6), x, weight, bias, dy)
    assert ours[0].dtype == dtype and ours[0].is_contiguous(memory_format=torch.channels_last)
    for got, theirs, true in zip(ours, plain, exact, strict=True):
        if true.norm() < 1e-9:  # one position of one channel a group normalises to nothing
            continue
        assert error(got, true) <= 2 * error(theirs, true) + 4 * torch.finfo(torch.float32).eps


@interpreted
def test_nothing_is_left_unwritten(poisoned):
    from bokehflux.kernels.group_norm import ops

    x, weight, bias, groups, dy = case((2, 24, 9, 11), 3, torch.float32)
    parts = gradients(lambda x, w, b: ops.group_norm_silu(x, w, b, groups, 1e-6), x, weight, bias, dy)
    assert all(part.isfinite().all() for part in parts)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_cpu_takes_pytorchs_operators(memory_format):
    x, weight, bias, groups, _ = case((2, 32, 6, 5), 8, torch.float32)
    x = x.contiguous(memory_format=memory_format)
    got = interface.group_norm_silu(x, weight, bias, groups, 1e-6)
    assert torch.equal(got, F.silu(F.group_norm(x, groups, weight, bias, 1e-6)))


def test_groups_must_divide_the_channels():
    with pytest.raises(ValueError, match="multiple of 5 groups"):
        interface.group_norm_silu(torch.zeros(1, 12, 2, 2), torch.ones(12), torch.zeros(12), 5, 1e-6)
    with pytest.raises(ValueError, match=r"expected \[B, C, H, W\].*\(1, 12, 2\)"):
        interface.group_norm_silu(torch.zeros(1, 12, 2), torch.ones(12), torch.zeros(12), 4, 1e-6)
