"""Every kernel compiles with the installed Triton for the GPUs that people have; none need be here."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KIB = 1024

pytest.importorskip("triton", reason="no triton for this system")
if importlib.util.find_spec("triton.backends.nvidia") is None:
    pytest.skip("this triton cannot compile for NVIDIA GPUs", allow_module_level=True)


def launched() -> Iterator[str]:
    """Every kernel that is launched somewhere: `kernel[grid](...)`."""
    for path in (ROOT / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                yield ast.unparse(node.func.value).rpartition(".")[2]


def compiled(target: str, cache: Path) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # Another default for fusion than Triton's: a launch that does not say it would be seen.
    environment |= {"TRITON_CACHE_DIR": str(cache), "TRITON_DEFAULT_FP_FUSION": "0"}
    command = [sys.executable, "-m", "tests.cross_compile", target]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("target", ["80", "90", "100", "120", "gfx942"])
def test_every_kernel_compiles(target: str, tmp_path: Path) -> None:
    if not target.isdigit() and importlib.util.find_spec("triton.backends.amd") is None:
        pytest.skip("this triton cannot compile for AMD GPUs")
    kernels = compiled(target, tmp_path)
    names = {kernel["kernel"].rpartition(".")[2] for kernel in kernels}
    needs_fp8 = {"norm_kernel", "gelu_kernel"}
    # The backward pass launches two of its kernels in one place, as `kernel`.
    wanted = {*launched(), "dkv_kernel", "dq_kernel"} - {"kernel"}
    assert names == (wanted - needs_fp8 if target in ("80", "gfx942") else wanted)
    assert all(kernel["fused"] for kernel in kernels), "say enable_fp_fusion: its default changes in 3.10"
    gluon = [kernel for kernel in kernels if kernel["kernel"].startswith("attention.gluon_fwd.")]
    assert len(gluon) == (4 if target == "90" else 0)
    assert all(kernel["shared"] <= {"90": 227, "gfx942": 64}.get(target, 99) * KIB for kernel in kernels)
    if all("registers" in kernel for kernel in gluon):
        assert all((kernel["registers"], kernel["spills"]) == (168, 0) for kernel in gluon), gluon
