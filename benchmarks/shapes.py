"""The shapes that benchmarks measure: one registry, named, so that every table speaks of the same work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Way = Literal["ours", "merged", "published"]
"""Our kernels; two calls of a stock kernel, merged; the published formulation."""


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """One attention call of FLUX: `num_targets` rows grounded on one pivot, or plain rows."""

    form: str
    """"plain" (rows by themselves), "grounded" (pivot and targets) or "target" (targets, pivot stored)."""
    num_targets: int
    """Grounded rows; for "plain" the number of rows."""
    length: int
    """Joint tokens: 512 of text, and 1024 or 4096 of an image of 512 or 1024 pixels a side."""
    num_heads: int
    head_dim: int

    @property
    def checked_heads(self) -> list[int]:
        """Heads whose results are compared with float32."""
        return [head for head in (0, 11, 23) if head < self.num_heads]

    @property
    def name(self) -> str:
        return f"{self.form}-{self.num_targets}-{self.length}"

    def tera_flop(self, way: Way) -> float:
        """Work of a call, in 1e12 operations: L x L x D products over all heads."""
        n = self.num_targets
        products = {
            "plain": {"ours": 2 * n, "merged": 2 * n, "published": 2 * n},
            "target": {"ours": 3 * n, "merged": 4 * n, "published": 4 * n},
            "grounded": {"ours": 3 * n + 1, "merged": 4 * n + 2, "published": 8 * n},
        }[self.form][way]
        return products * 2.0 * self.num_heads * self.length**2 * self.head_dim / 1e12


FORMS = (
    ("plain", 1), ("plain", 2), ("target", 1),
    ("grounded", 1), ("grounded", 2), ("grounded", 3), ("grounded", 6),
)  # fmt: skip
USUAL = (
    "grounded-1-4608", "grounded-6-4608", "plain-1-4608",
    "grounded-1-1536", "grounded-6-1536", "plain-1-1536",
)  # fmt: skip
"""Those that count, most important first."""


def known(tiny: bool) -> dict[str, AttentionShape]:
    """By name. Toys have one small head, and no more than two targets."""
    some = [
        AttentionShape(form=form, num_targets=number, length=length, num_heads=heads, head_dim=dim)
        for length, heads, dim in ([(40, 1, 64)] if tiny else [(1536, 24, 128), (4608, 24, 128)])
        for form, number in FORMS
        if not tiny or (number <= 2 and (form, number) != ("plain", 2))
    ]
    return {shape.name: shape for shape in some}
