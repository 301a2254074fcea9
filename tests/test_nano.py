"""The bundled model through the command, whole and on a CPU: a newcomer's first call, made small."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image, ImageChops, ImageStat

from bokehflux.app import cli

SIDE_PX = 128


def test_the_first_command_of_the_readme(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    prompt = "a red ball on a wooden table, city lights at night"
    small = ["--num-inference-steps", "2", "--height", str(SIDE_PX), "--width", str(SIDE_PX)]
    levels = ["--bokeh-targets", "0", "28", "--bokeh-pivot", "15"]
    argv = ["generate", "--prompt", prompt, *levels, *small, "--device", "cpu", "--output", str(out)]
    assert cli.main(argv) == 0
    names = ["bokeh-00.0.png", "bokeh-28.0.png", "pivot-bokeh-15.0.png", "sheet.png"]
    assert capsys.readouterr().out.split() == [str(out / name) for name in names]
    assert sorted(path.name for path in out.iterdir()) == names
    sharp, blurred, pivot, sheet = (Image.open(out / name).convert("RGB") for name in names)
    assert sharp.size == blurred.size == pivot.size == (SIDE_PX, SIDE_PX)
    assert sheet.width > 2 * SIDE_PX
    for picture in (sharp, blurred, pivot):
        assert max(ImageStat.Stat(picture).stddev) > 10, "a picture of nothing"
    # 5 to 11 of 255 when this was written; a scene that ignored its level would give 0.
    assert max(ImageStat.Stat(ImageChops.difference(sharp, blurred)).mean) > 2
    assert cli.main(["info", str(out / names[1])]) == 0
    said = {f"prompt: {prompt}", "bokeh_level: 28.0", "model: nano", "adapter: the model's own"}
    assert said <= set(capsys.readouterr().out.splitlines())
