"""Runs the Gluon attention kernels on a CPU: Gluon has no interpreter of its own.

Covers what `kernels/attention/gluon_fwd.py` uses and no more. Partitions are threads, barriers have phases as
in hardware, copies arrive late and out of order, and a product reads shared memory when it is waited for (the
last moment at which hardware may) and compares with what lay there when it was started. A deadlock, a slot
overwritten too early and a value used before it was waited for are therefore errors. Layouts, registers and
memory fences are not modelled.
"""

from __future__ import annotations

import importlib.util
import random
import sys
import threading
import time
import types
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

PATIENCE_S = 20.0
program = types.SimpleNamespace(pid=0, count=1)
mine = threading.local()


class Value(torch.Tensor):
    """A tensor with Gluon's `type.layout`."""

    type = property(lambda self: types.SimpleNamespace(layout="any"))  # type: ignore[assignment]


def value(x: Any) -> Value:
    return torch.as_tensor(x).as_subclass(Value)


class Barrier:
    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.phase, self.count, self.left, self.bytes = 0, 0, 0, 0

    def init(self, count: int) -> None:
        self.count = self.left = count

    def update(self, arrivals: int, num_bytes: int) -> None:
        with self.changed:
            self.left -= arrivals
            self.bytes += num_bytes
            assert self.left >= 0, "more arrivals than a phase expects"
            if self.left == 0 and self.bytes == 0:
                self.phase, self.left = self.phase + 1, self.count
                self.changed.notify_all()

    def wait(self, parity: int) -> None:
        with self.changed:
            done = self.changed.wait_for(lambda: self.phase & 1 != parity, timeout=PATIENCE_S)
        assert done, f"deadlock: phase {self.phase}, waiting for parity {parity}"


