"""Where the parts of a model are: explicit path, environment, Hugging Face cache, in this order.

1. What was given: a folder in any layout (`layouts.py`), a file and what lies around it, or `ModelFiles`.
2. `BOKEHFLUX_MODELS`: one or more folders of models, separated as in PATH.
3. `FLUX_MODEL` and `FLUX_AE`, files, as BFL's code has them; then the older `FLUX_DEV`, `FLUX_SCHNELL`, `AE`.
4. The Hugging Face cache: `HF_HUB_CACHE`, `HF_HOME`/hub, or ~/.cache/huggingface/hub.

The transformer of a model that was given as a path comes from that path alone; text encoders, autoencoder and
tokenizers, which all FLUX.1 models share, are looked for in the later places as well. There is no network
here: `bokehflux.app.fetch` has it. The environment is read when a function is called.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from .checkpoint import FILE_SUFFIXES, CheckpointError, NotFoundError, holds_checkpoint, read_json
from .layouts import COMFYUI, TOKENIZERS, Candidate, Findings, candidates, scan
from .parts import TRANSFORMER
from .snapshot import Place, Snapshot, complete

BUNDLED = ("nano",)
"""Models that come with the package, as folders beside this file."""
DEV, SCHNELL = "black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell"
ADAPTER_REPO = "atfortes/BokehDiffusion"
NAMES = {
    "FLUX.1-dev": DEV, "flux-dev": DEV, "flux1-dev": DEV,
    "FLUX.1-schnell": SCHNELL, "flux-schnell": SCHNELL, "flux1-schnell": SCHNELL,
}  # fmt: skip
"""Short names of repositories."""
GUIDED = {DEV: True, SCHNELL: False}
OWN = "BOKEHFLUX_MODELS"
DIFFUSERS = "FluxTransformer2DModel"
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_ADVICE = (
    "get what is missing with `bokehflux fetch`, or from https://huggingface.co/black-forest-labs/FLUX.1-dev",
    "docs/files.md says which file goes where",
)
Env = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """A model given part by part; None: take the transformer's own, or look for it in the places above."""

    transformer: str | Path
    """A file in any precision, or anything else that names a model."""
    vae: Path | None = None
    clip: Path | None = None
    t5: Path | None = None
    tokenizers: Path | None = None
    """Folder that holds `tokenizer/` and `tokenizer_2/`, as a snapshot does."""

    def __str__(self) -> str:
        return " + ".join(str(path) for path in vars(self).values() if path is not None)


def resolve_model(model: str | Path | ModelFiles, env: Env | None = None) -> Snapshot:
    """Every part of a model.

    model: a path, a repository id such as "black-forest-labs/FLUX.1-dev", its short name, or `ModelFiles`.
    env: stands in for the environment. Raises NotFoundError that names every place looked at.
    """
    env = os.environ if env is None else env
    failure = f"no complete model {model} found; bundled with bokehflux: {', '.join(BUNDLED)}"
    return complete(_places(model, env), failure, _ADVICE)


