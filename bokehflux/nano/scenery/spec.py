"""What a scene contains, as class indices: common ground of renderer, captions and metrics."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, fields

import torch

SHAPES = ("ball", "vase", "bottle", "pear", "cone", "mug", "star", "heart", "cube", "donut")
COLORS = ("red", "orange", "yellow", "green", "teal", "blue", "purple", "pink", "white", "black")
PATTERNS = ("plain", "striped", "dotted")
TABLES = ("wooden table", "marble table", "slate table", "checkered tablecloth")
BACKGROUNDS = (
    "city lights at night",
    "green foliage",
    "a brick wall",
    "a bookshelf",
    "a flower meadow",
    "sunset hills",
    "a sunlit sea",
    "string lights",
    "a misty forest",
    "autumn leaves",
)
NUM_HELD_OUT = 32
MAX_MID = 2


@dataclass(frozen=True, kw_only=True)
class SceneSpec:
    """Contents of B scenes: long tensors of indices into the tuples above, all on one device."""

    shape: torch.Tensor
    """[B] subject's shape, into SHAPES."""
    color: torch.Tensor
    """[B] subject's colour, into COLORS."""
    pattern: torch.Tensor
    """[B] subject's pattern, into PATTERNS."""
    table: torch.Tensor
    """[B] what the subject stands on, into TABLES."""
    background: torch.Tensor
    """[B] what is far behind, into BACKGROUNDS."""
    num_mid: torch.Tensor
    """[B] plain objects between subject and background, 0 ... MAX_MID."""
    mid_shape: torch.Tensor
    """[B, MAX_MID] their shapes; entries from num_mid on are ignored."""
    mid_color: torch.Tensor
    """[B, MAX_MID] their colours."""

    def __len__(self) -> int:
        return self.shape.shape[0]

    def to(self, device: torch.device | str) -> SceneSpec:
        return SceneSpec(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def select(self, index: torch.Tensor | slice) -> SceneSpec:
        """The scenes at `index`: long [n], bool [B], or a slice."""
        return SceneSpec(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    @staticmethod
    def cat(specs: list[SceneSpec]) -> SceneSpec:
        return SceneSpec(
            **{f.name: torch.cat([getattr(s, f.name) for s in specs]) for f in fields(SceneSpec)}
        )


def held_out_spec(n: int = NUM_HELD_OUT) -> SceneSpec:
    """The first n <= 32 evaluation scenes, on the CPU; every class occurs as evenly as 32 allows."""
    if not 0 < n <= NUM_HELD_OUT:
        raise ValueError(f"held-out scenes: expected 1 to {NUM_HELD_OUT}, got {n}")
    i = torch.arange(n)
    # Steps coprime to the class counts, plus a slip per round, so that no two classes move in lock-step.
    return SceneSpec(
        shape=(i * 3 + 1) % len(SHAPES),
        color=(i + i // 10 * 3) % len(COLORS),
        pattern=(i + i // 9) % len(PATTERNS),
        table=(i + i // 4) % len(TABLES),
        background=(i * 7 + i // 10 * 4 + 2) % len(BACKGROUNDS),
        num_mid=(i * 2 + i // 5) % (MAX_MID + 1),
        mid_shape=torch.stack([(i * 3 + 5) % len(SHAPES), (i + 2) % len(SHAPES)], 1),
        mid_color=torch.stack([(i + 4) % len(COLORS), (i * 3 + 7) % len(COLORS)], 1),
    )


def is_held_out(spec: SceneSpec) -> torch.Tensor:
    """bool [B]: whether (shape, color, pattern, table, background) is an evaluation combination."""
    return torch.isin(_code(spec), _code(held_out_spec()).to(spec.shape.device))


def sample_specs(
    n: int, generator: torch.Generator, held_out: bool = False, crowded: float = 0.0
) -> SceneSpec:
    """n random scenes on the generator's device; `held_out=True` allows the evaluation combinations too.

    crowded: share of the scenes that certainly hold other objects than the subject.
    """
    device = generator.device

    def index(count: int, *shape: int) -> torch.Tensor:
        return torch.randint(count, (n, *shape), generator=generator, device=device)

    spec = SceneSpec(
        shape=index(len(SHAPES)),
        color=index(len(COLORS)),
        pattern=torch.tensor([0, 0, 1, 2], device=device)[index(4)],
        table=index(len(TABLES)),
        background=index(len(BACKGROUNDS)),
        num_mid=torch.tensor([0, 0, 1, 1, 2], device=device)[index(5)],
        mid_shape=index(len(SHAPES), MAX_MID),
        mid_color=index(len(COLORS), MAX_MID),
    )
    if crowded > 0:
        few = torch.rand(n, generator=generator, device=device) < crowded
        spec = dataclasses.replace(spec, num_mid=torch.where(few, spec.num_mid.clamp(min=1), spec.num_mid))
    if held_out:
        return spec
    clash = is_held_out(spec)
    if not clash.any():
        return spec
    fresh = sample_specs(int(clash.sum()), generator, crowded=crowded)
    return SceneSpec.cat([spec.select(~clash), fresh])


def _code(spec: SceneSpec) -> torch.Tensor:
    code = spec.shape
    for index, names in (
        (spec.color, COLORS),
        (spec.pattern, PATTERNS),
        (spec.table, TABLES),
        (spec.background, BACKGROUNDS),
    ):
        code = code * len(names) + index
    return code
