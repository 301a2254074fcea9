"""How benchmarks take time: arms are checked first, wrong ones are not timed, right ones take turns.

`race` is the harness: arms, what their errors may be, and a clock. There are two clocks. `replayed` is for
kernels: CUDA graphs over inputs that fill the cache several times. `sustained` is for whole calls with their
launches, in the state that the GPU's clock has settled in. Figures are medians, with the 20th and 80th
percentile beside them.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Row = dict[str, Any]
CACHE_MULTIPLE = 3
"""How many times the rotated inputs of an arm fill the GPU's L2."""
TURN_SECONDS = 0.3
"""Length of one arm's turn on a `sustained` clock."""
CASE_SECONDS, LEAST_ROUNDS = 25.0, 3
"""Its rounds of one case end after this, but so many are taken in any case."""
PRODUCTS = "products"
"""The large matrix products go by this name among the arms that take turns."""
BURST = 64
"""Such products in a row: 0.1 s on an H100."""


class Budget:
    """Wall-clock seconds that a benchmark may take, counted from now."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    @property
    def spent(self) -> bool:
        return self.left <= 0


# Arms and what they must do before they are timed.


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to compute a case."""

    name: str
    call: Callable[[int], Any]
    """Computes the case on one set of inputs, by number."""
    error: Callable[[Any], float]
    """Relative error of what `call(0)` returned."""
    tera_flop: float | None = None
    """The arm's own work, in 1e12 operations a call."""
    is_ours: bool = False
    max_error_ratio: float = 2.0
    """Largest error that passes, as a multiple of the smallest error of `Rules.error_of`."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What errors may be, and what speed is compared with: names of arms."""

    error_of: Sequence[str] | None
    """The smallest error of these is the yardstick. Where none of them ran, nothing passes. None: `max_error`
    alone decides."""
    max_error: float = math.inf
    """No error above this passes, whatever the yardstick's: that one may be wrong itself."""
    speed_of: Sequence[str] = ()
    """`speedup` is over the fastest of these."""

    @classmethod
    def of(cls, arms: Sequence[Arm], max_error: float = math.inf, speed_of: Sequence[str] = ()) -> Rules:
        """The arms that are not ours are the yardstick; without any, the best of ours."""
        rivals = [arm.name for arm in arms if not arm.is_ours]
        yardsticks = rivals or [arm.name for arm in arms]
        return cls(error_of=yardsticks, max_error=max_error, speed_of=speed_of or rivals)

    def limit(self, arm: Arm, errors: Mapping[str, float | str]) -> float:
        """Largest error that passes; NaN, which nothing passes, without a yardstick."""
        if self.error_of is None:
            return self.max_error
        known = [e for name in self.error_of if isinstance(e := errors.get(name), float) and e == e]
        return min(arm.max_error_ratio * min(known), self.max_error) if known else math.nan

    def verdict(self, arm: Arm, errors: Mapping[str, float | str]) -> str:
        """`ok`, or what is wrong."""
        error, limit = errors[arm.name], self.limit(arm, errors)
        if isinstance(error, str):
            return error
        if math.isnan(limit):
            return f"not checked: none of {', '.join(self.error_of or ())} ran"
        return "ok" if error <= limit else f"wrong: {error:.2e}, over {limit:.2e}"


