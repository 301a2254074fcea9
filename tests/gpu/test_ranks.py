"""Two GPUs of one machine, over NCCL: they make what one makes."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from bokehflux.models.adapter import BokehCondition
from bokehflux.pipeline.generate import plan_generate
from bokehflux.pipeline.run import Options, execute
from bokehflux.sampling.denoise import Grounding, denoiser
from bokehflux.sampling.latents import LatentGrid
from bokehflux.sampling.ranks import ALONE, Ranks, RowsOverRanks, TokensOverRanks
from bokehflux.settings import GenerateSettings
from tests.tiny import BOKEH, MMDIT, FakeText, tiny_mmdit, tiny_pipeline

ROOT = Path(__file__).resolve().parents[2]
HEADS = dataclasses.replace(MMDIT, num_heads=4, hidden_size=256, axes_dim=(16, 24, 24))
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


def pictures(ranks: Ranks = ALONE, **options: Any) -> list[bytes]:
    device, dtype = torch.device("cuda", torch.cuda.current_device()), torch.bfloat16
    pipe = tiny_pipeline(dtype=dtype)
    pipe = dataclasses.replace(
        pipe,
        transformer=tiny_mmdit(BOKEH, HEADS).to(device, dtype),
        vae=pipe.vae.to(device),
        text=FakeText(dtype, device="cuda"),
    )
    made = []
    for targets in (1, 6):
        asked = GenerateSettings(
            prompt="a mug", bokeh_targets=tuple(map(float, range(targets))), bokeh_pivot=15.0,
            num_inference_steps=6, height=256, width=256,
        )  # fmt: skip
        result = execute(pipe, plan_generate(pipe, asked), Options(ranks=ranks, **options))
        made += [image.tobytes() for image in (*result.images, result.pivot_image) if image is not None]
    return made


def velocities(dtype: torch.dtype, ranks: Ranks = ALONE) -> list[Tensor]:
    """Each several times: recorded as a CUDA graph, messages and all, and replayed."""
    text, grid = FakeText(dtype, txt_length=17, device="cuda"), LatentGrid(height_px=208, width_px=176)
    mmdit = tiny_mmdit(BOKEH, HEADS).to("cuda", dtype)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, grid.num_tokens, 64, generator=generator).to("cuda", dtype)
    grounding = Grounding(pivot_row=0, num_steps=1)
    velocity = denoiser(
        mmdit, text.encode(["a"]), grid, bokeh=BokehCondition.of([8, 25]), grounding=grounding, ranks=ranks
    )
    return [velocity(x, torch.tensor(0.7), step).float().cpu() for step in (0, 1) * 4]


def work(folder: Path) -> None:
    """One of the processes."""
    rank = int(os.environ["RANK"])
    torch.cuda.set_device(rank)
    mesh = init_device_mesh("cuda", (2,))
    found = pictures(RowsOverRanks(mesh)), velocities(torch.bfloat16, TokensOverRanks(mesh))
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[list[bytes], list[Tensor]]]:
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", __file__, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def test_rows_over_two_gpus_are_the_bytes_of_one(both: list[tuple[list[bytes], list[Tensor]]]) -> None:
    expected = pictures(max_rows=1)[:2] + pictures(max_rows=4)[2:]
    assert both[0][0] == both[1][0] == expected


def test_tokens_over_two_gpus_are_as_exact_as_one(both: list[tuple[list[bytes], list[Tensor]]]) -> None:
    exact, one = velocities(torch.float32), velocities(torch.bfloat16)
    for step, (true, alone) in enumerate(zip(exact, one, strict=True)):
        limit = 2 * (alone - true).norm()
        assert all((found[1][step] - true).norm() <= limit for found in both), step


if __name__ == "__main__":
    work(Path(sys.argv[1]))
