"""Judge a model, or renew the bundled model's card.

    python -m bokehflux.evaluation nano [--captions 4]
    python -m bokehflux.evaluation refocus
    python -m bokehflux.evaluation pairs FOLDER
    python -m bokehflux.evaluation shortcuts
    python -m bokehflux.evaluation controls
    python -m bokehflux.evaluation ablation --processes 7
    python -m bokehflux.evaluation card

`nano` takes minutes with four captions on a CPU; with few, its means are noisier. All 32 suit a GPU. `pairs`
reads the folders of EBB!, RealBokeh and RealDOF, or `sharp` and `blurred` of your own. `card` writes what
`nano` and `controls` found, and the logs of training, into weights/nano/README.md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import bokehflux
from bokehflux.evaluation import ablation, card, controls, nano, pairs, refocus, shortcuts
from bokehflux.evaluation.figures import CURVE
from bokehflux.evaluation.perceptual import HubPerceptual
from bokehflux.evaluation.report import commit, replace_between
from bokehflux.pipeline.pipeline import Pipeline
from bokehflux.pipeline.provenance import device_name
from bokehflux.weights.files.write import replacing, write_json

RESULTS = Path("benchmarks/results")
CARD = Path("weights/nano")
METHODS = ("render", "inversion", "reference")
FIGURES = ("<!-- figures: written by bokehflux.evaluation -->", "<!-- end of figures -->")
TRAINING = ("<!-- training: written by bokehflux.evaluation -->", "<!-- end of training -->")


def main(argv: Sequence[str] | None = None) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="bokehflux.evaluation", description=__doc__, formatter_class=formatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    judging = commands.add_parser("nano", help="what nano must show on captions kept out of its training")
    judging.add_argument("--guidance", type=float, default=3.0)
    refocusing = commands.add_parser("refocus", help="how well photographs are refocused")
    refocusing.add_argument("--photo-level", type=float, default=0.0)
    refocusing.add_argument("--method", choices=METHODS, default="render")
    refocusing.add_argument("--probe", choices=("straight", "reference"), help="how render asks the model")
    refocusing.add_argument("--seed", type=int, default=refocus.SEED, help="of the scenes photographed")
    cutting = commands.add_parser("shortcuts", help="what the shortcuts of a sweep save and change")
    controlling = commands.add_parser("controls", help="what a control adapter must show")
    controlling.add_argument("--guidance", type=float, default=3.0)
    for command, captions, run in (
        (judging, 32, judge_nano), (refocusing, 8, judge_refocus), (cutting, 32, judge_shortcuts),
        (controlling, 32, judge_controls),
    ):  # fmt: skip
        command.set_defaults(run=run)
        command.add_argument("--model", default="nano", help="a bundled model, or a folder with an adapter")
        command.add_argument("--captions", type=int, default=captions, help="how many of the 32")
        steps = None if command is refocusing else 20
        command.add_argument("--steps", type=int, default=steps, help="default: 20, the method's for refocus")
        command.add_argument("--device", help="default: CUDA, MPS or CPU, what there is")
        command.add_argument("--dtype", help="default: the device's usual one")
    pairing = commands.add_parser("pairs", help="how near a model comes to photographs of a wide aperture")
    pairing.add_argument("folder", type=Path, metavar="FOLDER", help="one split of a set, or your own pairs")
    pairing.add_argument("--model", help="a bundled model, or a folder with an adapter; default: none")
    pairing.add_argument("--methods", nargs="+", choices=METHODS, help="of the model; default: render")
    pairing.add_argument("--levels", type=float, nargs="+", default=[*pairs.SEARCHED], help="that are tried")
    pairing.add_argument("--count", type=int, help="of the first pairs; default: all")
    pairing.add_argument("--long-side", type=int, default=1024, help="of the pictures, in pixels")
    pairing.add_argument("--prompt", default="a photograph", help="for all of them; default: %(default)s")
    pairing.add_argument("--perceptual", type=Path, metavar="HUB", help="LPIPS and DISTS, as bokehflux eval")
    pairing.add_argument("--device", help="default: CUDA, MPS or CPU, what there is")
    pairing.add_argument("--dtype", help="default: the device's usual one")
    ablating = commands.add_parser("ablation", help="what each part of an adapter's training is for")
    for flag, usual, about in (
        ("--scenes", 1024, "in groups; twice as many photographs"), ("--steps", 400, "of each training"),
        ("--batch", 64, "rows of a step"), ("--captions", 8, "pictures are made of"),
        ("--processes", 1, "trainings at a time"),
    ):  # fmt: skip
        ablating.add_argument(flag, type=int, default=usual, help=f"{about}; default: %(default)s")
    ablating.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    ablating.add_argument("--arms", nargs="+", choices=ablation.ARMS, default=[*ablation.ARMS])
    ablating.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    ablating.add_argument("--home", type=Path, help="keeps latents and adapters there; default: nowhere")
    writing = commands.add_parser("card", help="renew the generated parts of weights/nano/README.md")
    for command in (judging, cutting, controlling):
        command.add_argument("--check", action="store_true", help="exit with 1 when a target is missed")
    for command in (judging, refocusing, pairing, cutting, controlling, ablating, writing):
        command.add_argument("--results", type=Path, default=RESULTS, help=f"folder; default: {RESULTS}")
    args = parser.parse_args(argv)
    if args.command == "card":
        return write_card(args.results)
    if args.command == "ablation":
        return ablate(args)
    try:
        if args.command == "pairs":
            return judge_pairs(args)
        pipe = bokehflux.load(args.model, device=args.device, dtype=args.dtype)
        args.results.mkdir(parents=True, exist_ok=True)
        return args.run(pipe, args)
    except ValueError as error:
        parser.error(str(error))


def judge_nano(pipe: Pipeline, args: argparse.Namespace) -> int:
    start = time.perf_counter()
    report = nano.evaluate(pipe, captions=args.captions, steps=args.steps, guidance=args.guidance)
    seconds, curves = time.perf_counter() - start, report.curves()
    print(*report.figures, sep="\n")
    rows = [asdict(figure) | {"passed": figure.passed} for figure in report.figures]
    options = {"guidance": args.guidance, "size_px": pipe.defaults.height_px}
    record = made_by(pipe, args, seconds) | options | {"rows": rows, "curves": {"level": CURVE, **curves}}
    write_json(args.results / "nano.json", record)
    save(nano.curve_plot(curves), args.results / "nano-curves.png")
    for source in ("grounded", "unbounded"):
        save(nano.sheet(report, source), args.results / f"nano-{source}.jpg")
    missed = [figure for figure in report.figures if figure.passed is False]
    print(f"{seconds:.0f} s; {len(missed)} targets missed; pictures and nano.json are in {args.results}")
    return 1 if args.check and missed else 0


def judge_refocus(pipe: Pipeline, args: argparse.Namespace) -> int:
    start = time.perf_counter()
    scores, sheet = refocus.evaluate(
        pipe,
        captions=args.captions,
        photo_level=args.photo_level,
        method=args.method,
        probe=args.probe,
        steps=args.steps,
        seed=args.seed,
    )
    print(f"{args.captions} photos, means in dB; sharpness: log variance, less the true; lights: a share")
    print("level   refocused   left as it is   truth through VAE   subject   sharpness   lights")
    for row in scores:
        print(
            f"{row.level:5.0f}{row.psnr:12.1f}{row.photo:16.1f}{row.decoded:20.1f}{row.subject:10.1f}"
            f"{row.sharpness:+12.2f}{row.lights:9.2f}"
        )
    asked = {name: getattr(args, name) for name in ("photo_level", "method", "probe", "seed")}
    record = made_by(pipe, args, time.perf_counter() - start) | asked
    write_json(args.results / "refocus.json", record | {"rows": [asdict(row) for row in scores]})
    save(sheet, args.results / "refocus.jpg")
    return 0


def judge_controls(pipe: Pipeline, args: argparse.Namespace) -> int:
    start = time.perf_counter()
    figures, sheet = controls.evaluate(
        pipe, captions=args.captions, steps=args.steps, guidance=args.guidance
    )  # fmt: skip
    print(*figures, sep="\n")
    rows = [asdict(figure) | {"passed": figure.passed} for figure in figures]
    record = made_by(pipe, args, time.perf_counter() - start) | {"guidance": args.guidance, "rows": rows}
    write_json(args.results / "controls.json", record)
    save(sheet, args.results / "controls.jpg")
    return 1 if args.check and any(figure.passed is False for figure in figures) else 0


def judge_pairs(args: argparse.Namespace) -> int:
    if args.model is None and args.methods:
        raise ValueError("--methods are a model's: name one with --model")
    if args.count is not None and args.count < 1:
        raise ValueError(f"--count: expected at least one pair, got {args.count}")
    start, found = time.perf_counter(), pairs.find_pairs(args.folder)[: args.count]
    perceptual = None if args.perceptual is None else HubPerceptual(args.perceptual)
    pipe = None if args.model is None else bokehflux.load(args.model, device=args.device, dtype=args.dtype)
    asked = {"levels": args.levels, "long_side_px": args.long_side, "prompt": args.prompt}
    methods = (args.methods or ["render"]) if pipe else []
    scores, sheet = pairs.evaluate(found, pipe, methods=methods, perceptual=perceptual, **asked)
    print(f"{len(found)} pairs of {args.folder}, scaled to a long side of {args.long_side}")
    print(pairs.table(scores))
    record = {
        "folder": str(args.folder), "pairs": len(found), "model": args.model,
        "torch": torch.__version__, "commit": commit(), "seconds": round(time.perf_counter() - start, 1),
        "command": f"python -m bokehflux.evaluation {shlex.join(sys.argv[1:])}",
    }  # fmt: skip
    args.results.mkdir(parents=True, exist_ok=True)
    write_json(args.results / "pairs.json", record | asked | {"rows": [asdict(one) for one in scores]})
    save(sheet, args.results / "pairs.jpg")
    return 0


def judge_shortcuts(pipe: Pipeline, args: argparse.Namespace) -> int:
    start = time.perf_counter()
    scores = shortcuts.evaluate(pipe, captions=args.captions, steps=args.steps)
    print("                       rows saved    mean   worst   pivot  LVCorr   scene")
    for one in scores:
        print(f"{one.way:<24}{one.rows_saved:8.0%}{one.psnr:8.1f}{one.worst:8.1f}{one.pivot:8.1f}"
              f"{one.lvcorr:+8.3f}{one.scene:+8.2f}")  # fmt: skip
    record = made_by(pipe, args, time.perf_counter() - start)
    write_json(args.results / "shortcuts.json", record | {"rows": [asdict(one) for one in scores]})
    missed = shortcuts.missed(scores)
    print(*missed, sep="\n")
    return 1 if args.check and missed else 0


def ablate(args: argparse.Namespace) -> int:
    start, device = time.perf_counter(), torch.device(args.device)
    asked = {name: getattr(args, name) for name in ("scenes", "steps", "batch", "captions", "seeds", "arms")}
    with tempfile.TemporaryDirectory() as nowhere:
        found = ablation.evaluate(
            args.home or Path(nowhere), device=device, processes=args.processes, **asked
        )  # fmt: skip
    print(ablation.table(found))
    record = {
        "device": device_name(device),
        "torch": torch.__version__,
        "commit": commit(),
        "command": f"python -m bokehflux.evaluation {shlex.join(sys.argv[1:])}",
        "seconds": round(time.perf_counter() - start, 1),
    }
    args.results.mkdir(parents=True, exist_ok=True)
    write_json(args.results / "ablation.json", record | asked | {"rows": [asdict(one) for one in found]})
    return 0


def made_by(pipe: Pipeline, args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """What a record says besides its figures."""
    return {
        "model": pipe.name,
        "device": device_name(pipe.device),
        "dtype": str(pipe.dtype),
        "torch": torch.__version__,
        "commit": commit(),
        "command": f"python -m bokehflux.evaluation {shlex.join(sys.argv[1:])}",
        "captions": args.captions,
        "steps": args.steps,
        "seconds": round(seconds, 1),
    }


def write_card(results: Path) -> int:
    judged = {judge: results / f"{judge}.json" for judge in ("nano", "controls")}
    tables = [
        card.figures(json.loads(path.read_text(encoding="utf-8")), judge)
        for judge, path in judged.items()
        if judge == "nano" or path.is_file()
    ]
    paths = {name: CARD / "training" / f"{name}.json" for name in card.STAGES}
    logs = {name: json.loads(path.read_text()) for name, path in paths.items() if path.is_file()}
    replace_between(CARD / "README.md", FIGURES, "\n\n".join(tables))
    replace_between(CARD / "README.md", TRAINING, card.stages(logs))
    save(card.curves(logs).quantize(32), CARD / "training.png")
    print(f"written: {CARD / 'README.md'}, {CARD / 'training.png'}")
    return 0


def save(image: Image.Image, path: Path) -> None:
    with replacing(path) as temporary:
        image.save(temporary, {".jpg": "JPEG", ".png": "PNG"}[path.suffix], quality=90, optimize=True)


if __name__ == "__main__":
    sys.exit(main())
