"""`make photo`: its sheet, where scikit-image is not installed or left aside."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from bokehflux.pictures.metadata import read_recipe

ROOT = Path(__file__).resolve().parents[2]


def test_the_sheet_of_nanos_world(tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "scripts" / "photo.py"), str(tmp_path), "--nano"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "level: none" in done.stdout and "all.jpg" in done.stdout
    with np.load(tmp_path / "scene.npz") as maps:
        assert maps["mask"].max() == 1 and maps["depth"][maps["mask"] > 0.9].max() < 1.001
        assert maps["depth"].max() > 5
    with Image.open(tmp_path / "all.jpg") as image:
        assert image.width > 5 * 256 and image.height > 3 * 256
    recipe = read_recipe(tmp_path / "apertures" / "bokeh-30.0-run3.png")
    assert recipe["aperture"] == "donut:0.5" and recipe["focus"] == ["mask"]
