"""Name tables between a checkpoint layout and our networks, and the proof that one covers the other exactly.

A rule is written from our name to theirs, `Rule("txt_in.{p}", "context_embedder.{p}")`, and read both ways:
`plan` resolves it against a file to load, `to_official` against our tensors to save. A name without a rule is
the same on both sides, so the tables of layouts whose names we share are empty.

Placeholders: `{i}` `{j}` a number, `{p}` weight or bias, and, in their names only, `{ri}`: i counted from the
end, over all numbers that follow the same prefix on our side.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .files.checkpoint import CheckpointError, fold

Shape = tuple[int, ...]
Value = TypeVar("Value")


class Transform(NamedTuple):
    """How tensors of theirs make one of ours, and back."""

    join: Callable[[Sequence[Tensor]], Tensor]
    split: Callable[[Tensor], list[Tensor]]
    """The exact inverse. A meta tensor of our shape gives the expected shapes of theirs."""


SAME = Transform(join=lambda theirs: theirs[0], split=lambda ours: [ours])


def concat(*parts: int) -> Transform:
    """Their tensors stacked along dim 0; `parts` are their relative heights, (1, 1, 1) for q, k, v."""

    def split(ours: Tensor) -> list[Tensor]:
        unit, rest = divmod(ours.shape[0], sum(parts))
        if rest:
            raise ValueError(f"{ours.shape[0]} rows cannot be divided as {':'.join(map(str, parts))}")
        return list(ours.split([part * unit for part in parts]))

    return Transform(join=lambda theirs: torch.cat(list(theirs)), split=split)


def _swapped(x: Tensor) -> Tensor:
    first, second = x.chunk(2)
    return torch.cat([second, first])


SWAP_HALVES = Transform(join=lambda theirs: _swapped(theirs[0]), split=lambda ours: [_swapped(ours)])
"""(scale, shift) stored by one side, (shift, scale) by the other: no shape check can tell."""

LINEAR_TO_CONV = Transform(
    join=lambda theirs: theirs[0][:, :, None, None],
    split=lambda ours: [ours.flatten(1)],
)
"""A linear weight [C, C] on their side, a 1x1 convolution [C, C, 1, 1] on ours."""


@dataclass(frozen=True)
class Rule:
    """One kind of parameter on our side (`dst`) and the tensors of theirs it is made of (`src`)."""

    dst: str
    src: str | tuple[str, ...]
    transform: Transform = SAME
    tied: tuple[str, ...] = ()
    """Other names of a single `src`: each may replace it, and copies must equal it."""


@dataclass(frozen=True)
class Table:
    """A checkpoint layout."""

    name: str
    """Its name in errors."""
    marker: str
    """A tensor by which the layout is recognised; may have placeholders."""
    rules: tuple[Rule, ...] = ()
    ignored: frozenset[str] = frozenset()
    """Tensors that a file may hold and that we do not need."""
    ignored_below: tuple[str, ...] = ()
    """The same, by what their names start with: halves of a model that we do not use."""
    needs_config: bool = False
    """Whether its files are nothing without a `config.json`; the shapes of others tell all of it."""

    def ignores(self, name: str) -> bool:
        """Whether a tensor of a file is one that we do not need."""
        return name in self.ignored or name.startswith(self.ignored_below)

    def marks(self, names: Collection[str], prefix: str = "") -> bool:
        """Whether a file with these tensors, all below `prefix`, has this layout."""
        if "{" not in self.marker:
            return prefix + self.marker in names
        pattern = _pattern(prefix + self.marker)
        return any(pattern.fullmatch(name) for name in names)


class Entry(NamedTuple):
    """How one of our tensors is made."""

    dst: str
    src: tuple[str, ...]
    transform: Transform = SAME
    tied: tuple[str, ...] = ()


def recognise(
    tables: Sequence[Table], names: Mapping[str, object], where: str | Path, what: str = "checkpoint"
) -> Table:
    """The first table whose marker is among the names.

    Raises CheckpointError that names the markers of a `what`, and what was found.
    """
    for table in tables:
        if table.marks(names):
            return table
    markers = {table.name: table.marker for table in reversed(tables)}
    wanted = " or ".join(f"{marker!r} ({name})" for name, marker in reversed(markers.items()))
    some = ", ".join(sorted(names)[:3]) or "nothing"
    prefix = next((n[: -len(t.marker)] for n in names for t in tables if n.endswith("." + t.marker)), "")
    hint = f". Every name carries the prefix {prefix!r}: save it without" if prefix else ""
    found = f"found {len(names)} tensors such as {some}{hint}"
    problem = f"layout not recognised: a {what} has {re.sub('{.}', '*', wanted)}; {found}"
    raise CheckpointError(where, problem)


def plan(
    table: Table, ours: Mapping[str, Shape], theirs: Mapping[str, Shape], where: str | Path
) -> list[Entry]:
    """Prove that a file of shapes `theirs` covers the parameters `ours` exactly, and say how.

    Every parameter is made once, every tensor of the file is used once or listed as ignored, shapes fit.
    Raises CheckpointError with all missing, unexpected and wrong-shaped tensors, in the file's own names.
    """
    entries: list[Entry] = []
    used: set[str] = set()
    missing: list[tuple[str, str]] = []
    misshaped: list[tuple[str, str]] = []
    for entry in resolve(table, ours):
        shapes = _official_shapes(entry, ours[entry.dst])
        names = entry.src
        if entry.tied:
            names = tuple(name for name in (*entry.src, *entry.tied) if name in theirs) or entry.src
            shapes = shapes * len(names)
            entry = entry._replace(src=names[:1], tied=names[1:])
        for name, shape in zip(names, shapes, strict=True):
            used.add(name)
            if name not in theirs:
                missing.append((name, str(list(shape))))
            elif tuple(theirs[name]) != shape:
                misshaped.append((name, f"is {list(theirs[name])}, expected {list(shape)}"))
        entries.append(entry)
    unexpected = [
        (name, str(list(theirs[name]))) for name in theirs if name not in used and not table.ignores(name)
    ]
    problems = [f"missing: {line}" for line in fold(missing)]
    problems += [f"unexpected: {line}" for line in fold(unexpected)]
    problems += [f"wrong shape: {line}" for line in fold(misshaped)]
    if problems:
        raise CheckpointError(f"{where} ({table.name})", *problems)
    return entries


def to_official(table: Table, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under the layout's names, mostly as views. The inverse of loading with the same table."""
    result: dict[str, Tensor] = {}
    for entry in resolve(table, {name: tuple(t.shape) for name, t in tensors.items()}):
        result.update(zip(entry.src, entry.transform.split(tensors[entry.dst]), strict=True))
    return result


