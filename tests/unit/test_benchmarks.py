"""The benchmarks on toys: they run whole, wrong arms are not timed, and their arithmetic is right."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import importlib.util
import json
import shlex
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks import (
    arms,
    bench_attention,
    bench_generate,
    bench_memory,
    bench_step,
    bench_train_attention,
    gpu_session,
    networks,
    profile_step,
    report,
    summary,
    sweep_tiles,
)
from benchmarks.networks import TINY
from benchmarks.shapes import ATTENTION, TOYS, AttentionShape
from bokehflux.kernels.attention import tiles

CPU = torch.device("cpu")
HAS_RIVALS = importlib.util.find_spec("diffusers") is not None
FOREVER = report.Budget(1e6)
ALL = (
    bench_attention, bench_step, bench_generate, bench_memory, bench_train_attention, profile_step,
    sweep_tiles,
)  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, and blocks traced but not compiled: a compiler would take most of a minute."""
    threads, compile = torch.get_num_threads(), nn.Module.compile
    torch.set_num_threads(1)

    def traced(self: nn.Module, *args: Any, **options: Any) -> None:
        compile(self, *args, **{**options, "backend": "eager"})

    monkeypatch.setattr(nn.Module, "compile", traced)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # toys on a GPU prove nothing about this
    config = torch._dynamo.config
    names = ("recompile_limit", "cache_size_limit", "fail_on_recompile_limit_hit")
    before = {name: getattr(config, name) for name in names if hasattr(config, name)}
    yield
    for name, value in before.items():  # what the benchmarks set ends with the test
        setattr(config, name, value)
    torch.set_num_threads(threads)
    torch._dynamo.reset()


def results(folder: Path, name: str) -> dict[str, Any]:
    with Image.open(folder / f"{name}.png") as image:
        assert image.height > 50
    assert sorted(path.name for path in folder.iterdir()) == [f"{name}.json", f"{name}.png"]
    found = json.loads((folder / f"{name}.json").read_text())
    assert {"device", "driver", "torch", "triton", "commit"} <= set(found["environment"])
    return found


# What they share.


def test_turns_take_one_round_of_every_arm_when_time_is_up() -> None:
    calls: list[str] = []
    arms = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    assert set(report.turns(arms, CPU, 5, report.Budget(0))) == {"a", "b"}
    assert calls == ["a", "b"]
    report.turns(arms, CPU, 2, FOREVER)
    assert calls[2:] == ["a", "b", "a", "b"]
    report.turns(arms, CPU, 5, report.Budget(0), at_least=3)
    assert len(calls) == 6 + 6