def error_of(arm: Arm) -> float | str:
    """The arm's error, or why it failed. Compiles what is compiled."""
    try:
        return arm.error(arm.call(0))
    except Exception as error:  # of compilers too: one arm must not take the others with it
        return f"failed: {first_line(error)}"


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:100] if lines else ''}"


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of the exact result, in float32."""
    exact = exact.float()
    return ((found.float() - exact).norm() / exact.norm()).item()


# Clocks.

Times = tuple[dict[str, Row], float | None]
"""By arm `ms` (the median), `p20`, `p80` and what else the clock knows; the ceiling in TFLOP/s."""
Clock = Callable[[Sequence[Arm]], Times]
"""Times arms that are right; leaves out those for which there is no time."""


def in_turns(
    measures: Mapping[str, Callable[[], float]], rounds: int, warm_up: int = 0, budget: Budget | None = None
) -> dict[str, Row]:
    """Take one measurement of every arm a round, so that a GPU that warms up treats all alike.

    The first `warm_up` rounds do not count. Ends when the budget is spent, after `LEAST_ROUNDS`.
    """
    times: dict[str, list[float]] = {name: [] for name in measures}
    for number in range(-warm_up, rounds):
        if number >= LEAST_ROUNDS and budget is not None and budget.spent:
            break
        for name, measure in measures.items():
            value = measure()
            if number >= 0:
                times[name].append(value)
    found = {}
    for name, values in times.items():
        values.sort()
        p20, p80 = (values[round(share * (len(values) - 1))] for share in (0.2, 0.8))
        found[name] = {"ms": statistics.median(values), "p20": p20, "p80": p80}
    return found


def replayed(device: torch.device, sets: int, rounds: int, arms: Sequence[Arm]) -> Times:
    """The clock of kernels: a measurement is one pass over all sets of inputs, divided by their number.

    On CUDA a pass is one graph where the arm allows capture; a row says whether it was (`graph`).
    """
    ceiling = gemm_ceiling(device) if any(arm.tera_flop for arm in arms) else None
    passes = {arm.name: whole_pass(arm.call, sets, device) for arm in arms}
    measures = {name: lambda run=run: milliseconds(run, device) / sets for name, (run, _) in passes.items()}
    rounds, warm_up = (rounds, 3) if device.type == "cuda" else (min(rounds, 3), 1)
    found = in_turns(measures, rounds, warm_up)
    return {name: {**found[name], "graph": graph} for name, (_, graph) in passes.items()}, ceiling


def sustained(device: torch.device, rounds: int, budget: Budget, arms: Sequence[Arm]) -> Times:
    """The clock of whole calls: the median of those in a row, in the second half of `TURN_SECONDS`.

    They read more than the cache holds, as steps do: nothing is rotated. On a GPU each arm is called before
    its first turn for the memory that it allocates (`workspace_mb`), and again for the time that Python takes
    to launch it (`launch_ms`): where that is more than `ms`, the GPU waits.

    Where an arm's work is known, bursts of large products take turns with the arms, and their rate is the
    ceiling. What a GPU sustains falls with the power it draws: a product alone is up to 5 % faster than in
    the state in which steps are timed.
    """
    calls = {arm.name: functools.partial(arm.call, 0) for arm in arms}
    facts = {name: room_and_launch(call, device) for name, call in calls.items()}
    budget, tera_flop = Budget(min(CASE_SECONDS, budget.left)), 0.0
    if any(arm.tera_flop for arm in arms):
        multiply, tera_flop = products(device)
        calls[PRODUCTS] = lambda: [multiply(i) for i in range(BURST)]
        calls[PRODUCTS]()
    measures = {name: functools.partial(sustained_milliseconds, call, device) for name, call in calls.items()}
    found = in_turns(measures, rounds, budget=budget)
    burst = found.pop(PRODUCTS, None)
    ceiling = 1000 * BURST * tera_flop / burst["ms"] if burst else None
    return {name: found[name] | facts[name] for name in found}, ceiling


def race(arms: Sequence[Arm], rules: Rules, clock: Clock) -> list[Row]:
    """Check every arm, time those that are right: a row an arm, the verdict of the others in it.

    `tflops` is the arm's own work over its time, `share` that over the ceiling.
    """
    errors = {arm.name: error_of(arm) for arm in arms}
    verdicts = {arm.name: rules.verdict(arm, errors) for arm in arms}
    found, ceiling = clock([arm for arm in arms if verdicts[arm.name] == "ok"])
    fastest = min((times["ms"] for name, times in found.items() if name in rules.speed_of), default=None)
    rows = []
    for arm in arms:
        error = errors[arm.name]
        row: Row = {"arm": arm.name, "ours": arm.is_ours, "verdict": verdicts[arm.name]}
        row |= {"error": error if isinstance(error, float) else None, **found.get(arm.name, {})}
        rows.append(row)
        if arm.name not in found:
            row["verdict"] = "out of time" if row["verdict"] == "ok" else row["verdict"]
            continue
        if row.get("graph") is False:
            row["verdict"] = "ok, with launches"
        if fastest is not None:
            row["speedup"] = fastest / row["ms"]
        if arm.tera_flop is not None:
            row["tflops"] = 1000 * arm.tera_flop / row["ms"]
            if ceiling is not None:
                row |= {"share": row["tflops"] / ceiling, "ceiling_tflops": ceiling}
    return rows


# What clocks are made of.


def num_sets(bytes_per_set: int, device: torch.device) -> int:
    """How many sets of inputs to rotate, so that none is found in the cache when its turn comes again."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, -(-CACHE_MULTIPLE * cache // bytes_per_set))


