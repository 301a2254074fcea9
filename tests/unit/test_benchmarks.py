"""The benchmarks on toys: wrong arms are not timed, arms take turns, all run whole, goals are rendered."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.autograd import DeviceType

from benchmarks import networks, registry, summary, timing
from benchmarks import run as runner
from benchmarks.arms import OURS
from benchmarks.cases import (
    attention,
    generate,
    memory,
    profile_step,
    step,
    tiles,
    train_attention,
    train_step,
)
from benchmarks.networks import TINY
from benchmarks.shapes import AttentionShape
from benchmarks.timing import Arm, Budget, Row, Rules
from bokehflux.kernels.attention import tiles as tile_table
from bokehflux.sampling.latents import LatentGrid

CPU = torch.device("cpu")
HAS_RIVALS = importlib.util.find_spec("diffusers") is not None
FOREVER = Budget(1e6)


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


# The harness.


def arms(timed: list[str]) -> list[Arm]:
    """Arms that compute a number, whose error is its distance from 1, and note that they were called."""

    def arm(name: str, value: float, **more: Any) -> Arm:
        def call(_: int) -> float:
            timed.append(name)
            if value < 0:
                raise RuntimeError("no kernel\nlong story")
            return value

        return Arm(name=name, call=call, error=lambda found: abs(found - 1), **more)

    return [
        arm("stock", 1.01),
        arm("right", 1.015, is_ours=True, tera_flop=2.0),
        arm("coarse", 1.05, is_ours=True),
        arm("coarse, allowed", 1.05, is_ours=True, max_error_ratio=10.0),
        arm("nan", float("nan"), is_ours=True),
        arm("broken", -1.0, is_ours=True),
    ]


@pytest.mark.parametrize("rotated", [True, False])
def test_wrong_and_failing_arms_are_not_timed(rotated: bool) -> None:
    timed: list[str] = []
    asked = session(repeats=2)
    clock = asked.replayed(2) if rotated else asked.sustained()
    rows = timing.race(arms(timed), Rules(error_of=["stock"], speed_of=["stock"]), clock)
    verdicts = {row["arm"]: row["verdict"] for row in rows}
    assert verdicts.pop("broken") == "failed: RuntimeError: no kernel"
    assert {name: verdict.split(":")[0] for name, verdict in verdicts.items()} == {
        "stock": "ok", "right": "ok", "coarse": "wrong", "coarse, allowed": "ok", "nan": "wrong",
    }  # fmt: skip
    assert [row["arm"] for row in rows if "ms" in row] == ["stock", "right", "coarse, allowed"]
    assert [timed.count(name) for name in ("coarse", "nan", "broken")] == [1, 1, 1]
    right = rows[1]
    assert right["tflops"] == pytest.approx(2000 / right["ms"])
    assert right["share"] == pytest.approx(right["tflops"] / right["ceiling_tflops"])
    assert right["speedup"] == pytest.approx(rows[0]["ms"] / right["ms"])


def test_a_wrong_yardstick_lets_nothing_wrong_through() -> None:
    arm = arms([])[1]
    limit = Rules(error_of=["stock", "other"], max_error=0.5).limit
    assert limit(arm, {"stock": 0.02, "other": 0.01}) == pytest.approx(0.02)
    assert limit(arm, {"stock": 1.0}) == 0.5
    assert not 0.0 <= limit(arm, {"stock": "failed"})
    assert Rules(error_of=None, max_error=0.1).limit(arm, {}) == 0.1


def test_without_a_yardstick_nothing_passes_and_the_verdict_says_why() -> None:
    arm = arms([])[1]
    verdict = Rules(error_of=["stock", "other"]).verdict(arm, {"stock": "failed", arm.name: 0.01})
    assert verdict == "not checked: none of stock, other ran" and not runner.passed([{"verdict": verdict}])


def test_arms_take_turns_until_time_is_up() -> None:
    calls: list[str] = []
    measures = {name: lambda name=name: (calls.append(name), len(calls))[1] for name in ("a", "b")}
    found = timing.in_turns(measures, 3, warm_up=1)
    assert calls == ["a", "b"] * 4
    assert [found["a"][key] for key in ("p20", "ms", "p80")] == [3, 5, 7], "the warm-up does not count"
    calls.clear()
    assert timing.in_turns(measures, 5, budget=Budget(0))["b"]["ms"] == 4, "three rounds at the least"
    assert len(calls) == 6


def test_a_turn_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls until the clock has settled; those after that count."""
    times = iter([50.0, 10.0, 30.0, 20.0, *[99.0] * 9])
    monkeypatch.setattr(timing, "milliseconds", lambda call, device: (call(), next(times))[1])
    calls: list[int] = []
    assert timing.sustained_milliseconds(lambda: calls.append(1), torch.device("cuda")) == 20.0
    assert len(calls) == 6, "two halves of three calls of 50 ms"
    assert timing.sustained_milliseconds(lambda: None, CPU) == 99.0


