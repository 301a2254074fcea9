"""Who may import whom, read from the source: the architecture in CONTRIBUTING.md, enforced."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# As in setup.py: where the parts of the import package lie in a checkout.
FOLDERS = {"bokehflux": "bokehflux", "bokehflux.kernels": "kernels", "bokehflux.weights": "weights"}

ALLOWED = {"torch", "einops", "safetensors", "sentencepiece", "tokenizers", "triton", "numpy", "PIL"}
"""Third-party packages that run-time code may import."""
ALLOWED_IN = {
    **{
        f"bokehflux.{leaf}": set()
        for leaf in ("__main__", "version", "configs", "lens", "focus", "fingerprint", "fields", "record")
    },
    "bokehflux.controls": set(),
    "bokehflux.settings": set(),
    "bokehflux": set(),
    "bokehflux.aperture": {"torch"},
    "bokehflux.kernels": {"torch", "triton"},
    "bokehflux.attention": {"torch"},
    "bokehflux.conditioning": {"torch"},
    "bokehflux.models": {"torch", "einops"},
    "bokehflux.sampling": {"torch", "einops", "numpy"},
    "bokehflux.text": {"torch", "tokenizers", "sentencepiece"},
    "bokehflux.weights": {"torch", "safetensors"},
    "bokehflux.weights.files.gguf": {"torch", "numpy", "gguf"},
    "bokehflux.rendering": {"torch", "numpy", "safetensors"},
    "bokehflux.metrics": {"torch"},
    "bokehflux.pictures": {"PIL", "numpy", "torch"},
    "bokehflux.pictures.credentials": {"c2pa", "PIL"},
    "bokehflux.photos": {"PIL", "numpy"},
    "bokehflux.photos.annotate": {"PIL", "numpy", "torch", "transformers", "onnxruntime"},
    "bokehflux.photos.readers": {"PIL", "numpy", "pyarrow"},
    "bokehflux.pipeline": {"torch", "numpy", "PIL"},
    "bokehflux.training": {"torch", "PIL"},
    "bokehflux.training.optim": {"torch", "prodigyopt"},
    "bokehflux.training.prepare": {"torch", "numpy", "PIL"},
    "bokehflux.nano": {"torch", "numpy", "tokenizers"},
    "bokehflux.evaluation": {"torch", "numpy", "PIL"},
    "bokehflux.app": {"torch", "PIL"},
    "bokehflux.app.fetch": {"huggingface_hub"},
}
"""By the innermost part a module belongs to: everything that is not named here is denied."""
LEAVES = {"version", "configs", "lens", "focus", "aperture", "controls", "fingerprint"}
MODELS = LEAVES | {"conditioning", "attention", "kernels", "models"}
LIBRARY = MODELS | {"sampling", "text", "weights"}
OWN_IN = {
    "": {"pipeline", "version"},
    "__main__": {"app"},
    "version": set(),
    "configs": set(),
    "lens": set(),
    "focus": set(),
    "aperture": set(),
    "controls": {"aperture"},
    "fingerprint": set(),
    "fields": {"lens", "focus", "aperture", "controls"},
    "settings": {"configs", "lens", "fields"},
    "record": {"fields", "settings"},
    "conditioning": LEAVES,
    "kernels": {"kernels"},
    "attention": {"kernels"},
    "models": MODELS,
    "sampling": MODELS | {"sampling"},
    "text": MODELS | {"text"},
    "weights": MODELS | {"text", "weights"},
    "weights.files": {"weights.files"},
    "weights.tables": {"weights.tables", "weights.mapping", "weights.codec", "configs"},
    "rendering": LEAVES | {"kernels", "rendering"},
    "metrics": LEAVES | {"rendering"},
    # A page renders what a lens does, with the renderer's numbers.
    "pictures": LEAVES | {"fields", "settings", "record", "rendering", "metrics", "pictures"},
    "photos": LEAVES | {"pictures", "photos"},
    "pipeline": LIBRARY | {"settings", "record", "pictures", "photos", "rendering", "pipeline"},
    # A run streams its base as a pipeline does, and makes pictures of what it has learned.
    "training": LIBRARY | {"rendering", "metrics", "pictures", "pipeline", "training"},
    "training.prepare": LEAVES | {"models", "photos", "rendering", "training"},
    "nano": LIBRARY | {"rendering", "metrics", "training", "nano"},
    "evaluation": LIBRARY
    | {"record", "rendering", "metrics", "pictures", "photos", "pipeline", "nano", "evaluation"},
    # What each part of training is for is found by training.
    "evaluation.ablation": MODELS
    | {"sampling", "metrics", "pipeline", "nano", "training", "evaluation.figures"},
    "app": LIBRARY | {"fields", "settings", "record", "metrics", "pictures", "photos", "pipeline", "app"},
    # The one command that judges: nano's renderer, which it measures by, comes with the evaluation.
    "app.judge": {"evaluation", "pictures", "app.arguments", "app.sweep", "app.terminal"},
    # What is trained, and what it is trained on.
    "app.train": {"training", "app.processes", "weights", "photos", "pictures", "rendering", "app.terminal"},
}
"""Which of our own modules (below bokehflux) each part may import; a part that is not named may not exist."""


def sources() -> Iterator[tuple[str, Path]]:
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join([package, *parts]).removesuffix(".__init__"), path


def imports(module: str, path: Path, at_run_time: bool = False) -> set[str]:
    """Every module a file imports, at its top or inside a function, relative names resolved.

    at_run_time: only those at its top that are imported with it.
    """
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in tree.body if at_run_time else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base += [node.module] if node.module else []
            # `from a import b` may mean the module a.b; the longer name is the one that rules are about.
            found |= {".".join([*base, alias.name]) for alias in node.names}
    return found


def within(name: str, parts: set[str]) -> bool:
    return any(name == part or name.startswith(part + ".") for part in parts)


def rule(module: str, rules: dict[str, set[str]]) -> set[str] | None:
    """The rule of the innermost part a module belongs to; the outermost package's holds for itself alone."""
    parts = sorted(rules, reverse=True)
    outer = {"", "bokehflux"}
    return next((rules[p] for p in parts if module == p or (p not in outer and within(module, {p}))), None)


