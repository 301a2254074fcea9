"""What a control adapter is asked for beside the level, as a value and as text.

`focus=0.4 aperture=donut`, in any order, each at most once: the plane that is sharp, from 0 (the subject) to
1 (infinity) in disparity, or `near` and `far`; the shape that lights become; and, in place of a focus,
`map=half.png`, the share of the level that each place gets.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from bokehflux.aperture import aperture_text, parse_aperture

NAMED = {"near": 0.0, "far": 1.0}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """At least one of them is given; focus and map exclude each other."""

    focus: float | None = None
    aperture: str | None = None
    """As `aperture.parse_aperture` reads it."""
    map: str | None = None
    """Name of a picture, white for all of the level, or of a .npy with -1 (before the focus) to 1."""

    def __post_init__(self) -> None:
        if self.focus is None and self.aperture is None and self.map is None:
            raise ValueError("controls: expected one of focus=, aperture= and map=")
        if self.focus is not None and self.map is not None:
            raise ValueError("controls: focus and map both say what is blurred: leave one out")
        if self.focus is not None and not 0 <= self.focus <= 1:
            raise ValueError(f"controls: expected a focus from 0 (the subject) to 1, got {self.focus:g}")

    def __str__(self) -> str:
        given = {name: value for name, value in vars(self).items() if value is not None}
        return shlex.join(f"{name}={value!s}" for name, value in given.items())


def parse_controls(text: str | Sequence[str]) -> Asked:
    """From the text that `str` gives, quoted as a shell does, or from its words.

    Raises ValueError for other words.
    """
    try:
        words = shlex.split(text) if isinstance(text, str) else text
    except ValueError as error:
        raise ValueError(f"controls: {error}, in {text!r:.80}") from None
    found: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if name not in ("focus", "aperture", "map") or not equals or not value or name in found:
            raise ValueError(
                "controls: expected focus=NUMBER, aperture=SHAPE or map=FILE, each at most once, "
                f"got {word!r:.80}"
            )
        found[name] = value
    focus = None
    if "focus" in found:
        try:
            focus = NAMED[found["focus"]] if found["focus"] in NAMED else float(found["focus"])
        except ValueError:
            raise ValueError(
                "controls: expected near, far or a number between 0 (the subject) and 1 (infinity) for "
                f"focus, got {found['focus']!r:.80}"
            ) from None
    aperture = aperture_text(parse_aperture(found["aperture"])) if "aperture" in found else None
    return Asked(focus=focus, aperture=aperture, map=found.get("map"))
