"""Where the parts of a model are: explicit path, environment, Hugging Face cache, in this order.

1. What was given: a folder in any layout (`layouts.py`), a file and what lies around it, or `ModelFiles`.
2. `BOKEHFLUX_MODELS`: one or more folders of models, separated as in PATH.
3. `FLUX_MODEL` and `FLUX_AE`, files, as BFL's code has them; then the older `FLUX_DEV`, `FLUX_SCHNELL`, `AE`.
4. The Hugging Face cache: `HF_HUB_CACHE`, `HF_HOME`/hub, or ~/.cache/huggingface/hub.
5. For the tokenizers of CLIP-L and T5-XXL: the package.

The transformer of a model that was given as a path comes from that path alone; text encoders, autoencoder and
tokenizers, which all FLUX.1 models share, are looked for in the later places as well. Nothing is downloaded
here (`bokehflux.app.fetch` does that). The environment is read when a function is called.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..files.checkpoint import (
    FILE_SUFFIXES,
    CheckpointError,
    NotFoundError,
    Shelf,
    holds_checkpoint,
    read_json,
)
from ..networks import NETWORKS, TRANSFORMER, VAE
from .layouts import TOKENIZERS, Candidate, Findings, candidates, scan, tree_of
from .snapshot import Place, ScheduleName, Snapshot, complete, open_snapshot

BUNDLED = {"nano": Path(__file__).parents[1] / "nano"}
"""Models that come with the package."""
VOCABULARIES = Path(__file__).parents[1] / "vocabularies"
"""The tokenizers of CLIP-L and T5-XXL, which come with the package (NOTICE)."""
DEV, SCHNELL = "black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell"
ADAPTER_REPO = "atfortes/BokehDiffusion"
NAMES = {
    "FLUX.1-dev": DEV, "flux-dev": DEV, "flux1-dev": DEV,
    "FLUX.1-schnell": SCHNELL, "flux-schnell": SCHNELL, "flux1-schnell": SCHNELL,
}  # fmt: skip
"""Short names of repositories."""
GUIDED = {DEV: True, SCHNELL: False}
OWN = "BOKEHFLUX_MODELS"
TOKENIZERS_KEY = "tokenizers"
REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_ADVICE = (
    "get what is missing with `bokehflux fetch`, or from https://huggingface.co/black-forest-labs/FLUX.1-dev",
    "docs/files.md says which file goes where",
)
Env = Mapping[str, str]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelFiles:
    """A model given part by part. Others are the transformer's own, or are looked for in the places above.

    Raises ValueError for a part that no model has, and without a transformer.
    """

    files: Mapping[str, str | Path]
    """The transformer's may be anything that names a model; those of other networks are files or folders.
    `TOKENIZERS_KEY` stands for the folder that holds the tokenizers' folders, as a snapshot does."""

    def __post_init__(self) -> None:
        known = [*(network.name for network in NETWORKS), TOKENIZERS_KEY]
        if unknown := sorted(set(self.files) - set(known)):
            raise ValueError(f"a model has no part {unknown[0]!r}: expected some of {', '.join(known)}")
        if TRANSFORMER.name not in self.files:
            raise ValueError(f"files of a model need a {TRANSFORMER.name}, got {', '.join(self.files)}")

    def __str__(self) -> str:
        return " + ".join(str(path) for path in self.files.values())


def resolve_model(
    model: str | Path | ModelFiles,
    env: Env | None = None,
    *,
    adapter: str | Path | None = None,
    loras: Sequence[tuple[str | Path, float]] = (),
    schedule: ScheduleName | None = None,
) -> Snapshot:
    """Every part of a model, opened, with the paths of its adapter and LoRAs, found by the functions below.

    model: the name of a bundled one, a path, a repository id such as "black-forest-labs/FLUX.1-dev", its
    short name, or `ModelFiles`. env: stands in for the environment. adapter: None takes the one that the
    model's card names, if any. loras: name and strength of each. schedule: whose schedule, steps and text
    length hold; None: the model's own and, where no file tells, those that its guidance embedding implies,
    which is logged where it is a guess.
    Raises NotFoundError that names every place that was searched.
    """
    env = os.environ if env is None else env
    if isinstance(model, str) and model in BUNDLED:
        snapshot = open_snapshot(BUNDLED[model])
    else:
        failure = f"no complete model {model} found; bundled with bokehflux: {', '.join(BUNDLED)}"
        snapshot = complete(_Search(env).places(model), failure, _ADVICE)
    if schedule is not None:
        snapshot = snapshot.with_schedule(schedule)
    elif snapshot.guessed:
        defaults = snapshot.defaults
        log.warning(
            "%s has no guidance embedding and is taken for schnell: %d steps, no shift, %d T5 tokens. "
            "If it is a dev without distillation, say --schedule dev",
            snapshot.paths[TRANSFORMER.name],
            defaults.num_inference_steps,
            defaults.txt_length,
        )
    if adapter is not None:
        snapshot = snapshot.with_adapter(resolve_adapter(adapter, env))
    return replace(snapshot, loras=tuple((resolve_lora(path, env), strength) for path, strength in loras))


