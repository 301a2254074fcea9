"""Files on disk: names, and that nothing half-written is ever seen."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bokehflux.pictures import files as output
from bokehflux.pictures.files import Picture, check_folder, distinct, level_stem, replace_file, save_pictures
from bokehflux.pictures.metadata import read_recipe
from bokehflux.weights.files.write import write_json

ROOT = Path(__file__).resolve().parents[2]
levels = st.floats(0, 30) | st.sampled_from([0.0, -0.0, 4.2, 4.25, 4.4, 1e-5, 30.0])


def picture(stem: str, color: str = "red") -> Picture:
    return Picture(stem=stem, image=Image.new("RGB", (32, 16), color), recipe={"color": color})


def names(folder: Path) -> list[str]:
    """Everything in a folder, hidden files included."""
    return sorted(path.name for path in folder.iterdir())


def test_level_stems_are_readable() -> None:
    assert [level_stem(x) for x in (0, 4.2, 4.4, 15, 28.0)] == [
        "bokeh-00.0", "bokeh-04.2", "bokeh-04.4", "bokeh-15.0", "bokeh-28.0",
    ]  # fmt: skip


@given(levels, levels)
def test_level_stems_never_collide(a: float, b: float) -> None:
    assert (level_stem(a) == level_stem(b)) == (a == b)


@given(st.lists(levels, min_size=1, max_size=8))
def test_distinct_stems_are_distinct(asked: list[float]) -> None:
    stems = distinct([level_stem(level) for level in asked])
    assert len(set(stems)) == len(asked)


@pytest.mark.parametrize(("kind", "ending", "format"), [
    ("png", ".png", "PNG"), ("jpeg", ".jpg", "JPEG"), ("webp", ".webp", "WEBP"),
])  # fmt: skip
def test_formats(tmp_path: Path, kind: str, ending: str, format: str) -> None:
    (path,) = save_pictures([picture("a")], tmp_path, kind)
    assert path == tmp_path / f"a{ending}" and names(tmp_path) == [path.name]
    with Image.open(path) as image:
        assert image.format == format


def test_earlier_runs_are_kept_and_a_run_shares_one_suffix(tmp_path: Path) -> None:
    save_pictures([picture("a", "red"), picture("sheet", "red")], tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    # "b" alone would be free; it must still carry the run that its sheet belongs to.
    second = save_pictures([picture("b", "blue"), picture("sheet", "blue")], tmp_path)
    third = save_pictures([picture("a", "green"), picture("sheet", "green")], tmp_path)
    assert [path.name for path in second] == ["b-run2.png", "sheet-run2.png"]
    assert [path.name for path in third] == ["a-run3.png", "sheet-run3.png"]
    assert {path: path.read_bytes() for path in before} == before


def test_files_have_ordinary_permissions(tmp_path: Path) -> None:
    (path,) = save_pictures([picture("a")], tmp_path)
    (tmp_path / "other").write_text("")
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_name_taken_at_the_last_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process writes b between our look and our write: its file stays, ours all move on."""
    real = os.link

    def link(source: Path, target: Path) -> None:
        if target.name == "b.png":
            target.write_text("theirs")
        real(source, target)

    monkeypatch.setattr(output.os, "link", link)
    paths = save_pictures([picture("a"), picture("b")], tmp_path)
    assert [path.name for path in paths] == ["a-run2.png", "b-run2.png"]
    assert names(tmp_path) == ["a-run2.png", "b-run2.png", "b.png"]
    assert (tmp_path / "b.png").read_text() == "theirs"


def test_file_systems_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(output.os, "link", link)
    for _ in range(2):
        save_pictures([picture("a"), picture("b")], tmp_path)
    assert names(tmp_path) == ["a-run2.png", "a.png", "b-run2.png", "b.png"]

    def replace(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output.os, "replace", replace)
    with pytest.raises(OSError, match="No space"):
        save_pictures([picture("c")], tmp_path)
    assert len(names(tmp_path)) == 4