def test_a_turn_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls until the clock has settled; those after that count."""
    times = iter([50.0, 10.0, 30.0, 20.0, *[99.0] * 9])
    monkeypatch.setattr(report, "milliseconds", lambda call, device: (call(), next(times))[1])
    monkeypatch.setattr(report, "TURN_SECONDS", 0.3)
    calls: list[int] = []
    assert report.sustained_milliseconds(lambda: calls.append(1), torch.device("cuda")) == 20.0
    assert len(calls) == 6, "two halves of three calls of 50 ms"
    assert report.sustained_milliseconds(lambda: None, CPU) == 99.0


def test_table_aligns_and_shows_what_is_unknown() -> None:
    rows = [{"arm": "ours", "ms": 1.25}, {"arm": "long name", "ms": None}]
    lines = report.table(rows, {"arm": "s", "ms": ".1f"}).splitlines()
    assert lines == ["arm         ms", "ours       1.2", "long name    -"]


def test_bars_leave_out_rows_without_a_value() -> None:
    rows = [{"case": "x", "arm": "a", "ms": 2.0}, {"case": "x", "arm": "b"}]
    tall = report.bars("t", [*rows, {"case": "x", "arm": "c", "ms": 1.0}], "case", "arm", "ms", "ms")
    assert report.bars("t", rows, "case", "arm", "ms", "ms").height < tall.height
    assert report.bars("t", [], "case", "arm", "ms", "ms").width == tall.width


@pytest.mark.parametrize("bench", ALL)
def test_without_a_gpu_only_toys_run(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main([])
    assert "--tiny" in capsys.readouterr().err


def test_work_is_that_of_the_performance_notes() -> None:
    """Section 7 of the notes: TFLOP of a step, ours and published, at 1024 x 1024."""
    batch = networks.Batch(
        img=torch.empty(0),
        txt=torch.empty(0),
        pooled=torch.empty(0),
        ids=torch.empty(4608, 3),
        levels=(15.0,) * 7,
    )

    def work(is_ours: bool, rows: int) -> float:
        return bench_step.tera_flop(networks.FULL, is_ours, dataclasses.replace(batch, levels=(15.0,) * rows))

    assert work(True, 1) == pytest.approx(74.39, rel=0.002)
    assert work(False, 7) == pytest.approx(1071.0, rel=0.002)
    # 490.9 with the pivot's scores shared by all: 14 products; ours computes them again for targets: 19.
    assert work(True, 7) == pytest.approx(490.9 + 5 * 7.436, rel=0.005)


# One step.


def test_step_runs_every_arm_of_every_case(tmp_path: Path) -> None:
    wanted = ["base, 32", "pair, 32"]
    options = ["--tiny", "--repeats", "1", "--cases", *wanted, "--out", str(tmp_path)]
    assert bench_step.main(options) == 0
    rows = results(tmp_path, "step_tiny")["rows"]
    assert list(dict.fromkeys(row["case"] for row in rows)) == [f"{name} px" for name in wanted]
    assert [row["arm"] for row in rows if row["verdict"] != "ok"] == []
    assert all(row["ms"] > 0 for row in rows)
    assert all(0 < row["error"] < (0.2 if "fp8" in row["arm"] else 0.05) for row in rows)
    for case, kind in (("pair, 32 px", "published"), ("base, 32 px", "diffusers")):
        found = [row["arm"] for row in rows if row["case"] == case]
        ours = [name for name, way in arms.OURS.items() if kind == "published" or way.base is not None]
        assert found == [*ours, *((f"{kind}, compiled", f"{kind}, eager") if HAS_RIVALS else ())]


def test_step_stops_when_time_is_up(tmp_path: Path) -> None:
    assert bench_step.main(["--tiny", "--seconds", "0", "--out", str(tmp_path)]) == 1
    assert list(tmp_path.iterdir()) == []


def test_cases_and_shapes_come_in_the_order_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    found = [case.name for case in bench_step.cases(TINY, CPU, ["one row, 32", "pair"])]
    assert found == ["one row, 32 px", "pair, 64 px", "pair, 32 px"]
    known = {shape.name: shape for shape in ATTENTION}
    assert [shape.name for shape in report.pick(known, ["grounded-6-4608", "plain-1"])] == [
        "grounded-6-4608", "plain-1-1536", "plain-1-4608",
    ]  # fmt: skip
    for bench, options in ((bench_step, ["--cases", "seven"]), (bench_attention, ["--shapes", "seven"])):
        with pytest.raises(SystemExit):
            bench.main(["--tiny", *options])
        assert "'seven'" in capsys.readouterr().err


def test_the_reference_is_the_float32_network_on_the_same_weights() -> None:
    mmdit = networks.build_mmdit(TINY, CPU)
    before = {name: parameter.clone() for name, parameter in mmdit.named_parameters()}
    wide, batch = networks.widened(mmdit), networks.draw_batch(TINY, 32, bench_step.LEVELS["pair"], CPU)
    assert wide.dtype == torch.float32 and wide.doubles[0].img_attn.qkv.weight.dtype == torch.bfloat16
    velocity = networks.our_step(wide, batch, "reference")()
    assert torch.equal(velocity, networks.our_step(copy.deepcopy(mmdit).float(), batch, "reference")())
    assert all(torch.equal(p, before[name]) for name, p in mmdit.named_parameters())
    shared = wide.singles[0].linear2.weight.data_ptr()
    assert shared == mmdit.singles[0].linear2.weight.data_ptr()


def test_folding_leaves_the_others_weights_alone() -> None:
    mmdit = networks.build_mmdit(TINY, CPU)
    before = {name: parameter.clone() for name, parameter in mmdit.named_parameters()}
    folded = networks.folded(mmdit)
    assert all(torch.equal(p, before[name]) for name, p in mmdit.named_parameters())
    assert not torch.equal(folded.singles[0].linear1.weight, mmdit.singles[0].linear1.weight)
    assert mmdit.bokeh is not None and mmdit.bokeh.folded_at is None


def test_weights_that_measure_nothing_are_refused() -> None:
    mmdit = networks.build_mmdit(TINY, CPU).float()
    mmdit.final_layer.linear.weight.data.fill_(float("inf"))
    batch = networks.draw_batch(TINY, 32, None, CPU)
    with pytest.raises(FloatingPointError):
        networks.exact(mmdit, batch)


def test_exact_pairs_are_the_whole_batch() -> None:
    mmdit = networks.build_mmdit(TINY, CPU).float()
    batch = networks.draw_batch(TINY, 32, bench_step.LEVELS["pivot + 6"], CPU)
    whole = networks.our_step(mmdit, batch, "reference")()
    assert networks.checked_rows(batch) == [0, 1, 6]
    torch.testing.assert_close(networks.exact(mmdit, batch), whole[[0, 1, 6]], atol=1e-4, rtol=1e-4)
    assert (whole[1] - whole[6]).norm() > 1e-2 * whole[1].norm(), "levels show, so rows that swap would too"


def test_wrong_and_failing_arms_are_not_timed() -> None:
    mmdit = networks.build_mmdit(TINY, CPU)
    case = bench_step.Case(name="pair", batch=networks.draw_batch(TINY, 32, bench_step.LEVELS["pair"], CPU))
    exact = networks.exact(networks.widened(mmdit), case.batch)
    right = networks.our_step(mmdit, case.batch)
    timed: list[str] = []

    def arm(name: str, change: Callable[[Tensor], Tensor], **more: Any) -> arms.Arm:
        def run() -> Tensor:
            timed.append(name)
            return change(right())

        return arms.Arm(name=name, network=mmdit, prepare=lambda _: run, weight_bytes=0, **more)

    def broken(_: Tensor) -> Tensor:
        raise RuntimeError("no kernel\nlong story")

    some = [
        arm("stock", lambda x: x, is_ours=False),
        arm("right", lambda x: x),
        arm("swapped", lambda x: x.flip(0)),
        arm("coarse", lambda x: 1.05 * x),
        arm("coarse, allowed", lambda x: 1.05 * x, max_error_ratio=30.0),
        arm("nan", lambda x: x * float("nan")),
        arm("broken", broken),
    ]
    rows = bench_step.measure(TINY, case, some, exact, 1, FOREVER)
    verdicts = {row["arm"]: row["verdict"] for row in rows}
    assert verdicts.pop("broken") == "failed: RuntimeError: no kernel"
    assert {name: verdict.split(":")[0] for name, verdict in verdicts.items()} == {
        "stock": "ok", "right": "ok", "swapped": "wrong", "coarse": "wrong", "coarse, allowed": "ok",
        "nan": "wrong",
    }  # fmt: skip
    assert [row["arm"] for row in rows if "ms" in row] == ["stock", "right", "coarse, allowed"]
    assert [timed.count(name) for name in ("swapped", "nan", "broken")] == [1, 1, 1]


def test_a_wrong_yardstick_lets_nothing_wrong_through() -> None:
    assert bench_step.limit_of({"stock": 0.01}, ["stock"]) == pytest.approx(0.02)
    assert bench_step.limit_of({"stock": 1.0}, ["stock"]) == bench_step.SANE_ERROR
    assert not 0.0 <= bench_step.limit_of({"stock": "failed"}, ["stock"])


# The whole job.


def test_generate_runs_and_adds_up(tmp_path: Path) -> None:
    assert bench_generate.main(["--tiny", "--sides", "32", "--out", str(tmp_path)]) == 0
    rows = results(tmp_path, "generate_tiny")["rows"]
    assert [row["verdict"] for row in rows] == ["ok"] * (
        sum(not way.graph for way in arms.OURS.values()) + 2 * HAS_RIVALS
    )
    for row in rows:
        assert row["total_s"] >= row["text_s"] + row["denoise_s"] + row["decode_s"] > 0


def test_both_ways_make_pictures_and_tell_their_phases() -> None:
    pipeline = networks.build_pipeline(TINY, CPU)
    job = bench_generate.Job(side_px=32, num_steps=3, num_grounded=2)
    clock = bench_generate.Clock(device=CPU)
    with torch.inference_mode():
        found = bench_generate.run_ours(pipeline, pipeline.mmdit, job, clock)
    assert [image.shape for image in found] == [(32, 32, 3)] * 6 and len({i.tobytes() for i in found}) > 1
    assert set(clock.seconds) == set(bench_generate.PHASES) and pipeline.memory.mode == "resident"


def test_a_published_job_counts_for_all_its_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []

    def run(_: Any, __: Any, job: bench_generate.Job, clock: bench_generate.Clock) -> list[Any]:
        ran.append(job.num_steps)
        for phase in bench_generate.PHASES:
            clock.seconds[phase] = clock.seconds.get(phase, 0.0) + 2.0
        time.sleep(0.05)
        return []

    monkeypatch.setattr(bench_generate, "run_ours", run)
    monkeypatch.setattr(bench_generate, "run_published", run)
    batch = networks.draw_batch(TINY, 32, bench_step.LEVELS["pair"], CPU)
    exact = torch.ones(2, 4, 64)
    some = [
        arms.Arm(
            name=name, network=nn.Identity(), prepare=lambda _: lambda: exact * 1.001, weight_bytes=0,
            is_ours=name == "ours",
        )
        for name in ("ours", "published")
    ]  # fmt: skip
    job = bench_generate.Job(side_px=32, num_steps=30, num_grounded=24)
    pipeline: Any = None
    *_, rows = bench_generate.measure(pipeline, job, some, batch, exact, 2, FOREVER)
    assert ran == [2, 30, 30, 2, 30], "a warm-up each, then two of six and ours, comparison first"
    published, ours = rows
    assert (published["denoise_s"], ours["denoise_s"], published["measured_runs"]) == (12.0, 2.0, 2)
    assert ours["speedup"] == pytest.approx(6.0, rel=0.3) and published["speedup"] == 1.0


# Memory.


@pytest.mark.parametrize("storage", bench_memory.STORAGES)
def test_memory_modes_make_the_same_bits(storage: str) -> None:
    rows: list[report.Row] = []
    for mode in bench_memory.MODES:
        bench_memory.measure(
            TINY, mode, storage, CPU, cap_gb=None, num_steps=2, emit=rows.append, budget=FOREVER
        )
    compared = bench_memory.compared(rows)
    assert [row["job"] for row in compared[:4]] == [f"{n} at {side} px" for n in (6, 1) for side in (64, 32)]
    assert {row["same_bits"] for row in compared} == {"yes"}
    assert len({row["crc"] for row in compared}) == 4, "and each job its own"
    other = [*rows[:4], {**rows[4], "crc": 0}]
    assert bench_memory.compared(other)[4]["same_bits"] == "NO"


def test_fp8_storage_is_used_and_smaller() -> None:
    pipeline = bench_memory.build(TINY, "resident", "fp8", CPU)
    assert pipeline.mmdit.doubles[0].img_attn.qkv.weight.dtype == torch.float8_e4m3fn
    assert pipeline.dtype == torch.bfloat16
    assert networks.num_bytes(pipeline.mmdit) < 0.7 * networks.num_bytes(networks.build_mmdit(TINY, CPU))


@pytest.mark.parametrize(
    ("failures", "verdict"),
    [
        (0, "ok"),
        (1, "ok, 3 rows at a time"),
        (2, "ok, row by row"),
        (3, "over the cap, measured without"),
        (4, "MemoryError: too small"),
    ],
)
def test_a_job_over_the_cap_is_tried_leaner(
    monkeypatch: pytest.MonkeyPatch, failures: int, verdict: str
) -> None:
    tried: list[tuple[float | None, int | None]] = []
    caps: list[float | None] = []

    @contextlib.contextmanager
    def capped(device: torch.device, cap_gb: float | None) -> Iterator[None]:
        caps.append(cap_gb)
        yield

    def run_job(_: Any, side: int, targets: int, steps: int, max_rows: int | None = None) -> report.Row:
        if not caps:
            return {}  # the warm-up
        tried.append((caps[-1], max_rows))
        if len(tried) % (failures + 1) or failures == 4:
            raise MemoryError("too small")
        return {"step_ms": 1.0}

    monkeypatch.setattr(bench_memory, "run_job", run_job)
    monkeypatch.setattr(bench_memory, "capped", capped)
    rows: list[report.Row] = []
    setting = dataclasses.replace(TINY, sides_px=(32,))
    options = {"cap_gb": 2.0, "num_steps": 2, "emit": rows.append, "budget": FOREVER}
    bench_memory.measure(setting, "resident", "bf16", CPU, **options)
    assert [row["verdict"] for row in rows] == [verdict] * 2
    ways = [(2.0, None), (2.0, 3), (2.0, 1), (None, None)]
    assert tried == ways[: failures + 1] * 2


def test_memory_measures_in_a_process_of_its_own(tmp_path: Path) -> None:
    options = ["--tiny", "--steps", "2", "--modes", "resident", "--storages", "bf16", "--out", str(tmp_path)]
    assert bench_memory.main(options) == 0
    rows = results(tmp_path, "memory_tiny")["rows"]
    assert [row["vs_resident"] for row in rows] == [1.0] * 4


def test_rows_survive_a_child_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    script = f"print('{bench_memory.ROW_MARK}' + '{{\"verdict\": \"ok\"}}'); raise SystemExit(3)"
    run = bench_memory.subprocess.run
    monkeypatch.setattr(
        bench_memory.subprocess, "run", lambda _, **options: run([sys.executable, "-c", script], **options)
    )
    rows = bench_memory.in_child("stream", "bf16", [], report.Budget(60))
    assert [row["verdict"] for row in rows] == ["ok", "exit status 3"]


# Training attention.


def test_train_attention_runs(tmp_path: Path) -> None:
    options = ["--tiny", "--repeats", "1", "--backends", "sdpa", "reference", "--out", str(tmp_path)]
    assert bench_train_attention.main(options) == 0
    rows = results(tmp_path, "train_attention_tiny")["rows"]
    assert {row["shape"] for row in rows} == {"plain-1-40", "grounded-1-40", "grounded-2-40"}
    assert {row["verdict"] for row in rows} == {"ok"}
    assert all(row["ms"] > 0 and row["error"] < 2e-3 for row in rows)


def test_a_wrong_gradient_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    true = bench_train_attention.by_name

    def without_k(shape: AttentionShape, backend: str) -> Any:
        attend = true(shape, backend)
        return lambda q, k, v: attend(q, k.detach() + 1e-6 * k, v)

    monkeypatch.setattr(bench_train_attention, "by_name", without_k)
    shape = AttentionShape(form="grounded", num_targets=1, length=20, num_heads=2, head_dim=16)
    rows = bench_train_attention.measure(shape, ["sdpa"], CPU, torch.float32, 1.0, 1, FOREVER)
    assert [row["verdict"].split(":")[0] for row in rows] == ["ok", "wrong"]
    assert "ms" not in rows[1]


# The profile.


def op(name: str, number: int, ts: float, dur: float, dims: Any = (), types: Any = ()) -> dict[str, Any]:
    args = {"External id": number, "Input Dims": list(dims), "Input type": list(types)}
    return {"cat": "cpu_op", "name": name, "ts": ts, "dur": dur, "tid": 1, "args": args}


def kernel(name: str, number: int, dur: float) -> dict[str, Any]:
    return {"cat": "kernel", "name": name, "ts": 0, "dur": dur, "args": {"External id": number}}


def test_profile_gives_kernels_the_work_of_their_operators() -> None:
    half = "c10::BFloat16"
    events = [
        op("aten::addmm", 1, 0, 9, [[30], [10, 20], [20, 30], [], []]),
        op("aten::mm", 2, 10, 9, [[10, 20], [20, 30]]),
        op("triton_poi_fused", 3, 20, 9, [[100, 5], [100, 5], []], [half, "float", "Scalar"]),
        {"cat": "gpu_user_annotation", "name": "whole step", "ts": 0, "dur": 1e6, "args": {}},
        kernel("gemm", 1, 10.0), kernel("splitK", 1, 2.0), kernel("gemm", 2, 10.0),
        kernel("triton_poi_fused", 3, 4.0), kernel("flash_fwd", 7, 24.0), {"name": "no category"},
        op("bokehflux::add_gated_modulate", 4, 30, 9, [[2, 8, 4], [2, 8, 4], [1, 1, 4]], [half] * 3),
        kernel("residual_norm", 4, 1.0),
    ]  # fmt: skip
    rows = {row["kernel"]: row for row in profile_step.rows_of(profile_step.totals(events), 24e6)}
    assert list(rows) == [
        "flash_fwd", "gemm", "triton_poi_fused", "splitK", "residual_norm",
    ], "longest first"  # fmt: skip
    assert rows["gemm"]["calls"] == 2 and rows["gemm"]["share"] == pytest.approx(20 / 51)
    assert rows["gemm"]["tflops"] == pytest.approx(2 * 2 * 10 * 20 * 30 / 20e-6 / 1e12)
    assert rows["splitK"]["tflops"] is None and rows["splitK"]["tb_s"] is None
    assert rows["flash_fwd"]["tflops"] == pytest.approx(1.0)
    assert rows["triton_poi_fused"]["tb_s"] == pytest.approx(500 * (2 + 4) / 4e-6 / 1e12)
    moved = 2 * (2 * 64 + 4) + 2 * 2 * 64
    assert rows["residual_norm"]["tb_s"] == pytest.approx(moved / 1e-6 / 1e12)
    assert rows["residual_norm"]["tflops"] is None, "no attention"
    two = {row["kernel"]: row for row in profile_step.rows_of(profile_step.totals(events), 12e6, steps=2)}
    same = ("share", "tflops", "tb_s")
    assert all(two[name][key] == rows[name][key] for name in rows for key in same)
    assert (two["gemm"]["calls"], two["gemm"]["ms"]) == (1, 0.01)


@pytest.mark.parametrize("form", [tiles.PLAIN, tiles.TARGET, tiles.PAIR])
@pytest.mark.parametrize("dim", [64, 128])
def test_the_tables_tiles_are_among_those_that_are_swept(form: str, dim: int) -> None:
    hopper = tiles.Device(family=tiles.HOPPER, num_sms=132)
    swept = list(sweep_tiles.candidates(hopper, form, dim))
    assert len({sweep_tiles.describe(tile) for tile in swept}) == len(swept)
    for fixed in (True, False):
        assert tiles.forward_tile(hopper, [form], dim, fixed, tiles.GLUON) in swept


def test_profile_labels_show_both_ends() -> None:
    assert profile_step.label_of("residual_norm") == "residual_norm"
    label = profile_step.label_of("nvjet_sm90_tst_192x192_64x4_2x1_v_bz_coopB_gelubias_TNN")
    assert label.startswith("nvjet") and label.endswith("gelubias_TNN") and len(label) <= 26


def test_profile_without_gpu_counts_each_operators_own_time() -> None:
    events = [op("outer", 1, 0, 10), op("inner", 2, 1, 4), op("innermost", 3, 2, 1), op("next", 4, 10, 5)]
    found = profile_step.totals(events)
    assert {name: total.us for name, total in found.items()} == {
        "outer": 6, "next": 5, "inner": 3, "innermost": 1,
    }  # fmt: skip


def test_profile_runs(tmp_path: Path) -> None:
    options = ["--tiny", "--case", "pair, 32", "--arm", "ours", "--out", str(tmp_path)]
    assert profile_step.main(options) == 0
    found = results(tmp_path, "profile_step_tiny")
    assert (found["case"], found["arm"]) == ("pair, 32 px", "ours")
    assert sum(row["share"] for row in found["rows"]) == pytest.approx(1)
    assert any(row["kernel"] == "aten::addmm" and row["tflops"] for row in found["rows"])


def test_profile_names_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        profile_step.main(["--tiny", "--case", "seven"])
    assert "pivot + 6" in capsys.readouterr().err


# Attention.


def test_attention_runs_and_knows_ours(tmp_path: Path) -> None:
    options = ["--tiny", "--shapes", "grounded-1", "plain", "--arms", "sdpa", "--out", str(tmp_path)]
    assert bench_attention.main(options) == 1, "without an arm of ours nothing has been shown"
    rows = results(tmp_path, "attention_tiny")["rows"]
    assert [(row["shape"], row["arm"]) for row in rows] == [
        ("grounded-1-40", "sdpa, two calls merged"), ("grounded-1-40", "published, sdpa"),
        ("plain-1-40", "sdpa"),
    ]  # fmt: skip
    assert {row["verdict"] for row in rows} == {"ok"} and not any(row["ours"] for row in rows)
    names = {arm.name: arm.is_ours for arm in bench_attention.backend_arms(TOYS[-1])}
    assert names["triton"] and names["triton, running maximum"] and not names["sdpa, two calls merged"]


def test_wrong_and_failing_attention_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = bench_attention.stock_kernels

    def with_others(shape: AttentionShape, device: torch.device) -> list[Any]:
        def broken(*_: Tensor) -> Tensor:
            raise NotImplementedError("no such head dim")

        (name, right), *_ = stock(shape, device)
        return [(name, right), ("swapped", lambda q, k, v: right(k, q, v)), ("broken", broken)]

    monkeypatch.setattr(bench_attention, "stock_kernels", with_others)
    shape = AttentionShape(form="plain", num_targets=1, length=40, num_heads=2, head_dim=16)
    wanted = ("sdpa", "swapped", "broken")
    rows = bench_attention.measure(shape, CPU, torch.float32, 1.0, 1, wanted)
    assert [row["verdict"].split(":")[0] for row in rows] == ["ok", "wrong", "failed"]
    assert [row["arm"] for row in rows if "ms" in row] == ["sdpa"]


# A session on a GPU.


def job(code: str, limit_s: float = 60.0) -> gpu_session.Job:
    return gpu_session.Job(arguments=("-c", code, "{out}"), limit_s=limit_s)


def test_a_session_runs_jobs_in_turn_and_packs_what_they_leave(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write = "import sys, pathlib; p = pathlib.Path(sys.argv[1]); p.mkdir(exist_ok=True); "
    write += "(p / 'a.json').write_text('{}'); print('wrote', *sys.argv[2:])"
    sleep = "import subprocess, sys, time; print('begun', flush=True); time.sleep(60)"
    monkeypatch.setattr(gpu_session, "RESERVE_SECONDS", 0.0)
    monkeypatch.setattr(gpu_session, "SHORTEST_SECONDS", 0.1)
    jobs = {"write": job(write), "fail": job("raise SystemExit('\\n'.join(map(str, range(99))))")}
    monkeypatch.setattr(gpu_session, "JOBS", {**jobs, "sleep": job(sleep, 2.0)})
    wanted = ["write", "fail", "sleep", "write --again 'twice over'"]
    assert gpu_session.main(["--out", str(tmp_path), "--seconds", "50", "--jobs", *wanted]) == 1
    printed = capsys.readouterr().out
    ends = printed[printed.index("== jobs") :].splitlines()[1:]
    assert [line.split(",")[0] for line in ends] == [
        "write: ok", "fail: EXIT STATUS 1", "sleep: ENDED AT ITS LIMIT", "write: ok",
    ]  # fmt: skip
    assert "\n98\n" in printed, "the end of a failed job's log"
    assert "wrote --again twice over" in printed
    with tarfile.open(tmp_path / "session.tar.gz") as archive:
        names = {"logs/write.log", "logs/write-2.log", "logs/fail.log", "logs/sleep.log", "results/a.json"}
        assert set(archive.getnames()) == names
    assert list(tmp_path.iterdir()) == [tmp_path / "session.tar.gz"]


def test_a_session_begins_nothing_it_has_no_time_for(tmp_path: Path) -> None:
    outcome = gpu_session.run("step", [], tmp_path, report.Budget(20))
    assert outcome.line() == "step: not begun, 0 s" and list(tmp_path.iterdir()) == []
    with pytest.raises(SystemExit):
        gpu_session.main(["--out", str(tmp_path), "--jobs", "stepp"])


@pytest.mark.parametrize(
    ("own", "given", "together"),
    [
        ("--repeats 9 --cases a b --quiet", "", "--repeats 9 --cases a b --quiet"),
        ("--repeats 9 --cases a b --quiet", "--cases c", "--repeats 9 --quiet --cases c"),
        ("--repeats 9 --cases a b", "--repeats=3 --cases -1 d", "--repeats=3 --cases -1 d"),
        ("--shift -1 --repeats 9", "--shift 2", "--repeats 9 --shift 2"),
        ("--repeats 9 --repeat-all", "--repeats 1", "--repeat-all --repeats 1"),
        ("--out {out}", "--arms x --arms y", "--out {out} --arms x --arms y"),
        ("folder -m gpu -n 8", "-n 2 -k 'a or b'", "folder -m gpu -n 2 -k 'a or b'"),
    ],
)
def test_an_option_given_to_a_job_replaces_its_own(own: str, given: str, together: str) -> None:
    program = ["-m", "benchmarks.x"]
    found = gpu_session.with_options([*program, *shlex.split(own)], shlex.split(given))
    assert found == [*program, *shlex.split(together)]


def test_a_session_records_the_command_as_it_was_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_session, "SHORTEST_SECONDS", 0.1)
    show = gpu_session.Job(
        arguments=("-c", "import sys; print(*sys.argv[1:])", "--repeats", "20", "--seconds", "{seconds}"),
        limit_s=40,
    )
    monkeypatch.setattr(gpu_session, "JOBS", {"show": show})
    outcome = gpu_session.run("show", ["--repeats", "12"], tmp_path, report.Budget(100))
    assert outcome.log is not None and outcome.log.read_text() == "--seconds 30 --repeats 12\n"


def test_a_sessions_options_are_their_programs() -> None:
    """A misspelt option would be found out on a rented machine."""
    programs = {"attention", "step", "profile", "profile_base", "generate", "generate_512", "memory"}
    for name in programs | {"train_attention", "tiles"}:
        arguments = [a.replace("{seconds}", "0") for a in gpu_session.JOBS[name].arguments]
        program = importlib.import_module(arguments[1])
        with pytest.raises(SystemExit) as stopped:
            program.main([*arguments[2:], "--help"])
        assert stopped.value.code == 0, name


def test_the_digest_fits_where_it_is_read(tmp_path: Path) -> None:
    log = tmp_path / "long.log"
    log.write_text("x" * 5000 + "\nlast line\n")
    outcomes = [gpu_session.Outcome(name=f"job {i}", status=0, seconds=1.0, log=log) for i in range(9)]
    text = gpu_session.digest(outcomes, tmp_path, 4000)
    assert len(text) <= 4000 and text.count("last line") == 9 and text.endswith("job 8: ok, 1 s")


# The goals' table.


def write_results(folder: Path, name: str, rows: list[report.Row]) -> None:
    environment = {
        "device": "a GPU", "torch": "2", "triton": "3", "commit": "c" * 40,
        "command": f"python -m benchmarks.{name} --out /tmp/x --repeats 3",
    }  # fmt: skip
    (folder / f"{name}.json").write_text(json.dumps({"environment": environment, "rows": rows}))


def test_figures_come_from_the_files(tmp_path: Path) -> None:
    def arm(name: str, ms: float, verdict: str = "ok", **more: Any) -> report.Row:
        return {"arm": name, "ms": ms, "verdict": verdict, "error": 0.01, **more}

    case, small = {"case": "pair, 1024 px"}, {"case": "base, 512 px"}
    step = [
        arm("ours, compiled", 200.0, **case), arm("ours, eager", 250.0, **case) | {"error": 0.012},
        arm("published, compiled", 260.0, **case), arm("published, eager", 440.0, **case),
        arm("ours, wrong", 1.0, "wrong: 1", **case), arm("ours, fp8", 2.0, **case) | {"error": 0.2},
        arm("ours, compiled", 30.0, **small), arm("diffusers, compiled", 40.0, **small),
    ]  # fmt: skip
    write_results(tmp_path, "step", step)
    total = [{"arm": "ours, fp8", "total_s": 10.0}, {"arm": "published, eager", "total_s": 50.0}]
    write_results(tmp_path, "generate-512", [row | {"side": "512 px", "verdict": "ok"} for row in total])
    kernels = [arm("triton", 2.0, ours=True), arm("cuDNN", 1.9, ours=False), arm("FA3", 1.0, ours=False)]
    write_results(tmp_path, "attention", [row | {"shape": "plain-1-1536"} for row in kernels])
    stream = {"mode": "stream", "storage": "bf16", "job": "6 at 1024 px", "vs_resident": 1.1}
    over = stream | {"job": "1 at 512 px", "vs_resident": 4.0, "verdict": "over the cap, measured without"}
    write_results(tmp_path, "memory", [stream | {"verdict": "ok", "gpu_gb": 2.0}, over | {"gpu_gb": 3.4}])

    found = {(f.what, f.against): (round(f.value, 3), f.reached) for f in summary.findings(tmp_path)}
    assert found == {
        ("plain attention, S 1536", "cuDNN"): (0.95, "NO"),
        ("plain attention, S 1536", "FA3"): (0.5, "NO"),
        ("step 512², one row", "diffusers, compiled"): (1.333, "aim"),
        ("grounded pair 1024²", "published, eager"): (2.2, "aim"),
        ("grounded pair 1024²", "published, compiled"): (1.3, "NO"),
        ("six targets, 30 steps, 512², fp8", "published, eager"): (5.0, "yes"),
        ("peak GPU memory, streamed", ""): (3.4, "NO"),
        ("time of a streamed step", ""): (1.1, "yes"),
        ("error of each bf16 arm against fp32", "published, eager"): (1.2, "NO"),
    }
    text = summary.markdown(summary.findings(tmp_path))
    assert (
        "| grounded pair 1024² | published, compiled | 1.35x | 1.50x | 1.30x | NO | ours, compiled: 200"
        in text
    )
    assert (
        "`python -m benchmarks.step --repeats 3` on a GPU, torch 2, triton 3, commit `cccccccccccc`" in text
    )


def test_documents_change_between_the_markers_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    document = tmp_path / "README.md"
    monkeypatch.setattr(summary, "DOCUMENTS", (document,))
    before = f"head\n\n{summary.BEGIN}\nold\n{summary.END}\n\ntail\n"
    document.write_text(before)
    assert summary.main(["--results", str(tmp_path), "--write"]) == 0
    assert document.read_text() == before and "no figures yet" in capsys.readouterr().out
    rows = [{"case": "base, 1024 px", "arm": "ours, eager", "ms": 1.0, "share": 0.9, "tflops": 650.0}]
    write_results(tmp_path, "step", rows)
    for _ in range(2):
        assert summary.main(["--results", str(tmp_path), "--write"]) == 0
    after = document.read_text()
    assert after.startswith(f"head\n\n{summary.BEGIN}\n| what |") and after.endswith(
        f"{summary.END}\n\ntail\n"
    )
    assert "| 90% | yes |" in after and "old" not in after

    memory = {"job": "1 at 512 px", "mode": "stream", "storage": "bf16", "gpu_gb": 2.04, "step_ms": 99.6}
    over = memory | {"cap_gb": 2.0, "verdict": "over the cap, measured without"}
    failed = memory | {"gpu_gb": None, "verdict": "out of memory"}
    write_results(tmp_path, "memory", [memory | {"verdict": "ok"}, over, failed])
    document.write_text(after + "\n".join(summary.MEMORY))
    assert summary.main(["--results", str(tmp_path), "--write"]) == 0
    text = document.read_text()
    assert text.count("| 1 at 512 px | stream | bf16 |  | 2.0 GB |  | 100 ms |  |") == 1
    assert text.count("| stream | bf16 | 2.0 GB | 2.0 GB |  | 100 ms | over the cap, measured without |") == 1
    assert text.count("| 1 at 512 px | stream |") == 2
    document.write_text("no markers")
    with pytest.raises(ValueError, match="README.md"):
        summary.write(document, "text")


def test_the_documents_have_their_markers() -> None:
    root = Path(__file__).parents[2]
    for document in summary.DOCUMENTS:
        text = (root / document).read_text(encoding="utf-8")
        assert text.count(summary.BEGIN) == text.count(summary.END) == 1, document