def resolve(table: Table, ours: Mapping[str, Shape]) -> list[Entry]:
    """One entry per name of ours. Raises ValueError when the table itself is ambiguous."""
    compiled = [(_pattern(rule.dst), rule) for rule in table.rules]
    entries = []
    for name in ours:
        hits = [(match, rule) for pattern, rule in compiled if (match := pattern.fullmatch(name))]
        if len(hits) > 1:
            raise ValueError(f"table {table.name}: {name!r} matches {[rule.dst for _, rule in hits]}")
        if not hits:
            entries.append(Entry(name, (name,)))
            continue
        match, rule = hits[0]
        values = match.groupdict()
        sources = (rule.src,) if isinstance(rule.src, str) else rule.src
        if any("{ri}" in source for source in sources):
            values["ri"] = str(_count_after(name[: match.start("i")], ours) - 1 - int(values["i"]))
        source, tied = (tuple(s.format(**values) for s in group) for group in (sources, rule.tied))
        entries.append(Entry(name, source, rule.transform, tied))
    uses = Counter(name for entry in entries for name in (*entry.src, *entry.tied))
    twice = [name for name, count in uses.items() if count > 1]
    if twice:
        raise ValueError(f"table {table.name} uses {twice[:3]} more than once")
    return entries


def renamed(table: Table, names: Mapping[str, Value]) -> dict[str, Value]:
    """A file's tensors by our names, where one of theirs makes one of ours: enough to tell a config."""
    # Numbers that are counted from the end have no meaning before all names are known.
    sources = [(rule.src, rule.dst) for rule in table.rules if isinstance(rule.src, str)]
    sources += [(name, rule.dst) for rule in table.rules for name in rule.tied]
    rules = [(_pattern(src), dst) for src, dst in sources if "{ri}" not in src]
    result = {}
    for name, value in names.items():
        hits = [(match, dst) for pattern, dst in rules if (match := pattern.fullmatch(name))]
        result[hits[0][1].format(**hits[0][0].groupdict()) if hits else name] = value
    return result


def _official_shapes(entry: Entry, shape: Shape) -> list[Shape]:
    if entry.transform is SAME:
        return [tuple(shape)]
    try:
        return [tuple(t.shape) for t in entry.transform.split(torch.empty(shape, device="meta"))]
    except ValueError as error:
        raise ValueError(f"{entry.dst} {list(shape)} does not exist in this layout: {error}") from None


@cache
def _pattern(template: str) -> re.Pattern[str]:
    kinds = {"i": r"\d+", "j": r"\d+", "p": "weight|bias"}
    parts = re.split(r"\{(\w+)\}", template)
    return re.compile("".join(f"(?P<{x}>{kinds[x]})" if n % 2 else re.escape(x) for n, x in enumerate(parts)))


def _count_after(prefix: str, names: Mapping[str, object]) -> int:
    numbers = {int(name[len(prefix) :].split(".", 1)[0]) for name in names if name.startswith(prefix)}
    return max(numbers) + 1
