"""Sweeps: prompts x seeds x bokeh levels, a batch per prompt and seed, continued where one stopped.

Each scene has a folder named after its prompt, its seed and a hash of everything that decides its pictures,
the levels apart. So the same command finds its own folder again, and another one never mixes with it. A
picture counts as finished when it can be decoded and the recipe inside it is the one that is wanted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from bokehflux.pictures import metadata
from bokehflux.pictures.credentials import Sign
from bokehflux.pictures.files import check_folder, replace_file, save_pictures, uninterrupted
from bokehflux.pictures.page import scenes_of, write_page
from bokehflux.pictures.series import BLUR_MAP, BlurMap, Scene, Shot
from bokehflux.pictures.sheet import Tile, contact_sheet, up_and_down
from bokehflux.pipeline.controls import with_files
from bokehflux.pipeline.lens import with_hashes
from bokehflux.pipeline.model import Model
from bokehflux.pipeline.provenance import provenance_of
from bokehflux.pipeline.run import Result, Stopped
from bokehflux.record import Record
from bokehflux.settings import DEFAULT_LEVELS, GenerateSettings, lens_asked

logger = logging.getLogger(__name__)

PIVOT = 15.0
PAGE, GRID = "index{}.html", "grid{}.png"
SCENES_PER_PAGE = 20
"""More get further pages: one of a thousand opens in no browser, and its pictures would fill the memory."""
MAX_PROMPTS = 10_000
MAX_PROMPTS_BYTES = 100_000_000


@dataclass(frozen=True, kw_only=True)
class Done:
    """A finished scene on the disk."""

    scene: Scene
    paths: tuple[Path, ...]
    num_kept: int
    """Pictures that were there before."""


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """The settings of each line of a file: a prompt, or a JSON object with "prompt" and other settings.

    Empty lines and those that begin with # are skipped. Raises ValueError, naming file and line.
    """
    try:
        with path.open("rb") as file:  # /dev/zero has no end
            data = file.read(MAX_PROMPTS_BYTES + 1)
        if len(data) > MAX_PROMPTS_BYTES:
            raise ValueError(f"{path} is larger than {MAX_PROMPTS_BYTES} bytes: not a list of prompts")
        # A prompt may hold what Python takes for other ends of lines.
        lines = [line.strip() for line in re.split(r"\r\n|[\r\n]", data.decode("utf-8-sig"))]
    except OSError as error:
        raise ValueError(f"cannot read prompts from {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read prompts from {path}: it is not UTF-8 text") from error
    asked = []
    for number, line in enumerate(lines, 1):
        if line and not line.startswith("#"):
            try:
                asked.append(_line_settings(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
    if not 0 < len(asked) <= MAX_PROMPTS:
        raise ValueError(f"{path} has {len(asked)} prompts, expected 1 to {MAX_PROMPTS}, one a line")
    return list({json.dumps(one, sort_keys=True): one for one in asked}.values())


SHORT = {"levels": "bokeh_targets", "pivot": "bokeh_pivot", "steps": "num_inference_steps"}
"""Short names in a file of prompts; "size" is [width, height] or "768x512"."""


def _line_settings(line: str) -> dict[str, Any]:
    if not line.startswith("{"):
        return {"prompt": line}
    try:
        given = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("it begins with { but is not JSON") from None
    found: dict[str, Any] = {SHORT.get(name, name): value for name, value in given.items()}
    if "size" in found:
        size = found.pop("size")
        try:
            sides = map(int, size.lower().split("x")) if isinstance(size, str) else size
            found["width"], found["height"] = sides
        except (TypeError, ValueError):
            raise ValueError(f'"size" must be [width, height] or "768x512", got {size!r:.80}') from None
    known = [name for name, field in GenerateSettings.fields().items() if field.metadata["help"]]
    if unknown := sorted(set(found) - set(known)):
        raise ValueError(f"unknown settings {', '.join(unknown)}; expected {', '.join(known)}")
    GenerateSettings(**{"prompt": None, "bokeh_targets": DEFAULT_LEVELS, **found})  # type: ignore[arg-type]
    return found


def grid(
    base: GenerateSettings, asked: Sequence[Mapping[str, Any]], seeds: Sequence[int]
) -> list[GenerateSettings]:
    """Settings per line and seed (a line's own seed, if it has one); levels ascending, each once.

    Raises ValueError as the settings do.
    """
    made = []
    for line in asked:
        for seed in [line["seed"]] if "seed" in line else dict.fromkeys(seeds):
            lens = {"bokeh_pivot": None} if lens_asked(line) else {}
            settings = dataclasses.replace(base, **{**lens, **line, "seed": seed})
            levels = tuple(sorted(set(settings.bokeh_targets or DEFAULT_LEVELS)))
            made.append(dataclasses.replace(settings, bokeh_targets=levels))
    return made


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Scenes to be made in one folder."""

    scenes: Sequence[Record]
    """One per prompt and seed, settings completed: how its pictures are to be made."""
    output: Path
    kind: str
    """Format of the pictures."""
    run: Callable[[GenerateSettings], Result]
    sign: Sign | None = None
    """Adds a signature to each picture."""
    part: str = ""
    """Ends the names of page and grid, where several machines share one folder."""

    @classmethod
    def of(
        cls,
        model: Model,
        asked: Sequence[GenerateSettings],
        output: Path,
        kind: str,
        run: Callable[[GenerateSettings], Result],
        sign: Sign | None = None,
        part: str = "",
    ) -> Sweep:
        """The sweep of a model over what was asked for."""
        made_by = provenance_of(model)
        settings = [with_hashes(with_files(model, each.completed(model.defaults))) for each in asked]
        scenes = [Record(settings=each, provenance=made_by) for each in settings]
        return cls(scenes=scenes, output=output, kind=kind, run=run, sign=sign, part=part)

    def made(self) -> Generator[Done, None, None]:
        """Make what is not there yet, scene by scene; ends with the page and, for several scenes, the grid.

        The page is written for the scenes that are finished even when the sweep is stopped, and pictures of
        an unfinished scene are kept. Ctrl-C does not come between the pictures of a scene and its `Done`.
        """
        for number, end in enumerate(self._ends()):
            yield from self._page(self.scenes[number * SCENES_PER_PAGE :][:SCENES_PER_PAGE], end)

    def made_of(self, numbers: Iterable[int]) -> Generator[Done, None, None]:
        """Make some of the scenes, by number, and no page: the others are other processes' work."""
        for number in numbers:
            made = self._make(self.scenes[number])
            with uninterrupted():
                yield made.saved(self.kind, self.sign)

    def write_pages(self) -> None:
        """Pages and grids of the scenes that are finished, from their files."""
        for number, end in enumerate(self._ends()):
            wanted = self.scenes[number * SCENES_PER_PAGE :][:SCENES_PER_PAGE]
            self._write_page([scene for record in wanted if (scene := self._on_disk(record))], end)

    def overviews(self) -> list[Path]:
        """The files that the sweep leaves, or has left, beside the scenes."""
        paths = []
        for number, end in enumerate(self._ends()):
            here = min(SCENES_PER_PAGE, len(self.scenes) - number * SCENES_PER_PAGE)
            paths += [self.output / name.format(end) for name in ([GRID, PAGE] if here > 1 else [PAGE])]
        return paths

    def _page(self, wanted: Sequence[Record], end: str) -> Iterator[Done]:
        """The scenes of one page, and the page."""
        scenes: list[Scene] = []
        try:
            for record in wanted:
                made = self._make(record)
                with uninterrupted():
                    done = made.saved(self.kind, self.sign)
                    scenes.append(done.scene)
                    yield done
        finally:
            self._write_page(scenes, end)

    def _write_page(self, scenes: Sequence[Scene], end: str) -> None:
        if scenes:
            names = [folder_name(scene.record) for scene in scenes]
            write_page(scenes, self.output / PAGE.format(end), names)
        if len(scenes) > 1:
            replace_file(self.output / GRID.format(end), _grid_sheet(scenes, PAGE.format(end)))

    def _on_disk(self, wanted: Record) -> Scene | None:
        """A scene as its files tell it; None where one of them is missing."""
        settings = wanted.settings
        assert isinstance(settings, GenerateSettings)
        shots = finished(self.output / folder_name(wanted), wanted)
        keys: list[Key] = [("target", level, focus) for level, focus in settings.shots]
        keys += [("pivot", settings.bokeh_pivot, None)] if settings.shows_pivot else []
        if not set(keys) <= set(shots):
            return None
        blur_map = found_map(self.output / folder_name(wanted), wanted)
        if settings.through_lens and blur_map is None:
            return None
        found = [shots[key] for key in keys]
        pivot = found.pop() if settings.shows_pivot else None
        scene = self._nothing_new(found[0], settings).merged(found, pivot)
        return dataclasses.replace(scene, blur_map=blur_map)

    def _nothing_new(self, shot: Shot, settings: GenerateSettings) -> Scene:
        """A scene without pictures, made as one that is on the disk."""
        made = Record.from_recipe(metadata.read_recipe(self.output / (shot.file or "")))
        return Scene(record=_of_scene(made, settings), targets=(), pivot=None)

    def _ends(self) -> list[str]:
        """Ends of the pages' names. A page with scenes that this sweep lacks is another sweep's and stays."""
        mine = {folder_name(record) for record in self.scenes}
        num_pages = -(-len(self.scenes) // SCENES_PER_PAGE)
        for count in itertools.count(1):
            run = self.part + ("" if count == 1 else f"-run{count}")
            ends = [run + (f"-{n + 1}" if n else "") for n in range(num_pages)]
            there = [page for end in ends if (page := self.output / PAGE.format(end)).exists()]
            if all((shown := scenes_of(page)) is not None and shown <= mine for page in there):
                return ends
        raise AssertionError("unreachable")

    def _make(self, wanted: Record) -> _Made:
        settings = wanted.settings
        assert isinstance(settings, GenerateSettings)
        folder = self.output / folder_name(wanted)
        check_folder(folder)
        found = finished(folder, wanted)
        old = [found["target", *shot] for shot in settings.shots if ("target", *shot) in found]
        missing = [shot for shot in settings.shots if ("target", *shot) not in found]
        pivot = found.get(("pivot", settings.bokeh_pivot, None)) if settings.shows_pivot else None

        blur_map = found_map(folder, wanted)
        complete = (pivot is not None or not settings.shows_pivot) and (
            blur_map is not None or not settings.through_lens
        )

        def new(result: Result) -> Scene:
            """Without what is there: a lost pivot alone is made again with one level, which is not kept."""
            made = result.scene()
            return dataclasses.replace(
                made,
                record=_of_scene(made.record, settings),
                targets=tuple(shot for shot in made.targets if (shot.level, shot.focus) in missing),
                pivot=None if pivot is not None else made.pivot,
                blur_map=None if blur_map is not None else made.blur_map,
            )

        if not missing and complete:
            fresh = self._nothing_new(old[0], settings)
            return _Made(fresh=fresh, kept=tuple(old), pivot=pivot, blur_map=blur_map, folder=folder)
        levels = dict.fromkeys(level for level, _ in missing or settings.shots[:1] if level is not None)
        try:
            fresh = new(self.run(dataclasses.replace(settings, bokeh_targets=tuple(levels))))
        except Stopped as stop:
            with uninterrupted():
                save_pictures(new(stop.result).pictures(), folder, self.kind, self.sign)
            raise
        return _Made(fresh=fresh, kept=tuple(old), pivot=pivot, blur_map=blur_map, folder=folder)


def folder_name(record: Record) -> str:
    """Readable, safe in every file system, and different for whatever decides the pictures."""
    settings = record.settings
    assert isinstance(settings, GenerateSettings)
    words = re.sub(r"[^a-z0-9]+", "-", settings.prompt.lower()).strip("-")[:40].strip("-") or "picture"
    decided = json.dumps(record.decides(), sort_keys=True)
    return f"{words}-seed{settings.seed}-{hashlib.sha256(decided.encode()).hexdigest()[:8]}"


def _of_scene(made: Record, settings: GenerateSettings) -> Record:
    """What made some pictures, as what made all that a scene is to have, but for their levels."""
    asked = settings.focus
    pulled = made.settings if asked is None else dataclasses.replace(made.settings, focus=asked)
    return dataclasses.replace(made, settings=pulled, role=None, bokeh_level=None, in_focus=None)


Key = tuple[str, float | None, str | None]
"""Role, level and focus of a picture."""


def finished(folder: Path, wanted: Record) -> dict[Key, Shot]:
    """The whole pictures of a folder that were made as `wanted` says."""
    found: dict[Key, Shot] = {}
    decides = wanted.decides()
    for path in sorted(p for p in folder.glob("*bokeh-*") if p.suffix in metadata.SUFFIXES.values()):
        try:
            recipe = metadata.read_recipe(path)
            with Image.open(path, formats=metadata.READABLE) as file:
                image = file.convert("RGB")  # decodes: a truncated file is not finished
        except metadata.UNREADABLE as error:
            logger.warning("%s does not count as finished: %s", path, error)
            continue
        level, focus, role = (recipe.get(name) for name in ("bokeh_level", "in_focus", "role"))
        if role not in ("target", "pivot") or not isinstance(level, int | float):
            continue
        if not isinstance(focus, str | None):  # no run of ours left this
            continue
        if all(key in recipe and recipe[key] == value for key, value in decides.items()):
            place = f"{folder.name}/{path.name}"
            shot = Shot(
                level=float(level),
                focus=focus,
                names_focus=len(wanted.settings.focus or ()) > 1,
                image=image,
                is_pivot=role == "pivot",
                file=place,
            )
            found.setdefault((str(role), float(level), focus), shot)
    return found


def found_map(folder: Path, wanted: Record) -> BlurMap | None:
    """The map of blur of a folder that was made as `wanted` says."""
    decides = wanted.decides()
    for path in sorted(p for p in folder.glob(f"{BLUR_MAP}*") if p.suffix in metadata.SUFFIXES.values()):
        try:
            recipe = metadata.read_recipe(path)
            with Image.open(path, formats=metadata.READABLE) as file:
                image = file.convert("L")
            far, near = map(float, recipe["blur_ends"])
            found = BlurMap(image=image, ends=(far, near), glow=float(recipe["glow"]))
        except metadata.UNREADABLE as error:
            logger.warning("%s does not count as finished: %s", path, error)
            continue
        if all(key in recipe and recipe[key] == value for key, value in decides.items()):
            return found
    return None


@dataclass(frozen=True, kw_only=True)
class _Made:
    """A scene before it is written."""

    fresh: Scene
    """What of it is not on the disk yet; maybe nothing."""
    kept: tuple[Shot, ...]
    """Targets that are."""
    pivot: Shot | None
    """The pivot, if it is."""
    blur_map: BlurMap | None
    """The map of its blur, if it is."""
    folder: Path

    def saved(self, kind: str, sign: Sign | None) -> Done:
        paths = save_pictures(self.fresh.pictures(), self.folder, kind, sign)
        fresh = self.fresh.saved_at([f"{self.folder.name}/{path.name}" for path in paths])
        scene = fresh.merged(self.kept, self.pivot)
        scene = dataclasses.replace(scene, blur_map=fresh.blur_map or self.blur_map)
        num_kept = len(self.kept) + (self.pivot is not None)
        return Done(scene=scene, paths=(*paths, *_views(scene, self.folder)), num_kept=num_kept)


def _views(scene: Scene, folder: Path) -> list[Path]:
    """Sheet and animations: made from the pictures each time, in place of earlier ones."""
    sheet = scene.sheet()
    frames = up_and_down([Tile(image=shot.image, label=shot.label) for shot in scene.targets])
    recipe = scene.record.of("animation").recipe()
    contents = {
        "sheet.png": metadata.encode(sheet.image, sheet.recipe),
        "sweep.gif": metadata.encode_animation(frames, recipe, "gif"),
        "sweep.webp": metadata.encode_animation(frames, recipe, "webp"),
    }
    for name, data in contents.items():
        replace_file(folder / name, data)
    return [folder / name for name in contents]


def _grid_sheet(scenes: Sequence[Scene], page: str) -> bytes:
    """Scenes below each other, levels side by side; numbered as in the page of this name."""
    rows = [scene.tiles() for scene in scenes]
    prompts = {scene.record.settings.title for scene in scenes}
    tiles = [
        dataclasses.replace(tile, label=f"{number}: {tile.label}")
        for number, row in enumerate(rows, 1)
        for tile in row
    ]
    title = prompts.pop() if len(prompts) == 1 else f"{len(prompts)} prompts"
    image = contact_sheet(tiles, title, f"scenes are numbered as in {page}", columns=len(rows[0]))
    recipe = {**scenes[0].record.of("grid").recipe(), "scenes": len(scenes)}
    return metadata.encode(image, recipe)
