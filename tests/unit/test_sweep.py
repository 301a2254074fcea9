"""Sweeps: grids, folders, going on where one stopped, interruption, and the files they leave."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from bokehflux.app import cli, sweep
from bokehflux.app.sweep import Sweep, finished, folder_name, grid, read_prompts
from bokehflux.pictures.metadata import encode, read_recipe
from bokehflux.pipeline.pipeline import Pipeline
from bokehflux.pipeline.provenance import provenance_of
from bokehflux.pipeline.run import Options, Result, execute
from bokehflux.record import Provenance, Record
from bokehflux.settings import GenerateSettings
from tests.tiny import tiny_pipeline

PIPE = tiny_pipeline()
HERE = provenance_of(PIPE)
BASE = GenerateSettings(prompt="a cup", bokeh_targets=(0.0, 20.0), bokeh_pivot=10.0, num_inference_steps=2)


def lines(*prompts: str) -> list[dict[str, Any]]:
    return [{"prompt": prompt} for prompt in prompts]


class Serve:
    """Serves requests and keeps them."""

    def __init__(self, before: Callable[[int], None] = lambda _: None) -> None:
        self.served: list[GenerateSettings] = []
        self.before = before

    def __call__(self, settings: GenerateSettings) -> Result:
        self.before(len(self.served))
        self.served.append(settings)
        return PIPE.generate(**settings.recipe())


def sweep_of(
    asked: list[GenerateSettings], output: Path, serve: Serve | None = None, kind: str = "png"
) -> Sweep:
    return Sweep.of(PIPE, asked, output, kind, serve or Serve())


def run(
    asked: list[GenerateSettings], output: Path, serve: Serve | None = None, kind: str = "png", **facts: Any
) -> list[sweep.Done]:
    planned = sweep_of(asked, output, serve, kind)
    here = dataclasses.replace(HERE, **facts)
    scenes = [dataclasses.replace(scene, provenance=here) for scene in planned.scenes]
    return list(dataclasses.replace(planned, scenes=scenes).made())


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_lines_end_where_a_file_says(tmp_path: Path) -> None:
    """Not at the ends of paragraphs that a prompt may hold, nor twice at one of Windows."""
    strange = "a \u2028 cup \x85 on\x0c a table"
    line = json.dumps({"prompt": strange, "size": "64x48"}, ensure_ascii=False)
    (tmp_path / "x").write_bytes(f"a mug\r\n{line}\r{strange}\n{{".encode())
    with pytest.raises(ValueError, match="x, line 4: it begins with"):
        read_prompts(tmp_path / "x")
    (tmp_path / "x").write_bytes(f"a mug\r\n{line}\n{strange}\n".encode())
    asked = read_prompts(tmp_path / "x")
    assert [one["prompt"] for one in asked] == ["a mug", strange, strange]
    assert (asked[1]["width"], asked[1]["height"]) == (64, 48)


SIZES = ("[64.5, 48]", "[true, 48]", '"64"', '"64x48x3"', "64", "[64, 1]", '["64", "48"]')


@pytest.mark.parametrize("size", SIZES)
def test_sizes_of_a_line_are_whole(tmp_path: Path, size: str) -> None:
    (tmp_path / "x").write_text('{"prompt": "a", "size": ' + size + "}")
    with pytest.raises(ValueError, match="x, line 1: "):
        read_prompts(tmp_path / "x")


def test_prompts_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffa cup\n\n# a comment\n  a caf\u00e9 \r\na cup\n", encoding="utf-8")
    assert read_prompts(path) == [{"prompt": "a cup"}, {"prompt": "a caf\u00e9"}]


def test_a_file_with_settings_a_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": "a mug", "levels": [20, 0], "pivot": 9, "seed": 3, "size": "48x32"}\n'
        '{"prompt": "a tree", "guidance_scale": 4, "size": [16, 64]}\na cup\n'
    )
    asked = grid(BASE, read_prompts(path), [1, 2])
    assert [(one.prompt, one.seed) for one in asked] == [
        ("a mug", 3), ("a tree", 1), ("a tree", 2), ("a cup", 1), ("a cup", 2),
    ]  # fmt: skip
    mug, tree = asked[:2]
    assert (mug.bokeh_targets, mug.bokeh_pivot, mug.width, mug.height) == ((0.0, 20.0), 9.0, 48, 32)
    assert (tree.bokeh_targets, tree.guidance_scale, tree.width, tree.height) == ((0.0, 20.0), 4.0, 16, 64)


@pytest.mark.parametrize(("content", "says"), [
    (b'{"prompt": "a"', "line 1: it begins with { but is not JSON"),
    (b'a\n{"prompt": 3}', "line 2: prompt must be"),
    (b'{"prompt": "a", "levels": [31]}', "line 1: a bokeh level must be"),
    (b'{"seed": 1}', "prompt must be text"),
    (b'{"prompt": "a", "steeps": 3}', "unknown settings steeps; expected prompt, bokeh_targets"),
    (b'{"prompt": "a", "size": 3}', '"size" must be'),
    (b"", "has 0 prompts"), (b"# only\n", "has 0 prompts"), (b"\xff\xfe\x00", "not UTF-8"),
    (b"".join(b"%d\n" % i for i in range(10_001)), "has 10001 prompts"),
])  # fmt: skip
def test_prompts_files_that_are_refused(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match=says):
        read_prompts(tmp_path / "x")


def test_a_grid_is_prompts_times_seeds_with_levels_in_order() -> None:
    requests = grid(dataclasses.replace(BASE, bokeh_targets=(20, 0, 20)), lines("a", "b"), [1, 2, 1])
    assert [(r.prompt, r.seed) for r in requests] == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    assert {r.bokeh_targets for r in requests} == {(0.0, 20.0)}
    with pytest.raises(ValueError, match="seed must be at least 0"):
        grid(BASE, lines("a"), [-2])


def test_one_batch_per_scene_and_every_view(tmp_path: Path) -> None:
    serve = Serve()
    done = run(grid(BASE, lines("a cup", "a tree"), [1]), tmp_path, serve)
    assert [r.bokeh_targets for r in serve.served] == [(0.0, 20.0)] * 2
    names = {
        "bokeh-00.0.png",
        "bokeh-20.0.png",
        "pivot-bokeh-10.0.png",
        "sheet.png",
        "sweep.gif",
        "sweep.webp",
    }
    for each in done:
        assert {path.name for path in each.paths} == names == {p.name for p in each.paths[0].parent.iterdir()}
    assert {p.name for p in tmp_path.iterdir() if p.is_file()} == {"index.html", "grid.png"}
    for path in [*done[0].paths, tmp_path / "grid.png"]:
        assert read_recipe(path)["prompt"] == "a cup"
    with Image.open(done[0].paths[4]) as gif, Image.open(done[0].paths[5]) as webp:
        assert gif.n_frames == webp.n_frames == 2
    page = (tmp_path / "index.html").read_text()
    assert page.count('"prompt": "a cup"') == 2 and page.count("data:image/webp") == 6
    (tmp_path / "index.html").unlink()
    sweep_of(grid(BASE, lines("a cup", "a tree"), [1]), tmp_path).write_pages()
    again = (tmp_path / "index.html").read_text()
    assert again.count("data:image/webp") == 6 and again.count('"pivot": {') == 2, "told by the files alone"


def test_a_page_that_would_be_large_shows_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they were made, and after one was lost and the rest found again."""
    monkeypatch.setattr("bokehflux.pictures.page.MAX_EMBEDDED_PIXELS", 0)
    requests = grid(BASE, lines("a cup", "a tree"), [1])
    for _ in range(2):
        done = run(requests, tmp_path)
        text = (tmp_path / "index.html").read_text()
        shown = re.findall(r'"src": "([^"]*)"', text)
        assert len(shown) == 6 and "data:image" not in text
        for source, shot in zip(shown, [s for each in done for s in each.scene.shots], strict=True):
            with Image.open(tmp_path / source) as image:
                assert image.convert("RGB").tobytes() == shot.image.tobytes()
        (tmp_path / shown[1]).unlink()
    assert done[0].num_kept == 2, "the second sweep made the lost one again"


