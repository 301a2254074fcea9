"""Runs on several processes, on gloo: they make what one makes, and none outlives another."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from bokehflux.attention import Grounded
from bokehflux.configs import ControlsConfig
from bokehflux.models.adapter import BokehCondition
from bokehflux.models.controls import ControlAdapter, Controls
from bokehflux.models.fp8 import quantize_mmdit
from bokehflux.pipeline.generate import plan_generate
from bokehflux.pipeline.pipeline import Pipeline
from bokehflux.pipeline.refocus import plan_refocus
from bokehflux.pipeline.run import Options, Result, execute
from bokehflux.sampling.denoise import Grounding, denoiser
from bokehflux.sampling.latents import LatentGrid
from bokehflux.sampling.pivot_cache import PivotCache
from bokehflux.sampling.ranks import RowsOverRanks, Shared, Sizes, TokensOverRanks
from bokehflux.settings import GenerateSettings, RefocusSettings
from tests.faults.child import finish, needs_linux, start
from tests.tiny import BOKEH, MMDIT, FakeText, tiny_mmdit, tiny_pipeline

pytestmark = [
    needs_linux,
    pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed"),
]
HEADS = dataclasses.replace(MMDIT, num_heads=4, hidden_size=64)
"""Four heads of 16 channels: they divide among 2 and 4."""
SOME_BLOCKS = dataclasses.replace(BOKEH, blocks=(0, 3, 5))
"""Blocks between them attend plainly."""


def on_ranks(folder: Path, count: int, work: Callable[[DeviceMesh], Any]) -> list[Any]:
    """What `work` returned in each of so many processes."""

    def one(rank: int) -> str:
        torch.set_num_threads(1)  # a fork has none of its parent's threads
        dist.init_process_group("gloo", f"file://{folder / 'meet'}", rank=rank, world_size=count)
        torch.save(work(init_device_mesh("cpu", (count,))), folder / f"{rank}.pt")
        dist.destroy_process_group()
        return "done"

    children = [start(lambda rank=rank: one(rank)) for rank in range(count)]
    ends = [finish(*child) for child in children]
    assert ends == [(0, "done")] * count, "\n".join(said for _, said in ends)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def asked(targets: int, pivot: float | None = 15.0, **more: Any) -> GenerateSettings:
    levels = tuple(float(level) for level in range(targets))
    return GenerateSettings(
        prompt="a mug", bokeh_targets=levels, bokeh_pivot=pivot, num_inference_steps=3, **more
    )


ROWS: dict[str, GenerateSettings] = {
    "six targets": asked(6),
    "rows that do not divide": asked(4),
    "fewer rows than ranks": asked(1),
    "no pivot": asked(3, pivot=None),
    "true CFG": asked(2, true_cfg=2.0),
    "without the pivot": asked(3, num_grounding_steps=2, pivot_steps="grounded"),
    "reuse": dataclasses.replace(asked(3, reuse=2), num_inference_steps=8),
}


def made(pipe: Pipeline, settings: GenerateSettings, options: Options) -> tuple[Tensor, list[bytes], dict]:
    result = execute(pipe, plan_generate(pipe, settings), options)
    return facts(result)


def facts(result: Result) -> tuple[Tensor, list[bytes], dict]:
    pictures = [*result.images, *([] if result.pivot_image is None else [result.pivot_image])]
    return result.latents, [picture.tobytes() for picture in pictures], result.record.recipe()


def same(found: Any, expected: Any) -> bool:
    return torch.equal(found[0], expected[0]) and found[1:] == expected[1:]


def others(options: Options) -> list[tuple[Tensor, list[bytes], dict]]:
    """A photograph refocused, and a scene in fp8: three rows each."""
    pipe, fp8 = tiny_pipeline(), tiny_pipeline(dtype=torch.bfloat16)
    quantize_mmdit(fp8.transformer)
    photo = Image.linear_gradient("L").convert("RGB")
    settings = RefocusSettings(
        prompt="a mug",
        bokeh_targets=(7.0, 30.0),
        bokeh_pivot=7.0,
        num_inference_steps=2,
        height=32,
        width=48,
        method="inversion",
    )
    refocused = facts(execute(pipe, plan_refocus(pipe, photo, settings), options))
    return [refocused, made(fp8, asked(2), options)]


@pytest.mark.parametrize("count", [2, 4])
def test_rows_over_ranks_have_the_bits_of_one_process(tmp_path: Path, count: int) -> None:
    """Latents, pictures and recipes, on every rank, where one process takes as many rows at once."""
    pipe = tiny_pipeline()

    def work(mesh: DeviceMesh) -> list[Any]:
        ranks = RowsOverRanks(mesh)
        found = [made(pipe, settings, Options(ranks=ranks)) for settings in ROWS.values()]
        found.append(made(pipe, asked(6), Options(ranks=ranks, max_rows=1)))
        found += others(Options(ranks=ranks))
        return found

    for found in on_ranks(tmp_path, count, work):
        for one, (name, settings) in zip(found, ROWS.items(), strict=False):
            share = -(-settings.num_rows // count)
            assert same(one, made(pipe, settings, Options(max_rows=share))), name
        assert same(found[-3], made(pipe, asked(6), Options(max_rows=1)))
        assert same(found[-2], others(Options(max_rows=-(-3 // count)))[0])
        # Where one process takes several batches, fp8 rounds the sum of a stream once more.
        assert torch.equal(found[-1][0], others(Options())[1][0])


@pytest.mark.parametrize("count", [2, 4])
def test_tokens_over_ranks_make_the_pictures_of_one_process(tmp_path: Path, count: int) -> None:
    """To rounding: plain and grounded, with value vectors, in blocks that the adapter leaves alone, split
    batches, true CFG, controls, and numbers of tokens that do not divide."""
    torch.manual_seed(0)
    mmdit, text = tiny_mmdit(SOME_BLOCKS, HEADS), FakeText(torch.float32, txt_length=7)
    grid = LatentGrid(height_px=48, width_px=80)  # 15 tokens
    x = torch.randn(3, grid.num_tokens, MMDIT.in_channels)
    grounding, levels = Grounding(pivot_row=0, num_steps=1), BokehCondition.of([8, 25, 3])
    kinds: list[dict[str, Any]] = [
        {}, {"grounding": grounding}, {"grounding": grounding, "max_rows": 1},
        {"true_cfg": 2.0, "negative": text.encode(["bad"])},
        {"attention": lambda rows, step: Grounded(pivot_of=(1,) * rows)},
        {"grounding": dataclasses.replace(grounding, cache=PivotCache())},
        {"grounding": grounding, "bokeh": dataclasses.replace(levels, controls=Controls(
            adapter=ControlAdapter(ControlsConfig(rank=3), HEADS),
            focus=torch.tensor([math.nan, 0.7, math.nan]), shape=torch.zeros(3, 256),
            features=torch.rand(3, grid.num_tokens, 8),
        ))},
    ]  # fmt: skip

    def velocities(**ranks: Any) -> list[Tensor]:
        found = []
        for kind in kinds:
            how = {"bokeh": levels} | kind | ranks
            velocity = denoiser(mmdit, text.encode(["a"]), grid, **how)
            found += [velocity(x, torch.tensor(0.7), step) for step in (0, 1)]
        return found

    expected = velocities()
    for found in on_ranks(tmp_path, count, lambda mesh: velocities(ranks=TokensOverRanks(mesh))):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


class Mesh:
    """So many processes, for what needs none of them."""

    ndim, device_type = 1, "cpu"

    def __init__(self, count: int) -> None:
        self.size = lambda: count
        self.get_group = self.get_local_rank = lambda: 0


def shared(count: int, **options: Any) -> object:
    mmdit, text = tiny_mmdit(options.pop("bokeh", BOKEH), HEADS), FakeText(torch.float32).encode(["a"])
    kind = options.pop("kind", TokensOverRanks)
    ranks = object.__new__(kind)
    Shared.__init__(ranks, Mesh(count))  # type: ignore[arg-type]
    return denoiser(mmdit, text, LatentGrid(height_px=48, width_px=80), ranks=ranks, **options)


def test_what_cannot_be_shared_out_is_refused() -> None:
    with pytest.raises(
        ValueError, match="4 heads of attention cannot be shared out among 3 ranks: take 1, 2, 4"
    ):
        shared(3)
    grounding = Grounding(pivot_row=0, num_steps=1, cache=PivotCache())
    with pytest.raises(ValueError, match="a pivot cache is filled by one process"):
        shared(2, kind=RowsOverRanks, grounding=grounding)
    with pytest.raises(ValueError, match="need an adapter that updates keys"):
        keys_alone = dataclasses.replace(BOKEH, adapt_k=False)
        shared(2, kind=RowsOverRanks, grounding=Grounding(pivot_row=0, num_steps=1), bokeh=keys_alone)
    mesh = Mesh(2)
    mesh.ndim = 2
    with pytest.raises(ValueError, match="a mesh of one dimension, got 2"):
        TokensOverRanks(mesh)  # type: ignore[arg-type]


def test_too_few_tokens_are_refused() -> None:
    sizes = Sizes((6, 3), 8, 16, torch.float32)
    with pytest.raises(ValueError, match="6 text and 3 image tokens are too few for 4 ranks"):
        TokensOverRanks(Mesh(4)).of(sizes)  # type: ignore[arg-type]
