"""A bokeh adapter for a model of FLUX.1's kind, from latents on disk: everything that decides its run."""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from bokehflux.configs import BokehConfig, MMDiTConfig
from bokehflux.lens import Unify
from bokehflux.training.adapter import Sampling
from bokehflux.weights.files.write import replacing
from bokehflux.weights.find.resolve import resolve_adapter
from bokehflux.weights.networks import adapter_for
from bokehflux.weights.parts import open_part


@dataclass(frozen=True, kw_only=True)
class AdapterRecipe(Sampling):
    """Everything that decides a run. It is written beside what it made; a resumed run must have the same."""

    model: str
    """The frozen base: a folder, a file, a repository or a bundled model, as everywhere."""
    groups: str
    """Folder of latents (`training.latents`), of each scene at least as many renders as a group has rows."""
    unify: Unify = "range"
    """What a photograph's level is: "raw", its K in px m, as published; "range", the radius across its whole
    depth, which is what the number means in renders. Scenes without such a level are left out."""
    photographs: str | None = None
    """Folder of latents for the steps of unrelated rows; None takes those of the groups."""
    adapter: str | None = None
    """An adapter to begin with, of the same rank and blocks; None begins with one that does nothing."""
    rank: int = 128
    blocks: tuple[int, ...] | None = None
    """Adapted blocks, counted over double then single blocks; None is all of them, or those of `adapter`."""

    layout: Literal["published", "bokehdepth"] = "published"
    """Names in the adapter's file: those of Bokeh Diffusion, or of BokehDepth. Both are read everywhere."""

    seed: int = 0
    batch: int = 4
    """Rows of a step, over all processes: whole groups on each."""
    steps: int = 20_000
    optimizer: Literal["adamw", "muon", "prodigy"] = "adamw"
    """prodigy (extra `prodigy`) finds the learning rate itself: lr, a factor of it, is then 1."""
    lr: float = 1e-4
    weight_decay: float = 0.01
    warmup_steps: int = 100
    """Steps in which the learning rate grows from 0; then it falls to 0 along a cosine."""
    clip: float = 1.0
    """Largest norm of all gradients together."""
    ema_rate: float = 0.001
    """Share of the weights that a step adds to their moving average, which is what is kept."""

    activations: float = 0.0
    """Share of what blocks compute that is kept for the way back. 0 keeps their inputs only: least memory,
    for half as much time again. 1 keeps everything. Between the two the compiler decides what."""
    compile: bool = False
    """Compile blocks: minutes at first, then about a third less time."""
    graphs: bool = False
    """Record the way there and back as CUDA graphs: for small pictures, which Python launches too slowly.
    Each pattern of grounded rows has gradients of its own."""
    storage: Literal["dtype", "fp8"] = "dtype"
    """fp8 keeps the frozen weights in half the memory, widened where they are used."""
    memory: Literal["resident", "stream", "sharded"] = "resident"
    """Where the frozen weights are. stream: on the host, brought block by block for every pass. sharded: each
    process holds a part, and blocks come together while they run (FSDP2): for several GPUs of one machine."""
    rows: int | None = None
    """Rows that a process takes through the network at a time, whole groups; None is all. Fewer take less
    memory for the same step."""
    save_every: int = 500
    """Steps from one saved state to the next."""
    log_every: int = 50
    """Steps that a point of the curve averages."""
    tensorboard: bool = False
    """Write the curve for TensorBoard, too (extra `train`)."""
    look_every: int = 500
    """Steps from one look at the adapter to the next: the held-out loss and the sheets."""
    held_out: str | None = None
    """Folder of latents that are not trained on, for the loss on them; None takes no such loss."""
    prompts: tuple[str, ...] = ()
    """Each makes a sheet of one scene at several levels, for LVCorr and consistency."""
    best: Literal["none", "held-out", "LVCorr", "consistency"] = "none"
    """The figure by which the best adapter until now is kept in `best/`."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be between 0 and 2^63 - 1, got {self.seed}")
        for name in ("batch", "steps", "rank", "group", "save_every", "log_every", "look_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "clip", "sigma_std", "sigma_shift"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name, least in (
            ("weight_decay", 0), ("noise_offset", 0), ("first_grounded_block", 0), ("max_guidance", 1),
        ):  # fmt: skip
            if not least <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in (
            "grouped",
            "swap_probability",
            "level_dropout",
            "caption_dropout",
            "level_guidance",
            "ema_rate",
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if self.batch % self.group:
            raise ValueError(f"batch must hold whole groups of {self.group}, got {self.batch}")
        if not 0 <= self.warmup_steps < self.steps:
            raise ValueError(f"warmup_steps must be below steps, {self.steps}, got {self.warmup_steps}")
        if not 0 <= self.activations <= 1 or (0 < self.activations < 1 and not self.compile):
            raise ValueError(
                "activations must be 0 or 1, or between them with compile = true, "
                f"got {self.activations} and compile = {str(self.compile).lower()}"
            )
        if self.memory == "stream" and (self.activations or self.compile or self.graphs):
            raise ValueError(
                'memory = "stream" needs activations = 0 without compile and graphs: '
                "a block's weights are there only while it runs"
            )
        if self.optimizer == "prodigy" and not 0.1 <= self.lr <= 10:
            raise ValueError(
                'with optimizer = "prodigy" lr is a factor of the rate that is found, usually 1, and must be '
                f"between 0.1 and 10, got {self.lr}"
            )
        if self.optimizer == "prodigy" and self.memory == "sharded":
            raise ValueError(
                'optimizer = "prodigy" is known to hang under FSDP: leave memory = "sharded" out'
            )
        if self.memory == "sharded" and (self.graphs or self.storage == "fp8"):
            raise ValueError('memory = "sharded" needs storage = "dtype" without graphs')
        if self.memory == "sharded" and (self.held_out is not None or self.prompts):
            raise ValueError('held_out and prompts were not tried with memory = "sharded": leave them out')
        if self.rows is not None and (self.rows < 1 or self.rows % self.group or self.batch % self.rows):
            raise ValueError(
                f"rows must be whole groups of {self.group} and divide batch, {self.batch}, got {self.rows}"
            )
        needed = {"held-out": "held_out", "LVCorr": "prompts", "consistency": "prompts"}.get(self.best)
        if needed is not None and not getattr(self, needed):
            raise ValueError(f'best = "{self.best}" needs {needed}, by which it is measured')
        if not math.isfinite(self.sigma_mean):
            raise ValueError(f"sigma_mean must be finite, got {self.sigma_mean}")
        # What another setting would make a run ignore is refused.
        if self.sigma == "uniform" and (self.sigma_mean, self.sigma_std) != (0, 1):
            raise ValueError('sigma_mean and sigma_std count with sigma = "logit-normal" only')
        if self.level_guidance and self.max_guidance == 1:
            raise ValueError("level_guidance counts with a max_guidance above 1 only")

    @classmethod
    def read(cls, path: Path, changes: Sequence[str] = ()) -> AdapterRecipe:
        """From a TOML file, with changes as `changed` takes them. Raises ValueError as `of`."""
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not a TOML file: {error}") from None
        except OSError as error:
            raise ValueError(f"cannot read settings from {path}: {error.strerror}") from error
        return cls.of(table | _values(changes), str(path))

    def changed(self, changes: Sequence[str]) -> AdapterRecipe:
        """With "NAME=VALUE" for each change, the value as in TOML; text needs no quotes."""
        said = {name: value for name, value in vars(self).items() if value is not None}
        return self.of(said | _values(changes), "--set")

    @classmethod
    def of(cls, table: Mapping[str, Any], where: str) -> AdapterRecipe:
        """From names and values. Raises ValueError with everything that is unknown, missing or of another
        type."""
        hints, fields = typing.get_type_hints(cls), {field.name: field for field in dataclasses.fields(cls)}
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in table.items()}
        problems = [f"unknown setting {name!r}" for name in values if name not in fields]
        problems += [f"there are {', '.join(fields)}"] if problems else []
        problems += [
            f"{name} must be {_said(hints[name])}, got {value!r}"
            for name, value in values.items()
            if name in fields and not _fits(value, hints[name])
        ]
        problems += [
            f"{name} is missing"
            for name, field in fields.items()
            if field.default is dataclasses.MISSING and name not in values
        ]
        if problems:
            raise ValueError(f"{where}: {'; '.join(problems)}")
        return cls(**values)

    def write(self, path: Path) -> None:
        """As a TOML file that `read` reads. JSON's words for text, numbers and lists are TOML's, too."""
        lines = [f"{name} = {json.dumps(value)}" for name, value in vars(self).items() if value is not None]
        with replacing(path) as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def bokeh(self, mmdit: MMDiTConfig) -> BokehConfig:
        """The shape of the adapter. Raises ValueError where the one to begin with is missing or differs."""
        if self.adapter is not None:
            return self._begun(mmdit)
        blocks = tuple(range(mmdit.num_blocks)) if self.blocks is None else self.blocks
        return BokehConfig(blocks=blocks, rank=self.rank)

    def _begun(self, mmdit: MMDiTConfig) -> BokehConfig:
        """From the header of the adapter to begin with."""
        assert self.adapter is not None
        part = open_part(resolve_adapter(self.adapter), adapter_for(mmdit))
        begun = part.config()
        part.checkpoint.close()
        # A rank that the file lacks would be ignored.
        for name, found, asked in (
            ("rank", begun.rank, self.rank),
            ("blocks", list(begun.blocks), list(begun.blocks if self.blocks is None else self.blocks)),
        ):
            if found != asked:
                raise ValueError(
                    f"{name} is {asked}, but the adapter {self.adapter} has {found}: say {found}"
                )
        return begun


def _values(changes: Sequence[str]) -> dict[str, Any]:
    """What "NAME=VALUE" say. Raises ValueError for one without an equals sign."""
    found: dict[str, Any] = {}
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals:
            raise ValueError(f"--set {change}: expected NAME=VALUE")
        try:
            found[name] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            found[name] = value
    return found


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) is types.UnionType:
        return any(_fits(value, option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(type(v) is get_args(hint)[0] for v in value)
    return type(value) is hint or (hint is float and type(value) is int)


def _said(hint: Any) -> str:
    if get_origin(hint) is types.UnionType:
        return _said(get_args(hint)[0])
    if get_origin(hint) is Literal:
        return f"one of {', '.join(get_args(hint))}"
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    lists = {int: "a list of whole numbers", str: "a list of texts"}
    return lists[get_args(hint)[0]] if get_origin(hint) is tuple else words[hint]
