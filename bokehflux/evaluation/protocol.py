"""What `bokehflux eval` has a model draw: 20 prompts at 5 levels, as many as the published evaluation.

Which prompts and levels that took is not published; these are ours. nano gets captions of its own world.
"""

from __future__ import annotations

from bokehflux.nano.captions import held_out
from bokehflux.weights.find.resolve import BUNDLED

LEVELS = (0.0, 5.0, 10.0, 20.0, 30.0)
"""None is the pivot's."""
PROMPTS = (
    "a red bicycle leaning against a lamp post on a rainy street at night",
    "a golden retriever sitting on a path in an autumn forest",
    "a cup of coffee on a cafe terrace with a busy square behind it",
    "a woman in a yellow raincoat on a bridge, city lights behind her",
    "a vintage camera on a wooden desk in front of a bookshelf",
    "a sparrow on a branch in front of a garden in bloom",
    "an old man with a white beard at a harbour, boats in the distance",
    "a glass of orange juice on a beach table with the sea behind it",
    "a chess board in a park, trees and walkers further back",
    "a black cat on a windowsill, rooftops behind it at dusk",
    "a bouquet of tulips on a market stall with shoppers in the background",
    "a toy robot on a kitchen counter in front of a lit window",
    "a cyclist waiting at a crossing, neon signs down the street",
    "a bowl of strawberries on a picnic blanket in a meadow",
    "a violin on a chair on the stage of an empty concert hall",
    "a child holding a balloon at a funfair in the evening",
    "a snow-covered pine in front of a mountain village",
    "a stack of books on a park bench, an avenue of trees behind it",
    "a blue teapot on a table in a greenhouse",
    "a lighthouse keeper with a lantern, a rocky coast behind him",
)
"""A subject near by, and something far behind it to be blurred."""


def prompts_for(model: str) -> list[str]:
    """20 prompts that suit a model."""
    return held_out(len(PROMPTS))[1] if model in BUNDLED else list(PROMPTS)
