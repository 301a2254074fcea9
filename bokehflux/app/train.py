"""`bokehflux train`: an adapter from a configuration file, or what that would take."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from bokehflux.app.terminal import show


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument("--config", required=True, metavar="FILE",
                        help="settings in TOML: the fields of AdapterRecipe")  # fmt: skip
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the adapter and its log")
    parser.add_argument("--resume", action="store_true", help="go on from the state that a stopped run left")
    parser.add_argument("--dry-run", action="store_true", help="say what the run would take, and stop")
    parser.add_argument(
        "--device", metavar="NAME", help="cuda, mps or cpu (default: cuda where there is one, else cpu)"
    )


def train(args: argparse.Namespace) -> int:
    """Train and print the adapter's folder, or print the cost. Under torchrun, as one of its processes."""
    from bokehflux.training.recipes.adapter import AdapterRecipe, dry_run, train_adapter

    recipe, out = AdapterRecipe.read(Path(args.config)), Path(args.output)
    import torch

    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch without CUDA
        raise ValueError(f"--device {name} cannot be used: {error}") from error
    if "WORLD_SIZE" in os.environ:
        torch.distributed.init_process_group()
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
    lines = dry_run(recipe, out, resume=args.resume)  # which finds what is wrong, whether or not it is shown
    if not args.dry_run:
        train_adapter(recipe, out, device, resume=args.resume)
        lines = [str(out / "adapter")]
    if int(os.environ.get("RANK", 0)) == 0:
        show(lines)
    return 0
