"""Names and shapes of every tensor in the official files, so that tables are tested without any weights.

One JSON file each: name -> shape, where `{19}` stands for 0 ... 18 and `{19:57}` for 19 ... 56.
"""

from __future__ import annotations

import json
import re
from importlib import resources
from itertools import product


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    """All tensors of one official file, such as `flux1-dev.bfl` or `t5xxl.hf`."""
    text = resources.files(__package__).joinpath(f"{name}.json").read_text(encoding="utf-8")
    return {name: tuple(shape) for template, shape in json.loads(text).items() for name in _names(template)}


def _names(template: str) -> list[str]:
    literals = re.split(r"\{[\d:]+\}", template)
    ranges = [range(*map(int, numbers.split(":"))) for numbers in re.findall(r"\{([\d:]+)\}", template)]
    names = []
    for numbers in product(*ranges):
        names.append(
            literals[0] + "".join(f"{n}{text}" for n, text in zip(numbers, literals[1:], strict=True))
        )
    return names
