"""What may be asked for: pictures of a prompt, a photograph at other levels, a photograph with depth.

Keys, defaults, checks, JSON, flags and replay all derive from the fields below: a further setting is one
field here, and the stage that uses it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

from bokehflux.configs import GROUNDED_SHARE, MAX_SIDE_PX, MAX_STEPS, MAX_TXT_LENGTH, Defaults
from bokehflux.fields import (
    APERTURE,
    CONTROLS,
    FOCI,
    LEVEL,
    LEVELS,
    METHOD,
    NUMBER,
    PAIRS,
    PHOTO_LEVEL,
    PIVOT_STEPS,
    PROBE,
    RENDERER,
    SEED,
    TEXT,
    UNIFY,
    WHOLE,
    Checked,
    random_seed,
    setting,
)
from bokehflux.lens import Unify

DEFAULT_SEED = 65578
DEFAULT_LEVELS = (0.0, 5.0, 10.0, 15.0, 20.0, 25.0, 30.0)
"""Where a command shows the whole dial."""
NEGATIVE_PROMPT = "bad quality, low resolution"
"""What the second pass steers away from when nothing else is said (published)."""
MAX_PROMPT = 20_000
"""Characters; far above what the text encoders read, and small enough for every file format's metadata."""
MAX_GUIDANCE = 1000
"""Far above what makes pictures, and small enough for every dtype."""
PROBE_LEVEL = 28.0
"""The level at which a picture is asked for to see where, and how strongly, it is blurred."""
PROBE_STEPS = 8
"""How many steps that picture takes: it shows blur, not detail."""
LOOKING_STEPS = 2
"""How many steps pictures take that look at the photograph: with more of them errors add up (docs/log.md)."""


SHAPES = (
    "what lights become: disc, polygon:6, polygon:6@15 (turned), donut:0.5, anamorphic:2, cats-eye:0.5, or a "
    "picture's name (default: disc)"
)
"""Help for --aperture."""


def lens_asked(values: Mapping[str, Any]) -> list[str]:
    """Names of the settings among these that ask for a lens."""
    return [name for name in ("focus", "aperture", "highlights") if values.get(name) is not None]


class Numbers(NamedTuple):
    """What a model fills in where nothing was asked for."""

    steps: int
    grounded_steps: int
    height_px: int
    width_px: int


@dataclass(frozen=True, kw_only=True)
class LensSettings(Checked):
    """Pictures at bokeh levels, and the lens that blurs them where a map of their blur is known."""

    bokeh_targets: tuple[float, ...] | None = setting(
        None, LEVELS, metavar="LEVEL", decides=False,
        help="bokeh levels, 0 (all sharp) to 30; without any, generate makes one picture of the plain model, "
             "and sweep and refocus go from 0 to 30 in steps of 5",
    )  # fmt: skip
    focus: tuple[str, ...] | None = setting(
        None, FOCI, metavar="WHAT", sparse=True, decides=False,
        help="what becomes sharp, a picture for each: near, far, a share of the way such as 0.5, a range "
             "0.2-0.6, a point X,Y in pixels, or the plane through three points X,Y/X,Y/X,Y (default: what "
             "is sharp stays so)",
    )  # fmt: skip
    aperture: str | None = setting(None, APERTURE, metavar="SHAPE", sparse=True, help=SHAPES)
    highlights: float | None = setting(
        None, NUMBER, least=1, most=1000, metavar="X", sparse=True,
        help="how many times as bright clipped lights really were (default: as their glow says)",
    )  # fmt: skip
    file_hashes: tuple[tuple[str, str], ...] | None = setting(None, PAIRS, sparse=True)
    """Setting and fingerprint of each file that settings name."""

    @property
    def shots(self) -> list[tuple[float | None, str | None]]:
        """Level and focus of every picture that is asked for, in order. None: the plain model, and the focus
        that the picture has by itself."""
        levels: Sequence[float | None] = self.bokeh_targets or (None,)
        foci: Sequence[str | None] = self.focus or (None,)
        return [(level, focus) for level in levels for focus in foci]


