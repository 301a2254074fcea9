"""What a wheel holds: built once, offline, from a copy of the sources."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("bokehflux", "kernels", "weights")
IMPORT_NAMES = {"pillow": "PIL"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy: a build leaves folders beside setup.py, and an old one of those would end in the wheel."""
    source = tmp_path_factory.mktemp("source")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    return source


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheel_of(source, tmp_path_factory.mktemp("dist"))


def wheel_of(source: Path, out: Path) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--no-index", "-w", str(out), str(source)], check=True)
    (built,) = out.glob("*.whl")
    return built


def test_a_source_archive_makes_the_same_wheel(source: Path, names: set[str], tmp_path: Path) -> None:
    build = f"import setuptools.build_meta as build; build.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    again = set(zipfile.ZipFile(wheel_of(archive, tmp_path)).namelist())
    assert again == names


def test_what_a_package_index_shows(wheel: Path, names: set[str]) -> None:
    (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
    text = zipfile.ZipFile(wheel).read(metadata).decode()
    assert "\nLicense-Expression: Apache-2.0\n" in text and "\nRequires-Python: >=3.11\n" in text
    assert text.count("\nLicense-File: ") == 3 and "\nProject-URL: " in text
    assert "Python 3.11" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_citation_names_this_version() -> None:
    version = re.search('__version__ = "(.*)"', (ROOT / "bokehflux" / "version.py").read_text())
    assert version is not None
    assert f"\nversion: {version[1]}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version[1]}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def test_nothing_is_claimed_at_the_top_level(names: set[str]) -> None:
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"bokehflux"}


def test_every_source_file_is_inside(names: set[str]) -> None:
    kinds = ("*.py", "*.json", "*.safetensors", "py.typed", "*.css", "*.html", "*.js", "*.ttf", "OFL.txt")
    expected = set()
    for folder in FOLDERS:
        prefix = "bokehflux" if folder == "bokehflux" else f"bokehflux/{folder}"
        found = {
            path.relative_to(ROOT / folder).as_posix()
            for kind in kinds
            for path in (ROOT / folder).rglob(kind)
        }
        expected |= {f"{prefix}/{name}" for name in found}
    assert "bokehflux/kernels/attention/interface.py" in expected and "bokehflux/py.typed" in expected
    assert not expected - names


@pytest.mark.skipif(
    not (ROOT / "weights" / "nano").is_dir(), reason="the bundled model is not in this checkout"
)
def test_the_bundled_model_is_inside(names: set[str]) -> None:
    files = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "weights" / "nano").rglob("*") if path.is_file()
    }
    assert files and {f"bokehflux/{name}" for name in files} <= names


def test_licences_and_command_are_inside(wheel: Path, names: set[str]) -> None:
    assert {"LICENSE", "NOTICE"} <= {name.rsplit("/", 1)[-1] for name in names}
    (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
    assert "bokehflux = bokehflux.app.cli:main" in zipfile.ZipFile(wheel).read(entry_points).decode()


def test_a_wheel_imports_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import bokehflux, bokehflux.weights, bokehflux.kernels.attention.interface as interface\n"
        "from importlib.resources import files\n"
        "manifest = files('bokehflux.weights').joinpath('manifests', 'flux1-dev.bfl.json')\n"
        "print(bokehflux.__file__, interface.__file__, len(bokehflux.__path__), manifest.is_file())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    package, kernel, places, has_manifest = done.stdout.split()
    assert Path(package).is_relative_to(tmp_path) and Path(kernel).is_relative_to(tmp_path)
    assert (places, has_manifest) == ("1", "True")


def test_dependencies_are_what_the_code_imports() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[<>=;\s]", text)[0] for text in project["dependencies"]}
    imported = set()
    for path in (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                imported.add(node.module.split(".")[0])
    third_party = imported - set(sys.stdlib_module_names) - {"bokehflux"}
    names = {IMPORT_NAMES.get(name, name) for name in declared}
    extras = {
        "c2pa", "flash_attn", "gguf", "huggingface_hub", "onnxruntime", "prodigyopt", "pyarrow",
        "transformers",
    }  # fmt: skip
    assert third_party - extras <= names
    assert names <= third_party


def test_every_tested_version_is_pinned() -> None:
    """An unpinned torch in `make` would bring gigabytes; the rest would make CI depend on the day."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["test"], *extras["oracle"], *extras["dev"]]
    pinned = {
        re.split(r"[<>=]", line)[0]: line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    assert {re.split(r"[<>=;\s]", text)[0] for text in wanted} <= set(pinned)
    # triton's is a range for a reason that constraints.txt gives.
    assert all("==" in line for name, line in pinned.items() if name != "triton")