def test_two_processes_in_one_folder_never_share_a_name(tmp_path: Path) -> None:
    code = textwrap.dedent("""
        import sys; from pathlib import Path; from PIL import Image
        from bokehflux.pictures.files import Picture, save_pictures
        for i in range(12):
            image = Image.new("RGB", (16, 16))
            pictures = [Picture(stem=s, image=image, recipe={"by": sys.argv[1], "i": i}) for s in "ab"]
            print(*save_pictures(pictures, Path(sys.argv[2])))
    """)
    command = [sys.executable, "-c", code]
    running = [
        subprocess.Popen([*command, by, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for by in ("one", "two")
    ]
    for by, process in zip(("one", "two"), running, strict=True):
        out = process.communicate(timeout=120)[0].splitlines()
        assert process.returncode == 0 and len(out) == 12
        for i, line in enumerate(out):
            assert [read_recipe(path) for path in line.split()] == [{"by": by, "i": i}] * 2
    assert len(names(tmp_path)) == 48


@pytest.mark.parametrize("failing", [0, 1])
def test_a_full_disk_keeps_what_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    calls = []

    def fsync(_: int) -> None:
        calls.append(1)
        if len(calls) == failing + 1:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(output.os, "fsync", fsync)
    with pytest.raises(OSError, match=f"No space.*; {failing} of 2 files are kept"):
        save_pictures([picture("a"), picture("b")], tmp_path)
    assert names(tmp_path) == ["a.png"][:failing]


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    """The real thing: the system refuses to write past a limit, in the middle of a file."""
    big = Picture(stem="big", image=Image.effect_noise((256, 256), 90).convert("RGB"), recipe={})
    (tmp_path / "page.html").write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(OSError, match="large"):
            save_pictures([picture("small"), big], tmp_path)
        with pytest.raises(OSError, match="large"):
            replace_file(tmp_path / "page.html", bytes(20_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert names(tmp_path) == ["page.html", "small.png"] and (tmp_path / "page.html").read_bytes() == b"old"


def test_killed_in_the_middle_of_a_save(tmp_path: Path) -> None:
    """SIGKILL between two writes: no visible file, and the next run takes the plain names."""
    code = textwrap.dedent("""
        import os, signal, sys; from pathlib import Path; from PIL import Image
        from bokehflux.pictures import files as output
        real, calls = os.fsync, []
        def fsync(handle):
            calls.append(1)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            real(handle)
        output.os.fsync = fsync
        image = Image.new("RGB", (16, 16))
        pictures = [output.Picture(stem=s, image=image, recipe={}) for s in "abc"]
        output.save_pictures(pictures, Path(sys.argv[1]))
    """)
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert all(name.startswith(".bokehflux-") for name in names(tmp_path))
    paths = save_pictures([picture("a"), picture("b")], tmp_path)
    assert [path.name for path in paths] == ["a.png", "b.png"]


def test_an_interrupted_save_leaves_no_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(output.os, "fsync", fsync)
    with pytest.raises(KeyboardInterrupt):
        save_pictures([picture("a")], tmp_path)
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write to output folder"):
        check_folder(tmp_path / "file")
    with pytest.raises(ValueError, match="cannot write to output folder"):
        check_folder(tmp_path / "file" / "below")
    check_folder(tmp_path / "new" / "below")
    with pytest.raises(ValueError, match="cannot write to output folder .*embedded null"):
        check_folder(tmp_path / "a\0b")
    assert names(tmp_path / "new" / "below") == []


def test_a_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:  # root writes anywhere; what the system would say to others

        def refuse(**_: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(output.tempfile, "TemporaryFile", refuse)
    else:
        tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="cannot write to output folder .*: Permission denied"):
        check_folder(tmp_path)


def test_a_folder_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "sheet.png").mkdir()
    with pytest.raises(OSError, match=r"sheet.png is a folder, .*: move it away"):
        replace_file(tmp_path / "sheet.png", b"data")
    assert [p.name for p in tmp_path.iterdir()] == ["sheet.png"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_device_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    """The owner of a machine may replace /dev/null, too."""
    os.mkfifo(tmp_path / "pipe")
    for write in (lambda path: replace_file(path, b"data"), lambda path: write_json(path, {})):
        with pytest.raises(FileExistsError, match="pipe is a device, and a file of that name"):
            write(tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo() and [p.name for p in tmp_path.iterdir()] == ["pipe"]