SOURCES = dict(sources())


def test_the_walk_sees_every_part() -> None:
    for part in [*ALLOWED_IN, *(f"bokehflux.{part}".removesuffix(".") for part in OWN_IN)]:
        assert any(within(module, {part}) for module in SOURCES), f"no module in {part}: is the rule old?"


def test_relative_imports_are_resolved() -> None:
    table = next(module for module in SOURCES if module.startswith("bokehflux.weights.tables."))
    assert any(name.startswith("bokehflux.weights.") for name in imports(table, SOURCES[table]))


@pytest.mark.parametrize("module", SOURCES)
def test_third_party_imports(module: str) -> None:
    top = {name.split(".")[0] for name in imports(module, SOURCES[module])}
    foreign = top - set(sys.stdlib_module_names) - {"bokehflux"}
    limit = rule(module, ALLOWED_IN)
    assert limit is not None and foreign <= limit, (
        f"{module} imports {sorted(foreign)}, may {sorted(limit or [])}"
    )


@pytest.mark.parametrize("part", ALLOWED_IN)
def test_no_part_may_import_what_it_does_not(part: str) -> None:
    limit = ALLOWED_IN[part]
    here = [module for module in SOURCES if rule(module, ALLOWED_IN) is limit]
    used = {name.split(".")[0] for module in here for name in imports(module, SOURCES[module])}
    assert limit <= used, f"no module of {part} itself imports {sorted(limit - used)}: is the rule old?"


@pytest.mark.parametrize("module", SOURCES)
def test_own_imports(module: str) -> None:
    allowed = rule(module.removeprefix("bokehflux").removeprefix("."), OWN_IN)
    assert allowed is not None, f"{module} belongs to no part that OWN_IN names"
    own = {n for n in imports(module, SOURCES[module]) if n.startswith("bokehflux")}
    names = {n.removeprefix("bokehflux").removeprefix(".") for n in own} - {""}
    bad = sorted(name for name in names if not within(name, allowed))
    assert not bad, f"{module} may import only {sorted(allowed)} of bokehflux, but imports {bad}"


def test_there_are_no_circles() -> None:
    """Between modules, imports for type checking left out."""
    graph = {
        module: {
            name
            for found in imports(module, path, at_run_time=True)
            for name in (found, found.rpartition(".")[0])
            if name in SOURCES and name != module
        }
        for module, path in SOURCES.items()
    }
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join([*way[way.index(module) :], module])
        if module not in done:
            for name in graph[module] - {"bokehflux"}:
                visit(name, (*way, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def loaded_by(statement: str) -> set[str]:
    """Names in sys.modules after a statement in a fresh interpreter."""
    code = f"{statement}; import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_is_instant() -> None:
    tops = {name.split(".")[0] for name in loaded_by("import bokehflux, bokehflux.app.cli")}
    assert not tops & {*ALLOWED, "triton", "diffusers", "transformers"}


def test_importing_the_pipeline_leaves_out_what_it_does_not_need() -> None:
    names = loaded_by("import bokehflux.pipeline.load, bokehflux.pictures.page")
    assert "bokehflux.pipeline.generate" in names
    # What torch brings along by itself is not ours to judge.
    tops = {name.split(".")[0] for name in names - loaded_by("import torch, numpy, PIL.Image")}
    assert not tops & {"triton", "flash_attn", "diffusers", "transformers", "cv2", "accelerate"}
    guests = ("bokehflux.training", "bokehflux.nano", "bokehflux.app", "bokehflux.evaluation")
    assert not {name for name in names if name.startswith(guests)}
