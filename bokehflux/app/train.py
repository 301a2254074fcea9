"""`bokehflux latents` and `bokehflux train`: labelled photographs to latents, and those to an adapter."""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bokehflux.app.processes import group, inside, take_own_gpu
from bokehflux.app.terminal import say, show

if TYPE_CHECKING:
    import torch

SAID_EVERY_S = 10
"""Between two lines about the progress."""


def add_commands(command: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Both commands with their flags. command: makes a parser from name and summary."""
    add_flags(command("train", "train a bokeh adapter from a configuration file"))
    latents = command("latents", "make latents of labelled photographs, which an adapter is trained on")
    # fmt: off
    add = latents.add_argument
    add("place", metavar="PLACE", help="the photographs, as `bokehflux annotate` took them")
    add("--labels", default="labels", metavar="FOLDER", help="their labels (default: %(default)s)")
    add("--model", required=True, metavar="MODEL",
        help="the model to train for, whose autoencoder is used: as for generate")
    add("--output", default="latents", metavar="FOLDER",
        help="folder for `groups` and `photographs` (default: %(default)s)")
    add("--width", type=int, default=512, metavar="PX", help="of training pictures (default: %(default)s)")
    add("--height", type=int, default=512, metavar="PX", help="(default: %(default)s)")
    add("--renders", type=int, default=8, metavar="N",
        help="pictures of a sharp photograph: itself and N - 1 renders (default: %(default)s)")
    add("--sharp-below", type=float, default=1.0, metavar="PX",
        help="a photograph whose largest blur has at most this radius is sharp throughout, unless "
             "something says whether it is (default: %(default)s)")
    add("--flip", action="store_true", help="add the mirror image of everything")
    add("--seed", type=int, default=0, metavar="N", help="of the renders' levels (default: %(default)s)")
    add("--bokehme", nargs=2, metavar="FILE",
        help="BokehMe's arnet and iunet, to mend its scatter as for the published adapter (default: without)")
    _device_flag(latents)
    # fmt: on


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument("--config", required=True, metavar="FILE",
                        help="settings in TOML, the fields of AdapterRecipe; or `flux` or `nano`, which come "
                             "with bokehflux")  # fmt: skip
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="settings to change"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the adapter and its log")
    parser.add_argument("--resume", action="store_true", help="go on from the state that a stopped run left")
    parser.add_argument("--on-full", choices=("wait", "stop"), default="wait",
                        help="what to do where the disk has no room (default: wait)")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="say what the run would take, and stop")
    _device_flag(parser)


def _device_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", metavar="NAME", help="cuda, mps or cpu (default: cuda where there is one, else cpu)"
    )


def _device(name: str | None) -> torch.device:
    """Raises ValueError for one that this machine lacks."""
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch without CUDA
        raise ValueError(f"--device {name} cannot be used: {error}") from error
    return device


def _told(items: Sequence[Any], what: str) -> Iterator[Any]:
    """The items, and now and then a line about how many have been taken."""
    began = said = time.monotonic()
    for done, item in enumerate(items):
        if done and time.monotonic() - said > SAID_EVERY_S:
            said = time.monotonic()
            say(f"{what}: {done} of {len(items)}, {(said - began) / done:.2g} s each")
        yield item


def latents(args: argparse.Namespace) -> int:
    """Latents of labelled photographs; prints their folders, and says what was made of what."""
    import torch

    from bokehflux.photos.labels import labelled
    from bokehflux.photos.readers import open_rows
    from bokehflux.pictures.files import check_folder, replace_file
    from bokehflux.rendering.bokehme_networks import Networks, load_networks
    from bokehflux.training.guard import is_full
    from bokehflux.training.latents import INDEX, SHARDS, write_entries
    from bokehflux.training.prepare import Encoder, Preparation, entries_of, reasons, sort_photographs
    from bokehflux.weights.find.resolve import resolve_model
    from bokehflux.weights.load import load_network
    from bokehflux.weights.networks import VAE

    how = Preparation(
        width_px=args.width, height_px=args.height, renders=args.renders, sharp_px=args.sharp_below,
        flip=args.flip, seed=args.seed,
    )  # fmt: skip
    kinds, left_out = sort_photographs(labelled(open_rows(Path(args.place)), Path(args.labels)), how)
    if not kinds["groups"]:
        raise ValueError(
            f"none of the labelled photographs in {args.place} is sharp throughout and has depth, and groups "
            "are made of such: say so in its .json (suitable_for_synthetic), or raise --sharp-below"
        )
    output, device = Path(args.output), _device(args.device)
    vae = resolve_model(args.model).parts[VAE.name]
    channels = vae.config().latent_channels
    num_bytes = how.num_bytes(channels, {kind: len(rows) for kind, rows in kinds.items()})
    say(
        f"photographs: {len(kinds['groups'])} sharp ones in groups of {how.renders}, "
        f"{len(kinds['photographs'])} others; latents take {num_bytes / 1e9:.3g} GB in {output}"
    )
    # What is finished need not be written again; where it must, a full disk keeps it.
    finished = sum(path.stat().st_size for path in output.glob(f"*/{SHARDS.format('*')}"))
    check_folder(output, max(0, num_bytes - finished))
    networks = None
    if args.bokehme is not None:
        arnet, iunet = load_networks(*map(Path, args.bokehme))
        networks = Networks(arnet.to(device), iunet.to(device))
    encoder = Encoder(load_network(VAE, vae, device=device, dtype=torch.float32), networks)
    for kind, rows in kinds.items():
        if not rows:
            if (output / kind / INDEX).exists():
                raise ValueError(f"no {kind}, but {output / kind} holds those of an earlier run: delete it")
            continue
        refused: dict[str, str] = {}
        entries = entries_of(kind, _told(rows, kind), how, encoder, refused)
        said = f"; what is finished is kept in {output}; the same command goes on"
        try:
            if (first := next(entries, None)) is None:
                why = reasons(refused)[0]
                raise ValueError(f"{kind}: none of {len(rows)} photographs can be used; {why}")
            added, changed = write_entries(output / kind, itertools.chain([first], entries))
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(said) from stop
        except OSError as error:
            if not is_full(error):
                raise
            raise OSError(f"{error}{said} when there is room") from error
        left_out |= refused
        for name in changed:
            say(f"{kind}: {name} has changed, its latents were made again")
        count = (1 + how.flip) * (len(rows) - len(refused))
        say(f"{kind}: {count} scenes, {len(added) + len(changed)} made, the others were there")
    lines = (json.dumps({"key": key, "reason": why}) + "\n" for key, why in left_out.items())
    replace_file(output / "left-out.jsonl", "".join(lines).encode())
    for line in reasons(left_out):
        say(line)
    show(str(output / kind) for kind, rows in kinds.items() if rows)
    return 0


def train(args: argparse.Namespace) -> int:
    """Train and print the adapter's folder, or print the cost. Under torchrun, as one of its processes."""
    from bokehflux.training.recipes.adapter import AdapterRecipe
    from bokehflux.training.recipes.named import NAMED
    from bokehflux.training.recipes.run import dry_run, train_adapter

    out, named = Path(args.output), NAMED.get(args.config)
    if named is None:
        recipe = AdapterRecipe.read(Path(args.config), args.set)
    else:
        recipe = named.changed(args.set)
    if inside():
        take_own_gpu(args)
    device = _device(args.device)
    with group() if inside() else nullcontext():
        # Which finds what is wrong, whether or not it is shown.
        lines = dry_run(recipe, out, device, resume=args.resume)
        if not args.dry_run:
            leads = int(os.environ.get("RANK", 0)) == 0
            logging.getLogger("bokehflux.training").setLevel(logging.INFO if leads else logging.ERROR)
            try:
                train_adapter(recipe, out, device, resume=args.resume, on_full=args.on_full)
            except RuntimeError as error:
                if "peer" not in str(error):  # gloo's word for a process that is gone: the launcher names it
                    raise
                raise SystemExit(1) from error
            lines = [str(out / "adapter")]
        if int(os.environ.get("RANK", 0)) == 0:
            show(lines)
    return 0
