"""Train the bundled model, one command a stage, each under ten minutes on one H100:

    python scripts/train_nano.py vae     --out weights/nano
    python scripts/train_nano.py base    --out weights/nano
    python scripts/train_nano.py base    --out weights/nano --resume
    python scripts/train_nano.py adapter --out weights/nano
    python scripts/train_nano.py reference --out weights/nano
    python scripts/train_nano.py controls --out weights/nano

Every stage reads what the earlier ones wrote to --out and adds its own files in the official layout, with a
log of its curve under training/. Hyper-parameters and seeds are `NANO` and `RESUMED` of
`bokehflux.nano.recipe`; the stages are `bokehflux.nano.train`.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch

from bokehflux.nano.recipe import NANO, RESUMED
from bokehflux.nano.train import Run
from bokehflux.training.log import Log


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=["vae", "base", "adapter", "reference", "controls"])
    parser.add_argument("--out", type=Path, required=True, help="snapshot folder to read from and add to")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--resume", action="store_true", help="base: go on from the weights in --out, not from chance"
    )
    parser.add_argument(
        "--save-every", type=int, metavar="STEPS", help="keep the run's state, to --continue it after a stop"
    )
    parser.add_argument(
        "--continue", dest="go_on", action="store_true", help="go on with the run whose state was kept"
    )
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=VALUE", help="change a hyper-parameter of the stage"
    )
    args = parser.parse_args()
    if args.resume and args.stage != "base":
        parser.error(f"--resume goes on with the base model; {args.stage} always begins from chance")
    if args.go_on and not args.save_every:
        parser.error("--continue needs --save-every: the run that goes on keeps its state, too")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    torch._dynamo.config.cache_size_limit = 64
    name = {"vae": "autoencoder"}.get(args.stage, args.stage)
    planned = RESUMED if args.resume else getattr(NANO, name)
    name += "-resumed" if args.resume else ""
    Run(
        name=name,
        recipe=NANO,
        stage=override(planned, args.set),
        out=args.out,
        device=torch.device(args.device),
        log=Log(args.out / "training" / f"{name}.json"),
        save_every=args.save_every,
        resume=args.go_on,
    ).train()


def override(stage: Any, settings: list[str]) -> Any:
    """The stage with NAME=VALUE settings applied; exits with one line for what is not such a number."""
    changes: dict[str, int | float] = {}
    fields = {field.name: type(getattr(stage, field.name)) for field in dataclasses.fields(stage)}
    fields = {name: {bool: int}.get(kind, kind) for name, kind in fields.items()}
    for setting in settings:
        key, _, value = setting.partition("=")
        try:
            changes[key] = fields[key](value)
        except (KeyError, ValueError):
            known = ", ".join(f"{name} ({kind.__name__})" for name, kind in fields.items())
            raise SystemExit(f"--set {setting}: expected NAME=VALUE with one of {known}") from None
    return dataclasses.replace(stage, **changes)


if __name__ == "__main__":
    main()
