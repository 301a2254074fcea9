"""What networks say about themselves, and the proof of it: sharding unit by unit changes no number."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bokehflux.attention import Grounded
from bokehflux.configs import CLIPConfig, T5Config
from bokehflux.models.adapter import BokehCondition
from bokehflux.models.clip import CLIPTextEncoder
from bokehflux.models.embeddings import rope_table
from bokehflux.models.mmdit import MMDiT
from bokehflux.models.t5 import T5Encoder
from bokehflux.models.units import Network
from bokehflux.models.vae import AutoencoderKL
from bokehflux.sampling.latents import LatentGrid, position_ids
from tests.tiny import MMDIT, TXT_LENGTH, VAE, tiny_mmdit

ROOT = Path(__file__).resolve().parents[2]
T5 = T5Config(vocab_size=20, width=16, head_dim=4, mlp_size=24, num_layers=3, num_heads=4)
CLIP = CLIPConfig(vocab_size=20, width=16, mlp_size=32, num_layers=2, num_heads=2)
WORLD, ROWS = 2, 4


def batch(rows: slice) -> tuple:
    """Rows of the arguments of `MMDiT.forward`; every second row is grounded on the one before it."""
    g, grid = torch.Generator().manual_seed(5), LatentGrid(height_px=32, width_px=48)
    count = len(range(ROWS)[rows])
    rope = rope_table(position_ids(grid, TXT_LENGTH), MMDIT.axes_dim, MMDIT.theta)
    return (
        torch.randn(ROWS, grid.num_tokens, 64, generator=g)[rows],
        torch.randn(ROWS, TXT_LENGTH, MMDIT.txt_dim, generator=g)[rows],
        torch.randn(ROWS, MMDIT.pooled_dim, generator=g)[rows],
        torch.linspace(0.2, 0.9, ROWS)[rows],
        torch.linspace(1, 4, ROWS)[rows],
        rope,
        Grounded(pivot_of=tuple(i // 2 * 2 for i in range(count))),
        BokehCondition(levels=torch.tensor([3.0, 30, 0, 12])[rows]),
    )


def evaluated(mmdit: nn.Module, rows: slice) -> Tensor:
    """The velocity, and gradients of its mean square left in the parameters."""
    velocity = mmdit(*batch(rows))
    velocity.square().mean().backward()
    return velocity.detach()


def sharded(rank: int, folder: Path) -> None:
    """One of the processes: half of the rows through a network that is sharded unit by unit."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(minutes=5))
    mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,))
    mmdit = tiny_mmdit().requires_grad_(True)
    for module in (*mmdit.units().modules, mmdit):
        fully_shard(module, mesh=mesh)
    share = ROWS // WORLD
    velocity = evaluated(mmdit, slice(rank * share, (rank + 1) * share))
    gradients = {n: p.grad.full_tensor() for n, p in mmdit.named_parameters() if p.grad is not None}
    local = {n: p.to_local().numel() for n, p in mmdit.named_parameters()}
    torch.save((velocity, gradients, local), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_sharding_every_unit_changes_no_number(tmp_path: Path) -> None:
    """Forward and backward of two processes equal those of one, parameters split between them."""
    pytest.importorskip("torch.distributed.fsdp", reason="fully_shard is public since PyTorch 2.6")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__]
    runs = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(WORLD)
    ]
    for run in runs:
        _, said = run.communicate(timeout=300)
        assert run.returncode == 0, said
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    mmdit = tiny_mmdit().requires_grad_(True)
    velocity = evaluated(mmdit, slice(None))
    torch.testing.assert_close(torch.cat([r[0] for r in results]), velocity, atol=1e-6, rtol=0)
    expected = {name: p.grad for name, p in mmdit.named_parameters() if p.grad is not None}
    for _, gradients, local in results:
        torch.testing.assert_close(gradients, expected, atol=1e-6, rtol=1e-6)
        assert sum(local.values()) < 0.6 * sum(p.numel() for p in mmdit.parameters()), "half of each"


def networks() -> list[Network]:
    return [tiny_mmdit(), tiny_mmdit(bokeh=None), T5Encoder(T5), CLIPTextEncoder(CLIP), AutoencoderKL(VAE)]


@pytest.mark.parametrize("network", networks(), ids=lambda n: type(n).__name__)
def test_no_parameter_belongs_to_two_units(network: Network) -> None:
    units = network.units()
    owned = [id(p) for unit in units.modules for p in units.own(unit)] + [id(p) for p in units.unread]
    assert len(set(owned)) == len(owned) and set(owned) <= {id(p) for p in network.parameters()}
    assert {id(p) for p in units.matrices} <= {id(p) for p in network.parameters()}


def order_of_calls(network: MMDiT | T5Encoder, evaluate) -> list[nn.Module]:
    called: list[nn.Module] = []
    for unit in network.units().modules:
        unit.register_forward_pre_hook(lambda module, _: called.append(module))
    evaluate()
    return called


def test_units_are_called_in_the_order_they_are_given() -> None:
    mmdit, t5 = tiny_mmdit(), T5Encoder(T5)
    units = mmdit.units()
    called = order_of_calls(mmdit, lambda: mmdit(*batch(slice(None))))
    assert called == [*units.ahead, *units.values, *units.blocks]
    called = order_of_calls(t5, lambda: t5(torch.zeros(1, 4, dtype=torch.long)))
    assert called == [*t5.units().ahead, *t5.units().blocks]


def test_unread_parameters_change_nothing() -> None:
    mmdit = tiny_mmdit()
    before = mmdit(*batch(slice(None)))
    unread = mmdit.units().unread
    assert len(unread) == 2 * MMDIT.num_blocks
    for parameter in unread:
        nn.init.constant_(parameter, torch.nan)
    assert torch.equal(mmdit(*batch(slice(None))), before)


def test_matrices_are_the_work_of_the_blocks() -> None:
    mmdit = tiny_mmdit()
    names = {id(p): n for n, p in mmdit.named_parameters()}
    double = {f"double_blocks.{i}.{s}_{m}.weight" for i in range(2) for s in ("img", "txt")
              for m in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")}  # fmt: skip
    single = {f"single_blocks.{i}.linear{j}.weight" for i in range(4) for j in (1, 2)}
    assert {names[id(p)] for p in mmdit.units().matrices} == double | single
    vae = AutoencoderKL(VAE)
    names = {id(p): n for n, p in vae.named_parameters()}
    filters = {names[id(p)] for p in vae.units().matrices}
    assert {"encoder.mid.attn_1.q.weight", "decoder.up.0.block.0.conv1.weight"} <= filters
    assert not any(part in name for name in filters for part in ("conv_in", "conv_out", "norm", "bias"))


if __name__ == "__main__":
    sharded(int(sys.argv[1]), Path(sys.argv[2]))
