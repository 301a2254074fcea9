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
    "bokehflux.kernels": {"torch", "triton", "flash_attn"},
    "bokehflux.attention": {"torch"},
    "bokehflux.configs": set(),
    "bokehflux.app.fetch": {"huggingface_hub"},
    "bokehflux.pictures.sheet": {"PIL"},
    "bokehflux.models": {"torch", "einops"},
    "bokehflux.sampling": {"torch", "einops", "numpy"},
    "bokehflux.weights.files.gguf": {"torch", "numpy", "gguf"},
}
OWN_IN = {
    "bokehflux.configs": set(),
    "bokehflux.kernels": {"kernels"},
    "bokehflux.conditioning": {"configs"},
    "bokehflux.pictures.sheet": set(),
    "bokehflux.attention": {"kernels"},
    "bokehflux.models": {"models", "attention", "kernels", "configs", "types"},
    "bokehflux.sampling": {"sampling", "models", "attention", "configs", "types"},
    "bokehflux.text": {"text", "models", "configs", "types"},
    "bokehflux.weights.files": {"weights.files"},
    "bokehflux.weights.tables": {"weights.tables", "weights.mapping", "weights.codec", "configs"},
    "bokehflux.weights": {"weights", "text", "models", "configs", "types"},
}
"""Which of our own modules (below bokehflux) each part may import; parts not named may import any."""


def sources() -> Iterator[tuple[str, Path]]:
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join([package, *parts]).removesuffix(".__init__"), path


def imports(module: str, path: Path) -> set[str]:
    """Every module a file imports, at its top or inside a function, relative names resolved."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
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
    """The rule of the innermost part a module belongs to."""
    return next((rules[part] for part in sorted(rules, reverse=True) if within(module, {part})), None)


SOURCES = dict(sources())


def test_the_walk_sees_every_part() -> None:
    for part in [*OWN_IN, *ALLOWED_IN, "bokehflux.pipeline.generate", "bokehflux.app.cli"]:
        assert any(within(module, {part}) for module in SOURCES), (
            f"no module in {part}: is the rule out of date?"
        )


def test_relative_imports_are_resolved() -> None:
    table = next(module for module in SOURCES if module.startswith("bokehflux.weights.tables."))
    assert any(name.startswith("bokehflux.weights.") for name in imports(table, SOURCES[table]))


@pytest.mark.parametrize("module", SOURCES)
def test_third_party_imports(module: str) -> None:
    top = {name.split(".")[0] for name in imports(module, SOURCES[module])}
    foreign = top - set(sys.stdlib_module_names) - {"bokehflux"}
    limit = rule(module, ALLOWED_IN)
    assert foreign <= (ALLOWED if limit is None else limit), f"{module} imports {sorted(foreign)}"


@pytest.mark.parametrize("module", SOURCES)
def test_own_imports(module: str) -> None:
    allowed = rule(module, OWN_IN)
    own = {
        n.removeprefix("bokehflux.") for n in imports(module, SOURCES[module]) if n.startswith("bokehflux")
    }
    bad = sorted(name for name in own if allowed is not None and not within(name, allowed))
    assert not bad, f"{module} may import only {sorted(allowed or [])} of bokehflux, but imports {bad}"


def loaded_by(statement: str) -> set[str]:
    """Names in sys.modules after a statement in a fresh interpreter."""
    code = f"{statement}; import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_is_instant() -> None:
    tops = {name.split(".")[0] for name in loaded_by("import bokehflux, bokehflux.app.cli")}
    assert not tops & {*ALLOWED, "triton", "diffusers", "transformers"}


def test_importing_the_pipeline_leaves_out_what_it_does_not_need() -> None:
    names = loaded_by("import bokehflux.pipeline.generate, bokehflux.weights.load")
    assert "bokehflux.pipeline.generate" in names
    # What torch brings along by itself is not ours to judge.
    tops = {name.split(".")[0] for name in names - loaded_by("import torch, numpy, PIL.Image")}
    assert not tops & {"triton", "flash_attn", "diffusers", "transformers", "cv2", "accelerate"}
    assert not {name for name in names if name.startswith("bokehflux.training")}