def test_large_products_are_the_ceiling_of_their_own_round() -> None:
    clock = session().sustained()
    rows = timing.race(arms([])[:2], Rules(error_of=["stock"]), clock)
    assert [row["arm"] for row in rows] == ["stock", "right"]
    assert rows[1]["share"] == pytest.approx(rows[1]["tflops"] / rows[1]["ceiling_tflops"])
    assert "ceiling_tflops" not in timing.race(arms([])[:1], Rules(error_of=None), clock)[0]


# The registry and the runner.


def results(folder: Path, name: str) -> list[Row]:
    found = json.loads((folder / f"{name}_tiny.json").read_text())
    assert {"device", "driver", "torch", "triton", "commit", "command"} <= set(found["environment"])
    return found["rows"]


def test_every_module_is_registered_and_described(capsys: pytest.CaptureFixture[str]) -> None:
    modules = {path.stem for path in Path(registry.__file__).with_name("cases").glob("[a-z]*.py")}
    assert modules == set(registry.NAMES)
    assert runner.main(["--list"]) == 0
    listed = capsys.readouterr().out
    for name in registry.NAMES:
        benchmark = registry.find(name)
        assert f"{name}\n" in listed and benchmark.question in listed
        assert registry.pick(benchmark.cases(False), benchmark.usual_cases), "there are usual cases"
        assert len(set(benchmark.cases(True))) == len(benchmark.cases(True)) > 0


