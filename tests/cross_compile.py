"""Compiles our kernels for a GPU that need not be there, through the code that launches them.

    python -m tests.cross_compile 90
    python -m tests.cross_compile gfx942

For every kernel a line of JSON: what it is, and what the compilers say of it. Nothing runs: a launch ends
when its kernel is compiled. Not with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from bokehflux.kernels import dispatch
from bokehflux.kernels.attention import launch, tiles, triton_fwd, triton_joins
from bokehflux.kernels.attention.jobs import grounded_jobs
from bokehflux.kernels.fp8 import ops as fp8
from bokehflux.kernels.group_norm import ops as group_norm
from bokehflux.kernels.pointwise import ops as pointwise
from bokehflux.kernels.pointwise.reference import Projected
from bokehflux.kernels.scatter import ops as scatter
from bokehflux.kernels.scatter.reference import Iris

BF16 = torch.bfloat16
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Driver:
    """As much of a driver as compiling asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def attention(family: str) -> None:
    """A pair, target and plain row (one kernel in Triton, three in Gluon), a pair alone, their gradients."""
    # More multiprocessors than tiles: keys are split, and merged.
    device = tiles.Device(family=family, num_sms=1000)
    with mock.patch.object(tiles, "device", lambda of: device):
        for dim, fixed, pivot_of in ((128, False, (0, 0, 0, 3)), (64, True, (0, 0))):
            k = torch.zeros(len(pivot_of), 500, 24, dim, dtype=BF16)  # 500 is not a multiple of any tile
            q, bias = k[: len(set(pivot_of))], torch.zeros(len(pivot_of), 24, dim, dtype=BF16)
            jobs = grounded_jobs(pivot_of)
            tile = tiles.forward_tile(device, tiles.LONGEST_FIRST, dim, fixed)
            _, lse = launch.forward(q, k, None, k, bias, jobs, fixed=fixed, tile=tile)
            if family == tiles.HOPPER:
                launch.forward(q, k, None, k, bias, jobs, fixed=fixed)
            launch.backward(k, q, k, None, k, k, lse, jobs)
    triton_joins.merge_(k, lse, k, lse)
    triton_joins.join_gradients_(k[0], k, k, k, k[1:], k[1:], k[1:])


def passes() -> None:
    x, vector, weight = (torch.zeros(2, n, 3072, dtype=BF16) for n in (40, 1, 1))
    wide, weight = torch.zeros(2, 40, 4 * 3072, dtype=BF16), torch.zeros(128, dtype=BF16)
    pointwise.modulate(x, vector, vector)
    pointwise.add_gated(x, x, vector)
    pointwise.add_gated_modulate(x, x, vector, vector, vector)
    pointwise.concat_gelu(x, wide)
    stream, angles = Projected(x, x, x, weight, weight), torch.zeros(80, 64)
    pointwise.joint_heads([stream, stream], angles, angles)
    image = torch.zeros(1, 128, 32, 32, dtype=BF16).to(memory_format=torch.channels_last).requires_grad_()
    group_norm.group_norm_silu(image, weight, weight, 32, 1e-6).sum().backward()


def scattering() -> None:
    light, radius = torch.zeros(1, 3, 40, 50), torch.ones(1, 40, 50)
    for iris in (Iris(), Iris(6, donut=0.3)):
        scatter.scatter(light, radius, iris, 2)
    scatter.dilate(radius, 2)


def quantisation() -> None:
    x, vector = torch.zeros(2, 40, 3072, dtype=BF16), torch.zeros(2, 1, 3072, dtype=BF16)
    fp8.quantize(x)
    fp8.quantize_modulated(x, vector, vector)
    fp8.add_gated_quantize_modulated(x, x, vector, vector, vector)
    fp8.quantize_gelu(torch.zeros(2, 40, 4 * 3072, dtype=BF16), x)


def usage(cubin: bytes) -> dict[str, int]:
    """Registers a thread and bytes of spills, from the disassembler that Triton brings; empty without it."""
    tool = TOOLS / "cuobjdump"
    if not tool.is_file():
        return {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).*LOCAL:(\d+)", said)
    if found is None:
        return {}
    registers, stack, local = map(int, found.groups())
    return {"registers": registers, "spills": stack + local}


def main(name: str) -> None:
    """name: a compute capability of NVIDIA, or an architecture of AMD."""
    nvidia = name.isdigit()
    driver.set_active(Driver(GPUTarget("cuda", int(name), 32) if nvidia else GPUTarget("hip", name, 64)))
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *args, warmup=True, **options)
        line = {
            "kernel": f"{self.fn.__module__.removeprefix('bokehflux.kernels.')}.{self.fn.__name__}",
            "shared": kernel.metadata.shared,
            "fused": kernel.metadata.enable_fp_fusion,
            **(usage(kernel.asm["cubin"]) if nvidia else {}),
        }
        print(json.dumps(line), flush=True)

    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(dispatch, "why_not", lambda device: None),
        mock.patch.object(triton_fwd, "PACKED", tl.constexpr(nvidia)),
    ):
        attention(tiles.HOPPER if name == "90" else tiles.PORTABLE)
        passes()
        scattering()
        if nvidia and int(name) >= 89:  # e4m3 is younger than sm_80, and AMD's is another one there
            quantisation()


if __name__ == "__main__":
    main(sys.argv[1])
