"""How far full-size FLUX.1-dev with the bokeh adapter strays from its float32 result in bfloat16.

    python -m benchmarks.full_size_error --out DIR

Two arms on the same random weights and inputs, one velocity each: ours, and the published formulation on
diffusers. Both are measured against ours in float32 with the written-out reference attention. Passes when our
error is at most the published one's plus 5 % in every case; the times are for information. Needs diffusers
and, at full size, by estimate 90 GiB of GPU memory; `--tiny` runs a toy of the same shape anywhere.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.networks import randomise
from benchmarks.published import Published, build_published
from bokehflux.attention import AttentionSpec, Grounded, Plain
from bokehflux.configs import FLUX_BOKEH, FLUX_DEV, BokehConfig, MMDiTConfig
from bokehflux.models.bokeh import BokehCondition
from bokehflux.models.embeddings import rope_table
from bokehflux.models.mmdit import MMDiT
from bokehflux.sampling.latents import LatentGrid, position_ids
from bokehflux.weights.write import write_json

DTYPE = torch.bfloat16
# All exact in bfloat16, 1000 x sigma and 1000 x guidance included: the arms get what the reference gets.
SIGMAS = (0.9, 0.3)
GUIDANCE = 4.0
LEVELS = (22.5, 30.0, 7.5)
"""Two targets, then the pivot."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is measured, and how strictly."""

    mmdit: MMDiTConfig
    bokeh: BokehConfig
    sides_px: tuple[int, ...]
    txt_length: int
    limit: float
    """Largest passing ratio of our error to the published one's: 1 plus the noise of the measurement."""


FULL = Setting(mmdit=FLUX_DEV, bokeh=FLUX_BOKEH, sides_px=(512, 1024), txt_length=512, limit=1.05)
TINY = Setting(
    mmdit=MMDiTConfig(
        in_channels=64, txt_dim=48, pooled_dim=32, hidden_size=128, num_heads=4,
        num_double=2, num_single=3, axes_dim=(8, 12, 12), guidance_embed=True,
    ),
    bokeh=BokehConfig(blocks=tuple(range(5)), rank=8, hidden_dim=16, context_dim=32),
    sides_px=(128, 256),
    txt_length=24,
    limit=2.0,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """One batch: three rows that share noise, prompt and noise level, as in a run; exact in bfloat16."""

    img: Tensor
    txt: Tensor
    pooled: Tensor
    sigma: Tensor
    guidance: Tensor
    position_ids: Tensor
    levels: Tensor

    def rows(self, rows: list[int]) -> Inputs:
        """The same with these rows only."""
        picked = ("img", "txt", "pooled", "sigma", "guidance", "levels")
        return dataclasses.replace(self, **{name: getattr(self, name)[rows] for name in picked})


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement: a batch, and the rows of it that both arms predict."""

    name: str
    inputs: Inputs
    rows: list[int]
    grounded: bool


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One arm in one case."""

    case: str
    arm: str
    error: float
    """Norm of the difference from float32 over the norm of the float32 velocity."""
    max_error: float
    """Largest absolute difference."""
    milliseconds: float
    ratio: float
    """Our error over the published one's; 1 for the published arm itself."""
    passed: bool


def build(setting: Setting, device: torch.device, generator: torch.Generator) -> MMDiT:
    """The network in bfloat16, every parameter drawn on the device."""
    with torch.device("meta"):
        mmdit = MMDiT(setting.mmdit, setting.bokeh).to(DTYPE)
    mmdit = mmdit.to_empty(device=device).eval().requires_grad_(False)
    randomise(mmdit, generator)
    return mmdit


def draw_inputs(
    setting: Setting, side_px: int, sigma: float, device: torch.device, generator: torch.Generator
) -> Inputs:
    config, rows = setting.mmdit, len(LEVELS)
    grid = LatentGrid(height_px=side_px, width_px=side_px)

    def shared(*shape: int) -> Tensor:
        one = torch.randn(1, *shape, device=device, dtype=DTYPE, generator=generator)
        return one.repeat(rows, *[1] * len(shape))

    return Inputs(
        img=shared(grid.num_tokens, config.in_channels),
        txt=shared(setting.txt_length, config.txt_dim),
        pooled=shared(config.pooled_dim),
        sigma=torch.full((rows,), sigma, device=device),
        guidance=torch.full((rows,), GUIDANCE, device=device),
        position_ids=position_ids(grid, setting.txt_length, device),
        levels=torch.tensor(LEVELS),
    )


def draw_cases(setting: Setting, device: torch.device, generator: torch.Generator) -> list[Case]:
    cases = []
    for side in setting.sides_px:
        for sigma in SIGMAS:
            inputs = draw_inputs(setting, side, sigma, device, generator)
            name = f"{side} px, sigma {sigma}"
            cases.append(Case(name=f"unbounded, {name}", inputs=inputs, rows=[0], grounded=False))
            cases.append(Case(name=f"grounded, {name}", inputs=inputs, rows=[0, 2], grounded=True))
    return cases


def ours(mmdit: MMDiT, inputs: Inputs, grounded: bool, backend: str = "auto") -> Tensor:
    """The pivot is the last row."""
    rows = len(inputs.img)
    spec: AttentionSpec = Plain(backend=backend)
    if grounded:
        spec = Grounded(pivot_of=(rows - 1,) * rows, backend=backend)
    return mmdit(
        inputs.img.to(mmdit.dtype),
        inputs.txt.to(mmdit.dtype),
        inputs.pooled.to(mmdit.dtype),
        inputs.sigma,
        inputs.guidance,
        rope_table(inputs.position_ids, mmdit.config.axes_dim, mmdit.config.theta),
        spec,
        BokehCondition(levels=inputs.levels),
    )


def published(model: Published, inputs: Inputs, grounded: bool) -> Tensor:
    rows, txt_length = len(inputs.img), inputs.txt.shape[1]
    annotation = (inputs.levels / 30)[:, None].to(inputs.img)
    return model(
        inputs.img,
        inputs.txt,
        inputs.pooled,
        inputs.sigma,
        inputs.guidance,
        inputs.position_ids[:txt_length],
        inputs.position_ids[txt_length:],
        annotation,
        [rows - 1] * rows if grounded else None,
    )


def references(mmdit: MMDiT, cases: Iterable[Case]) -> dict[str, Tensor]:
    """The float32 velocity of every case's rows, on the CPU. Needs room for a second, float32 network."""
    wide = copy.deepcopy(mmdit).float()
    result = {}
    for case in cases:
        velocity = ours(wide, case.inputs.rows(case.rows), case.grounded, backend="reference").cpu()
        if not velocity.isfinite().all():
            raise FloatingPointError(f"the float32 velocity of {case.name!r} is not finite")
        result[case.name] = velocity
    return result


def median_ms(call: Callable[[], Tensor], device: torch.device, warm_up: int = 2, repeats: int = 5) -> float:
    for _ in range(warm_up):
        call()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            call()
            times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times)


