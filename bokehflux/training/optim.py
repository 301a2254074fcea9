"""Optimisers, learning-rate shape and weight averaging shared by all training stages."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn


class Optimizer:
    """Muon for the block matrices, AdamW for everything else, one learning rate for both.

    Muon's update is scaled to the RMS of an AdamW update, so the two share a learning rate.
    """

    def __init__(
        self,
        named: Sequence[tuple[str, nn.Parameter]],
        lr: float,
        *,
        muon: bool,
        betas: tuple[float, float] = (0.9, 0.98),
        weight_decay: float = 0.01,
    ) -> None:
        self.lr = lr
        matrices = [p for n, p in named if muon and is_block_matrix(n, p)]
        chosen = {id(p) for p in matrices}
        others = [p for _, p in named if id(p) not in chosen]
        fused = bool(others) and others[0].is_cuda
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(others, lr=lr, betas=betas, weight_decay=weight_decay, fused=fused)
        ]
        if matrices:
            self.parts.append(
                torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            )

    def step(self, lr_factor: float) -> None:
        """One update at lr * lr_factor, then clear the gradients."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = self.lr * lr_factor
            part.step()
            part.zero_grad(set_to_none=True)


def is_block_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon should update it: a projection inside a transformer block, modulation excepted."""
    return parameter.ndim == 2 and "_blocks." in name and "mod" not in name


def paced(steps: int, minutes: float = 0.0) -> Iterator[tuple[int, float]]:
    """(step, share of the run done) for `steps` steps, or, with minutes above 0, for as long as they last.

    A timed run finds out how many steps a machine affords: repeat it with that number for equal weights.
    """
    if not minutes:
        yield from ((step, step / steps) for step in range(steps))
        return
    start = time.perf_counter()
    step, done = 0, 0.0
    while done < 1:
        yield step, done
        step, done = step + 1, (time.perf_counter() - start) / (60 * minutes)


def trapezoid(done: float, *, warmup: float = 0.03, decay: float = 0.5, floor: float = 0.02) -> float:
    """Learning-rate factor when a share `done` of the run is over.

    Linear warm-up over the first share, flat, linear decay to `floor` over the last.
    """
    return max(floor, min(1.0, done / warmup, (1 - done) / decay))


class Ema:
    """Exponential moving average of parameters; short at first, so it never remembers the initial weights."""

    def __init__(self, parameters: Iterable[nn.Parameter], rate: float) -> None:
        self.parameters = [p for p in parameters]
        self.rate = rate
        self.average = [p.detach().clone() for p in self.parameters]
        self.steps = 0

    @torch.no_grad()
    def update(self) -> None:
        rate = max(self.rate, 1 / (1 + 0.25 * self.steps))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], rate)
        self.steps += 1

    @torch.no_grad()
    def copy_to_parameters(self) -> None:
        torch._foreach_copy_(list(self.parameters), self.average)
