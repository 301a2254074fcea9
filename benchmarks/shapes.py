"""The shapes that benchmarks measure: one registry, named, so that every table speaks of the same work."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """One attention call of FLUX: `num_targets` rows grounded on one pivot, or plain rows."""

    form: str
    """"plain" (rows by themselves), "grounded" (pivot and targets) or "target" (targets, pivot stored)."""
    num_targets: int
    """Grounded rows; for "plain" the number of rows."""
    length: int
    """Joint tokens: 512 of text, and 1024 or 4096 of an image of 512 or 1024 pixels a side."""
    num_heads: int = 24
    head_dim: int = 128

    @property
    def name(self) -> str:
        return f"{self.form}-{self.num_targets}-{self.length}"

    @property
    def product_flop(self) -> float:
        """One L x L x D product over all heads: the unit of an arm's work."""
        return 2.0 * self.num_heads * self.length**2 * self.head_dim


ATTENTION: tuple[AttentionShape, ...] = tuple(
    AttentionShape(form=form, num_targets=number, length=length)
    for length in (1536, 4608)
    for form, number in (
        ("plain", 1), ("plain", 2), ("target", 1),
        ("grounded", 1), ("grounded", 2), ("grounded", 3), ("grounded", 6),
    )
)  # fmt: skip

TOYS: tuple[AttentionShape, ...] = tuple(
    AttentionShape(form=form, num_targets=number, length=40, num_heads=1, head_dim=64)
    for form, number in (("plain", 1), ("target", 1), ("grounded", 1), ("grounded", 2))
)
"""For trying a benchmark where there is no GPU."""