def measure(mmdit: MMDiT, model: Published, case: Case, exact: Tensor, limit: float) -> list[Measurement]:
    """Both arms in one case and, where grounded, ours with both targets in one batch, on the pair's rows."""
    few = case.inputs.rows(case.rows)
    every = list(range(len(case.rows)))
    arms: list[tuple[str, Callable[[], Tensor], list[int]]] = [
        ("published", lambda: published(model, few, case.grounded), every),
        ("ours", lambda: ours(mmdit, few, case.grounded), every),
    ]
    if case.grounded:
        arms.append(("ours, 2 targets", lambda: ours(mmdit, case.inputs, True), case.rows))
    result: list[Measurement] = []
    for arm, call, rows in arms:
        difference = call()[rows].cpu().float() - exact
        error = (difference.norm() / exact.norm()).item()
        ratio = error / result[0].error if result else 1.0
        result.append(
            Measurement(
                case=case.name,
                arm=arm,
                error=error,
                max_error=difference.abs().max().item(),
                milliseconds=median_ms(call, few.img.device),
                ratio=ratio,
                passed=ratio <= limit,  # False for NaN
            )
        )
    return result


@torch.inference_mode()
def run(setting: Setting, device: torch.device, seed: int = 0) -> list[Measurement]:
    """Every case of the setting, printed line by line. Turns TF32 off in this process."""
    torch.set_float32_matmul_precision("highest")
    begin = time.perf_counter()

    def log(message: str) -> None:
        print(f"[{time.perf_counter() - begin:6.1f} s] {message}", flush=True)

    generator = torch.Generator(device).manual_seed(seed)
    mmdit = build(setting, device, generator)
    model = build_published(mmdit)
    log(f"built {sum(p.numel() for p in mmdit.parameters()) / 1e9:.3f} billion parameters")
    cases = draw_cases(setting, device, generator)
    exact = references(mmdit, cases)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    log(f"float32 references done, velocity std {', '.join(f'{v.std():.3g}' for v in exact.values())}")

    result = []
    print(f"{'case':<34}{'arm':<17}{'rel. error':>11}{'max error':>11}{'ratio':>8}{'ms':>10}  verdict")
    for case in cases:
        for m in measure(mmdit, model, case, exact[case.name], setting.limit):
            verdict = "pass" if m.passed else "FAIL"
            print(
                f"{m.case:<34}{m.arm:<17}{m.error:>11.3e}{m.max_error:>11.3e}{m.ratio:>8.3f}"
                f"{m.milliseconds:>10.1f}  {verdict}",
                flush=True,
            )
            result.append(m)
    log("done")
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for full_size_error.json")
    parser.add_argument("--tiny", action="store_true", help="a toy of the same shape, for a trial")
    parser.add_argument("--device", type=torch.device, default=None, help="default: cuda if there is one")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    setting = TINY if args.tiny else FULL

    measurements = run(setting, device, args.seed)
    passed = all(m.passed for m in measurements)
    on_gpu = device.type == "cuda"
    report = {
        "passed": passed,
        "setting": dataclasses.asdict(setting),
        "seed": args.seed,
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "torch": torch.__version__,
        "peak_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else None,
        "measurements": [dataclasses.asdict(m) for m in measurements],
    }
    write_json(args.out / "full_size_error.json", report)
    print(f"{'PASSED' if passed else 'FAILED'}: {args.out / 'full_size_error.json'}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
