"""silu(group_norm(x)) on a GPU: the fused kernels beside PyTorch's operators in bfloat16."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bokehflux.kernels.group_norm import interface


@pytest.mark.parametrize("shape", [(3, 32, 128, 128), (2, 144, 33, 31), (1, 512, 64, 65), (4, 128, 16, 16)])
def test_forward_and_gradients_in_bfloat16(shape):
    groups = 8
    x = (torch.randn(shape, device="cuda") * 2 + 0.5).bfloat16().contiguous(memory_format=torch.channels_last)
    dy = torch.randn(shape, device="cuda").bfloat16()
    weight, bias = torch.randn(2, shape[1], device="cuda") + 0.5
    assert interface.takes(x)

    def gradients(dtype, call):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, weight, bias)]
        out = call(*leaves)
        out.backward(dy.to(out.dtype))
        return [out.detach().double(), *(leaf.grad.double() for leaf in leaves)]

    def plain(x, w, b):
        return F.silu(F.group_norm(x, groups, w, b, 1e-6))

    exact, theirs = gradients(torch.float64, plain), gradients(torch.bfloat16, plain)
    ours = gradients(torch.bfloat16, lambda x, w, b: interface.group_norm_silu(x, w, b, groups, 1e-6))
    again = gradients(torch.bfloat16, lambda x, w, b: interface.group_norm_silu(x, w, b, groups, 1e-6))
    for got, repeat, reference, true in zip(ours, again, theirs, exact, strict=True):
        assert torch.equal(got, repeat)
        assert (got - true).norm() <= 2 * (reference - true).norm()


def test_other_layouts_and_dtypes_take_pytorchs_operators():
    assert not interface.takes(torch.zeros(1, 8, 4, 4, device="cuda", dtype=torch.bfloat16)[:, :, ::2])
    assert not interface.takes(torch.zeros(1, 8, 4, 4, device="cuda"))