def wait(device: torch.device | None) -> None:
    """Until a GPU has done what it was told."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    """One call, begun when the device is idle."""
    if device.type != "cuda":
        begin = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - begin)
    torch.cuda.synchronize(device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def sustained_milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    """The median of calls in a row, in the second half of `TURN_SECONDS`; one call on a CPU.

    A GPU's clock follows the power it draws, some tenths of a second behind: a call timed alone runs at the
    clock that the arm before it has left.
    """
    first = milliseconds(call, device)
    if device.type != "cuda":
        return first
    half = max(1, round(500 * TURN_SECONDS / first))
    for _ in range(half - 1):
        call()
    return statistics.median(milliseconds(call, device) for _ in range(half))


def room_and_launch(call: Callable[[], Any], device: torch.device) -> Row:
    """What a call allocates at most on a GPU beside what was there, and how long another takes to return."""
    if device.type != "cuda":
        return {}
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    room, begin = torch.cuda.max_memory_allocated(device) - before, time.perf_counter()
    call()
    launched = time.perf_counter() - begin
    torch.cuda.synchronize(device)
    return {"workspace_mb": room / 1e6, "launch_ms": 1000 * launched}


def whole_pass(
    arm: Callable[[int], Any], sets: int, device: torch.device
) -> tuple[Callable[[], None], bool | None]:
    """One call over every set, and whether it is a graph; None on a CPU, which has none."""

    def eager() -> None:
        for i in range(sets):
            arm(i)

    if device.type != "cuda":
        return eager, None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        eager()
        eager()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            eager()
    except RuntimeError as error:  # what cannot be captured is timed with its launches, and marked
        torch.cuda.set_stream(current)  # a capture that fails leaves its own behind
        print(f"    not captured, timed eagerly: {str(error).splitlines()[0]}")
        return eager, False
    return graph.replay, True


# Ceilings.


@functools.cache
def gemm_ceiling(device: torch.device) -> float:
    """TFLOP/s of one large product after another, alone on the device; measured once."""
    multiply, tera_flop = products(device)
    arm = Arm(name=PRODUCTS, call=multiply, error=lambda _: 0.0)
    found, _ = replayed(device, 2, 10, [arm])
    return 1000 * tera_flop / found[PRODUCTS]["ms"]


def products(device: torch.device) -> tuple[Callable[[int], Tensor], float]:
    """An 8192 x 8192 x 8192 bfloat16 product (small without a GPU) by number, and its 1e12 operations.

    Factors are normal random numbers, since zeros run faster, and two pairs of them take turns.
    """
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (256, torch.float32)
    factors = [torch.randn(size, size, device=device, dtype=dtype) for _ in range(4)]
    return lambda i: factors[i % 2] @ factors[2 + i % 2], 2 * size**3 / 1e12
