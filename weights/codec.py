"""Configs in three forms: our class, the official `config.json`, and what the shapes of a bare file tell.

One `Field` a row says how the three agree. Nothing is guessed: a key that our networks cannot honour is an
error that names the key, and so is a missing one. Where the official class has a default, an absent key takes
it. Bare files of the official models need no config, because their shapes tell it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

from .files.checkpoint import CheckpointError
from .mapping import Shape

Json = Mapping[str, Any]
Config = TypeVar("Config")
REQUIRED: Any = object()
UNSET: Any = object()


class Shapes(dict[str, Shape]):
    """The shapes of a file, by our names."""

    def __init__(self, shapes: Mapping[str, Shape], what: str, where: object) -> None:
        super().__init__(shapes)
        self.what, self.where = what, where

    def size(self, name: str, axis: int = 0) -> int:
        """The length of a tensor along an axis, at least 1. Raises CheckpointError where it has none."""
        shape = self.get(name)
        if shape is None or axis >= len(shape) or not shape[axis]:
            problem = f"{name!r} " + ("is missing" if shape is None else f"has the shape {list(shape)}")
            raise CheckpointError(self.where, f"not a complete {self.what}: {problem}")
        return shape[axis]

    def count(self, prefix: str) -> int:
        """The largest number that follows a prefix, plus one: a gap then shows as missing tensors."""
        pattern = re.compile(re.escape(prefix) + r"\.(\d{1,9})\.")
        count = max((int(m[1]) + 1 for name in self if (m := pattern.match(name))), default=0)
        # A network of a billion blocks is not built to say that they are missing.
        return min(count, len(self))


def number(value: object) -> object:
    if not isinstance(value, (int, float)):
        raise ValueError("is not a number")
    return value


def numbers(value: object) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise ValueError("is not a list")
    return tuple(value)


class Field(NamedTuple):
    """One field of a config in its three forms."""

    name: str
    """Ours."""
    key: str | None
    """In `config.json`; None where the official class has no such key."""
    told: Callable[[Shapes], Any] | None = None
    """Read from shapes; None where they do not tell it, and the default of our class holds."""
    absent: Any = REQUIRED
    """The value that an absent key means. REQUIRED: the key must be there. UNSET: the field is left out."""
    read: Callable[[Any], Any] = number
    """From JSON. Its ValueError says what the value is not."""
    write: Callable[[Any], Any] = lambda value: list(value) if isinstance(value, tuple) else value
    """To JSON."""


@dataclass(frozen=True, kw_only=True)
class Codec(Generic[Config]):
    """How the config of one kind of network is written and read."""

    what: str
    """The network's name in errors and descriptions."""
    build: Callable[..., Config]
    """Makes the config from its fields."""
    fields: tuple[Field, ...]
    fixed: Json = field(default_factory=dict)
    """Keys that all our networks of this kind share: written, and refused with another value. A tuple lists
    alternatives, of which the first is written."""
    implied: Callable[[Config], Json] = lambda config: {}
    """As `fixed`, but following from the config."""
    extra: Callable[[Config], Json] = lambda config: {}
    """Written for the official class; our networks do not need it."""
    faults: Callable[[Json], list[str]] = lambda config: []
    """What else a `config.json` may ask for that our networks cannot do."""
    tensors_rule: bool = False
    """True: shapes always tell, and a `config.json` must agree with them and may add to them."""

    def owns(self, config: Json) -> bool:
        """Whether a `config.json` belongs to this network: by its class or, where it names none, by its keys.

        An empty one does. The adapter's names no class, and people keep it in one folder with all the rest.
        """
        declared, ours = (c.get("_class_name", c.get("model_type")) for c in (config, self.fixed))
        if declared is not None:
            return bool(declared == ours)
        keys = {row.key for row in self.fields} | set(self.fixed)
        return not config or not keys.isdisjoint(config)

    def from_json(self, config: Json, where: object = "config.json") -> Config:
        """Raises CheckpointError with every key that is missing or cannot be honoured."""
        values, problems = self._stated(config)
        if not problems:
            with faults_of(where):
                made = self.build(**values)
            problems = refused(self.implied(made), config)
        if problems:
            raise CheckpointError(where, *problems)
        return made

    def from_shapes(self, shapes: Shapes) -> Config:
        """Raises CheckpointError when tensors are missing, or the shapes are not enough."""
        with faults_of(shapes.where):
            return self.build(**self._told(shapes))

    def from_both(self, config: Json, shapes: Shapes) -> Config:
        """The shape from tensors, the rest from `config.json`. Raises CheckpointError where they disagree."""
        with faults_of(shapes.where):
            told = self._told(shapes)
        stated, problems = self._stated(config)
        for row in self.fields:
            if row.name not in stated or row.name not in told:
                continue
            mine, its = stated[row.name], told[row.name]
            if mine != its:
                if isinstance(its, tuple):
                    mine, its = sorted(set(mine) - set(its)), sorted(set(its) - set(mine))
                problems.append(f"config.json says {row.key} = {mine}, the tensors say {its}")
        if problems:
            raise CheckpointError(shapes.where, *problems)
        with faults_of(shapes.where):
            return self.build(**{**stated, **told})

    def to_json(self, config: Config) -> dict[str, Any]:
        """The official config. Raises ValueError for what it cannot express."""
        rows = {row.key: row.write(getattr(config, row.name)) for row in self.fields if row.key is not None}
        same = {**self.fixed, **self.implied(config)}
        same = {key: value[0] if isinstance(value, tuple) else value for key, value in same.items()}
        result = {**self.extra(config), **same, **rows}
        read = vars(self.from_json(result))
        lost = [f"{n} {value} (it means {read[n]})" for n, value in vars(config).items() if read[n] != value]
        if lost:
            raise ValueError(f"the official config.json of a {self.what} cannot say {', '.join(lost)}")
        return result

    def _told(self, shapes: Shapes) -> dict[str, Any]:
        return {row.name: row.told(shapes) for row in self.fields if row.told is not None}

    def _stated(self, config: Json) -> tuple[dict[str, Any], list[str]]:
        """The fields that a `config.json` states, and what is wrong with its keys."""
        values, problems = {}, []
        for row in self.fields:
            value = config.get(row.key, row.absent) if row.key is not None else UNSET
            if value is REQUIRED:
                problems.append(f"key {row.key!r} is missing")
            elif value is not UNSET:
                try:
                    values[row.name] = row.read(value)
                except ValueError as error:
                    problems.append(f"{row.key} = {value!r:.80} {error}")
        return values, [*problems, *refused(self.fixed, config), *self.faults(config)]


@contextlib.contextmanager
def faults_of(where: object) -> Iterator[None]:
    """A ValueError inside is the fault of a file."""
    try:
        yield
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(where, str(error)) from None


def refused(fixed: Json, config: Json) -> list[str]:
    """One line for each key of a config that has another value than `fixed` (or than all in its tuple)."""
    problems = []
    for key, value in fixed.items():
        allowed = value if isinstance(value, tuple) else (value,)
        if key in config and config[key] not in allowed:
            wanted = " or ".join(repr(v) for v in allowed)
            problems.append(f"{key} = {config[key]!r:.80} is not supported, expected {wanted}")
    return problems
