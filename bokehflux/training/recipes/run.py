"""The run of an adapter recipe: what it needs, what it takes, and its training."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from bokehflux.conditioning import Conditioning
from bokehflux.configs import MMDiTConfig
from bokehflux.models.adapter import BokehAdapter, init_adapter
from bokehflux.models.embeddings import RopeTable, rope_table
from bokehflux.models.mmdit import MMDiT
from bokehflux.pictures.files import check_place
from bokehflux.pipeline.memory import MemoryMode, Placement, place
from bokehflux.pipeline.pipeline import Pipeline
from bokehflux.pipeline.provenance import Source
from bokehflux.sampling.latents import LatentGrid, position_ids
from bokehflux.training.adapter import adapter_loss, row_names, trainable_adapter
from bokehflux.training.distributed import rank_and_world, shard
from bokehflux.training.engine import keep_activations, store_fp8
from bokehflux.training.estimate import estimate
from bokehflux.training.guard import OnFull, with_room
from bokehflux.training.latents import Encode, LatentFolder
from bokehflux.training.log import Log, summary_writer
from bokehflux.training.looks import CONSISTENCY, HELD_OUT, LVCORR, Best, HeldOut, Sheets
from bokehflux.training.loop import Course, Look, train
from bokehflux.training.optim import Optimizer, cosine, prodigy_class
from bokehflux.training.recipes.adapter import AdapterRecipe
from bokehflux.training.state import Saves
from bokehflux.weights.files.checkpoint import CheckpointError
from bokehflux.weights.find.resolve import resolve_adapter, resolve_model
from bokehflux.weights.find.snapshot import Snapshot
from bokehflux.weights.load import Components, load_components, load_network
from bokehflux.weights.networks import CLIP, T5, adapter_for
from bokehflux.weights.save import save_network
from bokehflux.weights.tables.adapter import BOKEHDEPTH, PUBLISHED

RECIPE, STATE = "recipe.toml", "state.safetensors"


def train_adapter(
    recipe: AdapterRecipe,
    out: Path,
    device: torch.device,
    *,
    resume: bool = False,
    on_full: OnFull = "wait",
) -> None:
    """Train, and write `recipe.toml`, the log, and in the end `adapter/` in the recipe's layout to `out`.

    Until then its state is there, from which `resume` goes on; no other run begins over it or an adapter.
    Where torch.distributed is initialised, every process calls this alike.

    The base stays in bfloat16 on a GPU (float32 elsewhere), the adapter and its averages in float32.
    Raises CheckpointError for files that do not fit and for a run that cannot be resumed, ValueError for data
    that does not fit the recipe, for a missing package, and for graphs on another device than a CUDA GPU.
    """
    _check_machine(recipe, device)
    saves = dataclasses.replace(_saves(recipe, out, resume), on_full=on_full)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    if recipe.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def encode(prompts: Sequence[str]) -> Conditioning:
        # As they encode when pictures are made, whatever the loss is computed in.
        with torch.autocast(device.type, enabled=False), placement.phase("text"):
            return parts.text.encode(prompts)

    groups, photographs, held_out = _data(recipe, encode)

    def check(found: Snapshot) -> None:
        check_data(recipe, found.config, groups, photographs, held_out)
        recipe.bokeh(found.config)

    # What does not stay on the device as it is read is never put there.
    home = device if (recipe.memory, recipe.storage) == ("resident", "dtype") else torch.device("cpu")
    parts = load_components(recipe.model, device=home, dtype=dtype, on_found=check)
    mmdit = parts.transformer
    mmdit.bokeh = None  # the card's own; ours stays on the device, whatever the base does
    if recipe.storage == "fp8":
        store_fp8(mmdit, device)
    if recipe.memory == "sharded":
        shard(mmdit, device)
    mode: MemoryMode = "stream" if recipe.memory == "stream" else "resident"
    placement = place(mmdit, parts.text.networks, parts.vae, mode, device)
    mmdit.bokeh = _first_adapter(recipe, mmdit.config).to(device)
    named = trainable_adapter(mmdit)
    keep_activations(mmdit, recipe.activations, compile=recipe.compile)
    optimizer = Optimizer(
        named,
        recipe.lr,
        matrices=list(mmdit.bokeh.adapter_modules.parameters()) if recipe.optimizer == "muon" else (),
        betas=(0.9, 0.999),
        weight_decay=recipe.weight_decay,
        prodigy=recipe.optimizer == "prodigy",
    )
    course = Course(
        seed=recipe.seed,
        batch=recipe.batch,
        steps=recipe.steps,
        schedule=functools.partial(cosine, warmup=recipe.warmup_steps / recipe.steps),
        ema_rate=recipe.ema_rate,
        clip=recipe.clip,
    )
    board = out / "tensorboard" if recipe.tensorboard and rank_and_world()[0] == 0 else None
    log = Log(out / "log.json", every=recipe.log_every, live=True, board=board)
    if rank_and_world()[0] == 0:
        recipe.write(out / RECIPE)
    log.note("recipe", vars(recipe))
    log.note("processes", rank_and_world()[1])
    rope = _rope(parts, groups.grid, device)
    loss = adapter_loss(
        mmdit, rope, recipe, plain=photographs, grouped=groups, record=recipe.graphs, rows=recipe.rows
    )
    looks = _looks(recipe, out, parts, placement, rope, held_out, groups.grid, on_full)
    names = row_names(recipe, photographs, groups)
    with _own_stream(device) if recipe.graphs else contextlib.nullcontext():
        train(loss, optimizer, course, log, saves, looks, names)

    def finish() -> None:
        _write(recipe, mmdit, out / "adapter")
        log.save()

    if rank_and_world()[0] == 0:
        with_room(finish, "the adapter", on_full)
        saves.path.unlink(missing_ok=True)


@contextlib.contextmanager
def _own_stream(device: torch.device) -> Iterator[None]:
    """For graphs: see `engine.Recorded`."""
    own, before = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    own.wait_stream(before)
    with torch.cuda.stream(own):
        yield
    before.wait_stream(own)


def _looks(
    recipe: AdapterRecipe,
    out: Path,
    parts: Components,
    placement: Placement,
    rope: RopeTable,
    held_out: LatentFolder | None,
    grid: LatentGrid,
    on_full: OnFull,
) -> list[Look]:
    mmdit, every = parts.transformer, recipe.look_every
    looks: list[Look] = []
    if held_out is not None:
        rows = recipe.rows or recipe.batch // rank_and_world()[1]
        backend = recipe.backend(rope.cos.device)
        look = HeldOut(every=every, mmdit=mmdit, rope=rope, scenes=held_out, rows=rows, backend=backend)
        looks.append(look)
    if recipe.prompts:
        pipe = Pipeline(
            transformer=mmdit,
            text=parts.text,
            vae=parts.vae,
            schedule=parts.snapshot.schedule,
            defaults=parts.snapshot.defaults,
            source=Source(model=recipe.model),
            memory=placement,
        )
        folder = out / "sheets"
        looks.append(
            Sheets(every=every, pipe=pipe, prompts=recipe.prompts, folder=folder, grid=grid, on_full=on_full)
        )
    figures = {"held-out": (HELD_OUT, True), "LVCorr": (LVCORR, False), "consistency": (CONSISTENCY, False)}
    if recipe.best != "none":
        figure, lowest = figures[recipe.best]
        write = functools.partial(_write, recipe, mmdit, out / "best")
        keep = functools.partial(with_room, write, "the best adapter", on_full)
        looks.append(Best(every=every, figure=figure, lowest=lowest, keep=keep))
    return looks


def _write(recipe: AdapterRecipe, mmdit: MMDiT, folder: Path) -> None:
    """The adapter as it is, by the first process."""
    assert mmdit.bokeh is not None
    if rank_and_world()[0] == 0:
        tensors = {name: t.detach().cpu() for name, t in mmdit.bokeh.state_dict().items()}
        table = BOKEHDEPTH if recipe.layout == "bokehdepth" else PUBLISHED
        save_network(adapter_for(mmdit.config), folder, mmdit.bokeh.config, tensors, table=table)


def _check_machine(recipe: AdapterRecipe, device: torch.device) -> None:
    """Raise ValueError unless the device, processes and packages are there that only some recipes need."""
    if recipe.graphs and device.type != "cuda":
        raise ValueError(f"graphs = true needs a CUDA GPU, the device is {device}: leave graphs out")
    if recipe.memory == "sharded" and rank_and_world()[1] == 1:
        raise ValueError('memory = "sharded" needs several processes: start it with torchrun')
    if recipe.optimizer == "prodigy":
        prodigy_class()
    if recipe.tensorboard:
        summary_writer()


def _saves(recipe: AdapterRecipe, out: Path, resume: bool) -> Saves:
    """Where the run keeps its state. Raises CheckpointError for a folder that holds another run, or none to
    go on with, and ValueError for one that cannot be written to."""
    check_place(out)
    saves = Saves(path=out / STATE, every=recipe.save_every, settings=vars(recipe), resume=resume)
    if resume:
        saves.open()[0].close()
    elif saves.path.exists():
        raise CheckpointError(
            saves.path,
            "a stopped run left it: --resume goes on with that run, without the file one begins anew",
        )
    elif (out / "adapter").exists():
        raise CheckpointError(
            out / "adapter", "an earlier run made it: choose another folder, or move it away"
        )
    return saves


def _first_adapter(recipe: AdapterRecipe, mmdit: MMDiTConfig) -> BokehAdapter:
    """On the CPU, so that one seed means one adapter on every device."""
    if recipe.adapter is not None:
        return load_network(adapter_for(mmdit), resolve_adapter(recipe.adapter), dtype=torch.float32)
    adapter = BokehAdapter(recipe.bokeh(mmdit), mmdit)
    init_adapter(adapter)
    return adapter


def dry_run(recipe: AdapterRecipe, out: Path, device: torch.device, *, resume: bool = False) -> list[str]:
    """What the run would take, a line each. Reads headers, writes nothing, and raises as the run would."""
    _check_machine(recipe, device)
    saves = _saves(recipe, out, resume)
    snapshot = resolve_model(recipe.model)
    snapshot.close()
    groups, photographs, held_out = _data(recipe, _never)
    check_data(recipe, snapshot.config, groups, photographs, held_out)
    bokeh = recipe.bokeh(snapshot.config)
    processes = rank_and_world()[1]
    share, txt_tokens = recipe.batch // processes, snapshot.defaults.txt_length
    rows = min(share, recipe.rows or share)
    cost = estimate(
        snapshot.config,
        bokeh,
        rows=rows,
        txt_tokens=txt_tokens,
        img_tokens=groups.grid.num_tokens,
        activations=recipe.activations,
        narrow=recipe.storage == "fp8",
        streamed=recipe.memory == "stream",
        shards=processes if recipe.memory == "sharded" else 1,
        guided=recipe.max_guidance > 1,
        graphs=recipe.num_patterns(rows) if recipe.graphs else 0,
        moments={"prodigy": 4, "adamw": 2, "muon": 1}[recipe.optimizer],  # muon's matrices; 2 of the others
    )
    free = saves.check_room(cost.state_bytes)
    how = "compiled" if recipe.compile else "if compiled, half as long again as it is"
    text = sum(snapshot.parts[row.name].num_bytes for row in (T5, CLIP))
    encoders = f"text encoders with {_gb(text)} among them"
    if recipe.memory == "stream":
        how, text, encoders = f"{how}, and what streaming takes", 0, "text encoders visit it"
    seconds = cost.seconds * share / rows
    return [
        f"base: {recipe.model}, {cost.base:,} parameters, frozen",
        f"adapter: {cost.trained:,} parameters are trained, rank {recipe.rank} in {len(bokeh.blocks)} blocks",
        f"groups: {groups.num_scenes:,} scenes, {groups.num_renders} pictures each, in {recipe.groups}",
        f"photographs: {photographs.num_scenes:,}, in {recipe.photographs or recipe.groups}; "
        f"{photographs.left_out:,} without a {recipe.unify} level are left out",
        f"size: {groups.grid.width_px} x {groups.grid.height_px} px",
        f"a step: {share} rows of {txt_tokens} text and {groups.grid.num_tokens} image tokens on "
        f"{'one process' if processes == 1 else f'each of {processes} processes'}, {rows} at a time",
        f"disk: {_gb(cost.adapter_bytes + cost.state_bytes)} (adapter {_gb(cost.adapter_bytes)}, state "
        f"{_gb(cost.state_bytes)}); {_gb(free)} are free",
        f"GPU: about {_gb(cost.gpu_bytes + text)}, {encoders}",
        f"time: about {seconds:.3g} s a step, {seconds * recipe.steps / 3600:.3g} h for {recipe.steps:,}, "
        f"on one H100, {how}",
    ]


def _gb(count: int) -> str:
    return f"{count / 1e9:.3g} GB"


def _never(prompts: Sequence[str]) -> Conditioning:
    raise AssertionError("a dry run encodes no text")


def _data(recipe: AdapterRecipe, encode: Encode) -> tuple[LatentFolder, LatentFolder, LatentFolder | None]:
    """Groups, photographs, and what is held out."""
    groups = LatentFolder(Path(recipe.groups), encode, recipe.unify)
    photographs, held_out = (
        None if path is None else LatentFolder(Path(path), encode, recipe.unify)
        for path in (recipe.photographs, recipe.held_out)
    )
    return groups, photographs or groups, held_out


def check_data(
    recipe: AdapterRecipe,
    mmdit: MMDiTConfig,
    groups: LatentFolder,
    photographs: LatentFolder,
    held_out: LatentFolder | None = None,
) -> None:
    """Raise ValueError unless the latents fit the model and each other, the batch groups and processes, and
    the model has a block to ground in."""
    if recipe.first_grounded_block >= mmdit.num_blocks:
        raise ValueError(
            f"first_grounded_block must be below the model's {mmdit.num_blocks} blocks, "
            f"got {recipe.first_grounded_block}"
        )
    if groups.num_renders < recipe.group:
        raise ValueError(
            f"a group takes {recipe.group} renders of a scene, {recipe.groups} has {groups.num_renders}"
        )
    processes = rank_and_world()[1]
    if recipe.batch % (recipe.group * processes):
        raise ValueError(
            f"batch must hold whole groups of {recipe.group} for each of {processes} processes, "
            f"got {recipe.batch}"
        )
    if recipe.rows is not None and recipe.batch // processes % min(recipe.rows, recipe.batch // processes):
        raise ValueError(
            f"rows must divide the {recipe.batch // processes} rows of each process, got {recipe.rows}"
        )
    expected = mmdit.in_channels // 4
    for name, folder in (("groups", groups), ("photographs", photographs), ("held_out", held_out)):
        if folder is None:
            continue
        if folder.channels != expected:
            raise ValueError(
                f"the model takes latents of {expected} channels, got {folder.channels} in {name}"
            )
        if folder.grid != groups.grid:
            raise ValueError(f"groups and {name} differ in size: {groups.grid}, {folder.grid}")


def _rope(parts: Components, grid: LatentGrid, device: torch.device) -> RopeTable:
    ids = position_ids(grid, parts.snapshot.defaults.txt_length, device)
    config = parts.transformer.config
    return rope_table(ids, config.axes_dim, config.theta)