def test_names_are_picked_in_the_order_wanted() -> None:
    names = ["pair, 64 px", "pair, 32 px", "one row, 32 px"]
    assert registry.pick(names, ["one", "pair"]) == ["one row, 32 px", "pair, 64 px", "pair, 32 px"]
    assert registry.pick(["ours", "ours, graph"], ["ours$"]) == ["ours"]
    with pytest.raises(ValueError, match="'seven'.*one row"):
        registry.pick(names, ["seven"])


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["stepp", "--tiny"], "'stepp'"),
        (["step"], "--tiny"),
        (["step", "--tiny", "--cases", "seven"], "'seven'"),
        (["step", "--tiny", "--arms", "theirs"], "'theirs'"),
        (["tiles", "--tiny", "--arms", "ours"], "--arms"),
        (["memory", "--tiny", "--repeats", "1"], "at least 2"),
        (["attention", "--tiny", "--backend", "sdpa"], "--backend"),
        (["attention", "step", "--tiny", "--cases", "pair"], "one benchmark at a time"),
        ([], "--list"),
    ],
)
def test_what_cannot_be_done_is_said(
    words: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        runner.main(words)
    assert problem in capsys.readouterr().err


def test_the_last_line_is_one_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["attention", "--cases", "plain", "--arms", "sdpa", "--repeats", "1", "--out", str(tmp_path)]
    assert runner.main([*words, "--tiny"]) == 1, "without an arm of ours nothing has been shown"
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["attention"]
    assert found["passed"] is False and found["file"] == str(tmp_path / "attention_tiny.json")
    assert [row["arm"] for row in found["rows"]] == ["sdpa"]
    with Image.open(tmp_path / "attention_tiny.png") as image:
        assert image.height > 50


def test_several_run_one_after_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each in a process of its own."""
    assert runner.main(["tiles", "pointwise", "--tiny", "--out", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(found) == ["tiles", "pointwise"] and found["tiles"]["passed"]
    assert {row["verdict"] for row in results(tmp_path, "tiles")} == {"ok"}
    assert {row["verdict"] for row in results(tmp_path, "pointwise")} == {"ok"}


@pytest.mark.parametrize("names", [["step"], ["pointwise"], ["tiles", "nano_seconds"]])
def test_nothing_begins_when_time_is_up(
    names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "apart", lambda *_: pytest.fail("a process began"))
    assert runner.main([*names, "--tiny", "--seconds", "0", "--out", str(tmp_path)]) == 1
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out.count("out of time") == len(names)


def test_no_benchmark_writes_over_a_file_of_the_evaluation() -> None:
    """Both write into `benchmarks/results`, and only benchmarks say where they ran as `environment`."""
    folder = Path(__file__).parents[2] / runner.RESULTS
    on_file = [path for name in registry.NAMES if (path := folder / f"{name}.json").is_file()]
    assert on_file and [p.name for p in on_file if "environment" not in json.loads(p.read_text())] == []


def test_commands_in_documents_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as to the session that they ask for, on a machine with a GPU."""
    root = Path(__file__).parents[2]
    documents = [*root.glob("*.md"), *root.glob("docs/*.md"), root / "benchmarks" / "README.md"]
    texts = [str(runner.__doc__), *(path.read_text(encoding="utf-8") for path in documents)]
    commands = {line for text in texts for line in re.findall(r"python -m benchmarks\.run ([^`\n]+)", text)}
    ran: set[str] = set()

    def run(name: str, args: Any, budget: Budget) -> dict[str, Any]:
        runner.session_of(name, registry.find(name), args, budget)
        ran.add(name)
        return {"passed": True}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    monkeypatch.setattr(runner, "run", run)
    monkeypatch.setattr(runner, "apart", lambda call, *arguments: (call(*arguments), ""))
    for command in commands:
        assert runner.main(shlex.split(command, comments=True)) == 0, command
    assert {"attention", "step", "generate", "memory", "nano_seconds", "tiles"} <= ran
    (usual,) = re.findall(r"\$\(or \$\(BENCH\),(\w+)\)", (root / "Makefile").read_text(encoding="utf-8"))
    assert usual in registry.NAMES


def test_what_is_ours_must_be_right() -> None:
    assert runner.passed(
        [{"ours": True, "verdict": "ok, with launches"}, {"ours": False, "verdict": "wrong"}]
    )
    assert not runner.passed([{"ours": True, "verdict": "ok"}, {"ours": True, "verdict": "failed: x"}])
    right, wrong = {"ours": True, "verdict": "ok, with launches"}, {"ours": True, "verdict": "failed: x"}
    assert runner.passed([right, {"ours": False, "verdict": "wrong"}]) and not runner.passed([right, wrong])
    assert runner.passed([{"ms": 1.0}]) and not runner.passed([{"ours": False, "verdict": "ok"}])


def test_table_aligns_and_shows_what_is_unknown() -> None:
    rows = [{"arm": "ours", "total_s": 1.25}, {"arm": "long name", "total_s": None}]
    lines = runner.table(rows, ["arm", "total_s"]).splitlines()
    assert lines == ["arm        total_s", "ours          1.25", "long name        -"]


# Steps.


def test_work_is_what_the_formulas_give() -> None:
    """TFLOP of a step at 1024 x 1024, ours and published."""
    empty, grid = torch.empty(0), LatentGrid(height_px=1024, width_px=1024)
    batch = networks.Batch(
        img=empty, txt=torch.empty(1, 512, 0), pooled=empty, grid=grid, levels=(15.0,) * 7, sigma=1.0
    )

    def work(is_ours: bool, rows: int) -> float:
        some = dataclasses.replace(batch, levels=(15.0,) * rows)
        return sum(networks.tera_flop(networks.FULL.mmdit, some, is_ours))

    assert work(True, 1) == pytest.approx(74.39, rel=0.002)
    assert work(False, 7) == pytest.approx(1071.0, rel=0.002)
    # 490.9 with the pivot's scores shared by all: 14 products; ours computes them again for targets: 19.
    assert work(True, 7) == pytest.approx(490.9 + 5 * 7.436, rel=0.005)


def test_without_rivals_our_best_arm_is_the_yardstick() -> None:
    def arm(name: str) -> Arm:
        return Arm(name=name, call=float, error=float, is_ours="ours" in name)

    ours, errors = [arm("ours"), arm("ours, fp8")], {"ours": 0.01, "ours, fp8": 0.06, "published": 0.04}
    stock = arms([])[0]
    assert Rules.of(ours).limit(stock, errors) == pytest.approx(0.02)
    assert Rules.of([*ours, arm("published")]).limit(stock, errors) == pytest.approx(0.08)


def test_step_runs_every_arm(tmp_path: Path) -> None:
    words = ["step", "--tiny", "--repeats", "1", "--cases", "base, 32", "pair, 32", "--out", str(tmp_path)]
    assert runner.main(words) == 0
    rows = results(tmp_path, "step")
    assert [row["arm"] for row in rows if row["verdict"] != "ok"] == []
    assert all(row["ms"] > 0 for row in rows)
    assert all(0 < row["error"] < (0.2 if "fp8" in row["arm"] else 0.05) for row in rows)
    for case, kind in (("base, 32 px", "diffusers"), ("pair, 32 px", "published")):
        ours = [name for name in OURS if kind == "published" or "unfolded" not in name]
        rivals = [f"{kind}, compiled", f"{kind}, eager"] if HAS_RIVALS else []
        assert [row["arm"] for row in rows if row["case"] == case] == [*ours, *rivals]


def test_the_reference_is_the_float32_network_on_the_same_weights() -> None:
    mmdit = networks.build_mmdit(TINY, CPU)
    before = {name: parameter.clone() for name, parameter in mmdit.named_parameters()}
    wide, batch = networks.widened(mmdit), networks.draw_batch(TINY, 32, step.LEVELS["pair"], CPU)
    assert wide.dtype == torch.float32 and wide.doubles[0].img_attn.qkv.weight.dtype == torch.bfloat16
    velocity = networks.our_step(wide, batch, "reference")()
    assert all(torch.equal(p, before[name]) for name, p in mmdit.named_parameters())
    assert wide.singles[0].linear2.weight.data_ptr() == mmdit.singles[0].linear2.weight.data_ptr()
    assert torch.equal(velocity, networks.our_step(mmdit.float(), batch, "reference")())


def test_folding_leaves_the_others_weights_alone() -> None:
    mmdit = networks.build_mmdit(TINY, CPU)
    before = {name: parameter.clone() for name, parameter in mmdit.named_parameters()}
    folded = networks.folded(mmdit)
    assert all(torch.equal(p, before[name]) for name, p in mmdit.named_parameters())
    assert not torch.equal(folded.singles[0].linear1.weight, mmdit.singles[0].linear1.weight)


def test_weights_that_measure_nothing_are_refused() -> None:
    mmdit = networks.build_mmdit(TINY, CPU).float()
    mmdit.final_layer.linear.weight.data.fill_(float("inf"))
    with pytest.raises(FloatingPointError):
        networks.exact(mmdit, networks.draw_batch(TINY, 32, None, CPU))


def test_exact_pairs_are_the_whole_batch() -> None:
    mmdit = networks.build_mmdit(TINY, CPU).float()
    batch = networks.draw_batch(TINY, 32, step.LEVELS["pivot + 6"], CPU)
    whole = networks.our_step(mmdit, batch, "reference")()
    torch.testing.assert_close(networks.exact(mmdit, batch), whole[[0, 1, 6]], atol=1e-4, rtol=1e-4)
    assert networks.checked_rows(batch) == [0, 1, 6]
    assert (whole[1] - whole[6]).norm() > 1e-2 * whole[1].norm(), "levels show, so rows that swap would too"


# Kernels.


def broken_and_swapped(right: Callable[..., Tensor]) -> list[tuple[str, Callable[..., Tensor]]]:
    def broken(*_: Tensor) -> Tensor:
        raise NotImplementedError("no such head dim")

    return [("sdpa", right), ("swapped", lambda q, k, v: right(k, q, v)), ("broken", broken)]


def session(**changes: Any) -> registry.Session:
    usual: dict[str, Any] = {"device": CPU, "tiny": True, "cases": {}, "arms": ("",), "repeats": 1}
    return registry.Session(**{**usual, "backend": "auto", "budget": FOREVER, **changes})


def test_attention_compares_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(attention, "stock_kernels", lambda shape, device: broken_and_swapped(right))
    shape = AttentionShape(form="plain", num_targets=1, length=40, num_heads=2, head_dim=16)
    wanted = session(arms=("sdpa", "swapped", "broken"))
    rows = attention.measure_shape(wanted, shape)
    assert [row["verdict"].split(":")[0] for row in rows] == ["ok", "wrong", "failed"]
    assert [row["arm"] for row in rows if "ms" in row] == ["sdpa"]


def test_training_compares_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    true = train_attention.by_name

    def without_k(shape: AttentionShape, backend: str) -> Any:
        attend = true(shape, backend)
        if backend == "reference":
            return attend
        return lambda q, k, v: attend(q, k.detach() + 1e-6 * k, v)

    shape = AttentionShape(form="grounded", num_targets=1, length=20, num_heads=2, head_dim=16)
    for by_name, verdict in ((true, "ok"), (without_k, "wrong")):
        monkeypatch.setattr(train_attention, "by_name", by_name)
        rows = train_attention.measure_shape(session(arms=("sdpa",)), shape)
        assert [row["verdict"].split(":")[0] for row in rows] == ["ok", verdict]
        assert ("ms" in rows[1]) == (verdict == "ok")


@pytest.mark.parametrize("name", ["attention", "train_attention", "pointwise", "scatter"])
def test_our_kernels_run(name: str, tmp_path: Path) -> None:
    """In Triton's interpreter."""
    case = {"pointwise": "modulate", "scatter": "level"}.get(name, "plain")
    options = ["--cases", case, "--repeats", "1", "--out", str(tmp_path)]
    assert runner.main([name, "--tiny", *options]) == 0
    assert any(row["ours"] and row["ms"] > 0 for row in results(tmp_path, name))


@pytest.mark.parametrize("form", [tile_table.PLAIN, tile_table.TARGET, tile_table.PAIR])
@pytest.mark.parametrize("dim", [64, 128])
def test_the_tables_tiles_are_among_those_that_are_swept(form: str, dim: int) -> None:
    hopper = tile_table.Device(family=tile_table.HOPPER, num_sms=132)
    swept = list(tiles.candidates(hopper, form, dim))
    assert len({tiles.describe(tile) for tile in swept}) == len(swept)
    for fixed in (True, False):
        assert tile_table.forward_tile(hopper, [form], dim, fixed, tile_table.GLUON) in swept


# Whole jobs.


def test_generate_runs_and_adds_up(tmp_path: Path) -> None:
    assert runner.main(["generate", "--tiny", "--cases", "32", "--out", str(tmp_path)]) == 0
    rows = results(tmp_path, "generate")
    assert [row["verdict"] for row in rows] == ["ok"] * (
        sum("graph" not in name for name in OURS) + len(generate.SHORTCUTS) + 2 * HAS_RIVALS
    )
    shortcuts = {row["arm"]: row["shortcut"] for row in rows if "shortcut" in row}
    assert shortcuts == {name: settings for name, (_, settings) in generate.SHORTCUTS.items()}
    assert all(row["speedup"] > 0 for row in rows) or not HAS_RIVALS
    for row in rows:
        assert row["total_s"] >= row["text_s"] + row["denoise_s"] + row["decode_s"] > 0


def test_a_published_run_counts_for_six(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []

    def run(pipeline: Any, job: Any) -> None:
        ran.append(job.num_inference_steps)
        clock: Any = pipeline.memory
        for phase in generate.PHASES:
            clock.seconds[phase] = clock.seconds.get(phase, 0.0) + 2.0

    rivals = pytest.importorskip("tests.oracle.rivals")
    monkeypatch.setattr(rivals, "published_run", run)
    arm: Any = type("Arm", (), {"name": "published", "is_ours": False, "network": None, "weight_bytes": 0})
    pipeline = networks.build_pipeline(TINY, CPU)
    row = generate.timed(pipeline, generate.job(32, 30), arm, session())
    assert ran == [2, 30], "a short one to warm up, then one of six"
    assert row["denoise_s"] == 12.0


@pytest.mark.parametrize("storage", ["bf16", "fp8"])
def test_memory_modes_make_the_same_bits(storage: str) -> None:
    wanted = session(cases={"6": (6, 32), "1": (1, 32)}, arms=(storage,), repeats=2)
    rows = memory.compared([row for rows in memory.measure(wanted) for row in rows])
    assert {row["mode"] for row in rows} == {"resident", "offload", "stream"}
    assert {row["same_bits"] for row in rows} == {"yes"} and runner.passed(rows)
    assert len({row["crc"] for row in rows}) == 2, "and each job its own"
    rows[0]["crc"] = 0
    assert not runner.passed(memory.compared(rows))


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

    def run_job(_: Any, side: int, targets: int, steps: int, max_rows: int | None = None) -> Row:
        if not caps:
            return {}  # the warm-up
        tried.append((caps[-1], max_rows))
        if len(tried) <= failures:
            raise MemoryError("too small")
        return {"step_ms": 1.0}

    monkeypatch.setattr(memory, "run_job", run_job)
    monkeypatch.setattr(memory, "cap_memory", lambda device, cap_gb: caps.append(cap_gb))
    (row,) = memory.measure_arm(session(cases={"1 at 32 px": (1, 32)}), "resident, fp8", cap_gb=2.0)
    assert row["verdict"] == verdict
    assert tried == [(2.0, None), (2.0, 3), (2.0, 1), (None, None)][: failures + 1]


def dies(session: registry.Session) -> Iterator[list[Row]]:
    if session.wants("stream, bf16"):
        os._exit(3)
    yield [{"arm": arm, "verdict": "ok"} for arm in session.arms]


def test_an_arm_whose_process_dies_leaves_the_others() -> None:
    fails = dataclasses.replace(memory.BENCHMARK, measure=dies)
    (ok,), (failed,) = runner.by_arm(fails, session(arms=("offload, bf16", "stream, bf16")))
    assert ok == {"arm": "offload, bf16$", "verdict": "ok"}
    assert failed["arm"] == "stream, bf16" and failed["verdict"].startswith("failed: BrokenProcessPool")


def test_nano_runs_anywhere(tmp_path: Path) -> None:
    words = ["nano_seconds", "--tiny", "--cases", "one picture", "--out", str(tmp_path)]
    assert runner.main(words) == 0
    (row,) = results(tmp_path, "nano_seconds")
    assert row["a_picture"] == row["seconds"] > 0


# The profile.


def event(name: str, us: float, kind: DeviceType, dims: Any = (), launched: Any = ()) -> SimpleNamespace:
    """As torch.profiler gives them. launched: (kernel, microseconds) of each."""
    return SimpleNamespace(
        name=name, device_type=kind, input_shapes=list(dims), is_user_annotation=False,
        self_cpu_time_total=us, time_range=SimpleNamespace(elapsed_us=lambda: us),
        kernels=[SimpleNamespace(name=kernel, duration=time) for kernel, time in launched],
    )  # fmt: skip


def test_profile_gives_kernels_the_work_of_their_operators() -> None:
    launched = [[("gemm", 10.0), ("splitK", 2.0)], [("gemm", 10.0)], [("norm", 1.0)], [("flash_fwd", 24.0)]]
    dims = [[[30], [10, 20], [20, 30], [], []], [[10, 20], [20, 30]], [[2, 8, 4]], []]
    names = ["aten::addmm", "aten::mm", "bokehflux::modulate", "aten::_flash_attention_forward"]
    whole = event("whole step", 1e6, DeviceType.CUDA)
    whole.is_user_annotation = True
    events: list[Any] = [
        *(event(n, 9, DeviceType.CPU, *of) for n, *of in zip(names, dims, launched, strict=True)),
        *(event(name, us, DeviceType.CUDA) for some in launched for name, us in some),
        whole,
    ]
    rows = {row["kernel"]: row for row in profile_step.table_of(events, 24e6)}
    assert list(rows) == ["flash_fwd", "gemm", "splitK", "norm"], "longest first"
    assert rows["gemm"]["calls"] == 2 and rows["gemm"]["share"] == pytest.approx(20 / 47)
    assert rows["gemm"]["tflops"] == pytest.approx(2 * 2 * 10 * 20 * 30 / 20e-6 / 1e12)
    assert rows["splitK"]["tflops"] is rows["norm"]["tflops"] is None
    assert rows["flash_fwd"]["tflops"] == pytest.approx(1.0)
    two = {row["kernel"]: row for row in profile_step.table_of(events, 12e6, steps=2)}
    assert all(two[name][key] == rows[name][key] for name in rows for key in ("share", "tflops"))
    assert (two["gemm"]["calls"], two["gemm"]["ms"]) == (1, 0.01)


def test_profile_without_gpu_counts_each_operators_own_time() -> None:
    events: list[Any] = [event("outer", 6, DeviceType.CPU), event("next", 2.5, DeviceType.CPU)]
    rows = profile_step.table_of([*events, events[1]], 1.0)
    assert [(row["kernel"], row["calls"], row["ms"]) for row in rows] == [
        ("outer", 1, 0.006),
        ("next", 2, 0.005),
    ]


def test_profile_runs(tmp_path: Path) -> None:
    words = ["profile_step", "--tiny", "--cases", "pair, 32", "--out", str(tmp_path)]
    assert runner.main(words) == 0
    rows = results(tmp_path, "profile_step")
    assert {(row["case"], row["arm"]) for row in rows} == {("pair, 32 px", "ours")}
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert any(row["kernel"] == "aten::addmm" and row["tflops"] for row in rows)
    assert all(len(row["label"]) <= 26 for row in rows)


# Goals.


def write_results(folder: Path, name: str, rows: list[Row]) -> None:
    environment = {
        "device": "a GPU", "torch": "2", "triton": "3", "commit": "c" * 40,
        "command": f"python -m benchmarks.run {name} --out /somewhere --repeats 3",
    }  # fmt: skip
    (folder / f"{name}.json").write_text(json.dumps({"environment": environment, "rows": rows}))


def test_figures_come_from_the_files(tmp_path: Path) -> None:
    def arm(name: str, ms: float, verdict: str = "ok", **more: Any) -> Row:
        return {"arm": name, "ms": ms, "verdict": verdict, "error": 0.01, **more}

    case, small = {"case": "pair, 1024 px"}, {"case": "base, 512 px"}
    steps = [
        arm("ours, compiled", 200.0, **case), arm("ours, eager", 250.0, **case) | {"error": 0.012},
        arm("published, compiled", 260.0, **case), arm("published, eager", 440.0, **case),
        arm("ours, wrong", 1.0, "wrong: 1", **case), arm("ours, fp8", 2.0, **case) | {"error": 0.2},
        arm("ours, compiled", 30.0, **small), arm("diffusers, compiled", 40.0, **small),
    ]  # fmt: skip
    write_results(tmp_path, "step", steps)
    total = [
        {"arm": "ours, fp8", "total_s": 10.0}, {"arm": "published, eager", "total_s": 50.0},
        {"arm": "ours, fp8, reuse 3", "total_s": 5.0, "shortcut": {"reuse": 3}},
    ]  # fmt: skip
    write_results(tmp_path, "generate-512", [row | {"side": "512 px", "verdict": "ok"} for row in total])
    kernels = [arm("triton", 2.0, ours=True), arm("cuDNN", 1.9, ours=False), arm("FA3", 1.0, ours=False)]
    write_results(tmp_path, "attention", [row | {"shape": "plain-1-1536"} for row in kernels])
    stream = {"mode": "stream", "storage": "bf16", "job": "6 at 1024 px", "vs_resident": 1.1}
    over = stream | {"job": "1 at 512 px", "vs_resident": 4.0, "verdict": "over the cap, measured without"}
    write_results(tmp_path, "memory", [stream | {"verdict": "ok", "gpu_gb": 2.0}, over | {"gpu_gb": 3.4}])

    read = summary.Results(tmp_path)
    found = summary.findings(read)
    assert {(f.goal["what"], f.against): (round(f.value, 3), f.reached) for f in found} == {
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
    text = summary.figures(found, read)
    assert (
        "| grounded pair 1024² | published, compiled | at least 1.35x | 1.50x | 1.30x | NO | ours, compiled: "
        "200 against 260 ms |"
    ) in text
    run = "`python -m benchmarks.run step --repeats 3` on a GPU, torch 2, triton 3, commit `cccccccccccc`"
    assert run in text


def test_the_results_on_file_reach_every_document() -> None:
    """Documents hold what `benchmarks.summary --write` would put there."""
    root = Path(__file__).parents[2]
    results = summary.Results(root / runner.RESULTS)
    found = summary.findings(results)
    goals = summary.read_goals()["goals"]
    without = [goal for goal in goals if goal not in [finding.goal for finding in found]]
    assert [goal for goal in without if goal["file"] in results.files] == [], "a goal without a figure"
    assert sum("in_readme" in goal for goal in goals) == 5
    for document, markers, text in (
        ("benchmarks/README.md", summary.FIGURES, summary.figures(found, results)),
        ("README.md", summary.FIGURES, summary.figures(found, results, few=True)),
        ("docs/memory.md", summary.MEMORY, summary.memory(results)),
    ):
        written = (root / document).read_text(encoding="utf-8")
        assert f"{markers[0]}\n{text}\n{markers[1]}" in written, f"{document}: run benchmarks.summary --write"


def test_training_steps_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every arm that a CPU can run, by its gradients; graphs say that they need a GPU."""
    name, case = next(iter(train_step.cases(True).items()))
    arms = ("our blocks", "eager, kept", "compiled, recomputed", "streamed")
    asked = session(cases={name: case}, arms=arms, repeats=2)
    rows = train_step.compared([row for rows in train_step.measure(asked) for row in rows])
    assert [row["verdict"].split(":")[0] for row in rows] == ["ok"] * 3 + ["failed", "ok"]
    assert all(row["speedup"] > 0 for row in rows if "ms" in row) and rows[1]["error"] < 1e-4
    monkeypatch.setitem(train_step.MAX_ERROR, "bf16", 1e-12)
    rows = [
        row
        for rows in train_step.measure(session(cases={name: case}, arms=arms[:2], repeats=2))
        for row in rows
    ]
    assert rows[1]["verdict"].startswith("wrong")
