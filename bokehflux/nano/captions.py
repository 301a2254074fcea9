"""What a person would say of a scene: the captions that `nano` trains on, and the 32 it is judged by."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

import torch

from .scenery.spec import (
    BACKGROUNDS,
    COLORS,
    NUM_HELD_OUT,
    PATTERNS,
    SHAPES,
    TABLES,
    SceneSpec,
    held_out_spec,
    is_held_out,
    sample_specs,
)

__all__ = [
    "BACKGROUNDS",
    "COLORS",
    "PATTERNS",
    "SHAPES",
    "TABLES",
    "all_words",
    "caption",
    "corpus",
    "held_out",
    "is_held_out",
    "vocabulary",
]

OPENINGS = (
    "",
    "",
    "a photo of ",
    "a photograph of ",
    "a close-up of ",
    "a picture of ",
    "a still life with ",
)
SETTINGS = (
    "{subject} on {table} in front of {background}",
    "{subject} on {table} with {background} in the background",
    "{subject} on {table}, {background} behind it",
    "{subject} standing on {table}, {background} in the distance",
    "{subject} on {table} against {background}",
)
FRAMED = "{background} behind {subject} on {table}"
COMPANY = (", {others} behind it", ", with {others} in the background", " and {others} further back")
COMPANY_SHARE = 0.85
"""How often objects behind the subject are mentioned."""


def caption(spec: SceneSpec, i: int, rng: random.Random) -> str:
    """One of many phrasings for scene i of `spec`, lower case; `rng` picks."""
    color, shape = COLORS[int(spec.color[i])], SHAPES[int(spec.shape[i])]
    pattern = PATTERNS[int(spec.pattern[i])]
    words = [color, shape] if pattern == "plain" else [pattern, color, shape]
    parts = {
        "subject": _with_article(" ".join(words)),
        "table": _with_article(TABLES[int(spec.table[i])]),
        "background": BACKGROUNDS[int(spec.background[i])],
    }
    if rng.random() < 0.1:
        text = FRAMED.format(**parts)
    else:
        text = rng.choice(OPENINGS) + rng.choice(SETTINGS).format(**parts)
    others = [
        _with_article(f"{COLORS[int(c)]} {SHAPES[int(s)]}")
        for c, s in zip(spec.mid_color[i], spec.mid_shape[i], strict=True)
    ][: int(spec.num_mid[i])]
    if others and rng.random() < COMPANY_SHARE:
        text += rng.choice(COMPANY).format(others=" and ".join(others))
    return text


def all_words() -> list[str]:
    """Every word that a caption can hold, sorted, without punctuation."""
    texts = [
        *SHAPES,
        *COLORS,
        *PATTERNS[1:],
        *TABLES,
        *BACKGROUNDS,
        *OPENINGS,
        *SETTINGS,
        FRAMED,
        *COMPANY,
        "an",
    ]
    plain = re.sub(r"\{\w+\}", " ", " ".join(texts))
    return sorted(set(re.findall(r"[a-z-]+", plain)))


def vocabulary() -> dict[str, tuple[str, ...]]:
    """What can be asked for: the class names by kind, as they are written in captions."""
    return {
        "shape": SHAPES,
        "color": COLORS,
        "pattern": PATTERNS,
        "table": TABLES,
        "background": BACKGROUNDS,
    }


def corpus(n: int, seed: int = 0) -> Iterator[str]:
    """n captions of random training scenes, to train a tokenizer on."""
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    while n > 0:
        spec = sample_specs(min(n, 1024), generator)
        for i in range(len(spec)):
            yield caption(spec, i, rng)
        n -= len(spec)


def held_out(n: int = NUM_HELD_OUT) -> tuple[SceneSpec, list[str]]:
    """The first n <= 32 evaluation scenes (on the CPU) and their captions; never sampled for training."""
    spec = held_out_spec(n)
    return spec, [caption(spec, i, random.Random(i)) for i in range(n)]


def _with_article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun
