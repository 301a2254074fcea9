"""What a person asks for: the arguments of `Pipeline.generate` as one value that can be checked, completed,
written into a picture and read back from it.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bokehflux.configs import GROUNDED_SHARE, MAX_SIDE_PX, MAX_STEPS

if TYPE_CHECKING:
    from bokehflux.configs import Defaults
    from bokehflux.pipeline.generate import Pipeline, Result
    from bokehflux.sampling.samplers import OnStep

logger = logging.getLogger(__name__)

DEFAULT_SEED = 65578
DEFAULT_NEGATIVE_PROMPT = "bad quality, low resolution"
MAX_PROMPT = 20_000
"""Characters; far above what the text encoders read, and small enough for every file format's metadata."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One batch. Fields and their meaning are those of `Pipeline.generate`; None is the model's own value.

    Raises ValueError for values that no model could serve, so that they are found before one is loaded.
    """

    prompt: str
    bokeh_targets: tuple[float, ...] | None = None
    bokeh_pivot: float | None = None
    num_inference_steps: int | None = None
    num_grounding_steps: int | None = None
    guidance_scale: float = 3.0
    true_cfg: float = 1.0
    negative_prompt: str = DEFAULT_NEGATIVE_PROMPT
    height: int | None = None
    width: int | None = None
    seed: int = DEFAULT_SEED

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError("the prompt is empty")
        for name in ("prompt", "negative_prompt"):
            if len(text := getattr(self, name)) > MAX_PROMPT:
                raise ValueError(f"{name} has {len(text)} characters, more than the {MAX_PROMPT} allowed")
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise ValueError(f"{name} is no valid Unicode: your terminal may use another encoding")
        levels = [*(self.bokeh_targets or ()), *([] if self.bokeh_pivot is None else [self.bokeh_pivot])]
        for level in levels:
            if not 0 <= level <= 30:
                raise ValueError(f"a bokeh level must be between 0 (all sharp) and 30, got {level:g}")
        if self.bokeh_pivot is not None and self.bokeh_targets is None:
            raise ValueError("bokeh_pivot needs bokeh_targets: a pivot anchors pictures at other levels")
        if self.num_grounding_steps and self.bokeh_pivot is None:
            raise ValueError("num_grounding_steps needs bokeh_pivot: steps are grounded on a pivot")
        if self.num_inference_steps is not None and not 1 <= self.num_inference_steps <= MAX_STEPS:
            raise ValueError(
                f"num_inference_steps must be at least 1 and at most {MAX_STEPS}, "
                f"got {self.num_inference_steps}"
            )
        for name in ("height", "width"):
            side = getattr(self, name)
            if side is not None and not 16 <= side <= MAX_SIDE_PX:
                raise ValueError(f"{name} must be at least 16 and at most {MAX_SIDE_PX} pixels, got {side}")
        for name in ("guidance_scale", "true_cfg"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be a finite number, got {getattr(self, name)}")
        if not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"seed must fit in 64 bits, got {self.seed}")

    @classmethod
    def from_recipe(cls, recipe: Mapping[str, Any]) -> Request:
        """The request inside a picture's recipe. Raises ValueError for missing fields and wrong types."""
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            if field.name not in recipe:
                raise ValueError(f"the recipe lacks {field.name!r}: it was not written by bokehflux")
            value = recipe[field.name]
            if not _fits(str(field.type), value):
                raise ValueError(f"the recipe's {field.name!r} must be {field.type}, got {str(value)[:80]!r}")
            values[field.name] = tuple(value) if isinstance(value, list) else value
        return cls(**values)

    def completed(self, defaults: Defaults) -> Request:
        """The same request with the model's own steps and size filled in, as `generate` will do."""
        steps = self.num_inference_steps or defaults.num_inference_steps
        grounded = self.num_grounding_steps
        if grounded is None:
            grounded = 0 if self.bokeh_pivot is None else round(GROUNDED_SHARE * steps)
        return dataclasses.replace(
            self,
            num_inference_steps=steps,
            num_grounding_steps=grounded,
            height=(self.height or defaults.height_px) // 16 * 16,
            width=(self.width or defaults.width_px) // 16 * 16,
        )

    def run(
        self,
        pipe: Pipeline,
        on_step: OnStep | None = None,
        max_rows: int | None = None,
        vae_tiling: bool | None = None,
    ) -> Result:
        """Make the batch in one go where it fits: out of memory, again with half the rows at a time.

        max_rows: rows to begin with; None is all. vae_tiling: as in `Pipeline.generate`. Raises ValueError as
        that does, and when not even a single row fits.
        """
        rows = len(self.bokeh_targets or (0,)) + (self.bokeh_pivot is not None)
        return with_fewer_rows(lambda some: self._generate(pipe, on_step, some, vae_tiling), rows, max_rows)

    def _generate(
        self, pipe: Pipeline, on_step: OnStep | None, max_rows: int | None, vae_tiling: bool | None
    ) -> Result:
        return pipe.generate(
            self.prompt,
            None if self.bokeh_targets is None else list(self.bokeh_targets),
            bokeh_pivot=self.bokeh_pivot,
            num_inference_steps=self.num_inference_steps,
            num_grounding_steps=self.num_grounding_steps,
            guidance_scale=self.guidance_scale,
            true_cfg=self.true_cfg,
            negative_prompt=self.negative_prompt,
            height=self.height,
            width=self.width,
            seed=self.seed,
            on_step=on_step,
            max_rows=max_rows,
            vae_tiling=vae_tiling,
        )


def with_fewer_rows(run: Callable[[int | None], Result], rows: int, max_rows: int | None) -> Result:
    """run(max_rows), and out of memory again with half as many of `rows` pictures at a time.

    Raises ValueError when not even a single one fits.
    """
    from torch import OutOfMemoryError

    while True:
        try:
            return run(max_rows)
        except (OutOfMemoryError, MemoryError) as error:
            if (max_rows or rows) <= 1:
                raise ValueError(f"even one picture at a time does not fit: {error}") from error
        gc.collect()  # what the attempt has left in cycles
        max_rows = max(1, min(max_rows or rows, rows) // 2)
        logger.warning("out of memory: trying again with %d pictures at a time", max_rows)


def _fits(kind: str, value: object) -> bool:
    """Whether a JSON value has the type of a field, given as its annotation."""
    if value is None:
        return kind.endswith("| None")
    if kind.startswith("tuple"):
        return isinstance(value, list) and len(value) <= 1000 and all(_fits("float", v) for v in value)
    base = kind.removesuffix(" | None")
    if base == "str":
        return isinstance(value, str)
    if base == "int":
        return type(value) is int
    # A whole number may be too large to be a float at all.
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # type: ignore[arg-type]
