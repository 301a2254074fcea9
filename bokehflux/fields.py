"""Fields of settings and provenance: one says how its value is checked, written as JSON, and given as a flag.

`settings.py` and `record.py` list the fields.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import os
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any, Self, get_args

from bokehflux.aperture import aperture_text, parse_aperture
from bokehflux.controls import parse_controls
from bokehflux.focus import parse_focus
from bokehflux.lens import Unify, check_level

MAX_TARGETS = 1000
Recipe = dict[str, Any]
"""A record as JSON: what is written into a picture."""


@dataclass(frozen=True)
class Kind:
    """How a value is checked and made plain, whether it comes from Python, JSON or the command line."""

    what: str
    """What a message says was expected."""
    convert: Callable[[Any], Any]
    """Raises TypeError or OverflowError for anything else, ValueError where it has words of its own."""
    parse: Callable[[str], Any] = str
    """What argparse makes of one word."""
    many: bool = False
    """Whether a flag takes several words."""
    commas: bool = True
    """Whether commas part them, too."""


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _is_switch(value: Any) -> bool:
    """Whether it says yes or no: Python's own, or one of NumPy or PyTorch, which count as 0 and 1."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")


def _whole(value: Any) -> int:
    if _is_switch(value):
        raise TypeError
    return operator.index(value)


def _real(value: Any) -> float:
    if isinstance(value, str | bytes | bytearray) or _is_switch(value):
        raise TypeError
    try:
        return float(value)
    except (ValueError, RuntimeError):  # a tensor of several numbers
        raise TypeError from None


def _number(value: Any) -> float:
    if not math.isfinite(number := _real(value)):
        raise TypeError
    return number


def _level(value: Any) -> float:
    check_level(level := _real(value))
    return level


def _each(value: Any) -> tuple[Any, ...]:
    """The members of a sequence. Those of a text are not meant, those of a set are in no order."""
    if isinstance(value, str | bytes | bytearray | Mapping | Set):
        raise TypeError
    return tuple(value)


def _levels(value: Any) -> tuple[float, ...]:
    levels = tuple(_level(level) for level in _each(value))
    if not 0 < len(levels) <= MAX_TARGETS:
        raise TypeError
    return levels


def _controls(value: Any) -> str:
    words = value if isinstance(value, str) else [_text(word) for word in _each(value)]
    return str(parse_controls(words))


def _foci(value: Any) -> tuple[str, ...]:
    given = (value,) if isinstance(value, str) else _each(value)
    foci = tuple(str(parse_focus(_text(one))) for one in given)
    if not 0 < len(foci) <= MAX_TARGETS:
        raise TypeError
    return tuple(dict.fromkeys(foci))


def _switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _in_twos(value: Any) -> tuple[Any, ...]:
    pairs = _each(value)
    if any(isinstance(pair, str) or len(pair) != 2 for pair in pairs):
        raise TypeError
    return pairs


def _weighted(value: Any) -> tuple[tuple[str, float], ...]:
    return tuple((_text(name), _number(strength)) for name, strength in _in_twos(value))


def _pairs(value: Any) -> tuple[tuple[str, str], ...]:
    return tuple((_text(name), _text(other)) for name, other in _in_twos(value))


def _one_of(*words: str) -> Kind:
    def convert(value: Any) -> str:
        if value not in words:
            raise TypeError
        return str(value)

    return Kind(" or ".join(words), convert)


def random_seed() -> int:
    """A seed that nobody has chosen, short enough to be typed again."""
    return int.from_bytes(os.urandom(4), "little")


def _seed_word(word: str) -> int:
    return random_seed() if word == "random" else int(word)


def _level_or_auto(word: str) -> float | str:
    return word if word == "auto" else float(word)


