"""What a person would say of a scene: the captions that `nano` trains on, and the 32 it is judged by."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator

import torch

from .scenery.spec import (
    BACKGROUNDS,
    COLORS,
    MAX_MID,
    NUM_HELD_OUT,
    PATTERNS,
    SHAPES,
    TABLES,
    SceneSpec,
    held_out_spec,
    sample_specs,
)

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


def _words(texts: Iterable[str]) -> set[str]:
    return set(re.findall(r"[a-z-]+", re.sub(r"\{\w+\}", " ", " ".join(texts))))


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


def spec_of(prompt: str) -> SceneSpec | None:
    """The one scene that a caption describes, or None for words that are not a caption of nano's world.

    Objects that a caption does not mention are not there. Order, commas and openings do not matter; a word
    that no caption has makes it another picture's.
    """
    text = " ".join(re.findall(r"[a-z-]+", prompt.lower()))
    tables = [i for i, name in enumerate(TABLES) if name in text]
    backgrounds = [i for i, name in enumerate(BACKGROUNDS) if name.removeprefix("a ") in text]
    for name in (*TABLES, *BACKGROUNDS):
        text = text.replace(name.removeprefix("a "), "")
    thing = rf"\b(?:({'|'.join(PATTERNS[1:])}) )?({'|'.join(COLORS)}) ({'|'.join(SHAPES)})\b"
    things = re.findall(thing, text)
    strange = _words([re.sub(thing, " ", text)]) - _words([*OPENINGS, *SETTINGS, FRAMED, *COMPANY, "a an"])
    if strange or len(tables) != 1 or len(backgrounds) != 1 or not 1 <= len(things) <= 1 + MAX_MID:
        return None
    (pattern, color, shape), *others = things
    mid = [*others, *[("", COLORS[0], SHAPES[0])] * (MAX_MID - len(others))]
    return SceneSpec(
        shape=torch.tensor([SHAPES.index(shape)]),
        color=torch.tensor([COLORS.index(color)]),
        pattern=torch.tensor([PATTERNS.index(pattern or PATTERNS[0])]),
        table=torch.tensor(tables),
        background=torch.tensor(backgrounds),
        num_mid=torch.tensor([len(others)]),
        mid_shape=torch.tensor([[SHAPES.index(one[2]) for one in mid]]),
        mid_color=torch.tensor([[COLORS.index(one[1]) for one in mid]]),
    )


def _with_article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun
