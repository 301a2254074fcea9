"""`Pipeline.generate` and `load` from the outside: pictures, settings, defaults and every refusal."""

from __future__ import annotations

import dataclasses
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import bokehflux
from bokehflux.configs import Defaults
from bokehflux.models.mmdit import MMDiT
from bokehflux.models.vae import to_uint8
from bokehflux.pictures.metadata import read_recipe
from bokehflux.pipeline.color import lab_mean
from bokehflux.pipeline.pipeline import Pipeline
from bokehflux.pipeline.provenance import device_name
from bokehflux.record import Record
from bokehflux.sampling.diagnose import NonFiniteError
from bokehflux.sampling.latents import LatentGrid, unpack
from bokehflux.sampling.samplers import StepInfo
from bokehflux.settings import NEGATIVE_PROMPT
from tests.tiny import BOKEH, MMDIT, tiny_pipeline

PROMPT = "a red cup on a table"


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return tiny_pipeline()


def pixels(image: Any) -> np.ndarray:
    return np.asarray(image).astype(int)


def differ(a: Any, b: Any) -> bool:
    return bool((pixels(a) != pixels(b)).mean() > 0.2)


def test_grounded_result(pipe: Pipeline) -> None:
    result = pipe.generate(PROMPT, [0, 30], bokeh_pivot=12)
    assert [image.size for image in result.images] == [(48, 32)] * 2 and result.images[0].mode == "RGB"
    assert result.pivot_image is not None and result.pivot_image.size == (48, 32)
    assert result.latents.shape == (2, 6, 64)
    assert result.pivot_latents is not None and result.pivot_latents.shape == (6, 64)
    assert differ(*result.images) and differ(result.images[0], result.pivot_image)


def test_unbounded_result(pipe: Pipeline) -> None:
    result = pipe.generate(PROMPT, [0, 15, 30])
    assert len(result.images) == 3 and result.latents.shape == (3, 6, 64)
    assert result.pivot_image is None and result.pivot_latents is None
    assert result.record.recipe()["num_grounding_steps"] == 0


def test_without_levels_the_adapter_plays_no_part(pipe: Pipeline) -> None:
    """Plain FLUX: one picture, the same with and without an adapter built in."""
    bare = MMDiT(MMDIT).eval()
    bare.load_state_dict(
        {k: v for k, v in pipe.transformer.state_dict().items() if not k.startswith("bokeh.")}
    )
    ours = pipe.generate(PROMPT)
    theirs = dataclasses.replace(pipe, transformer=bare).generate(PROMPT)
    assert len(ours.images) == 1
    assert torch.equal(ours.latents, theirs.latents)
    assert (pixels(ours.images[0]) == pixels(theirs.images[0])).all()
    assert ours.record.recipe()["bokeh_targets"] is None


def test_pictures_are_the_decoded_latents(pipe: Pipeline) -> None:
    result = pipe.generate(PROMPT, [4, 26])
    decoded = to_uint8(pipe.vae.decode(unpack(result.latents.clone(), LatentGrid(height_px=32, width_px=48))))
    for image, exact in zip(result.images, decoded.numpy(), strict=True):
        assert np.abs(pixels(image) - exact).max() <= 1


def test_targets_take_the_colour_of_the_pivot(pipe: Pipeline) -> None:
    result = pipe.generate(PROMPT, [0, 30], bokeh_pivot=12)
    grid = LatentGrid(height_px=32, width_px=48)
    raw = to_uint8(pipe.vae.decode(unpack(result.latents.clone(), grid))).numpy()
    assert result.pivot_latents is not None
    decoded = to_uint8(pipe.vae.decode(unpack(result.pivot_latents.clone()[None], grid))).numpy()[0]
    assert np.abs(pixels(result.pivot_image) - decoded).max() <= 1, "the pivot itself is not transferred"
    pivot = lab_mean(torch.tensor(np.asarray(result.pivot_image)))

    def distance(image: np.ndarray) -> float:
        return float((lab_mean(torch.tensor(image)) - pivot).abs().max())

    for image, before in zip(result.images, raw, strict=True):
        assert distance(np.asarray(image)) < 2
        assert (np.asarray(image) != before).any()


def test_rows_do_not_depend_on_each_other(pipe: Pipeline) -> None:
    """Targets of one batch equal targets that run alone, and follow the order they were asked in."""
    together = pipe.generate(PROMPT, [3, 27, 18], bokeh_pivot=12)
    for row, level in enumerate([3, 27, 18]):
        alone = pipe.generate(PROMPT, [level], bokeh_pivot=12)
        torch.testing.assert_close(together.latents[row], alone.latents[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(together.pivot_latents, alone.pivot_latents, atol=1e-4, rtol=1e-4)


def test_the_pivot_is_an_unbounded_picture_at_its_level(pipe: Pipeline) -> None:
    """Grounding changes targets only; a target at the pivot's own level is the pivot."""
    result = pipe.generate(PROMPT, [12, 30], bokeh_pivot=12)
    free = pipe.generate(PROMPT, [12, 30])
    assert result.pivot_latents is not None
    torch.testing.assert_close(result.pivot_latents, free.latents[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(result.latents[0], free.latents[0], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(result.latents[1], free.latents[1], atol=1e-3)


def test_no_grounded_steps_is_unbounded(pipe: Pipeline) -> None:
    ours = pipe.generate(PROMPT, [3, 27], bokeh_pivot=12, num_grounding_steps=0)
    free = pipe.generate(PROMPT, [3, 27])
    assert torch.equal(ours.latents, free.latents)
    assert ours.pivot_image is None and ours.pivot_latents is None
    assert all((pixels(a) == pixels(b)).all() for a, b in zip(ours.images, free.images, strict=True))


def test_seeds(pipe: Pipeline) -> None:
    a, b, c = (pipe.generate(PROMPT, [9], seed=seed) for seed in (1, 1, 2))
    assert torch.equal(a.latents, b.latents) and (pixels(a.images[0]) == pixels(b.images[0])).all()
    assert differ(a.images[0], c.images[0])
    assert not torch.allclose(a.latents, pipe.generate("something else", [9], seed=1).latents, atol=1e-2)


def test_all_rows_start_from_the_same_noise(pipe: Pipeline) -> None:
    """Rows at one level are one picture; the global generator neither matters nor moves."""
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    a = pipe.generate(PROMPT, [9, 9])
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(2)
    b = pipe.generate(PROMPT, [9, 9])
    torch.testing.assert_close(a.latents[0], a.latents[1], atol=1e-5, rtol=1e-5)
    assert torch.equal(a.latents, b.latents)


@pytest.mark.parametrize(("steps", "grounded"), [(1, 1), (5, 4), (8, 6), (10, 8), (30, 24)])
def test_grounded_share_of_the_steps(pipe: Pipeline, steps: int, grounded: int) -> None:
    settings = pipe.generate(
        PROMPT, [0], bokeh_pivot=9, num_inference_steps=steps, height=16, width=16
    ).record.recipe()
    assert (settings["num_inference_steps"], settings["num_grounding_steps"]) == (steps, grounded)


def test_defaults_come_from_the_model(pipe: Pipeline) -> None:
    other = Defaults(num_inference_steps=3, height_px=64, width_px=16, txt_length=6)
    result = dataclasses.replace(pipe, defaults=other).generate(PROMPT)
    assert result.images[0].size == (16, 64)
    assert (
        result.record.recipe()["num_inference_steps"],
        result.record.recipe()["height"],
        result.record.recipe()["width"],
    ) == (
        3,
        64,
        16,
    )


def test_settings(pipe: Pipeline) -> None:
    """Everything after defaults, through JSON and back."""
    settings = pipe.generate(
        PROMPT, [np.float32(3), 30], bokeh_pivot=np.float64(12.5), seed=4, true_cfg=2.0
    ).record.recipe()
    assert json.loads(json.dumps(settings)) == settings == {
        "prompt": PROMPT, "bokeh_targets": [3.0, 30.0], "bokeh_pivot": 12.5, "num_inference_steps": 5,
        "num_grounding_steps": 4, "guidance_scale": 3.0, "true_cfg": 2.0, "negative_prompt": NEGATIVE_PROMPT,
        "height": 32, "width": 48, "seed": 4, "model": "tiny", "device": "cpu", "dtype": "float32",
        "compute": "dtype", "version": bokehflux.__version__, "memory": "resident", "adapter": None,
        "loras": [], "max_rows": None, "vae_tiling": False, "model_hash": None, "adapter_hash": None,
        "lora_hashes": [], "device_name": device_name(torch.device("cpu")), "attention": "sdpa",
        "threads": torch.get_num_threads(), "torch": torch.__version__, "triton": None,
    }  # fmt: skip


def test_settings_repeat_the_run(pipe: Pipeline) -> None:
    first = pipe.generate(PROMPT, [3, 28], bokeh_pivot=12, seed=11, guidance_scale=4.5)
    again = pipe.generate(**first.record.settings.recipe())
    assert torch.equal(again.latents, first.latents) and again.record == first.record


def test_odd_sizes_are_floored(pipe: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        result = pipe.generate(PROMPT, height=47, width=33, num_inference_steps=1)
    assert result.images[0].size == (32, 32)
    assert (result.record.recipe()["height"], result.record.recipe()["width"]) == (32, 32)
    assert "47 x 33" in caplog.text


def test_on_step(pipe: Pipeline) -> None:
    infos: list[StepInfo] = []
    result = pipe.generate(PROMPT, [0, 30], bokeh_pivot=12, on_step=infos.append)
    assert [info.step for info in infos] == list(range(5)) and {info.num_steps for info in infos} == {5}
    levels = [info.sigma for info in infos]
    assert levels == sorted(levels, reverse=True) and levels[-1] == 0
    assert all(info.latents.shape == (3, 6, 64) for info in infos)
    assert result.pivot_latents is not None
    assert torch.equal(infos[-1].latents[0], result.pivot_latents), "the pivot is row 0"
    assert torch.equal(infos[-1].latents[1:], result.latents)


@pytest.mark.parametrize(
    "change",
    [
        {"guidance_scale": 6.0}, {"true_cfg": 3.0}, {"num_inference_steps": 4}, {"num_grounding_steps": 1},
        {"bokeh_pivot": 25},
    ],
    ids=str,
)  # fmt: skip
def test_every_argument_matters(pipe: Pipeline, change: dict[str, Any]) -> None:
    base: dict[str, Any] = {"bokeh_targets": [2], "bokeh_pivot": 12}
    assert not torch.allclose(
        pipe.generate(PROMPT, **base).latents, pipe.generate(PROMPT, **(base | change)).latents, atol=1e-3
    )


def test_the_negative_prompt_matters_only_with_true_cfg(pipe: Pipeline) -> None:
    def latents(true_cfg: float, negative: str) -> torch.Tensor:
        return pipe.generate(PROMPT, [8], true_cfg=true_cfg, negative_prompt=negative).latents

    assert torch.equal(latents(1.0, "x"), latents(1.0, "y"))
    assert not torch.allclose(latents(2.0, "x"), latents(2.0, "y"), atol=1e-3)


def test_bfloat16() -> None:
    result = tiny_pipeline(dtype=torch.bfloat16).generate(PROMPT, [0, 30], bokeh_pivot=12)
    assert result.latents.dtype == torch.float32 and result.latents.isfinite().all()
    assert result.record.recipe()["dtype"] == "bfloat16"
    exact = tiny_pipeline().generate(PROMPT, [0, 30], bokeh_pivot=12)
    assert np.abs(pixels(result.images[1]) - pixels(exact.images[1])).mean() < 10


BAD = [
    ({"prompt": ["a", "b"]}, "prompt must be text"),
    ({"prompt": None}, "prompt must be text"),
    ({"prompt": "x\ud800"}, "prompt is not valid Unicode"),
    ({"bokeh_targets": "28"}, "bokeh_targets must be a sequence of 1 to 1000 levels, got '28'"),
    ({"seed": True}, "seed must be a whole number"),
    ({"seed": -1}, "None in Python"),
    ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number"),
    ({"guidance_scale": 1e39}, "guidance_scale must be at least -1000 and at most 1000"),
    ({"bokeh_targets": torch.zeros(2, 2)}, "must be a sequence of 1 to 1000 levels"),
    ({"true_cfg": 1e38}, "true_cfg must be at least 1 and at most 1000"),
    ({"height": 10**9}, "height must be at least 16 and at most 16383"),
    ({"max_sequence_length": 0}, "max_sequence_length must be at least 1"),
    ({"bokeh_targets": []}, "bokeh_targets must be a sequence of 1 to 1000 levels, got"),
    ({"bokeh_targets": [3, 31]}, "between 0 .* and 30, got 31"),
    ({"bokeh_targets": [-1]}, "got -1"),
    ({"bokeh_targets": [float("nan")]}, "got nan"),
    ({"bokeh_targets": [3], "bokeh_pivot": 40}, "got 40"),
    ({"bokeh_pivot": 3}, "bokeh_pivot needs bokeh_targets"),
    ({"num_inference_steps": 0}, "num_inference_steps must be at least 1 .* got 0"),
    ({"num_inference_steps": -2}, "got -2"),
    ({"bokeh_targets": [3], "num_grounding_steps": 2}, "num_grounding_steps needs bokeh_pivot"),
    ({"num_grounding_steps": 2}, "num_grounding_steps needs bokeh_pivot"),
    ({"bokeh_targets": [3], "bokeh_pivot": 3, "num_grounding_steps": 6}, "at most the 5 steps, got 6"),
    ({"bokeh_targets": [3], "bokeh_pivot": 3, "num_grounding_steps": -1}, "got -1"),
    ({"height": 15}, "height must be at least 16 .* got 15"),
    ({"num_inference_steps": 2.0}, "num_inference_steps must be a whole number, got 2.0"),
    ({"bokeh_targets": 5.0}, "must be a sequence of 1 to 1000 levels, got 5.0"),
    ({"bokeh_targets": [None]}, "must be a sequence of 1 to 1000 levels"),
    ({"true_cfg": 0.5}, "true_cfg must be at least 1 .* got 0.5"),
    ({"seed": 2**64}, "seed must be at least .* and at most"),
    ({"width": 0}, "width must be at least 16 .* got 0"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[m for _, m in BAD])
def test_refusals(pipe: Pipeline, arguments: dict[str, Any], message: str) -> None:
    """ValueError in one line, before any network runs."""
    ran: list[int] = []
    with pipe.transformer.register_forward_pre_hook(lambda *_: ran.append(1)):
        with pytest.raises(ValueError, match=message) as caught:
            pipe.generate(**({"prompt": PROMPT} | arguments))
    assert "\n" not in str(caught.value) and not ran


def test_levels_need_an_adapter() -> None:
    with pytest.raises(ValueError, match="need an adapter.*adapter='path/to/BokehDiffusion'"):
        tiny_pipeline(bokeh=None).generate(PROMPT, [3])


def test_an_adapter_without_key_updates_runs_grounded() -> None:
    pipe = tiny_pipeline(bokeh=dataclasses.replace(BOKEH, adapt_k=False))
    result = pipe.generate(PROMPT, [12, 30], bokeh_pivot=12)
    torch.testing.assert_close(result.latents[0], result.pivot_latents, atol=1e-4, rtol=1e-4)


def test_a_result_is_saved_with_its_recipe(pipe: Pipeline, tmp_path: Path) -> None:
    result = pipe.generate(PROMPT, [3, 28], bokeh_pivot=12, seed=11)
    paths = result.save(tmp_path / "out")
    names = ["bokeh-03.0.png", "bokeh-28.0.png", "pivot-bokeh-12.0.png", "sheet.png"]
    assert [path.name for path in paths] == names
    for path in paths:
        record = Record.from_recipe(read_recipe(path))
        assert (record.settings, record.provenance) == (result.record.settings, result.record.provenance)
        assert b"trainedAlgorithmicMedia" in path.read_bytes()
    with Image.open(paths[1]) as image:
        assert image.tobytes() == result.images[1].tobytes()
    assert [path.name for path in result.save(tmp_path / "out")][0] == "bokeh-03.0-run2.png", (
        "nothing is lost"
    )
    assert result.sheet().tobytes() == Image.open(paths[3]).tobytes()
    assert result._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="unknown picture format 'tiff'"):
        result.save(tmp_path / "out", "tiff")


def test_a_watermark_and_a_signature_get_every_picture(pipe: Pipeline, tmp_path: Path) -> None:
    result = pipe.generate(PROMPT, [3], num_inference_steps=1)
    signed: list[str] = []

    def sign(data: bytes, kind: str) -> bytes:
        signed.append(kind)
        return data + b"signature"

    paths = result.save(tmp_path, watermark=lambda image: Image.new("RGB", image.size, "red"), sign=sign)
    assert signed == ["png", "png"] and all(path.read_bytes().endswith(b"signature") for path in paths)
    for path in paths:
        with Image.open(path) as image:
            assert image.getpixel((3, 3)) == (255, 0, 0)
    for forgotten in (None, result.images):
        with pytest.raises(ValueError, match="watermark must return the picture"):
            result.save(tmp_path / "none", watermark=lambda _, it=forgotten: it)
    assert not any((tmp_path / "none").glob("*"))


def test_progress_is_drawn_on_stderr(pipe: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[int] = []
    pipe.generate(
        PROMPT, [3], num_inference_steps=2, progress=True, on_step=lambda info: seen.append(info.step)
    )
    out, err = capsys.readouterr()
    assert "step 2/2" in err and "decoding" in err and out == "" and seen == [0, 1]
    pipe.generate(PROMPT, [3], num_inference_steps=2)
    assert capsys.readouterr().err == ""


def test_an_empty_prompt_is_a_prompt(pipe: Pipeline) -> None:
    assert not torch.equal(pipe.generate("").latents, pipe.generate(" ").latents)


def test_text_of_another_length(pipe: Pipeline) -> None:
    """Shorter text is less work and another picture; the recipe holds it."""
    short = pipe.generate(PROMPT, max_sequence_length=3)
    assert short.record.recipe()["max_sequence_length"] == 3
    assert not torch.allclose(short.latents, pipe.generate(PROMPT).latents, atol=1e-3)
    assert "max_sequence_length" not in pipe.generate(PROMPT).record.recipe()


# --- load


@pytest.mark.parametrize("model", ["no-such-model", Path("no/such/folder")], ids=str)
def test_load_of_nothing(model: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=str(model).replace("/", ".")):
        bokehflux.load(model, device="cpu")


def test_load_of_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=str(tmp_path.name)):
        bokehflux.load(tmp_path, device="cpu")


@pytest.mark.parametrize("device", ["tpu9000", "gpu", "cuda:x"])
def test_load_to_an_unknown_device(device: str) -> None:
    with pytest.raises(ValueError, match=f"unknown device '{device}': expected cpu, cuda") as caught:
        bokehflux.load("nothing", device=device)
    assert "\n" not in str(caught.value)


def test_load_to_a_gpu_that_is_not_there() -> None:
    missing = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(ValueError, match=f"{missing} is not there: this machine shows"):
        bokehflux.load("nothing", device=missing)


@pytest.mark.parametrize("dtype", ["bf16", "float64", torch.float64, torch.int8], ids=str)
def test_load_in_an_unknown_dtype(dtype: str | torch.dtype) -> None:
    with pytest.raises(ValueError, match="unknown dtype .*'bfloat16', 'float16', 'float32'"):
        bokehflux.load("nothing", device="cpu", dtype=dtype)


@pytest.mark.parametrize(
    "name", ["double_blocks.1.img_mlp.0", "single_blocks.2.linear1", "final_layer.linear"]
)
def test_nan_in_a_weight_is_named(name: str) -> None:
    broken = tiny_pipeline()
    with torch.no_grad():
        # The last row: in a fused projection it is the MLP's. A query's NaN ends in the CPU's attention.
        broken.transformer.get_submodule(name).weight[-1, 0] = torch.nan
    block = ".".join(name.split(".")[:2])
    message = rf"^{block}.* returned NaN or infinity at step 0: NaN or infinity in {name}.weight$"
    with pytest.raises(NonFiniteError, match=message):
        broken.generate(PROMPT, [0, 28], bokeh_pivot=15)
    hooks = [h for m in broken.transformer.modules() for h in m._forward_hooks]
    assert not hooks


@pytest.mark.parametrize(
    "name", ["vector_in.in_layer", "double_blocks.0.img_mod.lin", "bokeh.adapter_modules.0.to_v_bokeh.up"]
)
def test_nan_in_a_weight_that_is_read_before_the_steps_is_named(name: str) -> None:
    broken = tiny_pipeline()
    with torch.no_grad():
        broken.transformer.get_submodule(name).weight[-1, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=rf" at step 0: NaN or infinity in {name}.weight$"):
        broken.generate(PROMPT, [0, 28], bokeh_pivot=15)


def test_overflow_is_named_by_layer_and_step() -> None:
    """A layer that overflows late, with sound weights."""
    broken, calls = tiny_pipeline(), []
    layer = broken.transformer.single_blocks[0].linear2

    def overflow(_: torch.nn.Module, __: object, out: torch.Tensor) -> torch.Tensor | None:
        calls.append(1)
        return out * torch.inf if len(calls) % 5 == 4 else None

    layer.register_forward_hook(overflow)
    with pytest.raises(NonFiniteError, match="^single_blocks.0.linear2 .* at step 3, from finite weights"):
        broken.generate(PROMPT, [0], num_inference_steps=5)


def test_threads_that_share_a_pipeline_get_the_bits_of_one(pipe: Pipeline) -> None:
    """Sizes and batches differ, so that whatever a run left in the networks would show in another."""

    def run(i: int) -> torch.Tensor:
        size = 32 + 16 * (i % 3)
        asked = {"bokeh_pivot": 12.0} if i % 2 else {}
        return pipe.generate(PROMPT, [0, 30][: 1 + i % 2], seed=i, height=size, width=64, **asked).latents

    alone = [run(i) for i in range(6)]
    with ThreadPoolExecutor(6) as threads:
        assert all(torch.equal(a, b) for a, b in zip(alone, threads.map(run, range(6)), strict=True))


@pytest.mark.parametrize(("option", "says"), [
    ({"backend": "flashy"}, "flashy"), ({"max_rows": 0}, "max_rows"), ({"vae_tiling": 3}, "vae_tiling"),
])  # fmt: skip
def test_every_option_arrives(option: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        tiny_pipeline().generate("a cup", [3], num_inference_steps=1, **option)