class Shared:
    """Shared memory: uninitialised is NaN."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data, self.shape, self.dtype = data, list(data.shape), data.dtype

    def index(self, i: Any) -> Shared:
        return Shared(self.data[int(i)])

    def reshape(self, shape: Sequence[int]) -> Shared:
        return Shared(self.data.view(*shape))

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.data.permute(*order))


class Barriers:
    def __init__(self, count: int) -> None:
        self.all = [Barrier() for _ in range(count)]

    def index(self, i: Any) -> Barrier:
        return self.all[int(i)]


class Pointer:
    def __init__(self, data: torch.Tensor, offsets: Any = 0) -> None:
        self.data, self.offsets = data, offsets
        self.dtype = types.SimpleNamespace(element_ty=data.dtype)

    def __add__(self, offsets: Any) -> Pointer:
        return Pointer(self.data, self.offsets + offsets)


class Descriptor:
    def __init__(
        self, base: torch.Tensor, shape: Any, strides: Any, block: Sequence[int], layout: Any
    ) -> None:
        self.base, self.block, self.layout, self.dtype = base, block, layout, base.dtype
        size = block[-2] * block[-1] * base.element_size()
        self.block_type = types.SimpleNamespace(nbytes=size)


def copy_late(
    pool: ThreadPoolExecutor, desc: Descriptor, coord: Sequence[Any], bar: Barrier, to: Shared
) -> None:
    row, head, start, _ = (int(c) for c in coord)

    def copy() -> None:
        time.sleep(random.random() * 1e-3)
        lines = desc.base[row, head, start : start + desc.block[-2]]
        to.data.zero_()
        to.data[0, 0, : len(lines)] = lines
        bar.update(0, -desc.block_type.nbytes)

    pool.submit(copy)


class Product:
    """A product that has been started."""

    def __init__(self, a: Any, b: Shared, acc: Any, use_acc: bool) -> None:
        assert not isinstance(acc, Product), "an accumulator is used before it was waited for"
        self.a, self.b, self.acc, self.use_acc = a, b, acc, use_acc
        self.before = self.read()
        self.result: Value | None = None

    def read(self) -> torch.Tensor:
        a = self.a.data if isinstance(self.a, Shared) else self.a
        return a.float() @ self.b.data.float()

    def finish(self) -> None:
        now = self.read()
        assert torch.equal(now, self.before), "a slot was overwritten under a running product"
        assert now.isfinite().all(), "a product of what was never loaded"
        self.result = value(now + self.acc if self.use_acc else now)


def start_product(a: Any, b: Shared, acc: Any, *, use_acc: bool = True, is_async: bool = False) -> Product:
    assert is_async
    mine.running.append(Product(a, b, acc, use_acc))
    return mine.running[-1]


def wait_products(num_outstanding: int, deps: Sequence[Product]) -> Value:
    while len(mine.running) > num_outstanding:
        mine.running.pop(0).finish()
    (product,) = deps
    assert product.result is not None, "waited for too few products"
    return product.result


def run_partitions(parts: Sequence[tuple[Callable, tuple]], warps: Sequence[int], registers: Any) -> None:
    assert len(parts) == len(warps) + 1 == len(registers) + 1
    errors: list[BaseException] = []

    def run(function: Callable, args: tuple) -> None:
        mine.running = []
        try:
            function(*args)
            assert not mine.running, "a product was never waited for"
        except BaseException as error:  # noqa: BLE001 - handed to the test
            errors.append(error)

    threads = [threading.Thread(target=run, args=part, daemon=True) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE_S)
    if errors:
        raise errors[0]


def asm(text: str, constraints: str, args: Sequence[Value], dtype: Any, is_pure: bool, pack: int) -> Value:
    if not text.startswith("cvt"):
        assert (args[0] >= 0).all()
    return args[0].to(dtype)


def argument(x: Any) -> Any:
    """What a kernel sees of an argument; jobs, which are large, stay integers."""
    if isinstance(x, torch.Tensor):
        return Pointer(x.view(-1))
    if isinstance(x, tuple):
        return type(x)(*map(argument, x)) if hasattr(x, "_fields") else tuple(map(argument, x))
    return value(x) if type(x) is int and x < 2**62 else x


class Kernel:
    def __init__(self, function: Callable) -> None:
        self.function = function

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.function(*args, **options)

    def __getitem__(self, grid: tuple[int]) -> Callable:
        def launch(*args: Any, num_warps: int, maxnreg: int, enable_fp_fusion: bool, **options: Any) -> None:
            made = [argument(a) for a in args]
            program.count = grid[0]
            for program.pid in range(grid[0]):
                self.function(*made, **options)

        return launch


def jit(function: Callable | None = None, **_: Any) -> Any:
    return Kernel if function is None else Kernel(function)


def allocate(dtype: Any, shape: Sequence[int], layout: Any) -> Any:
    if layout == "barrier":
        return Barriers(shape[0])
    return Shared(torch.full(list(shape), float("nan"), dtype=dtype))


def store(to: Pointer, x: Any, mask: Any = None) -> None:
    offsets, x = torch.broadcast_tensors(to.offsets, x)
    kept = torch.ones_like(offsets, dtype=torch.bool) if mask is None else mask.expand_as(offsets)
    to.data[offsets[kept].long()] = x[kept].to(to.data.dtype)


def load_emulated(package: str, patch: pytest.MonkeyPatch) -> types.ModuleType:
    """`gluon_fwd` of that package on these imitations, in place of the real one while the test runs."""
    pool = ThreadPoolExecutor(3)
    language = types.ModuleType("language")
    vars(language).update(
        constexpr=lambda x: x, allocate_shared_memory=allocate, static_range=range,
        warp_specialize=run_partitions,
        float32=torch.float32, float16=torch.float16, bfloat16=torch.bfloat16, int64=torch.int64,
        program_id=lambda axis: value(program.pid), num_programs=lambda axis: program.count,
        to_tensor=value, where=lambda c, a, b: torch.where(value(c), value(a), value(b)),
        cdiv=lambda a, b: (a + b - 1) // b, maximum=torch.maximum, exp2=torch.exp2, log2=torch.log2,
        max=torch.amax, sum=torch.sum, convert_layout=lambda x, layout: x, inline_asm_elementwise=asm,
        zeros=lambda shape, dtype, layout: value(torch.zeros(shape, dtype=dtype)),
        arange=lambda a, b, layout: value(torch.arange(a, b)),
        store=store, load=lambda at: value(at.data[at.offsets.long()]),
        SliceLayout=lambda dim, parent: "any", DotOperandLayout=lambda i, parent, width: "any",
        NVMMADistributedLayout=lambda *_: "any", NVMMASharedLayout=lambda **_: "any",
    )  # fmt: skip
    hopper = types.ModuleType("hopper")
    vars(hopper).update(
        fence_async_shared=lambda: None, warpgroup_mma=start_product, warpgroup_mma_wait=wait_products,
        mbarrier=types.SimpleNamespace(
            MBarrierLayout=lambda: "barrier", init=lambda bar, count: bar.init(count),
            wait=lambda bar, parity: bar.wait(int(parity)), expect=lambda bar, size: bar.update(1, size),
            arrive=lambda bar, count: bar.update(count, 0),
        ),
    )  # fmt: skip
    tma = types.ModuleType("tma")
    vars(tma).update(async_load=lambda *args: copy_late(pool, *args))
    gluon = types.ModuleType("gluon")
    vars(gluon).update(jit=jit, language=language)
    host = types.ModuleType("host")
    vars(host).update(TensorDescriptor=Descriptor)
    experimental = types.ModuleType("experimental")
    vars(experimental).update(gluon=gluon)
    root = "triton.experimental"
    imitations = {
        root: experimental, f"{root}.gluon": gluon, f"{root}.gluon.language": language,
        f"{root}.gluon.language.nvidia": types.ModuleType("nvidia"),
        f"{root}.gluon.language.nvidia.hopper": hopper, f"{root}.gluon.language.nvidia.hopper.tma": tma,
        f"{root}.gluon.nvidia": types.ModuleType("nvidia"), f"{root}.gluon.nvidia.hopper": host,
    }  # fmt: skip
    parent = sys.modules[package]
    name = f"{package}.gluon_fwd"
    spec = importlib.util.spec_from_file_location(name, Path(str(parent.__file__)).parent / "gluon_fwd.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as importing:
        for imitated, by in imitations.items():
            importing.setitem(sys.modules, imitated, by)
        spec.loader.exec_module(module)
    mask = 2**20 - 1
    patch.setattr(
        module, "pick_job",
        lambda job, jobs: tuple(value(jobs[int(job)] >> shift & mask) for shift in (1, 21, 41)),
    )  # fmt: skip
    patch.setitem(sys.modules, name, module)
    patch.setattr(parent, "gluon_fwd", module, raising=False)
    return module