@dataclass(frozen=True, kw_only=True)
class PhotoSettings(LensSettings):
    """A lens in front of a photograph."""

    aperture: str = setting("disc", APERTURE, metavar="SHAPE", help=SHAPES)
    long_side: int = setting(
        2048, WHOLE, least=64, most=MAX_SIDE_PX, metavar="PX",
        help="larger photographs are scaled down to it first (default: %(default)s)",
    )  # fmt: skip
    file_hashes: tuple[tuple[str, str], ...] = setting((), PAIRS)


@dataclass(frozen=True, kw_only=True)
class Prompted(Checked):
    """A base of its own, so that recipes and helps begin with the prompt."""

    prompt: str = setting(dataclasses.MISSING, TEXT, help="what to show", metavar="TEXT")


@dataclass(frozen=True, kw_only=True)
class Settings(LensSettings, Prompted):
    """What was asked of a run, whatever it begins with. None is the model's own value.

    Raises ValueError for values that no model could serve, so that they are found before one is loaded.
    """

    command: ClassVar[str]
    """The one that makes such pictures."""

    bokeh_pivot: float | None = setting(
        None, LEVEL, metavar="LEVEL",
        help="level of a further picture that anchors the scene; 10 to 20 works best (default: generate "
             "none, sweep 15; through a lens 0, which it blurs)",
    )  # fmt: skip
    num_inference_steps: int | None = setting(
        None, WHOLE, least=1, most=MAX_STEPS, metavar="N", help="denoising steps (default: the model's own)"
    )
    num_grounding_steps: int | None = setting(
        None, WHOLE, least=0, most=MAX_STEPS, metavar="N",
        help="steps grounded on the pivot or photograph (default: 80 %%); 0 leaves the pivot out",
    )  # fmt: skip
    guidance_scale: float = setting(
        3.0, NUMBER, least=-MAX_GUIDANCE, most=MAX_GUIDANCE, metavar="X",
        help="distilled guidance, for prompts usually 3 to 6 (default: %(default)s)",
    )  # fmt: skip
    height: int | None = setting(
        None, WHOLE, least=16, most=MAX_SIDE_PX, metavar="PX",
        help="pixels, floored to a multiple of 16 (default: the model's own; refocus keeps the photograph's "
             "shape)",
    )  # fmt: skip
    width: int | None = setting(
        None, WHOLE, least=16, most=MAX_SIDE_PX, metavar="PX",
        help="pixels, floored to a multiple of 16 (default: as for --height)",
    )  # fmt: skip
    max_sequence_length: int | None = setting(
        None, WHOLE, least=1, most=MAX_TXT_LENGTH, metavar="N", sparse=True,
        help="T5 tokens that the prompt is padded or cut to (default: the model's own; dev 512, schnell 256)",
    )  # fmt: skip

    reuse: int | None = setting(
        None, WHOLE, least=2, most=MAX_STEPS, metavar="N", sparse=True,
        help="compute the targets only every Nth step, and follow the pivot between: faster, and slightly "
             "different pictures (default: off; 3 is a good choice)",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in vars(self).items():
            if isinstance(value, str) and len(value) > MAX_PROMPT:
                raise ValueError(f"{name} has {len(value)} characters, more than the {MAX_PROMPT} allowed")
            if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
                raise ValueError(f"{name} is not valid Unicode: your terminal may use another encoding")
        if self.bokeh_pivot is not None and self.bokeh_targets is None:
            raise ValueError("bokeh_pivot needs bokeh_targets: a pivot anchors pictures at other levels")
        if self.num_grounding_steps and self.bokeh_pivot is None:
            raise ValueError("num_grounding_steps needs bokeh_pivot: grounding anchors targets on a pivot")
        if self.reuse is not None and not self.makes_pivot:
            raise ValueError(
                "reuse needs a grounded run, whose pivot the targets follow between computed steps: give "
                "bokeh_pivot, and at least one grounded step"
            )
        self._check_grounding()

    def completed(self, defaults: Defaults) -> Self:
        """The same settings with the model's own steps and size filled in."""
        steps = self.num_inference_steps or defaults.num_inference_steps
        grounded = self.num_grounding_steps
        return dataclasses.replace(
            self,
            num_inference_steps=steps,
            num_grounding_steps=self._default_grounding(steps) if grounded is None else grounded,
            height=(self.height or defaults.height_px) // 16 * 16,
            width=(self.width or defaults.width_px) // 16 * 16,
        )

    @property
    def title(self) -> str:
        return self.prompt

    @property
    def summary(self) -> str:
        """How it was made, for the foot of a sheet."""
        grounded = f", {self.num_grounding_steps} grounded" if self.makes_pivot else ""
        reuse = f", reuse {self.reuse}" if self.reuse else ""
        return f"{self.num_inference_steps} steps{grounded}{reuse} \u00b7 guidance {self.guidance_scale:g}"

    def numbers(self) -> Numbers:
        """The numbers of completed settings."""
        steps, grounded, height, width = (
            self.num_inference_steps, self.num_grounding_steps, self.height, self.width,
        )  # fmt: skip
        assert steps is not None and grounded is not None and height is not None and width is not None
        return Numbers(steps, grounded, height, width)

    def with_open_grounding(self) -> Self:
        """The same settings, the grounded steps left open where they are what the default gives, so that
        they follow a pivot or a number of steps that is changed."""
        steps = self.num_inference_steps
        if steps is not None and self.num_grounding_steps == self._default_grounding(steps):
            return dataclasses.replace(self, num_grounding_steps=None)
        return self

    @property
    def makes_pivot(self) -> bool:
        """Whether the run is grounded, so that its pivot is computed beside the targets."""
        return self.bokeh_pivot is not None and self.num_grounding_steps != 0

    @property
    def shows_pivot(self) -> bool:
        """Whether its pivot is a picture of the result."""
        return self.makes_pivot

    @property
    def through_lens(self) -> bool:
        """Whether a lens blurs one sharp picture, where the model would draw every level."""
        return self.aperture is not None

    @property
    def num_rows(self) -> int:
        """Pictures that the model draws, the pivot included: through a lens two, whatever is asked for."""
        return 2 if self.through_lens else len(self.shots) + self.makes_pivot

    @property
    def num_pictures(self) -> int:
        """Pictures of the result, the pivot included."""
        return len(self.shots) + self.shows_pivot

    @property
    def num_prompts(self) -> int:
        """Prompts that are encoded."""
        return 1

    def _default_grounding(self, steps: int) -> int:
        return 0 if self.bokeh_pivot is None else round(GROUNDED_SHARE * steps)

    def _check_grounding(self) -> None:
        steps, grounded = self.num_inference_steps, self.num_grounding_steps
        if steps is not None and grounded is not None and grounded > steps:
            raise ValueError(f"num_grounding_steps must be at most the {steps} steps, got {grounded}")


@dataclass(frozen=True, kw_only=True)
class GenerateSettings(Settings):
    """Pictures of a prompt, from noise."""

    command: ClassVar = "generate"

    true_cfg: float = setting(
        1.0, NUMBER, least=1, most=MAX_GUIDANCE, metavar="X",
        help="above 1, each step has a second pass that steers away from --negative-prompt (default: off)",
    )  # fmt: skip
    negative_prompt: str = setting(NEGATIVE_PROMPT, TEXT, metavar="TEXT", help="default: %(default)s")
    seed: int | None = setting(
        DEFAULT_SEED, SEED, least=0, most=2**64 - 1, metavar="N", optional=True,
        help="one seed, size and dtype give one picture; `random` draws one and records it (default: "
             "%(default)s)",
    )  # fmt: skip

    pivot_steps: str | None = setting(
        None, PIVOT_STEPS, metavar="WHICH", sparse=True,
        help="grounded: leave the pivot out once grounding is over, where its own picture is not wanted "
             "(default: all)",
    )  # fmt: skip

    controls: str | None = setting(
        None, CONTROLS, metavar="NAME=VALUE", sparse=True,
        help="more than a level, for models with a control adapter: focus=0.4 (from 0, the subject, to 1), "
             "aperture=donut, map=FILE with the share of the level that each place gets",
    )  # fmt: skip

    def __post_init__(self) -> None:
        lens = lens_asked(vars(self))
        if lens and self.bokeh_targets is None:
            raise ValueError(f"{lens[0]} needs bokeh_targets: a lens blurs a sharp picture to levels")
        if lens:
            object.__setattr__(self, "aperture", "disc" if self.aperture is None else self.aperture)
            object.__setattr__(self, "bokeh_pivot", 0.0 if self.bokeh_pivot is None else self.bokeh_pivot)
        super().__post_init__()
        if self.controls is not None and self.bokeh_targets is None:
            raise ValueError("controls need bokeh_targets: they shape the blur of a level")
        if lens and self.controls is not None:
            raise ValueError(f"{lens[0]} and controls are two ways to one thing: give one of them")
        if lens and (self.bokeh_pivot != 0 or not self.makes_pivot):
            raise ValueError(
                f"{lens[0]} needs a grounded run with bokeh_pivot 0: the lens blurs the pivot, which must be "
                "sharp"
            )
        if lens and self.pivot_steps == "grounded":
            raise ValueError(f"{lens[0]} needs the pivot's picture: leave out pivot_steps grounded")
        if self.pivot_steps == "grounded" and not self.makes_pivot:
            raise ValueError("pivot_steps grounded needs a grounded run: give bokeh_pivot")
        if self.pivot_steps == "grounded" and self.reuse is not None:
            raise ValueError("reuse follows the pivot to the end: leave out pivot_steps grounded, or reuse")

    @classmethod
    def from_recipe(cls, recipe: Mapping[str, Any]) -> Self:
        # Early recipes may hold negative seeds, which were taken modulo 2^64.
        seed = recipe.get("seed")
        if type(seed) is int and -(2**63) <= seed < 0:
            recipe = {**recipe, "seed": seed + 2**64}
        return super().from_recipe(recipe)

    def completed(self, defaults: Defaults) -> Self:
        complete = super().completed(defaults)
        return complete if self.seed is not None else dataclasses.replace(complete, seed=random_seed())

    @property
    def shows_pivot(self) -> bool:
        return self.makes_pivot and self.pivot_steps != "grounded"

    @property
    def summary(self) -> str:
        ways = (self.controls, self.aperture if self.through_lens else None)
        blur = "".join(f" \u00b7 {way}" for way in ways if way is not None)
        return f"{super().summary}{blur} \u00b7 seed {self.seed}"

    @property
    def num_prompts(self) -> int:
        return 1 + (self.true_cfg > 1)


@dataclass(frozen=True, kw_only=True)
class RefocusSettings(PhotoSettings, Settings):
    """A photograph at other levels. `bokeh_pivot` is the photograph's own."""

    command: ClassVar = "refocus"

    bokeh_targets: tuple[float, ...] = setting(
        dataclasses.MISSING, LEVELS, metavar="LEVEL", decides=False,
        help="bokeh levels, 0 (all sharp) to 30 (default: 0 to 30 in steps of 5)",
    )  # fmt: skip
    bokeh_pivot: float = setting(
        0.0, PHOTO_LEVEL, flag="photo_level", metavar="LEVEL",
        help="the photograph's own bokeh level, 0 (all sharp) to 30, or auto: from its EXIF data (default: "
             "%(default)s)",
    )  # fmt: skip
    guidance_scale: float = setting(
        1.0, NUMBER, least=-MAX_GUIDANCE, most=MAX_GUIDANCE, metavar="X",
        help="distilled guidance; at 1 the photograph is kept best, more pulls towards the prompt "
             "(default: %(default)s)",
    )  # fmt: skip
    method: str = setting(
        "render", METHOD, metavar="NAME",
        help="render: ask the model once for strong blur, and blur the photograph itself as it shows; "
             "inversion: let the model draw every level, as it must for less blur; reference: the same, by a "
             "model that was trained to look at the photograph (default: %(default)s)",
    )  # fmt: skip
    probe: str | None = setting(
        None, PROBE, metavar="NAME", sparse=True,
        help="how method render asks for strong blur: straight, beside the photograph on a straight path to "
             "noise, or reference, by a model that looks at it (default: reference where the model can)",
    )  # fmt: skip
    photo: str | None = setting(None, TEXT)
    """The photograph's file name; None where it came from no file."""
    photo_hash: str | None = setting(None, TEXT)
    """The fingerprint of its file."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.height is None) != (self.width is None):
            raise ValueError("give both height and width, or neither for the photograph's own shape")
        if self.looks and (self.num_grounding_steps or self.reuse is not None):
            raise ValueError(
                "num_grounding_steps and reuse are for paths to noise, and a reference takes none"
            )
        if self.method != "render":
            if self.probe is not None:
                raise ValueError("probe needs method render: the others ask for no map of blur")
            fields = self.fields()
            for name in ("focus", "aperture", "highlights", "long_side"):
                if getattr(self, name) != fields[name].default:
                    raise ValueError(f"{name} needs method render: a lens blurs there")
            return
        least = min(self.bokeh_targets)
        if least < self.bokeh_pivot:
            raise ValueError(
                f"level {least:g} is below the photograph's {self.bokeh_pivot:g}: only methods "
                "inversion and reference lessen blur"
            )
        if self.bokeh_pivot >= PROBE_LEVEL:
            raise ValueError(f"method render needs a photograph below level {PROBE_LEVEL:g}")
        if self.reuse is not None:
            raise ValueError("reuse is for method inversion: method render asks the model for one picture")

    @classmethod
    def from_recipe(cls, recipe: Mapping[str, Any]) -> Self:
        # Early recipes name no method, and then no probe.
        recipe = {"method": "inversion", **recipe}
        return super().from_recipe({"probe": "straight" if recipe["method"] == "render" else None, **recipe})

    def completed(self, defaults: Defaults) -> Self:
        usual = LOOKING_STEPS if self.looks else PROBE_STEPS if self.method == "render" else None
        steps = self.num_inference_steps or usual
        return super(RefocusSettings, dataclasses.replace(self, num_inference_steps=steps)).completed(
            defaults
        )

    @property
    def through_lens(self) -> bool:
        return self.method == "render"

    @property
    def num_rows(self) -> int:
        return super().num_rows + (self.looks and not self.through_lens)

    @property
    def looks(self) -> bool:
        """Whether the model looks at the photograph, by its reference adapter."""
        return "reference" in (self.method, self.probe)

    def _default_grounding(self, steps: int) -> int:
        if self.looks:
            return 0
        return steps if self.method == "render" else super()._default_grounding(steps)

    @property
    def summary(self) -> str:
        return f"{super().summary} \u00b7 from {self.photo}"


@dataclass(frozen=True, kw_only=True)
class RenderSettings(PhotoSettings):
    """A photograph with depth, blurred at levels. Files are named as they were given."""

    command: ClassVar = "render"

    bokeh_targets: tuple[float, ...] | None = setting(
        None, LEVELS, metavar="LEVEL",
        help="bokeh levels, 0 (all sharp) to 30 (default: the photograph's own by its EXIF data, else 0 to "
             "30 in steps of 5)",
    )  # fmt: skip
    focus: tuple[str, ...] = setting(
        ("mask",), FOCI, metavar="WHAT",
        help="what is sharp, a picture for each: mask, a distance 2.5m, a range 2m-4m, near, far, a share of "
             "the way such as 0.5, a point X,Y in pixels, or the plane through three points X,Y/X,Y/X,Y "
             "(default: mask)",
    )  # fmt: skip
    highlights: float = setting(
        1.0, NUMBER, least=1, most=1000, metavar="X",
        help="how many times as bright clipped lights really were (default: %(default)s, as they are)",
    )  # fmt: skip
    photo: str = setting(dataclasses.MISSING, TEXT)
    depth: str = setting(
        dataclasses.MISSING, TEXT, metavar="FILE",
        help="distance of every pixel: metres in a .npy or .npz, or millimetres in a 16-bit .png",
    )  # fmt: skip
    mask: str | None = setting(
        None, TEXT, metavar="FILE",
        help="where the subject is: a .png, .npy or .npz; a soft one parts its rim from what lies behind",
    )  # fmt: skip
    unify: Unify = setting(
        "raw", UNIFY, metavar="MEANING",
        help="what a level multiplies: raw, disparity in 1/m as levels of photographs do, or range, "
             "disparity over the picture's depth (default: %(default)s)",
    )  # fmt: skip
    renderer: str = setting(
        "layers", RENDERER, metavar="NAME",
        help="layers; bokehme, which needs --arnet and --iunet; or scatter, bokehme without them "
             "(default: %(default)s)",
    )  # fmt: skip
    arnet: str | None = setting(None, TEXT, metavar="FILE", sparse=True, help="BokehMe's first network")
    iunet: str | None = setting(None, TEXT, metavar="FILE", sparse=True, help="BokehMe's second network")

    @property
    def title(self) -> str:
        return self.photo.replace("\\", "/").rpartition("/")[2]

    @property
    def summary(self) -> str:
        return f"focus {', '.join(self.focus)} \u00b7 {self.aperture} \u00b7 {self.renderer}"