def resolve_adapter(adapter: str | Path, env: Env | None = None) -> Path:
    """The file or folder of an adapter, given as a path or a repository id such as "atfortes/BokehDiffusion".

    Raises NotFoundError that names every place that was searched.
    """
    env = os.environ if env is None else env
    path = _given(adapter)
    if os.path.exists(path):
        return path
    looked = [f"{path}: no such file or folder"]
    if repo := _repo(adapter):
        for folder in _model_folders(env):
            for name in (repo, repo.split("/")[1]):
                if (folder / name).exists():
                    return folder / name
                looked.append(f"{folder / name} ({OWN})")
        cached = cached_snapshot(repo, env)
        if cached is not None:
            return cached
        looked.append(f"{hub_cache(env)} (Hugging Face cache)")
    hint = f"`bokehflux fetch {repo or ADAPTER_REPO}` gets it"
    raise NotFoundError(f"adapter {adapter} not found", *(f"looked at {p}" for p in looked), hint)


def resolve_lora(lora: str | Path, env: Env | None = None) -> Path:
    """A LoRA file: a path, or the name of a file in the `loras` folder of a folder in BOKEHFLUX_MODELS.

    Raises NotFoundError that names every place that was searched.
    """
    env = os.environ if env is None else env
    path = _given(lora)
    if os.path.exists(path):
        return path
    looked = [path]
    for folder in _model_folders(env) if len(path.parts) == 1 else ():
        for home in (folder / "loras", folder / "models" / "loras"):
            for name in (path.name, *(path.name + suffix for suffix in FILE_SUFFIXES)):
                if (home / name).is_file():
                    return home / name
            looked.append(home)
    raise NotFoundError(f"LoRA {lora} not found", *(f"looked at {p}" for p in looked))