TEXT = Kind("text", _text, str)
WHOLE = Kind("a whole number", _whole, int)
SEED = Kind("a whole number, or None for a random one", _whole, _seed_word)
NUMBER = Kind("a finite number", _number, float)
LEVEL = Kind("a level from 0 (all sharp) to 30", _level, float)
PHOTO_LEVEL = Kind(LEVEL.what, _level, _level_or_auto)
"""On the command line it may be "auto", which the program replaces by what the photograph's EXIF says."""
LEVELS = Kind(f"a sequence of 1 to {MAX_TARGETS} levels", _levels, float, many=True)
SWITCH = Kind("true or false", _switch)
FOCI = Kind("one focus or several, as `focus.parse_focus` reads them", _foci, str, many=True, commas=False)
APERTURE = Kind(
    "an aperture, as `aperture.parse_aperture` reads it",
    lambda value: aperture_text(parse_aperture(_text(value))),
)
CONTROLS = Kind(
    "what a control adapter is asked for, as `controls.parse_controls` reads it", _controls, str, many=True
)
UNIFY = _one_of(*get_args(Unify))
RENDERER = _one_of("layers", "scatter", "bokehme")
METHOD = _one_of("render", "inversion", "reference")
PROBE = _one_of("straight", "reference")
PIVOT_STEPS = _one_of("all", "grounded")
PAIRS = Kind("pairs of text", _pairs)
WEIGHTED = Kind("pairs of text and strength", _weighted)


def setting(
    default: Any,
    kind: Kind,
    *,
    help: str = "",
    metavar: str | None = None,
    flag: str | None = None,
    least: float | None = None,
    most: float | None = None,
    decides: bool = True,
    matters: bool = False,
    sparse: bool = False,
    optional: bool = False,
) -> Any:
    """A field of a record. A default of None, or `optional`, means that None is allowed.

    help, metavar, flag: of its command-line flag (default: the field's name). least, most: its range.
    decides: whether another value is another picture. matters: of a fact, whether it may change the bits of a
    picture, so that a replay warns of another value. sparse: left out of the recipe while it is None.
    """
    about = {
        "kind": kind, "help": help, "metavar": metavar, "flag": flag, "least": least, "most": most,
        "decides": decides, "matters": matters, "sparse": sparse, "optional": optional,
    }  # fmt: skip
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=about)
    return dataclasses.field(default=default, metadata=about)


class Checked:
    """The base of settings and provenance: checked values, and JSON to and fro."""

    def __post_init__(self) -> None:
        for field in self.fields().values():
            value = getattr(self, field.name)
            if value is not None or not (field.default is None or field.metadata["optional"]):
                object.__setattr__(self, field.name, _checked(field, value))

    @classmethod
    def fields(cls) -> dict[str, dataclasses.Field[Any]]:
        return {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]

    @classmethod
    def from_recipe(cls, recipe: Mapping[str, Any]) -> Self:
        """The part of a recipe that this class describes; what the recipe lacks takes its default.

        Raises ValueError for values that no run could have had.
        """
        given = {name: recipe[name] for name in cls.fields() if name in recipe}
        for name, field in cls.fields().items():
            if field.default is dataclasses.MISSING and name not in given:
                raise ValueError(f"the recipe lacks {name!r}: it was not written by bokehflux")
        try:
            return cls(**given)
        except ValueError as error:
            raise ValueError(f"the recipe cannot be used: {error}") from error

    def recipe(self) -> Recipe:
        """As JSON, all plain lists, numbers and text."""
        return {
            name: _plain(getattr(self, name))
            for name, field in self.fields().items()
            if not (field.metadata["sparse"] and getattr(self, name) is None)
        }

    def marked(self, mark: str) -> Recipe:
        """Those values of the recipe whose fields carry a mark: "decides" or "matters"."""
        return {name: value for name, value in self.recipe().items() if self.fields()[name].metadata[mark]}


def _checked(field: dataclasses.Field[Any], value: Any) -> Any:
    """The value of a field made plain. Raises ValueError for another type, or outside its range."""
    kind = field.metadata["kind"]
    value = convert(field.name, kind, value)
    least, most = field.metadata["least"], field.metadata["most"]
    if (least is not None and value < least) or (most is not None and value > most):
        bounds = [f"at least {least}"] if least is not None else []
        bounds += [f"at most {most}"] if most is not None else []
        hint = " (for a random one: `random` on the command line, None in Python)" if value == -1 else ""
        raise ValueError(
            f"{field.name} must be {' and '.join(bounds)}, got {value}{hint if kind is SEED else ''}"
        )
    return value


def convert(name: str, kind: Kind, value: Any) -> Any:
    """A value made plain. Raises ValueError, with the name, for one that is not of the kind."""
    try:
        return kind.convert(value)
    except (TypeError, OverflowError):
        got = " ".join(f"{value!r:.80}".split())  # an array has lines
        raise ValueError(f"{name} must be {kind.what}, got {got}") from None


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
