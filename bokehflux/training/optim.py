"""Optimisers, learning-rate shape and weight averaging shared by all training stages."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn


class Optimizer:
    """Muon for hidden matrices, AdamW for everything else, one learning rate for both.

    matrices: the parameters that Muon updates, usually a network's `units().matrices`. Its update is scaled
    to the RMS of an AdamW update, so the two share a learning rate.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        lr: float,
        *,
        matrices: Iterable[Tensor] = (),
        betas: tuple[float, float] = (0.9, 0.98),
        weight_decay: float = 0.01,
    ) -> None:
        self.lr = lr
        chosen = {id(p) for p in matrices}
        of_muon = [p for p in parameters if id(p) in chosen]
        others = [p for p in parameters if id(p) not in chosen]
        fused = bool(others) and others[0].is_cuda
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(others, lr=lr, betas=betas, weight_decay=weight_decay, fused=fused)
        ]
        if of_muon:
            self.parts.append(Muon(of_muon, lr=lr, weight_decay=weight_decay))

    def step(self, lr_factor: float) -> None:
        """One update at lr * lr_factor, then clear the gradients."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = self.lr * lr_factor
            part.step()
            part.zero_grad(set_to_none=True)


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal by five Newton-Schulz steps (Jordan et al. 2024), for matrices and filters.

    `torch.optim.Muon` does the same one matrix after the other, thousands of small kernels a step; here all
    matrices of one shape go through in one batched product. A filter [O, I, h, w] counts as an O x Ihw
    matrix.
    """

    MOMENTUM = 0.95
    STEPS = ((3.4445, -4.7750, 2.0315),) * 5
    RMS = 0.2
    """Root mean square of an AdamW update, to which updates are scaled (Liu et al. 2025)."""

    def __init__(self, params: Sequence[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        shapes: dict[tuple[int, int], list[Tensor]] = {}
        for p in params:
            shapes.setdefault((p.shape[0], p[0].numel()), []).append(p)
        self.stacks = [
            (same, torch.zeros(len(same), *shape, device=same[0].device)) for shape, same in shapes.items()
        ]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        lr, decay = self.param_groups[0]["lr"], self.param_groups[0]["weight_decay"]
        for same, momentum in self.stacks:
            gradients = torch.stack([p.grad.flatten(1) for p in same if p.grad is not None])
            momentum.lerp_(gradients, 1 - self.MOMENTUM)
            update = orthogonal(gradients.lerp(momentum, self.MOMENTUM), self.STEPS)
            update *= -lr * self.RMS * max(momentum.shape[1:]) ** 0.5
            torch._foreach_mul_(same, 1 - lr * decay)
            torch._foreach_add_(same, [u.view(p.shape) for u, p in zip(update, same, strict=True)])


def orthogonal(x: Tensor, steps: Sequence[tuple[float, float, float]]) -> Tensor:
    """[n, a, b] -> float32 matrices with the same singular vectors and singular values near 1."""
    tall = x.shape[1] > x.shape[2]
    # bfloat16 is enough for an update, and what the matrix units are fastest at; a CPU is not.
    x = x.to(torch.bfloat16) if x.is_cuda else x
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for a, b, c in steps:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).float()


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