def hub_cache(env: Env) -> Path:
    """The folder in which huggingface_hub keeps repositories."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if env.get(name):
            return _given(env[name])
    if env.get("HF_HOME"):
        return _given(env["HF_HOME"]) / "hub"
    base = Path(env["XDG_CACHE_HOME"]) if env.get("XDG_CACHE_HOME") else _home(env) / ".cache"
    return _given(base) / "huggingface" / "hub"


def cached_snapshot(repo: str, env: Env, revision: str = "main") -> Path | None:
    """The folder of a repository in the Hugging Face cache; its files are links into `blobs/`.

    Without a ref of that name (a download by commit) the only snapshot there is is taken.
    """
    base = hub_cache(env) / f"models--{repo.replace('/', '--')}"
    snapshots = base / "snapshots"
    try:
        commit = (base / "refs" / revision).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        there = sorted(p for p in snapshots.iterdir() if p.is_dir()) if snapshots.is_dir() else []
        return there[0] if len(there) == 1 else None
    folder = snapshots / commit
    return folder if re.fullmatch(r"[0-9a-f]{4,64}", commit) and folder.is_dir() else None


def _given(path: str | Path) -> Path:
    """A path as people write it. A user that does not exist has no home: the name is then taken as it is.

    Raises ValueError for an empty one, which would be the folder one is in.
    """
    if path == "":
        raise ValueError("a path of the model is empty: give one, or leave it out")
    return Path(os.path.expanduser(path))


def _home(env: Env) -> Path:
    return Path(env["HOME"]) if env.get("HOME") else Path.home()


def _repo(name: str | Path) -> str | None:
    """The repository that a name means, if it can mean one."""
    text = name.as_posix() if isinstance(name, Path) else name
    return NAMES.get(text) or (text if REPO.fullmatch(text) else None)


def _model_folders(env: Env) -> list[Path]:
    return [_given(entry) for entry in env.get(OWN, "").split(os.pathsep) if entry]


class _Search:
    """One search for the parts of a model."""

    def __init__(self, env: Env) -> None:
        self._env = env
        self._shelf = Shelf()

    def places(self, model: str | Path | ModelFiles) -> Iterator[Place]:
        """Where to look, in order; each is opened when it is reached."""
        env, repo = self._env, None
        if isinstance(model, ModelFiles):
            yield self._explicit(model)
            base = model.files[TRANSFORMER.name]
            yield from self.places(BUNDLED.get(str(base), base))
            return
        path = _given(model)
        if os.path.isfile(path) or _is_transformer(path):
            yield self._file(path)
            yield self._around(path)
        elif os.path.isdir(path):
            yield Place(label=str(path), findings=scan(path, self._shelf))
        else:
            yield Place(label=str(path), findings=None)
            repo = _repo(model)
            if repo is None:
                return
        yield from self._own_folders(repo)
        yield from self._bfl(repo)
        for name in dict.fromkeys((repo, DEV, SCHNELL)):
            if name is not None:
                label = f"{hub_cache(env)}, the Hugging Face cache, for {name}"
                folder = cached_snapshot(name, env)
                found = scan(folder, self._shelf) if folder is not None else None
                yield Place(label=label, findings=found, has_model=name == repo, guided=GUIDED.get(name))
        words = self._found(VOCABULARIES, {row.name: VOCABULARIES / row.folder for row in TOKENIZERS})
        yield Place(label="what comes with bokehflux", findings=words, has_model=False, bundled=True)

    def _explicit(self, model: ModelFiles) -> Place:
        """All but the transformer, whose place is looked at like any model's."""
        paths = {name: _given(path) for name, path in model.files.items() if name != TRANSFORMER.name}
        if (folder := paths.pop(TOKENIZERS_KEY, None)) is not None:
            paths |= {tokenizer.name: folder / tokenizer.folder for tokenizer in TOKENIZERS}
        missing = [f"{name}: {path} does not exist" for name, path in paths.items() if not path.exists()]
        if missing:
            raise CheckpointError("files of the model", *missing)
        return Place(label="the given files", findings=self._found(Path(), paths), has_model=False)

    def _file(self, path: Path) -> Place:
        """A file or component folder as the model: it holds the transformer, or the loader will object."""
        found = self._found(path.parent, {TRANSFORMER.name: path})
        parts = {name: (candidate,) for name, candidate in candidates(path, self._shelf).items()}
        return Place(label=str(path), findings=replace(found, parts={**parts, **found.parts}))

    def _around(self, path: Path) -> Place:
        """The folder of a file or, when it lies in the tree of a program, the tree."""
        folder = tree_of(path) or path.absolute().parent
        return Place(label=str(folder), findings=scan(folder, self._shelf), has_model=False)

    def _own_folders(self, repo: str | None) -> Iterator[Place]:
        guided = GUIDED.get(repo or "")
        for folder in _model_folders(self._env):
            if not folder.is_dir():
                raise CheckpointError(folder, f"{OWN} names this folder, which does not exist")
            for name in (repo, repo.split("/")[1]) if repo else ():
                if (folder / name).is_dir():
                    found = scan(folder / name, self._shelf)
                    yield Place(label=f"{folder / name} ({OWN})", findings=found, guided=guided)
            # A folder of files that are not called after a repository can only tell dev from schnell.
            yield Place(
                label=f"{folder} ({OWN})",
                findings=scan(folder, self._shelf),
                has_model=repo in GUIDED,
                guided=guided,
            )

    def _bfl(self, repo: str | None) -> Iterator[Place]:
        older = "FLUX_SCHNELL" if repo == SCHNELL else "FLUX_DEV"
        for transformer, autoencoder in (("FLUX_MODEL", "FLUX_AE"), (older, "AE")):
            paths = {}
            for network, variable in ((TRANSFORMER, transformer), (VAE, autoencoder)):
                if not self._env.get(variable):
                    continue
                path = _given(self._env[variable])
                if not path.exists():
                    raise CheckpointError(path, f"{variable} names this file, which does not exist")
                paths[network.name] = path
            root = paths[TRANSFORMER.name].parent if TRANSFORMER.name in paths else Path()
            found = self._found(root, paths) if paths else None
            label = f"{transformer} and {autoencoder} of the environment"
            yield Place(label=label, findings=found, has_model=repo in GUIDED, guided=GUIDED.get(repo or ""))

    def _found(self, root: Path, paths: Mapping[str, Path]) -> Findings:
        """What was named by its path."""
        parts = {name: (Candidate(path=path, shelf=self._shelf),) for name, path in paths.items()}
        return Findings(root=root, parts=parts)


def _is_transformer(path: Path) -> bool:
    """Whether a path is the component folder `transformer/` of a snapshot."""
    config, (_, ours) = path / "config.json", TRANSFORMER.official
    return holds_checkpoint(path) and config.is_file() and read_json(config).get("_class_name") == ours