def test_a_finished_sweep_makes_nothing_again(tmp_path: Path) -> None:
    requests = grid(BASE, lines("a cup"), [1, 2])
    run(requests, tmp_path)
    before, serve = files(tmp_path), Serve()
    done = run(requests, tmp_path, serve, torch="3", device="cuda")
    assert serve.served == [] and [each.num_kept for each in done] == [3, 3]
    after = files(tmp_path)
    pictures = [name for name in before if "bokeh-" in name]
    assert before.keys() == after.keys() and all(before[name] == after[name] for name in pictures)


def test_only_what_is_missing_is_made(tmp_path: Path) -> None:
    request = grid(BASE, lines("a cup"), [1])
    (first,) = run(request, tmp_path)
    kept, lost, pivot = first.paths[:3]
    before = kept.read_bytes(), lost.read_bytes(), pivot.read_bytes()
    lost.unlink()
    serve = Serve()
    (done,) = run(request, tmp_path, serve)
    assert [r.bokeh_targets for r in serve.served] == [(20.0,)] and done.num_kept == 2
    assert (kept.read_bytes(), pivot.read_bytes()) == before[::2]
    with Image.open(lost) as again:
        assert again.tobytes() == first.scene.targets[1].image.tobytes()
    assert [shot.level for shot in done.scene.targets] == [0.0, 20.0]


