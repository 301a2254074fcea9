"""What benchmarks share besides timing: a limit on their time, a table, a bar plot, and their files."""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image, ImageDraw, ImageFont

from benchmarks.timing import Timing
from bokehflux.weights.files.write import replacing, write_json

RESULTS = Path("benchmarks/results")
INKS = ("#1f6fb4", "#7fb2dd", "#d62728", "#2a9d3a", "#888888", "#b8860b", "#6a3d9a", "#c77cbf")

Row = dict[str, Any]
Item = TypeVar("Item")
Columns = Mapping[str, str]
"""Key of a row -> format of its value: "12.1f"; keys are the headings too."""


class Budget:
    """Wall-clock seconds a benchmark may take, counted from now."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    @property
    def spent(self) -> bool:
        return self.left <= 0


TURN_SECONDS = 0.3
"""Of one arm, before the next."""


def chosen_device(parser: argparse.ArgumentParser, tiny: bool) -> torch.device:
    """The GPU; or a CPU, for toys alone, with Triton's kernels in its interpreter. float32 stays float32."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        if not tiny:
            parser.error("there is no GPU; --tiny tries everything on toys")
        os.environ.setdefault("TRITON_INTERPRET", "1")
    torch.set_float32_matmul_precision("highest")
    return device


def pick(named: Mapping[str, Item], wanted: Sequence[str]) -> list[Item]:
    """Items whose names contain `wanted`, in that order. Raises ValueError for a part that none contains."""
    found: dict[str, Item] = {}
    for part in wanted:
        these = {name: item for name, item in named.items() if part in name}
        if not these:
            raise ValueError(f"no name contains {part!r}: there are {', '.join(named)}")
        found = found | {name: item for name, item in these.items() if name not in found}
    return list(found.values())


def turns(
    arms: Mapping[str, Callable[[], Any]],
    device: torch.device,
    repeats: int,
    budget: Budget,
    at_least: int = 1,
) -> dict[str, Timing]:
    """Milliseconds of every arm with its launches, arms taking turns; `at_least` rounds, budget or not.

    For calls that read more than the cache holds, such as whole steps: nothing is rotated. Arms have been
    called before (that is their warm-up).
    """
    times: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(repeats):
        if repeat >= at_least and budget.spent:
            break
        for name, arm in arms.items():
            times[name].append(sustained_milliseconds(arm, device))
    return {name: Timing.of(values, graph=False) for name, values in times.items()}


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


def workspace_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """Peak of what a call allocates on a GPU beside what was there; None elsewhere."""
    if device.type != "cuda":
        call()
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:100] if lines else ''}"


def table(rows: Sequence[Row], columns: Columns) -> str:
    """Rows as lines under a heading; "-" for what a row does not know. Text to the left, numbers right."""
    widths = {
        key: max(len(key), *(len(_cell(row, key, form)) for row in rows), 1) for key, form in columns.items()
    }
    lines = ["  ".join(_pad(key, form, widths[key]) for key, form in columns.items())]
    for row in rows:
        lines.append(
            "  ".join(_pad(_cell(row, key, form), form, widths[key]) for key, form in columns.items())
        )
    return "\n".join(line.rstrip() for line in lines)


def _cell(row: Row, key: str, form: str) -> str:
    value = row.get(key)
    return "-" if value is None else format(value, form)


def _pad(text: str, form: str, width: int) -> str:
    return text.ljust(width) if form in ("", "s") else text.rjust(width)


def bars(title: str, rows: Sequence[Row], group: str, label: str, value: str, unit: str) -> Image.Image:
    """A horizontal bar a row that has a value, in groups of equal row[group], coloured by row[label]."""
    known = [row for row in rows if row.get(value) is not None]
    labels = list(dict.fromkeys(row[label] for row in known))
    groups = list(dict.fromkeys(row[group] for row in known))
    font, bar, left, top = ImageFont.load_default(13), 16, 210, 44 + 20 * len(labels)
    image = Image.new("RGB", (960, top + bar * len(known) + 14 * len(groups) + 10), "white")
    pen = ImageDraw.Draw(image)
    pen.text((10, 10), title, "black", font)
    for i, name in enumerate(labels):
        pen.rectangle((10, 36 + 20 * i, 24, 48 + 20 * i), INKS[i % len(INKS)])
        pen.text((32, 34 + 20 * i), name, "black", font)
    scale = 640 / max((row[value] for row in known), default=1.0)
    y = top
    for name in groups:
        pen.text((10, y), str(name), "black", font)
        for row in (row for row in known if row[group] == name):
            end = left + scale * row[value]
            pen.rectangle((left, y + 2, end, y + bar - 2), INKS[labels.index(row[label]) % len(INKS)])
            pen.text((end + 4, y), f"{row[value]:.3g} {unit}", "black", font)
            y += bar
        y += 14
    return image


def save(
    out: Path, name: str, environment: Mapping[str, str], rows: Sequence[Row], plot: Image.Image, **more: Any
) -> None:
    """Write NAME.json and NAME.png into a folder that is made if need be."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / f"{name}.json", {"environment": dict(environment), "rows": list(rows), **more})
    with replacing(out / f"{name}.png") as temporary:
        plot.save(temporary, format="PNG")