def resolve_adapter(adapter: str | Path, env: Env | None = None) -> Path:
    """The file or folder of an adapter, given as a path or a repository id such as "atfortes/BokehDiffusion".

    Raises NotFoundError that names every place looked at.
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

    Raises NotFoundError that names every place looked at.
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
    """A path as people write it. A user that does not exist has no home: the name is then taken as it is."""
    return Path(os.path.expanduser(path))


def _home(env: Env) -> Path:
    return Path(env["HOME"]) if env.get("HOME") else Path.home()


def _repo(name: str | Path) -> str | None:
    """The repository that a name means, if it can mean one."""
    text = name.as_posix() if isinstance(name, Path) else name
    return NAMES.get(text) or (text if _REPO.fullmatch(text) else None)


def _model_folders(env: Env) -> list[Path]:
    return [_given(entry) for entry in env.get(OWN, "").split(os.pathsep) if entry]


def _places(model: str | Path | ModelFiles, env: Env) -> Iterator[Place]:
    """Where to look, in order; each is opened when it is reached."""
    repo = None
    if isinstance(model, ModelFiles):
        yield _explicit(model)
        yield from _places(model.transformer, env)
        return
    path = _given(model)
    if path.is_file() or _is_transformer(path):
        yield _file(path)
        yield from _around(path)
    elif path.is_dir():
        yield Place(label=str(path), findings=scan(path))
    else:
        yield Place(label=str(path), findings=None)
        repo = _repo(model)
        if repo is None:
            return
    yield from _own_folders(repo, env)
    yield from _bfl(repo, env)
    for name in dict.fromkeys((repo, DEV, SCHNELL)):
        if name is not None:
            label = f"{hub_cache(env)}, the Hugging Face cache, for {name}"
            folder = cached_snapshot(name, env)
            found = scan(folder) if folder is not None else None
            yield Place(label=label, findings=found, has_model=name == repo)


def _own_folders(repo: str | None, env: Env) -> Iterator[Place]:
    for folder in _model_folders(env):
        if not folder.is_dir():
            raise CheckpointError(folder, f"{OWN} names this folder, which does not exist")
        for name in (repo, repo.split("/")[1]) if repo else ():
            if (folder / name).is_dir():
                yield Place(label=f"{folder / name} ({OWN})", findings=scan(folder / name))
        # A folder of files that are not called after a repository can only tell dev from schnell.
        yield Place(
            label=f"{folder} ({OWN})",
            findings=scan(folder),
            has_model=repo in GUIDED,
            guided=GUIDED.get(repo or ""),
        )


def _bfl(repo: str | None, env: Env) -> Iterator[Place]:
    older = "FLUX_SCHNELL" if repo == SCHNELL else "FLUX_DEV"
    for transformer, autoencoder in (("FLUX_MODEL", "FLUX_AE"), (older, "AE")):
        parts = {}
        for part, name in (("transformer", transformer), ("vae", autoencoder)):
            if not env.get(name):
                continue
            path = _given(env[name])
            if not path.exists():
                raise CheckpointError(path, f"{name} names this file, which does not exist")
            parts[part] = (Candidate(path=path),)
        root = parts["transformer"][0].path.parent if "transformer" in parts else Path()
        found = Findings(root=root, parts=parts) if parts else None
        label = f"{transformer} and {autoencoder} of the environment"
        yield Place(label=label, findings=found, has_model=repo in GUIDED)


def _explicit(files: ModelFiles) -> Place:
    """All but the transformer, whose place is looked at like any model's."""
    given = {"vae": files.vae, "clip": files.clip, "t5": files.t5}
    if files.tokenizers is not None:
        given |= {name: files.tokenizers / folder for name, folder in TOKENIZERS.items()}
    parts = {name: _given(path) for name, path in given.items() if path is not None}
    missing = [f"{name}: {path} does not exist" for name, path in parts.items() if not path.exists()]
    if missing:
        raise CheckpointError("files of the model", *missing)
    found = {name: (Candidate(path=path),) for name, path in parts.items()}
    return Place(label="the given files", findings=Findings(root=Path(), parts=found), has_model=False)


def _file(path: Path) -> Place:
    """A file or component folder as the model: it holds the transformer, or the loader will object."""
    parts = {kind: (candidate,) for kind, candidate in candidates(path)}
    parts[TRANSFORMER.name] = (Candidate(path=path),)
    return Place(label=str(path), findings=Findings(root=path.parent, parts=parts))


def _is_transformer(path: Path) -> bool:
    """Whether a path is the component folder `transformer/` of a snapshot."""
    config = path / "config.json"
    return holds_checkpoint(path) and config.is_file() and read_json(config).get("_class_name") == DIFFUSERS


def _around(path: Path) -> Iterator[Place]:
    """The folder of a file or, when it lies in a ComfyUI tree, the tree."""
    trees = [p.parent for p in path.absolute().parents if p.name in COMFYUI]
    folder = trees[0] if trees else path.absolute().parent
    yield Place(label=str(folder), findings=scan(folder), has_model=False)