def test_a_further_level_joins_its_scene(tmp_path: Path) -> None:
    run(grid(BASE, lines("a cup"), [1]), tmp_path)
    serve = Serve()
    (done,) = run(
        grid(dataclasses.replace(BASE, bokeh_targets=(0, 5, 20)), lines("a cup"), [1]), tmp_path, serve
    )
    assert [r.bokeh_targets for r in serve.served] == [(5.0,)]
    assert [shot.level for shot in done.scene.targets] == [0.0, 5.0, 20.0]
    assert read_recipe(done.paths[-3])["bokeh_targets"] == [0.0, 5.0, 20.0], "the sheet shows all three"
    assert read_recipe(done.paths[0])["bokeh_targets"] == [5.0], "the picture tells its own batch"


def test_a_lost_pivot_comes_back_alone(tmp_path: Path) -> None:
    request = grid(BASE, lines("a cup"), [1])
    (first,) = run(request, tmp_path)
    before = files(tmp_path)
    first.paths[2].unlink()
    (done,) = run(request, tmp_path)
    assert done.num_kept == 2 and done.paths[0] == first.paths[2]
    assert files(tmp_path).keys() == before.keys()


@pytest.mark.parametrize("damage", ["truncated", "another recipe", "no recipe", "empty"])
def test_what_is_not_whole_or_not_wanted_does_not_count(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    request = grid(BASE, lines("a cup"), [1])
    (first,) = run(request, tmp_path)
    path = first.paths[0]
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[: len(content) * 3 // 4])
    elif damage == "another recipe":
        recipe = {**read_recipe(path), "seed": 2}
        path.write_bytes(encode(first.scene.targets[0].image, recipe))
    elif damage == "no recipe":
        Image.new("RGB", (48, 32)).save(path)
    else:
        path.write_bytes(b"")
    left, serve = path.read_bytes(), Serve()
    (done,) = run(request, tmp_path, serve)
    assert [r.bokeh_targets for r in serve.served] == [(0.0,)]
    assert path.read_bytes() == left, "not ours to overwrite"
    said = f"{path} does not count as finished: "
    assert [said in record.message for record in caplog.records] == [True] * (damage != "another recipe")
    assert done.paths[0].name == "bokeh-00.0-run2.png"
    assert run(request, tmp_path, serve := Serve())[0].num_kept == 3 and serve.served == []


@pytest.mark.parametrize("change", [
    {"seed": 2}, {"prompt": "a Cup"}, {"num_inference_steps": 3}, {"bokeh_pivot": 12.0},
    {"guidance_scale": 4.0}, {"num_grounding_steps": 1}, {"true_cfg": 2.0}, {"negative_prompt": "x"},
    {"height": 48}, {"width": 64},
])  # fmt: skip
def test_whatever_decides_a_picture_has_a_folder_of_its_own(change: dict[str, Any]) -> None:
    def name(settings: GenerateSettings, **facts: Any) -> str:
        here = dataclasses.replace(HERE, **facts)
        return folder_name(Record(settings=settings.completed(PIPE.defaults), provenance=here))

    assert name(BASE) == name(dataclasses.replace(BASE, bokeh_targets=(3,)))
    assert name(BASE) != name(dataclasses.replace(BASE, **change))
    for key in ("model_hash", "adapter_hash", "dtype", "compute"):
        assert name(BASE) != name(BASE, **{key: "other"})
    assert name(BASE) != name(BASE, lora_hashes=[("other", 1)])
    assert name(BASE) == name(BASE, torch="9", device="cuda", version="9")


@pytest.mark.parametrize("prompt", ["../../etc/passwd", "/root", "..", "a\\b:c*", "夜", "x" * 5000, "CON\0"])
def test_no_prompt_leaves_the_output_folder(prompt: str) -> None:
    name = folder_name(Record(settings=dataclasses.replace(BASE, prompt=prompt), provenance=Provenance()))
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") and len(name) < 90
    assert not name.startswith("-")


def test_an_ungrounded_sweep_has_no_pivot(tmp_path: Path) -> None:
    request = grid(dataclasses.replace(BASE, num_grounding_steps=0), lines("a cup"), [1])
    (done,) = run(request, tmp_path)
    assert done.scene.pivot is None and len(done.paths) == 5
    assert run(request, tmp_path, serve := Serve())[0].num_kept == 2 and serve.served == []


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_other_formats_are_found_again(tmp_path: Path, kind: str) -> None:
    request = grid(BASE, lines("a cup"), [1])
    run(request, tmp_path, kind=kind)
    assert run(request, tmp_path, serve := Serve(), kind=kind)[0].num_kept == 3 and serve.served == []


def test_a_sweep_that_is_stopped_has_a_page_of_what_is_finished(tmp_path: Path) -> None:
    def stop(number: int) -> None:
        if number == 2:
            raise KeyboardInterrupt

    requests = grid(BASE, lines("a cup"), [1, 2, 3])
    with pytest.raises(KeyboardInterrupt):
        run(requests, tmp_path, Serve(stop))
    assert (tmp_path / "index.html").read_text().count('"curve": ') == 2
    serve = Serve()
    run(requests, tmp_path, serve)
    assert [r.seed for r in serve.served] == [3]
    assert (tmp_path / "index.html").read_text().count('"curve": ') == 3


def test_the_page_of_another_sweep_stays(tmp_path: Path) -> None:
    one, other = grid(BASE, lines("a cup"), [1]), grid(BASE, lines("a tree"), [1])
    run(one, tmp_path)
    first = (tmp_path / "index.html").read_bytes()
    for _ in range(2):  # the same command finds its own page again
        run(other, tmp_path)
    assert (tmp_path / "index.html").read_bytes() == first
    assert {p.name for p in tmp_path.glob("*.html")} == {"index.html", "index-run2.html"}
    assert sweep_of(other, tmp_path).overviews() == [tmp_path / "index-run2.html"]
    assert '"prompt": "a tree"' in (tmp_path / "index-run2.html").read_text()
    run([*one, *other], tmp_path)  # all that is shown, and more
    assert (tmp_path / "index.html").read_text().count('"curve": ') == 2
    (tmp_path / "index.html").write_text("somebody's own")
    run(one, tmp_path)
    assert (tmp_path / "index.html").read_text() == "somebody's own"
    assert len(list(tmp_path.glob("*.html"))) == 3


def test_many_scenes_get_several_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And only the pictures of one page are in memory."""
    monkeypatch.setattr(sweep, "SCENES_PER_PAGE", 2)
    alive: list[weakref.ref[Any]] = []
    requests = grid(BASE, lines("a cup"), [1, 2, 3, 4, 5])
    for done in sweep_of(requests, tmp_path).made():
        alive.append(weakref.ref(done.scene))
        del done
        assert sum(ref() is not None for ref in alive) <= 2
    pages = sorted(p.name for p in tmp_path.iterdir() if p.is_file())
    assert pages == ["grid-2.png", "grid.png", "index-2.html", "index-3.html", "index.html"]
    assert sorted(p.name for p in sweep_of(requests, tmp_path).overviews()) == pages
    assert len(sweep_of(requests[:4], tmp_path / "full").overviews()) == 4, "two pages and grids, none empty"
    curves = [(tmp_path / name).read_text().count('"curve": ') for name in pages[2:]]
    assert curves == [2, 1, 2]
    served = Serve()
    run(requests, tmp_path, served)
    assert served.served == []


def test_no_page_of_another_sweep_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first page has the same scenes, a later one has others."""
    monkeypatch.setattr(sweep, "SCENES_PER_PAGE", 2)
    run(grid(BASE, lines("a cup"), [1, 2, 3]), tmp_path)
    before = (tmp_path / "index-2.html").read_bytes()
    run(grid(BASE, lines("a cup"), [1, 2, 4]), tmp_path)
    assert (tmp_path / "index-2.html").read_bytes() == before
    pages = {path.name for path in tmp_path.glob("*.html")}
    assert pages == {"index.html", "index-2.html", "index-run2.html", "index-run2-2.html"}


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr("bokehflux.pipeline.load.load", lambda *_, **__: PIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


ARGV = ["sweep", "--prompt", "a cup", "--bokeh-targets", "0", "9", "--seeds", "1", "2", "--output", "out"]


def test_ctrl_c_keeps_what_is_finished_and_says_so(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[int] = []

    def second_is_stopped(*args: Any) -> Result:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return execute(*args)

    with monkeypatch.context() as patch:
        patch.setattr("bokehflux.app.watched.execute", second_is_stopped)
        assert cli.main(ARGV) == 130
    out, err = capsys.readouterr()
    assert err == (
        "bokehflux: interrupted; 1 of 2 scenes are finished and kept in out; the same command continues\n"
    )
    paths = [Path(line) for line in out.split()]
    assert len(paths) == 6 and all(path.is_file() for path in paths)
    assert cli.main(ARGV) == 0
    out, err = capsys.readouterr()
    assert err == "bokehflux: scene 1: 3 pictures were there already\n"
    assert len([line for line in out.split() if "bokeh-" in line]) == 3
    assert out.split()[-2:] == ["out/grid.png", "out/index.html"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_line_on_a_terminal_names_the_scene_at_work(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", stream := Terminal())
    assert cli.main([*ARGV, "--num-inference-steps", "1"]) == 0
    numbers = [int(number) for number in re.findall(r"\[(\d+)/2", stream.getvalue())]
    assert numbers == sorted(numbers) and set(numbers) == {1, 2}


def test_a_sweep_with_its_defaults(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sweep", "--prompt", "a cup", "--num-inference-steps", "1"]) == 0
    names = [Path(line).name for line in capsys.readouterr().out.split()]
    assert names[:8] == [f"bokeh-{n:02}.0.png" for n in range(0, 31, 5)] + ["pivot-bokeh-15.0.png"]


def test_a_full_disk_during_a_sweep(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bokehflux.pictures.files.os.fsync", full)
    assert cli.main(ARGV) == 1
    said = capsys.readouterr().err
    assert "No space left on device in out/a-cup-seed1-" in said and "; 0 of 3 files are kept" in said
    assert files(world) == {}


def test_what_ran_out_of_memory_once_is_not_tried_again(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[int | None, bool | None]] = []

    def cramped(model: Pipeline, plan: Any, options: Options) -> Result:
        asked.append((options.max_rows, options.vae_tiling))
        if options.max_rows is None or options.max_rows > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return execute(model, plan, dataclasses.replace(options, vae_tiling=True))

    monkeypatch.setattr("bokehflux.app.watched.execute", cramped)
    assert cli.main(ARGV) == 0
    assert asked == [(None, None), (1, None), (1, True)]


def test_shards_share_the_scenes(world: Path) -> None:
    for shard in ("1/3", "2/3", "3/3"):
        argv = [*ARGV[:-5], "--seeds", "1", "2", "3", "4", "--num-inference-steps", "1"]
        assert cli.main([*argv, "--shard", shard, "--output", "out"]) == 0
    scenes = {path.name.rsplit("-", 1)[0] for path in Path("out").iterdir() if path.is_dir()}
    assert scenes == {f"a-cup-seed{n}" for n in (1, 2, 3, 4)}
    pages = {path.name for path in Path("out").glob("*.html")}
    assert pages == {f"index-{n}of3.html" for n in (1, 2, 3)}
    assert cli.main([*ARGV, "--shard", "3/3"]) == 2, "two scenes have no third part"


def test_foreign_files_in_a_scene_folder_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "bokeh-notes.txt").write_text("x")
    (tmp_path / "bokeh-00.0.png").mkdir()
    (tmp_path / "bokeh-05.0.png").write_text("no picture")
    assert finished(tmp_path, Record(settings=BASE, provenance=HERE)) == {}


def test_out_of_memory_still_gives_the_whole_scene(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def cramped(model: Pipeline, plan: Any, options: Options) -> Result:
        if options.max_rows is None or options.max_rows > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return execute(model, plan, options)

    monkeypatch.setattr("bokehflux.app.watched.execute", cramped)
    assert cli.main(ARGV) == 0
    pictures = [Path(line) for line in capsys.readouterr().out.split() if "/bokeh-" in line]
    assert len(pictures) == 4 and {read_recipe(path)["max_rows"] for path in pictures} == {1}
